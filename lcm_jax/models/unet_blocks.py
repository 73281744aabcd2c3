"""The blocks of a UNet's way down, middle and way up; x: [b h w c], temb: [b 4*C0], context: [b l e]."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from lcm_jax.models.attention import AttentionFn, Transformer2DModel
from lcm_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D, WeightsFn
from lcm_jax.models.remat import remat

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
