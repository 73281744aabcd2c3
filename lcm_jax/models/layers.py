"""The convolutional and normalising layers that UNet and VAE share; x: [b h w c] throughout.

Statistics of GroupNorm and LayerNorm are two-pass (mean, then mean of squared deviations) and float32 in every
compute dtype: the one-pass E[x^2] - E[x]^2 of Flax's default loses 1e-2 at a mean of 100.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Dtype = Any


def sinusoid(values: jax.Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> jax.Array:
    """DDPM's positional embedding of (possibly fractional) values: [b] -> [b dim], float32.

    f_k = exp(-ln(10000) k / (dim/2 - freq_shift)); [cos, sin] with `flip_sin_to_cos` (Stable Diffusion), else
    [sin, cos]. The frequencies come from the host in float32, so that every device sees the same table.
    """
    half = dim // 2
    exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32)
    angles = values.astype(jnp.float32)[:, None] * np.exp(exponent / np.float32(half - freq_shift))
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


class GroupNorm(nn.Module):
    """GroupNorm over [b ... c] with per-channel scale and bias."""

    num_groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x = x.astype(jnp.float32)
        spatial = tuple(range(1, x.ndim - 1))

        def group_mean(v: jax.Array) -> jax.Array:
            # Per channel first: a reduction with channels innermost vectorises; groups are of equal size.
            per_channel = v.mean(spatial)
            grouped = per_channel.reshape(-1, self.num_groups, c // self.num_groups)
            full = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(per_channel.shape)
            return full.reshape(full.shape[0], *(1 for _ in spatial), c)

        centred = x - group_mean(x)
        inv = jax.lax.rsqrt(group_mean(jnp.square(centred)) + self.epsilon)
        return (centred * (inv * scale.astype(jnp.float32)) + bias.astype(jnp.float32)).astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with scale and bias."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inv = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inv * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def conv3x3(features: int, name: str, dtype: Dtype, **kwargs) -> nn.Conv:
    """3x3 convolution, padding 1 on every side."""
    return nn.Conv(features, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, name=name, **kwargs)


class TimestepEmbedding(nn.Module):
    """linear_1 -> SiLU -> linear_2; `cond`, an LCM's w embedding, enters before linear_1 through `cond_proj`.

    cond_proj starts at zero (LCM paper, after ControlNet), so that a student begins exactly as its teacher.
    """

    dim: int
    cond_proj_dim: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        if self.cond_proj_dim is not None:
            zero = nn.initializers.zeros
            project = nn.Dense(x.shape[-1], use_bias=False, kernel_init=zero, dtype=self.dtype, name="cond_proj")
            x = x + project(jnp.zeros((x.shape[0], self.cond_proj_dim), x.dtype) if cond is None else cond)
        x = nn.silu(nn.Dense(self.dim, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.dim, dtype=self.dtype, name="linear_2")(x)


class ResnetBlock2D(nn.Module):
    """GN SiLU conv1 (+ time) GN SiLU conv2, plus the (1x1-projected where widths differ) input."""

    out_channels: int
    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        h = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x))
        h = conv3x3(self.out_channels, "conv1", self.dtype)(h)
        if temb is not None:
            h = h + nn.Dense(self.out_channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))[:, None, None]
        h = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")(h))
        h = conv3x3(self.out_channels, "conv2", self.dtype)(h)
        if x.shape[-1] != self.out_channels:
            x = nn.Conv(self.out_channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. The UNet pads 1 on every side, the VAE's encoder only right and below.

    Neither is XLA's "SAME" for every size: for an even side that pads (0, 1), for an odd one (1, 1).
    """

    channels: int
    asymmetric: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (0, 1) if self.asymmetric else (1, 1)
        conv = nn.Conv(self.channels, (3, 3), strides=(2, 2), padding=(pad, pad), dtype=self.dtype, name="conv")
        return conv(x)


def nearest_resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour resize with torch's source index floor(i * in / out): [b h w c] -> [b height width c].

    `jax.image.resize` samples pixel centres and picks other rows where the factor is not whole.
    """
    for axis, size in ((1, height), (2, width)):
        n = x.shape[axis]
        if size == 2 * n:
            x = jnp.repeat(x, 2, axis=axis)
        elif size != n:
            x = jnp.take(x, (np.arange(size) * n) // size, axis=axis)
    return x


class Upsample2D(nn.Module):
    """Nearest resize (to twice the size, or to `size` = (height, width)), then a 3x3 convolution."""

    channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        return conv3x3(self.channels, "conv", self.dtype)(nearest_resize(x, height, width))
