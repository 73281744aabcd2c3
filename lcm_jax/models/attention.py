"""Attention and the transformer that UNet levels carry.

`AttentionFn` is the one seam for kernels: (q [b s n d], k [b l n d], v [b l n d], causal=False) -> [b s n d].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.models.layers import GroupNorm, LayerNorm, WeightsFn, begin_with, conv1x1, dense, remat, tag_attention

AttentionFn = Callable[..., jax.Array]
Dtype = Any


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with logits and softmax in float32 (SD 2.1 overflows float16 otherwise)."""
    return tag_attention(_attend(q, k, v, causal))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    # Heads before positions, so that both products are matrix products as they lie; the softmax is divided by its sum
    # last, where it is one picture's width and not all keys. On a CPU the two together take a third off.
    scale = q.shape[-1] ** -0.5
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bnsd,bnld->bnsl", q, k, preferred_element_type=jnp.float32)
    if causal:
        keep = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(keep, logits, -jnp.inf)
    weights = jnp.exp((logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))) * scale)
    out = jnp.einsum("bnsl,bnld->bnsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, rows: int = 512) -> jax.Array:
    """`dot_product_attention`, not causal, by blocks of `rows` queries: one block's logits in memory at a time.

    The backward pass computes a block's logits anew. Gradients of k and v are summed over the blocks in float32.
    """
    b, s, n, d = q.shape
    blocks = -(-s // rows)
    rows = -(-s // blocks)  # the same number of blocks, of which none is nearly empty
    padded = jnp.pad(q, ((0, 0), (0, blocks * rows - s), (0, 0), (0, 0)))
    queries = padded.reshape(b, blocks, rows, n, d).swapaxes(0, 1)
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def attend(block: jax.Array, k32: jax.Array, v32: jax.Array) -> jax.Array:
        return _attend(block, k32.astype(k.dtype), v32.astype(v.dtype))

    out = jax.lax.map(lambda block: attend(block, k32, v32), queries)
    return tag_attention(out.swapaxes(0, 1).reshape(b, blocks * rows, n, d)[:, :s])


def multi_head_attention(
    x: jax.Array,
    context: jax.Array,
    *,
    heads: int,
    qkv_bias: bool,
    dtype: Dtype,
    attention_fn: AttentionFn,
    weights_fn: WeightsFn | None,
    causal: bool = False,
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0"),
) -> jax.Array:
    """Project x [b s c] and context [b l e], attend, project back: [b s c]. Heads are split head-major.

    To be called inside a module's compact method: the four projections become that module's children.
    """
    c = x.shape[-1]

    def project(name: str, source: jax.Array) -> jax.Array:
        y = dense(c, name, dtype, weights_fn, use_bias=qkv_bias)(source)
        return y.reshape(*y.shape[:2], heads, c // heads)

    q, k, v = project(names[0], x), project(names[1], context), project(names[2], context)
    out = attention_fn(q, k, v, causal=causal)
    return dense(c, names[3], dtype, weights_fn)(out.reshape(x.shape))


class Attention(nn.Module):
    """Attention of the UNet's transformers: x [b s c] over context [b l e], itself where None."""

    heads: int
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        return multi_head_attention(
            x,
            x if context is None else context,
            heads=self.heads,
            qkv_bias=False,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            weights_fn=self.weights_fn,
        )


class GEGLU(nn.Module):
    """value * gelu(gate) of one projection to twice the width; exact (erf) GELU."""

    dim: int
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(dense(2 * self.dim, "proj", self.dtype, self.weights_fn)(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    dtype: Dtype = jnp.float32
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        hidden = GEGLU(4 * c, self.dtype, self.weights_fn, name="net_0")(x)
        return dense(c, "net_2", self.dtype, self.weights_fn)(hidden)


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and GEGLU feed-forward, each with a residual."""

    heads: int
    dtype: Dtype = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        weights_fn = begin_with(x, self.weights_fn)

        def attention(name: str) -> Attention:
            return Attention(self.heads, self.dtype, self.attention_fn, weights_fn, name=name)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, weights_fn=weights_fn, name=name)

        x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, weights_fn, name="ff")(norm("norm3")(x))


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
    weights_fn: WeightsFn | None = None
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        y = remat(Transformer2DModel._enter, self.remat)(self, x)
        block = remat(BasicTransformerBlock, self.remat)
        run = self.dtype, self.attention_fn, self.weights_fn
        for k in range(self.depth):
            y = block(self.heads, *run, name=f"transformer_blocks_{k}")(y, context)
        return remat(Transformer2DModel._leave, self.remat)(self, x, y)

    def _enter(self, x: jax.Array) -> jax.Array:
        """Normalised and projected tokens [b h*w c] of x [b h w c]."""
        y = GroupNorm(self.groups, 1e-6, self.dtype, self.weights_fn, name="norm")(x)
        return self._project(y, "proj_in").reshape(x.shape[0], -1, x.shape[-1])

    def _leave(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x [b h w c] and the projected tokens y [b h*w c]."""
        return x + self._project(y.reshape(x.shape), "proj_out")

    def _project(self, y: jax.Array, name: str) -> jax.Array:
        layer = dense if self.use_linear_projection else conv1x1
        return layer(y.shape[-1], name, self.dtype, begin_with(y, self.weights_fn))(y)
