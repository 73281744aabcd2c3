"""Attention and the transformer that UNet levels carry.

`AttentionFn` is the one seam for kernels: (q [b s n d], k [b l n d], v [b l n d], causal=False) -> [b s n d].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.models.layers import GroupNorm, LayerNorm

AttentionFn = Callable[..., jax.Array]
Dtype = Any


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with logits and softmax in float32 (SD 2.1 overflows float16 otherwise)."""
    logits = jnp.einsum("bsnd,blnd->bnsl", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        keep = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(keep, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnsl,blnd->bsnd", weights, v)


def multi_head_attention(
    x: jax.Array,
    context: jax.Array,
    *,
    heads: int,
    qkv_bias: bool,
    dtype: Dtype,
    attention_fn: AttentionFn,
    causal: bool = False,
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0"),
) -> jax.Array:
    """Project x [b s c] and context [b l e], attend, project back: [b s c]. Heads are split head-major.

    To be called inside a module's compact method: the four projections become that module's children.
    """
    c = x.shape[-1]

    def project(name: str, source: jax.Array) -> jax.Array:
        y = nn.Dense(c, use_bias=qkv_bias, dtype=dtype, name=name)(source)
        return y.reshape(*y.shape[:2], heads, c // heads)

    q, k, v = project(names[0], x), project(names[1], context), project(names[2], context)
    out = attention_fn(q, k, v, causal=causal)
    return nn.Dense(c, dtype=dtype, name=names[3])(out.reshape(x.shape))


class Attention(nn.Module):
    """Attention of the UNet's transformers: x [b s c] over context [b l e], itself where None."""

    heads: int
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        return multi_head_attention(
            x,
            x if context is None else context,
            heads=self.heads,
            qkv_bias=False,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
        )


class GEGLU(nn.Module):
    """value * gelu(gate) of one projection to twice the width; exact (erf) GELU."""

    dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(nn.Dense(2 * self.dim, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        return nn.Dense(c, dtype=self.dtype, name="net_2")(GEGLU(4 * c, self.dtype, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and GEGLU feed-forward, each with a residual."""

    heads: int
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        def attention(name: str) -> Attention:
            return Attention(self.heads, self.dtype, self.attention_fn, name=name)

        x = x + attention("attn1")(LayerNorm(dtype=self.dtype, name="norm1")(x))
        x = x + attention("attn2")(LayerNorm(dtype=self.dtype, name="norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(LayerNorm(dtype=self.dtype, name="norm3")(x))


class Transformer2DModel(nn.Module):
    """GN, projection in, `depth` transformer blocks over the h*w tokens, projection out, residual.

    The GroupNorm's epsilon is 1e-6 whatever the UNet's `norm_eps`. SD 1.x projects by 1x1 convolutions, SD 2.x and
    SDXL by linear layers: the same map, kernels of different rank.
    """

    heads: int
    depth: int
    groups: int
    use_linear_projection: bool
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        b, h, w, c = x.shape

        def project(y: jax.Array, name: str) -> jax.Array:
            if self.use_linear_projection:
                return nn.Dense(c, dtype=self.dtype, name=name)(y)
            return nn.Conv(c, (1, 1), dtype=self.dtype, name=name)(y.reshape(b, h, w, c)).reshape(b, h * w, c)

        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        y = project(y.reshape(b, h * w, c), "proj_in")
        for k in range(self.depth):
            block = BasicTransformerBlock(self.heads, self.dtype, self.attention_fn, name=f"transformer_blocks_{k}")
            y = block(y, context)
        return x + project(y, "proj_out").reshape(b, h, w, c)
