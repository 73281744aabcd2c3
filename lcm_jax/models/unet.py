"""UNet2DConditionModel of the Stable Diffusion family: SD 1.x, 2.x, XL and refiner, SSD-1B, Vega, small-sd, tiny-sd.

    temb  = time_embedding(sinusoid(t) [+ cond_proj(w embedding)]) [+ add_embedding(pooled text, sizes)]
    skips = conv_in, then every (resnet[, transformer]) and downsampler of the down blocks
    out   = conv_out(SiLU(GN(up blocks, each resnet fed concat[hidden, last skip])))

In every block x is [b h w c], temb [b 4*C0] and context [b l e]. Submodules have torch's names.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.attention import AttentionFn, dot_product_attention
from lcm_jax.models.config import DIFFUSERS_VERSION, Channels, Depth, Epsilon, Levels, class_name, module_fields
from lcm_jax.models.layers import (
    Downsample2D,
    GroupNorm,
    LayerNorm,
    ResnetBlock2D,
    Run,
    TimestepEmbedding,
    Upsample2D,
    WeightsFn,
    conv1x1,
    conv3x3,
    dense,
    multi_head_attention,
    remat,
    sinusoid,
)
from lcm_jax.typed import Range

Embedding = Annotated[int, Range(4, 2**14)]  # of a number, by sines and cosines of at least two frequencies each
Depths = tuple[int, ...]  # transformer blocks after each resnet of a level; empty: no attention


class Attention(nn.Module):
    """Attention of x [b s c] over context [b l e]; over x itself if there is no context.

    attention_fn: instead of `run`'s.
    """

    heads: int
    run: Run = Run()

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, attention_fn: AttentionFn | None = None
    ) -> jax.Array:
        context = x if context is None else context
        run = self.run if attention_fn is None else dataclasses.replace(self.run, attention_fn=attention_fn)
        return multi_head_attention(x, context, heads=self.heads, qkv_bias=False, run=run)


class GEGLU(nn.Module):
    """value * gelu(gate) of one projection to twice the width; exact (erf) GELU."""

    dim: int
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(dense(2 * self.dim, "proj", self.run)(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        return dense(c, "net_2", self.run)(GEGLU(4 * c, self.run, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and GEGLU feed-forward, each with a residual."""

    heads: int
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        run = self.run.after(x)
        x = x + Attention(self.heads, run, name="attn1")(LayerNorm(run=run, name="norm1")(x))
        x = x + Attention(self.heads, run, name="attn2")(LayerNorm(run=run, name="norm2")(x), context)
        return x + FeedForward(run, name="ff")(LayerNorm(run=run, name="norm3")(x))


class Transformer2DModel(nn.Module):
    """GN, projection in, `depth` transformer blocks over the h*w tokens, projection out, residual.

    SD 1.x projects by 1x1 convolutions, SD 2.x and SDXL by linear layers: the same map, kernels of different rank.
    """

    heads: int
    depth: int
    groups: int
    use_linear_projection: bool
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        y = remat(Transformer2DModel._enter, self.run.remat)(self, x)
        block = remat(BasicTransformerBlock, self.run.remat)
        for k in range(self.depth):
            y = block(self.heads, self.run, name=f"transformer_blocks_{k}")(y, context)
        return remat(Transformer2DModel._leave, self.run.remat)(self, x, y)

    def _enter(self, x: jax.Array) -> jax.Array:
        """Normalised and projected tokens [b h*w c]."""
        y = GroupNorm(self.groups, 1e-6, self.run, name="norm")(x)  # 1e-6 whatever the UNet's norm_eps
        return self._project(y, "proj_in").reshape(x.shape[0], -1, x.shape[-1])

    def _leave(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + self._project(y.reshape(x.shape), "proj_out")

    def _project(self, y: jax.Array, name: str) -> jax.Array:
        layer = dense if self.use_linear_projection else conv1x1
        return layer(y.shape[-1], name, self.run.after(y))(y)


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """What every block of one UNet shares, and how it creates its layers."""

    groups: int
    epsilon: float
    use_linear_projection: bool
    run: Run

    def resnet(self, channels: int, j: int) -> ResnetBlock2D:
        block = remat(ResnetBlock2D, self.run.remat)
        return block(channels, self.groups, self.epsilon, self.run, name=f"resnets_{j}")

    def transformer(self, heads: int, depth: int, j: int) -> Transformer2DModel:
        return Transformer2DModel(
            heads, depth, self.groups, self.use_linear_projection, self.run, name=f"attentions_{j}"
        )

    def upsampler(self, channels: int) -> Upsample2D:
        block = remat(Upsample2D, self.run.remat, static_argnums=(2,))  # its size
        return block(channels, self.run, name="upsamplers_0")


class DownBlock2D(nn.Module):
    """`num_layers` resnets, each with a transformer unless `depths` is empty; returns x and its skips."""

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
            x = Downsample2D(self.channels, run=self.style.run, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock2D(nn.Module):
    """resnet, transformer, resnet; with `depth` None (UNetMidBlock2D inside a UNet) one resnet alone."""

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
    """One resnet[, transformer] per skip, last skip first, fed concat[hidden, skip]; then upsampling to `size`."""

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


ATTENTION_BLOCK = {
    "CrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UpBlock2D": False,
}
_MOST_BLOCKS = 300  # resnets and transformer blocks of one UNet; SDXL has 75
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


class Encoder(nn.Module):
    """The half of a UNet that its ControlNets copy: time embedding, way down and middle.

    Fields: those of diffusers' constructors, with their defaults; the last four: see `layers.Run`.
    `attention_head_dim` is the number of heads (a historic misnomer that every published config shares).
    """

    in_channels: Channels = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Range(0, 1)] = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: Levels = (320, 640, 1280, 1280)
    layers_per_block: Depth | tuple[Depth, ...] = 2
    norm_num_groups: Channels = 32
    norm_eps: Epsilon = 1e-5
    cross_attention_dim: Channels | tuple[Channels, ...] = 1280
    transformer_layers_per_block: Depth | tuple[Depth | tuple[Depth, ...], ...] = 1
    attention_head_dim: Channels | tuple[Channels, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False  # kept for the file: logits and softmax are always float32 here
    addition_embed_type: str | None = None
    addition_time_embed_dim: Embedding | None = None
    projection_class_embeddings_input_dim: Channels | None = None
    dtype: DTypeLike = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None
    remat: str = "none"

    time_cond_proj_dim: ClassVar[int | None] = None  # a field of UNets alone: no ControlNet has a w embedding

    @property
    def run(self) -> Run:
        return Run(self.dtype, self.attention_fn, self.weights_fn, self.remat)

    @property
    def style(self) -> BlockStyle:
        return BlockStyle(
            groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            use_linear_projection=self.use_linear_projection,
            run=self.run,
        )

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """Channels of the skips in order: of conv_in, then of each level's layers and its downsampler."""
        last, widths = self.num_levels - 1, [self.block_out_channels[0]]
        for i, count in enumerate(self.per_level("layers_per_block")):
            widths += [self.block_out_channels[i]] * (count + (i < last))
        return tuple(widths)

    def per_level(self, field: str) -> tuple:
        """A scalar field repeated for every level, in the order of the down blocks."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * self.num_levels

    def down_depths(self, i: int) -> Depths:
        if not ATTENTION_BLOCK[self.down_block_types[i]]:
            return ()
        return _depths(self.per_level("transformer_layers_per_block")[i], self.per_level("layers_per_block")[i])

    def mid_depth(self) -> int:
        """Depth of the middle transformer: that of the last level (its first entry if it lists several)."""
        depth = self.per_level("transformer_layers_per_block")[-1]
        return depth[0] if isinstance(depth, tuple) else depth

    def _down(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The way down from what comes after conv_in: its end, and all skips, x first."""
        skips, last = [x], self.num_levels - 1
        layers, heads = self.per_level("layers_per_block"), self.per_level("attention_head_dim")
        for i, width in enumerate(self.block_out_channels):
            block = DownBlock2D(
                self.style, width, layers[i], self.down_depths(i), heads[i], i < last, name=f"down_blocks_{i}"
            )
            x, block_skips = block(x, temb, context)
            skips += block_skips
        return x, skips

    def _middle(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        if self.mid_block_type is None:
            return x
        depth = self.mid_depth() if self.mid_block_type == "UNetMidBlock2DCrossAttn" else None
        heads = self.per_level("attention_head_dim")[-1]
        return MidBlock2D(self.style, self.block_out_channels[-1], depth, heads, name="mid_block")(x, temb, context)

    def _time(self, timesteps, timestep_cond, added_cond_kwargs) -> jax.Array:
        """temb [b 4*C0], which every resnet adds."""
        if timestep_cond is not None and self.time_cond_proj_dim is None:
            raise ValueError("this UNet has no w embedding (time_cond_proj_dim is null); leave timestep_cond out")
        embed = functools.partial(sinusoid, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        width = self.block_out_channels[0]
        mlp = TimestepEmbedding(4 * width, self.time_cond_proj_dim, self.run, name="time_embedding")
        cond = None if timestep_cond is None else timestep_cond.astype(self.dtype)
        temb = mlp(embed(timesteps, width).astype(self.dtype), cond)
        if self.addition_embed_type is None:
            return temb
        missing = {"text_embeds", "time_ids"} - set(added_cond_kwargs or {})
        if missing:
            raise ValueError(f"this UNet is conditioned on sizes and pooled text; add {missing} to added_cond_kwargs")
        # The ids stay float32, as bfloat16 would round 1023 to 1024.
        ids = added_cond_kwargs["time_ids"].astype(jnp.float32)
        sizes = embed(ids.reshape(-1), self.addition_time_embed_dim).reshape(ids.shape[0], -1)
        added = jnp.concatenate([added_cond_kwargs["text_embeds"].astype(self.dtype), sizes.astype(self.dtype)], -1)
        if added.shape[-1] != self.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {added_cond_kwargs['text_embeds'].shape} and time_ids {ids.shape} make "
                f"{added.shape[-1]} features; this UNet takes {self.projection_class_embeddings_input_dim}"
            )
        return temb + TimestepEmbedding(4 * width, None, self.run, name="add_embedding")(added)


class UNet2DConditionModel(Encoder):
    """eps, v or x0 prediction from noisy latents, timestep and text. Fields: see `Encoder`."""

    sample_size: Channels | tuple[Channels, Channels] | None = None
    out_channels: Channels = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    reverse_transformer_layers_per_block: tuple[Depth | tuple[Depth, ...], ...] | None = None
    time_cond_proj_dim: Embedding | None = None

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

    def up_depths(self, i: int) -> Depths:
        """Up block i works at level n-1-i with one more layer; the reverse list, if given, is in the order of these."""
        if not ATTENTION_BLOCK[self.up_block_types[i]]:
            return ()
        depths = self.reverse_transformer_layers_per_block or self.per_level("transformer_layers_per_block")[::-1]
        return _depths(depths[i], self.per_level("layers_per_block")[::-1][i] + 1)

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        timestep_cond: jax.Array | None = None,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        residuals: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """One evaluation.

        Args:
          sample: noisy latents [b h w in_channels]; any h and w, odd ones included.
          timesteps: [b] or scalar, int or float, in the teacher's training timesteps.
          encoder_hidden_states: text [b l cross_attention_dim].
          timestep_cond: an LCM's w embedding [b time_cond_proj_dim]; None is an embedding of zeros.
          added_cond_kwargs: SDXL's {"text_embeds": [b p], "time_ids": [b 6]}.
          residuals: of ControlNets, scaled: one for each skip, [b h w c] of its level or [b 1 1 c], and the middle's.

        Returns:
          The prediction [b h w out_channels] in the compute dtype.

        Raises:
          ValueError: a w embedding for a UNet without one; size conditioning that is missing or has the wrong width.
        """
        x = sample.astype(self.dtype)
        context = encoder_hidden_states.astype(self.dtype)
        temb = self._time(jnp.broadcast_to(timesteps, x.shape[:1]), timestep_cond, added_cond_kwargs)
        x, skips = self._down(conv3x3(self.block_out_channels[0], "conv_in", self.run)(x), temb, context)
        x = self._middle(x, temb, context)
        if residuals is not None:
            skips = [skip + one.astype(x.dtype) for skip, one in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1].astype(x.dtype)

        heads, layers = self.per_level("attention_head_dim"), self.per_level("layers_per_block")
        last = self.num_levels - 1
        for i in range(self.num_levels):
            level = last - i
            count = layers[level] + 1
            block_skips, skips = skips[-count:], skips[:-count]
            # Every upsampler aims at the next skip's size: twice its own, or one less if a side was odd.
            size = skips[-1].shape[1:3] if i < last else None
            width, depths = self.block_out_channels[level], self.up_depths(i)
            block = UpBlock2D(self.style, width, depths, heads[level], name=f"up_blocks_{i}")
            x = block(x, block_skips, temb, context, size)

        return remat(UNet2DConditionModel._out, self.remat)(self, x)

    def _out(self, x: jax.Array) -> jax.Array:
        x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, self.run, name="conv_norm_out")(x))
        return conv3x3(self.out_channels, "conv_out", self.run)(x)


def _depths(entry: int | tuple[int, ...], count: int) -> Depths:
    return entry if isinstance(entry, tuple) else (entry,) * count


def from_config(config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> UNet2DConditionModel:
    """The module that a UNet's `config.json` describes; missing keys have diffusers' defaults.

    Raises:
      UnsupportedConfig: a field has a value outside the Stable Diffusion family; it names the field and the value.
    """
    kind = class_name(config, "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise UnsupportedConfig("_class_name", kind, supported=("UNet2DConditionModel",))
    fields = module_fields(
        UNet2DConditionModel, config, UNet2DConditionModel.FIXED, keep_null=frozenset({"mid_block_type"})
    )
    for key in ("down_block_types", "up_block_types"):
        if key in fields:
            fields[key] = tuple(kind.removeprefix("UNetRes") for kind in fields[key])
    unet = UNet2DConditionModel(**fields, dtype=dtype)
    _check(unet)
    return unet


def _check(unet: UNet2DConditionModel) -> None:
    check_encoder(unet)
    _check_types("up_block_types", unet)
    counts = {"up_block_types": len(unet.up_block_types)}
    if unet.reverse_transformer_layers_per_block is not None:
        counts["reverse_transformer_layers_per_block"] = len(unet.reverse_transformer_layers_per_block)
    _check_counts(unet, counts)
    depths = unet.transformer_layers_per_block
    if isinstance(depths, tuple) and unet.reverse_transformer_layers_per_block is None:
        if any(isinstance(entry, tuple) for entry in depths):
            raise UnsupportedConfig(
                "transformer_layers_per_block",
                depths,
                supported="nested depths only with reverse_transformer_layers_per_block",
            )
    layers = unet.per_level("layers_per_block")
    for i in range(unet.num_levels):
        _check_depths("reverse_transformer_layers_per_block", unet.up_depths(i), layers[::-1][i] + 1, i)
    _check_blocks(unet, sum(count + 1 + sum(unet.up_depths(i)) for i, count in enumerate(layers)))


def check_encoder(module: Encoder) -> None:
    """Raises UnsupportedConfig, which names the field and its value, for an encoder that cannot exist."""
    _check_types("down_block_types", module)
    if module.mid_block_type not in MID_BLOCKS:
        raise UnsupportedConfig("mid_block_type", module.mid_block_type, supported=MID_BLOCKS)
    if module.addition_embed_type not in (None, "text_time"):
        raise UnsupportedConfig("addition_embed_type", module.addition_embed_type, supported=(None, "text_time"))
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if module.addition_embed_type is not None and getattr(module, key) is None:
            raise UnsupportedConfig(key, None, supported="a whole number, with addition_embed_type")
    per_level = ("layers_per_block", "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block")
    counts = {"down_block_types": len(module.down_block_types)}
    _check_counts(module, counts | {key: len(module.per_level(key)) for key in per_level})
    if len(set(module.per_level("cross_attention_dim"))) > 1:
        raise UnsupportedConfig("cross_attention_dim", module.cross_attention_dim, supported="one width for all levels")
    half = module.block_out_channels[0] // 2
    if half <= module.freq_shift:  # the sinusoids divide by the difference
        raise UnsupportedConfig(
            "freq_shift", module.freq_shift, supported=f"less than {half}, half of block_out_channels[0]"
        )
    for i, count in enumerate(module.per_level("layers_per_block")):
        _check_depths("transformer_layers_per_block", module.down_depths(i), count, i)
    _check_blocks(module)
    for i, width in enumerate(module.block_out_channels):
        heads = module.per_level("attention_head_dim")[i]
        if width % module.norm_num_groups:
            raise UnsupportedConfig(
                "block_out_channels", width, supported=f"multiples of norm_num_groups={module.norm_num_groups}"
            )
        if width % heads:
            raise UnsupportedConfig("attention_head_dim", heads, supported=f"divisors of the level's width {width}")


def _check_types(key: str, module: Encoder) -> None:
    for kind in getattr(module, key):
        if kind not in ATTENTION_BLOCK:
            raise UnsupportedConfig(key, kind, supported=tuple(ATTENTION_BLOCK))


def _check_counts(module: Encoder, counts: Mapping[str, int]) -> None:
    for key, count in counts.items():
        if count != module.num_levels:
            value = getattr(module, key)
            raise UnsupportedConfig(key, value, supported=f"{module.num_levels} entries, like block_out_channels")


def _check_depths(key: str, depths: Depths, count: int, i: int) -> None:
    if depths and len(depths) != count:
        raise UnsupportedConfig(key, depths, supported=f"{count} entries at block {i}")


def _check_blocks(module: Encoder, more: int = 0) -> None:
    """more: resnets and transformer blocks of the way up."""
    layers = module.per_level("layers_per_block")
    blocks = sum(count + sum(module.down_depths(i)) for i, count in enumerate(layers)) + more
    if blocks > _MOST_BLOCKS:
        raise UnsupportedConfig(
            "layers_per_block",
            module.layers_per_block,
            supported=f"at most {_MOST_BLOCKS} resnets and transformer blocks in all; with "
            f"transformer_layers_per_block={module.transformer_layers_per_block} these are {blocks}",
        )
