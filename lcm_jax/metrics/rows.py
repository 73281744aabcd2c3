"""Pictures for a row of a table: captions in order, the same initial noise in every row, the time of every batch.

One row of a table: draw it, time it, measure it; and what its numbers depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcm_jax.data import encoding
from lcm_jax.errors import LcmError
from lcm_jax.metrics import table
from lcm_jax.metrics.inputs import Inputs
from lcm_jax.metrics.measures import Measure
from lcm_jax.metrics.shapes import Endpoints
from lcm_jax.metrics.table import Row
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.sampling.generator import Generator, Settings, draw_noise, not_finite, to_uint8

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


_OF_WRITERS = ("transformers_version", "torch_dtype", "dtype")  # of a config: what wrote it, not what it is


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """The model that is measured.

    Attributes:
      name: in the table.
      record: what its files say of its distillation.
      size: of its pictures: height and width in pixels.
      shape: of a latent: [h w c].
      batch_size: pictures drawn at once, over all devices.
    """

    name: str
    pipeline: Pipeline
    record: Mapping[str, Any]
    size: tuple[int, int]
    shape: tuple[int, int, int]
    batch_size: int


def comparison(
    found: Inputs,
    seed: int,
    size: tuple[int, int],
    taken: Sequence[Measure],
    teacher: Pipeline | None,
    endpoint_steps: int,
) -> dict[str, Any]:
    """What all rows of a table share (`Row.comparison`).

    teacher, endpoint_steps: of the one-step error, beside the shapes' measure; see `Endpoints`.
    """
    metrics = {measure.name: dict(measure.about) for measure in taken}
    if teacher is not None:
        metrics["shapes"] |= {"teacher": encoding.weights_hash(teacher.params["unet"])}
        metrics["shapes"] |= {"endpoint_steps": endpoint_steps}
    return table.plain(
        {
            "seed": seed,
            "pictures": len(found.captions),
            "prompts": found.about(),
            "height": size[0],
            "width": size[1],
            "metrics": metrics,
        }
    )


def model_about(subject: Subject) -> dict[str, str]:
    """The model by the SHA-256 of its weights, vocabularies, noise table and what else its files say of its parts."""
    pipeline = subject.pipeline
    vocabularies = {
        f"{name}'s vocabulary": encoding.vocabulary_hash(tokenizer)
        for name, tokenizer in conditioning.tokenizers(pipeline).items()
    }
    schedule = pipeline.schedule
    noise = hashlib.sha256(schedule.prediction_type.encode() + np.asarray(schedule.alphas_cumprod).tobytes())
    weights = {name: encoding.weights_hash(params) for name, params in pipeline.params.items()}
    said = {
        part: {key: value for key, value in config.items() if not key.startswith("_") and key not in _OF_WRITERS}
        for part, config in pipeline.configs.items()
    }
    configs = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    return weights | vocabularies | {"schedule": noise.hexdigest(), "configs": configs.hexdigest()}


def settings_of(settings: Settings, guidance_scale: float, about: Mapping[str, Any]) -> dict[str, Any]:
    """`Row.settings` of a row. about: "model" and "program" of the command."""
    return table.plain({**about, "sampling": {**dataclasses.asdict(settings), "guidance_scale": guidance_scale}})


def is_there(
    before: Sequence[Row],
    subject: Subject,
    row: tuple[Settings, float],
    shared: Mapping[str, Any],
    about: Mapping[str, Any],
) -> bool:
    """Whether one of the rows kept `before` is what measuring `row` would give."""
    now = settings_of(*row, about)
    return any(old.model == subject.name and table.is_current(old, shared, now) for old in before)


def measured(
    subject: Subject,
    generator: Generator,
    captions: Sequence[str],
    settings: Settings,
    guidance_scale: float,
    taken: Sequence[Measure],
    ends: Endpoints | None,
    *,
    seed: int,
    timings: int,
    shared: Mapping[str, Any],
    about: Mapping[str, Any],
    move: Callable[[int], Any],
) -> Row:
    """Draws a picture of every caption, measures them, and times the batches.

    Args:
      ends: for the error of one step; it has none where the model is not told the scale of its guidance.
      timings: batches that the latency is the median of, at least; the first batch, which compiles, is none of them.
      shared, about: see `comparison` and `settings_of`.
      move: is told how many pictures were drawn.
    """
    states: list[Any] = [None] * len(taken)
    seconds = []
    for numbers, images, took in draw(
        generator,
        captions,
        settings,
        guidance_scale,
        seed=seed,
        shape=subject.shape,
        batch_size=subject.batch_size,
        repeat=timings + 1,
    ):
        seconds.append(took)
        if len(numbers):
            texts = [captions[n] for n in numbers]
            states = [one.fold(state, images, texts) for one, state in zip(taken, states, strict=True)]
            move(len(numbers))
    values: dict[str, float | None] = {}
    for one, state in zip(taken, states, strict=True):
        values |= one.finish(state)
    told = generator.pipeline.has_w_embedding or settings.sampler != "lcm"
    if ends is not None and settings.steps == 1 and told:
        values["endpoint_error"] = ends.error(generator, settings, guidance_scale)
    first, *rest = seconds
    low, median, high = (1000.0 * float(q) / subject.batch_size for q in np.quantile(rest, (0.25, 0.5, 0.75)))
    return Row(
        model=subject.name,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance_scale=guidance_scale,
        evaluations=evaluations(generator, settings, guidance_scale),
        values=values,
        milliseconds=median,
        quartiles=(low, high),
        timings=len(rest),
        compile_seconds=max(0.0, first - float(np.median(rest))),
        comparison=dict(shared),
        settings=settings_of(settings, guidance_scale, about),
    )
