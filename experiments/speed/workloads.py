"""The workloads: kinds of work on models of published architectures, the most interesting first.

matmul   a square product, the ceiling that utilisation is a share of
unet     one pass of the UNet
sample   prompts -> images on the host: tokenizer, text encoders, 4 LCM steps conditioned on w, VAE
lcd      one training step of Latent Consistency Distillation, encoded latents and text given
lora     the same for an LCM-LoRA
step     one training step of a file of configs/ as it stands, on models with random weights; `lcm_jax` alone
"""

import dataclasses
from collections.abc import Sequence

KINDS = ("matmul", "unet", "sample", "lcd", "lora", "step")
TRAINING = ("lcd", "lora", "step")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
      kind: one of KINDS.
      model: a key of MODELS; of a "step" the config's name.
      size: side of the images in pixels; for "matmul" the side of the matrices.
      batch: images.
      dtype: of the networks' computation.
      remat: of training, a choice of `lcm_jax.models.layers`: activations are recomputed for gradients; in torch by
        gradient checkpointing, unless it is "none".
      alone: the sides do not fit on a card together, so one ends before the other begins.
      narrow: rehearsed on a CPU, see `narrowed`.
    """

    kind: str
    model: str
    size: int
    batch: int
    dtype: str
    remat: str = "none"
    alone: bool = False
    narrow: bool = False

    @property
    def name(self) -> str:
        """Of the line, as in --only."""
        remat = f"-remat-{self.remat}" if self.remat != "none" else ""
        narrow = "-narrow" if self.narrow else ""
        return f"{self.kind}-{self.model}-{self.size}-b{self.batch}-{self.dtype}{remat}{narrow}"

    def narrowed(self) -> "Workload":
        """The same work at a size for CPUs: one image of 64 pixels, models of `side.narrow_copy`."""
        size = 256 if self.kind == "matmul" else 64
        return dataclasses.replace(self, size=size, batch=1, narrow=True)


@dataclasses.dataclass(frozen=True)
class Model:
    """`source`: a name that `lcm_jax.assets.resolve` or `architecture` knows; configs: of the training steps."""

    source: str
    lcd: str = ""
    lora: str = ""


MODELS = {
    "none": Model(""),
    "shapes": Model("shapes", "configs/shapes_lcm.py", "configs/shapes_lcm_lora.py"),
    "sd15": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", "configs/sd15_lcm.py", "configs/sd15_lcm_lora.py"),
    "sdxl": Model("stabilityai/stable-diffusion-xl-base-1.0", "configs/sdxl_lcm.py", "configs/sdxl_lcm_lora.py"),
}

HEADLINE = Workload("lcd", "sd15", 768, 16, "bfloat16", "block", alone=True)
HEADLINE_STEPS, HEADLINE_PAPER_HOURS = 4000, 32  # the LCM paper's run at 768 pixels, in A100 hours


def cpu() -> list[Workload]:
    """The embedded model, and one pass of Stable Diffusion 1.5; float32."""
    shapes = (("sample", 4), ("lcd", 32), ("sample", 1), ("sample", 8), ("lora", 32), ("lcd", 8))
    found = [Workload("matmul", "none", 2048, 1, "float32")]
    found += [Workload(kind, "shapes", 64, batch, "float32") for kind, batch in shapes]
    return [*found[:3], Workload("unet", "sd15", 512, 1, "float32"), *found[3:]]


def gpu() -> list[Workload]:
    """All models, bfloat16; the workloads of the project's goals come first."""

    def made(kind: str, model: str, size: int, batch: int) -> Workload:
        if kind not in TRAINING:
            return Workload(kind, model, size, batch, "bfloat16")
        large = batch * size**2 > 8 * 512**2 or model == "sdxl"
        remat = "block" if large and model != "shapes" else "none"
        return Workload(kind, model, size, batch, "bfloat16", remat, alone=kind == "lcd" and large)

    goals = (
        ("sample", "sd15", 512, 1),
        ("sample", "sd15", 512, 4),
        ("lcd", "sd15", 512, 8),
        ("sample", "sdxl", 1024, 1),
        ("lora", "sd15", 512, 8),
        ("sample", "sd15", 768, 4),
        ("sample", "sdxl", 1024, 4),
        ("lora", "sdxl", 1024, 4),
        ("lcd", "sdxl", 1024, 4),
        ("sample", "shapes", 64, 8),
        ("lcd", "shapes", 64, 32),
    )
    sizes = (("shapes", 64), ("sd15", 512), ("sd15", 768), ("sdxl", 1024))
    others = [("sample", *size, batch) for size in sizes for batch in (1, 4, 8)]
    others += [(kind, *size, batch) for size in sizes for kind in TRAINING for batch in (1, 4, 8)]
    product = Workload("matmul", "none", 8192, 1, "bfloat16")
    return list(dict.fromkeys([product, HEADLINE, *(made(*one) for one in (*goals, *others))]))


LISTS = {"cpu": cpu, "gpu": gpu}


def chosen(device: str, only: Sequence[str], remat: str | None = None, narrow: bool = False) -> list[Workload]:
    """The device's workloads whose names contain one of `only` (all, if it is empty).

    remat: of every training step, instead of the list's.
    narrow: those of a GPU, narrowed.
    """
    listed = dict.fromkeys(w.narrowed() for w in gpu()) if narrow else LISTS[device]()
    found = [w for w in listed if not only or any(part in w.name for part in only)]
    return [dataclasses.replace(w, remat=remat) if remat and w.kind in TRAINING else w for w in found]
