"""CLIP's picture tower against transformers: both layouts of a folder, both activations, and what is refused."""

import numpy as np
import parity
import pytest
import torch
import transformers

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.metrics.networks import clip as clip_folders
from lcm_jax.metrics.networks import weights
from lcm_jax.models import clip as clip_vision

VISION = {
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 7,
    "projection_dim": 24,
}


def torch_vision(**changes):
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION | changes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = name.endswith("weight") and value.ndim == 1
            value.copy_((0.2 if value.ndim == 1 else 0.15) * torch.randn_like(value) + (1.0 if scale else 0.0))
    return model


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_matches_transformers(act):
    model, module = torch_vision(hidden_act=act), clip_vision.vision_from_config(VISION | {"hidden_act": act})
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    table = clip_folders._vision_table(module)
    params = weights.read_params(table, {k: v.shape for k, v in state.items()}, state.__getitem__, "state dict")
    images = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        pooled = model.vision_model(torch.from_numpy(images.transpose(0, 3, 1, 2))).pooler_output
    got = module.apply({"params": params}, images)
    assert want.image_embeds.std() > 0.3
    parity.close(got.last_hidden_state, want.last_hidden_state.numpy(), rtol=0, atol=2e-5)
    parity.close(got.pooled, pooled.numpy(), rtol=0, atol=2e-5)
    parity.close(got.image_embeds, want.image_embeds.numpy(), rtol=0, atol=2e-5)


def test_both_layouts_of_a_config():
    alone = clip_vision.vision_from_config(VISION)
    both = {"model_type": "clip", "projection_dim": 24, "text_config": {}, "vision_config": VISION | {"top_k": 50}}
    assert clip_vision.vision_from_config(both) == alone
    early = {"model_type": "clip", "projection_dim": 24, "vision_config": {}, "vision_config_dict": VISION}
    assert clip_vision.vision_from_config(early) == alone
    # A CLIPModel's common projection counts, and the towers' own default of 512 does not.
    wide = both | {"vision_config": VISION | {"projection_dim": 512}}
    assert clip_vision.vision_from_config(wide).projection_dim == 24


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_act", "relu"), ("model_type", "siglip_vision_model"), ("attention_dropout", 0.1)]
)
def test_refuses_by_name_and_value(field, value):
    with pytest.raises(UnsupportedConfig) as caught:
        clip_vision.vision_from_config(VISION | {field: value})
    assert caught.value.field == field and repr(value) in str(caught.value)


def test_another_size_is_an_error():
    module = clip_vision.vision_from_config(VISION)
    with pytest.raises(ValueError, match=r"pictures of \(21, 28, 3\); this network takes \(28, 28, 3\)"):
        module.init(np.zeros(2, np.uint32), np.zeros((1, 21, 28, 3), np.float32))
