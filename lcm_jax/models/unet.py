"""The blocks of a UNet's way down, middle and way up; x: [b h w c], temb: [b 4*C0], context: [b l e].

UNet2DConditionModel of the Stable Diffusion family: SD 1.x, 2.x, XL and refiner, SSD-1B, Vega, small-sd, tiny-sd.

    temb  = time_embedding(sinusoid(t) [+ cond_proj(w embedding)]) [+ add_embedding(pooled text, sizes)]
    skips = conv_in, then every (resnet[, transformer]) and downsampler of the way down
    out   = conv_out(SiLU(GN(up path, each resnet fed concat[hidden, last skip])))

The fields are diffusers' constructor arguments with diffusers' defaults.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.attention import AttentionFn, Transformer2DModel, dot_product_attention
from lcm_jax.models.config import DIFFUSERS_VERSION, module_fields
from lcm_jax.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    WeightsFn,
    conv3x3,
    remat,
    sinusoid,
)

Dtype = Any
Depths = tuple[int, ...]  # transformer blocks after each resnet of a level; empty: no attention


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """What every block of one UNet shares, and how it makes its layers (named as in torch's module lists)."""

    groups: int
    epsilon: float
    use_linear_projection: bool
    dtype: Dtype
    attention_fn: AttentionFn
    weights_fn: WeightsFn | None
    remat: str

    def resnet(self, channels: int, j: int) -> ResnetBlock2D:
        block = remat(ResnetBlock2D, self.remat)
        return block(channels, self.groups, self.epsilon, self.dtype, self.weights_fn, name=f"resnets_{j}")

    def transformer(self, heads: int, depth: int, j: int) -> Transformer2DModel:
        return Transformer2DModel(
            heads=heads,
            depth=depth,
            groups=self.groups,
            use_linear_projection=self.use_linear_projection,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            weights_fn=self.weights_fn,
            remat=self.remat,
            name=f"attentions_{j}",
        )

    def downsampler(self, channels: int) -> Downsample2D:
        return Downsample2D(channels, dtype=self.dtype, weights_fn=self.weights_fn, name="downsamplers_0")

    def upsampler(self, channels: int) -> Upsample2D:
        block = remat(Upsample2D, self.remat, static_argnums=(2,))  # its size
        return block(channels, self.dtype, self.weights_fn, name="upsamplers_0")


class DownBlock2D(nn.Module):
    """`num_layers` resnets, each with a transformer where `depths` is not empty; returns x and its skips."""

    style: BlockStyle
    channels: int
    num_layers: int
    depths: Depths
    heads: int
    downsample: bool

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for j in range(self.num_layers):
            x = self.style.resnet(self.channels, j)(x, temb)
            if self.depths:
                x = self.style.transformer(self.heads, self.depths[j], j)(x, context)
            skips.append(x)
        if self.downsample:
            x = self.style.downsampler(self.channels)(x)
            skips.append(x)
        return x, skips


class MidBlock2D(nn.Module):
    """resnet, transformer, resnet; with `depth` None (UNetMidBlock2D inside a UNet) exactly one resnet."""

    style: BlockStyle
    channels: int
    depth: int | None
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        x = self.style.resnet(self.channels, 0)(x, temb)
        if self.depth is None:
            return x
        x = self.style.transformer(self.heads, self.depth, 0)(x, context)
        return self.style.resnet(self.channels, 1)(x, temb)


class UpBlock2D(nn.Module):
    """One resnet (and transformer) per skip, last skip first, each fed concat[hidden, skip]; then up to `size`."""

    style: BlockStyle
    channels: int
    depths: Depths
    heads: int

    @nn.compact
    def __call__(self, x, skips: list[jax.Array], temb, context, size: tuple[int, int] | None) -> jax.Array:
        for j, skip in enumerate(reversed(skips)):
            x = self.style.resnet(self.channels, j)(x, temb, skip)
            if self.depths:
                x = self.style.transformer(self.heads, self.depths[j], j)(x, context)
        return x if size is None else self.style.upsampler(self.channels)(x, size)


Dtype = Any

ATTENTION_BLOCK = {
    "CrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UpBlock2D": False,
}
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


class UNet2DConditionModel(nn.Module):
    """eps, v or x0 prediction from noisy latents, timestep and text.

    Fields: see diffusers' UNet2DConditionModel. `attention_head_dim` is the number of heads (a historic misnomer that
    every published config shares).

    How it is run, with the same output: `dtype` is the compute dtype; `attention_fn` the attention kernel; `weights_fn`
    is applied to each layer's weights where the layer uses them, inside of what is rematerialised (it gathers shards
    there); `remat` names what the backward pass computes anew (models/remat.py).
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple = 1
    reverse_transformer_layers_per_block: tuple | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False  # kept for the file; logits and softmax are float32 here always
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None
    remat: str = "none"

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "act_fn": ("silu", "swish", None),
        "addition_embed_type_num_heads": (64, None),
        "attention_type": ("default", None),
        "center_input_sample": (False, None),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False, None),
        "conv_in_kernel": (3, None),
        "conv_out_kernel": (3, None),
        "cross_attention_norm": (None,),
        "downsample_padding": (1, None),
        "dropout": (0.0, None),
        "dual_cross_attention": (False, None),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1, None),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False, None),
        "resnet_out_scale_factor": (1.0, None),
        "resnet_skip_time_act": (False, None),
        "resnet_time_scale_shift": ("default", None),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional", None),
        "timestep_post_act": (None,),
        "_class_name": ("UNet2DConditionModel",),
        "_diffusers_version": (DIFFUSERS_VERSION,),
    }

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

    def per_level(self, field: str) -> tuple:
        """A scalar field repeated for every level, in the order of the down blocks."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * self.num_levels

    def down_depths(self, i: int) -> Depths:
        if not ATTENTION_BLOCK[self.down_block_types[i]]:
            return ()
        return _depths(self.per_level("transformer_layers_per_block")[i], self.per_level("layers_per_block")[i])

    def up_depths(self, i: int) -> Depths:
        """Up block i works at level n-1-i with one layer more; the reverse list, where given, is in up order."""
        if not ATTENTION_BLOCK[self.up_block_types[i]]:
            return ()
        depths = self.reverse_transformer_layers_per_block or self.per_level("transformer_layers_per_block")[::-1]
        return _depths(depths[i], self.per_level("layers_per_block")[::-1][i] + 1)

    def mid_depth(self) -> int:
        """Depth of the middle transformer: that of the last level (its first entry where it lists several)."""
        depth = self.per_level("transformer_layers_per_block")[-1]
        return depth[0] if isinstance(depth, tuple) else depth

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        timestep_cond: jax.Array | None = None,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """One evaluation.

        Args:
          sample: noisy latents [b h w in_channels]; any h, w (odd sizes included).
          timesteps: [b] or a scalar, int or float, in the teacher's training steps.
          encoder_hidden_states: text [b l cross_attention_dim].
          timestep_cond: an LCM's w embedding [b time_cond_proj_dim]; only for a model with `time_cond_proj_dim`.
          added_cond_kwargs: SDXL's {"text_embeds": [b p], "time_ids": [b 6]}.

        Returns:
          The prediction [b h w out_channels] in the compute dtype.
        """
        x = sample.astype(self.dtype)
        context = encoder_hidden_states.astype(self.dtype)
        temb = self._time(jnp.broadcast_to(timesteps, x.shape[:1]), timestep_cond, added_cond_kwargs)
        heads = self.per_level("attention_head_dim")
        layers = self.per_level("layers_per_block")
        widths = self.block_out_channels
        last = self.num_levels - 1
        style = BlockStyle(
            groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            use_linear_projection=self.use_linear_projection,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            weights_fn=self.weights_fn,
            remat=self.remat,
        )

        x = conv3x3(widths[0], "conv_in", self.dtype, self.weights_fn)(x)
        skips = [x]
        for i in range(self.num_levels):
            block = DownBlock2D(
                style, widths[i], layers[i], self.down_depths(i), heads[i], i < last, name=f"down_blocks_{i}"
            )
            x, block_skips = block(x, temb, context)
            skips += block_skips

        if self.mid_block_type is not None:
            depth = self.mid_depth() if self.mid_block_type == "UNetMidBlock2DCrossAttn" else None
            x = MidBlock2D(style, widths[-1], depth, heads[-1], name="mid_block")(x, temb, context)

        for i in range(self.num_levels):
            level = last - i
            count = layers[level] + 1
            block_skips, skips = skips[-count:], skips[:-count]
            # Every upsampler aims at the next skip's size: twice its own, or one less where a side was odd.
            size = skips[-1].shape[1:3] if i < last else None
            block = UpBlock2D(style, widths[level], self.up_depths(i), heads[level], name=f"up_blocks_{i}")
            x = block(x, block_skips, temb, context, size)

        return remat(UNet2DConditionModel._out, self.remat)(self, x)

    def _out(self, x: jax.Array) -> jax.Array:
        run = self.dtype, self.weights_fn
        x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, *run, name="conv_norm_out")(x))
        return conv3x3(self.out_channels, "conv_out", *run)(x)

    def _time(self, timesteps, timestep_cond, added_cond_kwargs) -> jax.Array:
        """The vector that every resnet adds: [b 4*C0]."""
        if timestep_cond is not None and self.time_cond_proj_dim is None:
            raise ValueError("timestep_cond given, but this UNet has no w embedding (time_cond_proj_dim is null)")
        embed = functools.partial(sinusoid, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        width = self.block_out_channels[0]
        run = self.dtype, self.weights_fn
        mlp = TimestepEmbedding(4 * width, self.time_cond_proj_dim, *run, name="time_embedding")
        cond = None if timestep_cond is None else timestep_cond.astype(self.dtype)
        temb = mlp(embed(timesteps, width).astype(self.dtype), cond)
        if self.addition_embed_type is None:
            return temb
        missing = {"text_embeds", "time_ids"} - set(added_cond_kwargs or {})
        if missing:
            raise ValueError(f"this UNet is conditioned on sizes and pooled text: added_cond_kwargs lacks {missing}")
        # The ids stay float32: bfloat16 would round 1023 to 1024.
        ids = added_cond_kwargs["time_ids"].astype(jnp.float32)
        sizes = embed(ids.reshape(-1), self.addition_time_embed_dim).reshape(ids.shape[0], -1)
        added = jnp.concatenate([added_cond_kwargs["text_embeds"].astype(self.dtype), sizes.astype(self.dtype)], -1)
        if added.shape[-1] != self.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {added_cond_kwargs['text_embeds'].shape} and time_ids {ids.shape} make "
                f"{added.shape[-1]} features; this UNet takes {self.projection_class_embeddings_input_dim}"
            )
        return temb + TimestepEmbedding(4 * width, None, *run, name="add_embedding")(added)


def _depths(entry: int | tuple[int, ...], count: int) -> Depths:
    return entry if isinstance(entry, tuple) else (entry,) * count


def from_config(
    config: Mapping[str, Any], dtype: Dtype = jnp.float32, attention_fn: AttentionFn = dot_product_attention
) -> UNet2DConditionModel:
    """The module that a UNet's `config.json` describes; missing keys have diffusers' defaults.

    Raises:
      UnsupportedConfig: a field has a value outside the Stable Diffusion family, named with the value.
    """
    kind = config.get("_class_name", "UNet2DConditionModel").removeprefix("Flax")
    if kind != "UNet2DConditionModel":
        raise UnsupportedConfig("_class_name", kind, supported=("UNet2DConditionModel",))
    fields = module_fields(
        UNet2DConditionModel, config, UNet2DConditionModel.FIXED, keep_null=frozenset({"mid_block_type"})
    )
    for key in ("down_block_types", "up_block_types"):
        if key in fields:
            fields[key] = tuple(kind.removeprefix("UNetRes") for kind in fields[key])
    unet = UNet2DConditionModel(**fields, dtype=dtype, attention_fn=attention_fn)
    _check(unet)
    return unet


def _check(unet: UNet2DConditionModel) -> None:
    for kind in unet.down_block_types + unet.up_block_types:
        if kind not in ATTENTION_BLOCK:
            raise UnsupportedConfig("block type", kind, supported=tuple(ATTENTION_BLOCK))
    if unet.mid_block_type not in MID_BLOCKS:
        raise UnsupportedConfig("mid_block_type", unet.mid_block_type, supported=MID_BLOCKS)
    if unet.addition_embed_type not in (None, "text_time"):
        raise UnsupportedConfig("addition_embed_type", unet.addition_embed_type, supported=(None, "text_time"))
    per_level = ("layers_per_block", "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block")
    counts = {"down_block_types": len(unet.down_block_types), "up_block_types": len(unet.up_block_types)}
    counts |= {key: len(unet.per_level(key)) for key in per_level}
    if unet.reverse_transformer_layers_per_block is not None:
        counts["reverse_transformer_layers_per_block"] = len(unet.reverse_transformer_layers_per_block)
    for key, count in counts.items():
        if count != unet.num_levels:
            value = getattr(unet, key)
            raise UnsupportedConfig(key, value, supported=f"{unet.num_levels} entries, as block_out_channels has")
    depths = unet.transformer_layers_per_block
    if isinstance(depths, tuple) and unet.reverse_transformer_layers_per_block is None:
        if any(isinstance(entry, tuple) for entry in depths):
            raise UnsupportedConfig(
                "transformer_layers_per_block",
                depths,
                supported="nested depths only together with reverse_transformer_layers_per_block",
            )
    for i in range(unet.num_levels):
        layers = unet.per_level("layers_per_block")
        for key, got, want in (
            ("transformer_layers_per_block", unet.down_depths(i), layers[i]),
            ("reverse_transformer_layers_per_block", unet.up_depths(i), layers[::-1][i] + 1),
        ):
            if got and len(got) != want:
                raise UnsupportedConfig(key, got, supported=f"{want} entries at block {i}")
    for i, width in enumerate(unet.block_out_channels):
        heads = unet.per_level("attention_head_dim")[i]
        if width % unet.norm_num_groups:
            raise UnsupportedConfig("block_out_channels", width, supported=f"multiples of {unet.norm_num_groups}")
        if width % heads:
            raise UnsupportedConfig("attention_head_dim", heads, supported=f"divisors of the level's width {width}")
