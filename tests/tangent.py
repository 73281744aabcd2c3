"""An objective with a forward-mode derivative, as consistency models in continuous time have one."""

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.denoiser import student_output
from lcm_jax.distill.objective import Objective, l2, noised, student_weights


def tangent_loss(problem, params, target_params, frozen, batch, draws):
    """|df/dz eps + df/dt - eps|^2 of each example, f being the student's output: `jax.jvp` inside the gradient."""
    z, weights = noised(problem, batch, draws, problem.grid.timesteps), student_weights(problem, frozen, params)
    t = jnp.asarray(problem.grid.timesteps)[draws.index].astype(jnp.float32)

    def student(z, t):
        return student_output(problem.student, weights, z, t, batch["cond"], draws.w)

    _, tangent = jax.jvp(student, (z, t), (draws.noise, jnp.ones_like(t)))
    return l2(tangent, draws.noise)


TANGENT = Objective(tangent_loss, "", "", forward_mode=True)
