"""CMMD: maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603).

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),   times 1000

over embeddings at length 1, with sigma = 10; means over all pairs, a picture with itself among them (the estimator of
least variance, Gretton et al. 2012, equation 5). No Gaussian is fitted, so it needs far fewer pictures than FID. The
published numbers are of openai/clip-vit-large-patch14-336 with `load_extractor("clip", ..., resize="cmmd")`.
"""

from __future__ import annotations

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.metrics.clip_score import normalised

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
