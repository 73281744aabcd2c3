"""One row of a table: generate its images, time them and measure them.

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

from lcm_jax.errors import LcmError
from lcm_jax.metrics.inputs import Inputs
from lcm_jax.metrics.measures import Measure
from lcm_jax.metrics.shapes import Endpoints
from lcm_jax.metrics.table import Row, is_current, plain
from lcm_jax.pretrained.model import weights_hash
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.plan import noise_entries
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.request import Request, evaluations

_OF_WRITERS = ("transformers_version", "torch_dtype", "dtype")  # in a config: what wrote it, not what it is


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What all rows of one command share.

    Attributes:
      model: its name in the table.
      generator: the model.
      batch_size: images generated at once, over all devices.
      captions: of the images of a row.
      seed: of their noise.
      measures: what is measured.
      endpoints: for the error of one step; None: it is not measured.
      timings: the least number of batches that a latency is the median of.
      comparison: see `Row.comparison`.
      state: "model" and "program" of `Row.settings`.
    """

    model: str
    generator: Generator
    batch_size: int
    captions: Sequence[str]
    seed: int
    measures: Sequence[Measure]
    endpoints: Endpoints | None
    timings: int
    comparison: Mapping[str, Any]
    state: Mapping[str, Any]

    def settings(self, request: Request) -> dict[str, Any]:
        """`Row.settings` of a request's row."""
        constants = self.generator.pipeline.constants
        sampling = {
            **{key: value for key, value in dataclasses.asdict(request.settings).items() if value not in (None, 0, ())},
            "original_steps": constants.solver_steps,
            "timestep_scaling": constants.timestep_scaling,
            "sigma_data": constants.sigma_data,
            "set_alpha_to_one": constants.set_alpha_to_one,
            "guidance_scale": request.guidance_scale,
        }
        return plain({**self.state, "sampling": sampling})

    def is_measured(self, rows: Sequence[Row], request: Request) -> bool:
        """Whether measuring a request would only repeat one of `rows`."""
        settings = self.settings(request)
        return any(row.model == self.model and is_current(row, self.comparison, settings) for row in rows)

    def prepare(self, request: Request) -> None:
        """What must not be timed: references of the measures, and compiling the decoder."""
        for measure in self.measures:
            measure.prepare()
        noise = self.generator.noise(self.seed, [0] * self.batch_size, 1, request.height, request.width)
        self.generator.decode(np.zeros_like(noise[0]))

    def generate(self, request: Request) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """Batches of (numbers [b], images uint8 [b H W 3], seconds).

        `seconds` are of a whole batch without text encoding; those of the first include compiling. If there are fewer
        batches than the timings need, the first is generated again and comes without numbers.

        Raises:
          LcmError: images that are not finite.
        """
        size, count = self.batch_size, len(self.captions)
        # The last batch is padded with its last number: one size, one program.
        parts = [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
        generator, settings = self.generator, request.settings
        for i in range(max(len(parts), self.timings + 1)):
            numbers = parts[i] if i < len(parts) else parts[0]
            cond = jax.block_until_ready(generator.encode([self.captions[n] for n in numbers]))
            noise = generator.noise(self.seed, numbers, noise_entries(settings), request.height, request.width)
            start = time.perf_counter()
            z = generator.latents(
                cond,
                noise,
                request.guidance_scale,
                settings,
                request.negative_prompt,
                nag_scale=request.nag_scale,
            )
            images = generator.decode(z)
            seconds = time.perf_counter() - start
            if bad := dict.fromkeys(str(numbers[i]) for i in not_finite(images)):
                raise LcmError(
                    f"images {', '.join(bad)} of {settings.sampler} with {settings.steps} steps are not finite, and "
                    "would be measured as black ones; try --dtype=float32, and check whether the weights are finite"
                )
            new = len(np.unique(numbers)) if i < len(parts) else 0
            yield numbers[:new], to_uint8(images[:new]), seconds

    def measure(self, request: Request, advance: Callable[[int], Any]) -> Row:
        """Generates an image of every caption, measures all, and times the batches.

        advance: is called with the number of images generated.
        """
        states: list[Any] = [None] * len(self.measures)
        seconds = []
        for numbers, images, took in self.generate(request):
            seconds.append(took)
            if len(numbers):
                texts = [self.captions[n] for n in numbers]
                states = [one.add(state, images, texts) for one, state in zip(self.measures, states, strict=True)]
                advance(len(numbers))
        found = {}
        for one, state in zip(self.measures, states, strict=True):
            found |= one.estimates(state)
        values: dict[str, float | None] = {key: estimate.value for key, estimate in found.items()}
        settings, pipeline = request.settings, self.generator.pipeline
        # An LCM without w embedding is not conditioned on the guidance scale of the ODE.
        if self.endpoints and settings.steps == 1 and (pipeline.has_w_embedding or settings.sampler != "lcm"):
            values["endpoint_error"] = self.endpoints.error(self.generator, request)
        first, *rest = seconds
        low, median, high = (1000.0 * float(q) / self.batch_size for q in np.quantile(rest, (0.25, 0.5, 0.75)))
        return Row(
            model=self.model,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance_scale=request.guidance_scale,
            evaluations=evaluations(pipeline, request),
            values=values,
            milliseconds=median,
            quartiles=(low, high),
            timings=len(rest),
            compile_seconds=max(0.0, first - float(np.median(rest))),
            comparison=dict(self.comparison),
            settings=self.settings(request),
            intervals={key: estimate.interval for key, estimate in found.items() if estimate.interval},
        )


def comparison(
    inputs: Inputs, seed: int, size: tuple[int, int], measures: Sequence[Measure], endpoints: Endpoints | None
) -> dict[str, Any]:
    """`Row.comparison` of a command. The endpoint error belongs to the metric "shapes"."""
    metrics = {measure.name: dict(measure.about) for measure in measures}
    if endpoints is not None:
        metrics["shapes"] |= endpoints.about
    captions = {"seed": seed, "pictures": len(inputs.captions), "prompts": inputs.about()}
    return plain({**captions, "height": size[0], "width": size[1], "metrics": metrics})


def model_about(generator: Generator) -> dict[str, str]:
    """SHA-256 of a model's weights, vocabularies, noise table, and of the configs of its parts."""
    pipeline = generator.pipeline
    vocabularies = {f"{name}'s vocabulary": t.vocabulary_hash() for name, t in pipeline.tokenizers.items()}
    schedule = pipeline.schedule
    noise = hashlib.sha256(schedule.prediction_type.encode() + np.asarray(schedule.alphas_cumprod).tobytes())
    weights = {name: weights_hash(params) for name, params in generator.params.items()}
    settings = {
        part: {key: value for key, value in config.items() if not key.startswith("_") and key not in _OF_WRITERS}
        for part, config in pipeline.configs.items()
    }
    configs = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    return weights | vocabularies | {"schedule": noise.hexdigest(), "configs": configs.hexdigest()}
