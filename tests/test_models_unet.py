"""UNet2DConditionModel against torch diffusers, on random weights at toy widths; refusals; config round trip."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from tiny_configs import UNETS, torch_model

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.config import to_config
from lcm_jax.models.unet import UNet2DConditionModel, from_config
from lcm_jax.pretrained import names

SHAPES = {"even": (16, 16), "odd": (13, 22)}
TIMESTEPS = {"even": np.array([999, 0], np.int32), "odd": np.array([281.25, 17.6], np.float32)}
# The other cases have no layer or input that these, and the quick tests of LCD with w embeddings, do not have.
QUICK = {("tiny-sd", "odd"), ("ssd-1b", "even"), ("prefixed", "even")}
CASES = [
    pytest.param(name, shape, marks=() if (name, shape) in QUICK else pytest.mark.slow)
    for name in UNETS
    for shape in SHAPES
]


@functools.cache
def torch_unet(name: str):
    """With conv_out scaled so that outputs are about 1 (those of a new torch UNet are about 0.3)."""
    model = torch_model(UNETS[name])
    with torch.no_grad():
        model.conv_out.weight *= 3
    return model


@functools.cache
def ours(name: str):
    """Our module, with the torch model's weights as its variables."""
    unet = from_config(UNETS[name])
    return unet, {"params": names.from_torch(unet, torch_unet(name).state_dict())}


def inputs(name: str, shape: str) -> dict:
    """sample [2 h w c], timesteps, context [2 7 d], w embedding and size conditioning if the config has them."""
    config, rng = UNETS[name], np.random.default_rng(7)

    def draw(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    dim = config.get("cross_attention_dim", 1280)
    args = dict(
        sample=draw(2, *SHAPES[shape], config.get("in_channels", 4)),
        timesteps=TIMESTEPS[shape],
        encoder_hidden_states=draw(2, 7, dim[0] if isinstance(dim, list) else dim),
    )
    if config.get("time_cond_proj_dim"):
        args["timestep_cond"] = draw(2, config["time_cond_proj_dim"])
    if config.get("addition_embed_type"):
        count = (config["projection_class_embeddings_input_dim"] - 16) // config["addition_time_embed_dim"]
        ids = np.array([[1023, 768, 0, 12, 1024, 1024], [512, 512, 3, 0, 640, 333]], np.float32)
        args["added_cond_kwargs"] = {"text_embeds": draw(2, 16), "time_ids": ids[:, :count]}
    return args


def torch_call(model, args: dict) -> torch.Tensor:
    """Prediction [b c h w] of diffusers' model for our [b h w c] arguments."""
    args = jax.tree.map(torch.from_numpy, args)
    sample, t, context = args.pop("sample"), args.pop("timesteps"), args.pop("encoder_hidden_states")
    return model(sample.permute(0, 3, 1, 2), t, context, **args).sample


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_matches_diffusers(name, shape):
    args = inputs(name, shape)
    with torch.no_grad():
        want = torch_call(torch_unet(name), args).permute(0, 2, 3, 1).numpy()
    unet, params = ours(name)
    # Of many configs, single operations compile once for the whole family; of these few each whole network is quicker.
    apply = jax.jit(unet.apply) if (name, shape) in QUICK else unet.apply
    got = apply(params, **args)
    assert 0.3 < want.std() < 3
    assert got.shape == want.shape
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)


@pytest.mark.slow
def test_scalar_timestep_is_broadcast_and_missing_w_is_zero():
    unet, params = ours("sd15-w")
    args = inputs("sd15-w", "even")
    del args["timesteps"], args["timestep_cond"]
    want = unet.apply(params, timesteps=np.array([40, 40]), timestep_cond=np.zeros((2, 16), np.float32), **args)
    np.testing.assert_array_equal(unet.apply(params, timesteps=np.array(40), **args), want)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_bfloat16_keeps_statistics_and_softmax_in_float32():
    args = inputs("sdxl-w", "even")
    low = from_config(UNETS["sdxl-w"], dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda p: low.apply(p, **args))(ours("sdxl-w")[1]).jaxpr
    seen = set()
    for eqn in _equations(jaxpr):
        if eqn.primitive.name in ("exp", "rsqrt", "sqrt", "reduce_sum", "reduce_max", "cos", "sin"):
            seen.add(eqn.primitive.name)
            assert eqn.invars[0].aval.dtype == jnp.float32, eqn
        if eqn.primitive.name == "conv_general_dilated":
            assert eqn.outvars[0].aval.dtype == jnp.bfloat16, eqn
    assert {"exp", "rsqrt", "reduce_sum"} <= seen and jaxpr.outvars[0].aval.dtype == jnp.bfloat16


REFUSED = {
    "act_fn": "gelu",
    "addition_embed_type": "text_image",
    "attention_type": "gated",
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "class_embeddings_concat": True,
    "conv_in_kernel": 5,
    "conv_out_kernel": 1,
    "cross_attention_norm": "layer_norm",
    "downsample_padding": 0,
    "dropout": 0.1,
    "dual_cross_attention": True,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_only_cross_attention": True,
    "mid_block_scale_factor": 1.5,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "num_attention_heads": 8,
    "num_class_embeds": 10,
    "only_cross_attention": True,
    "resnet_out_scale_factor": 1.4,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "silu",
    "time_embedding_dim": 512,
    "time_embedding_type": "fourier",
    "timestep_post_act": "silu",
    "_class_name": "UNet2DModel",
    # networks that cannot exist
    "attention_head_dim": [4, 4, 4],
    "block_out_channels": [32, 32, 64, 60],
    "cross_attention_dim": [24, 24],
    "layers_per_block": [2, 2],
    "transformer_layers_per_block": [1, [1, 1], 1, 1],
    "reverse_transformer_layers_per_block": [1, 1, 1],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["KUpBlock2D"],
}
WRONG_ENTRY = {"block_out_channels": 60, "down_block_types": "AttnDownBlock2D", "up_block_types": "KUpBlock2D"}


@pytest.mark.parametrize("field", REFUSED)
def test_refuses_by_name_and_value(field):
    with pytest.raises(UnsupportedConfig) as caught:
        from_config(UNETS["sd15"] | {field: REFUSED[field]})
    assert caught.value.field == field and _plain(caught.value.value) == _plain(WRONG_ENTRY.get(field, REFUSED[field]))
    message = str(caught.value)
    assert field in message and repr(caught.value.value) in message and "\n" not in message


def test_every_fixed_field_has_a_refusal_here():
    assert set(UNet2DConditionModel.FIXED) - set(REFUSED) == {"addition_embed_type_num_heads", "_diffusers_version"}


def test_wrong_conditioning_is_an_error():
    args = inputs("sdxl-w", "even")
    added = args.pop("added_cond_kwargs")
    unet = from_config(UNETS["sdxl-w"])
    init = functools.partial(jax.eval_shape, unet.init, jax.random.key(0))
    with pytest.raises(ValueError, match="time_ids"):
        init(**args, added_cond_kwargs={"text_embeds": added["text_embeds"]})
    with pytest.raises(ValueError, match="56 features; this UNet takes 64"):
        init(**args, added_cond_kwargs=added | {"time_ids": added["time_ids"][:, :5]})
    with pytest.raises(ValueError, match="no w embedding"):
        args = inputs("sd15", "even") | {"timestep_cond": np.zeros((2, 16), np.float32)}
        jax.eval_shape(from_config(UNETS["sd15"]).init, jax.random.key(0), **args)


def _plain(value):
    """One spelling for values that mean the same to diffusers: lists for tuples, None for an unset switch."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.removeprefix("UNetRes") if isinstance(value, str) else value or None


@pytest.mark.parametrize("name", UNETS)
def test_config_round_trip_through_diffusers(name):
    with torch.device("meta"):
        ours = to_config(from_config(UNETS[name]))
        want = dict(diffusers.UNet2DConditionModel.from_config(UNETS[name]).config)
        model, unused = diffusers.UNet2DConditionModel.from_config(dict(ours), return_unused_kwargs=True)
        got = dict(model.config)
    assert all(key.startswith("_") for key in unused)
    assert got.pop("_use_default_values", []) == []  # every key is written
    want.pop("_use_default_values", None)
    public = {k for k in want if not k.startswith("_")}
    assert public <= set(ours)
    assert {k: _plain(got[k]) for k in public} == {k: _plain(want[k]) for k in public}
    assert from_config(ours) == from_config(UNETS[name])


def test_flax_class_name_and_unknown_keys_are_accepted():
    config = UNETS["sd15"] | {"_class_name": "FlaxUNet2DConditionModel", "decay": 0.9999, "optimization_step": 7}
    assert from_config(config) == from_config(UNETS["sd15"])
    assert to_config(from_config(config))["_class_name"] == "UNet2DConditionModel"
