"""Noise tables against diffusers and reference numbers; conversions against the definition of z_t."""

import functools
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from lcm_jax.diffusion import schedule
from lcm_jax.errors import LcmError, UnsupportedConfig

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("rescale", (False, True))
@pytest.mark.parametrize("betas", ((0.00085, 0.012), (0.0001, 0.02)))
@pytest.mark.parametrize("name", schedule.BETA_SCHEDULES)
def test_tables_equal_diffusers(diffusers, name, betas, rescale):
    for steps in (1000, 500):
        config = {
            "num_train_timesteps": steps,
            "beta_start": betas[0],
            "beta_end": betas[1],
            "beta_schedule": name,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": rescale,
        }
        want = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
        got = schedule.from_config(config).alphas_cumprod
        # Rescaled betas are rounded one by one, and a product of 1000 of them adds that up as independent errors.
        parity.close(got, want, atol=32 * parity.EPS if rescale else 0, rtol=3e-7)
        if rescale:
            assert got[-1] == 0


# diffusers' schedulers by their kind of noise; test_every_scheduler_class_is_classified compares this with diffusers.
TABLES = (
    "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverMultistepInverse "
    "DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete "
    "KDPM2Discrete LCM LMSDiscrete PNDM RePaint SASolver TCD UnCLIP UniPCMultistep"
).split()
OTHERS = (
    "Amused BlockRefinement CMStochasticIterative CogVideoXDDIM CogVideoXDPM ConsistencyDecoder "
    "CosineDPMSolverMultistep DDPMWuerstchen DiscreteDDIM EDMDPMSolverMultistep EDMEuler EntropyBound "
    "FlowMapEulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM Helios HeliosDMD IPNDM KarrasVe "
    "LTXEulerAncestralRF MiniMaxH3 Piflow RFD4Proteina SCM ScoreSdeVe ScoreSdeVp VQDiffusion"
).split()


def test_every_scheduler_class_is_classified(diffusers):
    """A class that only a later diffusers has is refused like any unknown one."""
    known = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert known >= {f"{name}Scheduler" for name in TABLES}
    if diffusers.__version__.startswith("0.42."):
        assert known == {f"{name}Scheduler" for name in (*TABLES, *OTHERS)}


@pytest.mark.parametrize("name", TABLES)
def test_missing_keys_have_the_defaults_of_the_class(diffusers, name, monkeypatch):
    if name == "DPMSolverSDE":  # torchsde makes its noise, which is not needed here
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    else:
        module = diffusers.schedulers
    want = getattr(module, f"{name}Scheduler")().alphas_cumprod
    for config in ({"_class_name": f"{name}Scheduler"}, {"_class_name": f"Flax{name}Scheduler", "beta_start": None}):
        got = schedule.from_config(config)
        parity.close(got.alphas_cumprod, want, atol=1e-6)
        assert got.prediction_type == "epsilon" and got.num_train_timesteps == 1000


@pytest.mark.parametrize("name", (*OTHERS, "My", ""))
def test_classes_with_other_noise_are_refused(name):
    for prefix in ("", "Flax"):
        with pytest.raises(UnsupportedConfig) as caught:
            schedule.from_config({**LATENT, "_class_name": f"{prefix}{name}Scheduler"})
        assert caught.value.field == "_class_name" and caught.value.value == f"{prefix}{name}Scheduler"
        assert "name its class in scheduler_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_only_choose_timesteps_are_ignored():
    options = {
        "use_karras_sigmas": True,
        "use_beta_sigmas": True,
        "use_exponential_sigmas": True,
        "use_lu_lambdas": True,
        "timestep_spacing": "trailing",
        "final_sigmas_type": "zero",
        "interpolation_type": "log_linear",
        "sigma_min": 0.03,
        "sigma_max": 14.6,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "snr_shift_scale": 1.0,
        "timestep_type": "discrete",
        "predict_epsilon": True,
        "thresholding": False,
    }
    for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        assert schedule.from_config({"_class_name": name, **LATENT, **options}) == schedule.from_config(LATENT)


def test_a_config_without_a_class_must_give_its_betas():
    assert schedule.from_config(LATENT) == schedule.from_config({**LATENT, "_class_name": "LCMScheduler"})
    for key in ("beta_start", "beta_end", "beta_schedule"):
        with pytest.raises(LcmError, match=f"has no class .* and no {key}, so the noise is unknown"):
            schedule.from_config({k: v for k, v in LATENT.items() if k != key})


@pytest.mark.parametrize(
    "other", ({}, {"prediction_type": "sample"}, {"beta_end": 0.0121}, {"num_train_timesteps": 500})
)
def test_equal_schedules_share_a_program(other):
    """A schedule is a static argument of jit, equal by its table and prediction type."""
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def last_alpha(table):
        traced.append(table)
        return table.alpha(-1)

    one, two = (schedule.from_config(LATENT | changes) for changes in ({}, other))
    assert last_alpha(one) == one.alphas[-1] and last_alpha(two) == two.alphas[-1]
    same = not other
    assert (one == two) == same and (hash(one) == hash(two)) == same and len(traced) == 2 - same
    assert one != one.alphas_cumprod.tobytes()


def test_reference_values_of_stable_diffusion():
    """The bounds are half a unit of the last digit."""
    table = schedule.from_config(LATENT)
    t = np.array([0, 19, 499, 999])
    parity.close(table.alphas_cumprod[t], [0.99915, 0.982244, 0.277670, 0.0046601], atol=1e-6)
    t = np.array([19, 259, 499, 759, 999])
    ratio = table.sigma(t) / table.alpha(t)
    parity.close(ratio, [0.1345, 0.7194, 1.6129, 4.2606, 14.6146], atol=6e-5)
    parity.close(table.sigma(0), 0.0292, atol=5e-5)


def test_trained_betas():
    table = schedule.from_config({"trained_betas": [0.1, 0.2, 0.5], "num_train_timesteps": 1000})
    parity.close(table.alphas_cumprod, [0.9, 0.72, 0.36], rtol=1e-6)


@pytest.mark.parametrize("t", (np.array([0, 500, 999]), 321), ids=("per sample", "scalar"))
@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_every_output_gives_back_x0_and_eps(prediction_type, t):
    table = schedule.from_config({**LATENT, "prediction_type": prediction_type})
    z, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    z_t = schedule.add_noise(table, z, eps, t)
    output = {"epsilon": eps, "sample": z, "v_prediction": schedule.velocity(table, z, eps, t)}[prediction_type]
    x0, noise = (jax.jit(f, static_argnums=0)(table, output, z_t, t) for f in (schedule.to_x0, schedule.to_eps))
    # An error of one unit in the last place of z_t reaches x0 times 1 / alpha, up to 14.6, and eps times 1 / sigma.
    parity.close(x0, z, atol=1e-5)
    parity.close(noise, eps, atol=1e-5)
    assert x0.dtype == noise.dtype == jnp.float32


def test_add_noise_and_velocity_equal_diffusers(diffusers):
    torch = pytest.importorskip("torch")
    table, scheduler = schedule.from_config(LATENT), diffusers.DDPMScheduler(**LATENT)
    z, eps = np.random.default_rng(1).standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    t = np.array([3, 400, 999])
    ours = schedule.add_noise(table, z, eps, t), schedule.velocity(table, z, eps, t)
    args = torch.from_numpy(z), torch.from_numpy(eps), torch.from_numpy(t)
    for got, want in zip(ours, (scheduler.add_noise(*args), scheduler.get_velocity(*args)), strict=True):
        parity.close(got, want, atol=1e-6)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (z, eps)]  # still computed in float32
    want = schedule.add_noise(table, *(x.astype(jnp.float32) for x in half), t)
    np.testing.assert_array_equal(schedule.add_noise(table, *half, t), want, strict=True)


@pytest.mark.parametrize(
    "config,field",
    (
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        *(({"beta_schedule": name}, "beta_schedule") for name in ("sigmoid", "laplace", "exp")),
        ({"thresholding": True}, "thresholding"),
        ({"use_flow_sigmas": True, "flow_shift": 3.0}, "use_flow_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale"),
        ({"predict_epsilon": False}, "predict_epsilon"),
    ),
)
def test_unsupported_config_is_named(config, field):
    with pytest.raises(UnsupportedConfig) as caught:
        schedule.from_config({**LATENT, **config})
    assert caught.value.field == field and caught.value.value == config[field]
    assert field in str(caught.value) and repr(config[field]) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_prediction_type_of_a_conversion_is_named():
    for convert in (schedule.x0_from_output, schedule.eps_from_output):
        with pytest.raises(UnsupportedConfig, match="prediction_type='flow'"):
            convert("flow", 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    (
        ({"beta_start": "0.00085"}, "beta_start='0.00085'; supported: a number from 1e-09 to 1"),
        ({"beta_end": -0.1}, "beta_end=-0.1"),
        ({"beta_end": True}, "beta_end=True"),
        ({"beta_schedule": ["linear"]}, "beta_schedule=.*a text"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'; supported: a whole number from 1 to 10000"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ({"prediction_type": 3}, "prediction_type=3"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr='no'; supported: true or false"),
        ({"thresholding": 0}, "thresholding=0"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name="),
        ({"rescale_betas_zero_snr": True}, "divides by zero at t=999"),
        *(({"trained_betas": bad}, "unsupported trained_betas=") for bad in ([], [0.0, 0.1], [0.5, 1.5], [[0.1]], 0.1)),
        *(({"trained_betas": [bad]}, "unsupported trained_betas=") for bad in (float("nan"), "0.1", True, None)),
    ),
)
def test_bad_numbers_are_refused(config, message):
    with pytest.raises(LcmError, match=message):
        schedule.from_config(LATENT | config)


def test_a_schedule_is_a_noise_table_that_cannot_be_changed():
    for bad in ([0.5, 0.5], [1.0, 0.5], [0.2, 0.4], [0.5, -0.1]):
        with pytest.raises(LcmError, match="not a noise table"):
            schedule.NoiseSchedule(np.array(bad))
    with pytest.raises(LcmError, match="shape"):
        schedule.NoiseSchedule(np.ones((2, 2)))
    table = schedule.from_config(LATENT)
    assert str(table).startswith("epsilon, abar 0.9991 to")
    with pytest.raises(ValueError, match="read-only"):
        table.alphas_cumprod[0] = 0
