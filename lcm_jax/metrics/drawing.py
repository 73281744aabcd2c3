"""Pictures for a row of a table: captions in order, the same initial noise in every row, the time of every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.generate import Generator, Settings, draw_noise, not_finite, to_uint8

Drawn = tuple[np.ndarray, np.ndarray, float]  # numbers [b], pictures uint8 [b H W 3], seconds


def batches(count: int, size: int) -> list[np.ndarray]:
    """0 .. count - 1 in batches of `size`; the last is filled up with its last number, so that one program serves."""
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def draw(
    generator: Generator,
    captions: Sequence[str],
    settings: Settings,
    guidance_scale: float,
    *,
    seed: int,
    shape: Sequence[int],
    batch_size: int,
    repeat: int = 0,
) -> Iterator[Drawn]:
    """Batches of (numbers, pictures, seconds): picture i of caption i, its noise a function of (seed, i) alone.

    The numbers of the last batch may be fewer than `batch_size`, the pictures are as many as they. `seconds` are of
    the whole batch, text encoding not included; those of the first are the compiler's, too.

    Raises:
      LcmError: pictures that are not finite.

    Args:
      seed, shape: of the noise (`generate.draw_noise`).
      repeat: draws the first batch again, where there are fewer batches than this, and gives it with no numbers.
    """
    parts = batches(len(captions), batch_size)
    for i in range(max(len(parts), repeat)):
        numbers = parts[i] if i < len(parts) else parts[0]
        cond = jax.block_until_ready(generator.encode([captions[n] for n in numbers], report=False))
        noise = draw_noise(seed, numbers, settings.steps if settings.sampler == "lcm" else 1, shape)
        begun = time.perf_counter()
        images = np.asarray(generator(cond, noise, guidance_scale, settings))
        seconds = time.perf_counter() - begun
        bad = [int(numbers[i]) for i in not_finite(images)]
        if bad:
            raise LcmError(
                f"pictures {', '.join(map(str, dict.fromkeys(bad)))} of {settings.sampler} with "
                f"{settings.steps} steps are not finite, and would be measured as black ones; try "
                "--dtype=float32, and see whether the weights are finite"
            )
        new = len(np.unique(numbers)) if i < len(parts) else 0
        yield numbers[:new], to_uint8(images[:new]), seconds


def evaluations(generator: Generator, settings: Settings, guidance_scale: float) -> int:
    """Passes of the UNet for one picture: two a step where guidance takes a second one."""
    passes = 1 if generator.pipeline.has_w_embedding or guidance_scale == 1.0 else 2
    return passes * settings.steps
