"""The ODE solvers of distillation: the grid, one jump of DDIM, DPM-Solver or DPM-Solver++, and the whole trajectory.

With k = T // N the grid of N steps is, for i = 0 .. N-1,

    t_start_i = (i + 1) k - 1          t_end_i = max(t_start_i - k, 0)
    abar_end_i = abar at t_end_i       (so the last jump ends at abar_0, not at 1)

A deterministic DDIM step (eta = 0) from a pair that satisfies z = alpha_start x0 + sigma_start eps is

    z_end = sqrt(abar_end) x0 + sqrt(1 - abar_end) eps

The solvers of second order go by DDIM to u at a timestep s in between, call the model a second time at (u, s), and
correct. With lambda = ln(alpha / sigma), h = lambda_end - lambda_start, q = (lambda_s - lambda_start) / h:

    dpm_solver       z_end = DDIM - sigma_end (e^h - 1)  / (2 q) (eps(u, s) - eps(z, t_start))
    dpm_solver_pp    z_end = DDIM - alpha_end (e^-h - 1) / (2 q) (x0(u, s)  - x0(z, t_start))

These are DPM-Solver-2 and DPM-Solver++(2S); for q = 1/2 they are the midpoint rule. The midpoint in lambda lies between
training timesteps, and s is the nearest of them except t_start. So the model is called only at timesteps that it was
trained on, and abar_s is in the table. Since q is computed from s, this rounding does not lower the order. With a skip
of 1 no timestep lies in between: s = t_end, q = 1.

The model is the guided one in both calls, so that the solver solves the guided ODE. (The paper's increment, (1 + w)
Psi(c) - w Psi(0), is the same for DDIM; with a Psi of second order it would mix the solutions of two other ODEs.)

If N does not divide T, the grid ends before T - 1 (N = 30: 989).

Sources: Song et al. 2021 (DDIM), equation 12; Lu et al. 2022, DPM-Solver, algorithm 4, and DPM-Solver++, algorithm 1;
Luo et al. 2023, algorithm 1, with the grid of its released code.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.schedule import NoiseSchedule, broadcast_like, to_eps, to_x0
from lcm_jax.errors import LcmError

SOLVERS = ("ddim", "dpm_solver", "dpm_solver_pp")

# In place of abar = 0 (zero terminal SNR), where lambda would be -infinity; diffusers' DPM-Solver++ uses the same.
_SMALLEST_ALPHA_CUMPROD = 2.0**-24


@dataclasses.dataclass(frozen=True, eq=False)
class Midpoints:
    """What a solver of second order adds to DDIM, indexed like the grid.

    Attributes:
      solver: "dpm_solver" or "dpm_solver_pp".
      timesteps: int32 [N], s, at which the model is called a second time.
      weights: float32 [N], of the difference between the two predictions.
    """

    solver: str
    timesteps: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SolverGrid:
    """Static tables of the solver, indexed by i (0 is nearest to the data).

    Attributes:
      timesteps: int32 [N], t_start, rising.
      prev_timesteps: int32 [N], t_end.
      alphas_cumprod_prev: float32 [N], abar at t_end.
      skip: k = T // N, the length of a jump in training timesteps.
      midpoints: those of a solver of second order; None for DDIM.
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
    """The grid of a solver.

    Args:
      schedule: T timesteps.
      num_steps: N, 1 .. T.
      solver: one of `SOLVERS`.

    Raises:
      LcmError: num_steps out of range; unknown solver; DPM-Solver with zero terminal SNR.
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
            f"solver 'dpm_solver' cannot start at t={schedule.num_train_timesteps - 1}, where zero terminal SNR makes "
            "alpha_t = 0 and eps carries no information about the image; use 'dpm_solver_pp' or 'ddim'"
        )
    alpha, sigma, half_log_snr = alpha_sigma_lambda(schedule.alphas_cumprod)
    middle = (half_log_snr[start] + half_log_snr[end]) / 2
    nearest = np.abs(half_log_snr - middle[:, None]).argmin(axis=1)
    s = np.clip(nearest, end, np.maximum(start - 1, end)).astype(np.int32)
    h = half_log_snr[end] - half_log_snr[start]
    q = np.ones_like(h)  # 1 also for the jump from 0 to 0 of a skip of 1, where h = 0
    np.divide(half_log_snr[s] - half_log_snr[start], h, out=q, where=h > 0)
    weights = -sigma[end] * np.expm1(h) if solver == "dpm_solver" else -alpha[end] * np.expm1(-h)
    return Midpoints(solver, s, (weights / (2 * q)).astype(np.float32))


def alpha_sigma_lambda(alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma and lambda = ln(alpha / sigma), float64; an abar of 0 counts as 2^-24."""
    abar = np.asarray(alphas_cumprod, np.float64)
    abar = np.where(abar == 0, _SMALLEST_ALPHA_CUMPROD, abar)
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    return alpha, sigma, np.log(alpha / sigma)


def jump(model: Callable, z, schedule: NoiseSchedule, grid: SolverGrid, index) -> jax.Array:
    """The end of the solver's jump from grid point `index`, float32 [b ...].

    Args:
      model: (z [b ...], t int32 with the shape of index) -> guided network output; DDIM calls it once, others twice.
      z: latents at t_start, [b ...].
      schedule: noise table and prediction type.
      grid: the solver's grid on that table.
      index: i, int32 [b] or scalar.
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
    # DPM-Solver, algorithm 4, or DPM-Solver++, algorithm 1, as a correction of DDIM.
    return z_end + broadcast_like(jnp.asarray(grid.midpoints.weights)[index], z) * difference


def ddim_jump(x0, eps, alpha_cumprod_end) -> jax.Array:
    """sqrt(abar_end) x0 + sqrt(1 - abar_end) eps, float32. x0, eps: [b ...]; alpha_cumprod_end: [b] or scalar."""
    x0, eps = jnp.asarray(x0, jnp.float32), jnp.asarray(eps, jnp.float32)
    abar = broadcast_like(alpha_cumprod_end, x0)
    return jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * eps  # Song et al. 2021, equation 12, eta = 0


def ode_endpoint(
    model: Callable,
    x,
    schedule: NoiseSchedule,
    num_steps: int = 50,
    return_trajectory: bool = False,
    solver: str = "ddim",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The end of the probability-flow ODE that starts from noise: a solver over its whole grid, one `lax.scan`.

    One step of a perfect consistency model gives the same. It is at t = 0, and so still has noise sigma_0.

    Args:
      model: (x [b ...], t scalar int32) -> guided network output.
      x: standard normal noise [b ...], used as z at the grid's last timestep.
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
