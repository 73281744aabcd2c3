"""Frechet distance: closed forms, an independent matrix root, and shard-wise gathering."""

import numpy as np
import parity
import pytest
import scipy.linalg

from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances as frechet


def exact_sample(rng, count, mean, covariance):
    """Samples whose own mean and covariance are exactly those asked for (up to rounding)."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + x @ np.linalg.cholesky(covariance).T


def random_covariance(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


def test_closed_form_of_commuting_gaussians():
    # Same eigenvectors: d^2 = |m1 - m2|^2 + sum (s1 - s2)^2.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    s1, s2 = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    m1, m2 = rng.standard_normal(5), rng.standard_normal(5)
    a = exact_sample(rng, 40, m1, basis * s1**2 @ basis.T)
    b = exact_sample(rng, 30, m2, basis * s2**2 @ basis.T)
    want = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet.frechet_distance(a, b) == pytest.approx(want, rel=1e-10)


def test_general_gaussians_against_schur_root():
    rng = np.random.default_rng(1)
    c1, c2 = random_covariance(rng, 12), random_covariance(rng, 12)
    m1, m2 = rng.standard_normal(12), rng.standard_normal(12)
    want = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    got = frechet.frechet_distance(exact_sample(rng, 50, m1, c1), exact_sample(rng, 60, m2, c2))
    assert got == pytest.approx(want, rel=1e-9)
    assert frechet.gaussian_distance(m2, c2, m1, c1) == pytest.approx(want, rel=1e-9)


def test_same_set_and_degenerate_features():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 6))
    x[:, 3] = 2.0  # a feature that never changes
    assert frechet.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    assert frechet.frechet_distance(x, x + 1.0) == pytest.approx(6.0, abs=1e-6)


def test_shards_equal_whole_far_from_zero():
    rng = np.random.default_rng(3)
    x = (1e4 + rng.standard_normal((203, 7)) @ random_covariance(rng, 7)).astype(np.float32)
    stats = None
    for start, stop in ((0, 1), (1, 50), (50, 120), (120, 203)):
        stats = frechet.update(stats, x[start:stop])
    assert stats.count == 203
    parity.close(stats.mean, x.astype(np.float64).mean(0), rtol=1e-13)
    parity.close(stats.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-9)
    y = rng.standard_normal((100, 7))
    assert frechet.frechet_distance(stats, y) == pytest.approx(frechet.frechet_distance(x, y), rel=1e-10)


def test_refusals():
    x = np.random.default_rng(4).standard_normal((20, 4))
    with pytest.raises(LcmError, match="4 and 3 dimensions"):
        frechet.frechet_distance(x, x[:, :3])
    with pytest.raises(LcmError, match="4 and 3 dimensions"):
        frechet.merge(frechet.statistics(x), frechet.statistics(x[:, :3]))
    with pytest.raises(LcmError, match="at least 5"):
        frechet.frechet_distance(x, x[:4])
    with pytest.raises(LcmError, match="shape"):
        frechet.statistics(x[0])
    with pytest.raises(LcmError, match="shape"):
        frechet.statistics(x[:0])
    with pytest.raises(LcmError, match="NaN"):
        frechet.statistics(x * np.nan)
    with pytest.raises(LcmError, match="at least 2"):
        _ = frechet.statistics(x[:1]).covariance
