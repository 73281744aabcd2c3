"""The state of a run, one frozen pytree, and the moving average that is its target."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
    """step: optimiser updates so far, int32; params: theta, all that is trained; ema_params: theta^-, the target."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The initial state. Student and target are copies of `params`, because the step donates both.

    Pure, so that `jax.jit` with `out_shardings` creates the state in its final sharding.
    """
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return TrainState(jnp.int32(0), copy, optimizer.init(copy), jax.tree.map(jnp.copy, copy))


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """theta^- <- decay theta^- + (1 - decay) theta, in float32."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
