"""The training loop of all parts of the embedded teacher: resumable, with one JSON line per logged step."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import struct

from lcm_jax.diffusion import schedule
from lcm_jax.runtime.checkpoints import Checkpoints

DROP_CAPTION = 0.1


class State(struct.PyTreeNode):
    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    params = jax.tree.map(np.asarray, params)
    return State(np.int32(0), params, optimizer.init(params), jax.tree.map(np.copy, params))


def noised(
    noise_schedule: schedule.NoiseSchedule, batch: Any, key: jax.Array, drop_caption: float = DROP_CAPTION
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """z_t [b h w c] of a sample of each posterior, t [b], its velocity, and whether the caption is dropped [b].

    batch: "mean" and "std" of the scaled posterior. drop_caption: the probability. t is uniform.
    """
    keys = jax.random.split(key, 4)
    z = batch["mean"] + batch["std"] * jax.random.normal(keys[0], batch["mean"].shape)
    eps = jax.random.normal(keys[1], z.shape)
    t = jax.random.randint(keys[2], z.shape[:1], 0, noise_schedule.num_train_timesteps)
    drop = jax.random.bernoulli(keys[3], drop_caption, t.shape)
    return schedule.add_noise(noise_schedule, z, eps, t), t, schedule.velocity(noise_schedule, z, eps, t), drop


def make_step(
    loss_fn: Callable, optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[[State, Any, jax.Array], tuple[State, dict]]:
    """The jitted step; the EMA's decay warms up as (1 + n) / (10 + n).

    loss_fn: (params, batch, key) -> (loss, metrics).
    """

    def step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict]:
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jax.numpy.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        return State(state.step + 1, params, opt_state, ema), {"loss": loss, **metrics}

    return jax.jit(step, donate_argnums=0)


def run(
    workdir: Path,
    state: State,
    step_fn: Callable,
    batch_fn: Callable[[int], Any],
    steps: int,
    *,
    seed: int = 0,
    log_every: int = 50,
    save_every: int = 500,
) -> State:
    """Trains to `steps` from the newest checkpoint in `workdir`; batch i is `batch_fn(i)`."""
    workdir.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(seed)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints, (workdir / "metrics.jsonl").open("a") as log:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        begun, first = time.time(), int(state.step)
        sums: dict[str, float] = {}
        for i in range(first, steps):
            state, metrics = step_fn(state, batch_fn(i), key)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if (i + 1) % log_every == 0:
                record = {name: round(value / log_every, 6) for name, value in sums.items()}
                sums = {}
                seconds = (time.time() - begun) / (i + 1 - first)
                log.write(json.dumps({"step": i + 1, **record, "seconds_per_step": round(seconds, 4)}) + "\n")
                log.flush()
                if not np.isfinite(record["loss"]):
                    raise FloatingPointError(f"loss {record['loss']} at step {i + 1}")
            if (i + 1) % save_every == 0 or i + 1 == steps:
                checkpoints.save(i + 1, state)
    return state
