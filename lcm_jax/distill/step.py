"""One training step: loss -> gradient -> AdamW -> EMA, a pure function, to be jitted with its state donated.

    step(state, frozen, batch, key) -> (state, metrics)

Randomness has no state: the random draws of step n come from fold_in(key, n).
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcm_jax.distill import OBJECTIVES
from lcm_jax.distill.objective import Frozen, Problem, draw
from lcm_jax.distill.state import TrainState, update_ema

METRICS = ("loss", "grad_norm", "update_norm", "param_norm", "ema_distance")  # scalars that a step reports
TIMESTEP_BINS = 5  # equal parts of the solver grid whose losses are reported one by one, the first nearest to the data


def named_key(seed: int, name: str) -> jax.Array:
    """The root key of one named stream of random numbers; its key for step n is fold_in(key, n)."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def learning_rate_schedule(rate: float, warmup_steps: int = 0, decay_start: int = 0, decay_steps: int = 0):
    """step -> rate: linear from rate / (warmup + 1), constant, then linear to 0 in `decay_steps` from `decay_start`."""

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
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW on every parameter, after clipping to a global gradient norm (0: no clipping).

    The first moment is held in `mu_dtype`, the second always in float32.
    """
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw) if max_grad_norm else adamw


def make_step(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, Frozen, Any, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """The training step, not yet jitted (`jax.jit(step, donate_argnums=0)`).

    Args:
      problem: what is distilled.
      optimizer: see `make_optimizer`.
      ema_decay: of the target; 0: the target is the student itself, without gradient.
      accumulation_steps: number of equal parts in which the batch goes through the networks; the update is the same
        but for rounding.
      learning_rate: the optimizer's schedule, to report its value among the metrics.

    Returns:
      step(state, frozen, batch, key) -> (state, metrics); batch as in `lcm.lcd_loss`; metrics: METRICS, `binned`.
    """

    def loss_fn(params, target_params, frozen, batch, draws):
        each = OBJECTIVES[problem.objective].loss(problem, params, target_params, frozen, batch, draws)
        return jnp.mean(each), each

    def step(state: TrainState, frozen: Frozen, batch: Any, key: jax.Array):
        draws = draw(problem, jax.random.fold_in(key, state.step), batch["mean"].shape, state.step)

        def value_and_grad(batch, draws):
            of_params = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, each), grads = of_params(state.params, state.ema_params, frozen, batch, draws)
            return (loss, grads), binned(each, draws.index, problem.grid.num_steps)

        if accumulation_steps == 1:
            (loss, grads), bins = value_and_grad(batch, draws)
        else:
            parts = parts_of((batch, draws), accumulation_steps)
            (loss, grads), bins = accumulated(value_and_grad, parts, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, ema_decay)
        metrics = {"loss": loss, "loss_bins": bins, **measure(params, grads, updates, ema_params)}
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.float32(learning_rate(state.step))
        return TrainState(state.step + 1, params, opt_state, ema_params), metrics

    return step


def parts_of(tree: Any, count: int) -> Any:
    """[b ...] -> [count b/count ...]; part n holds rows n, n + count, ...

    If b is split over devices in blocks, no row changes device: a part has equally many rows of every device.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def accumulated(value_and_grad: Callable, parts: Any, params: Any) -> Any:
    """((loss, gradient), bins) of the whole batch, computed part by part.

    Args:
      value_and_grad: (batch, draws) -> ((mean loss, its gradient), sums over the examples).
      parts: (batch, draws), each [count b/count ...].
      params: a tree with the gradient's shapes.
    """
    count = jax.tree.leaves(parts)[0].shape[0]

    def add(total, part):
        mean, sums = value_and_grad(*part)
        return jax.tree.map(lambda t, x: t + x / count, total, mean), sums

    zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
    total, sums = jax.lax.scan(add, zero, parts)
    return total, jax.tree.map(lambda x: x.sum(0), sums)


def binned(losses: jax.Array, index: jax.Array, num_steps: int) -> dict[str, jax.Array]:
    """Sums of `losses` [b] and counts of examples, float32 [TIMESTEP_BINS], by the examples' grid `index` [b]."""
    member = jax.nn.one_hot(index * TIMESTEP_BINS // num_steps, TIMESTEP_BINS)
    return {"sum": (losses[:, None] * member).sum(0), "count": member.sum(0)}


def measure(params: Any, grads: Any, updates: Any, ema_params: Any) -> dict[str, jax.Array]:
    """L2 norms of the gradient before clipping, the update and theta, and |theta - theta^-| / |theta|."""
    trees = updates, params, optax.tree.sub(params, ema_params)
    # One of the two when the step is lowered: a program has only the sums of its platform.
    squared = jax.lax.platform_dependent(*trees, cuda=_squared_together, default=_squared_by_products)
    update_norm, param_norm, distance = map(jnp.sqrt, squared)
    return {
        "grad_norm": optax.tree.norm(grads),  # which clipping has computed already
        "update_norm": update_norm,
        "param_norm": param_norm,
        "ema_distance": distance / param_norm,
    }


def _squared_by_products(*trees: Any) -> list[jax.Array]:
    """The sum of squares of each tree, as products: a CPU's XLA would store every square first, 2 % of a step."""

    def squared(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim))
        return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), precision="highest")

    return [sum(squared(x) for x in jax.tree.leaves(tree)) for tree in trees]


def _squared_together(*trees: Any) -> list[jax.Array]:
    """The sum of squares of each of several trees of one structure, in one reduction for each leaf of it.

    On a GPU the kernel that updates an array can then sum for all trees. Three reductions, or products, would be three
    more kernels for each array, and XLA would no longer update it in place but copy it.
    """

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def squared(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
        return jax.lax.reduce(tuple(map(jnp.square, arrays)), zeros, add, tuple(range(arrays[0].ndim)))

    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    return [sum(sums) for sums in zip(*(squared(*arrays) for arrays in leaves), strict=True)]
