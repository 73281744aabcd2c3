"""Distances d(prediction, target) of each example: means over its elements, in float32.

    l2           (p - q)^2
    pseudo-Huber sqrt((p - q)^2 + c^2) - c, element-wise; at c = 1e-3 practically |p - q|

Examples of a batch have one size, so the mean of their distances is the mean over every element.
"""

import jax
import jax.numpy as jnp


def l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of each example: [b ...] and [b ...] -> float32 [b]."""
    return _per_example(_squared(prediction, target))


def pseudo_huber(prediction: jax.Array, target: jax.Array, c: float = 1e-3) -> jax.Array:
    """Mean element-wise pseudo-Huber distance of each example: [b ...] and [b ...] -> float32 [b].

    Not the per-sample norm of improved CM.
    """
    return _per_example(jnp.sqrt(_squared(prediction, target) + c**2) - c)


def _squared(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))


def _per_example(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
