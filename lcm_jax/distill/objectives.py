"""Latent Consistency Distillation, Algorithm 1 of the LCM paper (arXiv 2310.04378), line by line.

With solver grid (t_start, t_end)_i, target weights theta^- and guidance weight w (0 = no guidance):

    z_start = alpha z + sigma eps                                                   forward noising
    o       = o_c + w (o_c - o_0)            teacher at (z_start, t_start), text c and null text 0, one batch of 2b
    z_end   = DDIM jump of (x0(o), eps(o)) from t_start to t_end
    loss    = d( f_theta(z_start, w, c, t_start), stop_gradient f_theta^-(z_end, w, c, t_end) )

Everything outside the networks is float32. What is random comes in as `Draws`, so that a test, or another framework,
can feed the same numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from lcm_jax.diffusion import consistency, guidance, schedule, solvers
from lcm_jax.diffusion.denoiser import Conditioning, Params, guided_output, student_output


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is distilled and how; static, so a step is compiled for it.

    Attributes:
      student, teacher: UNets. A student with `time_cond_proj_dim` is told w; one without averages over it.
      schedule, grid: the teacher's noise table, and the solver grid on it.
      distance: d(prediction, target) -> scalar.
      w_min, w_max: range of w, the paper's convention (guidance scale - 1).
      scaling_factor: the VAE's, from posterior to diffusion latents.
      sigma_data, timestep_scaling: of the boundary scalings.
    """

    student: nn.Module
    teacher: nn.Module
    schedule: schedule.NoiseSchedule
    grid: solvers.SolverGrid
    distance: Callable[[jax.Array, jax.Array], jax.Array]
    w_min: float
    w_max: float
    scaling_factor: float
    sigma_data: float = consistency.SIGMA_DATA
    timestep_scaling: float = consistency.TIMESTEP_SCALING


class Draws(struct.PyTreeNode):
    """The randomness of one loss: posterior and noise, normal [b h w c]; index, int32 [b]; w, float32 [b]."""

    posterior: jax.Array
    noise: jax.Array
    index: jax.Array
    w: jax.Array


class Frozen(struct.PyTreeNode):
    """Arrays that a step reads and never changes: the teacher's weights, and the null text as [1 ...] conditioning."""

    teacher: Params
    null: Conditioning


def draw(problem: Problem, key: jax.Array, shape: tuple[int, ...]) -> Draws:
    """Draws for latents of `shape` [b h w c]; the solver index is uniform over the grid."""
    keys = jax.random.split(key, 4)
    return Draws(
        posterior=jax.random.normal(keys[0], shape),
        noise=jax.random.normal(keys[1], shape),
        index=jax.random.randint(keys[2], shape[:1], 0, problem.grid.num_steps),
        w=guidance.sample_w(keys[3], shape[:1], problem.w_min, problem.w_max),
    )


def lcd_loss(
    problem: Problem, params: Params, target_params: Params, frozen: Frozen, batch: Mapping[str, Any], draws: Draws
) -> jax.Array:
    """The LCD loss, a float32 scalar.

    Args:
      problem: what is distilled.
      params, target_params: student's weights theta and theta^-; only theta gets a gradient.
      frozen: teacher's weights and null text.
      batch: "mean", "logvar" [b h w c], the VAE's posterior, unscaled; "cond", the captions' conditioning.
      draws: see `Draws`.
    """
    p = problem
    z = p.scaling_factor * (batch["mean"] + jnp.exp(0.5 * batch["logvar"]) * draws.posterior)
    t_start = jnp.asarray(p.grid.timesteps)[draws.index]
    t_end = jnp.asarray(p.grid.prev_timesteps)[draws.index]
    z_start = schedule.add_noise(p.schedule, z, draws.noise, t_start)

    output = guided_output(p.teacher, frozen.teacher, z_start, t_start, batch["cond"], frozen.null, draws.w)
    z_end = solvers.ddim_jump(
        schedule.to_x0(p.schedule, output, z_start, t_start),
        schedule.to_eps(p.schedule, output, z_start, t_start),
        jnp.asarray(p.grid.alphas_cumprod_prev)[draws.index],
    )
    z_end = jax.lax.stop_gradient(z_end)

    def f(weights: Params, z_t: jax.Array, t: jax.Array) -> jax.Array:
        output = student_output(p.student, weights, z_t, t, batch["cond"], draws.w)
        return consistency.consistency_function(p.schedule, output, z_t, t, p.sigma_data, p.timestep_scaling)

    target = jax.lax.stop_gradient(f(target_params, z_end, t_end))
    return p.distance(f(params, z_start, t_start), target)
