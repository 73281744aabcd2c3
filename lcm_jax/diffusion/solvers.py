"""The ODE solver that distillation follows: its grid, one jump of DDIM, DPM-Solver or DPM-Solver++, the whole way.

With r = T // N the grid of N steps is, for i = 0 .. N-1,

    t_start_i = (i + 1) r - 1          t_end_i = max(t_start_i - r, 0)
    abar_end_i = abar at t_end_i       (so the last jump ends at abar_0, not at 1)

A deterministic DDIM step (eta = 0) from a pair that satisfies z = alpha_start x0 + sigma_start eps is

    z_end = sqrt(abar_end) x0 + sqrt(1 - abar_end) eps

The solvers of second order go by DDIM to a timestep s between, ask the model once more, at (u, s), and correct. With
lambda = ln(alpha / sigma), h = lambda_end - lambda_start, q = (lambda_s - lambda_start) / h:

    dpm_solver       z_end = DDIM - sigma_end (e^h - 1)  / (2 q) (eps(u, s) - eps(z, t_start))
    dpm_solver_pp    z_end = DDIM - alpha_end (e^-h - 1) / (2 q) (x0(u, s)  - x0(z, t_start))

which is DPM-Solver-2 and DPM-Solver++(2S), for q = 1/2 their midpoint rule. The midpoint in lambda lies between
training timesteps; s is the one nearest to it, t_start left out. So the model is asked only where it was trained,
abar_s is the table's, and as q is what s makes it, rounding costs no order. With a skip of 1 nothing lies between:
s = t_end, q = 1.

The model is the guided one in both calls, so that it is the guided ODE which is solved. (The paper's increment, (1 + w)
Psi(c) - w Psi(0), is the same for DDIM; with a Psi of second order it would mix the solutions of two other ODEs.)

Where N does not divide T the grid stops short of T - 1 (N = 30: 989). Sources: Song et al. 2021 (DDIM), equation 12;
Lu et al. 2022, DPM-Solver, algorithm 4, and DPM-Solver++, algorithm 1; Luo et al. 2023, algorithm 1, with the grid of
its released code.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.schedule import NoiseSchedule, expand_to, to_eps, to_x0
from lcm_jax.errors import LcmError

SOLVERS = ("ddim", "dpm_solver", "dpm_solver_pp")

# diffusers puts this for abar = 0 (zero terminal SNR) in DPM-Solver++, where lambda would be -infinity.
_SMALLEST_ALPHA_CUMPROD = 2.0**-24


@dataclasses.dataclass(frozen=True, eq=False)
class Midpoints:
    """What a solver of second order has beside DDIM, indexed as the grid.

    Attributes:
      solver: "dpm_solver" or "dpm_solver_pp".
      timesteps: int32 [N], s, where the model is asked a second time.
      weights: float32 [N], of the difference between both answers.
    """

    solver: str
    timesteps: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SolverGrid:
    """Static tables of the solver, indexed by the grid index i (0 is nearest to the data).

    Attributes:
      timesteps: int32 [N], where jump i starts, rising.
      prev_timesteps: int32 [N], where it ends.
      alphas_cumprod_prev: float32 [N], abar where it ends.
      skip: k = T // N, the length of a jump in training timesteps.
      midpoints: of a solver of second order; None: DDIM.
    """

    timesteps: np.ndarray
    prev_timesteps: np.ndarray
    alphas_cumprod_prev: np.ndarray
    skip: int
    midpoints: Midpoints | None = None

    @property
    def num_steps(self) -> int:
        """N, the number of jumps."""
        return self.timesteps.size


def solver_grid(schedule: NoiseSchedule, num_steps: int = 50, solver: str = "ddim") -> SolverGrid:
    """The grid of `num_steps` jumps of a solver, one of `SOLVERS`, over the schedule's timesteps.

    Raises:
      LcmError: num_steps not within 1 .. T; unknown solver; DPM-Solver with zero terminal SNR.
    """
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise LcmError(f"solver steps {num_steps} are out of range; choose 1 to {schedule.num_train_timesteps}")
    if solver not in SOLVERS:
        raise LcmError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    skip = schedule.num_train_timesteps // num_steps
    start = np.arange(1, num_steps + 1, dtype=np.int32) * skip - 1
    end = np.maximum(start - skip, 0)
    midpoints = None if solver == "ddim" else _midpoints(schedule, start, end, solver)
    return SolverGrid(start, end, schedule.alphas_cumprod[end], skip, midpoints)


def _midpoints(schedule: NoiseSchedule, start: np.ndarray, end: np.ndarray, solver: str) -> Midpoints:
    if solver == "dpm_solver" and schedule.alphas_cumprod[-1] == 0:
        raise LcmError(
            f"solver 'dpm_solver' cannot leave t={schedule.num_train_timesteps - 1}, where zero terminal SNR makes "
            "alpha_t = 0 and eps says nothing of the picture; use 'dpm_solver_pp' or 'ddim'"
        )
    alpha, sigma, half_log_snr = scales(schedule.alphas_cumprod)
    middle = (half_log_snr[start] + half_log_snr[end]) / 2
    nearest = np.abs(half_log_snr - middle[:, None]).argmin(axis=1)
    s = np.clip(nearest, end, np.maximum(start - 1, end)).astype(np.int32)
    h = half_log_snr[end] - half_log_snr[start]
    q = np.ones_like(h)  # also of the jump from 0 to 0 that a skip of 1 has, where h = 0
    np.divide(half_log_snr[s] - half_log_snr[start], h, out=q, where=h > 0)
    weights = -sigma[end] * np.expm1(h) if solver == "dpm_solver" else -alpha[end] * np.expm1(-h)
    return Midpoints(solver, s, (weights / (2 * q)).astype(np.float32))


def scales(alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma and lambda = ln(alpha / sigma), float64, with the least of abar where it is 0."""
    abar = np.asarray(alphas_cumprod, np.float64)
    abar = np.where(abar == 0, _SMALLEST_ALPHA_CUMPROD, abar)
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    return alpha, sigma, np.log(alpha / sigma)


def jump(model: Callable, z, schedule: NoiseSchedule, grid: SolverGrid, index) -> jax.Array:
    """Where the solver's jump from grid point `index` ends, float32 [b ...].

    Args:
      model: (z [b ...], t int32 of index's shape) -> network output, already guided; called once for DDIM, else twice.
      z: at t_start [b ...].
      schedule, grid: noise table, and the grid on it.
      index: int32 [b] or scalar, grid index i.
    """
    t = jnp.asarray(grid.timesteps)[index]
    output = model(z, t)
    x0, eps = to_x0(schedule, output, z, t), to_eps(schedule, output, z, t)
    z_end = ddim_jump(x0, eps, jnp.asarray(grid.alphas_cumprod_prev)[index])
    if grid.midpoints is None:
        return z_end
    s = jnp.asarray(grid.midpoints.timesteps)[index]
    u = ddim_jump(x0, eps, jnp.asarray(schedule.alphas_cumprod)[s])
    output = model(u, s)
    difference = (
        to_eps(schedule, output, u, s) - eps
        if grid.midpoints.solver == "dpm_solver"
        else to_x0(schedule, output, u, s) - x0
    )
    return z_end + expand_to(jnp.asarray(grid.midpoints.weights)[index], z) * difference


def ddim_jump(x0, eps, alpha_cumprod_end) -> jax.Array:
    """sqrt(abar_end) x0 + sqrt(1 - abar_end) eps, float32. x0, eps: [b ...]; alpha_cumprod_end: [b] or scalar."""
    x0, eps = jnp.asarray(x0, jnp.float32), jnp.asarray(eps, jnp.float32)
    abar = expand_to(alpha_cumprod_end, x0)
    return jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * eps


def ode_endpoint(
    model: Callable,
    x,
    schedule: NoiseSchedule,
    num_steps: int = 50,
    return_trajectory: bool = False,
    solver: str = "ddim",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Where the probability-flow ODE takes noise: a solver over its whole grid, one `lax.scan`.

    This is what one step of a perfect consistency model would give, at t = 0 with noise sigma_0.

    Args:
      model: (x [b ...], t scalar int32) -> network output, already guided (guiding the output guides x0 and eps).
      x: standard normal noise [b ...], taken as z at the grid's last timestep.
      schedule: noise table and prediction type.
      num_steps: N of the solver grid.
      return_trajectory: also return z after every jump, float32 [N b ...].
      solver: one of `SOLVERS`.

    Returns:
      z at t = 0, float32 [b ...], or (z, trajectory).
    """
    grid = solver_grid(schedule, num_steps, solver)

    def step(z, i):
        z = jump(model, z, schedule, grid, i)
        return z, z if return_trajectory else None

    z, trajectory = jax.lax.scan(step, jnp.asarray(x, jnp.float32), np.arange(num_steps), reverse=True)
    return (z, trajectory[::-1]) if return_trajectory else z
