"""CLIP's text encoders against transformers: every output, both activations, both end-of-text rules."""

import functools

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
import transformers
from tiny_configs import CLIPS, torch_model

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models import clip
from lcm_jax.pretrained import names

ATOL = 2e-5

# Length 20 = the tiny max_position_embeddings; 97 ends a text. Row 1 carries added ids above it (textual inversion)
# before the end, row 2 ends twice, row 3 nowhere.
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
def test_matches_transformers(name, length):
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


def test_the_two_end_of_text_rules():
    legacy, modern = clip.from_config(CLIPS["vit-l"]), clip.from_config(CLIPS["new-eos"])
    np.testing.assert_array_equal(legacy.end_of_text(jnp.asarray(IDS)), [4, 2, 1, 0])  # first of the largest id
    np.testing.assert_array_equal(modern.end_of_text(jnp.asarray(IDS)), [4, 4, 1, 0])


def test_attention_is_causal_and_covers_padding():
    _, module, variables = pair("vit-l")
    base = module.apply(variables, IDS).last_hidden_state
    other = IDS.copy()
    other[:, 12] = 50
    changed = np.abs(module.apply(variables, other).last_hidden_state - base).max((0, 2))
    assert not changed[:12].any()
    assert changed[12:].all()


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
    assert set(config) <= set(read.to_dict()) | {"dropout"}  # nothing of ours among transformers' keys
    for key, value in CLIPS[name].items():
        if key not in ("torch_dtype", "transformers_version", "dropout"):
            assert getattr(read, key) == value, key
    assert clip.from_config(read.to_dict() | {"architectures": config["architectures"]}) == module
    assert clip.from_config(config) == module


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["CLIPModel"]),
        ("attention_dropout", 0.1),
        ("dropout", 0.1),
        ("hidden_act", "gelu_new"),
        ("model_type", "t5"),
    ],
)
def test_refuses_by_name_and_value(field, value):
    with pytest.raises(UnsupportedConfig) as caught:
        clip.from_config(CLIPS["vit-l"] | {field: value})
    assert caught.value.field == field
    assert repr(value[0] if isinstance(value, list) else value) in str(caught.value)


def test_too_many_tokens_is_an_error():
    _, module, variables = pair("vit-l")
    with pytest.raises(ValueError, match="21 tokens; this text encoder has 20"):
        module.apply(variables, np.zeros((1, 21), np.int32))
