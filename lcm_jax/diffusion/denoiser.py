"""Calls of a UNet with its conditioning: plain, with a w embedding, or guided, which is two passes in one batch.

A UNet here is anything with the `apply` of `models.unet.UNet2DConditionModel`, including a UNet with adapters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.diffusion import guidance

Unet = Any
Params = Any
Conditioning = Mapping[str, jax.Array]  # encoder_hidden_states [b l d]; SDXL also text_embeds [b p], time_ids [b 6]


def student_output(
    unet: Unet, params: Params, z_t: jax.Array, t: jax.Array, cond: Conditioning, w: jax.Array
) -> jax.Array:
    """A student's output [b h w c] at guidance weights w [b]; a student without a w embedding ignores w."""
    dim = unet.time_cond_proj_dim
    return call(unet, params, z_t, t, cond, None if dim is None else guidance.w_embedding(w, dim))


def guided_output(
    unet: Unet,
    params: Params,
    z_t: jax.Array,
    t: jax.Array,
    cond: Conditioning,
    null: Conditioning,
    w: jax.Array,
) -> jax.Array:
    """Classifier-free guided output [b h w c], computed with the conditional and the null text in one batch of 2b.

    Args:
      unet, params: the network and its weights.
      z_t: noisy latents [b h w c].
      t: timesteps, [b] or scalar.
      cond: conditioning [b ...].
      null: conditioning of no text, [1 ...] or [b ...]; a missing key (SDXL's time_ids) is taken from `cond`.
      w: guidance weight, [b] or scalar.
    """
    b = z_t.shape[0]
    both = {key: interleave(c, jnp.broadcast_to(null.get(key, c), c.shape)) for key, c in cond.items()}
    t = jnp.broadcast_to(t, (b,))
    output = call(unet, params, interleave(z_t, z_t), interleave(t, t), both)
    output = output.reshape(b, 2, *output.shape[1:])
    return guidance.classifier_free(output[:, 0], output[:, 1], w)


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """[b ...] and [b ...] -> [2b ...], rows interleaved, so that with a sharded b no row changes its device."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def call(
    unet: Unet,
    params: Params,
    z_t: jax.Array,
    t: jax.Array,
    cond: Conditioning,
    timestep_cond: jax.Array | None = None,
) -> jax.Array:
    """`unet.apply` with the conditioning as one mapping."""
    added = {key: value for key, value in cond.items() if key != "encoder_hidden_states"}
    return unet.apply({"params": params}, z_t, t, cond["encoder_hidden_states"], timestep_cond, added or None)
