"""Held-out captions of the shapes set, and how far pictures that a model drew for them are from what they say.

    caption accuracy   share of pictures whose five attributes are those of their caption
    Frechet distance   to 2,048 other held-out renders in the scorer's features

Frechet distances are comparable only among sets of one count.

How far one step of a sampler is from where the teacher's guided ODE ends: the error that distillation makes small.

    error = RMSE(z_one_step, z_end) / std(z_end)        z_end = DDIM over the whole solver grid, from the same noise

This is what one step of a perfect consistency model would give (Luo et al. 2023, equation 9).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.diffusion import solvers
from lcm_jax.diffusion.denoiser import guided_output
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.networks import shapes as shapes_scorer
from lcm_jax.runtime import kernels
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.request import Request

REFERENCES = 2048  # held-out renders behind every Frechet distance
REFERENCE_START = 100_000  # their first index: apart from the pictures that captions are taken from


def heldout(count: int) -> list[shapes.Spec]:
    """The first `count` pictures of the held-out split, as specs."""
    return [shapes.spec(i, "heldout") for i in range(count)]


@functools.cache
def reference(style: str = "plain") -> frechet.FeatureStatistics:
    """Statistics of the scorer's features of the reference renders in a style."""
    renders, _ = shapes.examples(REFERENCE_START, REFERENCES, "heldout", style=style)
    return frechet.statistics(shapes_scorer.score(renders)[1])


def judge(
    predicted: Mapping[str, np.ndarray],
    features: np.ndarray,
    labels: Mapping[str, np.ndarray],
    to: frechet.FeatureStatistics,
) -> tuple[float, float]:
    """(caption accuracy in 0..1, Frechet distance) of what the scorer read.

    Args:
      predicted, features: as `shapes_scorer.score` gives them, of at least 65 pictures.
      labels: of their captions, in their order (`shapes.label_arrays`).
      to: statistics of the reference (`reference`).
    """
    accuracy = shapes_scorer.caption_accuracy(predicted, labels)
    return accuracy, frechet.frechet_distance(frechet.statistics(features), to)


def joined(read: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the scorer read of several batches, as if of one."""
    predicted = {name: np.concatenate([part[name] for part, _ in read]) for name in shapes.ATTRIBUTES}
    return predicted, np.concatenate([features for _, features in read])


COUNT = 64  # captions that the error is taken over, at most


class Endpoints:
    """Endpoints of a teacher's guided ODE for the first captions of a table, solved once for each guidance scale."""

    def __init__(self, teacher: Generator, captions: Sequence[str], solver_steps: int, seed: int, request: Request):
        """Solves nothing yet.

        Args:
          teacher: a model that is guided by two passes.
          captions: of image i at i; the first COUNT are taken.
          solver_steps: N of the solver grid.
          seed: of the noise, the table's.
          request: for the size of the images.
        """
        self.captions = list(captions[:COUNT])
        self.noise = teacher.noise(seed, range(len(self.captions)), 1, request.height, request.width)
        self._teacher, self._solver_steps = teacher, solver_steps
        self._ends: dict[float, np.ndarray] = {}

    def at(self, guidance_scale: float) -> np.ndarray:
        """Latents [b h w c] where the ODE ends at a guidance scale."""
        if guidance_scale not in self._ends:
            teacher = self._teacher
            static = (teacher.pipeline.unet, teacher.pipeline.schedule, self._solver_steps)
            cond, null = teacher.encode(self.captions), teacher.null()
            end = _endpoint()(*static, teacher.params["unet"], cond, null, self.noise[0], guidance_scale)
            self._ends[guidance_scale] = np.asarray(end)
        return self._ends[guidance_scale]

    def error(self, generator: Generator, request: Request) -> float:
        """RMSE of one step of a sampler to the endpoint, in standard deviations of the endpoints."""
        cond, scale = generator.encode(self.captions), request.guidance_scale
        z = np.asarray(generator.latents(cond, self.noise, scale, request.settings, request.negative_prompt))
        end = self.at(scale)
        return float(np.sqrt(np.mean(np.square(z - end))) / np.std(end))


@functools.cache
def _endpoint() -> Callable:
    """The jitted endpoint; not made when this module is imported, because the compiler's options need a device."""

    @functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=kernels.inference())
    def endpoint(unet, schedule, solver_steps, params, cond, null, noise, scale):
        def model(x, t):
            return guided_output(unet, params, x, t, cond, null, scale - 1.0)

        return solvers.ode_endpoint(model, noise, schedule, solver_steps)

    return endpoint
