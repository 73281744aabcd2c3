"""Batches as a function of (seed, step): epochs, going on, hosts, prefetching."""

import contextlib
import itertools
import threading

import jax
import numpy as np
import pytest

from lcm_jax.data import loader
from lcm_jax.errors import LcmError


def stream(seed, batch_size, num_examples, steps, start=0):
    rows = [loader.batch_indices(seed, step, batch_size, num_examples) for step in range(start, start + steps)]
    return np.concatenate(rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_permutation(size):
    image = loader.permuted(np.arange(size), np.full(size, 7, np.uint64), size)
    assert sorted(image) == list(range(size))


def test_every_example_once_per_epoch_in_new_orders():
    epochs = stream(seed=3, batch_size=7, num_examples=50, steps=50).reshape(7, 50)  # batches cross epochs: 7 x 50
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert not np.array_equal(epochs[0], stream(4, 7, 50, 8)[:50]), "another seed, another order"


def test_orders_look_random():
    # mean of each example's place over many epochs: uniform on [0, n) has mean (n-1)/2 and deviation n / sqrt(12)
    n, epochs = 64, 2000
    orders = stream(0, n, n, epochs).reshape(epochs, n)
    z = (orders.mean(0) - (n - 1) / 2) / (n / np.sqrt(12 * epochs))
    assert np.abs(z).max() < 4.5
    follows = np.mean(np.diff(orders, axis=1) == 1)  # neighbours stay neighbours in 1 of n places
    assert abs(follows - 1 / n) < 5 * np.sqrt(1 / n / (n * epochs))


def test_pinned():
    # the order is part of what "the same run" means: a change here breaks runs that go on
    assert loader.batch_indices(0, 0, 8, 1000).tolist() == PINNED[0]
    assert loader.batch_indices(123, 10**9, 4, 600_000_000).tolist() == PINNED[1]


def test_bad_sizes():
    for arguments in ((0, -1, 4, 10), (0, 0, 0, 10), (0, 0, 4, 0)):
        with pytest.raises(LcmError, match="no batch of"):
            loader.batch_indices(*arguments)
    for source in ({}, {"a": np.zeros(0)}, {"a": np.zeros(3), "b": np.zeros(4)}):
        with pytest.raises(LcmError, match="one length"):
            loader.batches(source, 0, 0, 2)


PINNED = [[618, 140, 118, 773, 988, 247, 278, 0], [517871412, 566509175, 420639957, 211343406]]
SOURCE = {"latents": np.random.default_rng(0).normal(size=(37, 2, 2, 4)).astype(np.float32),
          "label": np.arange(37, dtype=np.int32)}


def take(n, **kwargs):
    with contextlib.closing(loader.batches(SOURCE, seed=1, batch_size=6, **kwargs)) as batches:
        return [jax.device_get(b) for b in itertools.islice(batches, n)]


def test_going_on_equals_never_stopping():
    whole, rest = take(20, start_step=0), take(8, start_step=12)
    for a, b in zip(whole[12:], rest, strict=True):
        assert a["latents"].tobytes() == b["latents"].tobytes() and a["label"].tobytes() == b["label"].tobytes()
    for batch in whole:  # the arrays of one example stay together
        np.testing.assert_array_equal(batch["latents"], SOURCE["latents"][batch["label"]])


def test_hosts_share_one_global_batch():
    whole = take(5, start_step=0, put=dict)
    parts = [take(5, start_step=0, put=dict, process_index=i, process_count=3) for i in range(3)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["label"], np.concatenate([p[step]["label"] for p in parts]))
    with pytest.raises(LcmError, match="does not split over 4 processes"):
        take(1, start_step=0, process_index=0, process_count=4)


def test_errors_come_through():
    def broken():
        yield {"a": 1}
        raise OSError("tar is gone")

    ahead = loader.prefetched(broken(), put=lambda b: b)
    assert next(ahead) == {"a": 1}
    with pytest.raises(OSError, match="tar is gone"):
        next(ahead)


def test_end_and_limit_of_prefetching():
    made = []
    ahead = loader.prefetched((made.append(i) or i for i in range(100)), put=lambda b: b, depth=2)
    assert next(ahead) == 0
    threading.Event().wait(0.3)
    assert len(made) <= 4, "one taken, two waiting, one in hand"
    assert list(ahead) == list(range(1, 100))
    before = threading.active_count()
    ahead = loader.prefetched(itertools.count(), put=lambda b: b)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


@pytest.mark.gpu
def test_batches_arrive_on_the_accelerator():
    with contextlib.closing(loader.batches(SOURCE, 1, 0, 6)) as batches:
        batch = next(batches)
    assert batch["latents"].devices() == {jax.devices()[0]} and jax.devices()[0].platform != "cpu"
    np.testing.assert_array_equal(batch["label"], loader.batch_indices(1, 0, 6, 37))
