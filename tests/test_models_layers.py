"""Layers alone: statistics and softmax against numpy in float64, resizing and sinusoids against torch."""

import functools

import diffusers.models.embeddings as reference
import gpu_kit
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch

from lcm_jax.cost import hlo
from lcm_jax.models.attention import dot_product_attention
from lcm_jax.models.layers import GroupNorm, LayerNorm, ResnetBlock2D, Run, TimestepEmbedding, nearest_resize, sinusoid
from lcm_jax.models.unet import GEGLU
from lcm_jax.runtime import topology
from lcm_jax.runtime.mesh import make_mesh, replicated


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
    one_pass = 4 * parity.EPS * 100**2 if dtype == jnp.bfloat16 else 0  # GroupNorm's, see below
    parity.close(np.asarray(got, np.float64), want, rtol=ROUNDED[dtype] + one_pass, atol=800 * parity.EPS)


def normalised(x: np.ndarray, groups: int, epsilon: float) -> np.ndarray:
    """GroupNorm of [b h w c] in float64, scale 1 and bias 0."""
    grouped = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(var + epsilon)).reshape(x.shape)


def apply_norm(x: jax.Array, added: jax.Array | None = None, dtype=jnp.float32) -> jax.Array:
    """GroupNorm of 8 groups, scale 1 and bias 0; dtype: of the output."""
    c = x.shape[-1]
    variables = {"params": {"scale": jnp.ones(c), "bias": jnp.zeros(c)}}
    return jax.jit(GroupNorm(8, 1e-6, Run(dtype)).apply)(variables, x, added)


@pytest.mark.parametrize("mean", [0, 10, 100, 1000])
def test_one_pass_is_nearer_than_the_rounding_of_its_input(mean):
    """The variance is a difference of sums 1 + mean^2 times its size, each off by a few EPS."""
    exact = mean + np.random.default_rng(0).standard_normal((2, 32, 32, 64))
    x = jnp.asarray(exact, jnp.bfloat16)
    want = normalised(np.asarray(x), 8, 1e-6)
    bound = 4 * parity.EPS * (1 + mean**2)
    rounded = np.linalg.norm(want - normalised(exact, 8, 1e-6)) / np.linalg.norm(want)
    assert bound < rounded  # 2e-3 at a mean of 0, to 1 at 1000
    parity.near(apply_norm(x), want, bound)


@pytest.mark.parametrize("size", [0.1, 100])
def test_what_is_added_is_part_of_the_statistics(size):
    """In bfloat16 by the moments alone: x + added would have been rounded, and is not."""
    x, added = (jnp.asarray(draw(2, *shape, 64), jnp.bfloat16) for shape in ((16, 16), ()))
    added = (size * added).astype(jnp.bfloat16)
    whole = np.asarray(x, np.float64) + np.asarray(added, np.float64)[:, None, None]
    parity.near(apply_norm(x, added), normalised(whole, 8, 1e-6), 4 * parity.EPS * (1 + size**2))


def test_one_pass_over_a_constant():
    """The variance of a constant comes out as much below 0 as above, and is 0."""
    x = jnp.asarray(np.linspace(1, 100, 64, dtype=np.float32), jnp.bfloat16)[:, None, None, None]
    y = apply_norm(jnp.broadcast_to(x, (64, 37, 41, 8)))  # sums of squares that float32 cannot hold
    parity.close(np.abs(y), 0.0, rtol=0, atol=16 * parity.EPS * np.asarray(x, np.float64) / 1e-3)


@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_dtypes_take_two_passes(dtype, with_added):
    """Bit for bit: the mean and the mean squared deviation, both in float32, by channel first."""
    x, added = (jnp.asarray(draw(2, *shape, 64), dtype) for shape in ((16, 16), ()))

    @jax.jit
    def two_passes(x, added):
        x = (x + added[:, None, None] if with_added else x).astype(jnp.float32)

        def mean(v):
            groups = v.mean((1, 2)).reshape(2, 8, 8).mean(-1)
            return jnp.repeat(groups, 8, axis=-1)[:, None, None]

        centred = x - mean(x)
        return (centred * jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-6)).astype(dtype)

    got = apply_norm(x, added if with_added else None, dtype)
    np.testing.assert_array_equal(got, two_passes(x, added))


@pytest.mark.gpu_aot
@gpu_kit.needs_compiler
@pytest.mark.parametrize(("gradient", "most", "kernels"), [(False, 16, 17), (True, 45, 41)])
def test_traffic_of_a_resnet_on_a_gpu(gradient, most, kernels):
    """12.6 and 38.4 of its activations, by 15 and 38 kernels; 26.6 and 72.4 with float32 copies in its norms."""
    (device,) = topology.devices("h100:1")
    where = replicated(make_mesh(devices=[device]))
    unit = 4 * 64 * 64 * 320 * 2  # bytes

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    module = ResnetBlock2D(320, 32, 1e-5, Run(jnp.bfloat16))
    args = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((4, 64, 64, 320), (4, 1280))]
    params = jax.eval_shape(module.init, jax.random.key(0), *args)

    def total(*args):
        return module.apply(*args).astype(jnp.float32).sum()

    program = jax.grad(total, (0, 1)) if gradient else module.apply
    compiled = jax.jit(program).lower(*jax.tree.map(shape, (params, *args))).compile()
    operations = [one for one in hlo.operations(hlo.read(compiled.as_text())) if one.bytes]
    moved = sum(one.times * one.bytes for one in operations)
    assert unit * most / 2 < moved < unit * most and sum(one.times for one in operations) <= kernels


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm", [functools.partial(GroupNorm, 1), LayerNorm])
def test_epsilon_of_norms(norm, dtype, epsilon):
    """For a small input: at the variance of 1 in tests of whole networks, 1e-5 and 1e-6 differ only by rounding."""
    x = jnp.asarray(1e-3 * draw(3, 64), dtype)
    exact = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(-1, keepdims=True)
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
