"""The phased map: its edges, its jump, and what it learns of Gaussian data, where every answer has a closed form.

For data N(0, lam^2) the exact denoiser is linear, x0 = alpha lam^2 / V z with V = alpha^2 lam^2 + sigma^2, and DDIM
from t to s multiplies z by a(t -> s) = (alpha_s alpha_t lam^2 + sigma_s sigma_t) / V_t. The student is a table of such
factors. Guidance keeps all of it linear.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import linen as nn

from lcm_jax.diffusion import consistency, phases, samplers, schedule, solvers, timesteps
from lcm_jax.distill import lcm, objective
from lcm_jax.errors import LcmError

T = 1000
TABLES = {
    kind: schedule.from_config({"_class_name": "LCMScheduler", "prediction_type": kind})
    for kind in schedule.PREDICTION_TYPES
}
SCHEDULE = TABLES["sample"]
ALPHA, SIGMA = (np.float64(x) for x in (SCHEDULE.alphas, SCHEDULE.sigmas))


class Linear(nn.Module):
    """x0 = factor[t] z, or null[t] z if the text is 0."""

    time_cond_proj_dim: int | None = None

    @nn.compact
    def __call__(self, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        factor, null = (self.param(name, nn.initializers.zeros, (T,)) for name in ("factor", "null"))
        return jnp.where(text[:, 0, 0] == 0, null[t], factor[t])[:, None, None, None] * z


def denoiser(lam: float, w: float = 0.0) -> np.ndarray:
    """Factors [T] of x0 for data N(0, lam^2), guided by w away from N(0, 1)."""
    return (1 + w) * ALPHA * lam**2 / (ALPHA**2 * lam**2 + SIGMA**2) - w * ALPHA


def weight(t, s) -> np.ndarray:
    """Of x0 in z_s = weight x0 + sigma_s / sigma_t z_t, the jump from t to s."""
    return ALPHA[s] - SIGMA[s] * ALPHA[t] / SIGMA[t]


def ddim_factor(exact: np.ndarray, t, s) -> np.ndarray:
    """a(t -> s)."""
    return weight(t, s) * exact[t] + SIGMA[s] / SIGMA[t]


def exact_student(exact: np.ndarray, grid: solvers.SolverGrid, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(factor [T] of x0, total [N]): the student whose jumps are the solver's whole way from grid points to `ends`."""
    factor, total = np.zeros(T), np.ones(grid.num_steps)
    for i, (t, below, s) in enumerate(zip(grid.timesteps, grid.prev_timesteps, ends, strict=True)):
        total[i] = ddim_factor(exact, t, below) * (1 if below == s else total[i - 1])
        factor[t] = (total[i] - SIGMA[s] / SIGMA[t]) / weight(t, s)
    return factor, total


def make_case(lam: float, count: int, num_steps: int = 50, size: int = 4, w: float = 0.0):
    """(problem, exact student's params, frozen, batch, draws of every grid point once)."""
    grid = solvers.solver_grid(SCHEDULE, num_steps)
    ends = phases.ends(SCHEDULE, grid, [count])
    problem = objective.Problem(
        student=Linear(),
        teacher=Linear(),
        schedule=SCHEDULE,
        grid=grid,
        distance=objective.l2,
        w_min=w,
        w_max=w,
        scaling_factor=1.0,
        ends=ends,
    )
    shape = num_steps, size, size, 4
    text = np.ones((num_steps, 1, 1), np.float32)
    batch = {"mean": np.zeros(shape, np.float32), "logvar": np.full(shape, 2 * np.log(lam), np.float32)}
    teacher = {"factor": jnp.float32(denoiser(lam)), "null": jnp.float32(ALPHA)}
    frozen = objective.Frozen(teacher=teacher, null={"encoder_hidden_states": 0 * text[:1]})
    draws = objective.draw(problem, jax.random.key(0), shape)
    index = np.arange(num_steps)
    draws = draws.replace(index=index, end=ends[0][index])
    params = network(exact_student(denoiser(lam, w), grid, ends[0])[0])
    return problem, params, frozen, batch | {"cond": {"encoder_hidden_states": text}}, draws


def network(factor: np.ndarray) -> dict[str, jax.Array]:
    return {"factor": jnp.float32(factor), "null": jnp.zeros(T)}


@pytest.mark.parametrize(
    ("num_steps", "count", "want"),
    [
        (50, 1, [0]),
        (50, 2, [499, 0]),
        (50, 4, [759, 499, 259, 0]),
        (40, 4, [749, 499, 249, 0]),
        (40, 8, [874, 749, 624, 499, 374, 249, 124, 0]),
    ],
)
def test_edges_are_the_samplers_timesteps(num_steps, count, want):
    grid = solvers.solver_grid(SCHEDULE, num_steps)
    assert phases.edges(SCHEDULE, grid, count).tolist() == want
    ends = phases.ends(SCHEDULE, grid, [count])[0]
    assert sorted({*ends.tolist()}, reverse=True) == want
    assert (ends <= grid.prev_timesteps).all() and ends.dtype == np.int32
    for t, below, end in zip(grid.timesteps, grid.prev_timesteps, ends, strict=True):
        assert not [edge for edge in want if end < edge <= below], (t, end)  # the nearest edge below
    # Where the sampler calls the network, the student's step ends at the sampler's next timestep.
    visited = timesteps.lcm(count, T, num_steps)
    at = {int(t): int(end) for t, end in zip(grid.timesteps, ends, strict=True)}
    assert [at[int(t)] for t in visited] == want


def test_more_phases_than_grid_points_are_refused():
    grid = solvers.solver_grid(SCHEDULE, 8)
    assert phases.ends(SCHEDULE, grid, [8, 1]).tolist() == [grid.prev_timesteps.tolist(), [0] * 8]
    with pytest.raises(LcmError, match="9"):
        phases.edges(SCHEDULE, grid, 9)


@pytest.mark.parametrize("kind", schedule.PREDICTION_TYPES)
def test_a_jump_keeps_x0_and_noise_and_is_the_identity_in_place(kind):
    """The output of a network that knows z and eps leads to alpha_s z + sigma_s eps for every prediction type."""
    rng, table = np.random.default_rng(0), TABLES[kind]
    z, eps = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    t, s = np.array([999, 500, 259]), np.array([759, 499, 259])
    z_t = schedule.add_noise(table, z, eps, t)
    output = {"epsilon": eps, "sample": z, "v_prediction": schedule.velocity(table, z, eps, t)}[kind]
    got = phases.jump(table, output, z_t, t, s)
    parity.close(got, schedule.add_noise(table, z, eps, s), atol=1e-5)
    assert np.array_equal(got[2], z_t[2]) and not np.array_equal(got[1], z_t[1])
    assert np.isfinite(jax.grad(lambda o: phases.jump(table, o, z_t, t, s).sum())(output)).all()


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_the_exact_student_has_no_loss_and_a_wrong_factor_is_seen_twice(lam):
    """PCM's fixed point. A factor that is wrong at one grid point changes that point's loss and the next one's."""
    problem, params, frozen, batch, draws = make_case(lam, 4)
    loss = jax.jit(lambda p, target: lcm.lcd_loss(problem, p, target, frozen, batch, draws))
    assert loss(params, params).max() < 1e-11
    t = problem.grid.timesteps
    wrong = params | {"factor": params["factor"].at[t[20]].add(0.05)}
    seen = np.flatnonzero(loss(wrong, wrong) > 1e-9)
    assert seen.tolist() == [20, 21] and problem.ends[0][20] == problem.ends[0][21]
    last = int(np.flatnonzero(np.diff(problem.ends[0]))[0])  # of the lowest phase: the next phase does not read it
    wrong = params | {"factor": params["factor"].at[t[last]].add(0.05)}
    assert np.flatnonzero(loss(wrong, wrong) > 1e-9).tolist() == [last]


@pytest.mark.parametrize(("lam", "want"), [(0.3, 0.27637146), (1.0, 0.97290238)])
def test_the_product_over_phases_is_the_solvers_path_for_every_number_of_phases(lam, want):
    grid = solvers.solver_grid(SCHEDULE, 50)
    for count in (1, 2, 4, 8, 50):
        ends = phases.ends(SCHEDULE, grid, [count])[0]
        total = dict(zip(grid.timesteps.tolist(), exact_student(denoiser(lam), grid, ends)[1], strict=True))
        visited = timesteps.lcm(count, T, 50)
        parity.close(np.prod([total[int(t)] for t in visited]), want, rtol=1e-6)


def test_the_target_is_z_end_itself_at_the_start_of_a_phase():
    """There the target's weights do not matter, to the last bit; elsewhere they do."""
    problem, params, frozen, batch, draws = make_case(1.0, 4)
    loss = jax.jit(lambda target: lcm.lcd_loss(problem, params, target, frozen, batch, draws))
    one, other = loss(params), loss(params | {"factor": params["factor"] + 0.3})
    starts = problem.ends[0] == problem.grid.prev_timesteps
    assert starts.sum() == 4
    np.testing.assert_array_equal(np.asarray(one == other), starts)


def test_as_many_phases_as_points_is_plain_regression_on_the_teacher():
    problem, params, frozen, batch, draws = make_case(1.0, 50)
    loss = jax.jit(lambda target: lcm.lcd_loss(problem, params, target, frozen, batch, draws))
    np.testing.assert_array_equal(loss(params), loss(params | {"factor": params["factor"] + 0.3}))
    assert loss(params).max() < 1e-11


def test_fine_tuning_on_gaussian_data_has_the_same_optimum():
    """LCF's loss does not vanish there, its gradient does, in the mean over the data."""
    problem, params, frozen, batch, draws = make_case(1.0, 4, size=96)
    gradient = jax.jit(jax.grad(lambda p: lcm.lcf_loss(problem, p, params, frozen, batch, draws).sum()))
    at_grid = problem.grid.timesteps
    there, off = (
        gradient(params)["factor"][at_grid],
        gradient(params | {"factor": params["factor"] + 0.1})["factor"][at_grid],
    )
    assert lcm.lcf_loss(problem, params, params, frozen, batch, draws).min() > 1e-9
    ratio = np.abs(there) / np.abs(off)
    assert np.median(ratio) < 0.1, ratio
    assert (np.asarray(off)[1:] > 0).all()


def test_stages_change_where_steps_end_and_nothing_else():
    problem, *_, draws = make_case(1.0, 4)
    problem = dataclasses.replace(problem, ends=phases.ends(SCHEDULE, problem.grid, [4, 2, 1]), stages=(10, 20))
    draw = jax.jit(lambda step: objective.draw(problem, jax.random.key(1), (64, 2, 2, 1), step))
    found = {step: draw(step) for step in (0, 9, 10, 19, 20, 99)}
    for step, row in ((0, 0), (9, 0), (10, 1), (19, 1), (20, 2), (99, 2)):
        np.testing.assert_array_equal(found[step].end, problem.ends[row][found[step].index])
    plain = dataclasses.replace(problem, ends=None, stages=())
    same = objective.draw(plain, jax.random.key(1), (64, 2, 2, 1))
    assert same.end is None
    for name in ("posterior", "noise", "index", "w"):
        np.testing.assert_array_equal(getattr(found[99], name), getattr(same, name))


def best_for_all(exact: np.ndarray, grid: solvers.SolverGrid, ends_from) -> np.ndarray:
    """Factors [T] of x0 that come nearest to the jumps to all of `ends_from(i)` at once, for a network that does not
    know which of them is asked for."""
    factor = np.zeros(T)
    for i, (t, below) in enumerate(zip(grid.timesteps, grid.prev_timesteps, strict=True)):
        s = ends_from(i)
        goal = ddim_factor(exact, t, below) * (weight(below, s) * factor[below] + SIGMA[s] / SIGMA[below])
        factor[t] = np.sum(weight(t, s) * (goal - SIGMA[s] / SIGMA[t])) / np.sum(weight(t, s) ** 2)
    return factor


@pytest.mark.parametrize(("lam", "want"), [(0.3, [0.140, 0.671, 0.904]), (1.0, [0.666, 1.078, 1.151])])
def test_one_output_for_jumps_of_every_length_fits_none(lam, want):
    """TCD without the end as an input: its optimum has a loss, and is off the solver's path. With one end for each grid
    point it is the phased map's."""
    problem, _, frozen, batch, draws = make_case(lam, 4)
    grid, exact = problem.grid, denoiser(lam)
    factor = best_for_all(exact, grid, lambda i: np.arange(grid.prev_timesteps[i] + 1))
    s = np.array([0, 259, 499])
    parity.close(weight(999, s) * factor[999] + SIGMA[s] / SIGMA[999], want, atol=6e-4)
    for i in (5, 49):
        s = np.arange(grid.prev_timesteps[i] + 1)
        every = jax.tree.map(lambda x, s=s: np.broadcast_to(x[:1], (len(s), *x.shape[1:])), batch)
        one = draws.replace(index=np.full_like(s, i), end=s, w=np.zeros(len(s), np.float32))
        one = one.replace(
            **{k: np.broadcast_to(getattr(draws, k)[:1], (len(s), 4, 4, 4)) for k in ("posterior", "noise")}
        )

        @jax.jit
        def loss(x, every=every, one=one, i=i):
            there = network(factor)
            return lcm.lcd_loss(
                problem, there | {"factor": there["factor"].at[grid.timesteps[i]].set(x)}, there, frozen, every, one
            ).mean()

        best = np.float32(factor[grid.timesteps[i]])
        assert abs(jax.grad(loss)(best)) < 1e-3 * abs(jax.grad(loss)(best + 0.05))
        assert 1e-7 < loss(best) < min(loss(best - 0.05), loss(best + 0.05))
    ends = problem.ends[0]
    parity.close(best_for_all(exact, grid, lambda i: ends[i : i + 1]), exact_student(exact, grid, ends)[0], rtol=1e-9)


def spread(sampler, factor: np.ndarray, steps: int) -> float:
    """Standard deviation of what a linear sampler makes of standard normal noise: the norm of its coefficients."""
    start, *noise = np.eye(steps, dtype=np.float32).reshape(steps, steps, 1, 1, 1)
    table = jnp.float32(factor)
    visited = timesteps.lcm(steps, T, 50)
    z = sampler(lambda x, t: table[t] * x, start, np.reshape(noise, (steps - 1, steps, 1, 1, 1)), SCHEDULE, visited)
    return float(np.linalg.norm(z))


def test_a_network_that_does_not_know_the_end_overshoots_with_more_steps():
    grid = solvers.solver_grid(SCHEDULE, 50)
    factor = best_for_all(denoiser(1.0), grid, lambda i: np.arange(grid.prev_timesteps[i] + 1))
    parity.close([spread(samplers.tcd, factor, n) for n in (1, 2, 4, 8)], [0.67, 0.97, 1.19, 1.31], atol=6e-3)


@pytest.mark.parametrize(("w", "want"), [(2.0, [0.491, 0.510, 0.530, 0.539]), (6.5, [0.171, 0.216, 0.291, 0.328])])
def test_noise_between_steps_undoes_guidance_and_phases_do_not(w, want):
    """Data N(0, 0.8^2), guided away from N(0, 1). The phased map has the spread of the solver's path for every number
    of phases, in as many steps; LCM's sampler widens it with every step, though its network is without error, too."""
    grid, exact, steps = solvers.solver_grid(SCHEDULE, 50), denoiser(0.8, w), (1, 2, 4, 8)
    path = np.prod(ddim_factor(exact, grid.timesteps, grid.prev_timesteps))
    parity.close(path, want[0], atol=6e-4)
    for n in steps:
        problem, params, frozen, batch, draws = make_case(0.8, n, w=w)
        assert lcm.lcd_loss(problem, params, params, frozen, batch, draws).max() < 1e-10
        parity.close(spread(samplers.tcd, params["factor"], n), path, rtol=2e-4)
    t = grid.timesteps
    c_skip, c_out = (np.asarray(c, np.float64) for c in consistency.boundary_scalings(t))
    factor = np.zeros(T)
    factor[t] = (exact_student(exact, grid, np.zeros_like(t))[1] - c_skip) / c_out
    origin, there = dataclasses.replace(problem, ends=None), network(factor)
    assert lcm.lcd_loss(origin, there, there, frozen, batch, draws.replace(end=None)).max() < 1e-10
    parity.close([spread(samplers.lcm, factor, n) for n in steps], want, atol=6e-4)


@pytest.mark.parametrize("num_steps", [40, 50, 100])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_edges_beside_those_of_the_papers_code(num_steps, count):
    """It cuts the grid's indices into equal parts from below: the same if M divides N, else one grid point lower, where
    no sampler calls the network."""
    grid = solvers.solver_grid(SCHEDULE, num_steps)
    first = np.floor(np.linspace(0, num_steps, count, endpoint=False)).astype(int)
    theirs = grid.prev_timesteps[first][::-1]
    ours = phases.edges(SCHEDULE, grid, count)
    if num_steps % count == 0:
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert set((ours - theirs).tolist()) == {0, grid.skip}
