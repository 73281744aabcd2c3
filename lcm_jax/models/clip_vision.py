"""CLIP's transformer for pictures: CLIPVisionModelWithProjection, the picture half of CLIPModel.

x   = [class token, patches of p x p projected] + position embedding
x   = pre_layrnorm(x)                                           (the field's spelling)
x  += MHA(LN1(x));  x += fc2(act(fc1(LN2(x))))                  per layer, not causal
pooled = post_layernorm(x at the class token)
image_embeds = pooled @ visual_projection                       not normalised
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.attention import AttentionFn, dot_product_attention
from lcm_jax.models.clip import ACTIVATIONS, CLIPEncoder
from lcm_jax.models.config import RUN_FIELDS, module_fields
from lcm_jax.models.layers import LayerNorm, dense, embedding

Dtype = Any


class CLIPVisionOutput(NamedTuple):
    """last_hidden_state [b s d] (before any final LN), pooled [b d], image_embeds [b p]."""

    last_hidden_state: jax.Array
    pooled: jax.Array
    image_embeds: jax.Array


class CLIPVisionEmbeddings(nn.Module):
    """Pictures [b h w c] -> class token and patches, row by row, with their positions: [b 1 + (h/p)(w/p) d]."""

    hidden_size: int
    image_size: int
    patch_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patch = (self.patch_size, self.patch_size)
        project = nn.Conv(
            self.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )
        patches = project(images).reshape(images.shape[0], -1, self.hidden_size)
        token = self.param("class_embedding", nn.initializers.normal(0.02), (self.hidden_size,))
        token = jnp.broadcast_to(token.astype(self.dtype), (images.shape[0], 1, self.hidden_size))
        count = (self.image_size // self.patch_size) ** 2 + 1
        positions = embedding(count, self.hidden_size, "position_embedding", None)(jnp.arange(count))
        return jnp.concatenate([token, patches], axis=1) + positions.astype(self.dtype)


class CLIPVisionModel(nn.Module):
    """Pictures -> CLIPVisionOutput. Fields: transformers' CLIPVisionConfig with its defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "attention_dropout": (0.0, None),
        "dropout": (0.0, None),
        "model_type": ("clip_vision_model",),
    }

    @nn.compact
    def __call__(self, images: jax.Array) -> CLIPVisionOutput:
        """images: [b s s c], s = image_size, normalised as the model's preprocessor does."""
        want = (self.image_size, self.image_size, self.num_channels)
        if images.shape[1:] != want:
            raise ValueError(f"pictures of {images.shape[1:]}; this network takes {want}")
        layer = dict(
            heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            epsilon=self.layer_norm_eps,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            causal=False,
        )
        embed = CLIPVisionEmbeddings(self.hidden_size, self.image_size, self.patch_size, self.dtype, name="embeddings")
        x = LayerNorm(self.layer_norm_eps, self.dtype, name="pre_layrnorm")(embed(images.astype(self.dtype)))
        last = CLIPEncoder(self.num_hidden_layers, layer, name="encoder")(x)[-1]
        pooled = LayerNorm(self.layer_norm_eps, self.dtype, name="post_layernorm")(last[:, 0])
        project = dense(self.projection_dim, "visual_projection", self.dtype, None, use_bias=False)
        return CLIPVisionOutput(last, pooled, project(pooled))


def from_config(
    config: Mapping[str, Any], dtype: Dtype = jnp.float32, attention_fn: AttentionFn = dot_product_attention
) -> CLIPVisionModel:
    """The picture encoder of a CLIPVisionModelWithProjection's or a CLIPModel's `config.json`.

    A CLIPModel's `projection_dim` stands beside its two towers' configs and overrides theirs, as in transformers.

    Raises:
      UnsupportedConfig: no CLIP, an unknown activation, or a setting that is not built here.
    """
    vision = dict(config)
    if config.get("model_type") == "clip":
        vision = tower(config, "vision")
    # Configs of early versions hold every setting that transformers knows; only these are the network's.
    known = {f.name for f in dataclasses.fields(CLIPVisionModel)} - RUN_FIELDS | CLIPVisionModel.FIXED.keys()
    vision = {key: value for key, value in vision.items() if key in known}
    fields = module_fields(CLIPVisionModel, vision, CLIPVisionModel.FIXED)
    act = fields.get("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        raise UnsupportedConfig("hidden_act", act, supported=tuple(ACTIVATIONS))
    return CLIPVisionModel(**fields, dtype=dtype, attention_fn=attention_fn)


def tower(config: Mapping[str, Any], which: str) -> dict[str, Any]:
    """The config of one tower ("text" or "vision") in a CLIPModel's `config.json`, with the common projection."""
    # Early files have the settings a second time under *_config_dict, which transformers prefers.
    own = dict(config.get(f"{which}_config") or {}) | dict(config.get(f"{which}_config_dict") or {})
    return own | {"model_type": f"clip_{which}_model", "projection_dim": config.get("projection_dim") or 512}
