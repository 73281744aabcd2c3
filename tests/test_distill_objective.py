"""LCD against an independent torch computation of Algorithm 1, against Gaussian data's exact flow, and its invariants.

The torch side is the paper's own form, not the one that the code under test computes: guided increments of the solver,
z + (1 + w) Psi(c) - w Psi(0), where Psi is a step of diffusers' DDIMScheduler; x0 from that scheduler, boundary
scalings from LCMScheduler, noising from DDPMScheduler; conditional and null text in two passes; all in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flax import linen as nn
from flax.traverse_util import flatten_dict

from lcm_jax.cost import flops
from lcm_jax.diffusion import denoiser, guidance, schedule, solvers
from lcm_jax.distill import lcm, objective
from lcm_jax.distill.student import student_of
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import names

SHAPE = (4, 8, 8, 4)
INDEX = np.array([0, 49, 17, 31], np.int32)
W = np.array([0.0, 13.7, 5.25, 8.0], np.float32)
W_DIM = 64
HUBER_C = 1e-3
SCALING = 0.18215
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TORCH_DISTANCES = {
    "l2": lambda p, q: ((p - q) ** 2).mean(),
    "huber": lambda p, q: ((p - q).square() + HUBER_C**2).sqrt().sub(HUBER_C).mean(),
}
DISTANCES = (objective.l2, functools.partial(objective.pseudo_huber, c=HUBER_C))


def torch_unets(family: str) -> dict[str, UNet2DConditionModel]:
    """Student, target and teacher with different weights; both students' cond_proj is not zero."""
    config = tiny.UNETS[family]
    with_w = config | {"time_cond_proj_dim": W_DIM}
    roles = {"student": (with_w, 11), "target": (with_w, 12), "teacher": (config, 13)}
    return {role: tiny.randomise(UNet2DConditionModel(**c), seed) for role, (c, seed) in roles.items()}


def inputs(family: str) -> tuple[dict, dict, dict]:
    """(batch, null text as [1 ...], draws) as numpy arrays; SDXL's null text is zero and has no sizes of its own."""
    rng = np.random.default_rng(5)

    def draw(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    width = tiny.UNETS[family]["cross_attention_dim"]
    batch = {"mean": 5 * draw(*SHAPE), "logvar": draw(*SHAPE), "cond": {"encoder_hidden_states": draw(4, 7, width)}}
    draws = {"posterior": draw(*SHAPE), "noise": draw(*SHAPE), "index": INDEX, "w": W}
    null = {"encoder_hidden_states": draw(1, 7, width)}
    if family == "sdxl":
        ids = [[512, 640, 0, 0, 512, 640], [1024, 1023, 8, 3, 1024, 1024], [64, 64, 0, 9, 64, 64], [1, 2, 3, 4, 5, 6]]
        batch["cond"] |= {"text_embeds": draw(4, 32), "time_ids": np.array(ids, np.float32)}
        null = {"encoder_hidden_states": 0 * draw(1, 7, width), "text_embeds": 0 * draw(1, 32)}
    return batch, null, draws


def make_problem(family: str, prediction_type: str = "epsilon", distance=objective.l2) -> objective.Problem:
    config = tiny.UNETS[family]
    noise_schedule = schedule.from_config(BETAS | {"prediction_type": prediction_type})
    return objective.Problem(
        student=unet_lib.from_config(config | {"time_cond_proj_dim": W_DIM}),
        teacher=unet_lib.from_config(config),
        schedule=noise_schedule,
        grid=solvers.solver_grid(noise_schedule, 50),
        distance=distance,
        w_min=3.0,
        w_max=14.0,
        scaling_factor=SCALING,
    )


def algorithm_1(models: dict, prediction_type: str, distance: str, batch, null, draws, embedding) -> torch.Tensor:
    """The paper's loss; arrays [b h w c] as numpy, models in float64, embedding of w given, None for w-free models."""
    args = dict(BETAS, prediction_type=prediction_type)
    ddpm = DDPMScheduler(**args)
    ddim = DDIMScheduler(**args, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)  # skips of 20; from t = 19 it goes to abar_0
    lcm = LCMScheduler(**args)

    def tensor(x) -> torch.Tensor:
        x = torch.from_numpy(np.array(x, np.float64))
        return x.permute(0, 3, 1, 2) if x.ndim == 4 else x

    def step(output, z, t):
        rows = [ddim.step(o[None], int(s), y[None], eta=0.0) for o, y, s in zip(output, z, t, strict=True)]
        return torch.cat([r.prev_sample for r in rows]), torch.cat([r.pred_original_sample for r in rows])

    def network(model, z, t, cond, e=None):
        cond = {key: tensor(value) for key, value in cond.items()}
        text = cond.pop("encoder_hidden_states")
        return model(z, t, text, timestep_cond=e, added_cond_kwargs=cond or None).sample

    def f(model, z, t):
        x0 = step(network(model, z, t, batch["cond"], embedding), z, t)[1]
        scalings = [lcm.get_scalings_for_boundary_condition_discrete(float(s)) for s in t]
        c_skip, c_out = (tensor(c)[:, None, None, None] for c in zip(*scalings, strict=True))
        return c_skip * z + c_out * x0

    embedding = None if embedding is None else tensor(embedding)
    posterior = DiagonalGaussianDistribution(torch.cat([tensor(batch["mean"]), tensor(batch["logvar"])], 1))
    z = SCALING * (posterior.mean + posterior.std * tensor(draws["posterior"]))
    t_start = 20 * (torch.from_numpy(draws["index"]).long() + 1) - 1
    t_end = torch.clamp(t_start - 20, min=0)
    z_start = ddpm.add_noise(z, tensor(draws["noise"]), t_start)
    with torch.no_grad():
        empty = {key: np.repeat(value, len(z), 0) for key, value in null.items()}
        psi, psi_null = (
            step(network(models["teacher"], z_start, t_start, c), z_start, t_start)[0] - z_start
            for c in (batch["cond"], batch["cond"] | empty)
        )
        w = tensor(draws["w"])[:, None, None, None]
        z_end = z_start + (1 + w) * psi - w * psi_null
        target = f(models["target"], z_end, t_end)
    return TORCH_DISTANCES[distance](f(models["student"], z_start, t_start), target)


@functools.cache
def float64_unets(family: str) -> dict[str, UNet2DConditionModel]:
    models = torch_unets(family)
    models["student"].requires_grad_(True)
    return {role: model.double() for role, model in models.items()}


@functools.cache
def jax_params(family: str) -> dict:
    p = make_problem(family)
    modules = {"student": p.student, "target": p.student, "teacher": p.teacher}
    return {role: names.from_torch(modules[role], model.state_dict()) for role, model in torch_unets(family).items()}


@functools.cache
def loss_and_gradient(family: str, prediction_type: str):
    """(theta, theta^-, teacher, null, batch, draws, index of distance) -> (loss, gradient), both distances in one."""

    def run(theta, target, teacher, null, batch, draws, distance):
        p = make_problem(family, prediction_type, lambda a, b: jax.lax.switch(distance, DISTANCES, a, b))
        frozen = objective.Frozen(teacher=teacher, null=null)
        loss = lambda theta: lcm.lcd_loss(p, theta, target, frozen, batch, draws).mean()  # noqa: E731
        return jax.value_and_grad(loss)(theta)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes time here


CASES = [("sd1", "epsilon", d) for d in ("l2", "huber")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("sd1", "v_prediction", "l2"), ("sd1", "v_prediction", "huber"), ("sdxl", "epsilon", "huber"))
]


@pytest.mark.parametrize(("family", "prediction_type", "distance"), CASES)
def test_loss_and_gradient_match_torch(family, prediction_type, distance):
    params = jax_params(family)
    batch, null, draws = inputs(family)
    embedding = np.asarray(guidance.w_embedding(W, W_DIM))
    models = float64_unets(family)
    models["student"].zero_grad()
    want_loss = algorithm_1(models, prediction_type, distance, batch, null, draws, embedding)
    want_loss.backward()
    gradient = {name: value.grad for name, value in models["student"].named_parameters()}
    want = flatten_dict(names.from_torch(make_problem(family).student, gradient, np.float64), sep="/")

    run = loss_and_gradient(family, prediction_type)
    which = list(TORCH_DISTANCES).index(distance)
    weights = params["student"], params["target"], params["teacher"]
    got_loss, got = run(*weights, null, batch, objective.Draws(**draws), which)
    got = flatten_dict(got, sep="/")
    assert got_loss.dtype == jnp.float32 and got_loss.shape == ()
    parity.close(got_loss, want_loss.item(), rtol=1e-4)
    assert got.keys() == want.keys() and "time_embedding/cond_proj/kernel" in want
    for key, value in want.items():
        parity.near(got[key], value, 1e-4, key)
    assert all(np.any(value) for value in want.values())


def test_a_fresh_student_equals_its_teacher_for_every_w():
    p, teacher = make_problem("sd1"), jax_params("sd1")["teacher"]
    student, params = student_of(p.teacher, teacher, W_DIM)
    batch, _, draws = inputs("sd1")
    t = p.grid.timesteps[INDEX]
    run = jax.jit(functools.partial(denoiser.student_output, student))
    want = jax.jit(functools.partial(denoiser.call, p.teacher))(teacher, draws["noise"], t, batch["cond"])
    got = [run(params, draws["noise"], t, batch["cond"], w) for w in (W, W + 3.3)]
    np.testing.assert_array_equal(got[0], got[1])
    parity.close(got[0], want, rtol=0, atol=1e-6)
    # ... and that is because the projection is zero, not because w is ignored.
    params["time_embedding"]["cond_proj"]["kernel"] += 0.1
    assert np.abs(run(params, draws["noise"], t, batch["cond"], W + 3.3) - want).max() > 1e-2


class Denoiser(nn.Module):
    """E[z | z_t] of data N(m, SPREAD^2), where the text is the mean m: text [b 1 c]. Output: x0."""

    schedule: schedule.NoiseSchedule
    time_cond_proj_dim: int | None = None

    @nn.compact
    def __call__(self, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        assert timestep_cond is None
        a, s, m = _scales(self.schedule, t, text)
        return m + a * SPREAD**2 / (a**2 * SPREAD**2 + s**2) * (z - a * m)


class ExactStudent(nn.Module):
    """The exact consistency function of guided `Denoiser`s, solved for the x0 from which f is computed.

    Guidance moves the mean, m + w (m - m_null), and leaves the spread. (z_t - alpha_t m) / radius_t is constant along
    the flow. w is read back from its embedding's slowest angle, 1000 w / 10000.
    """

    schedule: schedule.NoiseSchedule
    time_cond_proj_dim: int | None = W_DIM

    @nn.compact
    def __call__(self, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        null = self.param("null", nn.initializers.zeros, text.shape[-1:])
        half = W_DIM // 2
        w = 10.0 * jnp.arctan2(timestep_cond[:, half - 1], timestep_cond[:, -1])[:, None, None]
        text = text + w * (text - null)
        (a, s, m), (a0, s0, _) = _scales(self.schedule, t, text), _scales(self.schedule, jnp.zeros_like(t), text)
        radius, radius0 = jnp.hypot(a * SPREAD, s), jnp.hypot(a0 * SPREAD, s0)
        end = a0 * m + radius0 / radius * (z - a * m)
        u = 10.0 * jnp.maximum(t, 1e-3)[:, None, None, None]
        c_skip, c_out = 0.25 / (u**2 + 0.25), u / jnp.sqrt(u**2 + 0.25)
        return (end - c_skip * z) / c_out


SPREAD = 0.6


def _scales(noise_schedule, t, text):
    """alpha, sigma [b 1 1 1] and text [b 1 c] as [b 1 1 c]."""
    abar = jnp.asarray(noise_schedule.alphas_cumprod)[t][:, None, None, None]
    return jnp.sqrt(abar), jnp.sqrt(1 - abar), text[:, :, None, :]


def gaussian_case(num_steps: int, index=None, solver: str = "ddim") -> tuple:
    """(problem, params, frozen, batch, draws) on Gaussian data; by default t_start = 199, 399, .. 999."""
    noise_schedule = schedule.from_config(BETAS | {"prediction_type": "sample"})
    grid = solvers.solver_grid(noise_schedule, num_steps, solver)
    index = np.arange(1, 6) * 200 // grid.skip - 1 if index is None else index
    b = len(index)
    p = dataclasses.replace(
        make_problem("sd1", "sample"),
        student=ExactStudent(noise_schedule),
        teacher=Denoiser(noise_schedule),
        schedule=noise_schedule,
        grid=grid,
        scaling_factor=1.0,
    )
    rng = np.random.default_rng(3)
    null, means = rng.standard_normal((1, 1, 4)) * 0.1, rng.standard_normal((b, 1, 4)) * 0.1
    draws = objective.Draws(
        posterior=jnp.asarray(rng.standard_normal((b, 16, 16, 4)), jnp.float32),
        noise=jnp.asarray(rng.standard_normal((b, 16, 16, 4)), jnp.float32),
        index=jnp.asarray(index),
        w=jnp.linspace(1.0, 9.0, b),
    )
    batch = {
        "mean": jnp.broadcast_to(means[:, :, None, :], draws.noise.shape).astype(jnp.float32),
        "logvar": jnp.full(draws.noise.shape, 2 * np.log(SPREAD), jnp.float32),
        "cond": {"encoder_hidden_states": jnp.asarray(means, jnp.float32)},
    }
    null = jnp.asarray(null, jnp.float32)
    frozen = objective.Frozen(teacher={}, null={"encoder_hidden_states": null})
    return p, {"null": null[0, 0]}, frozen, batch, draws


def gaussian_loss(num_steps: int, solver: str = "ddim") -> float:
    p, params, frozen, batch, draws = gaussian_case(num_steps, solver=solver)
    return float(lcm.lcd_loss(p, params, params, frozen, batch, draws).mean())


def test_exact_consistency_function_leaves_only_the_solvers_error():
    """DDIM's local error is of second order in the skip, so halving the skip divides the mean square by 16."""
    values = {n: gaussian_loss(n) for n in (25, 50, 100)}
    assert values[50] < 1e-4
    for n in (25, 50):
        assert 10 < values[n] / values[2 * n] < 20, values


@pytest.mark.parametrize("solver", ("dpm_solver", "dpm_solver_pp"))
def test_solvers_of_second_order_leave_less(solver):
    """Their local error is of third order in the skip: halving it divides the mean square by 64, also with guidance."""
    values = {n: gaussian_loss(n, solver) for n in (10, 20, 50)}
    assert values[50] < gaussian_loss(50) / 50, values
    assert 40 < values[10] / values[20] < 160, values


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_skip_of_one(solver):
    """N = 1000: jumps of one timestep, at index 0 of none; the solver's error is almost zero."""
    p, params, frozen, batch, draws = gaussian_case(1000, np.array([0, 1, 499, 998, 999]), solver)
    loss = lcm.lcd_loss(p, params, params, frozen, batch, draws)
    parity.close(loss, np.zeros(5), atol=1e-6)


@pytest.mark.slow
def test_a_second_order_jump_costs_one_more_guided_teacher():
    """In FLOPs as `TrainingStep.model_flops` counts them for the utilisation."""
    p, (batch, null, draws) = make_problem("sd1"), inputs("sd1")
    key, text = jax.random.key(0), batch["cond"]["encoder_hidden_states"]
    t = np.zeros(4, np.int32)

    def shapes(unet, *more):
        return jax.eval_shape(lambda: unet.init(key, draws["noise"], t, text, *more))["params"]

    theta, teacher = shapes(p.student, np.zeros((4, W_DIM), np.float32)), shapes(p.teacher)

    def count(name):
        problem = dataclasses.replace(p, grid=solvers.solver_grid(p.schedule, 50, name))

        def loss(theta, teacher):
            frozen = objective.Frozen(teacher=teacher, null=null)
            return lcm.lcd_loss(problem, theta, theta, frozen, batch, objective.Draws(**draws)).mean()

        return flops.count(jax.value_and_grad(loss), theta, teacher)

    guided = functools.partial(denoiser.guided_output, p.teacher)
    once = flops.count(guided, teacher, draws["noise"], t, batch["cond"], null, draws["w"])
    assert once > 0 and count("dpm_solver_pp") - count("ddim") == pytest.approx(once, rel=1e-6)


def test_gradient_vanishes_with_the_solvers_error():
    """The exact student is a stationary point except for the solver's error; a null text off by 0.1 is not."""

    def gradient(num_steps, shift):
        p, params, frozen, batch, draws = gaussian_case(num_steps)
        theta = {"null": params["null"] + shift}
        grads = jax.grad(lambda x: lcm.lcd_loss(p, x, params, frozen, batch, draws).mean())(theta)
        return np.linalg.norm(grads["null"])

    assert gradient(50, 0.0) < 0.02 * gradient(50, 0.1)
    assert gradient(100, 0.0) < 0.5 * gradient(50, 0.0)


def test_target_at_index_0_is_z_end_whatever_the_target_weights():
    """There t_end = 0, where f is the identity: the target is the DDIM jump to abar_0."""
    p, params, frozen, batch, draws = gaussian_case(50, index=np.zeros(5, np.int32))
    seen = []

    def distance(prediction, target):
        seen.append(target)
        return objective.l2(prediction, target)

    p = dataclasses.replace(p, distance=distance)
    for target_params in (params, {"null": params["null"] + 5.0}):
        lcm.lcd_loss(p, params, target_params, frozen, batch, draws)
    np.testing.assert_array_equal(seen[0], seen[1])
    # z_end from the true pair of the guided data: mean m_w, x0 by Bayes' rule, eps from the rest.
    abar = p.schedule.alphas_cumprod.astype(np.float64)[[19, 0]]
    (a, a0), (s, s0) = np.sqrt(abar), np.sqrt(1 - abar)
    m = np.asarray(batch["mean"], np.float64)
    z = a * (m + SPREAD * np.asarray(draws.posterior)) + s * np.asarray(draws.noise)
    null = np.asarray(frozen.null["encoder_hidden_states"], np.float64)[:, :, None, :]
    m_w = m + np.asarray(draws.w, np.float64)[:, None, None, None] * (m - null)
    precision = 1 / SPREAD**2 + a**2 / s**2
    x0 = (m_w / SPREAD**2 + a * z / s**2) / precision
    parity.close(seen[0], a0 * x0 + s0 * (z - a * x0) / s, rtol=0, atol=2e-5)


def test_only_theta_gets_a_gradient():
    p, params, frozen, batch, draws = gaussian_case(50)
    grads = jax.grad(lambda target: lcm.lcd_loss(p, params, target, frozen, batch, draws).mean())(params)
    np.testing.assert_array_equal(grads["null"], np.zeros(4))


def test_draws_follow_the_key_and_are_uniform():
    p = make_problem("sd1")
    shape = (20_000, 1, 1, 4)
    one, same, other = (objective.draw(p, jax.random.key(seed), shape) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for field in ("posterior", "noise", "index", "w"):
        assert np.any(getattr(one, field) != getattr(other, field))
    assert one.index.dtype == jnp.int32 and one.w.dtype == one.noise.dtype == jnp.float32
    counts = np.bincount(one.index, minlength=50)
    assert len(counts) == 50
    assert np.sum((counts - 400) ** 2 / 400) < 85.4  # chi-square, 49 degrees of freedom, 1 in 1,000
    assert 3.0 <= one.w.min() < 3.02 and 13.98 < one.w.max() < 14.0
    assert abs(one.w.mean() - 8.5) < 0.1 and abs(np.corrcoef(one.w, one.index)[0, 1]) < 0.03
    for x in (one.posterior, one.noise):
        assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs(np.corrcoef(one.posterior.ravel(), one.noise.ravel())[0, 1]) < 0.02
