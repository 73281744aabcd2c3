"""Negative prompts within one pass: Normalized Attention Guidance (Chen et al. 2025, arXiv 2505.21179).

    images = model("a circle", negative_prompt="a red circle", nag_scale=3)

In every cross-attention of the UNet, before its last projection, of the same queries over two texts:

    Z+, Z-  = attention over the text, and over the negative text
    Z~      = Z+ + (s - 1) (Z+ - Z-)                                s = nag_scale; 1 is no guidance
    out     = Z+ + ALPHA (Z~ min(1, TAU |Z+| / |Z~|) - Z+)          |.|: sum of magnitudes over the heads of one query

The paper's scale is s - 1; its code's is s. It works for any UNet, also for one with w embedding or in one pass. Of the
two passes of classifier-free guidance it changes the one with the prompt: in the other Z+ = Z-, as the text is the
negative one, or Z+ = 0, if it is SDXL's zeros. ControlNets, and the pooled text of SDXL, are those of the prompt alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.errors import BadArgument
from lcm_jax.models.attention import AttentionFn

TAU, ALPHA = 2.5, 0.5  # the paper's, for Stable Diffusion XL in few steps
SCALE = 3.0  # likewise
MOST = 1000.0  # scales
_CROSS_ATTENTION = "attn2"  # its name in every transformer block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Negative:
    """What the sampler reads: the negative text's states [1 l e], and nag_scale."""

    states: jax.Array
    scale: jax.Array


def check_scale(scale: float) -> None:
    """Raises BadArgument unless nag_scale is from 1 to MOST."""
    if not 1.0 <= scale <= MOST:
        raise BadArgument(
            "nag_scale", f"{scale:g}", f"1 is no guidance in attention; use 1 to {MOST:g}, such as {SCALE:g}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
    """A UNet with a negative text, for `diffusion.denoiser`: `apply` changes its cross-attentions.

    Attributes:
      unet: the UNet.
      negative: the text, the same for all rows.
    """

    unet: Any
    negative: Negative

    @property
    def time_cond_proj_dim(self) -> int | None:
        return self.unet.time_cond_proj_dim

    def apply(self, variables: Mapping[str, Any], z_t: jax.Array, t: jax.Array, context: jax.Array, *args) -> jax.Array:
        rows, length, _ = context.shape
        states = jnp.broadcast_to(self.negative.states, (rows, *self.negative.states.shape[1:]))

        def guide(call, call_args, call_kwargs, of):
            if of.module.name != _CROSS_ATTENTION or of.method_name != "__call__":
                return call(*call_args, **call_kwargs)
            attend = functools.partial(guided_attention, of.module.run.attention_fn, length, self.negative.scale)
            return call(*call_args, **call_kwargs, attention_fn=attend)

        with nn.intercept_methods(guide):  # the two texts behind each other are projected at once
            return self.unet.apply(variables, z_t, t, jnp.concatenate([context, states], axis=1), *args)


def guided_attention(
    attend: AttentionFn, length: int, scale: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False
) -> jax.Array:
    """The module's formula, in float32: an AttentionFn, once the first three are bound.

    Args:
      attend: the attention that computes Z+ and Z-.
      length: tokens of the text, the first of those of k and v; the negative text's follow.
      scale: s.
      q, k, v, causal: see `models.attention`.
    """
    z, negative = (
        attend(q, k[:, part], v[:, part], causal).astype(jnp.float32) for part in (slice(length), slice(length, None))
    )
    further = z + (scale - 1.0) * (z - negative)
    size, limit = (jnp.abs(x).sum((2, 3), keepdims=True) for x in (further, TAU * z))
    bounded = further * jnp.minimum(1.0, limit / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
    return (z + ALPHA * (bounded - z)).astype(q.dtype)
