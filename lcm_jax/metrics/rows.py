"""One row of a table: generate its images, time them, measure them; and what its numbers depend on.

Image i of every row is of caption i, from noise that depends on (seed, i) alone.
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
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.request import Request, evaluations

_OF_WRITERS = ("transformers_version", "torch_dtype", "dtype")  # of a config: what wrote it, not what it is


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """The model that is measured; name: in the table; batch_size: images generated at once, over all devices."""

    name: str
    generator: Generator
    batch_size: int


def generate(
    model: EvaluatedModel, captions: Sequence[str], request: Request, seed: int, repeat: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Batches of (numbers [b], images uint8 [b H W 3], seconds).

    `seconds` are of a whole batch without text encoding; those of the first include compiling. If there are fewer
    batches than `repeat`, the first is generated again, and comes with no numbers.

    Raises:
      LcmError: images that are not finite.
    """
    size, count = model.batch_size, len(captions)
    # The last batch is padded with its last number: one size, one program.
    parts = [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
    generator, settings = model.generator, request.settings
    for i in range(max(len(parts), repeat)):
        numbers = parts[i] if i < len(parts) else parts[0]
        cond = jax.block_until_ready(generator.encode([captions[n] for n in numbers]))
        steps = settings.steps if settings.sampler == "lcm" else 1
        noise = generator.noise(seed, numbers, steps, request.height, request.width)
        began = time.perf_counter()
        z = generator.latents(cond, noise, request.guidance_scale, settings, request.negative_prompt)
        images = generator.decode(z)
        seconds = time.perf_counter() - began
        bad = [int(numbers[i]) for i in not_finite(images)]
        if bad:
            raise LcmError(
                f"images {', '.join(map(str, dict.fromkeys(bad)))} of {settings.sampler} with {settings.steps} steps "
                "are not finite, and would be measured as black ones; try --dtype=float32, and check whether the "
                "weights are finite"
            )
        new = len(np.unique(numbers)) if i < len(parts) else 0
        yield numbers[:new], to_uint8(images[:new]), seconds


def comparison(
    found: Inputs,
    seed: int,
    size: tuple[int, int],
    measures: Sequence[Measure],
    teacher: Generator | None,
    endpoint_steps: int,
) -> dict[str, Any]:
    """What all rows of a table share (`Row.comparison`).

    teacher, endpoint_steps: of the one-step error, which belongs to the shapes' measure; see `Endpoints`.
    """
    metrics = {measure.name: dict(measure.about) for measure in measures}
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


def model_about(generator: Generator) -> dict[str, str]:
    """The model by the SHA-256 of its weights, vocabularies, noise table, and what else its files say of its parts."""
    pipeline = generator.pipeline
    vocabularies = {f"{name}'s vocabulary": t.vocabulary_hash() for name, t in pipeline.tokenizers.items()}
    schedule = pipeline.schedule
    noise = hashlib.sha256(schedule.prediction_type.encode() + np.asarray(schedule.alphas_cumprod).tobytes())
    weights = {name: encoding.weights_hash(params) for name, params in generator.params.items()}
    said = {
        part: {key: value for key, value in config.items() if not key.startswith("_") and key not in _OF_WRITERS}
        for part, config in pipeline.configs.items()
    }
    configs = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    return weights | vocabularies | {"schedule": noise.hexdigest(), "configs": configs.hexdigest()}


def settings_of(model: EvaluatedModel, request: Request, about: Mapping[str, Any]) -> dict[str, Any]:
    """`Row.settings` of a row. about: "model" and "program" of the command."""
    constants = model.generator.pipeline.constants
    sampling = {
        **dataclasses.asdict(request.settings),
        "original_steps": constants.solver_steps,
        "timestep_scaling": constants.timestep_scaling,
        "sigma_data": constants.sigma_data,
        "set_alpha_to_one": constants.set_alpha_to_one,
        "guidance_scale": request.guidance_scale,
    }
    return table.plain({**about, "sampling": sampling})


def is_there(
    before: Sequence[Row], model: EvaluatedModel, request: Request, shared: Mapping[str, Any], about: Mapping[str, Any]
) -> bool:
    """Whether one of the rows kept `before` is what measuring this one would give."""
    now = settings_of(model, request, about)
    return any(old.model == model.name and table.is_current(old, shared, now) for old in before)


def measured(
    model: EvaluatedModel,
    captions: Sequence[str],
    request: Request,
    measures: Sequence[Measure],
    ends: Endpoints | None,
    *,
    seed: int,
    timings: int,
    shared: Mapping[str, Any],
    about: Mapping[str, Any],
    advance: Callable[[int], Any],
) -> Row:
    """Generates an image of every caption, measures them, and times the batches.

    Args:
      ends: for the error of one step; a model that is not conditioned on its guidance scale has none.
      timings: the least number of batches that the latency is the median of; the first, which compiles, is left out.
      shared, about: see `comparison` and `settings_of`.
      advance: is called with the number of images generated.
    """
    states: list[Any] = [None] * len(measures)
    seconds = []
    for numbers, images, took in generate(model, captions, request, seed, repeat=timings + 1):
        seconds.append(took)
        if len(numbers):
            texts = [captions[n] for n in numbers]
            states = [one.fold(state, images, texts) for one, state in zip(measures, states, strict=True)]
            advance(len(numbers))
    values: dict[str, float | None] = {}
    for one, state in zip(measures, states, strict=True):
        values |= one.finish(state)
    settings, pipeline = request.settings, model.generator.pipeline
    if ends is not None and settings.steps == 1 and (pipeline.has_w_embedding or settings.sampler != "lcm"):
        values["endpoint_error"] = ends.error(model.generator, request)
    first, *rest = seconds
    low, median, high = (1000.0 * float(q) / model.batch_size for q in np.quantile(rest, (0.25, 0.5, 0.75)))
    return Row(
        model=model.name,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance_scale=request.guidance_scale,
        evaluations=evaluations(pipeline, request),
        values=values,
        milliseconds=median,
        quartiles=(low, high),
        timings=len(rest),
        compile_seconds=max(0.0, first - float(np.median(rest))),
        comparison=dict(shared),
        settings=settings_of(model, request, about),
    )
