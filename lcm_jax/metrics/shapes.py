"""How well a model generates the shapes set: its images by their captions, and one step by the end of the ODE.

    caption accuracy   share of images that show every attribute that their caption names
    Frechet distance   to 2,048 held-out renders in the scorer's features; comparable only among sets of one count
    coverage distance  of what captions leave open, from its known law; see `Coverage`
    endpoint error     RMSE(z_one_step, z_end) / std(z_end);  z_end: DDIM over the solver grid, from the same noise

Distillation makes the endpoint error small: a consistency model without error jumps to z_end in one step (Luo et al.
2023, equation 9).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.diffusion import solvers
from lcm_jax.diffusion.denoiser import guided_output
from lcm_jax.metrics import intervals
from lcm_jax.metrics.distances import FeatureStatistics, frechet_distance, frechet_influence, statistics
from lcm_jax.metrics.intervals import Estimate
from lcm_jax.metrics.networks import shapes as scorer
from lcm_jax.pretrained.model import weights_hash
from lcm_jax.runtime import kernels
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.request import Request

REFERENCES = 2048  # held-out renders behind every Frechet distance
REFERENCE_START = 100_000  # index of the first one, far from those that captions are taken from
ENDPOINTS = 64  # captions that the endpoint error is taken over, at most
LEAST_PER_CAPTION = 8  # images that coverage is measured with: by chance, 8 objects are of one size in 0.8 % of cases


def heldout(count: int) -> list[shapes.Spec]:
    """The first `count` images of the held-out split, as specs."""
    return [shapes.spec(i, "heldout") for i in range(count)]


@functools.cache
def reference(style: str = "plain") -> FeatureStatistics:
    """Statistics of the scorer's features of the reference renders in a style."""
    renders, _ = shapes.examples(REFERENCE_START, REFERENCES, "heldout", style=style)
    return statistics(scorer.score(renders)[1])


def judge(
    predicted: Mapping[str, np.ndarray],
    features: np.ndarray,
    labels: Mapping[str, np.ndarray],
    to: FeatureStatistics,
    clusters: np.ndarray,
) -> tuple[Estimate, Estimate]:
    """(caption accuracy in 0..1, Frechet distance) of images that the scorer has read.

    Args:
      predicted, features: from `score` of metrics/networks/shapes.py, of at least 65 images.
      labels: of their captions, in the same order (`data.shapes.label_arrays`).
      to: statistics of the reference (`reference`).
      clusters: of the captions (`intervals.clusters`).
    """
    (accuracy,) = intervals.of_means(scorer.all_right(predicted, labels)[:, None], clusters)
    own = statistics(features)
    influence = frechet_influence(features, own, to)
    return accuracy, intervals.of_distance(frechet_distance(own, to), influence, clusters)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of the law of what captions leave open is found among several images of each.

    Means over captions with an attribute that is not named. Of images drawn from the law itself, `distance` is 0 and
    `diversity` 1 in expectation, however many there are.

    Attributes:
      distance: total variation between the histogram of an unnamed attribute and its law, sum |X_k / n - p_k| / 2, less
        what it is for n draws from the law, p_k = 1/k; mean over the unnamed attributes.
      collapsed: share of captions with an unnamed attribute that is the same in all images.
      diversity: number of different combinations of the unnamed attributes over what n draws from the law would show,
        K (1 - (1 - 1/K)^n) of K.
      each: these three for each caption, [captions 3].
    """

    distance: float
    collapsed: float
    diversity: float
    each: np.ndarray = dataclasses.field(compare=False, repr=False)


def expected_distance(k: int, n: int) -> float:
    """Total variation between the uniform law on k values and the histogram of n draws from it, in expectation.

    The count X of a value is binomial, p = 1/k, and E |X - n p| = 2 v (1 - p) P(X = v), v = floor(n p) + 1 (de Moivre).
    """
    p, v = 1.0 / k, n // k + 1
    choose = math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1)
    return k * v * (1.0 - p) * math.exp(choose + v * math.log(p) + (n - v) * math.log1p(-p)) / n


def coverage(predicted: Mapping[str, np.ndarray], captions: Sequence[str]) -> Coverage | None:
    """The coverage of images that the scorer has read; None if no caption counts.

    Those count that leave something open and come `LEAST_PER_CAPTION` times in a row or more. Short captions also come
    again by chance, among 2,000 as often as twelve times.

    Args:
      predicted: from `score` of metrics/networks/shapes.py: class indices [n] of each attribute.
      captions: of the images, in the same order.
    """
    found = []
    for caption, run in itertools.groupby(range(len(captions)), captions.__getitem__):
        named, numbers = shapes.parse_caption(caption), list(run)
        if len(numbers) >= LEAST_PER_CAPTION and len(named) < len(shapes.ATTRIBUTES):
            open_ = [name for name in shapes.ATTRIBUTES if name not in named]
            found.append(_coverage(np.stack([predicted[name][numbers] for name in open_]), open_))
    if not found:
        return None
    return Coverage(*(float(value) for value in np.mean(found, axis=0)), each=np.array(found))


def _coverage(read: np.ndarray, names: Sequence[str]) -> tuple[float, float, float]:
    """(distance, collapsed, diversity) of one caption's images, from what was read of its open attributes [a n]."""
    n = read.shape[1]
    counts = [len(shapes.ATTRIBUTES[name]) for name in names]
    distances = []
    for values, k in zip(read, counts, strict=True):
        distance = np.abs(np.bincount(values, minlength=k) / n - 1.0 / k).sum() / 2.0
        distances.append(distance - expected_distance(k, n))
    total = math.prod(counts)
    expected = total * -math.expm1(n * math.log1p(-1.0 / total))
    same = any((values == values[0]).all() for values in read)
    return float(np.mean(distances)), float(same), np.unique(read, axis=1).shape[1] / expected


def joined(read: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The results of `score` of several batches as one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *read)


class Endpoints:
    """Endpoints of a teacher's guided ODE for the first captions of a table, solved once for each guidance scale."""

    def __init__(self, teacher: Generator, captions: Sequence[str], solver_steps: int, seed: int, request: Request):
        """Solves nothing yet.

        Args:
          teacher: a model without w embedding.
          captions: of image i at i; the first `ENDPOINTS` are used.
          solver_steps: N of the solver grid.
          seed: of the table's noise.
          request: for the size of the images.
        """
        self.captions = list(captions[:ENDPOINTS])
        self._teacher, self._solver_steps, self._seed, self._request = teacher, solver_steps, seed, request
        self._ends: dict[float, np.ndarray] = {}

    @property
    def about(self) -> dict[str, Any]:
        """Identifies the ODE: two errors are comparable if it is equal."""
        return {"teacher": weights_hash(self._teacher.params["unet"]), "endpoint_steps": self._solver_steps}

    @functools.cached_property
    def noise(self) -> np.ndarray:
        """[1 b h w c], as for the first step of every sampler."""
        size = self._request.height, self._request.width
        return self._teacher.noise(self._seed, range(len(self.captions)), 1, *size)

    def at(self, guidance_scale: float) -> np.ndarray:
        """Latents [b h w c] where the ODE ends at a guidance scale."""
        if guidance_scale not in self._ends:
            teacher = self._teacher
            static = (teacher.pipeline.unet, teacher.pipeline.schedule, self._solver_steps)
            cond, null = teacher.encode(self.captions), teacher.null()
            end = _program()(*static, teacher.params["unet"], cond, null, self.noise[0], guidance_scale)
            self._ends[guidance_scale] = np.asarray(end)
        return self._ends[guidance_scale]

    def error(self, generator: Generator, request: Request) -> float:
        """RMSE between the result of a request of one step and the endpoints, in standard deviations of the latter."""
        cond, scale = generator.encode(self.captions), request.guidance_scale
        of_text = {"negative_prompt": request.negative_prompt, "nag_scale": request.nag_scale}
        z = np.asarray(generator.latents(cond, self.noise, scale, request.settings, **of_text))
        end = self.at(scale)
        return float(np.sqrt(np.mean(np.square(z - end))) / np.std(end))


@functools.cache
def _program() -> Callable[..., jax.Array]:
    """The jitted endpoint. Not made at import: the compiler's options need a device."""

    @functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=kernels.inference())
    def endpoint(unet, schedule, solver_steps, params, cond, null, noise, scale):
        def model(x, t):
            return guided_output(unet, params, x, t, cond, null, scale - 1.0)

        return solvers.ode_endpoint(model, noise, schedule, solver_steps)

    return endpoint
