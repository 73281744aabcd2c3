"""Latent Consistency Distillation and Fine-tuning, the algorithms of the LCM paper (arXiv 2310.04378).

With solver grid (t_start, t_end)_i, target weights theta^- and guidance weight w (0 = no guidance):

    z_start = alpha z + sigma eps                                                   forward noising
    loss    = d( f_theta(z_start, w, c, t_start), stop_gradient f_theta^-(z_end, w, c, t_end) )

In LCD (Algorithm 1) the teacher decides where z_end is; in LCF (an LCM on new data, without a teacher) the data do:

    LCD     o     = o_c + w (o_c - o_0)      teacher at (z_start, t_start), text c and null text 0, one batch of 2b
            z_end = DDIM jump of (x0(o), eps(o)) from t_start to t_end, or a second-order jump, which evaluates
                    o once more, at a timestep between them
    LCF     z_end = alpha z + sigma eps      at t_end, with the noise of z_start

f goes to the origin (`diffusion.consistency`), or, of a phased map, to the edge of the phase (`diffusion.phases`; PCM,
arXiv 2405.18407), the same for prediction and target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.diffusion import phases
from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.denoiser import Conditioning, Params, student_output
from lcm_jax.distill.objective import Draws, Frozen, Objective, Problem, noised, student_weights, teacher_jump


def lcd_loss(
    problem: Problem, params: Params, target_params: Params, frozen: Frozen, batch: Mapping[str, Any], draws: Draws
) -> jax.Array:
    """The LCD loss of each example, float32 [b]; training minimises its mean.

    Args:
      problem: what is distilled.
      params, target_params: theta and theta^-, of the student or its adapters; only theta gets a gradient.
      frozen: teacher's weights and null text.
      batch: "mean", "logvar" [b h w c], the VAE's posterior, unscaled; "cond", the captions' conditioning.
      draws: see `Draws`.
    """
    f = _consistency(problem, frozen, batch["cond"], draws)
    z_start = noised(problem, batch, draws, problem.grid.timesteps)
    z_end = teacher_jump(problem, frozen, z_start, batch["cond"], draws)
    return _distances(problem, f, params, target_params, z_start, [z_end])[0]


def lcf_loss(
    problem: Problem, params: Params, target_params: Params, frozen: Frozen, batch: Mapping[str, Any], draws: Draws
) -> jax.Array:
    """The LCF loss of each example, plus `problem.lcd_weight` times the LCD loss of the same draws, float32 [b].

    Arguments as for `lcd_loss`. Both losses share the prediction, so the mixture costs only the teacher's passes and
    one more of the target.
    """
    f = _consistency(problem, frozen, batch["cond"], draws)
    z_start = noised(problem, batch, draws, problem.grid.timesteps)
    ends = [noised(problem, batch, draws, problem.grid.prev_timesteps)]
    if problem.lcd_weight:
        ends.append(teacher_jump(problem, frozen, z_start, batch["cond"], draws))
    lcf, *lcd = _distances(problem, f, params, target_params, z_start, ends)
    return lcf + problem.lcd_weight * lcd[0] if lcd else lcf


ConsistencyFn = Callable[[Params, jax.Array, Any], jax.Array]


def _consistency(problem: Problem, frozen: Frozen, cond: Conditioning, draws: Draws) -> ConsistencyFn:
    """f(theta, z_t, timesteps) = f_theta(z_t, w, c, t) [b h w c], t being `timesteps` [N] at the draws' index.

    It ends at the origin, or at `draws.end`.
    """
    p = problem

    def f(theta: Params, z_t: jax.Array, timesteps: Any) -> jax.Array:
        t = jnp.asarray(timesteps)[draws.index]
        output = student_output(p.student, student_weights(p, frozen, theta), z_t, t, cond, draws.w)
        if draws.end is not None:
            return phases.jump(p.schedule, output, z_t, t, draws.end)
        return consistency_function(p.schedule, output, z_t, t, p.sigma_data, p.timestep_scaling)

    return f


def _distances(
    problem: Problem,
    f: ConsistencyFn,
    params: Params,
    target_params: Params,
    z_start: jax.Array,
    ends: Sequence[jax.Array],
) -> list[jax.Array]:
    """d(f_theta(z_start), stop_gradient f_theta^-(z_end)), [b], for every z_end."""
    p = problem
    targets = [jax.lax.stop_gradient(f(target_params, z_end, p.grid.prev_timesteps)) for z_end in ends]
    prediction = f(params, z_start, p.grid.timesteps)
    return [p.distance(prediction, target) for target in targets]


_PAPER = "[Luo et al. 2023](https://arxiv.org/abs/2310.04378)"
LCD = Objective(
    lcd_loss,
    title=f"latent consistency distillation (LCD, {_PAPER})",
    step_end="the guided teacher's jump",
    needs_teacher=True,
)
LCF = Objective(
    lcf_loss,
    title=f"latent consistency fine-tuning (LCF, {_PAPER})",
    step_end="the data, with the same noise",
    needs_lcm=True,
    takes_lcd_weight=True,
)
