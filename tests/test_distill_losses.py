"""Distances: tabulated values, torch's mean squared error, half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch

from lcm_jax.distill.objective import l2, pseudo_huber


def test_pseudo_huber_values_and_slopes():
    difference = jnp.float32([[0.0], [1e-4], [1e-3], [1e-2], [0.1], [1.0]])
    got = pseudo_huber(difference, jnp.zeros_like(difference), c=1e-3)
    values = [0.0, 4.9876e-6, 4.1421e-4, 9.0499e-3, 0.099005, 0.9990005]
    assert got.dtype == jnp.float32
    parity.close(got, values, rtol=5e-5, atol=4e-3 * parity.EPS)  # five digits; 1e-3 is subtracted from 1e-3 and more
    slopes = jax.grad(lambda p: pseudo_huber(p, jnp.zeros_like(p)).sum())(jnp.float32([0.0, 1e-4, -1e-3, 1e-2]))
    parity.close(slopes, [0.0, 0.0995, -0.7071, 0.9950], atol=1e-4)


def test_distances_are_means_over_elements_of_each_example():
    """Element-wise, so that the mean of a batch is that of its values one by one (not of per-sample norms)."""
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    want = torch.nn.functional.mse_loss(*map(torch.from_numpy, (p, q)), reduction="none").mean((1, 2, 3))
    parity.close(l2(p, q), want, rtol=1e-6)
    one_by_one = pseudo_huber(p.ravel(), q.ravel(), 0.5).reshape(p.shape)
    parity.close(pseudo_huber(p, q, 0.5), one_by_one.mean((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("distance", [l2, pseudo_huber])
def test_half_precision_is_measured_in_float32(distance):
    p, q = (jnp.full((4, 4), value, jnp.bfloat16) for value in (1.0, 1.0078125))
    got = distance(p, q)
    assert got.dtype == jnp.float32 and got.shape == (4,)
    parity.close(got, distance(p.astype(jnp.float32), q.astype(jnp.float32)), rtol=1e-6)
