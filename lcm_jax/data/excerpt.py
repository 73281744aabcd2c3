"""The first records and rows of a run, and how fast its rows come: what there is to look at before training."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from lcm_jax.data import cache, images, loader
from lcm_jax.data.examples import CaptionDropout, Pictures
from lcm_jax.data.order import Order, Place, draws_at
from lcm_jax.data.records import BadRecord, Fault

CAPTION = "caption"  # a row's text, in the place of its token ids
WARM_UP = 1.0  # seconds after the first batch


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was read of a part: captions of each record, (height, width) [n 2] of its picture, and what was unusable."""

    captions: list[tuple[str, ...]]
    sizes: np.ndarray
    faults: list[Fault]

    @property
    def read(self) -> int:
        return len(self.captions) + len(self.faults)


@dataclasses.dataclass(frozen=True)
class Once:
    """`examples` as they are encoded before training: what is random about a row is that of its place in the data."""

    examples: loader.Examples
    seed: int

    @property
    def groups(self) -> tuple[int, ...]:
        return self.examples.groups

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        del draws
        position = sum(self.examples.groups[:group]) + rank
        return self.examples.row(group, rank, draws_at(self.seed, position))

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.examples.where(group, rank)


def keep_caption(captions: Sequence[str]) -> dict[str, np.ndarray]:
    """In the place of the tokenizers: captions -> themselves."""
    return {CAPTION: np.array(captions, object)}


def is_cached(rows: loader.Examples) -> bool:
    """Whether they come from a latent cache, as they are or with captions dropped."""
    while isinstance(rows, Once | CaptionDropout):
        rows = rows.examples
    return isinstance(rows, cache.Cached)


def first_places(order: Order, count: int) -> list[Place]:
    """The first `count` different examples of the order's one stream, or all there are."""
    found: dict[Place, None] = {}
    wanted = min(count, sum(order.streams[0]))
    for step in itertools.count():
        if len(found) >= wanted:
            return list(found)[:wanted]
        found |= dict.fromkeys(order.places(step))
    raise AssertionError("unreachable")


def read_sample(examples: Pictures | cache.Cached, places: Sequence[Place], decoder: str) -> Sample:
    """Reads and decodes the records of `places`, in threads; of a cache, what its rows were made of."""

    def read(place: Place) -> tuple[tuple[str, ...], tuple[int, int]] | Fault:
        try:
            if isinstance(examples, cache.Cached):
                caption = examples.about(place.group, place.rank).get("caption")
                return () if caption is None else (caption,), (0, 0)
            members = examples.members
            record = examples.source[place.rank if members is None else int(members[place.group][place.rank])]
            return record.captions, images.decode(record.image, decoder).shape[:2]
        except BadRecord as error:
            return Fault(*examples.where(place.group, place.rank), str(error))

    with concurrent.futures.ThreadPoolExecutor(loader.THREADS) as pool:
        bar = tqdm(pool.map(read, places), "sample", len(places), unit=" records", file=sys.stderr, disable=None)
        results = list(bar)
    good = [result for result in results if not isinstance(result, Fault)]
    sizes = np.array([size for _, size in good], np.int32).reshape(-1, 2)
    return Sample([texts for texts, _ in good], sizes, [result for result in results if isinstance(result, Fault)])


def first_rows(
    examples: Sequence[loader.Examples], order: Order, count: int
) -> tuple[list[dict[str, np.ndarray]], list[Fault]]:
    """The first `count` rows of a run one by one, and what was replaced."""
    rows: list[dict[str, np.ndarray]] = []
    faults: list[Fault] = []
    for step in itertools.count():
        end = min(order.batch_size, count - len(rows))
        if not end:
            return rows, faults
        batch, found = loader.Batches(tuple(examples), order, step, range(end))[0]
        rows += [{name: value[number] for name, value in batch.items()} for number in range(end)]
        faults += found
    raise AssertionError("unreachable")


def measure(batches: loader.Batches, workers: int, seconds: float) -> tuple[int, float]:
    """(rows, seconds) of reading ahead, without the warm-up: at least one batch, and about `seconds`."""
    rows = len(batches.rows)
    with contextlib.closing(loader.read_ahead(batches, workers)) as read:
        next(read)
        settled = time.monotonic() + min(WARM_UP, seconds)
        for _ in read:
            if (begun := time.monotonic()) >= settled:
                break
        for count, _ in enumerate(read, start=1):
            if (now := time.monotonic()) - begun >= seconds:
                return count * rows, now - begun
    raise AssertionError("the order has no end")
