"""Samplers: from noise to a latent in a fixed number of network calls, each loop one `lax.scan`.

`lcm` is multistep consistency sampling (Luo et al. 2023, algorithm 3), over timesteps t_1 > t_2 > ... :

    x0 = f(x, t_i)            x = alpha_{t_{i+1}} x0 + sigma_{t_{i+1}} noise_i, or x0 after the last step

`ddim` (Song et al. 2021, equation 12, eta = 0), `dpm_solver_2m` (Lu et al. 2022, "DPM-Solver", as a multistep method)
and `dpm_solver_pp_2m` (Lu et al. 2022, "DPM-Solver++", algorithm 2) are what the teacher is measured by. With lambda =
ln(alpha / sigma), h_i = lambda_{i+1} - lambda_i, r_i = h_{i-1} / h_i, and p = eps or, for DPM-Solver++, p = x0:

    D_i     = p_i + (p_i - p_{i-1}) / (2 r_i)               (D_i = p_i at the first step, see each for the last)
    x_{i+1} = alpha_{i+1} / alpha_i x_i - sigma_{i+1} (e^{h_i} - 1) D_i                                DPM-Solver
    x_{i+1} = sigma_{i+1} / sigma_i x_i - alpha_{i+1} (e^{-h_i} - 1) D_i                               DPM-Solver++

Each equals diffusers' scheduler of its name, step by step: LCMScheduler, DDIMScheduler, and
DPMSolverMultistepScheduler with its defaults; for DPM-Solver with algorithm_type "dpmsolver", which diffusers only
takes with final_sigmas_type "sigma_min". That includes what is odd in them: DDIM goes from t to t - T // n even
where the spacing puts the next timestep elsewhere (linspace, and n that does not divide T), one DDIM step with
linspace spacing starts at t = 0, and from 15 steps on DPM-Solver's last step is of order 2, before that of order 1.

A model is `(x [b h w c], t scalar int32) -> network output`, guided already if it is to be; x starts as standard normal
noise. Timesteps and coefficients are tables made on the host, so the compiled loop only reads them. All arithmetic is
float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import SIGMA_DATA, TIMESTEP_SCALING, boundary_scalings
from lcm_jax.diffusion.schedule import NoiseSchedule, eps_from_output, x0_from_output
from lcm_jax.diffusion.solvers import scales
from lcm_jax.errors import LcmError

SPACINGS = ("leading", "trailing", "linspace")

_LOWER_ORDER_FINAL = 15  # with fewer steps DPM-Solver's last is of order 1, for stability (diffusers' number)

Sampled = jax.Array | tuple[jax.Array, jax.Array]


def lcm_timesteps(num_steps: int, num_train_timesteps: int = 1000, original_steps: int = 50) -> np.ndarray:
    """Timesteps of `lcm`, int32 [num_steps], falling: evenly spaced indices into the solver grid of training.

    Args:
      num_steps: 1 .. original_steps.
      num_train_timesteps: T.
      original_steps: N of the solver grid that the model was distilled on, 1 .. T.

    Raises:
      LcmError: a number of steps out of its range.
    """
    if not 1 <= original_steps <= num_train_timesteps:
        raise LcmError(f"original_steps={original_steps} is out of range; choose 1 to {num_train_timesteps}")
    _check_steps(num_steps, original_steps, "the solver steps the model was distilled with")
    grid = np.arange(original_steps, 0, -1) * (num_train_timesteps // original_steps) - 1
    return grid[np.floor(np.linspace(0, original_steps, num_steps, endpoint=False)).astype(int)].astype(np.int32)


def ddim_timesteps(
    num_steps: int, num_train_timesteps: int = 1000, spacing: str = "trailing", steps_offset: int = 0
) -> np.ndarray:
    """Timesteps of `ddim`, int32 [num_steps], falling.

    Args:
      num_steps: 1 .. T.
      num_train_timesteps: T.
      spacing: "trailing" starts at T - 1; "leading" at (n - 1) (T // n) + steps_offset; "linspace" spans 0 .. T - 1.
      steps_offset: added to leading timesteps (1 for Stable Diffusion); the others ignore it.

    Raises:
      LcmError: steps out of range, unknown spacing, an offset that leads past T - 1.
    """
    last = num_train_timesteps
    _check_steps(num_steps, last, "the training timesteps")
    if spacing == "leading":
        t = np.arange(num_steps - 1, -1, -1) * (last // num_steps) + steps_offset
    elif spacing == "trailing":
        t = _trailing(num_steps, last)
    elif spacing == "linspace":
        t = np.linspace(0, last - 1, num_steps).round()[::-1]
    else:
        raise LcmError(_unknown_spacing(spacing))
    return _checked(t, last, steps_offset)


def dpm_solver_timesteps(
    num_steps: int, num_train_timesteps: int = 1000, spacing: str = "trailing", steps_offset: int = 0
) -> np.ndarray:
    """Timesteps of `dpm_solver_2m` and `dpm_solver_pp_2m`, int32 [num_steps], falling; see `ddim_timesteps`.

    "leading" and "linspace" lay num_steps + 1 points and leave the last, t = 0, out: the step to abar_0, or to
    sigma = 0, takes its place. They allow 1 .. T - 1 steps.
    """
    last = num_train_timesteps
    _check_steps(num_steps, last if spacing == "trailing" else last - 1, "the training timesteps")
    if spacing == "leading":
        t = np.arange(num_steps, 0, -1) * (last // (num_steps + 1)) + steps_offset
    elif spacing == "trailing":
        t = _trailing(num_steps, last)
    elif spacing == "linspace":
        t = np.linspace(0, last - 1, num_steps + 1).round()[:0:-1]
    else:
        raise LcmError(_unknown_spacing(spacing))
    return _checked(t, last, steps_offset)


def timesteps(kind: str, num_steps: int, **options) -> np.ndarray:
    """Timesteps of a sampler by name, one of `SAMPLERS`, int32 [num_steps]; options as theirs."""
    if kind not in SAMPLERS:
        raise LcmError(f"unknown sampler {kind!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[kind][1](num_steps, **options)


def lcm(
    model: Callable,
    x,
    noise,
    schedule: NoiseSchedule,
    num_steps: int,
    original_steps: int = 50,
    timestep_scaling: float = TIMESTEP_SCALING,
    sigma_data: float = SIGMA_DATA,
    return_trajectory: bool = False,
) -> Sampled:
    """Multistep consistency sampling.

    Args:
      model: (x [b h w c], t scalar int32) -> network output.
      x: standard normal noise [b h w c].
      noise: fresh standard normal noise between steps, [num_steps - 1 b h w c] (more entries are left unused); None
        does for one step.
      schedule: noise table and prediction type.
      num_steps, original_steps: see `lcm_timesteps`.
      timestep_scaling, sigma_data: of the boundary scalings; must be those of training.
      return_trajectory: also return x after every step, [num_steps b h w c].

    Returns:
      The latent, float32 [b h w c], or (latent, trajectory).

    Raises:
      LcmError: steps out of range, or noise of the wrong shape.
    """
    x = jnp.asarray(x, jnp.float32)
    t = lcm_timesteps(num_steps, schedule.num_train_timesteps, original_steps)
    noise = jnp.zeros((0, *x.shape), jnp.float32) if noise is None else jnp.asarray(noise, jnp.float32)[: num_steps - 1]
    if noise.shape != (num_steps - 1, *x.shape):
        raise LcmError(f"noise of shape {noise.shape} for {num_steps} steps; it must be {(num_steps - 1, *x.shape)}")
    noise = jnp.concatenate([noise, jnp.zeros((1, *x.shape), jnp.float32)])
    rows = (
        t,
        schedule.alphas[t],
        schedule.sigmas[t],
        np.append(schedule.alphas[t[1:]], np.float32(1)),
        np.append(schedule.sigmas[t[1:]], np.float32(0)),
        noise,
    )

    def step(x, row):
        t, alpha, sigma, next_alpha, next_sigma, xi = row
        c_skip, c_out = boundary_scalings(t, sigma_data, timestep_scaling)
        x0 = x0_from_output(schedule.prediction_type, model(x, t), x, alpha, sigma)
        x = next_alpha * (c_skip * x + c_out * x0) + next_sigma * xi
        return x, x if return_trajectory else None

    return _result(jax.lax.scan(step, x, rows), return_trajectory)


def ddim(
    model: Callable,
    x,
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str = "trailing",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    return_trajectory: bool = False,
) -> Sampled:
    """Deterministic DDIM (eta = 0), without clipping.

    Args:
      model: (x [b h w c], t scalar int32) -> network output, guided already.
      x: standard normal noise [b h w c].
      schedule: noise table and prediction type.
      num_steps, spacing, steps_offset: see `ddim_timesteps`.
      set_alpha_to_one: the last step ends at abar = 1; otherwise at abar_0 (as Stable Diffusion's configs have it).
      return_trajectory: also return x after every step, [num_steps b h w c].

    Returns:
      The latent, float32 [b h w c], or (latent, trajectory).
    """
    t = ddim_timesteps(num_steps, schedule.num_train_timesteps, spacing, steps_offset)
    prev = t - schedule.num_train_timesteps // num_steps
    final = np.float32(1) if set_alpha_to_one else schedule.alphas_cumprod[0]
    abar_prev = np.where(prev >= 0, schedule.alphas_cumprod[np.maximum(prev, 0)], final)
    rows = (t, schedule.alphas[t], schedule.sigmas[t], np.sqrt(abar_prev), np.sqrt(np.float32(1) - abar_prev))

    def step(x, row):
        t, alpha, sigma, prev_alpha, prev_sigma = row
        output = model(x, t)
        x0 = x0_from_output(schedule.prediction_type, output, x, alpha, sigma)
        eps = eps_from_output(schedule.prediction_type, output, x, alpha, sigma)
        x = prev_alpha * x0 + prev_sigma * eps
        return x, x if return_trajectory else None

    return _result(jax.lax.scan(step, jnp.asarray(x, jnp.float32), rows), return_trajectory)


def dpm_solver_2m(
    model: Callable,
    x,
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str = "trailing",
    steps_offset: int = 0,
    return_trajectory: bool = False,
) -> Sampled:
    """DPM-Solver(2M): order 2, midpoint, ending at abar_0, as eps says nothing of the way to sigma = 0.

    Of fewer than 15 steps the last is of order 1. Arguments and result as `dpm_solver_pp_2m`'s.
    """
    return _dpm_solver(eps_from_output, model, x, schedule, num_steps, spacing, steps_offset, return_trajectory)


def dpm_solver_pp_2m(
    model: Callable,
    x,
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str = "trailing",
    steps_offset: int = 0,
    return_trajectory: bool = False,
) -> Sampled:
    """DPM-Solver++(2M): order 2, midpoint, ending at sigma = 0 by a step of order 1.

    Args:
      model: (x [b h w c], t scalar int32) -> network output, guided already.
      x: standard normal noise [b h w c].
      schedule: noise table and prediction type.
      num_steps, spacing, steps_offset: see `dpm_solver_timesteps`.
      return_trajectory: also return x after every step, [num_steps b h w c].

    Returns:
      The latent, float32 [b h w c], or (latent, trajectory).
    """
    return _dpm_solver(x0_from_output, model, x, schedule, num_steps, spacing, steps_offset, return_trajectory)


def _dpm_solver(
    predict: Callable,
    model: Callable,
    x,
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str,
    steps_offset: int,
    return_trajectory: bool,
) -> Sampled:
    """Both solvers' loop; predict: `eps_from_output` or `x0_from_output`."""
    t = dpm_solver_timesteps(num_steps, schedule.num_train_timesteps, spacing, steps_offset)
    coefficients = _dpm_solver_coefficients if predict is eps_from_output else _dpm_solver_pp_coefficients
    alpha, sigma, _ = scales(schedule.alphas_cumprod[t])
    rows = (t, *(column.astype(np.float32) for column in (alpha, sigma, *coefficients(schedule, t))))

    def step(carry, row):
        x, last = carry
        t, alpha, sigma, x_weight, weight, difference_weight = row
        prediction = predict(schedule.prediction_type, model(x, t), x, alpha, sigma)
        x = x_weight * x + weight * prediction + difference_weight * (prediction - last)
        return (x, prediction), x if return_trajectory else None

    x = jnp.asarray(x, jnp.float32)
    (x, _), trajectory = jax.lax.scan(step, (x, jnp.zeros_like(x)), rows)
    return _result((x, trajectory), return_trajectory)


def _dpm_solver_coefficients(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of x, eps and eps - last eps in each step, float64 [n] each; the last step goes to abar_0."""
    alpha, sigma, half_log_snr = scales(schedule.alphas_cumprod[np.append(t, 0)])
    h = np.diff(half_log_snr)
    eps_weight = -sigma[1:] * np.expm1(h)
    difference_weight = np.zeros_like(eps_weight)
    difference_weight[1:] = eps_weight[1:] * h[1:] / (2 * h[:-1])
    if t.size < _LOWER_ORDER_FINAL:
        difference_weight[-1] = 0
    return alpha[1:] / alpha[:-1], eps_weight, difference_weight


def _dpm_solver_pp_coefficients(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of x, x0 and x0 - last x0 in each step, float64 [n] each.

    The last step goes to sigma = 0, where lambda and h are infinite; its weights are the limits 0, 1 and 0.
    """
    alpha, sigma, half_log_snr = scales(schedule.alphas_cumprod[t])
    h = np.diff(half_log_snr)
    x_weight = np.append(sigma[1:] / sigma[:-1], 0)
    x0_weight = np.append(-alpha[1:] * np.expm1(-h), 1)
    difference_weight = np.zeros_like(x0_weight)
    difference_weight[1:-1] = x0_weight[1:-1] * h[1:] / (2 * h[:-1])
    return x_weight, x0_weight, difference_weight


# The samplers by name, each with its table of timesteps.
SAMPLERS = {
    "lcm": (lcm, lcm_timesteps),
    "ddim": (ddim, ddim_timesteps),
    "dpm_solver_2m": (dpm_solver_2m, dpm_solver_timesteps),
    "dpm_solver_pp_2m": (dpm_solver_pp_2m, dpm_solver_timesteps),
}


def _trailing(num_steps: int, last: int) -> np.ndarray:
    # diffusers steps down by a rounded last / n and so may get one value too many, which is cut off here.
    return np.arange(last, 0, -last / num_steps)[:num_steps].round() - 1


def _check_steps(num_steps: int, largest: int, which: str) -> None:
    if not 1 <= num_steps <= largest:
        raise LcmError(f"{num_steps} sampling steps are out of range; choose 1 to {largest} ({which})")


def _checked(t: np.ndarray, last: int, steps_offset: int) -> np.ndarray:
    t = t.astype(np.int32)
    if t[0] >= last or t[-1] < 0:
        reached = f"timesteps {t[0]} to {t[-1]}, outside {last - 1} to 0"
        raise LcmError(f"steps_offset={steps_offset} gives {reached}; use an offset that stays inside")
    return t


def _unknown_spacing(spacing: str) -> str:
    return f"unknown timestep spacing {spacing!r}; choose one of {', '.join(SPACINGS)}"


def _result(scanned, return_trajectory: bool) -> Sampled:
    x, trajectory = scanned
    return (x, trajectory) if return_trajectory else x
