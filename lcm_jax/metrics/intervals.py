"""95 % intervals of a row's values: how far other captions and other noise would move them.

Images of one caption are not independent, so captions are what is resampled, each with all its images.

    means        percentile bootstrap: as many captions as there are, drawn with replacement, `REPLICATES` times; 2.5 %
                 and 97.5 % of the replicates lie below the ends (Efron & Tibshirani 1993, chapter 13)
    distances    value +- 1.96 s,   s^2 = C / (C - 1) sum_c (sum_{i of caption c} u_i)^2 / n^2                      (1)

of C captions and n images. u_i, the influence of image i, is the derivative of the distance by the image's weight; (1)
is the infinitesimal jackknife (Jaeckel 1972; Efron & Tibshirani 1993), which the standard deviation of bootstrap
replicates tends to. Replicates themselves would not do: a resample has fewer different images, few images raise a
Frechet distance, and in 2,048 dimensions each costs an eigendecomposition.

The reference of a distance is held fixed, and so is the model: another training run is not covered. An interval of a
Frechet distance is about what so many images give, which lies above what infinitely many would. Intervals are too
narrow if captions are few, and of no width if all values are equal, as where every image is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPLICATES = 2000
LEAST = 8  # captions: of fewer, quantiles of resamples say little
_DRAWS = 2**20  # at a time
Z = 1.959964  # 97.5 % of the standard normal distribution lie below
NOTE = (
    "In brackets: 95 % intervals over captions, with the model and the reference held fixed; of means by the "
    "bootstrap, of distances by the infinitesimal jackknife. Rows that share captions and noise differ by less chance "
    "than their brackets show."
)


class Estimate(NamedTuple):
    """A value and the (low, high) of its interval; None if there are fewer than `LEAST` captions."""

    value: float
    interval: tuple[float, float] | None


def clusters(captions: Sequence[str]) -> np.ndarray:
    """A number for each image, int [n], equal for those of one caption; by the captions' order, as texts."""
    # Not np.unique of the captions: an array of texts gives each the room of the longest.
    numbers = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    return np.array([numbers[caption] for caption in captions], np.int64)


def of_means(values: np.ndarray, clusters: np.ndarray) -> list[Estimate]:
    """Means over images of values [n k], with percentile intervals; the same ones in every run.

    clusters: from `clusters`; int [n].
    """
    values = np.asarray(values, np.float64)
    means = values.mean(0)
    sums = _sums(np.column_stack([values, np.ones(len(values))]), clusters)  # the last column: number of images
    if (count := len(sums)) < LEAST:
        return [Estimate(float(mean), None) for mean in means]
    rng, step = np.random.default_rng(0), max(1, _DRAWS // count)
    draws = (rng.integers(count, size=(min(step, REPLICATES - i), count)) for i in range(0, REPLICATES, step))
    *totals, numbers = np.concatenate([[column[some].sum(1) for column in sums.T] for some in draws], axis=1)
    low, high = np.quantile(np.array(totals) / numbers, (0.025, 0.975), axis=1)
    return [Estimate(float(mean), (float(a), float(b))) for mean, a, b in zip(means, low, high, strict=True)]


def of_distance(value: float, influence: np.ndarray, clusters: np.ndarray) -> Estimate:
    """A distance with the interval (1), cut at 0.

    Args:
      value: the distance, of n images.
      influence: u of all images, [n], or of the first ones alone, which stand for all.
      clusters: as for `of_means`.
    """
    kept = len(influence)
    sums = _sums(influence - influence.mean(), clusters[:kept])
    if (count := len(sums)) < LEAST:
        return Estimate(value, None)
    variance = count / (count - 1) * np.square(sums).sum() / (kept * len(clusters))
    error = Z * float(np.sqrt(variance))
    return Estimate(value, (max(0.0, value - error), value + error))


def _sums(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sums [C ...] of values [n ...] over the images of each caption."""
    found, numbers = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(found), *values.shape[1:]))
    np.add.at(sums, numbers, values)
    return sums
