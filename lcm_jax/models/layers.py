"""The convolutional and normalising layers that UNet and VAE share; x: [b h w c] throughout.

Statistics of GroupNorm and LayerNorm are two-pass (mean, then mean of squared deviations) and float32 in every
compute dtype: the one-pass E[x^2] - E[x]^2 of Flax's default loses 1e-2 at a mean of 100.

Rematerialisation: which activations a network keeps for its backward pass, and which it computes anew.

"none"       everything is kept that the backward pass reads
"block"      of each resnet, transformer block, projection in or out and upsampler only the input
"attention"  as "block", and what the attention kernels return, so that they do not run twice
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

Dtype = Any
# What becomes of one layer's weights just before it uses them: a tree in, the tree to compute with out. A second
# argument `after` is an array that comes before: see `begin_with`.
WeightsFn = Callable[..., Any]


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


def weights_of(layer: nn.Module, **weights: jax.Array) -> tuple[jax.Array, ...]:
    """The weights that a layer of ours computes with, in the order given."""
    used = weights if layer.weights_fn is None else layer.weights_fn(weights)
    return tuple(used[name] for name in weights)


def begin_with(x: jax.Array, weights_fn: WeightsFn | None) -> WeightsFn | None:
    """`weights_fn` for the layers of a block whose input is x: it does nothing before x is there."""
    return weights_fn and functools.partial(weights_fn, after=x)


def _promotion(weights_fn: WeightsFn | None) -> Callable[..., list[Any]]:
    """`weights_fn` where Linen's own layers bring input, kernel and bias to one dtype."""
    if weights_fn is None:
        return promote_dtype

    def promote(x, kernel, bias, **kwargs):
        used = weights_fn({"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias})
        return promote_dtype(x, used["kernel"], used.get("bias"), **kwargs)

    return promote


def dense(features: int, name: str, dtype: Dtype, weights_fn: WeightsFn | None, **kwargs) -> nn.Dense:
    """Linear layer over the last axis."""
    return nn.Dense(features, dtype=dtype, promote_dtype=_promotion(weights_fn), name=name, **kwargs)


def embedding(count: int, features: int, name: str, weights_fn: WeightsFn | None) -> nn.Embed:
    """Table of `count` vectors."""

    def promote(table, **kwargs):
        return promote_dtype(table if weights_fn is None else weights_fn({"embedding": table})["embedding"], **kwargs)

    init = nn.initializers.normal(0.02)
    return nn.Embed(count, features, embedding_init=init, promote_dtype=promote, name=name)


def conv1x1(features: int, name: str | None, dtype: Dtype, weights_fn: WeightsFn | None) -> nn.Conv:
    """1x1 convolution; in a `setup`, which names it, `name` is None."""
    return nn.Conv(features, (1, 1), dtype=dtype, promote_dtype=_promotion(weights_fn), name=name)


def conv3x3(features: int, name: str, dtype: Dtype, weights_fn: WeightsFn | None, padding=(1, 1), **kwargs) -> nn.Conv:
    """3x3 convolution with the same `padding` both ways."""
    promote = _promotion(weights_fn)
    return nn.Conv(
        features, (3, 3), padding=(padding, padding), dtype=dtype, promote_dtype=promote, name=name, **kwargs
    )


class GroupNorm(nn.Module):
    """GroupNorm over [b ... c] with per-channel scale and bias."""

    num_groups: int
    epsilon: float
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        scale, bias = weights_of(self, scale=scale, bias=bias)
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
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        scale, bias = weights_of(self, scale=scale, bias=bias)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inv = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inv * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class TimestepEmbedding(nn.Module):
    """linear_1 -> SiLU -> linear_2; `cond`, an LCM's w embedding, enters before linear_1 through `cond_proj`.

    cond_proj starts at zero (LCM paper, after ControlNet), so that a student begins exactly as its teacher.
    """

    dim: int
    cond_proj_dim: int | None = None
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        if self.cond_proj_dim is not None:
            zero = {"use_bias": False, "kernel_init": nn.initializers.zeros}
            project = dense(x.shape[-1], "cond_proj", self.dtype, self.weights_fn, **zero)
            x = x + project(jnp.zeros((x.shape[0], self.cond_proj_dim), x.dtype) if cond is None else cond)
        x = nn.silu(dense(self.dim, "linear_1", self.dtype, self.weights_fn)(x))
        return dense(self.dim, "linear_2", self.dtype, self.weights_fn)(x)


class ResnetBlock2D(nn.Module):
    """GN SiLU conv1 (+ time) GN SiLU conv2, plus the (1x1-projected where widths differ) input.

    The input is x, or concat[x, skip]: made here, so that a rematerialised block keeps the two alone.
    """

    out_channels: int
    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None, skip: jax.Array | None = None) -> jax.Array:
        run = self.dtype, begin_with(x, self.weights_fn)
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        h = nn.silu(GroupNorm(self.groups, self.epsilon, *run, name="norm1")(x))
        h = conv3x3(self.out_channels, "conv1", *run)(h)
        if temb is not None:
            h = h + dense(self.out_channels, "time_emb_proj", *run)(nn.silu(temb))[:, None, None]
        h = nn.silu(GroupNorm(self.groups, self.epsilon, *run, name="norm2")(h))
        h = conv3x3(self.out_channels, "conv2", *run)(h)
        if x.shape[-1] != self.out_channels:
            x = conv1x1(self.out_channels, "conv_shortcut", *run)(x)
        return x + h


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. The UNet pads 1 on every side, the VAE's encoder only right and below.

    Neither is XLA's "SAME" for every size: for an even side that pads (0, 1), for an odd one (1, 1).
    """

    channels: int
    asymmetric: bool = False
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (0, 1) if self.asymmetric else (1, 1)
        weights_fn = begin_with(x, self.weights_fn)
        return conv3x3(self.channels, "conv", self.dtype, weights_fn, padding=pad, strides=(2, 2))(x)


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
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        weights_fn = begin_with(x, self.weights_fn)
        return conv3x3(self.channels, "conv", self.dtype, weights_fn)(nearest_resize(x, height, width))


CHOICES = ("none", "block", "attention")

# The tag that attention functions put on what "attention" keeps.
ATTENTION_OUTPUT = "attention_output"


def remat(target: Any, choice: str, static_argnums: tuple[int, ...] = ()) -> Any:
    """`target`, a module class or a function of a module and arrays, to be computed anew in the backward pass.

    static_argnums: positions of Python values among the arguments, the module's own being 0.
    """
    if choice not in CHOICES:
        raise ValueError(f"rematerialisation {choice!r}; known: {CHOICES}")
    if choice == "none":
        return target
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT) if choice == "attention" else None
    return nn.remat(target, policy=keep, static_argnums=static_argnums)


def tag_attention(output: jax.Array) -> jax.Array:
    """`output` of an attention function, marked as what "attention" keeps."""
    return checkpoint_name(output, ATTENTION_OUTPUT)
