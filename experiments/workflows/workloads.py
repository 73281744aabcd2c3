"""The workflows whose latency is measured, for both sides; it imports neither jax nor torch."""

import dataclasses

KINDS = ("text", "image to image", "inpainting", "ControlNet")
BATCHES = (1, 4)
STEPS, GUIDANCE_SCALE, STRENGTH = 4, 3.0, 0.5  # strength: of image to image; inpainting's is 1
INPUTS = 64  # images that are taken in turn, so that nothing of one is remembered when it comes again
PROMPT = "a large red star at the left on a white background"


@dataclasses.dataclass(frozen=True)
class Workflow:
    """One line of the table; `alone` and `narrow`: see `experiments.speed.workloads.Workload`.

    Attributes:
      kind: one of KINDS.
      folder: of the LCM, in diffusers format.
      batch: images.
    """

    kind: str
    folder: str
    batch: int
    alone: bool = False
    narrow: bool = False
