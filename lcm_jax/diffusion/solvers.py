"""The ODE solver that distillation follows: its grid, one DDIM jump, and the whole way from noise to the end.

With r = T // N the grid of N steps is, for i = 0 .. N-1,

    t_start_i = (i + 1) r - 1          t_end_i = max(t_start_i - r, 0)
    abar_end_i = abar at t_end_i       (so the last jump ends at abar_0, not at 1)

A deterministic DDIM step (eta = 0) from a pair that satisfies z = alpha_start x0 + sigma_start eps is

    z_end = sqrt(abar_end) x0 + sqrt(1 - abar_end) eps

Where N does not divide T the grid stops short of T - 1 (N = 30: 989). Source: Song et al. 2021 (DDIM), equation 12;
Luo et al. 2023, algorithm 1, with the grid of its released code.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.schedule import NoiseSchedule, eps_from_output, expand_to, x0_from_output
from lcm_jax.errors import LcmError


@dataclasses.dataclass(frozen=True, eq=False)
class SolverGrid:
    """Static tables of the solver, indexed by the grid index i (0 is nearest to the data).

    Attributes:
      timesteps: int32 [N], where jump i starts, rising.
      prev_timesteps: int32 [N], where it ends.
      alphas_cumprod_prev: float32 [N], abar where it ends.
      skip: k = T // N, the length of a jump in training timesteps.
    """

    timesteps: np.ndarray
    prev_timesteps: np.ndarray
    alphas_cumprod_prev: np.ndarray
    skip: int

    @property
    def num_steps(self) -> int:
        """N, the number of jumps."""
        return self.timesteps.size


def solver_grid(schedule: NoiseSchedule, num_steps: int = 50) -> SolverGrid:
    """The grid of `num_steps` jumps over the schedule's timesteps.

    Raises:
      LcmError: num_steps not within 1 .. T.
    """
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise LcmError(f"solver steps {num_steps} are out of range; choose 1 to {schedule.num_train_timesteps}")
    skip = schedule.num_train_timesteps // num_steps
    start = np.arange(1, num_steps + 1, dtype=np.int32) * skip - 1
    end = np.maximum(start - skip, 0)
    return SolverGrid(start, end, schedule.alphas_cumprod[end], skip)


def ddim_jump(x0, eps, alpha_cumprod_end) -> jax.Array:
    """sqrt(abar_end) x0 + sqrt(1 - abar_end) eps, float32. x0, eps: [b ...]; alpha_cumprod_end: [b] or scalar."""
    x0, eps = jnp.asarray(x0, jnp.float32), jnp.asarray(eps, jnp.float32)
    abar = expand_to(alpha_cumprod_end, x0)
    return jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * eps


def ode_endpoint(
    model: Callable, x, schedule: NoiseSchedule, num_steps: int = 50, return_trajectory: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Where the probability-flow ODE takes noise: DDIM over the whole solver grid, one `lax.scan`.

    This is what one step of a perfect consistency model would give, at t = 0 with noise sigma_0.

    Args:
      model: (x [b ...], t scalar int32) -> network output, already guided (guiding the output guides x0 and eps).
      x: standard normal noise [b ...], taken as z at the grid's last timestep.
      schedule: noise table and prediction type.
      num_steps: N of the solver grid.
      return_trajectory: also return z after every jump, float32 [N b ...].

    Returns:
      z at t = 0, float32 [b ...], or (z, trajectory).
    """
    grid = solver_grid(schedule, num_steps)
    start = grid.timesteps
    rows = (start, schedule.alphas[start], schedule.sigmas[start], grid.alphas_cumprod_prev)

    def jump(z, row):
        t, alpha, sigma, abar_end = row
        output = model(z, t)
        x0 = x0_from_output(schedule.prediction_type, output, z, alpha, sigma)
        eps = eps_from_output(schedule.prediction_type, output, z, alpha, sigma)
        z = ddim_jump(x0, eps, abar_end)
        return z, z if return_trajectory else None

    z, trajectory = jax.lax.scan(jump, jnp.asarray(x, jnp.float32), rows, reverse=True)
    return (z, trajectory[::-1]) if return_trajectory else z
