"""Generates the same images with torch diffusers and with lcm_jax: what `lcm_jax.export --verify` compares.

Both read the exported folder, start from the same latents and add the same noise between the steps, in float32. This
is the only module that imports torch, and only when it is called.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.sampling.load import load
from lcm_jax.sampling.plan import noise_entries
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.request import make_request

NEEDS = ("torch", "diffusers")
STEPS = 4
LARGEST_PIXEL = 2  # of 255: two roundings may differ; anything more is another image


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference over all images.

    Attributes:
      pixel: of uint8 values.
      value: of the floats in [0, 1] before rounding.
      guidance_scale: of the images, the model's default.
    """

    pixel: int
    value: float
    guidance_scale: float

    @property
    def is_small(self) -> bool:
        return self.pixel <= LARGEST_PIXEL


def check_installed() -> None:
    """Raises LcmError, which says how to install them, if torch or diffusers is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise LcmError(f"--verify needs {' and '.join(missing)}; pip install lcm_jax[torch], or leave --verify out")


def compare(folder: str | Path, prompts: Sequence[str], steps: int = STEPS, seed: int = 0) -> Difference:
    """Generates one image per prompt with each of the two from the folder of an LCM, and compares them.

    Raises:
      LcmError: images of ours that are not finite: both would be black, and equal.
    """
    model = load(folder, dtype="float32")
    request = make_request(model.pipeline, steps=steps)
    size, numbers = (request.height, request.width), range(len(prompts))
    model.check_memory(request, len(prompts))
    noise = model.noise(seed, numbers, noise_entries(request.settings), *size)
    with jax.default_matmul_precision("highest"):
        ours = model.generate(request, prompts, numbers, seed)
    if bad := not_finite(ours):
        raise LcmError(
            f"{folder}: {len(bad)} of {len(ours)} images are not finite, and would be black; check whether the run "
            "diverged"
        )
    scale = request.guidance_scale
    theirs = diffusers_images(folder, prompts, noise, steps, scale, size)
    pixels = np.abs(to_uint8(ours).astype(int) - to_uint8(theirs).astype(int))
    return Difference(int(pixels.max()), float(np.abs(ours - theirs).max()), scale)


def diffusers_images(
    folder: str | Path, prompts: Sequence[str], noise: np.ndarray, steps: int, scale: float, size: tuple[int, int]
) -> np.ndarray:
    """Images in [0, 1], [b h w 3], of the diffusers pipeline that the folder's model_index.json names.

    noise: [n b h w c]; entry 0 holds the initial latents, the others replace LCMScheduler's random numbers, of which
    TCDScheduler draws none by default.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.schedulers import scheduling_lcm

    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    start, *between = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 1, 4, 2, 3)))
    draws = iter(between)
    with mock.patch.object(scheduling_lcm, "randn_tensor", lambda *_, **__: next(draws)), torch.inference_mode():
        return pipe(
            prompt=list(prompts),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=start,
            output_type="np",
        ).images
