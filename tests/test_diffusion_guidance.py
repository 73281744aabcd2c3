"""Guidance, sampling and embedding w; the boundary scalings and the consistency function."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from lcm_jax.diffusion import consistency, guidance, schedule
from lcm_jax.errors import LcmError

SHAPE = (3, 4, 4, 2)


def normal(seed):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def test_guidance_zero_is_the_conditional_branch():
    cond, uncond = normal(0), normal(1)
    np.testing.assert_array_equal(guidance.classifier_free(cond, uncond, 0.0), cond)
    parity.close(guidance.classifier_free(cond, uncond, -1.0), uncond, atol=1e-6)
    w = np.array([0.0, 1.0, 7.5], np.float32)
    got = guidance.classifier_free(cond, uncond, w)
    for i in range(3):
        parity.close(got[i], (1 + w[i]) * cond[i] - w[i] * uncond[i], atol=1e-5)
    assert guidance.classifier_free(jnp.bfloat16(1), jnp.bfloat16(0), 1.0).dtype == jnp.float32


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_guiding_the_output_guides_x0_and_eps(prediction_type):
    table = schedule.from_config({"_class_name": "LCMScheduler", "prediction_type": prediction_type})
    z_t, cond, uncond = normal(0), normal(1), normal(2)
    t, w = np.array([19, 499, 999]), np.array([0.0, 2.0, 14.0], np.float32)
    pairs = [(schedule.to_x0(table, o, z_t, t), schedule.to_eps(table, o, z_t, t)) for o in (cond, uncond)]
    x0, eps = (guidance.classifier_free(c, u, w) for c, u in zip(*pairs, strict=True))
    parity.close(schedule.add_noise(table, x0, eps, t), z_t, atol=1e-4)
    output = guidance.classifier_free(cond, uncond, w)
    parity.close(schedule.to_x0(table, output, z_t, t), x0, rtol=1e-4, atol=1e-4)
    parity.close(schedule.to_eps(table, output, z_t, t), eps, rtol=1e-4, atol=1e-4)


def test_w_is_uniform_over_its_range():
    w = np.asarray(guidance.sample_w(jax.random.key(0), (20000,), 3.0, 15.0))
    assert w.dtype == np.float32 and w.min() >= 3 and w.max() <= 15
    parity.close([w.mean(), w.std()], [9, 12 / np.sqrt(12)], rtol=0.02)
    np.testing.assert_array_equal(guidance.sample_w(jax.random.key(0), (4,), 7.5, 7.5), np.full(4, 7.5))
    for bounds in ((5.0, 4.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(LcmError, match=f"w_min={bounds[0]}, w_max={bounds[1]}"):
            guidance.sample_w(jax.random.key(0), (2,), *bounds)


@pytest.mark.parametrize("dim", (256, 64, 33, 5))
def test_w_embedding_equals_the_diffusers_pipeline(dim):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    embed = inspect.unwrap(diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding)
    w = np.random.default_rng(0).uniform(0, 15, 64).astype(np.float32)
    got = np.asarray(jax.jit(guidance.w_embedding, static_argnums=1)(w, dim))
    assert got.shape == (64, dim) and got.dtype == np.float32
    want = embed(None, torch.from_numpy(w), dim).numpy()
    parity.close(got, want, rtol=0, atol=parity.sinusoid(1000 * w, dim, 1))


def test_w_embedding_refuses_what_it_cannot_embed():
    with pytest.raises(LcmError, match="dimension 3"):
        guidance.w_embedding(np.array([1.0]), 3)
    with pytest.raises(LcmError, match=r"shape \(\)"):
        guidance.w_embedding(1.0, 8)


def test_boundary_scalings_reference_values():
    t = np.array([0, 1, 2, 19, 999])
    c_skip, c_out = consistency.boundary_scalings(t)
    parity.close(c_skip, [1, 2.494e-3, 6.246e-4, 6.93e-6, 2.505e-9], rtol=1e-3)
    parity.close(c_out, [0, 0.998752, 0.999688, 0.9999965, 1], atol=1e-6)
    assert float(c_skip[0]) == 1 and float(c_out[0]) == 0
    parity.close(c_skip + c_out**2, 1, atol=1e-6)


@pytest.mark.parametrize("scaling", (10.0, 0.01))
def test_boundary_scalings_equal_diffusers(scaling):
    scheduler = pytest.importorskip("diffusers").LCMScheduler(timestep_scaling=scaling)
    for t in (0, 1, 39, 999):
        want = scheduler.get_scalings_for_boundary_condition_discrete(t)
        parity.close(consistency.boundary_scalings(t, 0.5, scaling), want, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_consistency_function_is_the_identity_at_zero(prediction_type):
    table = schedule.from_config({"_class_name": "LCMScheduler", "prediction_type": prediction_type})
    z_t, output, t = normal(0), normal(1), np.array([0, 0, 500])
    f = consistency.consistency_function(table, output, z_t, t)
    np.testing.assert_array_equal(f[:2], z_t[:2])
    parity.close(f[2], schedule.to_x0(table, output, z_t, t)[2], atol=1e-5)
    assert f.dtype == jnp.float32
