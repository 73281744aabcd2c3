"""The order of the data: which examples make batch i, as a function of (seed, i) alone.

The stream of examples is a sequence of epochs, each in an order of its own:

    position p = step * batch_size + row,   epoch e = p // N,   example = permutation[seed, e](p % N)

The permutation is never stored: it is a Feistel network, a bijection of [0, 4^m) made of hashes, applied again until
the value falls inside [0, N). It is the same on every platform and version. `Order` extends this to weighted mixtures
and to aspect buckets. The random draws of a row (crop, flip, choice of caption) are keyed by its position, so neither
the number of hosts nor that of workers changes a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lcm_jax.errors import LcmError

FEISTEL_ROUNDS = 6  # four suffice for a pseudo-random permutation if the hash is good; two more cost microseconds
STREAM_KEY = 0x57EE_A3  # added to the seed for each further source of a mixture
GROUP_KEY = 0x9E37_79B9_7F4A  # added to the seed for each aspect bucket
DRAWS_KEY = 0xD2A3_5  # keeps the seed of a row's draws apart from that of the order


class ExampleIndex(NamedTuple):
    """One example: its stream (source of the mixture), its group, and its index within that group."""

    stream: int
    group: int
    rank: int


def _hash(x: np.ndarray) -> np.ndarray:
    """Bijective 64-bit mixer (splitmix64's finaliser); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(index: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """Image of each index in a pseudo-random permutation of [0, size).

    Args:
        index: [b] integers in [0, size).
        key: [b] uint64; equal keys give the same permutation.
        size: number of elements, at least 1.

    Returns:
        [b] int64 in [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, bool)  # these take another turn; each element takes at least one
    while outside.any():
        left, right = x >> half, x & mask
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_hash(right ^ _hash(key + np.uint64(r))) & mask)
        x = np.where(outside, (left << half) | right, x)
        outside &= x >= np.uint64(size)
    return x.astype(np.int64)


def shuffled(seed: int, position: np.ndarray, size: int) -> np.ndarray:
    """Example at each position of an endless stream of epochs of `size`: int64 [b] in [0, size)."""
    epoch = (position // size).astype(np.uint64)
    key = _hash(_hash(np.full(1, seed % 2**64, np.uint64)) + epoch)
    return permuted(position % size, key, size)


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Examples of the global batch of `step`: [batch_size] int64 in [0, num_examples).

    Every example comes once in each epoch of `num_examples` positions; a batch may reach into the next epoch.
    """
    if num_examples < 1 or batch_size < 1 or step < 0:
        raise LcmError(
            f"no batch of {batch_size} at step {step} from {num_examples} examples; "
            "sizes must be at least 1 and the step not negative"
        )
    return shuffled(seed, step * batch_size + np.arange(batch_size, dtype=np.int64), num_examples)


def apportioned(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """(stream, position within it): what serves this position of a mixture.

    After any number of positions each stream has served its share of them, to within a position for two streams.
    """
    stream, rest = 0, position
    while stream < len(weights) - 1:
        total = sum(weights[stream:])
        before, after = rest * weights[stream] // total, (rest + 1) * weights[stream] // total
        if after > before:
            return stream, before
        stream, rest = stream + 1, rest - before
    return stream, rest


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples make a batch.

    With one group in every stream, positions are apportioned to the streams by weight, and each stream is shuffled
    epoch by epoch. With aspect buckets a whole batch comes from one group of one stream: in an epoch of a stream each
    group gives ceil(size / batch_size) batches, the last one filled up from the group's next permutation, and the
    batches of all groups are shuffled.

    Attributes:
        seed: of the order.
        batch_size: rows of the global batch.
        streams: for each stream the sizes of its groups, at least one of which is not empty.
        weights: relative share of each stream, integers.
    """

    seed: int
    batch_size: int
    streams: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        empty = not self.streams or any(sum(groups) < 1 for groups in self.streams)
        if empty or self.batch_size < 1 or len(self.weights) != len(self.streams) or min(self.weights) < 1:
            raise LcmError(
                f"no batches of {self.batch_size} from groups {self.streams} weighted {self.weights}; "
                "sizes and weights must be at least 1"
            )

    def batch(self, step: int) -> list[ExampleIndex]:
        """The examples of the global batch of `step`, row by row."""
        if all(len(groups) == 1 for groups in self.streams):
            return self._mixed(step)
        stream, batch = apportioned(step, self.weights)
        return self._of_one_group(stream, batch)

    def _seed(self, stream: int) -> int:
        return self.seed if stream == 0 else self.seed + stream * STREAM_KEY

    def _mixed(self, step: int) -> list[ExampleIndex]:
        first = step * self.batch_size
        served = [apportioned(first + row, self.weights) for row in range(self.batch_size)]
        batch: list[ExampleIndex | None] = [None] * self.batch_size
        for stream, (size,) in enumerate(self.streams):
            rows = [row for row, (server, _) in enumerate(served) if server == stream]
            ranks = shuffled(self._seed(stream), np.array([served[row][1] for row in rows], np.int64), size)
            for row, rank in zip(rows, ranks, strict=True):
                batch[row] = ExampleIndex(stream, 0, int(rank))
        return batch

    def _of_one_group(self, stream: int, batch: int) -> list[ExampleIndex]:
        groups, seed = self.streams[stream], self._seed(stream)
        ends = np.cumsum([-(-size // self.batch_size) for size in groups])
        shuffled_batch = int(shuffled(seed, np.array([batch]), int(ends[-1]))[0])
        epoch, group = batch // int(ends[-1]), int(np.searchsorted(ends, shuffled_batch, side="right"))
        size = groups[group]
        per_epoch = -(-size // self.batch_size)
        nth = shuffled_batch - (int(ends[group]) - per_epoch)  # batch of this group in this epoch
        # An epoch goes through the group once, and through the beginning of another permutation to fill the last batch.
        position = nth * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        rounds = -(-per_epoch * self.batch_size // size)
        ranks = shuffled(seed + (group + 1) * GROUP_KEY, epoch * rounds * size + position, size)
        return [ExampleIndex(stream, group, int(rank)) for rank in ranks]


def draws_at(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the row at this position of the stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed ^ (DRAWS_KEY << 32), position], np.uint64)))
