"""Distances d(prediction, target), averaged over every element, in float32.

    l2           (p - q)^2
    pseudo-Huber sqrt((p - q)^2 + c^2) - c, element-wise; at c = 1e-3 practically |p - q|
"""

import jax
import jax.numpy as jnp


def l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of arrays of one shape, a scalar."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def pseudo_huber(prediction: jax.Array, target: jax.Array, c: float = 1e-3) -> jax.Array:
    """Mean of the element-wise pseudo-Huber distance, a scalar (not the per-sample norm of improved CM)."""
    squared = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.mean(jnp.sqrt(squared + c**2) - c)
