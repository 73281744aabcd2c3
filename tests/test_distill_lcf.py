"""Latent Consistency Fine-tuning: its two points, and its loss at exact consistency functions, in closed form.

For data N(m, s^2) with radius R_t = hypot(alpha_t s, sigma_t) the exact function is

    f(z, t) = alpha_0 m + R_0 / R_t (z - alpha_t m)

and with z = m + s x and one eps for both points, f of the start minus f of the end is R_0 (a x + b eps), where
a = s (alpha/R - alpha'/R') and b = sigma/R - sigma'/R': the squared loss is R_0^2 (a^2 + b^2) on average.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import test_distill_objective as lcd
from test_distill_lora import Recorder

from lcm_jax.diffusion import guidance
from lcm_jax.distill import lcm, objective, state
from lcm_jax.distill.step import make_optimizer, make_step

S = lcd.SPREAD


def tables(p: objective.Problem, index) -> tuple:
    """alpha, sigma at t_start, then at t_end, then at 0; float64 [b 1 1 1]."""
    abar = np.asarray(p.schedule.alphas_cumprod, np.float64)
    rows = []
    for t in (p.grid.timesteps[index], p.grid.prev_timesteps[index], 0 * p.grid.timesteps[index]):
        rows += [np.sqrt(abar[t])[:, None, None, None], np.sqrt(1 - abar[t])[:, None, None, None]]
    return tuple(rows)


def per_element(prediction, target):
    return jnp.square(prediction - target)


def lcf_case(index=None) -> tuple:
    """`test_distill_objective.gaussian_case` for LCF, without a teacher; its loss stays squared differences."""
    p, params, frozen, batch, draws = lcd.gaussian_case(50, index)
    p = dataclasses.replace(p, objective="lcf", distance=per_element, teacher=None)
    return p, params, objective.Frozen(), batch, draws


@pytest.mark.parametrize("dim", [16, None])
def test_the_two_points_share_latent_noise_text_and_w(dim):
    batch, _, draws = lcd.inputs("sd1")
    student = Recorder(dim)
    p = dataclasses.replace(lcd.make_problem("sd1"), student=student, teacher=None, objective="lcf")
    seen = []
    for noise in (draws["noise"], 2.5 * draws["noise"], 0 * draws["noise"]):
        student.calls.clear()
        lcm.lcf_loss(
            p, {"theta": 1}, {"theta": 2}, objective.Frozen(), batch, objective.Draws(**draws | {"noise": noise})
        )
        assert len(student.calls) == 2  # one pass of the student, one of the target, none of a teacher
        calls = {call[0]["params"]["theta"]: call for call in student.calls}
        seen.append([calls[1][1], calls[2][1]])
        assert (calls[1][2] == p.grid.timesteps[lcd.INDEX]).all()
        assert (calls[2][2] == p.grid.prev_timesteps[lcd.INDEX]).all() and calls[2][2][0] == 0
        for call in student.calls:
            np.testing.assert_array_equal(call[3], batch["cond"]["encoder_hidden_states"])
            if dim is None:
                assert call[4] is None
            else:
                np.testing.assert_array_equal(call[4], guidance.w_embedding(lcd.W, dim))
    a, s, a_end, s_end, *_ = tables(p, lcd.INDEX)
    z = lcd.SCALING * (batch["mean"] + np.exp(0.5 * batch["logvar"]) * draws["posterior"])
    for which, (alpha, sigma) in enumerate(((a, s), (a_end, s_end))):
        once, more, none = (np.asarray(points[which], np.float64) for points in seen)
        parity.close(none, alpha * z, rtol=0, atol=1e-6)
        parity.close(once - none, sigma * draws["noise"], rtol=0, atol=2e-6)
        parity.close(more - none, 2.5 * (once - none), rtol=0, atol=5e-6)


def test_one_point_data_leave_no_loss(monkeypatch):
    """The flow of one point is the straight line through it and the noise, on which both noised latents lie."""
    p, params, frozen, batch, draws = lcf_case(np.array([0, 1, 9, 29, 49]))
    monkeypatch.setattr(lcd, "SPREAD", 0.0)
    batch["logvar"] = jnp.full(draws.noise.shape, -300.0)
    draws = draws.replace(w=jnp.zeros(5))
    loss = lcm.lcf_loss(p, params, params, frozen, batch, draws)
    assert loss.shape == draws.noise.shape
    parity.close(np.sqrt(loss), np.zeros(loss.shape), atol=1e-5)
    off = {**batch, "mean": batch["mean"] + 0.01}  # not the point that f knows
    assert lcm.lcf_loss(p, params, params, frozen, off, draws).max() > 1e-7


def test_gaussian_data_leave_the_closed_form():
    """Per grid point, within 4.5 standard errors of the squares' mean."""
    index = np.array([0, 1, 9, 29, 49])
    p, params, frozen, batch, draws = lcf_case(index)
    shape = (5, 128, 128, 4)
    rng = np.random.default_rng(1)
    draws = draws.replace(
        posterior=jnp.asarray(rng.standard_normal(shape), jnp.float32),
        noise=jnp.asarray(rng.standard_normal(shape), jnp.float32),
        w=jnp.zeros(5),
    )
    batch = batch | {k: jnp.broadcast_to(batch[k][:, :1, :1], shape) for k in ("mean", "logvar")}
    got = np.asarray(lcm.lcf_loss(p, params, params, frozen, batch, draws), np.float64).mean((1, 2, 3))
    want = expected_variance(p, index)
    print("expected", want, "relative error", got / want - 1)
    parity.close(got, want, rtol=4.5 * np.sqrt(2 / np.prod(shape[1:])))


def expected_variance(p: objective.Problem, index) -> np.ndarray:
    a, s, a_end, s_end, a0, s0 = (table[:, 0, 0, 0] for table in tables(p, index))
    radius, end, zero = np.hypot(a * S, s), np.hypot(a_end * S, s_end), np.hypot(a0 * S, s0)
    return 2 * zero**2 * (1 - (a * a_end * S**2 + s * s_end) / (radius * end))


def test_a_guided_slice_is_pulled_towards_the_data():
    """The exact guided f has mean m_w = m + w (m - m_null), the data m: R_0 (alpha/R - alpha'/R') (m - m_w) is added.

    That is why long fine-tuning wears guidance away.
    """
    index = np.array([1, 9, 19, 29, 49])
    p, params, frozen, batch, draws = lcf_case(index)
    a, s, a_end, s_end, a0, s0 = tables(p, index)
    radius, end, zero = np.hypot(a * S, s), np.hypot(a_end * S, s_end), np.hypot(a0 * S, s0)
    w = np.asarray(draws.w, np.float64)[:, None, None, None]
    m = np.asarray(batch["mean"], np.float64)
    m_w = m + w * (m - np.asarray(params["null"]))
    x, eps = (np.asarray(v, np.float64) for v in (draws.posterior, draws.noise))
    spread = S * (a / radius - a_end / end) * x + (s / radius - s_end / end) * eps
    want = (zero * (spread + (a / radius - a_end / end) * (m - m_w))) ** 2
    got = lcm.lcf_loss(p, params, params, frozen, batch, draws)
    parity.close(got, want, rtol=0, atol=2e-3 * want.max())
    assert want.mean() > 1.2 * ((zero * spread) ** 2).mean()


def test_mixed_with_lcd():
    """lcf + weight * lcd of the same draws, in value and gradient; weight 0 needs no teacher."""
    p, params, frozen, batch, draws = lcd.gaussian_case(50)
    mixed = dataclasses.replace(p, objective="lcf", lcd_weight=0.7)
    theta = {"null": params["null"] + 0.1}

    def value_and_grad(loss, p):
        return jax.value_and_grad(lambda x: loss(p, x, params, frozen, batch, draws).mean())(theta)

    lcf = value_and_grad(lcm.lcf_loss, dataclasses.replace(mixed, lcd_weight=0.0, teacher=None))
    teachers, got = value_and_grad(lcm.lcd_loss, p), value_and_grad(lcm.lcf_loss, mixed)
    want = jax.tree.map(lambda a, b: a + 0.7 * b, lcf, teachers)
    jax.tree.map(lambda a, b: parity.close(a, b, rtol=1e-5), got, want)
    assert lcf[0] > 0 and teachers[0] > 0 and (lcf[1]["null"] != teachers[1]["null"]).all()


def test_the_target_gets_no_gradient_and_the_step_has_this_loss():
    p, params, frozen, batch, draws = lcd.gaussian_case(50)
    p = dataclasses.replace(p, objective="lcf", teacher=None)
    grads = jax.grad(lambda x: lcm.lcf_loss(p, params, x, objective.Frozen(), batch, draws).mean())(params)
    np.testing.assert_array_equal(grads["null"], np.zeros(4))
    optimizer = make_optimizer(1e-2)
    step = jax.jit(make_step(p, optimizer, 0.9))
    after, metrics = step(state.create(params, optimizer), objective.Frozen(), batch, jax.random.key(0))
    assert np.abs(after.params["null"] - params["null"]).min() > 1e-3
    draws = objective.draw(p, jax.random.fold_in(jax.random.key(0), 0), draws.noise.shape)
    want = lcm.lcf_loss(p, params, params, objective.Frozen(), batch, draws).mean()
    parity.close(metrics["loss"], want, rtol=1e-5)
