"""Distances between two sets of features: Frechet, from sums gathered shard by shard, and CMMD, from the features.

Frechet distance, between Gaussians fitted to the two sets, with means m and covariances C:

    d^2 = |m_1 - m_2|^2 + trace(C_1 + C_2 - 2 (C_1 C_2)^(1/2))                                                      (1)

(Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500). Roots are taken of symmetric matrices only: with
S = C_1^(1/2), trace (C_1 C_2)^(1/2) is the sum of the square roots of the eigenvalues of S C_2 S, which are real and,
up to rounding, not negative. All in float64. Few samples bias the value upwards: compare only sets of equal size.

CMMD, maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603):

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),  times 1000  (2)

over embeddings of length 1, with sigma = 10; means are over all pairs, also of an image with itself (the estimator of
least variance, Gretton et al. 2012, equation 5). It fits no Gaussian, so it needs far fewer images than FID. Published
numbers are of openai/clip-vit-large-patch14-336 with `load_extractor("clip", ..., resize="cmmd")`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lcm_jax.errors import LcmError

SIGMA, SCALE = 10.0, 1000.0  # of CMMD
_BLOCK = 2048  # rows of the kernel matrix at a time


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Sums over the features seen so far, about a fixed point, in float64.

    The point (the first shard's mean) keeps the subtraction in `covariance` from losing digits if the features' mean is
    large compared with their spread.
    """

    count: int
    centre: np.ndarray  # [d]
    total: np.ndarray  # [d], sum of (f - centre)
    outer: np.ndarray  # [d d], sum of (f - centre)(f - centre)^T

    @property
    def dim(self) -> int:
        return self.centre.size

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        return self.centre + self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance, [d d]; needs at least two samples."""
        if self.count < 2:
            raise LcmError(f"a covariance of {self.count} sample(s): give at least 2")
        shift = self.total / self.count
        return (self.outer - self.count * np.outer(shift, shift)) / (self.count - 1)


def statistics(features: np.ndarray) -> FeatureStatistics:
    """Statistics of features [n d], n >= 1. Raises LcmError for another shape, NaN or infinity."""
    return update(None, features)


def update(stats: FeatureStatistics | None, features: np.ndarray) -> FeatureStatistics:
    """Statistics with one more shard of features [n d]; None: of this shard alone. Raises: as `statistics`."""
    f = np.asarray(features, np.float64)
    if f.ndim != 2 or 0 in f.shape:
        raise LcmError(f"features of shape {f.shape}: give [n d] with n and d at least 1")
    if not np.isfinite(f).all():
        raise LcmError("features hold NaN or infinity: check the images they were computed from")
    if stats is None:
        centre = f.mean(axis=0)
        stats = FeatureStatistics(0, centre, np.zeros_like(centre), np.zeros((centre.size, centre.size)))
    _check_dimensions(stats.dim, f.shape[1])
    g = f - stats.centre
    return FeatureStatistics(stats.count + len(g), stats.centre, stats.total + g.sum(axis=0), stats.outer + g.T @ g)


def _check_dimensions(a: int, b: int) -> None:
    if a != b:
        raise LcmError(f"features of {a} and of {b} dimensions do not mix: use one feature extractor for both")


def frechet_distance(a: FeatureStatistics | np.ndarray, b: FeatureStatistics | np.ndarray) -> float:
    """Squared Frechet distance (1) of two feature sets: statistics, or features [n d].

    Raises:
      LcmError: different dimensions, or n <= d, whose covariance is singular.
    """
    a, b = (s if isinstance(s, FeatureStatistics) else statistics(s) for s in (a, b))
    _check_dimensions(a.dim, b.dim)
    if (least := min(a.count, b.count)) <= a.dim:
        raise LcmError(
            f"{least} images are too few for a Frechet distance of {a.dim} dimensions: give at least {a.dim + 1}"
        )
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared Frechet distance (1) of two Gaussians, means [d] and covariances [d d] (symmetric, not negative)."""
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = root @ cov_2 @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2.0), 0.0)).sum()
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross
    return float(max(distance, 0.0))


def frechet_influence(features: np.ndarray, a: FeatureStatistics, b: FeatureStatistics) -> np.ndarray:
    """Influence [n] on distance (1) of features [n d] of `a`, whose mean over all features of `a` is 0.

    With S = C_b^(1/2) and S C_a S = V diag(l) V^T, the gradient of (1) is 2 (m_a - m_b) in m_a and, because that of
    trace A^(1/2) is A^(-1/2) / 2, G = 1 - S V diag(l^(-1/2)) V^T S in C_a; so, for x = feature - m_a,

        u = 2 (m_a - m_b) x + x^T G x - trace(G C_a)                                                                (3)

    Directions in which `a` has no variance (l = 0) have no part in it.
    """
    values, vectors = np.linalg.eigh(b.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = root @ a.covariance @ root
    values, vectors = np.linalg.eigh((inner + inner.T) / 2.0)
    seen = values > values.max() * a.dim * np.finfo(np.float64).eps
    to_b = root @ (vectors[:, seen] * values[seen] ** -0.25)  # to_b to_b^T = 1 - G
    shift, found = 2.0 * (a.mean - b.mean), []
    for start in range(0, len(features), _BLOCK):
        x = features[start : start + _BLOCK].astype(np.float64) - a.mean
        found.append(x @ shift + np.square(x).sum(1) - np.square(x @ to_b).sum(1))
    return np.concatenate(found) - (np.trace(a.covariance) - np.sqrt(values[seen]).sum())


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD (2) of two sets of CLIP embeddings [n d] and [m d]; see `cmmd_influence`."""
    return cmmd_influence(x, y)[0]


def cmmd_influence(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """(CMMD (2), influence [n] of each x) of embeddings [n d] and [m d], normalised here.

    The influence of x_i is twice mean_j k(x_i, x_j) - mean_j k(x_i, y_j), up to a constant. Memory: 2,048 x max(n, m)
    numbers.

    Raises:
      LcmError: different dimensions, fewer than 2 embeddings in a set, or embeddings without direction.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise LcmError(f"embeddings of shapes {list(x.shape)} and {list(y.shape)}: give [n d] and [m d] of one CLIP")
    if min(len(x), len(y)) < 2:
        raise LcmError(f"CMMD of {len(x)} and {len(y)} images: give at least 2 of each")
    x, y = normalised(x), normalised(y)
    within, between = _mean_kernels(x, x), _mean_kernels(x, y)
    value = SCALE * (within.mean() + _mean_kernels(y, y).mean() - 2 * between.mean())
    return float(value), 2 * SCALE * (within - between)


def _mean_kernels(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean over j of k(x_i, y_j) - 1, [n], for rows of length 1."""
    # expm1: the kernel's values lie within 2 % of 1, and their small differences are what is measured.
    blocks = (x[start : start + _BLOCK] @ y.T for start in range(0, len(x), _BLOCK))
    return np.concatenate([np.expm1((cosine - 1) / SIGMA**2).mean(1) for cosine in blocks])


def normalised(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings [n d] scaled to length 1, float64. Raises LcmError if one has no direction."""
    x = np.asarray(embeddings, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise LcmError("an embedding is all zeros, or holds NaN or infinity: check the images and weights it is from")
    return x / length
