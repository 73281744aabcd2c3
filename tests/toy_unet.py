"""A network of two layers that is called like a UNet, and a problem of distillation, for tests of training steps."""

import jax.numpy as jnp
from flax import linen as nn

from lcm_jax.diffusion import schedule, solvers
from lcm_jax.distill import objective

NOISE = schedule.from_config({"_class_name": "LCMScheduler"})


def problem_of(student, teacher, **changes) -> objective.Problem:
    """LCD with 50 steps of DDIM and squared differences; changes: other fields."""
    given = dict(student=student, teacher=teacher, schedule=NOISE, grid=solvers.solver_grid(NOISE, 50))
    given |= dict(distance=objective.l2, w_min=2.0, w_max=9.0, scaling_factor=0.5)
    return objective.Problem(**given | changes)


class Net(nn.Module):
    """Something small with a UNet's signature."""

    time_cond_proj_dim: int | None = None

    @nn.compact
    def __call__(self, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        cond = nn.Dense(8, name="text")(text.mean(1)) + jnp.sin(t / 100.0)[:, None]
        if timestep_cond is not None:
            cond += nn.Dense(8, use_bias=False, name="cond_proj")(timestep_cond)
        hidden = nn.Conv(8, (3, 3), name="conv_in")(z) + cond[:, None, None, :]
        return nn.Conv(z.shape[-1], (3, 3), name="conv_out")(nn.tanh(hidden))
