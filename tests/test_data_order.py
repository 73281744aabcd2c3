"""The order of the data as a function of (seed, step): epochs, mixtures, aspect buckets, draws."""

import collections

import numpy as np
import pytest

from lcm_jax.data import order
from lcm_jax.data.order import ExampleIndex, Order
from lcm_jax.errors import LcmError


def stream(seed, batch_size, num_examples, steps, start=0):
    rows = [order.batch_indices(seed, step, batch_size, num_examples) for step in range(start, start + steps)]
    return np.concatenate(rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_permutation(size):
    image = order.permuted(np.arange(size), np.full(size, 7, np.uint64), size)
    assert sorted(image) == list(range(size))


def test_every_example_once_per_epoch_in_new_orders():
    epochs = stream(seed=3, batch_size=7, num_examples=50, steps=50).reshape(7, 50)  # batches cross epochs: 7 x 50
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert not np.array_equal(epochs[0], stream(4, 7, 50, 8)[:50]), "another seed, another order"


def test_orders_look_random():
    # mean of each example's position over many epochs: uniform on [0, n), mean (n-1)/2 and deviation n / sqrt(12)
    n, epochs = 64, 2000
    orders = stream(0, n, n, epochs).reshape(epochs, n)
    z = (orders.mean(0) - (n - 1) / 2) / (n / np.sqrt(12 * epochs))
    assert np.abs(z).max() < 4.5
    follows = np.mean(np.diff(orders, axis=1) == 1)  # neighbours stay neighbours in 1 of n positions
    assert abs(follows - 1 / n) < 5 * np.sqrt(1 / n / (n * epochs))


def test_order_and_draws_are_pinned():
    """Both are part of what "the same run" means: a change here breaks every run that resumes."""
    assert order.batch_indices(0, 0, 8, 1000).tolist() == [618, 140, 118, 773, 988, 247, 278, 0]
    far = [517871412, 566509175, 420639957, 211343406]
    assert order.batch_indices(123, 10**9, 4, 600_000_000).tolist() == far
    mixed = Order(0, 4, ((5,), (3,)), (2, 1))
    assert [[(i.stream, i.rank) for i in mixed.batch(step)] for step in range(3)] == [
        [(1, 1), (0, 4), (0, 2), (1, 0)],
        [(0, 0), (0, 1), (1, 2), (0, 3)],
        [(0, 2), (1, 0), (0, 0), (0, 1)],
    ]
    bucketed = Order(0, 4, ((5, 3, 0, 9), (4, 2, 0, 1)), (3, 1))
    assert [[(i.stream, i.group, i.rank) for i in bucketed.batch(step)] for step in range(3)] == [
        [(1, 1, 1), (1, 1, 0), (1, 1, 0), (1, 1, 1)],
        [(0, 3, 7), (0, 3, 8), (0, 3, 1), (0, 3, 2)],
        [(0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 2)],
    ]
    assert order.draws_at(0, 1).random(2).tolist() == [0.045384841348932614, 0.3444324658653912]
    assert order.draws_at(3, 10**9).random(2).tolist() == [0.8808907838362938, 0.8074359686190051]


def test_bad_sizes():
    for arguments in ((0, -1, 4, 10), (0, 0, 0, 10), (0, 0, 4, 0)):
        with pytest.raises(LcmError, match="no batch of"):
            order.batch_indices(*arguments)
    for streams, weights in (((), ()), (((0,),), (1,)), (((3,), (4,)), (1,)), (((3,),), (0,)), (((0, 0),), (1,))):
        with pytest.raises(LcmError, match="no batches of 4"):
            Order(0, 4, streams, weights)
    with pytest.raises(LcmError, match="no batches of 0"):
        Order(0, 0, ((3,),))


def test_one_stream_is_the_plain_order():
    found = [index for step in range(5) for index in Order(3, 7, ((50,),)).batch(step)]
    assert found == [ExampleIndex(0, 0, int(rank)) for rank in stream(3, 7, 50, 5)]


@pytest.mark.parametrize("weights", [(3, 1), (1, 3), (1, 1), (7, 5, 1), (9999, 1)])
def test_a_mixture_serves_its_shares_at_any_time_and_skips_no_position(weights):
    served = [order.apportioned(position, weights) for position in range(20_000)]
    for which, weight in enumerate(weights):
        positions = [position for stream_, position in served if stream_ == which]
        assert positions == list(range(len(positions)))
        counts = np.cumsum([stream_ == which for stream_, _ in served])
        due = np.arange(1, 20_001) * weight / sum(weights)
        assert np.abs(counts - due).max() < len(weights), "never a whole batch behind its share"
    far = 10**15
    assert order.apportioned(far * sum(weights), weights)[1] // far in weights


def test_each_source_of_a_mixture_has_its_own_epochs_and_order():
    mixed = Order(5, 8, ((30,), (30,)), (1, 1))
    found = [index for step in range(30) for index in mixed.batch(step)]
    for which in (0, 1):
        ranks = [index.rank for index in found if index.stream == which]
        assert len(ranks) == 120 and all(sorted(ranks[e : e + 30]) == list(range(30)) for e in range(0, 120, 30))
    first, second = ([i.rank for i in found if i.stream == which][:30] for which in (0, 1))
    assert first != second


@pytest.mark.parametrize("sizes", [(20, 3, 0, 9), (5,) * 4, (1, 40)])
def test_buckets_give_whole_batches_and_every_example_once_an_epoch(sizes):
    batch_size, epochs = 6, 3
    bucketed = Order(2, batch_size, (sizes,))
    per_epoch = sum(-(-size // batch_size) for size in sizes)
    orders = []
    for epoch in range(epochs):
        batches = [bucketed.batch(epoch * per_epoch + n) for n in range(per_epoch)]
        assert all(len(batch) == batch_size and len({i.group for i in batch}) == 1 for batch in batches)
        seen = collections.Counter((i.group, i.rank) for batch in batches for i in batch)
        assert set(seen) == {(group, rank) for group, size in enumerate(sizes) for rank in range(size)}
        for group, size in enumerate(sizes):
            counts = [seen[group, rank] for rank in range(size)]
            assert not counts or max(counts) - min(counts) <= 1, "what fills the last batch is spread evenly"
        orders.append([batch[0].group for batch in batches])
    assert len({tuple(o) for o in orders}) > 1 or len(set(orders[0])) == 1, "batches are shuffled again"


def test_a_mixture_of_buckets_alternates_batch_by_batch():
    mixed = Order(2, 4, ((8, 8), (8, 4)), (3, 1))
    streams = [{index.stream for index in mixed.batch(step)} for step in range(40)]
    assert all(len(s) == 1 for s in streams) and sum(s == {1} for s in streams) == 10


def test_draws_depend_on_seed_and_position_alone():
    draws = np.array([order.draws_at(seed, position).random(4) for seed in range(3) for position in range(500)])
    assert len(np.unique(draws)) == draws.size
    assert np.abs(np.corrcoef(draws[:500, 0], draws[500:1000, 0])[0, 1]) < 0.15
    assert np.abs(draws.mean(0) - 0.5).max() < 0.05
    np.testing.assert_array_equal(order.draws_at(1, 7).random(4), draws[500 + 7])
