"""Attention in plain JAX, and `AttentionFn`, the one seam for other kernels.

An `AttentionFn` is (q [b s n d], k [b l n d], v [b l n d], causal=False) -> [b s n d].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

AttentionFn = Callable[..., jax.Array]

# The tag that every AttentionFn puts on its output, so that rematerialisation can keep it (see `layers.remat`).
ATTENTION_OUTPUT = "attention_output"


def tag_attention(output: jax.Array) -> jax.Array:
    """The output of an attention function, tagged with ATTENTION_OUTPUT."""
    return checkpoint_name(output, ATTENTION_OUTPUT)


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with logits and softmax in float32 (SD 2.1 overflows float16 otherwise)."""
    return tag_attention(_attend(q, k, v, causal))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    scale = q.shape[-1] ** -0.5
    # Heads before positions, so that both products are plain matrix products: with the late division below, a third
    # faster on a CPU.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bnsd,bnld->bnsl", q, k, preferred_element_type=jnp.float32)
    if causal:
        keep = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(keep, logits, -jnp.inf)
    weights = jnp.exp((logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))) * scale)
    out = jnp.einsum("bnsl,bnld->bnsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # The softmax is normalised here, where there are d values for each query and not l.
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, rows: int = 512) -> jax.Array:
    """Non-causal `dot_product_attention` in blocks of `rows` queries, so that memory holds the logits of one block.

    The backward pass recomputes the logits of each block.
    """
    b, s, n, d = q.shape
    blocks = -(-s // rows)
    rows = -(-s // blocks)  # the same number of blocks, none of them nearly empty
    padded = jnp.pad(q, ((0, 0), (0, blocks * rows - s), (0, 0), (0, 0)))
    queries = padded.reshape(b, blocks, rows, n, d).swapaxes(0, 1)
    # In float32, so that the gradients of k and v are summed over the blocks in float32.
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def attend(block: jax.Array, k32: jax.Array, v32: jax.Array) -> jax.Array:
        return _attend(block, k32.astype(k.dtype), v32.astype(v.dtype))

    out = jax.lax.map(lambda block: attend(block, k32, v32), queries)
    return tag_attention(out.swapaxes(0, 1).reshape(b, blocks * rows, n, d)[:, :s])
