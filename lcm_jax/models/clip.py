"""CLIP's two towers: the text encoders of Stable Diffusion, and the image encoder that metrics use.

    x  += MHA(LN1(x));  x += fc2(act(fc1(LN2(x))))                  each layer of either tower

CLIPTextModel, CLIPTextModelWithProjection:

    x   = token embedding + position embedding                      then layers with causal attention
    hidden_states = [embeddings, layer 1, ..., layer L]             before the final LayerNorm
    last_hidden_state = final LN(hidden_states[-clip_skip])         1: of the last layer
    pooled = final LN(x) at the end-of-text token [@ text_projection]

CLIPVisionModelWithProjection, the image half of CLIPModel:

    x   = [class token, patches of p x p projected] + position embedding
    x   = pre_layrnorm(x)                                           transformers' spelling; then the layers
    pooled = post_layernorm(x at the class token)
    image_embeds = pooled @ visual_projection                       not normalised
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.attention import AttentionFn, dot_product_attention
from lcm_jax.models.config import RUN_FIELDS, Channels, Epsilon, Layers, Token, Vocabulary, module_fields
from lcm_jax.models.layers import LayerNorm, Run, WeightsFn, dense, embedding, multi_head_attention
from lcm_jax.typed import checked

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}

# Early CLIP code wrote 2 as eos_token_id whatever the vocabulary; the end of text is then the largest id.
LEGACY_EOS = 2

_FIXED = {"attention_dropout": (0.0, None), "dropout": (0.0, None)}


class CLIPAttention(nn.Module):
    heads: int
    causal: bool
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        return multi_head_attention(
            x, x, heads=self.heads, qkv_bias=True, run=self.run, causal=self.causal, names=names
        )


class CLIPMLP(nn.Module):
    intermediate_size: int
    hidden_act: str
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ACTIVATIONS[self.hidden_act](dense(self.intermediate_size, "fc1", self.run)(x))
        return dense(x.shape[-1], "fc2", self.run)(y)


class CLIPEncoderLayer(nn.Module):
    heads: int
    intermediate_size: int
    hidden_act: str
    epsilon: float
    causal: bool
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        run = self.run.after(x)
        attention = CLIPAttention(self.heads, self.causal, run, name="self_attn")
        x = x + attention(LayerNorm(self.epsilon, run, name="layer_norm1")(x))
        mlp = CLIPMLP(self.intermediate_size, self.hidden_act, run, name="mlp")
        return x + mlp(LayerNorm(self.epsilon, run, name="layer_norm2")(x))


class CLIPEncoder(nn.Module):
    """x [b l d] -> x and the output of every layer."""

    num_layers: int
    layer: Callable[..., CLIPEncoderLayer]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        states = [x]
        for i in range(self.num_layers):
            states.append(self.layer(name=f"layers_{i}")(states[-1]))
        return tuple(states)


def _encoder(tower: "CLIPTextModel | CLIPVisionModel", causal: bool, run: Run) -> CLIPEncoder:
    layer = functools.partial(
        CLIPEncoderLayer,
        heads=tower.num_attention_heads,
        intermediate_size=tower.intermediate_size,
        hidden_act=tower.hidden_act,
        epsilon=tower.layer_norm_eps,
        causal=causal,
        run=run,
    )
    return CLIPEncoder(tower.num_hidden_layers, layer, name="encoder")


def _check(tower: "CLIPTextModel | CLIPVisionModel") -> None:
    if tower.hidden_act not in ACTIVATIONS:
        raise UnsupportedConfig("hidden_act", tower.hidden_act, supported=tuple(ACTIVATIONS))
    check_heads(tower)


def check_heads(tower: Any) -> None:
    """Raises UnsupportedConfig unless a transformer's heads divide its width."""
    heads, width = tower.num_attention_heads, tower.hidden_size
    if width % heads:
        raise UnsupportedConfig("num_attention_heads", heads, supported=f"divisors of hidden_size, which is {width}")


def check_patches(tower: Any) -> None:
    """Raises UnsupportedConfig unless an image of a vision transformer's size has a patch."""
    if tower.patch_size > tower.image_size:
        raise UnsupportedConfig(
            "patch_size", tower.patch_size, supported=f"at most image_size, which is {tower.image_size}"
        )


class CLIPTextOutput(NamedTuple):
    """last_hidden_state [b l d] (after the final LN), hidden_states L+1 times [b l d], pooled [b d or p]."""

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...]
    pooled: jax.Array


# Vectors [b l d] to take in place of token embeddings, and where: bool [b l].
Spliced = tuple[jax.Array, jax.Array]


class CLIPEmbeddings(nn.Module):
    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    run: Run

    @nn.compact
    def __call__(self, input_ids: jax.Array, spliced: Spliced | None) -> jax.Array:
        x = embedding(self.vocab_size, self.hidden_size, "token_embedding", self.run)(input_ids)
        if spliced is not None:
            vectors, here = spliced
            x = jnp.where(here[..., None], vectors, x)
        positions = embedding(self.max_position_embeddings, self.hidden_size, "position_embedding", self.run)
        return (x + positions(jnp.arange(input_ids.shape[1]))).astype(self.run.dtype)


class CLIPTextModel(nn.Module):
    """Token ids [b l] -> CLIPTextOutput.

    Fields: those of transformers' CLIPTextConfig with its defaults; the last three: see `layers.Run`.
    """

    vocab_size: Vocabulary = 49408
    hidden_size: Channels = 512
    intermediate_size: Channels = 2048
    projection_dim: Channels = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 8
    max_position_embeddings: Channels = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    bos_token_id: Token | None = 49406
    eos_token_id: Token = 49407
    pad_token_id: Token | None = 1
    with_projection: bool = False
    dtype: DTypeLike = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = _FIXED | {"model_type": ("clip_text_model",)}

    @nn.compact
    def __call__(self, input_ids: jax.Array, spliced: Spliced | None = None, clip_skip: int = 1) -> CLIPTextOutput:
        """input_ids: int [b l], l at most max_position_embeddings. There is no padding mask: padding is attended.

        spliced: textual-inversion vectors; `input_ids` has any id there that does not end a text.
        clip_skip: layer that `last_hidden_state` is taken from, counted from the last, which is 1.
        """
        if input_ids.shape[1] > self.max_position_embeddings:
            raise ValueError(f"{input_ids.shape[1]} tokens; this text encoder has {self.max_position_embeddings}")
        run = Run(self.dtype, self.attention_fn, self.weights_fn)
        embeddings = CLIPEmbeddings(
            self.vocab_size, self.max_position_embeddings, self.hidden_size, run, name="embeddings"
        )
        states = _encoder(self, causal=True, run=run)(embeddings(input_ids, spliced))
        norm = LayerNorm(self.layer_norm_eps, run, name="final_layer_norm")
        last = norm(states[-1])
        # Along an axis: indexing by [b] positions would gather over the devices of a sharded batch.
        pooled = jnp.take_along_axis(last, self.end_of_text(input_ids)[:, None, None], axis=1)[:, 0]
        if self.with_projection:
            pooled = dense(self.projection_dim, "text_projection", run, use_bias=False)(pooled)
        return CLIPTextOutput(last if clip_skip == 1 else norm(states[-clip_skip]), states, pooled)

    def end_of_text(self, input_ids: jax.Array) -> jax.Array:
        """Position [b] that is pooled: that of the largest id (legacy files), else of the first `eos_token_id`."""
        if self.eos_token_id == LEGACY_EOS:
            return input_ids.argmax(-1)
        return (input_ids == self.eos_token_id).argmax(-1)


# Keys of CLIPTextConfig that mean nothing to a forward pass.
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
        "with_projection",
        "output_attentions",
        "output_hidden_states",
    }
)
_ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")


def from_config(config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> CLIPTextModel:
    """The text encoder that a `config.json` describes; `architectures` decides whether it projects.

    Raises:
      UnsupportedConfig: another architecture, an unknown activation, or a setting that is not implemented here.
    """
    fields = module_fields(CLIPTextModel, config, CLIPTextModel.FIXED, ignored=_IGNORED)
    named = config.get("architectures")
    architecture = checked("architectures", _ARCHITECTURES if named is None else named, tuple[str, ...])[0]
    if architecture not in _ARCHITECTURES:
        raise UnsupportedConfig("architectures", architecture, supported=_ARCHITECTURES)
    model = CLIPTextModel(**fields, with_projection=architecture == _ARCHITECTURES[1], dtype=dtype)
    _check(model)
    if model.with_projection and model.eos_token_id >= model.vocab_size:
        raise UnsupportedConfig(
            "eos_token_id", model.eos_token_id, supported=f"ids below vocab_size, which is {model.vocab_size}"
        )
    return model


def to_config(model: CLIPTextModel) -> dict[str, Any]:
    """A `config.json` for the module, readable by both transformers 4 and 5."""
    skip = RUN_FIELDS | {"with_projection"}
    config = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skip}
    config |= {key: values[0] for key, values in CLIPTextModel.FIXED.items()}
    config["architectures"] = [_ARCHITECTURES[model.with_projection]]
    return config


class CLIPVisionOutput(NamedTuple):
    """last_hidden_state [b s d] (before any final LN), pooled [b d], image_embeds [b p]."""

    last_hidden_state: jax.Array
    pooled: jax.Array
    image_embeds: jax.Array


class CLIPVisionEmbeddings(nn.Module):
    """Images [b h w c] -> class token and patches, row by row, with their positions: [b 1 + (h/p)(w/p) d]."""

    hidden_size: int
    image_size: int
    patch_size: int
    run: Run

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        d, patch, dtype = self.hidden_size, (self.patch_size, self.patch_size), self.run.dtype
        project = nn.Conv(d, patch, strides=patch, padding="VALID", use_bias=False, dtype=dtype, name="patch_embedding")
        patches = project(images).reshape(images.shape[0], -1, d)
        token = self.param("class_embedding", nn.initializers.normal(0.02), (d,))
        token = jnp.broadcast_to(token.astype(dtype), (images.shape[0], 1, d))
        count = (self.image_size // self.patch_size) ** 2 + 1
        positions = embedding(count, d, "position_embedding", self.run)(jnp.arange(count))
        return jnp.concatenate([token, patches], axis=1) + positions.astype(dtype)


class CLIPVisionModel(nn.Module):
    """Images [b s s c] -> CLIPVisionOutput.

    Fields: those of transformers' CLIPVisionConfig with its defaults; the last two: see `layers.Run`.
    """

    hidden_size: Channels = 768
    intermediate_size: Channels = 3072
    projection_dim: Channels = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 12
    image_size: Channels = 224
    patch_size: Channels = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    dtype: DTypeLike = jnp.float32
    attention_fn: AttentionFn = dot_product_attention

    FIXED: ClassVar[Mapping[str, tuple]] = _FIXED | {"model_type": ("clip_vision_model",), "num_channels": (3,)}

    @nn.compact
    def __call__(self, images: jax.Array) -> CLIPVisionOutput:
        """images: [b s s c], s = image_size, normalised as the model's preprocessor does."""
        want = (self.image_size, self.image_size, 3)
        if images.shape[1:] != want:
            raise ValueError(f"images of {images.shape[1:]}; this network takes {want}")
        run = Run(self.dtype, self.attention_fn)
        embeddings = CLIPVisionEmbeddings(self.hidden_size, self.image_size, self.patch_size, run, name="embeddings")
        x = LayerNorm(self.layer_norm_eps, run, name="pre_layrnorm")(embeddings(images.astype(self.dtype)))
        last = _encoder(self, causal=False, run=run)(x)[-1]
        pooled = LayerNorm(self.layer_norm_eps, run, name="post_layernorm")(last[:, 0])
        return CLIPVisionOutput(
            last, pooled, dense(self.projection_dim, "visual_projection", run, use_bias=False)(pooled)
        )


def vision_from_config(config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> CLIPVisionModel:
    """The image encoder of a CLIPVisionModelWithProjection's or a CLIPModel's `config.json`.

    A CLIPModel has one `projection_dim` beside the configs of its towers, which overrides theirs as in transformers.

    Raises:
      UnsupportedConfig: not CLIP, an unknown activation, or a setting that is not implemented here.
    """
    vision = tower(config, "vision") if config.get("model_type") == "clip" else config
    # Configs of early versions list every setting that transformers knows; only these belong to the network.
    known = {f.name for f in dataclasses.fields(CLIPVisionModel)} - RUN_FIELDS | CLIPVisionModel.FIXED.keys()
    vision = {key: value for key, value in vision.items() if key in known}
    fields = module_fields(CLIPVisionModel, vision, CLIPVisionModel.FIXED)
    model = CLIPVisionModel(**fields, dtype=dtype)
    _check(model)
    check_patches(model)
    return model


def tower(config: Mapping[str, Any], which: str) -> dict[str, Any]:
    """The config of one tower ("text" or "vision") in a CLIPModel's `config.json`, with the common projection."""
    # Early files hold the settings a second time under *_config_dict, which transformers prefers.
    own: dict[str, Any] = {}
    for key in (f"{which}_config", f"{which}_config_dict"):
        own |= checked(key, config.get(key), dict | None) or {}
    projection = config.get("projection_dim")
    return own | {"model_type": f"clip_{which}_model", "projection_dim": 512 if projection is None else projection}
