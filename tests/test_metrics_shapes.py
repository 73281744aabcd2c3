"""Coverage of what captions leave open: closed forms, exact values, and the order of samplers at the sizes in use."""

import functools
import itertools

import numpy as np
import parity
import pytest
from scipy import stats

from lcm_jax.data import shapes
from lcm_jax.metrics.networks import shapes as scorer
from lcm_jax.metrics.shapes import LEAST_PER_CAPTION, coverage, expected_distance, heldout

SIZES = (8, 64)  # images per caption
CAPTIONS = [shapes.caption(spec) for spec in heldout(64)]
REPEATS = 12  # tables whose mean and standard deviation a test compares


@pytest.mark.parametrize(("k", "n"), [(2, 1), (2, 8), (3, 1), (3, 6), (5, 5), (6, 4), (8, 4), (9, 4)])
def test_expected_distance_is_the_mean_over_all_outcomes(k, n):
    outcomes = np.array(list(itertools.product(range(k), repeat=n)))
    histograms = np.stack([(outcomes == value).mean(1) for value in range(k)], axis=1)
    parity.close(expected_distance(k, n), np.abs(histograms - 1 / k).sum(1).mean() / 2, rtol=1e-12)


@pytest.mark.parametrize("n", [8, 64, 1000, 100_000])
@pytest.mark.parametrize("k", [2, 5, 6, 8, 9])
def test_expected_distance_is_the_binomial_mean_deviation(k, n):
    counts = np.arange(n + 1)
    deviation = np.sum(stats.binom.pmf(counts, n, 1 / k) * np.abs(counts / n - 1 / k))
    parity.close(expected_distance(k, n), k * deviation / 2, rtol=1e-8)


def reads(n, **values):
    """What the scorer reads of n images: zeros, but for `values`."""
    return {name: np.zeros(n, int) for name in shapes.ATTRIBUTES} | {k: np.array(v) for k, v in values.items()}


WHOLE, NO_PLACE = "a small red circle at the center on a white background", "a small red circle on a white background"


def test_coverage_of_one_value_and_of_all():
    n = 18  # each of 9 positions twice
    expected = 9 * (1 - (8 / 9) ** n)
    same = coverage(reads(n), [NO_PLACE] * n)
    parity.close((same.distance, same.collapsed, same.diversity), (8 / 9 - expected_distance(9, n), 1, 1 / expected))
    even = coverage(reads(n, position=[*range(9), *range(9)]), [NO_PLACE] * n)
    parity.close((even.distance, even.collapsed, even.diversity), (-expected_distance(9, n), 0, 9 / expected))


def test_coverage_is_the_mean_over_attributes_and_captions():
    """Two open attributes of one caption, one of the other; what is named does not matter, however it is read."""
    n, two = 10, "circle, small, white background"
    read = reads(2 * n, position=[0] * n + [0] * 5 + [1] * 5, colour=[0] * n + [0, 1] * 5, background=[3] * 2 * n)
    found = coverage(read, [NO_PLACE] * n + [two] * n)
    one_place, two_places = 8 / 9 - expected_distance(9, n), 7 / 9 - expected_distance(9, n)
    two_colours = 6 / 8 - expected_distance(8, n)
    parity.close(found.distance, (one_place + (two_places + two_colours) / 2) / 2)
    assert found.collapsed == 0.5
    # (0, 0), (0, 1), (1, 0) and (1, 1) of 72 pairs
    parity.close(found.diversity, (1 / (9 * (1 - (8 / 9) ** n)) + 4 / (72 * (1 - (71 / 72) ** n))) / 2)


def test_a_caption_is_collapsed_if_one_open_attribute_is():
    n = 9
    found = coverage(reads(n, position=range(9)), ["a red circle on a white background"] * n)  # size and position
    assert found.collapsed == 1.0


def test_captions_that_count():
    """Those that leave something open, and have enough images in a row."""
    n = LEAST_PER_CAPTION
    open_ = coverage(reads(n), [NO_PLACE] * n)
    assert open_ is not None and coverage(reads(n), [WHOLE] * n) is None
    assert coverage(reads(2 * n), [WHOLE] * n + [NO_PLACE] * n) == open_
    assert coverage(reads(n - 1), [NO_PLACE] * (n - 1)) is None
    assert coverage(reads(2 * n - 1), [NO_PLACE] * n + ["a circle"] * (n - 1)) == open_
    assert coverage(reads(2 * n), [NO_PLACE, "a circle"] * n) is None


def test_captions_that_come_again_by_chance_do_not_count():
    specs = heldout(2000)
    captions = [shapes.caption(spec) for spec in specs]
    assert max(map(captions.count, set(captions))) > LEAST_PER_CAPTION
    assert coverage(shapes.label_arrays(specs), captions) is None


def law(rng, k, n):
    return rng.integers(k, size=n)


def half(rng, k, n):
    """Half of the images show one value, the others follow the law."""
    return np.where(rng.random(n) < 0.5, rng.integers(k), rng.integers(k, size=n))


def one(rng, k, n):
    return np.full(n, rng.integers(k))


@functools.cache
def tables(sampler, n):
    """(distance, collapsed, diversity) of a sampler that shows what is named, in REPEATS tables of 64 captions."""
    rng, rows = np.random.default_rng(0), []
    told, counts = shapes.label_arrays(CAPTIONS), {name: len(words) for name, words in shapes.ATTRIBUTES.items()}
    for _ in range(REPEATS):
        read = {
            name: np.concatenate([np.full(n, i) if i >= 0 else sampler(rng, counts[name], n) for i in values])
            for name, values in told.items()
        }
        found = coverage(read, [caption for caption in CAPTIONS for _ in range(n)])
        rows.append((found.distance, found.collapsed, found.diversity))
    return np.array(rows)


@pytest.mark.parametrize("n", SIZES)
def test_draws_from_the_law_have_no_distance_and_full_diversity_in_expectation(n):
    """However many they are: within 4 standard errors of the mean of the tables."""
    rows = tables(law, n)[:, ::2]
    error = rows.std(0, ddof=1) / np.sqrt(REPEATS)
    assert np.all(np.abs(rows.mean(0) - [0.0, 1.0]) <= 4 * error) and error.max() < 0.005


@pytest.mark.parametrize("n", SIZES)
def test_coverage_ranks_samplers_at_the_sizes_in_use(n):
    """The law, half of it, one value: in a single table each pair is more than 5 standard deviations apart."""
    rows = [tables(sampler, n) for sampler in (law, half, one)]
    for better, worse in itertools.pairwise(rows):
        apart = worse.mean(0) - better.mean(0)
        noise = np.hypot(worse.std(0, ddof=1), better.std(0, ddof=1))
        assert apart[0] > 5 * noise[0] and -apart[2] > 5 * noise[2]
    assert (rows[2][:, 1] == 1.0).all() and rows[0][:, 1].max() <= 1 / 32


def test_coverage_of_renders_as_the_scorer_reads_them():
    """Renders of each caption's law, within 4 standard deviations of a table; one render of each alone is collapsed."""
    n = 8
    specs = [[shapes.drawn(caption, i) for i in range(n)] for caption in CAPTIONS]
    repeated = [caption for caption in CAPTIONS for _ in range(n)]
    images = shapes.render_batch(list(itertools.chain(*specs)))
    read, _ = scorer.score(images)
    assert scorer.caption_accuracy(read, shapes.label_arrays(repeated)) > 0.98
    found, noise = coverage(read, repeated), tables(law, n).std(0, ddof=1)
    assert abs(found.distance) < 4 * noise[0] and abs(found.diversity - 1.0) < 4 * noise[2]
    assert found.collapsed <= 1 / 32

    read, _ = scorer.score(np.repeat(images[::n], n, axis=0))
    alike, least = coverage(read, repeated), tables(one, n)
    assert alike.collapsed == 1.0
    parity.close((alike.distance, alike.diversity), least[0, ::2], rtol=1e-12)
