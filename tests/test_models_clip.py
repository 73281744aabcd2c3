"""CLIP's towers against transformers: every output, both activations, both end-of-text rules, what is refused."""

import functools

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
import transformers
from tiny_configs import CLIPS, VISION, torch_model

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.metrics.networks import clip as clip_folders
from lcm_jax.metrics.networks import weights
from lcm_jax.models import clip
from lcm_jax.pretrained import names

ATOL = 2e-5

# Length 20 = the tiny max_position_embeddings; 97 ends a text. Row 1 has added ids above it (textual inversion) before
# the end, row 2 ends twice, row 3 never.
IDS = np.array(
    [
        [96, 5, 17, 42, 97] + [97] * 15,
        [96, 98, 99, 3, 97] + [0] * 15,
        [96, 97, 8, 97, 9] + [1] * 15,
        [96] + list(range(19)),
    ],
    np.int32,
)


@functools.cache
def pair(name: str):
    model, module = torch_model(CLIPS[name]), clip.from_config(CLIPS[name])
    return model, module, {"params": names.from_torch(module, model.state_dict())}


@pytest.mark.parametrize("length", [20, 11])
@pytest.mark.parametrize("name", CLIPS)
def test_text_matches_transformers(name, length):
    """Also that attention is causal and covers padding, and which token is pooled: the first of the largest id, or of
    the end."""
    model, module, variables = pair(name)
    ids = IDS[:, :length]
    with torch.no_grad():
        want = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    got = module.apply(variables, ids)
    assert len(got.hidden_states) == len(want.hidden_states) == module.num_hidden_layers + 1
    parity.close(got.last_hidden_state, want.last_hidden_state.numpy(), rtol=0, atol=ATOL)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        parity.close(ours, theirs.numpy(), rtol=0, atol=ATOL)
    pooled = want.text_embeds if module.with_projection else want.pooler_output
    assert pooled.std() > 0.3
    parity.close(got.pooled, pooled.numpy(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_vision_matches_transformers(act):
    config = VISION | {"hidden_act": act}
    model, module = torch_model(config), clip.vision_from_config(config)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    table = clip_folders._vision_table(module)
    params = weights.read_params(table, {k: v.shape for k, v in state.items()}, state.__getitem__, "state dict")
    images = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        pooled = model.vision_model(torch.from_numpy(images.transpose(0, 3, 1, 2))).pooler_output
    got = module.apply({"params": params}, images)
    assert want.image_embeds.std() > 0.3
    parity.close(got.last_hidden_state, want.last_hidden_state.numpy(), rtol=0, atol=ATOL)
    parity.close(got.pooled, pooled.numpy(), rtol=0, atol=ATOL)
    parity.close(got.image_embeds, want.image_embeds.numpy(), rtol=0, atol=ATOL)


def test_bfloat16_stays_close():
    _, module, variables = pair("bigg")
    want = module.apply(variables, IDS)
    got = module.clone(dtype=jnp.bfloat16).apply(variables, IDS)
    assert got.last_hidden_state.dtype == got.pooled.dtype == jnp.bfloat16
    parity.near(got.last_hidden_state, want.last_hidden_state, 0.03)


@pytest.mark.parametrize("name", CLIPS)
def test_config_round_trip_through_transformers(name):
    module = clip.from_config(CLIPS[name])
    config = clip.to_config(module)
    read = transformers.CLIPTextConfig(**config)
    assert set(config) <= set(read.to_dict()) | {"dropout"}  # no key that transformers does not have
    for key, value in CLIPS[name].items():
        if key not in ("torch_dtype", "transformers_version", "dropout"):
            assert getattr(read, key) == value, key
    assert clip.from_config(read.to_dict() | {"architectures": config["architectures"]}) == module
    assert clip.from_config(config) == module


def test_vision_config_alone_and_in_a_clip_model():
    alone = clip.vision_from_config(VISION)
    both = {"model_type": "clip", "projection_dim": 24, "text_config": {}, "vision_config": VISION | {"top_k": 50}}
    assert clip.vision_from_config(both) == alone
    early = {"model_type": "clip", "projection_dim": 24, "vision_config": {}, "vision_config_dict": VISION}
    assert clip.vision_from_config(early) == alone
    # The common projection of a CLIPModel overrides the towers' own default of 512.
    wide = both | {"vision_config": VISION | {"projection_dim": 512}}
    assert clip.vision_from_config(wide).projection_dim == 24


TEXT_TOWER, VISION_TOWER = (clip.from_config, CLIPS["vit-l"]), (clip.vision_from_config, VISION)


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        (TEXT_TOWER, "architectures", ["CLIPModel"]),
        (TEXT_TOWER, "attention_dropout", 0.1),
        (TEXT_TOWER, "dropout", 0.1),
        (TEXT_TOWER, "hidden_act", "gelu_new"),
        (TEXT_TOWER, "model_type", "t5"),
        (VISION_TOWER, "attention_dropout", 0.1),
        (VISION_TOWER, "hidden_act", "relu"),
        (VISION_TOWER, "model_type", "siglip_vision_model"),
    ],
)
def test_refuses_by_name_and_value(tower, field, value):
    from_config, config = tower
    with pytest.raises(UnsupportedConfig) as caught:
        from_config(config | {field: value})
    assert caught.value.field == field
    assert repr(value[0] if isinstance(value, list) else value) in str(caught.value)


def test_inputs_of_a_wrong_size_are_errors():
    _, module, variables = pair("vit-l")
    with pytest.raises(ValueError, match="21 tokens; this text encoder has 20"):
        module.apply(variables, np.zeros((1, 21), np.int32))
    with pytest.raises(ValueError, match=r"images of \(21, 28, 3\); this network takes \(28, 28, 3\)"):
        clip.vision_from_config(VISION).init(np.zeros(2, np.uint32), np.zeros((1, 21, 28, 3), np.float32))
