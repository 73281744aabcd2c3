"""95 % intervals: closed forms, how often they cover the truth, and captions as clusters."""

import numpy as np
import parity
import pytest
from scipy import stats

from lcm_jax.metrics import distances, intervals
from lcm_jax.metrics.intervals import Estimate, clusters, of_distance, of_means


def of_mean(values, each=1):
    return of_means(np.asarray(values)[:, None], np.arange(len(values)) // each)[0]


def test_of_a_share_and_of_a_mean_as_in_closed_form():
    """Binomial quantiles of a share; the t interval of a mean, as wide as n = 400 makes no difference."""
    share = of_mean(np.arange(1000) < 900)
    assert share.value == 0.9 and share == of_mean(np.arange(1000) < 900)  # the same in every run
    parity.close(share.interval, stats.binom.ppf([0.025, 0.975], 1000, 0.9) / 1000, rtol=0, atol=2e-3)
    values = np.random.default_rng(1).normal(20.0, 3.0, 400)
    mean = of_mean(values)
    wanted = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    parity.close((mean.value, *mean.interval), (values.mean(), *wanted), rtol=0, atol=0.03)


def test_columns_are_measured_each_by_itself():
    values = np.random.default_rng(2).normal(size=(50, 3))
    for found, column in zip(of_means(values, np.arange(50)), values.T, strict=True):
        alone = of_mean(column)
        parity.close((found.value, *found.interval), (alone.value, *alone.interval), rtol=0, atol=1e-12)


def test_equal_values_have_no_width_and_few_captions_no_interval():
    parity.close(of_mean(np.full(100, 0.1)).interval, (0.1, 0.1), rtol=1e-12)
    assert of_distance(2.5, np.full(30, 7.0), np.arange(30)) == Estimate(2.5, (2.5, 2.5))
    few = intervals.LEAST - 1
    assert of_mean(np.arange(4.0 * few), 4) == Estimate(2.0 * few - 0.5, None)
    assert of_distance(1.0, np.arange(4.0 * few), np.arange(4 * few) // 4) == Estimate(1.0, None)
    assert of_mean(np.arange(few + 1.0)).interval is not None


def test_a_distance_is_not_negative():
    assert of_distance(0.1, np.array([-9.0, 9.0] * 20), np.arange(40)).interval[0] == 0.0


def test_clusters_are_captions_wherever_they_stand():
    a, b = clusters(["x", "y", "x", "z"]), clusters(("z", "z"))
    assert a[0] == a[2] and len(set(a)) == 3 and len(a) == 4 and b[0] == b[1]
    assert clusters(["b", "é", "a", "B", "b", "ab", "\U0001f600"]).tolist() == [3, 4, 1, 0, 3, 2, 5]  # by code points
    assert clusters(["x" * 2**20, *"yz" * 5000]).max() == 2  # in no more memory than the captions have
    values, order = np.random.default_rng(3).normal(size=90), np.random.default_rng(4).permutation(90)
    together = np.arange(90) // 3
    parity.close(of_means(values[order, None], together[order])[0].interval, of_mean(values, 3).interval, rtol=1e-12)
    scattered = of_distance(1.0, values[order], together[order])
    parity.close(scattered.interval, of_distance(1.0, values, together).interval, rtol=1e-12)


def test_images_that_repeat_their_caption_add_nothing():
    """Eight equal images of each of 50 captions: the interval is that of 50 images, not of 400."""
    values = np.random.default_rng(5).normal(size=50)
    once, repeated = of_mean(values), of_mean(np.repeat(values, 8), 8)
    parity.close(repeated.interval, once.interval, rtol=1e-9)
    naive = of_mean(np.repeat(values, 8))
    parity.close(np.ptp(repeated.interval) / np.ptp(naive.interval), np.sqrt(8), rtol=0.1)
    alone, many = (of_distance(9.0, np.repeat(values, n), np.repeat(np.arange(50), n)) for n in (1, 8))
    parity.close(many.interval, alone.interval, rtol=1e-9)


def test_influence_of_some_images_stands_for_all():
    values = np.random.default_rng(6).normal(size=4000)
    whole = of_distance(9.0, values, np.arange(4000))
    some = of_distance(9.0, values[:2000], np.arange(4000))
    parity.close(np.ptp(some.interval), np.ptp(whole.interval), rtol=0.05)
    parity.close(np.ptp(whole.interval), 2 * intervals.Z / np.sqrt(4000), rtol=0.05)


@pytest.mark.parametrize("each", [1, 4])
def test_intervals_of_means_cover_in_95_percent(each, monkeypatch):
    """Images of one caption share half of their variance; 95 % of 300 within 3 standard errors."""
    monkeypatch.setattr(intervals, "REPLICATES", 1000)
    rng, truth, hits, naive = np.random.default_rng(7), stats.norm.sf(1.0 / np.sqrt(2.0)), 0, 0
    for _ in range(300):
        values = np.repeat(rng.normal(size=100), each) + rng.normal(size=100 * each) > 1.0
        found = of_mean(values, each)
        hits += found.interval[0] <= truth <= found.interval[1]
        naive += abs(found.value - truth) <= 1.96 * stats.sem(values)  # as if images were independent
    assert abs(hits / 300 - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 300)
    assert naive < 0.9 * 300 if each > 1 else abs(naive - hits) < 0.02 * 300


@pytest.mark.parametrize("each", [1, 4])
def test_intervals_of_frechet_distances_cover_in_95_percent(each):
    """Gaussians of 4 dimensions in a number of images that the bias is small at."""
    rng, d, captions = np.random.default_rng(8), 4, 400
    factor, of_reference = (rng.normal(size=(d, d)) / 2 + np.eye(d) for _ in range(2))
    mean, zero, covariance = np.full(d, 0.7), np.zeros(d), of_reference @ of_reference.T
    truth = distances.gaussian_distance(mean, factor @ factor.T, zero, covariance)
    to = distances.FeatureStatistics(10**6, zero, zero, covariance * (10**6 - 1))
    numbers, hits = np.repeat(np.arange(captions), each), 0
    for _ in range(300):
        z = rng.normal(size=(captions * each, d))
        if each > 1:
            z = (z + rng.normal(size=(captions, d))[numbers]) / np.sqrt(2.0)
        x = mean + z @ factor.T
        own = distances.statistics(x)
        value = distances.gaussian_distance(own.mean, own.covariance, zero, covariance)
        low, high = of_distance(value, distances.frechet_influence(x, own, to), numbers).interval
        hits += low <= truth <= high
    assert abs(hits / 300 - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 300)


def test_influence_is_the_derivative_by_an_images_weight():
    """Of Frechet distance and CMMD: one image shown k times more among many, by differences."""
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5)) + 0.3
    to = distances.statistics(y)

    def moved(distance, i, repeats):
        """Change of the distance if image i has 1 + 1 / repeats of the others' weight, by that of its share."""
        more = np.concatenate([np.repeat(x, repeats, axis=0), x[i : i + 1]])
        return (distance(more) - distance(np.repeat(x, repeats, axis=0))) * len(x) * repeats

    def frechet(x):  # of the biased covariance, whose factor does not depend on the number of images
        return distances.gaussian_distance(x.mean(0), np.cov(x.T, bias=True), to.mean, to.covariance)

    own = distances.FeatureStatistics(2, x.mean(0), np.zeros(5), np.cov(x.T, bias=True))
    found = distances.frechet_influence(x, own, to)
    parity.close(found[:3], [moved(frechet, i, 1000) for i in range(3)], rtol=1e-2, atol=1e-2 * found.std())
    value, found = distances.cmmd_influence(x, y)
    found -= found.mean()
    parity.close([value], [distances.cmmd(x, y)], rtol=0, atol=0)
    wanted = [moved(lambda x: distances.cmmd(x, y), i, 40) for i in range(3)]
    parity.close(found[:3], wanted, rtol=1e-2, atol=1e-2 * found.std())


def test_directions_without_variance_have_no_influence():
    x = np.random.default_rng(10).normal(size=(200, 3))
    flat, to = x * [1, 1, 0], np.random.default_rng(11).normal(size=(300, 3)) * [1, 2, 0]
    found = distances.frechet_influence(flat, distances.statistics(flat), distances.statistics(to))
    wanted = distances.frechet_influence(x[:, :2], distances.statistics(x[:, :2]), distances.statistics(to[:, :2]))
    parity.close(found, wanted, rtol=1e-6, atol=1e-6)
    only = distances.frechet_influence(flat, distances.statistics(flat), distances.statistics(x))  # of the reference
    assert np.isfinite(only).all()
