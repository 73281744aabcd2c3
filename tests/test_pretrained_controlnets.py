"""ControlNets from folders and single files of both spellings; what is no ControlNet, or for another family."""

import re

import family
import jax
import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.numpy import load_file, save_file
from test_models_controlnet import KINDS, of_unet

from lcm_jax.errors import LcmError
from lcm_jax.models.controlnet import from_config
from lcm_jax.models.unet import from_config as unet_from_config
from lcm_jax.pretrained import names, single_file_keys
from lcm_jax.pretrained.controlnets import config_from_shapes, load_controlnet, torch_names

HINTS = {"conv_in": 0, **{f"blocks.{n}": 2 * (n + 1) for n in range(6)}, "conv_out": 14}


def pipeline(name: str):
    return tiny.loaded(name)[0]


def net_config(name: str, **changes) -> dict:
    """The config of a net for the UNet of `tiny.folder(name)`."""
    return of_unet(tiny.UNETS[name], conditioning_embedding_out_channels=[8, 16], **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("nets")
    for name in ("sd1", "sd2", "sdxl"):
        tiny.randomise(ControlNetModel(**net_config(name)), 5).save_pretrained(root / name)
    return root


def original(tensors: dict, unet) -> dict:
    """The tensors of a net for this UNet, from diffusers' keys to the original's."""
    layout = single_file_keys.unet_layout(unet)
    shared = {one: key for key, stored in layout.tensors.items() for one in stored.keys}
    found = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        if hint := re.fullmatch(r"controlnet_cond_embedding\.(.*)", module):
            found[f"input_hint_block.{HINTS[hint[1]]}.{leaf}"] = value
        elif zero := re.fullmatch(r"controlnet_down_blocks\.(\d+)", module):
            found[f"zero_convs.{zero[1]}.0.{leaf}"] = value
        else:
            found[f"middle_block_out.0.{leaf}" if module == "controlnet_mid_block" else shared[key]] = value
    return found


def assert_equal(one, other):
    (net, params), (other_net, other_params) = one, other
    assert net == other_net
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_single_files_of_all_spellings_are_the_folder(name, folders, tmp_path):
    tensors = load_file(folders / name / "diffusion_pytorch_model.safetensors")
    want = load_controlnet(folders / name, pipeline(name))
    jax.tree.map(np.testing.assert_array_equal, want[1], names.from_torch(want[0], tensors))
    ldm = original(tensors, pipeline(name).unet)
    if (
        name == "sd1"
    ):  # by diffusers' own script these are the original's names; it knows no hints but those of 8 pixels
        theirs = convert_controlnet_checkpoint(dict(ldm), {"layers_per_block": 1})
        known = {key for key, value in theirs.items() if value is not None and "cond_embedding" not in key}
        assert known == {key for key in tensors if "cond_embedding" not in key}
        assert all(theirs[key] is tensors[key] for key in known)
    prefixed = {f"control_model.{key}": value for key, value in ldm.items()}
    whole = prefixed | {"model.diffusion_model.input_blocks.0.0.weight": tensors["conv_in.weight"]}
    for n, stored in enumerate((tensors, ldm, prefixed, whole)):
        save_file(stored, tmp_path / f"{n}.safetensors")
        assert_equal(load_controlnet(tmp_path / f"{n}.safetensors", pipeline(name)), want)


def test_a_folder_within_and_a_variant_that_only_the_model_has(folders, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "controlnet").symlink_to(folders / "sd1")
    assert_equal(
        load_controlnet(tmp_path / "pipeline", pipeline("sd1"), "fp16"),
        load_controlnet(folders / "sd1", pipeline("sd1")),
    )


def vector(*keys: str) -> dict[str, np.ndarray]:
    return {key: np.zeros(1, np.float32) for key in keys}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("lora_controlnet", "input_hint_block.0.weight"), "is a Control-LoRA, which is not supported yet"),
        (("control_model.lora_controlnet",), "is a Control-LoRA"),
        (("task_embedding", "controlnet_cond_embedding.conv_in.weight"), "is a ControlNet-Union, .* one kind of image"),
        (("control_add_embedding.linear_1.weight",), "is a ControlNet-Union"),
        (("transformer_layes.0.attn.in_proj_weight",), "is a ControlNet-Union"),
        (("adapter.conv_in.weight", "adapter.body.0.resnets.0.block1.weight"), "is a T2I-Adapter"),
        (("conv_in.weight", "body.0.block1.weight"), "is a T2I-Adapter"),
        (("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
        (("lllite_unet_input_blocks_4_1.up.weight",), "is a ControlNet-LLLite"),
        (("lora_unet_mid_block.lora_up.weight",), "is a LoRA, which is given with loras= .--lora."),
        (
            ("model.diffusion_model.out.2.bias",),
            "is no ControlNet .* it lacks .*, and holds model.diffusion_model.out.2",
        ),
        (("controlnet_cond_embedding.conv_in.weight",), "lacks tensors of a ControlNet; copy or download it again"),
    ],
)
def test_what_is_no_controlnet_is_named(keys, message, tmp_path):
    save_file(vector(*keys), tmp_path / "net.safetensors")
    with pytest.raises(LcmError, match=message) as caught:
        load_controlnet(tmp_path / "net.safetensors", pipeline("sd1"))
    assert "\n" not in str(caught.value)


def test_folders_of_other_models_are_named(folders, tmp_path):
    tensors = load_file(folders / "sd1" / "diffusion_pytorch_model.safetensors")
    for n, (added, kind, message) in enumerate(
        (
            (vector("task_embedding"), "ControlNetModel", "is a ControlNet-Union"),
            ({}, "SD3ControlNetModel", "unsupported _class_name='SD3ControlNetModel'"),
            (vector("up_blocks.0.x.weight"), "ControlNetModel", r"1 unexpected \(up_blocks.0.x.weight\)"),
        )
    ):
        folder = tmp_path / str(n)
        folder.mkdir()
        save_file(tensors | added, folder / "diffusion_pytorch_model.safetensors")
        tiny.write_json(folder / "config.json", net_config("sd1") | {"_class_name": kind})
        with pytest.raises(LcmError, match=message):
            load_controlnet(folder, pipeline("sd1"))
    with pytest.raises(LcmError, match="nowhere does not exist; give a folder"):
        load_controlnet(tmp_path / "nowhere", pipeline("sd1"))


@pytest.mark.parametrize(
    ("model", "net", "changes", "message"),
    [
        ("sd1", "sd2", {"cross_attention_dim": 1024}, r"is for SD 2.x \(context 1024\), the model is .*\(context 32\)"),
        ("sdxl", "sd1", {}, r"\(context 32\), the model is a model of another kind \(context 64\)"),
        (
            "sdxl",
            "sdxl",
            {"projection_class_embeddings_input_dim": 48},
            "takes 48 features of pooled .* UNet 80 features .* sizes",
        ),
        (
            "sd1",
            "sd1",
            {"layers_per_block": 2},
            r"widths 32, 32, 32, 32, 64, 64, the model's UNet has .* 32, 32, 32, 64",
        ),
        ("sd1", "sd1", {"in_channels": 9}, "reads latents of 9 channels, those of the model have 4"),
        ("sd1", "sd1", {"conditioning_embedding_out_channels": [8, 8, 8]}, "4 x 4 pixels, the model's VAE 2"),
    ],
)
def test_a_net_for_another_model_is_refused_by_name(model, net, changes, message, tmp_path):
    """From a header alone: its tensors are not read."""
    config = net_config(net) | changes
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in ControlNetModel(**config).state_dict().items()}
    tiny.write_json(tmp_path / "config.json", config)
    save_file(
        {key: np.zeros(shape, np.float32) for key, shape in shapes.items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(LcmError, match=f"the ControlNet .* {message}; give one that was made"):
        load_controlnet(tmp_path, pipeline(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name != "shuffle"])
def test_configs_of_the_published_nets_follow_from_their_shapes(name):
    unet_name = {"sd15": "sd15", "sd21": "sd21"}.get(name, "sdxl")
    unet = unet_from_config(family.UNETS[unet_name])
    net = from_config(of_unet(family.UNETS[unet_name], **KINDS[name][1]))
    shapes = {key: parameter.torch_shape for key, parameter in names.torch_table(net).items()}
    assert from_config(config_from_shapes(shapes, unet, "file")) == net.clone(
        controlnet_conditioning_channel_order="rgb"
    )
    if name in ("sd15", "sd21", "sdxl"):  # the original has no other
        keys = original({key: key for key in shapes}, unet)
        assert torch_names(keys) == {name: key for key, name in keys.items()}
