"""Names and layouts against torch's own state dicts, both ways, bit for bit; what does not fit is listed."""

import functools

import ml_dtypes
import numpy as np
import parity
import pytest
import tiny
import torch
from flax import traverse_util

from lcm_jax.errors import LcmError
from lcm_jax.models import clip, unet, vae
from lcm_jax.pretrained import names


@functools.cache
def case(name: str):
    """(Linen module, torch state dict) of one of `CASES`."""
    kind, _, name = name.partition(" ")
    if kind == "text":
        model = tiny.torch_text_encoder(name)
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        return clip.from_config(config), model.state_dict()
    model, module = (tiny.torch_unet(name), unet) if kind == "unet" else (tiny.torch_vae(), vae)
    return module.from_config(model.config), model.state_dict()


CASES = [*(f"unet {name}" for name in tiny.UNETS), "vae", *(f"text {name}" for name in tiny.TEXT_ENCODERS)]


def arrays(state_dict):
    return {key: value.numpy() for key, value in state_dict.items()}


def prefixed(name: str, key: str) -> str:
    return key if "text" not in name or key.startswith(("text_model.", "text_projection.")) else "text_model." + key


@pytest.mark.parametrize(
    "path, key",
    [
        ("down_blocks_0/resnets_1/conv1/kernel", "down_blocks.0.resnets.1.conv1.weight"),
        ("time_embedding/linear_1/bias", "time_embedding.linear_1.bias"),
        ("add_embedding/linear_2/kernel", "add_embedding.linear_2.weight"),
        (
            "mid_block/attentions_0/transformer_blocks_10/attn1/to_out_0/bias",
            "mid_block.attentions.0.transformer_blocks.10.attn1.to_out.0.bias",
        ),
        (
            "up_blocks_1/attentions_2/transformer_blocks_0/ff/net_0/proj/kernel",
            "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj.weight",
        ),
        ("embeddings/token_embedding/embedding", "embeddings.token_embedding.weight"),
        ("encoder/layers_11/layer_norm1/scale", "encoder.layers.11.layer_norm1.weight"),
        ("decoder/layers_3/conv_4/kernel", "decoder.layers.3.conv.4.weight"),
        ("post_quant_conv/kernel", "post_quant_conv.weight"),
        ("encoder/layer_0/norm1/scale", "encoder.layer.0.norm1.weight"),
        ("Mixed_5b/branch3x3dbl_2/bn/var", "Mixed_5b.branch3x3dbl_2.bn.running_var"),
        ("embeddings/cls_token", "embeddings.cls_token"),
    ],
)
def test_torch_name(path, key):
    assert names.torch_name(tuple(path.split("/"))) == key


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_torchs_and_a_round_trip_is_bitwise(name):
    module, state_dict = case(name)
    expected = {prefixed(name, key): value.numpy() for key, value in state_dict.items()}
    table = names.torch_table(module)
    assert {key: p.torch_shape for key, p in table.items()} == {key: value.shape for key, value in expected.items()}
    assert names.num_params(module) == sum(value.size for value in expected.values())
    back = names.to_torch(module, names.from_torch(module, state_dict))
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert back[key].flags.c_contiguous and np.array_equal(back[key], value), key


def test_layouts_of_square_weights():
    """A forgotten transpose of a square weight raises no error, so these are compared as maps."""
    module, state_dict = case("unet sd1")
    block = names.from_torch(module, state_dict)["down_blocks_0"]["attentions_0"]
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    kernel = block["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
    layer = tiny.torch_unet("sd1").down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    parity.close(x @ kernel, layer(torch.from_numpy(x)).numpy(), atol=1e-5)
    kernel = block["proj_in"]["kernel"]  # a 1x1 convolution in SD 1
    assert kernel.shape == (1, 1, 32, 32)
    image = torch.from_numpy(x.T[None, :, :, None])
    y = tiny.torch_unet("sd1").down_blocks[0].attentions[0].proj_in(image)
    parity.close(x @ kernel[0, 0] + block["proj_in"]["bias"], y[0, :, :, 0].numpy().T, atol=1e-5)

    module, state_dict = case("text openclip_projection")
    params = names.from_torch(module, state_dict)
    projection = tiny.torch_text_encoder("openclip_projection").text_projection
    parity.close(x @ params["text_projection"]["kernel"], projection(torch.from_numpy(x)).numpy(), atol=1e-5)
    tokens = state_dict["text_model.embeddings.token_embedding.weight"].numpy()
    assert np.array_equal(params["embeddings"]["token_embedding"]["embedding"], tokens)


def test_convolution_layout():
    module, state_dict = case("unet sd1")
    kernel = names.from_torch(module, state_dict)["conv_in"]["kernel"]
    weight = state_dict["conv_in.weight"]
    for out, inside, row, column in [(0, 1, 0, 2), (31, 3, 2, 1)]:
        assert kernel[row, column, inside, out] == weight[out, inside, row, column].item()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_files_become_the_dtype_asked_for(dtype):
    module, state_dict = case("vae")
    half = {key: value.astype(dtype) for key, value in arrays(state_dict).items()}
    params = names.from_torch(module, half, np.float32)
    assert {leaf.dtype for leaf in traverse_util.flatten_dict(params).values()} == {np.dtype(np.float32)}
    bias = params["decoder"]["conv_out"]["bias"]
    assert np.array_equal(bias, half["decoder.conv_out.bias"].astype(np.float32))
    assert names.from_torch(module, half, dtype)["decoder"]["conv_out"]["bias"].dtype == dtype


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_attention_names(as_convolution):
    module, state_dict = case("vae")
    old = {}
    for key, value in arrays(state_dict).items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in key:
                key = key.replace(new, name)
                value = value[:, :, None, None] if as_convolution and value.ndim == 2 else value
        old[key] = value
    assert len(old.keys() - state_dict.keys()) == 16
    back = names.to_torch(module, names.from_torch(module, old))
    for key, value in state_dict.items():
        assert np.array_equal(back[key], value.numpy()), key


@pytest.mark.parametrize("name", ["unet sd1", "unet sd2"])
def test_projections_of_the_other_rank(name):
    module, state_dict = case(name)
    other = arrays(state_dict)
    for key in [key for key in other if key.endswith(("proj_in.weight", "proj_out.weight"))]:
        value = other[key]
        other[key] = value[:, :, 0, 0] if value.ndim == 4 else value[:, :, None, None]
    back = names.to_torch(module, names.from_torch(module, other))
    for key, value in state_dict.items():
        assert np.array_equal(back[key], value.numpy()), key


def test_text_encoder_prefix_and_buffers():
    module, state_dict = case("text clip")
    bare = {key.removeprefix("text_model."): value for key, value in arrays(state_dict).items()}
    full = {"text_model." + key: value for key, value in bare.items()}
    full["text_model.embeddings.position_ids"] = np.arange(77)[None]
    for key in ("logit_scale", "visual_projection.weight", "vision_model.pre_layrnorm.bias"):  # of a whole CLIP
        full[key] = np.ones((), np.float32)
    for read in (bare, full):
        back = names.to_torch(module, names.from_torch(module, read))
        assert back.keys() == {"text_model." + key for key in bare}
        assert all(np.array_equal(back["text_model." + key], value) for key, value in bare.items())


def test_everything_that_does_not_fit_is_listed():
    module, state_dict = case("unet sd1")
    wrong = arrays(state_dict)
    gone = sorted(key for key in wrong if key.startswith("up_blocks.1.attentions"))[:12]
    for key in gone:
        del wrong[key]
    wrong["extra.weight"] = np.zeros(3, np.float32)
    wrong["conv_in.weight"] = np.zeros((32, 9, 3, 3), np.float32)
    with pytest.raises(LcmError) as caught:
        names.from_torch(module, wrong)
    message = str(caught.value)
    assert "\n" not in message
    assert "12 missing" in message and all(key in message for key in gone[:10]) and gone[10] not in message
    assert "and 2 more" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 mis-shaped (conv_in.weight [32, 9, 3, 3] instead of [32, 4, 3, 3])" in message


def test_a_transposed_linear_weight_is_mis_shaped():
    module, state_dict = case("unet sd1")
    wrong = arrays(state_dict)
    wrong["time_embedding.linear_1.weight"] = wrong["time_embedding.linear_1.weight"].T
    with pytest.raises(LcmError, match="1 mis-shaped"):
        names.from_torch(module, wrong)


def test_the_same_tensor_twice_is_refused():
    module, state_dict = case("text clip")
    twice = arrays(state_dict)
    bare = {key.removeprefix("text_model."): value for key, value in twice.items()}
    twice = {"text_model." + key: value for key, value in bare.items()}
    twice["final_layer_norm.bias"] = bare["final_layer_norm.bias"]
    with pytest.raises(LcmError, match="final_layer_norm.bias .a second time"):
        names.from_torch(module, twice)


def test_integer_weights_are_refused():
    module, state_dict = case("vae")
    wrong = arrays(state_dict) | {"quant_conv.bias": np.zeros(8, np.int8)}
    with pytest.raises(LcmError, match="quant_conv.bias is int8"):
        names.from_torch(module, wrong)


def test_writing_checks_the_tree():
    module, state_dict = case("vae")
    params = names.from_torch(module, state_dict)
    del params["quant_conv"]
    with pytest.raises(LcmError, match=r"AutoencoderKL: 2 missing \(quant_conv/bias, quant_conv/kernel\)"):
        names.to_torch(module, params)
