"""Held-out captions of the shapes set, and how far pictures that a model drew for them are from what they say.

    caption accuracy   share of pictures whose five attributes are those of their caption
    Frechet distance   to 2,048 other held-out renders in the scorer's features

Frechet distances are comparable only among sets of one count.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from lcm_jax.data import shapes
from lcm_jax.metrics import frechet, shapes_scorer

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
