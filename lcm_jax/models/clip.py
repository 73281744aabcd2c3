"""CLIP's text transformer, as Stable Diffusion uses it: CLIPTextModel and CLIPTextModelWithProjection.

x   = token embedding + position embedding
x  += MHA(LN1(x)), causal;  x += fc2(act(fc1(LN2(x))))        per layer
hidden_states = [embeddings, layer 1, ..., layer L]           before the final LayerNorm
pooled = final LN(x) at the end-of-text token [@ text_projection]

CLIP's transformer for pictures: CLIPVisionModelWithProjection, the picture half of CLIPModel.

x   = [class token, patches of p x p projected] + position embedding
x   = pre_layrnorm(x)                                           (the field's spelling)
x  += MHA(LN1(x));  x += fc2(act(fc1(LN2(x))))                  per layer, not causal
pooled = post_layernorm(x at the class token)
image_embeds = pooled @ visual_projection                       not normalised
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.attention import AttentionFn, dot_product_attention, multi_head_attention
from lcm_jax.models.config import RUN_FIELDS, module_fields
from lcm_jax.models.layers import LayerNorm, WeightsFn, dense, embedding

Dtype = Any

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}

# Files written by early CLIP code say 2 here whatever their vocabulary: then the end of text is the largest id.
LEGACY_EOS = 2


class CLIPTextOutput(NamedTuple):
    """last_hidden_state [b l d] (after the final LN), hidden_states L+1 times [b l d], pooled [b d or p]."""

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...]
    pooled: jax.Array


class CLIPAttention(nn.Module):
    heads: int
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return multi_head_attention(
            x,
            x,
            heads=self.heads,
            qkv_bias=True,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            weights_fn=self.weights_fn,
            causal=self.causal,
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
        )


class CLIPMLP(nn.Module):
    intermediate_size: int
    hidden_act: str
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ACTIVATIONS[self.hidden_act](dense(self.intermediate_size, "fc1", self.dtype, self.weights_fn)(x))
        return dense(x.shape[-1], "fc2", self.dtype, self.weights_fn)(y)


class CLIPEncoderLayer(nn.Module):
    """One layer, x [b l d]; causal in the text tower, not in that for pictures (models/clip_vision.py)."""

    heads: int
    intermediate_size: int
    hidden_act: str
    epsilon: float
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        run = self.dtype, self.attention_fn, self.weights_fn, self.causal
        attention = CLIPAttention(self.heads, *run, name="self_attn")
        x = x + attention(LayerNorm(self.epsilon, self.dtype, self.weights_fn, name="layer_norm1")(x))
        mlp = CLIPMLP(self.intermediate_size, self.hidden_act, self.dtype, self.weights_fn, name="mlp")
        return x + mlp(LayerNorm(self.epsilon, self.dtype, self.weights_fn, name="layer_norm2")(x))


class CLIPEmbeddings(nn.Module):
    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        tokens = embedding(self.vocab_size, self.hidden_size, "token_embedding", self.weights_fn)
        positions = embedding(self.max_position_embeddings, self.hidden_size, "position_embedding", self.weights_fn)
        return (tokens(input_ids) + positions(jnp.arange(input_ids.shape[1]))).astype(self.dtype)


class CLIPEncoder(nn.Module):
    num_layers: int
    layer: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        states = [x]
        for i in range(self.num_layers):
            states.append(CLIPEncoderLayer(**self.layer, name=f"layers_{i}")(states[-1]))
        return tuple(states)


class CLIPTextModel(nn.Module):
    """Token ids [b l] -> CLIPTextOutput. Fields: transformers' CLIPTextConfig with its defaults.

    `weights_fn` is UNet2DConditionModel's.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    with_projection: bool = False
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "attention_dropout": (0.0, None),
        "dropout": (0.0, None),
        "model_type": ("clip_text_model",),
    }

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> CLIPTextOutput:
        """input_ids: int [b l], l at most max_position_embeddings. No padding mask: padding is attended."""
        if input_ids.shape[1] > self.max_position_embeddings:
            raise ValueError(f"{input_ids.shape[1]} tokens; this text encoder has {self.max_position_embeddings}")
        embeddings = CLIPEmbeddings(
            self.vocab_size,
            self.max_position_embeddings,
            self.hidden_size,
            self.dtype,
            self.weights_fn,
            name="embeddings",
        )
        layer = dict(
            heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            epsilon=self.layer_norm_eps,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            weights_fn=self.weights_fn,
        )
        states = CLIPEncoder(self.num_hidden_layers, layer, name="encoder")(embeddings(input_ids))
        last = LayerNorm(self.layer_norm_eps, self.dtype, self.weights_fn, name="final_layer_norm")(states[-1])
        # Along an axis: indexing by [b] positions would gather over the devices of a sharded batch.
        pooled = jnp.take_along_axis(last, self.end_of_text(input_ids)[:, None, None], axis=1)[:, 0]
        if self.with_projection:
            project = dense(self.projection_dim, "text_projection", self.dtype, self.weights_fn, use_bias=False)
            pooled = project(pooled)
        return CLIPTextOutput(last, states, pooled)

    def end_of_text(self, input_ids: jax.Array) -> jax.Array:
        """Position [b] that is pooled: the largest id (legacy files), else the first `eos_token_id`."""
        if self.eos_token_id == LEGACY_EOS:
            return input_ids.argmax(-1)
        return (input_ids == self.eos_token_id).argmax(-1)


# Of CLIPTextConfig, without meaning for a forward pass.
_IGNORED = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "initializer_factor",
        "initializer_range",
        "tie_word_embeddings",
        "use_cache",
        "is_decoder",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)


def from_config(
    config: Mapping[str, Any], dtype: Dtype = jnp.float32, attention_fn: AttentionFn = dot_product_attention
) -> CLIPTextModel:
    """The text encoder that a `config.json` describes; `architectures` decides whether it projects."""
    fields = module_fields(CLIPTextModel, config, CLIPTextModel.FIXED, ignored=_IGNORED)
    architecture = (config.get("architectures") or ["CLIPTextModel"])[0]
    if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise UnsupportedConfig(
            "architectures", architecture, supported=("CLIPTextModel", "CLIPTextModelWithProjection")
        )
    act = fields.get("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        raise UnsupportedConfig("hidden_act", act, supported=tuple(ACTIVATIONS))
    projects = architecture == "CLIPTextModelWithProjection"
    return CLIPTextModel(**fields, with_projection=projects, dtype=dtype, attention_fn=attention_fn)


def to_config(model: CLIPTextModel) -> dict[str, Any]:
    """A `config.json` for the module, readable by transformers 4 and 5 alike."""
    skip = RUN_FIELDS | {"with_projection"}
    config = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skip}
    config |= {key: values[0] for key, values in CLIPTextModel.FIXED.items()}
    config["architectures"] = ["CLIPTextModelWithProjection" if model.with_projection else "CLIPTextModel"]
    return config


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


def vision_from_config(
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
