"""Layers alone: statistics and softmax against numpy in float64, resizing and sinusoids against torch."""

import functools

import diffusers.models.embeddings as reference
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch

from lcm_jax.models.attention import dot_product_attention
from lcm_jax.models.layers import GroupNorm, LayerNorm, Run, TimestepEmbedding, nearest_resize, sinusoid
from lcm_jax.models.unet import GEGLU


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# An output in half precision is off by half a unit of its last bit; a mean of 100 has 100 EPS.
ROUNDED = {jnp.float32: 0.0, jnp.bfloat16: 1.5 * parity.BFLOAT16, jnp.float16: 1.5 * parity.HALF}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(
    ("norm", "shape", "grouped", "axes"),
    [
        (functools.partial(GroupNorm, 8), (2, 32, 32, 32), (2, 32 * 32, 8, 4), (1, 3)),
        (LayerNorm, (2, 5, 32), (2, 5, 32), -1),
    ],
    ids=["group", "layer"],
)
def test_norms_at_mean_100(norm, shape, grouped, axes, dtype):
    """In one pass the variance is off by 1e-2 here even in float32; half precision may lose only its last bits."""
    x = jnp.asarray(100 + draw(*shape), dtype)
    scale, bias = 1 + 0.2 * draw(32, seed=1), 0.2 * draw(32, seed=2)
    exact = np.asarray(x, np.float64).reshape(grouped)
    mean, var = exact.mean(axes, keepdims=True), exact.var(axes, keepdims=True)
    want = ((exact - mean) / np.sqrt(var + 1e-6)).reshape(shape) * scale + bias
    got = norm(epsilon=1e-6, run=Run(dtype)).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert got.dtype == dtype
    parity.close(np.asarray(got, np.float64), want, rtol=ROUNDED[dtype], atol=800 * parity.EPS)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize("norm", [functools.partial(GroupNorm, 1), LayerNorm])
def test_epsilon_of_norms(norm, epsilon):
    """For a small input: at the variance of 1 in tests of whole networks, 1e-5 and 1e-6 differ only by rounding."""
    x = 1e-3 * draw(3, 64)
    exact = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    want = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + epsilon)
    got = norm(epsilon=epsilon).apply({"params": {"scale": np.ones(64), "bias": np.zeros(64)}}, x)
    parity.close(got, want, rtol=0, of_max=16 * parity.EPS)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("causal", "shared"), [(False, 0), (True, 0), (False, 1024)])
def test_softmax_is_float32_at_large_logits(dtype, causal, shared):
    """Logits of size 100, or of 1 plus a shared 1024, where float16 has steps of 1 and would make all of them equal."""
    sizes = (1, 1, 1) if shared else (10, 4, 1)
    q, k, v = (s * draw(2, 9, 2, 16, seed=i) for i, s in enumerate(sizes))
    if shared:
        q[..., 0], k[..., 0] = 128, 4 * shared / 128
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    exact_q, exact_k, exact_v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bsnd,blnd->bnsl", exact_q, exact_k) / 4
    assert np.abs(logits).max() > 80
    if causal:
        logits = np.where(np.arange(9)[:, None] >= np.arange(9), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want, size = (
        np.einsum("bnsl,blnd->bsnd", weights / weights.sum(-1, keepdims=True), x) for x in (exact_v, np.abs(exact_v))
    )
    got = dot_product_attention(q, k, v, causal=causal)
    assert got.dtype == dtype
    # In half precision weights and output are rounded; in float32 a logit of 100 is off by 100 EPS.
    atol = 2e-5 + 4 * shared * parity.EPS + 2 * ROUNDED[dtype] * size
    parity.close(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def test_geglu_is_exact():
    """GELU by erf. The tanh approximation is off by 5e-4, which would hardly show in a whole UNet."""
    x, kernel, bias = draw(64, 8), draw(8, 32, seed=1), draw(32, seed=2)
    value, gate = np.split(x.astype(np.float64) @ kernel + bias, 2, axis=-1)
    want = value * torch.nn.functional.gelu(torch.from_numpy(gate)).numpy()
    got = GEGLU(16).apply({"params": {"proj": {"kernel": kernel, "bias": bias}}}, x)
    parity.close(got, want, rtol=0, of_max=16 * parity.EPS)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("dim", "shift"), [(320, 0), (64, 1), (33, 0)])
def test_sinusoid(flip, dim, shift):
    values = np.array([0, 0.25, 17.5, 480, 999], np.float32)
    want = reference.get_timestep_embedding(torch.from_numpy(values), dim, flip, shift)
    got = sinusoid(jnp.asarray(values), dim, flip_sin_to_cos=flip, freq_shift=shift)
    parity.close(got, want, rtol=0, atol=parity.sinusoid(values, dim, shift))


@pytest.mark.parametrize("size", [(4, 7), (7, 4), (7, 13), (7, 14), (1, 2), (5, 9)])
def test_nearest_resize_is_torchs(size):
    old, new = size
    x = draw(1, old, old + 2, 3)
    want = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size=(new, 2 * (old + 2)))
    got = jax.jit(nearest_resize, static_argnums=(1, 2))(x, new, 2 * (old + 2))
    np.testing.assert_array_equal(got, want.permute(0, 2, 3, 1).numpy())


def test_cond_proj_starts_at_zero():
    """A student starts as its teacher, whatever w: the LCM's one new parameter changes nothing at first."""
    x, w = draw(2, 8), draw(2, 16, seed=1)
    mlp = TimestepEmbedding(32, cond_proj_dim=16)
    variables = mlp.init(jax.random.key(0), x, w)
    teacher = {"params": {k: v for k, v in variables["params"].items() if k != "cond_proj"}}
    want = TimestepEmbedding(32).apply(teacher, x)
    np.testing.assert_array_equal(mlp.apply(variables, x, w), want)
    np.testing.assert_array_equal(mlp.apply(variables, x), want)
    variables["params"]["cond_proj"]["kernel"] += 1
    assert np.abs(mlp.apply(variables, x, w) - want).max() > 0.1
