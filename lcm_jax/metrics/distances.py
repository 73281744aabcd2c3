"""Frechet distance between two sets of features, from statistics that can be gathered shard by shard.

For Gaussians fitted to the two sets, with means m and covariances C,

    d^2 = |m_1 - m_2|^2 + trace(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

(Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500). The trace of the root is taken from symmetric matrices
only: with S = C_1^(1/2), trace (C_1 C_2)^(1/2) = sum of the square roots of the eigenvalues of S C_2 S, which are real
and, up to rounding, not negative. All in float64.

The value is biased upwards for few samples: compare only distances taken with the same number of samples.

CMMD: maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603).

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),   times 1000

over embeddings at length 1, with sigma = 10; means over all pairs, a picture with itself among them (the estimator of
least variance, Gretton et al. 2012, equation 5). No Gaussian is fitted, so it needs far fewer pictures than FID. The
published numbers are of openai/clip-vit-large-patch14-336 with `load_extractor("clip", ..., resize="cmmd")`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.metrics.clip_score import normalised


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Sums over the features seen so far, about a fixed origin, in float64.

    The origin (the first shard's mean) keeps the subtraction in `covariance` from losing digits when the features'
    mean is large against their spread.
    """

    count: int
    origin: np.ndarray  # [d]
    total: np.ndarray  # [d], sum of (f - origin)
    outer: np.ndarray  # [d d], sum of (f - origin)(f - origin)^T

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        return self.origin + self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance, [d d]; needs at least two samples."""
        if self.count < 2:
            raise LcmError(f"a covariance of {self.count} sample(s): give at least 2")
        shift = self.total / self.count
        return (self.outer - self.count * np.outer(shift, shift)) / (self.count - 1)


def statistics(features: np.ndarray) -> FeatureStatistics:
    """Statistics of features [n d], n >= 1, all finite."""
    f = _checked(features)
    origin = f.mean(axis=0)
    g = f - origin
    return FeatureStatistics(len(f), origin, g.sum(axis=0), g.T @ g)


def _checked(features: np.ndarray) -> np.ndarray:
    f = np.asarray(features, np.float64)
    if f.ndim != 2 or f.shape[0] == 0 or f.shape[1] == 0:
        raise LcmError(f"features of shape {f.shape}: give [n d] with n and d at least 1")
    if not np.isfinite(f).all():
        raise LcmError("features hold NaN or infinity: check the pictures they were computed from")
    return f


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Statistics of both sets together, about a's origin."""
    _check_dimensions(a.origin.size, b.origin.size, "joined")
    shift = b.origin - a.origin
    outer = b.outer + np.outer(b.total, shift) + np.outer(shift, b.total) + b.count * np.outer(shift, shift)
    return FeatureStatistics(a.count + b.count, a.origin, a.total + b.total + b.count * shift, a.outer + outer)


def _check_dimensions(a: int, b: int, what: str) -> None:
    if a != b:
        raise LcmError(f"features of {a} and {b} dimensions cannot be {what}: use one feature extractor for both")


def update(stats: FeatureStatistics | None, features: np.ndarray) -> FeatureStatistics:
    """Statistics with one more shard of features [n d]; start from None."""
    if stats is None:
        return statistics(features)
    f = _checked(features)
    _check_dimensions(stats.origin.size, f.shape[1], "joined")
    g = f - stats.origin  # not `merge`: with thousands of dimensions its passes over [d d] would cost more than this
    return FeatureStatistics(stats.count + len(g), stats.origin, stats.total + g.sum(axis=0), stats.outer + g.T @ g)


def frechet_distance(a: FeatureStatistics | np.ndarray, b: FeatureStatistics | np.ndarray) -> float:
    """Squared Frechet distance of two feature sets: statistics, or features [n d] with n > d.

    Refuses sets of different dimension, and sets with no more samples than dimensions, whose covariance is singular.
    """
    a, b = (s if isinstance(s, FeatureStatistics) else statistics(s) for s in (a, b))
    _check_dimensions(a.origin.size, b.origin.size, "compared")
    for s in (a, b):
        if s.count <= s.origin.size:
            raise LcmError(
                f"{s.count} samples for {s.origin.size} feature dimensions are too few: "
                f"give at least {s.origin.size + 1}"
            )
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, means [d] and covariances [d d] (symmetric, not negative)."""
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = root @ cov_2 @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2.0), 0.0)).sum()
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross
    return float(max(distance, 0.0))


SIGMA, SCALE = 10.0, 1000.0
_BLOCK = 2048  # rows of the kernel matrix at a time


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of two sets of CLIP embeddings [n d] and [m d], normalised here. Memory: 2,048 x max(n, m) numbers.

    Raises:
      LcmError: different dimensions, fewer than 2 embeddings in a set, or embeddings without direction.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise LcmError(f"embeddings of shapes {list(x.shape)} and {list(y.shape)}: give [n d] and [m d] of one CLIP")
    if min(len(x), len(y)) < 2:
        raise LcmError(f"CMMD of {len(x)} and {len(y)} pictures: give at least 2 of each")
    x, y = normalised(x), normalised(y)
    # expm1: the kernel's values lie within 2 % of 1, and their small differences are what is measured.
    return SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of k(x_i, y_j) - 1 over all pairs of rows of length 1."""
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        cosine = x[start : start + _BLOCK] @ y.T
        total += np.expm1((cosine - 1) / SIGMA**2).sum()
    return total / (len(x) * len(y))
