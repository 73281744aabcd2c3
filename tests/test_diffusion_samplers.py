"""Samplers against diffusers' schedulers, step by step, and against the numbers of diffusers' own unit tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from lcm_jax.diffusion import consistency, samplers, schedule, solvers, timesteps
from lcm_jax.errors import LcmError
from lcm_jax.sampling.programs import loop_on

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers on numpy 2
    pytest.mark.filterwarnings("ignore:`algorithm_types=dpmsolver` is deprecated:FutureWarning"),
]

STEPS = (1, 2, 3, 4, 8, 50)
SHAPE = (2, 4, 4, 3)
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}


def fake_model(xp, noise_schedule):
    """A cheap nonlinear network whose x0, eps and v agree and stay of order 1. xp: jnp or torch."""
    alphas, sigmas = np.sqrt(noise_schedule.alphas_cumprod), np.sqrt(1 - noise_schedule.alphas_cumprod)
    if xp is torch:
        alphas, sigmas = torch.from_numpy(alphas), torch.from_numpy(sigmas)
    else:
        alphas, sigmas = jnp.asarray(alphas), jnp.asarray(sigmas)
    phases = np.cos(np.arange(alphas.shape[0]) / 100).astype(np.float32)
    phases = torch.from_numpy(phases) if xp is torch else jnp.asarray(phases)

    def model(x, t):
        v = 0.3 * xp.tanh(x + phases[t])
        if noise_schedule.prediction_type == "v_prediction":
            return v
        if noise_schedule.prediction_type == "sample":
            return alphas[t] * x - sigmas[t] * v
        return sigmas[t] * x + alphas[t] * v

    return model


def start_and_noise(num_steps, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in (SHAPE, (num_steps - 1, *SHAPE))]


def torch_trajectory(scheduler, noise_schedule, x, num_steps, **step_options):
    """x after every step of a diffusers scheduler, [n b h w c]."""
    scheduler.set_timesteps(num_steps)
    model = fake_model(torch, noise_schedule)
    x, trajectory = torch.from_numpy(x), []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **step_options).prev_sample
        trajectory.append(x.numpy())
    return np.stack(trajectory)


# x0 has the errors of x and of the output times sigma / alpha, 14.6 at t = 999.
TOLERANCE = 8 * 14.6 * parity.EPS


def trajectory(step, carry, rows):
    """A `loop` that gives x after every step."""

    def with_x(carry, row):
        carry, _ = step(carry, row)
        return carry, carry[0]

    return jax.lax.scan(with_x, carry, rows)[1]


def compare(name, scheduler, noise_schedule, table, tolerance=TOLERANCE, **options):
    x, _ = start_and_noise(len(table))
    want = torch_trajectory(scheduler, noise_schedule, x, len(table))
    sampler = functools.partial(samplers.SAMPLERS[name], fake_model(jnp, noise_schedule), **options)
    got = jax.jit(lambda x: sampler(x, None, noise_schedule, table, loop=trajectory))(x)
    parity.close(got, want, atol=tolerance, rtol=tolerance)
    assert got.dtype == jnp.float32


def ddim_case(num_steps, config, spacing="trailing", **options):
    config = {**config, "timestep_spacing": spacing, "clip_sample": False, **options}
    noise_schedule = schedule.from_config(config)
    scheduler = diffusers.DDIMScheduler(**config)
    offset, to_one = options.get("steps_offset", 0), options.get("set_alpha_to_one", True)
    scheduler.set_timesteps(num_steps)
    table = timesteps.ddim(num_steps, 1000, spacing, offset)
    np.testing.assert_array_equal(table, scheduler.timesteps)
    compare("ddim", scheduler, noise_schedule, table, set_alpha_to_one=to_one)


DPM = {"dpm_solver_pp_2m": {}, "dpm_solver_2m": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}}


def dpm_case(num_steps, config, spacing="trailing", name="dpm_solver_pp_2m", tolerance=TOLERANCE, **options):
    config = {**config, "timestep_spacing": spacing, **options}
    noise_schedule = schedule.from_config(config)
    scheduler = diffusers.DPMSolverMultistepScheduler(**config, **DPM[name])
    offset = options.get("steps_offset", 0)
    scheduler.set_timesteps(num_steps)
    table = timesteps.dpm_solver(num_steps, spacing=spacing, steps_offset=offset)
    np.testing.assert_array_equal(table, scheduler.timesteps)
    compare(name, scheduler, noise_schedule, table, tolerance)


def lcm_case(num_steps, config, original_steps=50, timestep_scaling=10.0):
    noise_schedule = schedule.from_config(config)
    scheduler = diffusers.LCMScheduler(
        **config, original_inference_steps=original_steps, timestep_scaling=timestep_scaling
    )
    x, _ = start_and_noise(num_steps)
    # The scheduler draws its noise itself; an equal generator draws the same.
    noise = np.zeros((0, *SHAPE), np.float32)
    if num_steps > 1:
        generator = torch.Generator().manual_seed(7)
        noise = np.stack([torch.randn(SHAPE, generator=generator).numpy() for _ in range(num_steps - 1)])
    generator = torch.Generator().manual_seed(7)
    want = torch_trajectory(scheduler, noise_schedule, x, num_steps, generator=generator)
    table, model = timesteps.lcm(num_steps, 1000, original_steps), fake_model(jnp, noise_schedule)
    options = {"timestep_scaling": timestep_scaling, "loop": trajectory}
    got = jax.jit(lambda x, noise: samplers.lcm(model, x, noise, noise_schedule, table, **options))(x, noise)
    parity.close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def drawn(count, seed=7):
    """The noise that a diffusers scheduler draws from a generator of this seed, [count b h w c]."""
    generator = torch.Generator().manual_seed(seed)
    return np.stack(
        [np.zeros(SHAPE, np.float32), *(torch.randn(SHAPE, generator=generator).numpy() for _ in range(count))]
    )[1:]


def tcd_case(num_steps, config, gamma, original_steps=50):
    noise_schedule = schedule.from_config(config)
    scheduler = diffusers.TCDScheduler(**config, original_inference_steps=original_steps)
    x, _ = start_and_noise(num_steps)
    noise, generator = drawn(num_steps - 1), torch.Generator().manual_seed(7)
    want = torch_trajectory(scheduler, noise_schedule, x, num_steps, eta=gamma, generator=generator)
    table, model = timesteps.lcm(num_steps, 1000, original_steps), fake_model(jnp, noise_schedule)
    np.testing.assert_array_equal(table, scheduler.timesteps)
    options = {"gamma": gamma, "loop": trajectory}
    got = jax.jit(lambda x, noise: samplers.tcd(model, x, noise, noise_schedule, table, **options))(x, noise)
    parity.close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def euler_case(name, num_steps, config):
    """Theirs is x / alpha, and begins with noise times sigma / alpha; ours with noise times sigma."""
    config = {**config, "timestep_spacing": "trailing"}
    noise_schedule = schedule.from_config(config)
    scheduler = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    }
    scheduler = scheduler[name](**config)
    scheduler.set_timesteps(num_steps)
    table, model = timesteps.ddim(num_steps), fake_model(torch, noise_schedule)
    np.testing.assert_array_equal(table, scheduler.timesteps)
    noise, _ = start_and_noise(num_steps)
    x, generator, want = torch.from_numpy(noise) * scheduler.init_noise_sigma, torch.Generator().manual_seed(7), []
    for i, t in enumerate(scheduler.timesteps):
        output = model(scheduler.scale_model_input(x, t), t.long())
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        want.append((x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5).numpy())
    sampler, ours = samplers.SAMPLERS[name], fake_model(jnp, noise_schedule)
    start = noise_schedule.sigmas[table[0]] * noise
    got = jax.jit(lambda x, xi: sampler(ours, x, xi, noise_schedule, table, loop=trajectory))(start, drawn(num_steps))
    parity.close(got, np.stack(want), atol=TOLERANCE, rtol=TOLERANCE)


def cases(steps):
    """Every number of steps at every spacing for epsilon; other predictions are converted alike at all of them."""
    others = set(schedule.PREDICTION_TYPES) - {"epsilon"}
    return [(n, spacing, "epsilon") for n in steps for spacing in timesteps.SPACINGS] + [
        (4, "trailing", prediction_type) for prediction_type in sorted(others)
    ]


@pytest.mark.parametrize(("num_steps", "spacing", "prediction_type"), cases(STEPS))
def test_ddim_equals_diffusers(num_steps, spacing, prediction_type):
    ddim_case(num_steps, {**LATENT, "prediction_type": prediction_type}, spacing)


@pytest.mark.parametrize(("num_steps", "spacing", "prediction_type"), cases((*STEPS, 15)))
def test_dpm_solver_pp_equals_diffusers(num_steps, spacing, prediction_type):
    dpm_case(num_steps, {**LATENT, "prediction_type": prediction_type}, spacing)


@pytest.mark.parametrize(
    ("prediction_type", "spacing"), (("epsilon", "trailing"), ("v_prediction", "linspace"), ("sample", "leading"))
)
@pytest.mark.parametrize("num_steps", (*STEPS, 14, 15))  # from 15 on diffusers has no lower_order_final
def test_dpm_solver_equals_diffusers(num_steps, spacing, prediction_type):
    dpm_case(num_steps, {**LATENT, "prediction_type": prediction_type}, spacing, "dpm_solver_2m")


@pytest.mark.parametrize(("num_steps", "prediction_type"), [(n, p) for n, _, p in cases(STEPS) if _ == "trailing"])
def test_lcm_equals_diffusers(num_steps, prediction_type):
    lcm_case(num_steps, {**LATENT, "prediction_type": prediction_type})


@pytest.mark.parametrize("gamma", (0.0, 0.3, 1.0))
@pytest.mark.parametrize(("num_steps", "prediction_type"), [(n, p) for n, _, p in cases(STEPS) if _ == "trailing"])
def test_tcd_equals_diffusers(num_steps, prediction_type, gamma):
    tcd_case(num_steps, {**LATENT, "prediction_type": prediction_type}, gamma)


@pytest.mark.parametrize(("original_steps", "num_steps", "gamma"), ((40, 4, 0.0), (40, 8, 0.3), (250, 4, 0.2)))
def test_tcd_equals_diffusers_on_other_grids(original_steps, num_steps, gamma):
    tcd_case(num_steps, {**LATENT, "prediction_type": "epsilon"}, gamma, original_steps)


@pytest.mark.parametrize("num_steps", (1, 2, 4, 8))
def test_deterministic_tcd_is_diffusers_trailing_ddim_on_40_points(num_steps):
    """4 steps visit 999, 749, 499, 249, from which DDIM's stride of 250 leads to the next."""
    config = {**LATENT, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
    compare("tcd", diffusers.DDIMScheduler(**config), schedule.from_config(LATENT), timesteps.lcm(num_steps, 1000, 40))


@pytest.mark.parametrize("name", ("euler", "euler_ancestral"))
@pytest.mark.parametrize(("num_steps", "prediction_type"), [(n, "epsilon") for n in STEPS[:-1]] + [(4, "v_prediction")])
def test_euler_equals_diffusers(name, num_steps, prediction_type):
    euler_case(name, num_steps, {**LATENT, "prediction_type": prediction_type})


@pytest.mark.parametrize("name", ("tcd", "euler", "euler_ancestral"))
def test_these_start_at_zero_terminal_snr_without_nan(name):
    noise_schedule = schedule.from_config({**LATENT, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    x, noise = start_and_noise(4)
    got = samplers.SAMPLERS[name](fake_model(jnp, noise_schedule), x, noise, noise_schedule, timesteps.lcm(4))
    assert noise_schedule.alphas[999] == 0 and np.isfinite(got).all()


@pytest.mark.parametrize("num_steps", (1, 4, 50))
def test_ddim_and_dpm_solvers_equal_diffusers_with_offsets(num_steps):
    ddim_case(num_steps, LATENT, "leading", steps_offset=1, set_alpha_to_one=False)
    for name in DPM:
        dpm_case(num_steps, LATENT, "leading", name, steps_offset=1)


@pytest.mark.parametrize("config", (COSINE, LATENT), ids=("cosine", "latent"))
@pytest.mark.parametrize("prediction_type", ("sample", "v_prediction"))
def test_samplers_equal_diffusers_at_zero_terminal_snr(prediction_type, config):
    config = {**config, "prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    ddim_case(4, config)
    dpm_case(4, config)
    dpm_case(4, config, name="dpm_solver_2m", tolerance=5e-3)  # alpha_i+1 / alpha_i is 4096 at abar = 2^-24
    lcm_case(4, config)


@pytest.mark.parametrize("original_steps,scaling", ((30, 10.0), (100, 0.001), (10, 10.0), (1000, 10.0)))
def test_lcm_other_solver_grids_and_scalings(original_steps, scaling):
    lcm_case(4, LATENT, original_steps, scaling)


@pytest.mark.parametrize("original_steps", (10, 20, 30, 50, 100, 200, 1000))  # among them the skips of the paper
def test_lcm_timesteps_equal_diffusers_for_every_number_of_steps(original_steps):
    scheduler = diffusers.LCMScheduler(original_inference_steps=original_steps)
    for num_steps in range(1, min(original_steps, 100) + 1):
        scheduler.set_timesteps(num_steps)
        got = timesteps.lcm(num_steps, original_steps=original_steps)
        np.testing.assert_array_equal(got, scheduler.timesteps, err_msg=f"{num_steps} steps")
        assert got.dtype == np.int32
    if original_steps == 50:
        assert timesteps.lcm(4).tolist() == [999, 759, 499, 259] and timesteps.lcm(50)[-1] == 19


@pytest.mark.parametrize("spacing", timesteps.SPACINGS)
@pytest.mark.parametrize("kind", ("ddim", *DPM))
def test_baseline_timesteps_equal_diffusers_for_every_number_of_steps(kind, spacing):
    scheduler_class = diffusers.DDIMScheduler if kind == "ddim" else diffusers.DPMSolverMultistepScheduler
    scheduler = scheduler_class(timestep_spacing=spacing, **LATENT, **DPM.get(kind, {}))
    for num_steps in range(1, 1000):
        scheduler.set_timesteps(num_steps)
        want = scheduler.timesteps.numpy()
        if len(want) > num_steps:  # rounding of 1000 / n in diffusers gives a value too many: -1
            want = want[:num_steps]
        got = (timesteps.ddim if kind == "ddim" else timesteps.dpm_solver)(num_steps, spacing=spacing)
        np.testing.assert_array_equal(got, want, err_msg=f"{num_steps} steps")
        assert np.all(np.diff(got) < 0) and got[-1] >= 0


# The sums and means of |x| that diffusers' own tests (tests/schedulers, 58eb52c) expect of one sample and one network.
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
V = {"prediction_type": "v_prediction"}


def ramp(step=1):
    """0 .. 767 over 768 in the order (3, 8, 8, 4), batch last there; step -1: falling."""
    return np.moveaxis((np.arange(768, dtype=np.float32)[::step] / 768).reshape(3, 8, 8, 4), -1, 0)


def their_network(x, t):
    return x * t / (t + 1)


def check_size(x, total, mean):
    assert total is None or abs(float(jnp.abs(x).sum()) - total) < 1e-2  # as they do
    assert abs(float(jnp.abs(x).mean()) - mean) < 1e-3


@pytest.mark.parametrize("num_steps,total,mean", ((1, 18.7097, 0.0244), (10, 197.7616, 0.2575)))
def test_lcm_numbers_of_diffusers_own_tests(num_steps, total, mean):
    torch.manual_seed(0)
    noise = [torch.randn(ramp().shape).numpy() for _ in range(num_steps - 1)]
    noise = np.stack(noise) if noise else None
    noise_schedule = schedule.from_config({"_class_name": "LCMScheduler"})
    x = samplers.lcm(their_network, ramp(), noise, noise_schedule, timesteps.lcm(num_steps))
    check_size(x, total, mean)


@pytest.mark.parametrize(
    ("config", "options", "total", "mean"),
    (
        ({}, {}, 172.0067, 0.223967),
        (V, {}, 52.5302, 0.0684),
        ({"beta_start": 0.01}, {"set_alpha_to_one": True}, 149.8295, 0.1951),
        ({"beta_start": 0.01}, {"set_alpha_to_one": False}, 149.0784, 0.1941),
        ({}, {"stride": 100}, 354.5418, 0.4616),  # the last two of ten steps, from a noised sample
    ),
)
def test_ddim_numbers_of_diffusers_own_tests(config, options, total, mean):
    noise_schedule, table, x = schedule.from_config(LINEAR | config), timesteps.ddim(10, 1000, "leading"), ramp()
    if "stride" in options:
        table, x = table[8:], schedule.add_noise(noise_schedule, x, ramp(-1), table[8])
    x = samplers.ddim(their_network, x, None, noise_schedule, table, **options)
    check_size(x, total, mean)
    assert timesteps.ddim(5, 1000, "leading", 1).tolist() == [801, 601, 401, 201, 1]


@pytest.mark.parametrize(("config", "mean"), (({}, 0.3301), (V, 0.2251)))
def test_dpm_solver_pp_numbers_of_diffusers_own_tests(config, mean, monkeypatch):
    """They end at abar_0 by a step of order 2, for which `dpm_solver_pp_2m` has no option: only its loop is run."""

    def ending_at_abar_0(noise_schedule, t):
        alpha, sigma, half_log_snr = solvers.alpha_sigma_lambda(noise_schedule.alphas_cumprod[np.append(t, 0)])
        h = np.diff(half_log_snr)
        weight = -alpha[1:] * np.expm1(-h)
        return sigma[1:] / sigma[:-1], weight, weight * h / (2 * np.append(np.inf, h[:-1]))

    monkeypatch.setattr(samplers, "_dpm_solver_pp_coefficients", ending_at_abar_0)
    table = timesteps.dpm_solver(10, 1000, "linspace")
    x = samplers.dpm_solver_pp_2m(their_network, ramp(), None, schedule.from_config(LINEAR | config), table)
    check_size(x, None, mean)


FALLING = np.array([999, 749, 499, 249], np.int32)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_is_one_scan_with_one_network(name):
    noise_schedule = schedule.from_config(LATENT)
    calls = []

    def model(x, t):
        calls.append((x.shape, t.shape, t.dtype))
        return jnp.sin(x)

    sampler = functools.partial(samplers.SAMPLERS[name], model)
    program = str(jax.make_jaxpr(lambda x, noise: sampler(x, noise, noise_schedule, FALLING))(*start_and_noise(4)))
    assert program.count("scan[") == 1 and program.count("sin ") == 1
    assert set(calls) == {(SHAPE, (), jnp.dtype("int32"))}


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_computes_in_float32_for_half_precision_networks(name):
    noise_schedule = schedule.from_config(LATENT)
    x, noise = start_and_noise(4)
    seen = []

    def model(x, t):
        seen.append(x.dtype)
        return (0.3 * x).astype(jnp.bfloat16)

    out = samplers.SAMPLERS[name](model, x.astype(jnp.bfloat16), noise, noise_schedule, FALLING)
    assert out.dtype == jnp.float32 and set(seen) == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_hook_is_called_after_every_step_and_gives_the_next_x(name):
    """Traced, with the model's x0, the timestep and the step's number; a hook that returns x changes nothing."""
    noise_schedule = schedule.from_config(LATENT)
    model = fake_model(jnp, noise_schedule)
    seen = []

    def watch(x0, x, t, i):
        jax.debug.callback(lambda *values: seen.append(values), x0, x, t, i, ordered=True)
        return x

    def paste(x0, x, t, i):  # half of the latent is written after each step, as inpainting does
        return x.at[..., :2, :].set(i.astype(jnp.float32))

    run = functools.partial(samplers.SAMPLERS[name], model, *start_and_noise(4), noise_schedule, FALLING)
    plain = run()
    parity.close(run(hook=watch), plain, atol=TOLERANCE, rtol=TOLERANCE)
    jax.effects_barrier()
    assert [(int(t), int(i)) for _, _, t, i in seen] == [(999, 0), (749, 1), (499, 2), (249, 3)]
    parity.close(seen[-1][1], plain, atol=TOLERANCE, rtol=TOLERANCE)
    first = seen[0][0]
    x, t = start_and_noise(4)[0], jnp.int32(999)
    want = schedule.to_x0(noise_schedule, model(x, t), x, t)
    if name == "lcm":
        want = consistency.consistency_function(noise_schedule, model(x, t), x, t)
    parity.close(first, want, atol=TOLERANCE, rtol=TOLERANCE)
    pasted = run(hook=paste)
    np.testing.assert_array_equal(pasted[..., :2, :], 3.0)
    # This network mixes no positions.
    parity.close(pasted[..., 2:, :], plain[..., 2:, :], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_stepwise_runs_the_same_steps(name):
    noise_schedule = schedule.from_config(LATENT)
    sampler = functools.partial(samplers.SAMPLERS[name], fake_model(jnp, noise_schedule), *start_and_noise(4))
    seen = []
    steps = list(sampler(noise_schedule, FALLING, loop=samplers.stepwise))
    sampler(noise_schedule, FALLING, hook=lambda x0, x, t, i: seen.append(i) or x)
    assert len(steps) == 4 and len(seen) == 1  # a scan traces its body once
    parity.close(steps[-1][1], sampler(noise_schedule, FALLING), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("platform", "steps", "loop"), [("gpu", 4, False), ("gpu", 5, True), ("cpu", 4, True), ("tpu", 4, True)]
)
def test_on_gpus_few_steps_are_no_loop(platform, steps, loop):
    noise_schedule, table = schedule.from_config(LATENT), np.arange(900, 0, -150, dtype=np.int32)[:steps]

    def sample(x, noise, loop):
        return samplers.lcm(fake_model(jnp, noise_schedule), x, noise, noise_schedule, table, loop=loop)

    given = start_and_noise(steps)
    sampled = jax.jit(functools.partial(sample, loop=loop_on(platform)))
    program = sampled.lower(*given).compile().as_text()
    assert (" while(" in program) == loop
    parity.close(sampled(*given), sample(*given, samplers.scan), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_steps", (1, 2, 50))
def test_dpm_solver_ends_at_the_network_x0_without_nan(num_steps):
    """The step to sigma = 0 has lambda = infinity: it must give x0 itself, which this network knows exactly."""
    noise_schedule = schedule.from_config({**LATENT, "prediction_type": "sample"})
    target = np.full(SHAPE, 0.7, np.float32)
    x, _ = start_and_noise(1)
    out = samplers.dpm_solver_pp_2m(lambda x, t: target, x, None, noise_schedule, timesteps.dpm_solver(num_steps))
    np.testing.assert_array_equal(out, target)


def test_one_dpm_solver_step_is_ddims_that_ends_at_abar_0():
    """With a single step both solvers are of order 1."""
    noise_schedule = schedule.from_config(LATENT)
    x, _ = start_and_noise(1)
    got, want = (
        sampler(fake_model(jnp, noise_schedule), x, None, noise_schedule, np.array([999]))
        for sampler in (samplers.dpm_solver_2m, functools.partial(samplers.ddim, set_alpha_to_one=False))
    )
    parity.close(got, want, atol=TOLERANCE)


def test_lcm_takes_none_or_spare_noise_and_refuses_other_shapes():
    noise_schedule = schedule.from_config(LATENT)
    x, noise = start_and_noise(4)

    def run(noise, steps=4):
        return samplers.lcm(fake_model(jnp, noise_schedule), x, noise, noise_schedule, FALLING[:steps])

    np.testing.assert_array_equal(run(None, 1), run(noise, 1))
    spare = np.concatenate([noise, np.full((1, *SHAPE), np.nan, np.float32)])
    np.testing.assert_array_equal(run(noise), run(spare))
    for bad in (noise[:2], noise[..., :2], None):
        with pytest.raises(LcmError, match="for 4 steps; it must be"):
            run(bad)


@pytest.mark.parametrize(
    "call,words",
    (
        (lambda: timesteps.lcm(0), "0 sampling steps are out of range; choose 1 to 50"),
        (lambda: timesteps.lcm(51), "51 sampling steps"),
        (lambda: timesteps.lcm(1, original_steps=0), "original_steps=0"),
        (lambda: timesteps.lcm(1, original_steps=1001), "original_steps=1001"),
        (lambda: timesteps.ddim(0), "0 sampling steps"),
        (lambda: timesteps.ddim(1001), "choose 1 to 1000"),
        (lambda: timesteps.ddim(4, spacing="even"), "unknown timestep spacing 'even'"),
        (lambda: timesteps.ddim(1000, spacing="leading", steps_offset=1), "steps_offset=1"),
        (lambda: timesteps.dpm_solver(1000, spacing="leading"), "choose 1 to 999"),
        (lambda: timesteps.dpm_solver(4, spacing="even"), "leading, trailing, linspace"),
    ),
)
def test_timesteps_names_bad_arguments(call, words):
    with pytest.raises(LcmError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
