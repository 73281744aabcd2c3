"""Samplers: from noise to a latent in a fixed number of network calls, each loop one `lax.scan`.

    sampler(model, x, noise, schedule, timesteps, hook=None) -> latent, float32 [b h w c]

    model      (x [b h w c], t scalar int32) -> network output, already guided
    x          standard normal noise [b h w c]
    noise      fresh standard normal noise between steps, [steps - 1 b h w c] (more entries are not used); only `lcm`,
               `euler_ancestral`, and `tcd` with a gamma above 0 read it
    schedule   noise table and prediction type
    timesteps  int32 [steps] on the host, falling, from `diffusion.timesteps`; or the sampler's table of them, from
               `TABLES`, whose arrays may be traced: then one program serves all timesteps of one number
    hook       (x0, x, t, i) -> x after step i = 0, 1, ... (int32 scalar) at t, traced into the loop; x0 is the model's
               prediction of the clean latent

What only one sampler has is a keyword argument, to be bound before the call. `loop=stepwise` runs the same step
function one step at a time.

`lcm` is multistep consistency sampling (Luo et al. 2023, algorithm 3), over timesteps t_1 > t_2 > ... :

    x0 = f(x, t_i)            x = alpha_{t_{i+1}} x0 + sigma_{t_{i+1}} noise_i, or x0 after the last step

`tcd` (Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 2: strategic stochastic sampling) goes less
far and adds less, with t' = t_{i+1}, 0 after the last step, s = floor((1 - gamma) t'):

    y = alpha_s x0 + sigma_s eps          x = sqrt(abar_{t'} / abar_s) y + sqrt(1 - abar_{t'} / abar_s) noise_i

`euler` and `euler_ancestral` (Karras et al. 2022; the latter with fresh noise in each step but the last), in sigma /
alpha, end at the clean latent. They are, with r = (sigma_{i+1} / alpha_{i+1}) / (sigma_i / alpha_i),

    x_{i+1} = alpha_{i+1} x0 + sigma_{i+1} eps                                             euler
    x_{i+1} = alpha_{i+1} x0 + sigma_{i+1} (r eps + sqrt(1 - r^2) noise_i)                 euler_ancestral

`ddim` (Song et al. 2021, equation 12, eta = 0), `dpm_solver_2m` (Lu et al. 2022, "DPM-Solver", as a multistep method)
and `dpm_solver_pp_2m` (Lu et al. 2022, "DPM-Solver++", algorithm 2) are what the teacher is measured with. With p =
eps or, for DPM-Solver++, p = x0, lambda = ln(alpha / sigma), h_i = lambda_{i+1} - lambda_i and r_i = h_{i-1} / h_i:

    D_i     = p_i + (p_i - p_{i-1}) / (2 r_i)               (D_i = p_i at the first step, see each for the last)
    x_{i+1} = alpha_{i+1} / alpha_i x_i - sigma_{i+1} (e^{h_i} - 1) D_i                                DPM-Solver
    x_{i+1} = sigma_{i+1} / sigma_i x_i - alpha_{i+1} (e^{-h_i} - 1) D_i                               DPM-Solver++

Each equals diffusers' scheduler of its name, step by step: LCMScheduler, TCDScheduler (gamma is its eta),
EulerDiscreteScheduler and EulerAncestralDiscreteScheduler with trailing timesteps, DDIMScheduler, and
DPMSolverMultistepScheduler with its defaults; for DPM-Solver with algorithm_type "dpmsolver", which diffusers only
takes with final_sigmas_type "sigma_min". That includes their oddities: DDIM goes from t to t - T // n even if the
spacing puts the next timestep elsewhere (linspace, and n that does not divide T), one DDIM step with linspace spacing
starts at t = 0, and from 15 steps on DPM-Solver's last step is of order 2, before that of order 1.

Coefficients are tables made on the host, which the compiled loop only reads: `TABLES[name](schedule, timesteps)`, a
tuple of arrays [steps], t first. All arithmetic is float32.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import SIGMA_DATA, TIMESTEP_SCALING, boundary_scalings
from lcm_jax.diffusion.schedule import NoiseSchedule, eps_from_output, x0_from_output
from lcm_jax.diffusion.solvers import alpha_sigma_lambda
from lcm_jax.errors import LcmError

Model = Callable[[jax.Array, jax.Array], jax.Array]
Hook = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Carry = tuple[jax.Array, Any]  # x, and what the sampler remembers
Table = tuple[Any, ...]  # arrays [steps]: the timesteps, and the sampler's coefficients at them
# (carry, (i, t, ...)) -> (carry, x0)
Step = Callable[[Carry, Any], tuple[Carry, jax.Array]]

_LOWER_ORDER_FINAL = 15  # with fewer steps DPM-Solver's last is of order 1, for stability (diffusers' number)


def scan(step: Step, carry: Carry, rows: Any, unrolled: int = 0) -> jax.Array:
    """All steps as one compiled loop, or up to `unrolled` of them one after the other -> the latent."""
    steps = len(rows[0])
    unroll = steps if steps <= unrolled else 1
    return jax.lax.scan(lambda carry, row: (step(carry, row)[0], None), carry, rows, unroll=unroll)[0][0]


def stepwise(step: Step, carry: Carry, rows: Any) -> Iterator[tuple[jax.Array, jax.Array]]:
    """One compiled step at a time: yields (x0, x) after each, for previews."""
    step = jax.jit(step)
    for i in range(len(rows[0])):
        carry, x0 = step(carry, jax.tree.map(lambda column: column[i], rows))  # noqa: B023 (used at once)
        yield x0, carry[0]


def lcm_table(schedule: NoiseSchedule, timesteps: np.ndarray) -> Table:
    """alpha and sigma at each timestep and at the next one; after the last step 1 and 0."""
    t = np.asarray(timesteps)
    following = np.append(schedule.alphas[t[1:]], np.float32(1)), np.append(schedule.sigmas[t[1:]], np.float32(0))
    return (t, schedule.alphas[t], schedule.sigmas[t], *following)


def lcm(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    timestep_scaling: float = TIMESTEP_SCALING,
    sigma_data: float = SIGMA_DATA,
    loop: Callable = scan,
):
    """Multistep consistency sampling; the module's docstring has the arguments.

    timestep_scaling, sigma_data: of the boundary scalings; must be those of training.

    Raises:
      LcmError: noise of the wrong shape.
    """
    rows, x = timesteps if isinstance(timesteps, tuple) else lcm_table(schedule, timesteps), jnp.asarray(x, jnp.float32)
    rows = (*rows, _between(x, noise, len(rows[0])))

    def step(x, _, row):
        t, alpha, sigma, next_alpha, next_sigma, xi = row
        c_skip, c_out = boundary_scalings(t, sigma_data, timestep_scaling)
        x0 = c_skip * x + c_out * x0_from_output(schedule.prediction_type, model(x, t), x, alpha, sigma)
        return next_alpha * x0 + next_sigma * xi, (), x0

    return _run(step, x, (), rows, hook, loop)


def tcd_table(schedule: NoiseSchedule, timesteps: np.ndarray, *, gamma: float = 0.0) -> Table:
    """alpha and sigma at each timestep; the weights of x0, eps and fresh noise in the next x."""
    t = np.asarray(timesteps)
    following = np.append(t[1:], 0)
    s = np.floor((1 - gamma) * following).astype(np.int64)
    ratio = schedule.alphas_cumprod[following] / schedule.alphas_cumprod[s]
    kept, fresh = np.sqrt(ratio), np.sqrt(np.maximum(np.float32(1) - ratio, 0))
    return (t, schedule.alphas[t], schedule.sigmas[t], kept * schedule.alphas[s], kept * schedule.sigmas[s], fresh)


def tcd(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    gamma: float = 0.0,
    loop: Callable = scan,
):
    """Strategic stochastic sampling; the module's docstring has the formula.

    gamma: 0 is deterministic: DDIM along the timesteps, ending at abar_0; 1 goes to t = 0 and back, as `lcm` does.

    Raises:
      LcmError: noise of the wrong shape, if gamma is not 0.
    """
    rows = timesteps if isinstance(timesteps, tuple) else tcd_table(schedule, timesteps, gamma=gamma)
    return _weighted(model, x, noise, schedule, rows if gamma else rows[:-1], hook, loop)


def euler(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    loop: Callable = scan,
):
    """Euler's method in sigma / alpha: DDIM from each timestep to the next one, the last step to abar = 1."""
    rows = timesteps if isinstance(timesteps, tuple) else lcm_table(schedule, timesteps)
    return _weighted(model, x, None, schedule, rows, hook, loop)


def euler_ancestral_table(schedule: NoiseSchedule, timesteps: np.ndarray) -> Table:
    """alpha and sigma at each timestep; the weights of x0, eps and fresh noise in the next x."""
    t, alpha, sigma, next_alpha, next_sigma = lcm_table(schedule, timesteps)
    # sigma / alpha at the next timestep as a share of that here, which zero terminal SNR makes infinite.
    share = np.asarray(alpha, np.float64) * next_sigma / (np.asarray(sigma, np.float64) * next_alpha)
    return (t, alpha, sigma, next_alpha, *((next_sigma * x).astype(np.float32) for x in (share, np.sqrt(1 - share**2))))


def euler_ancestral(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    loop: Callable = scan,
):
    """Euler's method that goes further down, and back up by fresh noise; the module's docstring has the formula.

    Raises:
      LcmError: noise of the wrong shape.
    """
    rows = timesteps if isinstance(timesteps, tuple) else euler_ancestral_table(schedule, timesteps)
    return _weighted(model, x, noise, schedule, rows, hook, loop)


def _weighted(model: Model, x, noise, schedule: NoiseSchedule, rows: Table, hook: Hook | None, loop: Callable):
    """The samplers whose next x is a sum of x0 and eps, and of fresh noise if `rows` has its weights."""
    x = jnp.asarray(x, jnp.float32)
    if len(rows) > 5:
        rows = (*rows, _between(x, noise, len(rows[0])))

    def step(x, _, row):
        t, alpha, sigma, x0_weight, eps_weight, *fresh = row
        output = model(x, t)
        x0 = x0_from_output(schedule.prediction_type, output, x, alpha, sigma)
        eps = eps_from_output(schedule.prediction_type, output, x, alpha, sigma)
        z = x0_weight * x0 + eps_weight * eps
        return (z + fresh[0] * fresh[1] if fresh else z), (), x0

    return _run(step, x, (), rows, hook, loop)


def _between(x: jax.Array, noise: Any, steps: int) -> jax.Array:
    """Noise added after each step, [steps b h w c]: none after the last. Raises LcmError for a wrong shape."""
    between = steps - 1
    noise = jnp.zeros((0, *x.shape), jnp.float32) if noise is None else jnp.asarray(noise, jnp.float32)[:between]
    if noise.shape != (between, *x.shape):
        raise LcmError(f"noise of shape {noise.shape} for {steps} steps; it must be {(between, *x.shape)}")
    return jnp.concatenate([noise, jnp.zeros((1, *x.shape), jnp.float32)])


def ddim_table(
    schedule: NoiseSchedule, timesteps: np.ndarray, *, stride: int | None = None, set_alpha_to_one: bool = True
) -> Table:
    """alpha and sigma at each timestep and at the one that its step goes to; the arguments are those of `ddim`."""
    t = np.asarray(timesteps)
    prev = t - (schedule.num_train_timesteps // len(t) if stride is None else stride)
    final = np.float32(1) if set_alpha_to_one else schedule.alphas_cumprod[0]
    abar_prev = np.where(prev >= 0, schedule.alphas_cumprod[np.maximum(prev, 0)], final)
    return (t, schedule.alphas[t], schedule.sigmas[t], np.sqrt(abar_prev), np.sqrt(np.float32(1) - abar_prev))


def ddim(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    stride: int | None = None,
    set_alpha_to_one: bool = True,
    loop: Callable = scan,
):
    """Deterministic DDIM (eta = 0), without clipping; the module's docstring has the arguments.

    stride: training timesteps of a step; None: T // steps, of timesteps that go all the way.
    set_alpha_to_one: whether the last step ends at abar = 1, or at abar_0 (as Stable Diffusion's configs have it).
    """
    rows = timesteps
    if not isinstance(timesteps, tuple):
        rows = ddim_table(schedule, timesteps, stride=stride, set_alpha_to_one=set_alpha_to_one)
    return _weighted(model, x, None, schedule, rows, hook, loop)  # equation 12


def dpm_solver_2m(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    loop: Callable = scan,
):
    """DPM-Solver(2M): order 2, midpoint, ending at abar_0, because eps says nothing of the way to sigma = 0.

    With fewer than 15 steps the last is of order 1.
    """
    rows = timesteps if isinstance(timesteps, tuple) else dpm_solver_table(schedule, timesteps)
    return _dpm_solver(eps_from_output, rows, model, x, schedule, hook, loop)


def dpm_solver_pp_2m(
    model: Model,
    x,
    noise,
    schedule: NoiseSchedule,
    timesteps: np.ndarray | Table,
    hook: Hook | None = None,
    *,
    loop: Callable = scan,
):
    """DPM-Solver++(2M): order 2, midpoint, ending at sigma = 0 by a step of order 1."""
    rows = timesteps if isinstance(timesteps, tuple) else dpm_solver_pp_table(schedule, timesteps)
    return _dpm_solver(x0_from_output, rows, model, x, schedule, hook, loop)


def _dpm_solver(predict: Callable, rows: Table, model: Model, x, schedule, hook: Hook | None, loop: Callable):
    """Both solvers' loop; predict: `eps_from_output` or `x0_from_output`."""

    def step(x, last, row):
        t, alpha, sigma, x_weight, weight, difference_weight = row
        output = model(x, t)
        x0 = x0_from_output(schedule.prediction_type, output, x, alpha, sigma)  # only a hook or `stepwise` reads it
        prediction = predict(schedule.prediction_type, output, x, alpha, sigma)
        return x_weight * x + weight * prediction + difference_weight * (prediction - last), prediction, x0

    x = jnp.asarray(x, jnp.float32)
    return _run(step, x, jnp.zeros_like(x), rows, hook, loop)


def _run(step: Callable, x, last: Any, rows: tuple, hook: Hook | None, loop: Callable):
    """`loop` over step(x, last, row) -> (x, last, x0), with the hook after each; rows begin with t."""

    def hooked(carry: Carry, row: Any) -> tuple[Carry, jax.Array]:
        i, *row = row
        x, last, x0 = step(*carry, row)
        return (x if hook is None else hook(x0, x, row[0], i), last), x0

    return loop(hooked, (jnp.asarray(x, jnp.float32), last), (np.arange(len(rows[0]), dtype=np.int32), *rows))


def dpm_solver_table(schedule: NoiseSchedule, timesteps: np.ndarray) -> Table:
    """alpha, sigma, and the weights of x, eps and eps - last eps in each step."""
    return _dpm_table(schedule, timesteps, _dpm_solver_coefficients)


def dpm_solver_pp_table(schedule: NoiseSchedule, timesteps: np.ndarray) -> Table:
    """alpha, sigma, and the weights of x, x0 and x0 - last x0 in each step."""
    return _dpm_table(schedule, timesteps, _dpm_solver_pp_coefficients)


def _dpm_table(schedule: NoiseSchedule, timesteps: np.ndarray, coefficients: Callable) -> Table:
    t = np.asarray(timesteps)
    alpha, sigma, _ = alpha_sigma_lambda(schedule.alphas_cumprod[t])
    return (t, *(column.astype(np.float32) for column in (alpha, sigma, *coefficients(schedule, t))))


def _dpm_solver_coefficients(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of x, eps and eps - last eps in each step, float64 [n] each; the last step goes to abar_0."""
    alpha, sigma, half_log_snr = alpha_sigma_lambda(schedule.alphas_cumprod[np.append(t, 0)])
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
    alpha, sigma, half_log_snr = alpha_sigma_lambda(schedule.alphas_cumprod[t])
    h = np.diff(half_log_snr)
    x_weight = np.append(sigma[1:] / sigma[:-1], 0)
    x0_weight = np.append(-alpha[1:] * np.expm1(-h), 1)
    difference_weight = np.zeros_like(x0_weight)
    difference_weight[1:-1] = x0_weight[1:-1] * h[1:] / (2 * h[:-1])
    return x_weight, x0_weight, difference_weight


SAMPLERS = {
    "lcm": lcm,
    "tcd": tcd,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "ddim": ddim,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}
TABLES = {
    "lcm": lcm_table,
    "tcd": tcd_table,
    "euler": lcm_table,
    "euler_ancestral": euler_ancestral_table,
    "ddim": ddim_table,
    "dpm_solver_2m": dpm_solver_table,
    "dpm_solver_pp_2m": dpm_solver_pp_table,
}
