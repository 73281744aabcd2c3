"""Frechet distance and CMMD: closed forms, their definitions, an independent matrix root, and gathering by shards."""

import numpy as np
import parity
import pytest
import scipy.linalg

from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances
from lcm_jax.metrics.distances import cmmd, frechet_distance, gaussian_distance, statistics, update


def exact_sample(rng, count, mean, covariance):
    """Samples whose own mean and covariance are exactly the given ones (up to rounding)."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + x @ np.linalg.cholesky(covariance).T


def random_covariance(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


def test_frechet_distance_of_commuting_gaussians():
    """Same eigenvectors: d^2 = |m1 - m2|^2 + sum (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    s1, s2 = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    m1, m2 = rng.standard_normal(5), rng.standard_normal(5)
    a = exact_sample(rng, 40, m1, basis * s1**2 @ basis.T)
    b = exact_sample(rng, 30, m2, basis * s2**2 @ basis.T)
    parity.close(frechet_distance(a, b), np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2), rtol=1e-10)


def test_frechet_distance_against_schur_root():
    rng = np.random.default_rng(1)
    c1, c2 = random_covariance(rng, 12), random_covariance(rng, 12)
    m1, m2 = rng.standard_normal(12), rng.standard_normal(12)
    want = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    parity.close(frechet_distance(exact_sample(rng, 50, m1, c1), exact_sample(rng, 60, m2, c2)), want, rtol=1e-9)
    parity.close(gaussian_distance(m2, c2, m1, c1), want, rtol=1e-9)


def test_frechet_distance_of_a_constant_feature():
    x = np.random.default_rng(2).standard_normal((50, 6))
    x[:, 3] = 2.0
    parity.close([frechet_distance(x, x), frechet_distance(x, x + 1.0)], [0, 6], atol=1e-6)


def test_update_by_shards_far_from_zero():
    rng = np.random.default_rng(3)
    x = (1e4 + rng.standard_normal((203, 7)) @ random_covariance(rng, 7)).astype(np.float32)
    stats = None
    for start, stop in ((0, 1), (1, 50), (50, 120), (120, 203)):
        stats = update(stats, x[start:stop])
    assert stats.count == 203
    parity.close(stats.mean, x.astype(np.float64).mean(0), rtol=1e-13)
    parity.close(stats.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-9)
    y = rng.standard_normal((100, 7))
    parity.close(frechet_distance(stats, y), frechet_distance(x, y), rtol=1e-10)


def test_cmmd_is_its_definition(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)) + 1, rng.standard_normal((9, 5))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]

    def mean_kernel(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])

    want = 1000 * (mean_kernel(unit[0], unit[0]) + mean_kernel(unit[1], unit[1]) - 2 * mean_kernel(*unit))
    assert want > 1
    parity.close(cmmd(x, y), want, rtol=1e-9)
    parity.close(cmmd(3 * y, 5 * x), want, rtol=1e-9)  # neither lengths nor the order matter
    parity.close(cmmd(x, x), 0, atol=1e-9)
    monkeypatch.setattr(distances, "_BLOCK", 3)
    parity.close(cmmd(x, y), want, rtol=1e-9)


def test_cmmd_of_two_points():
    """All of x at one point, all of y at the opposite one: |a - b|^2 = 4."""
    x, y = np.tile([[1.0, 0]], (6, 1)), np.tile([[-1.0, 0]], (5, 1))
    parity.close(cmmd(x, y), 2000 * (1 - np.exp(-4 / 200)), rtol=1e-12)


X = np.random.default_rng(4).standard_normal((20, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(X, X[:, :3]), "of 4 and of 3 dimensions"),
        (lambda: update(statistics(X), X[:, :3]), "of 4 and of 3 dimensions"),
        (lambda: frechet_distance(X, X[:4]), "4 images are too few .* of 4 dimensions: give at least 5"),
        (lambda: statistics(X[0]), "shape"),
        (lambda: statistics(X[:0]), "shape"),
        (lambda: statistics(X * np.nan), "NaN"),
        (lambda: statistics(X[:1]).covariance, "at least 2"),
        (lambda: cmmd(X, X[:1]), "of 20 and 1 images"),
        (lambda: cmmd(X, X[:, :2]), r"\[20, 4\] and \[20, 2\]"),
        (lambda: cmmd(X, X * np.nan), "all zeros, or holds NaN"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(LcmError, match=message):
        call()
