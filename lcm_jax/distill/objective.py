"""What objectives share: the problem, its random draws, the points of a student's step, and the distances.

An objective trains the student f_theta on pairs of points of one path, the first at t_start, the second at t_end nearer
to the data, (t_start, t_end)_i being the solver grid:

    z_start = alpha z + sigma eps at t_start          `noised`, z drawn from the VAE's posterior
    z_end   = alpha z + sigma eps at t_end            `noised`, or
              the guided teacher's jump from z_start  `teacher_jump`

What is trained, theta, is a UNet's weights, or LoRA adapters on frozen ones. Everything outside the networks is
float32. Randomness comes in as `Draws`, so that a test, or another framework, can feed the same numbers.

Distances d(prediction, target) of each example: means over its elements, in float32.

    l2           (p - q)^2
    pseudo-Huber sqrt((p - q)^2 + c^2) - c, element-wise; at c = 1e-3 practically |p - q|

All examples of a batch have the same size, so the mean of their distances is the mean over all elements.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from lcm_jax.diffusion import consistency, guidance, schedule, solvers
from lcm_jax.diffusion.denoiser import Conditioning, Params, guided_output
from lcm_jax.models.lora import Adapted


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it needs. Checks, records, model cards and ahead-of-time compilation read it here.

    Attributes:
      loss: (problem, params, target_params, frozen, batch, draws) -> float32 [b]; see `lcm.lcd_loss`.
      title: the method's name and source in Markdown, for model cards.
      step_end: what decides where the student's step ends, for model cards.
      needs_teacher: the loss always evaluates the teacher.
      needs_lcm: training continues a Latent Consistency Model rather than starting from a diffusion model.
      takes_lcd_weight: adds `Problem.lcd_weight` times the LCD loss; a weight above 0 needs the teacher as well.
      forward_mode: the loss differentiates the student in forward mode (`jax.jvp`), so its attention must allow that.
    """

    loss: Callable[..., jax.Array]
    title: str
    step_end: str
    needs_teacher: bool = False
    needs_lcm: bool = False
    takes_lcd_weight: bool = False
    forward_mode: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is distilled and how; static, so a step is compiled for it.

    Attributes:
      student: UNet, or `Adapted` UNet. With `time_cond_proj_dim` it is conditioned on w; without, it learns the average
        over w.
      teacher: UNet; None if the loss does not need one.
      schedule, grid: the teacher's noise table, and the solver with its grid on it.
      distance: d(prediction, target) of each example, [b ...] -> [b].
      w_min, w_max: range of w in the paper's convention (guidance scale - 1).
      scaling_factor: the VAE's, from posterior to diffusion latents.
      sigma_data, timestep_scaling: of the boundary scalings.
      objective: a key of `lcm_jax.distill.OBJECTIVES`.
      lcd_weight: of the LCD loss that LCF adds to its own, so that the student keeps the teacher's guidance.
      ends: where the student's step from each grid point ends, int32 [stages N] of `phases.ends`; None: at the origin,
        with boundary scalings.
      stages: the steps of training at which the rows of `ends` after the first begin.
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
    ends: np.ndarray | None = None
    stages: tuple[int, ...] = ()


class Draws(struct.PyTreeNode):
    """The randomness of one loss: posterior and noise, normal [b h w c]; index, int32 [b]; w, float32 [b].

    end: int32 [b], the timestep at which the student's step from `index` ends; None: the origin.
    """

    posterior: jax.Array
    noise: jax.Array
    index: jax.Array
    w: jax.Array
    end: jax.Array | None = None


class Frozen(struct.PyTreeNode):
    """Arrays that a step reads and never changes; None: this run does not need them.

    teacher: the teacher's weights; null: the null text as [1 ...] conditioning; base: the weights under a LoRA's
    adapters, if they differ from the teacher's. If not, the teacher's serve both, held once.
    """

    teacher: Params | None = None
    null: Conditioning | None = None
    base: Params | None = None


def draw(problem: Problem, key: jax.Array, shape: tuple[int, ...], step: Any = 0) -> Draws:
    """Draws for latents of `shape` [b h w c] at a step of training; the solver index is uniform over the grid."""
    keys = jax.random.split(key, 4)
    draws = Draws(
        posterior=jax.random.normal(keys[0], shape),
        noise=jax.random.normal(keys[1], shape),
        index=jax.random.randint(keys[2], shape[:1], 0, problem.grid.num_steps),
        w=guidance.sample_w(keys[3], shape[:1], problem.w_min, problem.w_max),
    )
    if problem.ends is None:
        return draws
    stage = jnp.searchsorted(jnp.asarray(problem.stages, jnp.int32), step, side="right")
    return draws.replace(end=jnp.asarray(problem.ends)[stage, draws.index])


def student_weights(problem: Problem, frozen: Frozen, theta: Params) -> Params:
    """The student's weights as its `apply` takes them, from what is trained."""
    if not isinstance(problem.student, Adapted):
        return theta
    return {"base": frozen.teacher if frozen.base is None else frozen.base, "lora": theta}


def noised(problem: Problem, batch: Mapping[str, Any], draws: Draws, timesteps: Any) -> jax.Array:
    """alpha z + sigma eps [b h w c] at `timesteps` [N] of the grid, with z drawn from the posterior."""
    z = problem.scaling_factor * (batch["mean"] + jnp.exp(0.5 * batch["logvar"]) * draws.posterior)
    return schedule.add_noise(problem.schedule, z, draws.noise, jnp.asarray(timesteps)[draws.index])


def teacher_jump(problem: Problem, frozen: Frozen, z_start: jax.Array, cond: Conditioning, draws: Draws) -> jax.Array:
    """End of the guided teacher's jump from t_start, [b h w c], by the grid's solver; no gradient passes."""
    p = problem

    def guided(z: jax.Array, t: jax.Array) -> jax.Array:
        return guided_output(p.teacher, frozen.teacher, z, t, cond, frozen.null, draws.w)

    return jax.lax.stop_gradient(solvers.jump(guided, z_start, p.schedule, p.grid, draws.index))


def l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of each example: [b ...] and [b ...] -> float32 [b]."""
    return _per_example(_squared(prediction, target))


def pseudo_huber(prediction: jax.Array, target: jax.Array, c: float = 1e-3) -> jax.Array:
    """Mean element-wise pseudo-Huber distance of each example: [b ...] and [b ...] -> float32 [b].

    Not the per-sample norm of improved consistency training (Song and Dhariwal 2023).
    """
    return _per_example(jnp.sqrt(_squared(prediction, target) + c**2) - c)


def _squared(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))


def _per_example(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
