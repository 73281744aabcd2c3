"""Noise tables against diffusers and reference numbers; conversions against the definition of z_t."""

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


# torch's schedulers by what their noise is; test_every_scheduler_class_is_classified holds this against diffusers.
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
    """A class that only a later diffusers has is refused, as any unknown one."""
    known = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert known >= {f"{name}Scheduler" for name in TABLES}
    if diffusers.__version__.startswith("0.42."):
        assert known == {f"{name}Scheduler" for name in (*TABLES, *OTHERS)}


@pytest.mark.parametrize("name", TABLES)
def test_missing_keys_have_the_defaults_of_the_class(diffusers, name, monkeypatch):
    if name == "DPMSolverSDE":  # torchsde draws its noise, which is not asked for here
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
def test_classes_of_other_noise_are_refused(name):
    for prefix in ("", "Flax"):
        with pytest.raises(UnsupportedConfig) as caught:
            schedule.from_config({**LATENT, "_class_name": f"{prefix}{name}Scheduler"})
        assert caught.value.field == "_class_name" and caught.value.value == f"{prefix}{name}Scheduler"
        assert "name its class in scheduler_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_choose_timesteps_alone_are_read_over():
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
        with pytest.raises(LcmError, match=f"names no class .* and no {key}, so the noise is unknown"):
            schedule.from_config({k: v for k, v in LATENT.items() if k != key})


@pytest.mark.parametrize("wrong", ({"beta_start": "0.00085"}, {"beta_end": -0.1}, {"num_train_timesteps": "1000"}))
def test_numbers_that_are_none_are_refused(wrong):
    with pytest.raises(LcmError, match="must be positive numbers"):
        schedule.from_config({**LATENT, **wrong})


def test_schedules_are_the_same_by_table_and_prediction_type():
    table = schedule.from_config(LATENT)
    assert table == schedule.from_config(LATENT) and str(table).startswith("epsilon, abar 0.9991 to")
    for other in ({"prediction_type": "sample"}, {"beta_end": 0.0121}, {"num_train_timesteps": 500}):
        assert table != schedule.from_config({**LATENT, **other})


def test_reference_values_of_stable_diffusion():
    """Bounds: half a unit of the last digit of the ratios and of sigma, which is all there is."""
    table = schedule.from_config(LATENT)
    t = np.array([0, 19, 499, 999])
    parity.close(table.alphas_cumprod[t], [0.99915, 0.982244, 0.277670, 0.0046601], atol=1e-6)
    t = np.array([19, 259, 499, 759, 999])
    ratio = table.sigma(t) / table.alpha(t)
    parity.close(ratio, [0.1345, 0.7194, 1.6129, 4.2606, 14.6146], atol=6e-5)
    parity.close(table.sigma(0), 0.0292, atol=5e-5)


def test_trained_betas():
    betas = [0.1, 0.2, 0.5]
    table = schedule.from_config({"trained_betas": betas, "num_train_timesteps": 1000})
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


def test_half_precision_input_is_computed_in_float32():
    table = schedule.from_config(LATENT)
    z = jnp.full((1, 2, 2, 1), 3.0, jnp.bfloat16)
    got = schedule.add_noise(table, z, z, np.array([19]))
    assert got.dtype == jnp.float32
    parity.close(got, 3 * (np.sqrt(0.982244) + np.sqrt(1 - 0.982244)), rtol=1e-5)


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


def test_epsilon_with_zero_terminal_snr_is_refused_at_construction():
    for name in ("linear", "scaled_linear"):
        with pytest.raises(LcmError, match="divides by zero at t=999"):
            schedule.from_config({**LATENT, "beta_schedule": name, "rescale_betas_zero_snr": True})


@pytest.mark.parametrize("betas", ([], [0.0, 0.1], [0.5, 1.5], [[0.1]], [float("nan")]))
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(LcmError, match="betas of shape"):
        schedule.from_betas(betas)


def test_tables_that_do_not_fall_are_refused():
    for bad in ([0.5, 0.5], [1.0, 0.5], [0.2, 0.4], [0.5, -0.1]):
        with pytest.raises(LcmError, match="no noise table"):
            schedule.NoiseSchedule(np.array(bad))
    with pytest.raises(LcmError, match="shape"):
        schedule.NoiseSchedule(np.ones((2, 2)))
    with pytest.raises(LcmError, match="num_train_timesteps=0"):
        schedule.from_config({**LATENT, "num_train_timesteps": 0})


def test_the_table_cannot_be_changed():
    table = schedule.from_config(LATENT)
    with pytest.raises(ValueError):
        table.alphas_cumprod[0] = 0
