"""The same pictures by torch diffusers and by lcm_jax: what `lcm_jax.export --verify` measures.

Both programs read the written folder, start from the same latents and add the same noise between the steps, in float32.
This is the only module that imports torch, and only when it is called.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from lcm_jax import sample
from lcm_jax.errors import LcmError
from lcm_jax.sampling import generator as generate_lib

NEEDS = ("torch", "diffusers")
STEPS = 4
LARGEST_PIXEL = 2  # of 255: two roundings may fall apart; anything beyond is another picture


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest over all pictures. pixel: of uint8 values; value: of the floats in [0, 1] before rounding."""

    pixel: int
    value: float

    @property
    def is_small(self) -> bool:
        return self.pixel <= LARGEST_PIXEL


def check_installed() -> None:
    """Raises LcmError, which says how to install it, where torch or diffusers is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise LcmError(f"--verify needs {' and '.join(missing)}; pip install lcm_jax[torch], or leave --verify out")


def compare(folder: str | Path, prompts: Sequence[str], scale: float, steps: int = STEPS, seed: int = 0) -> Difference:
    """Draws one picture per prompt with either program from the folder of an LCM, and compares them."""
    pipeline, record = sample.load(str(folder))
    height, width = generate_lib.default_size(pipeline)
    shape = (height // pipeline.vae.factor, width // pipeline.vae.factor, pipeline.unet.in_channels)
    settings = generate_lib.settings_for(pipeline, record, "lcm", steps, "trailing")
    noise = generate_lib.draw_noise(seed, range(len(prompts)), steps, shape)
    with jax.default_matmul_precision("highest"):
        generate = generate_lib.Generator(pipeline)
        ours = generate(generate.encode(prompts), noise, scale, settings)
    theirs = diffusers_pictures(folder, prompts, noise, scale, (height, width))
    pixels = np.abs(generate_lib.to_uint8(ours).astype(int) - generate_lib.to_uint8(theirs).astype(int))
    return Difference(int(pixels.max()), float(np.abs(ours - theirs).max()))


def diffusers_pictures(
    folder: str | Path, prompts: Sequence[str], noise: np.ndarray, scale: float, size: tuple[int, int]
) -> np.ndarray:
    """Pictures in [0, 1], [b h w 3], of the pipeline that the folder's model_index.json names.

    noise [steps b h w c]: entry 0 are the initial latents, the others what LCMScheduler would have drawn.
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
            num_inference_steps=len(noise),
            guidance_scale=scale,
            latents=start,
            output_type="np",
        ).images
