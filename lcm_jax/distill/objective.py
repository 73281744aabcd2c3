"""Latent Consistency Distillation and Fine-tuning, the algorithms of the LCM paper (arXiv 2310.04378), line by line.

With solver grid (t_start, t_end)_i, target weights theta^- and guidance weight w (0 = no guidance):

    z_start = alpha z + sigma eps                                                   forward noising
    loss    = d( f_theta(z_start, w, c, t_start), stop_gradient f_theta^-(z_end, w, c, t_end) )

LCD (Algorithm 1) lets the teacher say where z_end is, LCF (an LCM on new data, no teacher) the data themselves:

    LCD     o     = o_c + w (o_c - o_0)      teacher at (z_start, t_start), text c and null text 0, one batch of 2b
            z_end = DDIM jump of (x0(o), eps(o)) from t_start to t_end, or one of second order, with o at s between, too
    LCF     z_end = alpha z + sigma eps      at t_end, with the noise of z_start

What is trained, theta, is a UNet's weights, or LoRA adapters on frozen ones. Everything outside the networks is
float32. What is random comes in as `Draws`, so that a test, or another framework, can feed the same numbers.

Distances d(prediction, target) of each example: means over its elements, in float32.

    l2           (p - q)^2
    pseudo-Huber sqrt((p - q)^2 + c^2) - c, element-wise; at c = 1e-3 practically |p - q|

Examples of a batch have one size, so the mean of their distances is the mean over every element.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from lcm_jax.diffusion import consistency, guidance, schedule, solvers
from lcm_jax.diffusion.denoiser import Conditioning, Params, guided_output, student_output
from lcm_jax.models.lora import Adapted


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is distilled and how; static, so a step is compiled for it.

    Attributes:
      student: UNet, or `Adapted` UNet. One with `time_cond_proj_dim` is told w; one without averages over it.
      teacher: UNet; None where nothing asks it (LCF with `lcd_weight` 0).
      schedule, grid: the teacher's noise table, and the solver with its grid on it.
      distance: d(prediction, target) of each example, [b ...] -> [b].
      w_min, w_max: range of w, the paper's convention (guidance scale - 1).
      scaling_factor: the VAE's, from posterior to diffusion latents.
      sigma_data, timestep_scaling: of the boundary scalings.
      objective: "lcd" or "lcf", a key of `LOSSES`.
      lcd_weight: of the LCD loss that LCF adds to its own, so that the teacher's guidance stays.
    """

    student: nn.Module | Adapted
    teacher: nn.Module | None
    schedule: schedule.NoiseSchedule
    grid: solvers.SolverGrid
    distance: Callable[[jax.Array, jax.Array], jax.Array]
    w_min: float
    w_max: float
    scaling_factor: float
    sigma_data: float = consistency.SIGMA_DATA
    timestep_scaling: float = consistency.TIMESTEP_SCALING
    objective: str = "lcd"
    lcd_weight: float = 0.0


class Draws(struct.PyTreeNode):
    """The randomness of one loss: posterior and noise, normal [b h w c]; index, int32 [b]; w, float32 [b]."""

    posterior: jax.Array
    noise: jax.Array
    index: jax.Array
    w: jax.Array


class Frozen(struct.PyTreeNode):
    """Arrays that a step reads and never changes; None: this run has none.

    teacher: the teacher's weights; null: the null text as [1 ...] conditioning; base: the weights under a LoRA's
    adapters where they are not the teacher's, which else serve both, held once.
    """

    teacher: Params | None = None
    null: Conditioning | None = None
    base: Params | None = None


def draw(problem: Problem, key: jax.Array, shape: tuple[int, ...]) -> Draws:
    """Draws for latents of `shape` [b h w c]; the solver index is uniform over the grid."""
    keys = jax.random.split(key, 4)
    return Draws(
        posterior=jax.random.normal(keys[0], shape),
        noise=jax.random.normal(keys[1], shape),
        index=jax.random.randint(keys[2], shape[:1], 0, problem.grid.num_steps),
        w=guidance.sample_w(keys[3], shape[:1], problem.w_min, problem.w_max),
    )


def student_weights(problem: Problem, frozen: Frozen, theta: Params) -> Params:
    """The student's weights as its `apply` takes them, from what is trained."""
    if not isinstance(problem.student, Adapted):
        return theta
    return {"base": frozen.teacher if frozen.base is None else frozen.base, "lora": theta}


def lcd_loss(
    problem: Problem, params: Params, target_params: Params, frozen: Frozen, batch: Mapping[str, Any], draws: Draws
) -> jax.Array:
    """The LCD loss of each example, float32 [b]; what is minimised is their mean.

    Args:
      problem: what is distilled.
      params, target_params: theta and theta^-, of the student or its adapters; only theta gets a gradient.
      frozen: teacher's weights and null text.
      batch: "mean", "logvar" [b h w c], the VAE's posterior, unscaled; "cond", the captions' conditioning.
      draws: see `Draws`.
    """
    z_start = noised(problem, batch, draws, problem.grid.timesteps)
    z_end = teacher_jump(problem, frozen, z_start, batch["cond"], draws)
    return _distances(problem, params, target_params, frozen, z_start, [z_end], batch["cond"], draws)[0]


def lcf_loss(
    problem: Problem, params: Params, target_params: Params, frozen: Frozen, batch: Mapping[str, Any], draws: Draws
) -> jax.Array:
    """The LCF loss of each example, plus `problem.lcd_weight` times the LCD loss of the same draws, float32 [b].

    Arguments as `lcd_loss`'s. The prediction is the same for both, so that the mixture costs the teacher's passes and
    one of the target more.
    """
    z_start = noised(problem, batch, draws, problem.grid.timesteps)
    ends = [noised(problem, batch, draws, problem.grid.prev_timesteps)]
    if problem.lcd_weight:
        ends.append(teacher_jump(problem, frozen, z_start, batch["cond"], draws))
    lcf, *lcd = _distances(problem, params, target_params, frozen, z_start, ends, batch["cond"], draws)
    return lcf + problem.lcd_weight * lcd[0] if lcd else lcf


LOSSES = {"lcd": lcd_loss, "lcf": lcf_loss}


def noised(problem: Problem, batch: Mapping[str, Any], draws: Draws, timesteps: Any) -> jax.Array:
    """alpha z + sigma eps [b h w c] at `timesteps` [N] of the grid, z drawn from the posterior."""
    z = problem.scaling_factor * (batch["mean"] + jnp.exp(0.5 * batch["logvar"]) * draws.posterior)
    return schedule.add_noise(problem.schedule, z, draws.noise, jnp.asarray(timesteps)[draws.index])


def teacher_jump(problem: Problem, frozen: Frozen, z_start: jax.Array, cond: Conditioning, draws: Draws) -> jax.Array:
    """Where the guided teacher's jump from t_start ends, [b h w c], by the grid's solver; no gradient passes."""
    p = problem

    def guided(z: jax.Array, t: jax.Array) -> jax.Array:
        return guided_output(p.teacher, frozen.teacher, z, t, cond, frozen.null, draws.w)

    return jax.lax.stop_gradient(solvers.jump(guided, z_start, p.schedule, p.grid, draws.index))


def _distances(
    problem: Problem,
    params: Params,
    target_params: Params,
    frozen: Frozen,
    z_start: jax.Array,
    ends: Sequence[jax.Array],
    cond: Conditioning,
    draws: Draws,
) -> list[jax.Array]:
    """d(f_theta(z_start), stop_gradient f_theta^-(z_end)), [b], for every z_end."""
    p = problem

    def f(theta: Params, z_t: jax.Array, timesteps: Any) -> jax.Array:
        t = jnp.asarray(timesteps)[draws.index]
        output = student_output(p.student, student_weights(p, frozen, theta), z_t, t, cond, draws.w)
        return consistency.consistency_function(p.schedule, output, z_t, t, p.sigma_data, p.timestep_scaling)

    targets = [jax.lax.stop_gradient(f(target_params, z_end, p.grid.prev_timesteps)) for z_end in ends]
    prediction = f(params, z_start, p.grid.timesteps)
    return [p.distance(prediction, target) for target in targets]


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
