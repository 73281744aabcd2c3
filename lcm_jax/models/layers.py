"""The layers that the networks share, and `Run`, which says how they are computed; x: [b h w c] unless stated.

GroupNorm and LayerNorm compute their statistics in two passes (the mean, then the mean squared deviation) and in
float32 whatever the compute dtype: Flax's default, E[x^2] - E[x]^2 in one pass, is off by 1e-2 at a mean of 100.

GroupNorm of a bfloat16 input takes the one pass all the same: it reads x once for both moments, writes nothing of its
size in float32, and so moves a third of the bytes on a GPU. What it is off by is less than what rounding x to bfloat16
has changed (root mean squares of the normalised output, x of deviation 1, 4096 places, 10 channels a group):

    mean of x                    0        10       100     1000
    off by one pass              6e-8     4e-6     3e-4    0.07
    off by rounding the input    2e-3     0.02     0.14    1
    off by rounding the output   2e-3     2e-3     2e-3    2e-3

LayerNorm does not: XLA's one kernel for it reads a row once anyway.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from lcm_jax.models.attention import ATTENTION_OUTPUT, AttentionFn, dot_product_attention

# (tree of one layer's weights, after=None) -> the tree that the layer computes with. `after`: see `Run.after`.
WeightsFn = Callable[..., Any]

REMAT_CHOICES = ("none", "block", "attention")


@dataclasses.dataclass(frozen=True)
class Run:
    """How a network is computed. Nothing here changes the result, apart from rounding.

    Attributes:
      dtype: compute dtype.
      attention_fn: the attention kernel.
      weights_fn: applied to the weights of each layer where the layer uses them, inside what is rematerialised, so
        that sharded weights are gathered there.
      remat: which activations are kept for the backward pass, one of REMAT_CHOICES. "none": all that it reads.
        "block": only the input of each resnet, transformer block, projection into or out of a transformer, and
        upsampler. "attention": as "block", and the outputs of the attention kernels, which then run only once.
    """

    dtype: DTypeLike = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None
    remat: str = "none"

    def after(self, x: jax.Array) -> "Run":
        """The same for the layers of a block whose input is x: `weights_fn` does nothing before x is computed."""
        if self.weights_fn is None:
            return self
        return dataclasses.replace(self, weights_fn=functools.partial(self.weights_fn, after=x))

    def weights(self, **weights: jax.Array) -> tuple[jax.Array, ...]:
        """A layer's weights as it computes with them, in the order given."""
        used = weights if self.weights_fn is None else self.weights_fn(weights)
        return tuple(used[name] for name in weights)

    def promote(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **kwargs) -> list[Any]:
        """The `promote_dtype` of Linen's own layers, which brings the three to one dtype."""
        if self.weights_fn is not None:
            used = self.weights_fn({"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias})
            kernel, bias = used["kernel"], used.get("bias")
        return promote_dtype(x, kernel, bias, **kwargs)


def dtypes_in_use(params: Any, dtype: DTypeLike) -> Any:
    """The dtype in which a network that computes in `dtype` uses each of its weights: a tree like `params`.

    That is float32 for norms and embeddings whatever `dtype` is. A network whose weights are held so computes the same,
    bit for bit, as with float32 weights, which each layer casts where it uses them.
    """
    flat = traverse_util.flatten_dict(params)
    exact = {path for path in flat if path[-1] == "embedding" or (*path[:-1], "scale") in flat}
    return traverse_util.unflatten_dict({path: jnp.dtype("float32" if path in exact else dtype) for path in flat})


def remat(target: Any, choice: str, static_argnums: tuple[int, ...] = ()) -> Any:
    """`target`, a module class or a function of a module and arrays, recomputed in the backward pass.

    Args:
      target: what to rematerialise.
      choice: see `Run`; with "none" the target is returned unchanged.
      static_argnums: positions of Python values among the arguments; the module's own is 0.
    """
    if choice not in REMAT_CHOICES:
        raise ValueError(f"rematerialisation {choice!r} is unknown; choose one of {', '.join(REMAT_CHOICES)}")
    if choice == "none":
        return target
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT) if choice == "attention" else None
    return nn.remat(target, policy=keep, static_argnums=static_argnums)


def sinusoid(values: jax.Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> jax.Array:
    """DDPM's positional embedding of (possibly fractional) values: [b] -> [b dim], float32.

    f_k = exp(-ln(10000) k / (dim/2 - freq_shift)); [cos, sin] with `flip_sin_to_cos` (Stable Diffusion), else
    [sin, cos].
    """
    half = dim // 2
    # The frequencies are computed on the host in float32, so that every device has the same table.
    exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32)
    angles = values.astype(jnp.float32)[:, None] * np.exp(exponent / np.float32(half - freq_shift))
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


def dense(features: int, name: str, run: Run, **kwargs) -> nn.Dense:
    """Linear layer over the last axis."""
    return nn.Dense(features, dtype=run.dtype, promote_dtype=run.promote, name=name, **kwargs)


def embedding(count: int, features: int, name: str, run: Run) -> nn.Embed:
    """Table of `count` vectors."""

    def promote(table, **kwargs):
        return promote_dtype(*run.weights(embedding=table), **kwargs)

    init = nn.initializers.normal(0.02)
    return nn.Embed(count, features, embedding_init=init, promote_dtype=promote, name=name)


def conv1x1(features: int, name: str | None, run: Run, **kwargs) -> nn.Conv:
    """1x1 convolution; `name` is None in a `setup`, which names it itself."""
    return nn.Conv(features, (1, 1), dtype=run.dtype, promote_dtype=run.promote, name=name, **kwargs)


def conv3x3(features: int, name: str, run: Run, padding: tuple[int, int] = (1, 1), **kwargs) -> nn.Conv:
    """3x3 convolution; `padding` (before, after) is the same for rows and columns."""
    padding = (padding, padding)
    return nn.Conv(features, (3, 3), padding=padding, dtype=run.dtype, promote_dtype=run.promote, name=name, **kwargs)


class GroupNorm(nn.Module):
    """GroupNorm of [b ... c] with a scale and a bias for each channel; in how many passes: see the module."""

    num_groups: int
    epsilon: float
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | None = None) -> jax.Array:
        """The norm of x + added; added: [b c], the same at every place."""
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        scale, bias = (weights.astype(jnp.float32) for weights in self.run.weights(scale=scale, bias=bias))
        spatial = tuple(range(1, x.ndim - 1))
        added = None if added is None else jnp.expand_dims(added, spatial)

        def mean(v: jax.Array) -> jax.Array:
            return v.mean(spatial, keepdims=True)

        def group(per_channel: jax.Array) -> jax.Array:
            # By channel first: a reduction with channels innermost vectorises, and all groups have the same size.
            grouped = per_channel.reshape(-1, self.num_groups, c // self.num_groups)
            return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(per_channel.shape)

        if x.dtype == jnp.bfloat16:
            x = x.astype(jnp.float32)
            first, second, offset = mean(x), mean(jnp.square(x)), 0.0
            if added is not None:  # E[(x + a)^2] = E[x^2] + a (2 E[x] + a): x + a need not be written
                offset = added.astype(jnp.float32)
                first, second = first + offset, second + offset * (2 * first + offset)
            centre = group(first)
            variance = jnp.maximum(group(second) - jnp.square(centre), 0.0)  # rounding may make it negative
            slope = jax.lax.rsqrt(variance + self.epsilon) * scale
            return (x * slope + (bias + (offset - centre) * slope)).astype(self.run.dtype)
        x = (x if added is None else x + added).astype(jnp.float32)
        centred = x - group(mean(x))
        inv = jax.lax.rsqrt(group(mean(jnp.square(centred))) + self.epsilon)
        return (centred * (inv * scale) + bias).astype(self.run.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with scale and bias."""

    epsilon: float = 1e-5
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        scale, bias = self.run.weights(scale=scale, bias=bias)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inv = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inv * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.run.dtype)


def multi_head_attention(
    x: jax.Array,
    context: jax.Array,
    *,
    heads: int,
    qkv_bias: bool,
    run: Run,
    causal: bool = False,
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0"),
) -> jax.Array:
    """Project x [b s c] and context [b l e], attend, project back: [b s c]. Heads are split head-major.

    Call it inside a module's compact method: the four projections, `names`, become children of that module.
    """
    c = x.shape[-1]

    def project(name: str, source: jax.Array) -> jax.Array:
        y = dense(c, name, run, use_bias=qkv_bias)(source)
        return y.reshape(*y.shape[:2], heads, c // heads)

    q, k, v = project(names[0], x), project(names[1], context), project(names[2], context)
    out = run.attention_fn(q, k, v, causal=causal)
    return dense(c, names[3], run)(out.reshape(x.shape))


class TimestepEmbedding(nn.Module):
    """linear_1 -> SiLU -> linear_2; an LCM's w embedding `cond` is added before linear_1 through `cond_proj`."""

    dim: int
    cond_proj_dim: int | None = None
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        if self.cond_proj_dim is not None:
            # It starts at zero (LCM paper, after ControlNet), so that a student begins exactly as its teacher.
            project = dense(x.shape[-1], "cond_proj", self.run, use_bias=False, kernel_init=nn.initializers.zeros)
            x = x + project(jnp.zeros((x.shape[0], self.cond_proj_dim), x.dtype) if cond is None else cond)
        x = nn.silu(dense(self.dim, "linear_1", self.run)(x))
        return dense(self.dim, "linear_2", self.run)(x)


class ResnetBlock2D(nn.Module):
    """GN SiLU conv1 (+ time) GN SiLU conv2, plus the input, projected by a 1x1 convolution if the widths differ."""

    out_channels: int
    groups: int
    epsilon: float
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None, skip: jax.Array | None = None) -> jax.Array:
        run = self.run.after(x)
        if skip is not None:  # concatenated here, so that a rematerialised block keeps only the two parts
            x = jnp.concatenate([x, skip], axis=-1)
        h = nn.silu(GroupNorm(self.groups, self.epsilon, run, name="norm1")(x))
        h = conv3x3(self.out_channels, "conv1", run)(h)
        time = None if temb is None else dense(self.out_channels, "time_emb_proj", run)(nn.silu(temb))
        h = nn.silu(GroupNorm(self.groups, self.epsilon, run, name="norm2")(h, time))
        h = conv3x3(self.out_channels, "conv2", run)(h)
        if x.shape[-1] != self.out_channels:
            x = conv1x1(self.out_channels, "conv_shortcut", run)(x)
        return x + h


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. The UNet pads 1 on every side, the VAE's encoder only right and below.

    Neither is XLA's "SAME" for every size: that pads (0, 1) if a side is even and (1, 1) if it is odd.
    """

    channels: int
    asymmetric: bool = False
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (0, 1) if self.asymmetric else (1, 1)
        return conv3x3(self.channels, "conv", self.run.after(x), padding=pad, strides=(2, 2))(x)


def nearest_resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour resize with torch's source index floor(i * in / out): [b h w c] -> [b height width c].

    `jax.image.resize` samples at pixel centres and chooses other rows if the factor is not an integer.
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
    run: Run = Run()

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        return conv3x3(self.channels, "conv", self.run.after(x))(nearest_resize(x, height, width))
