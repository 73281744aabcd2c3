"""Noise tables against diffusers and reference numbers; conversions against the definition of z_t."""

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


@pytest.mark.parametrize("name", ("LCMScheduler", "TCDScheduler", "DDPMScheduler", "DDIMScheduler"))
def test_missing_keys_have_the_defaults_of_the_class(diffusers, name):
    got = schedule.from_config({"_class_name": name})
    parity.close(got.alphas_cumprod, getattr(diffusers, name)().alphas_cumprod, atol=1e-6)
    assert got.prediction_type == "epsilon" and got.num_train_timesteps == 1000


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
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"thresholding": True}, "thresholding"),
    ),
)
def test_unsupported_config_is_named(config, field):
    with pytest.raises(UnsupportedConfig) as caught:
        schedule.from_config(config)
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
        schedule.from_config({"num_train_timesteps": 0})


def test_the_table_cannot_be_changed():
    table = schedule.from_config(LATENT)
    with pytest.raises(ValueError):
        table.alphas_cumprod[0] = 0
