"""ControlNetModel against torch diffusers on random weights at toy widths; refusals; sizes of the published nets."""

import dataclasses
import functools

import diffusers
import family
import jax
import numpy as np
import parity
import pytest
import tiny
import torch
from tiny_configs import UNETS

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.config import to_config
from lcm_jax.models.controlnet import ControlNetModel, from_config
from lcm_jax.models.unet import Encoder
from lcm_jax.pretrained import names

OF_ENCODER = {field.name for field in dataclasses.fields(Encoder)}
SMALL = {
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": 1,
}
# Name -> UNet that it is for (here at toy widths, in tests/family.py at full size), what is changed.
KINDS = {
    "sd15": ("sd15", {}),
    "sd21": ("sd21-base", {"controlnet_conditioning_channel_order": "bgr"}),
    "sdxl": ("sdxl", {}),
    "sdxl-mid": ("sdxl", {"transformer_layers_per_block": [1, 0, 1]}),
    "sdxl-small": ("sdxl", SMALL),
    "shuffle": ("sd15", {"global_pool_conditions": True}),
}
QUICK = ("sdxl-mid",)  # all kinds of blocks, and sizes; SD 1.x's and 2.x's are in the UNet's own tests


def of_unet(unet: dict, **changes) -> dict:
    """The config of a net that is for a UNet of this config."""
    return {key: value for key, value in unet.items() if key in OF_ENCODER} | changes


def config(name: str) -> dict:
    unet, changes = KINDS[name]
    return of_unet(UNETS[unet], conditioning_embedding_out_channels=[8, 16, 24], **changes)


@functools.cache
def torch_net(name: str) -> diffusers.ControlNetModel:
    return tiny.randomise(diffusers.ControlNetModel(**config(name)), 5)


def inputs(name: str) -> dict:
    """Arguments of one evaluation of two images of odd size, with SDXL's conditioning if the net has it."""
    rng, height, width = np.random.default_rng(7), 5, 8
    args = {
        "sample": rng.standard_normal((2, height, width, 4), np.float32),
        "timesteps": np.array([999.0, 17.6], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 7, config(name)["cross_attention_dim"]), np.float32),
        "image": rng.random((2, 4 * height, 4 * width, 3), np.float32),
    }
    if config(name).get("addition_embed_type"):
        ids = np.array([[1023, 768, 0, 12, 1024, 1024], [512, 512, 3, 0, 640, 333]], np.float32)
        args["added_cond_kwargs"] = {"text_embeds": rng.standard_normal((2, 16), np.float32), "time_ids": ids}
    return args


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_matches_diffusers(name):
    args = inputs(name)
    given = jax.tree.map(lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x), args)
    first = [given.pop(key) for key in ("sample", "timesteps", "encoder_hidden_states", "image")]
    with torch.no_grad():
        want = torch_net(name)(*first, **given)
    net = from_config(config(name))
    got = jax.jit(net.apply)({"params": names.from_torch(net, torch_net(name).state_dict())}, **args)
    assert len(got) == len(net.skip_widths) + 1
    for one, theirs in zip(got, [*want.down_block_res_samples, want.mid_block_res_sample], strict=True):
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        assert one.shape == theirs.shape and np.abs(theirs).max() > 0.1
        parity.close(one, theirs, rtol=0, of_max=2 * parity.NETWORK)  # of every level alone: their largest differ


REFUSED = {
    "_class_name": "T2IAdapter",
    "act_fn": "gelu",
    "attention_head_dim": [4, 4],
    "class_embed_type": "timestep",
    "conditioning_channels": 1,
    "controlnet_conditioning_channel_order": "rbg",
    "down_block_types": ["AttnDownBlock2D"] * 4,
    "encoder_hid_dim": 4096,
    "layers_per_block": 100,
    "num_class_embeds": 10,
    "only_cross_attention": True,
}


def test_refuses_by_name_and_value():
    for field, value in REFUSED.items():
        with pytest.raises(UnsupportedConfig, match=field) as caught:
            from_config(config("sd15") | {field: value})
        assert caught.value.field == field and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_config_round_trip_through_diffusers(name):
    ours = to_config(from_config(config(name)))
    with torch.device("meta"):
        model, unused = diffusers.ControlNetModel.from_config(dict(ours), return_unused_kwargs=True)
    assert all(key.startswith("_") for key in unused) and not model.config.get("_use_default_values")
    assert from_config(dict(model.config)) == from_config(ours) == from_config(config(name))


# Parameters and keys, of which the first and the third are those of the published files.
SIZES = {
    "sd15": (361_279_120, 340),
    "sd21": (364_228_240, 340),
    "sdxl": (1_251_014_160, 844),
    "sdxl-mid": None,
    "sdxl-small": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_published_nets_have_these_tensors(name):
    _, changes = KINDS[name]
    full = of_unet(family.UNETS[name.split("-")[0]], **changes)
    net = from_config(full)
    table = {key: parameter.torch_shape for key, parameter in names.torch_table(net).items()}
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel(**full).state_dict()
    assert table == {key: tuple(value.shape) for key, value in theirs.items()}
    assert SIZES[name] in (None, (names.num_params(net), len(table)))
    assert isinstance(net, ControlNetModel) and net.factor == 8
