"""One training step: loss -> gradient -> AdamW -> EMA, a pure function to be jitted with its state donated.

    step(state, frozen, batch, key) -> (state, metrics)

Randomness has no state: the draws of step n come from fold_in(key, n).
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcm_jax.distill import objectives
from lcm_jax.distill.state import TrainState, update_ema


def named_key(seed: int, name: str) -> jax.Array:
    """The root key of one named stream of random numbers; step n of it is fold_in(key, n)."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def learning_rate_schedule(rate: float, warmup_steps: int = 0, decay_start: int = 0, decay_steps: int = 0):
    """Linear from rate / (warmup + 1) over the warm-up, constant, linear to 0 over `decay_steps` from `decay_start`."""

    def schedule(step):
        factor = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
        if decay_steps:
            factor *= jnp.clip(1.0 - (step - decay_start) / decay_steps, 0.0, 1.0)
        return rate * factor

    return schedule


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW on every parameter behind clipping to a global gradient norm (0: no clipping)."""
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw) if max_grad_norm else adamw


def make_step(
    problem: objectives.Problem,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, objectives.Frozen, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, not yet jitted (`jax.jit(step, donate_argnums=0)`).

    Args:
      problem: what is distilled.
      optimizer: see `make_optimizer`.
      ema_decay: of the target; 0: the target is the student itself, without gradient.
      accumulation_steps: the batch goes through the networks in so many parts, which must divide it; the update is
        the same but for rounding.

    Returns:
      step(state, frozen, batch, key) -> (state, {"loss", "grad_norm"}); batch as in `objectives.lcd_loss`.
    """

    def loss_fn(params, target_params, frozen, batch, draws):
        return objectives.LOSSES[problem.objective](problem, params, target_params, frozen, batch, draws)

    def step(state: TrainState, frozen: objectives.Frozen, batch: Any, key: jax.Array):
        draws = objectives.draw(problem, jax.random.fold_in(key, state.step), batch["mean"].shape)
        value_and_grad = jax.value_and_grad(loss_fn)
        if accumulation_steps == 1:
            loss, grads = value_and_grad(state.params, state.ema_params, frozen, batch, draws)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:]), (batch, draws))

            def add(total, part):
                one = value_and_grad(state.params, state.ema_params, frozen, *part)
                return jax.tree.map(lambda t, x: t + x / accumulation_steps, total, one), None

            zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(add, zero, parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, ema_params), metrics

    return step
