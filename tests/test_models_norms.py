"""Each norm has the epsilon and the groups of the torch layer with its name.

Outputs do not show it: at a variance of about 1, as in networks of random weights, 1e-5 and 1e-6 give equal numbers.
"""

import diffusers
import jax
import pytest
import torch
import transformers
from flax import linen as nn
from tiny_configs import CLIPS, UNETS, VAES, VISION

from lcm_jax.models import clip, unet, vae
from lcm_jax.models.layers import GroupNorm, LayerNorm
from lcm_jax.pretrained import names

# If a config has the epsilon, it is one that no layer has by default.
BIGG = {key: value for key, value in CLIPS["bigg"].items() if key != "torch_dtype"} | {"layer_norm_eps": 3e-4}
CASES = {
    "sd15": (unet.from_config, diffusers.UNet2DConditionModel, UNETS["sd15"] | {"norm_eps": 3e-4}),
    "sdxl": (unet.from_config, diffusers.UNet2DConditionModel, UNETS["sdxl-w"] | {"norm_eps": 3e-4}),
    "vae": (vae.from_config, diffusers.AutoencoderKL, VAES["sd"]),
    "text": (clip.from_config, transformers.CLIPTextModelWithProjection, BIGG),
    "vision": (clip.vision_from_config, transformers.CLIPVisionModelWithProjection, VISION | {"layer_norm_eps": 3e-4}),
}


def torch_norms(cls, config) -> dict:
    """Name of a layer, without the prefix of a CLIP tower -> (epsilon, groups)."""
    with torch.device("meta"):
        model = cls(cls.config_class(**config)) if hasattr(cls, "config_class") else cls.from_config(dict(config))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm))
    }
    return {
        name.removeprefix("text_model.").removeprefix("vision_model."): (layer.eps, getattr(layer, "num_groups", 0))
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_epsilon_and_groups_are_torchs(name):
    from_config, torch_class, config = CASES[name]
    module, found = from_config(config), {}

    def note(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, (GroupNorm, LayerNorm)):
            key = names.torch_name((*layer.path, "scale")).removesuffix(".weight")
            found[key] = layer.epsilon, getattr(layer, "num_groups", 0)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        if name == "vision":
            jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 3), "float32"))
        else:
            names.abstract_params.__wrapped__(module)  # past its cache, or the module would not run here
    assert len(found) > 5 and found == torch_norms(torch_class, config)
