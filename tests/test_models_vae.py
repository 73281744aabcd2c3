"""AutoencoderKL and AutoencoderTiny against torch diffusers; tiling against diffusers' tiled paths."""

import functools
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from tiny_configs import TINY_VAES, VAES, torch_model

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models import taesd, tiling, vae
from lcm_jax.models.config import to_config
from lcm_jax.pretrained import names

ATOL = 2e-5
ALL = VAES | TINY_VAES


@functools.cache
def pair(name: str):
    """torch model, our module, its variables."""
    model, module = torch_model(ALL[name]), vae.from_config(ALL[name])
    return model, module, {"params": names.from_torch(module, model.state_dict())}


@functools.cache
def jitted(module, method: str):
    """Compiles sooner than its operations one by one."""
    return jax.jit(functools.partial(module.apply, method=method))


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sd", (21, 35)),
        ("bare", (21, 35)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sd", (24, 32)), ("sdxl", (21, 35)))),
    ],
)
def test_kl_encode(name, size):
    model, module, variables = pair(name)
    images = draw(2, *size, 3)
    with torch.no_grad():
        posterior = model.encode(nchw(images)).latent_dist
    mean, logvar = jitted(module, "encode")(variables, images)
    assert mean.shape[-1] == module.latent_channels
    parity.close(mean, nhwc(posterior.mean), rtol=0, atol=ATOL)
    parity.close(logvar, nhwc(posterior.logvar), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "bare"])
def test_kl_decode(name):
    model, module, variables = pair(name)
    z = draw(2, 5, 7, module.latent_channels)
    with torch.no_grad():
        want = nhwc(model.decode(nchw(z)).sample)
    got = jitted(module, "decode")(variables, z)
    assert got.shape == (2, 5 * module.factor, 7 * module.factor, 3)
    parity.close(got, want, rtol=0, atol=ATOL)


def test_kl_clips_the_log_variance():
    _, module, variables = pair("sd")
    loud = jax.tree.map(np.copy, variables)
    loud["params"]["quant_conv"]["bias"][4:] = [100, -100, 20.5, -31]
    _, logvar = jitted(module, "encode")(loud, draw(2, 21, 35, 3))  # the program of the test above
    assert float(logvar.max()) == 20
    assert float(logvar.min()) == -30


@pytest.mark.parametrize("size", [(24, 32), (21, 35)])
@pytest.mark.parametrize("name", TINY_VAES)
def test_tiny(name, size):
    model, module, variables = pair(name)
    images, z = draw(2, *size, 3), 3 * draw(2, 3, size[1] // 6, module.latent_channels)
    with torch.no_grad():
        latents, want = nhwc(model.encode(nchw(images)).latents), nhwc(model.decode(nchw(z)).sample)
    mean, logvar = jitted(module, "encode")(variables, images)
    parity.close(mean, latents, rtol=0, atol=ATOL)
    assert logvar.shape == mean.shape and float(logvar.max()) == -30
    parity.close(module.scale_latents(mean), nhwc(model.scale_latents(nchw(latents))), atol=ATOL)
    parity.close(module.unscale_latents(mean), nhwc(model.unscale_latents(nchw(latents))), atol=2e-4)
    parity.close(jitted(module, "decode")(variables, z), want, rtol=0, atol=ATOL)


def test_tiny_has_the_published_parameters():
    assert names.num_params(vae.from_config({"_class_name": "AutoencoderTiny"})) == 2_445_063
    assert len(names.torch_table(taesd.AutoencoderTiny())) == 134


@pytest.mark.parametrize("size", [(72, 20), pytest.param((56, 72), marks=pytest.mark.slow)])
def test_tiling_matches_diffusers(size):
    """Tiles of 32 pixels, with ragged edges and slivers narrower than the blend."""
    model, module, variables = pair("sd")
    images, z = draw(1, *size, 3), draw(1, size[0] // 4, size[1] // 4, 4)
    model.enable_tiling()
    try:
        with torch.no_grad():
            posterior, want = model.encode(nchw(images)).latent_dist, nhwc(model.decode(nchw(z)).sample)
    finally:
        model.disable_tiling()
    tile = tiling.tile_size(module)
    assert tile == model.tile_sample_min_size
    encode, decode = (functools.partial(jitted(module, method), variables) for method in ("encode", "decode"))
    mean, logvar = tiling.encode(encode, images, tile=tile, factor=module.factor)
    got = tiling.decode(decode, z, tile=tile, factor=module.factor)
    parity.close(mean, nhwc(posterior.mean), rtol=0, atol=ATOL)
    parity.close(logvar, nhwc(posterior.logvar), rtol=0, atol=ATOL)
    parity.close(got, want, rtol=0, atol=ATOL)


def test_tiling_of_a_pointwise_map_is_the_map():
    """Identical overlaps blend to themselves at any size: up 2, down 2, and without a second tile."""
    up = lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)  # noqa: E731
    down = lambda x: {"a": x[:, ::2, ::2], "b": 2 * x[:, ::2, ::2]}  # noqa: E731
    ways = (tiling.decode, up), (tiling.encode, down)
    for height, width in ((8, 8), (9, 23)):
        z, x = draw(1, height, width, 2), draw(1, 2 * height, 2 * width, 2)
        for tile in (13, 16):  # 6 latents overlap by 1.5
            tiles = {"tile": tile, "factor": 2}
            decode, encode = (jax.jit(functools.partial(way, fn, **tiles)) for way, fn in ways)
            parity.close(decode(z), up(z), atol=1e-6)
            jax.tree.map(lambda a, b: parity.close(a, b, atol=1e-6), encode(x), down(x))
    with pytest.raises(ValueError, match="do not advance"):
        tiling.decode(up, draw(1, 8, 8, 2), tile=2, factor=2)
    assert tiling.tile_size(SimpleNamespace(sample_size=(640, 512))) == 512
    assert tiling.tile_size(taesd.AutoencoderTiny()) == 512


@pytest.mark.parametrize("name", ALL)
def test_config_round_trip_through_diffusers(name):
    module = vae.from_config(ALL[name])
    config = to_config(module)
    cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        want = dict(cls.from_config(ALL[name]).config)
        model, unused = cls.from_config(dict(config), return_unused_kwargs=True)
    assert all(key.startswith("_") for key in unused)
    same = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731
    for key, value in want.items():
        if not key.startswith("_"):
            assert same(model.config[key]) == same(value), key
    assert vae.from_config(config) == module


@pytest.mark.parametrize("name", ["sd", "taesd"])
def test_either_vae_is_usable_wherever_a_vae_is(name):
    module = vae.from_config(ALL[name])
    assert {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"} <= set(dir(module))
    assert {"sample_size", "latent_channels", "factor", "dtype"} <= set(dir(module))
    low = module.clone(dtype=jnp.bfloat16)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(low.init, jax.random.key(0), images)
    mean, logvar = jax.eval_shape(functools.partial(low.apply, method="encode"), variables, images)
    assert mean.shape == logvar.shape == (1, 32 // module.factor, 32 // module.factor, module.latent_channels)
    assert mean.dtype == logvar.dtype == jnp.float32  # what the posterior is sampled from
    out = jax.eval_shape(functools.partial(low.apply, method="decode"), variables, mean)
    assert (out.shape, out.dtype) == (images.shape, jnp.bfloat16)


def test_a_decoder_in_bfloat16_is_bfloat16_throughout():
    low = vae.from_config(ALL["sd"], dtype=jnp.bfloat16)
    variables = jax.eval_shape(low.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    decode = functools.partial(low.apply, method="decode", capture_intermediates=True, mutable="intermediates")
    outputs = jax.tree.leaves(jax.eval_shape(decode, variables, jnp.zeros((1, 4, 4, 4)))[1])
    assert len(outputs) > 50 and {output.dtype for output in outputs} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_decodes_what_overflows_float16():
    """As SDXL's activations do, so that its VAE computes in float32 beside networks in float16 alone."""
    _, module, variables = pair("sd")
    variables = jax.tree.map(lambda x: x, variables)  # another dictionary
    first = variables["params"]["decoder"]["conv_in"]
    first["kernel"] = 1e5 * first["kernel"]
    z = draw(1, 4, 6, 4)
    want, got, wrong = (
        np.asarray(jitted(module.clone(dtype=dtype), "decode")(variables, z), float)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    )
    assert not np.isfinite(wrong).any()
    parity.near(got, want, 3 * parity.BFLOAT16)  # the roundings of some 20 layers, which add up as independent ones


REFUSED = [
    ("sd", "_class_name", "VQModel"),
    ("sd", "act_fn", "gelu"),
    ("sd", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ("sd", "up_block_types", ["UpDecoderBlock2D"] * 2),
    ("sd", "block_out_channels", [32, 36, 64]),
    ("taesd", "act_fn", "silu"),
    ("taesd", "upsample_fn", "bilinear"),
    ("taesd", "encoder_block_out_channels", [16, 16, 32, 32]),
    ("taesd", "num_decoder_blocks", [3, 3]),
    ("taesd", "upsampling_scaling_factor", 3),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_refuses_by_name_and_value(name, field, value):
    with pytest.raises(UnsupportedConfig) as caught:
        vae.from_config(ALL[name] | {field: value})
    assert caught.value.field == field
    assert field in str(caught.value)
    shown = {"block_out_channels": 36}.get(field, tuple(value) if isinstance(value, list) else value)
    assert repr(shown) in str(caught.value)
