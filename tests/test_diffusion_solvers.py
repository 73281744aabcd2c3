"""The solver grid, the jumps of each solver, and the ODE's endpoint against closed-form solutions for Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from lcm_jax.diffusion import guidance, schedule, solvers
from lcm_jax.errors import LcmError

CONFIG = {"_class_name": "LCMScheduler"}
SHAPE = (3, 4, 4, 2)
SECOND_ORDER = {"dpm_solver": "dpmsolver", "dpm_solver_pp": "dpmsolver++"}  # diffusers' names


@functools.cache
def table(prediction_type="epsilon"):
    return schedule.from_config({**CONFIG, "prediction_type": prediction_type})


def gaussian_model(noise_schedule, mean, std):
    """The exact network for data ~ N(mean, std^2): E[x0 | z_t] = mean + alpha std^2 / var_t (z_t - alpha mean)."""

    def model(z_t, t):
        alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (z_t - alpha * mean)
        if noise_schedule.prediction_type == "sample":
            return x0
        eps = (z_t - alpha * x0) / sigma
        return eps if noise_schedule.prediction_type == "epsilon" else alpha * eps - sigma * x0

    return model


def exact_flow(noise_schedule, mean, std, z, t_start, t_end):
    """Solution of the probability-flow ODE for that data: (z_t - alpha_t mean) / sqrt(var_t) is constant."""
    abar = noise_schedule.alphas_cumprod.astype(np.float64)[[t_start, t_end]]
    alpha, deviation = np.sqrt(abar), np.sqrt(abar * std**2 + 1 - abar)
    return alpha[1] * mean + deviation[1] / deviation[0] * (np.asarray(z, np.float64) - alpha[0] * mean)


def start(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def test_grids():
    grid = solvers.solver_grid(table(), 50)
    assert grid.num_steps == 50 and grid.skip == 20
    assert grid.timesteps.tolist() == list(range(19, 1000, 20))
    assert grid.prev_timesteps.tolist() == [0, *range(19, 980, 20)]
    parity.close(grid.alphas_cumprod_prev[:2], [0.99915, 0.982244], atol=1e-6)
    np.testing.assert_array_equal(grid.alphas_cumprod_prev, table().alphas_cumprod[grid.prev_timesteps])
    grid = solvers.solver_grid(table(), 30)  # does not divide T
    assert (grid.timesteps[:2].tolist(), int(grid.timesteps[-1]), grid.skip) == ([32, 65], 989, 33)
    assert grid.prev_timesteps[:3].tolist() == [0, 32, 65]
    assert solvers.solver_grid(table(), 1).timesteps.tolist() == [999]
    assert solvers.solver_grid(table(), 1000).timesteps[:2].tolist() == [0, 1]


def test_grids_that_do_not_exist():
    for num_steps in (0, -1, 1001):
        with pytest.raises(LcmError, match=f"solver steps {num_steps} .* choose 1 to 1000"):
            solvers.solver_grid(table(), num_steps)
    with pytest.raises(LcmError, match="unknown solver 'euler'; choose one of ddim, dpm_solver, dpm_solver_pp"):
        solvers.solver_grid(table(), 50, "euler")
    snr_0 = schedule.from_config({**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    with pytest.raises(LcmError, match="cannot start at t=999, .* use 'dpm_solver_pp'"):
        solvers.solver_grid(snr_0, 50, "dpm_solver")


@pytest.mark.parametrize("num_steps", (1, 20, 30, 50, 200, 1000))
def test_midpoints_are_within_the_jump_near_its_middle(num_steps):
    grid = solvers.solver_grid(table(), num_steps, "dpm_solver_pp")
    start, end, s = grid.timesteps, grid.prev_timesteps, grid.midpoints.timesteps
    assert np.all((end <= s) & ((s < start) | (start == end)))
    # No other timestep within the jump is nearer to its middle, by log-SNR in float32.
    snr = np.log(table().alphas_cumprod) - np.log1p(-table().alphas_cumprod)
    off = np.abs(snr[s] - (snr[start] + snr[end]) / 2)
    for step in (-1, 1):
        other = np.clip(s + step, end, np.maximum(start - 1, end))
        assert np.all(np.abs(snr[other] - (snr[start] + snr[end]) / 2) >= off - 1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@pytest.mark.filterwarnings("ignore:`algorithm_types=dpmsolver` is deprecated:FutureWarning")
@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize(
    ("num_steps", "points", "prediction_type"),
    ((50, (0, 17, 49), "epsilon"), (20, (0, 9, 19), "v_prediction"), (1000, (1, 500, 999), "sample")),
)
def test_second_order_jumps_equal_diffusers(num_steps, points, solver, prediction_type):
    """Two steps of DPMSolverSinglestepScheduler with the timesteps t_start, s, t_end."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    noise_schedule = table(prediction_type)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **betas, prediction_type=prediction_type, algorithm_type=SECOND_ORDER[solver], final_sigmas_type="sigma_min"
    )
    grid = solvers.solver_grid(noise_schedule, num_steps, solver)
    index, z = np.array(points), start()

    def model(xp, z, t):  # x0 = 0.8 z - 0.3 tanh(z + t / 300), as the network's output
        alpha, sigma = noise_schedule.alphas[t], noise_schedule.sigmas[t]
        x0 = 0.8 * z - 0.3 * xp.tanh(z + t / 300)
        eps = (z - alpha * x0) / sigma
        return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[prediction_type]

    got = [solvers.jump(functools.partial(model, jnp), z[k], noise_schedule, grid, i) for k, i in enumerate(index)]
    for k, i in enumerate(index):
        s = grid.midpoints.timesteps[i]
        scheduler.set_timesteps(timesteps=[grid.timesteps[i], s, grid.prev_timesteps[i]])
        x = torch.from_numpy(z[k])
        for t in (grid.timesteps[i], s):
            x = scheduler.step(model(torch, x, t), torch.tensor(t), x).prev_sample
        parity.close(got[k], x, atol=1e-4, rtol=1e-5)


def test_jumps_of_a_batch_are_those_of_its_rows():
    grid = solvers.solver_grid(table(), 20, "dpm_solver")
    model = gaussian_model(table(), 0.3, 0.5)

    def rows(z, t):
        return jax.vmap(model)(z, jnp.broadcast_to(t, z.shape[:1]))

    index, z = np.array([0, 7, 19]), start()
    got = solvers.jump(rows, z, table(), grid, index)
    want = [solvers.jump(rows, z[None, k], table(), grid, index[None, k])[0] for k in range(3)]
    parity.close(got, np.stack(want), atol=1e-6)


def test_jump_out_of_zero_terminal_snr():
    """There lambda = -infinity; the weights of DPM-Solver++ are still finite, and it is better than DDIM."""
    config = {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    noise_schedule = schedule.from_config(config)
    model, z = gaussian_model(noise_schedule, 0.3, 0.5), start()
    want = exact_flow(noise_schedule, 0.3, 0.5, z, 999, 949)
    grids = (solvers.solver_grid(noise_schedule, 20, solver) for solver in ("ddim", "dpm_solver_pp"))
    first, second = (np.abs(solvers.jump(model, z, noise_schedule, grid, 19) - want).max() for grid in grids)
    assert second < first < 1e-3, (first, second)


def test_ddim_jump_of_the_true_pair_is_exact():
    grid = solvers.solver_grid(table(), 50)
    x0, eps = start(1), start(2)
    index = np.array([0, 17, 49])
    got = solvers.ddim_jump(x0, eps, grid.alphas_cumprod_prev[index])
    want = schedule.add_noise(table(), x0, eps, grid.prev_timesteps[index])
    parity.close(got, want, atol=1e-6)


def test_guiding_x0_and_eps_is_the_paper_s_guided_increment():
    """z + (1+w) Psi(c) - w Psi(0), with Psi = (a_n/a_m - 1) z - (a_n s_m/a_m - s_n) eps (LCM-LoRA, algorithm 1)."""
    grid = solvers.solver_grid(table(), 50)
    i, w = np.array([0, 17, 49]), np.array([0.0, 7.5, 14.0], np.float32)
    t, z_t, cond, uncond = grid.timesteps[i], start(1), start(2), start(3)
    x0, eps = (
        guidance.classifier_free(f(table(), cond, z_t, t), f(table(), uncond, z_t, t), w)
        for f in (schedule.to_x0, schedule.to_eps)
    )
    got = solvers.ddim_jump(x0, eps, grid.alphas_cumprod_prev[i])
    abar = table().alphas_cumprod.astype(np.float64)
    (a_m, s_m), (a_n, s_n) = (
        (np.sqrt(u)[:, None, None, None], np.sqrt(1 - u)[:, None, None, None])
        for u in (abar[t], abar[grid.prev_timesteps[i]])
    )
    psi = [(a_n / a_m - 1) * z_t - (a_n * s_m / a_m - s_n) * e for e in (cond, uncond)]
    w = w[:, None, None, None]
    # x0 is about 14.6 w before the jump scales it down, hence the looser bound.
    parity.close(got, z_t + (1 + w) * psi[0] - w * psi[1], atol=1e-4)


@pytest.mark.parametrize(
    ("num_steps", "prediction_type"), ((50, "epsilon"), (30, "sample"), (1, "v_prediction"), (1, "epsilon"))
)
def test_endpoint_is_exact_if_all_data_is_one_image(num_steps, prediction_type):
    """Then eps is constant along the ODE, and DDIM makes no error on any grid."""
    noise_schedule, image = table(prediction_type), start(5)
    z = start()
    got = solvers.ode_endpoint(gaussian_model(noise_schedule, image, 0.0), z, noise_schedule, num_steps)
    first = solvers.solver_grid(noise_schedule, num_steps).timesteps[-1]
    parity.close(got, exact_flow(noise_schedule, image, 0.0, z, first, 0), atol=3e-5)


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_endpoint_converges_to_the_exact_flow_for_gaussian_data(prediction_type):
    noise_schedule, z = table(prediction_type), start()
    model = gaussian_model(noise_schedule, 0.3, 0.5)
    want = exact_flow(noise_schedule, 0.3, 0.5, z, 999, 0)
    errors = [np.abs(solvers.ode_endpoint(model, z, noise_schedule, n) - want).max() for n in (25, 50, 100, 200)]
    assert errors[3] < 0.02
    ratios = np.divide(errors[:-1], errors[1:])
    assert np.all((ratios > 1.6) & (ratios < 2.5)), errors  # a method of first order


@pytest.mark.parametrize(("solver", "prediction_type"), (("dpm_solver", "epsilon"), ("dpm_solver_pp", "v_prediction")))
def test_order_of_convergence(solver, prediction_type):
    """Down to t = 199 half the skip makes a quarter of the error; below, the steps in lambda do not halve with it."""
    noise_schedule, z = table(prediction_type), start()
    model = gaussian_model(noise_schedule, 0.3, 0.5)

    def error(num_steps, solver):
        grid = solvers.solver_grid(noise_schedule, num_steps, solver)
        run = jax.jit(
            functools.partial(
                solvers.ode_endpoint,
                model,
                schedule=noise_schedule,
                num_steps=num_steps,
                return_trajectory=True,
                solver=solver,
            )
        )
        jumps = np.count_nonzero(grid.prev_timesteps >= 199)
        assert grid.prev_timesteps[-jumps] == 199
        return np.abs(run(z)[1][jumps - 1] - exact_flow(noise_schedule, 0.3, 0.5, z, 999, 199)).max()

    errors = [error(n, solver) for n in (25, 50, 100)]
    ratios = np.divide(errors[:-1], errors[1:])
    assert np.all((ratios > 3.5) & (ratios < 4.5)), errors  # a method of second order
    assert errors[1] < error(50, "ddim") / 10


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_the_finest_grid_solves_the_ode(solver):
    """N = 1000, a skip of 1: there is no timestep within a jump, and the last jump goes from 0 to 0."""
    noise_schedule, z = table(), start()
    model = gaussian_model(noise_schedule, 0.3, 0.5)
    got = solvers.ode_endpoint(model, z, noise_schedule, 1000, solver=solver)
    error = np.abs(got - exact_flow(noise_schedule, 0.3, 0.5, z, 999, 0)).max()
    assert error < (5e-3 if solver == "ddim" else 5e-4), error
    grid = solvers.solver_grid(noise_schedule, 1000, solver)
    parity.close(solvers.jump(model, z, noise_schedule, grid, 0), z, atol=1e-6)


@pytest.mark.parametrize(("solver", "calls"), (("ddim", 1), ("dpm_solver", 2), ("dpm_solver_pp", 2)))
def test_endpoint_is_one_scan(solver, calls):
    run = functools.partial(solvers.ode_endpoint, lambda z, t: jnp.sin(z), schedule=table(), solver=solver)
    program = str(jax.make_jaxpr(run)(start()))
    assert program.count("scan[") == 1 and program.count("sin ") == calls
