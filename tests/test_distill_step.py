"""The training step: against torch's AdamW, accumulation, one compilation, no weights in the program, donation."""

import functools
import re

import gpu_kit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import tiny
import torch
from toy_unet import Net, problem_of

from lcm_jax.distill import lcm, objective, state
from lcm_jax.distill import step as step_lib
from lcm_jax.distill.step import learning_rate_schedule, make_optimizer, make_step
from lcm_jax.distill.student import student_of
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import names
from lcm_jax.runtime import topology

SHAPE = (4, 4, 4, 2)


@functools.cache
def make_case(distance=objective.l2):
    """(problem, student's params, frozen, batch)."""
    teacher, student = Net(), Net(time_cond_proj_dim=8)
    rng = np.random.default_rng(0)

    def draw(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    batch = {"mean": draw(*SHAPE), "logvar": draw(*SHAPE), "cond": {"encoder_hidden_states": draw(4, 3, 6)}}
    args = jnp.zeros(SHAPE), jnp.zeros(4, jnp.int32), jnp.zeros((4, 3, 6))
    weights = jax.jit(teacher.init)(jax.random.key(0), *args)["params"]
    params = jax.jit(student.init)(jax.random.key(1), *args, jnp.zeros((4, 8)))["params"]
    problem = problem_of(student, teacher, distance=distance)
    frozen = objective.Frozen(teacher=weights, null={"encoder_hidden_states": draw(1, 3, 6)})
    return problem, params, frozen, batch


OPTIMIZER = make_optimizer(1e-3)


@functools.cache
def step_in(accumulation_steps: int):
    """The step of `make_case()`, traced once for all tests."""
    return jax.jit(make_step(make_case()[0], OPTIMIZER, 0.9, accumulation_steps))


def total_norm(tensors) -> float:
    return torch.cat([x.detach().ravel() for x in tensors]).norm().item()


@pytest.mark.parametrize("max_grad_norm", [pytest.param(0.1, marks=pytest.mark.slow), 0.0])
def test_three_steps_match_torch_adamw(max_grad_norm):
    """Clipping, decoupled weight decay, warm-up and the EMA by torch, from the gradients of `lcd_loss`."""
    problem, params, frozen, batch = make_case()
    rates, decay, key = [1e-2, 2e-2, 3e-2], 0.9, jax.random.key(7)
    rate = learning_rate_schedule(3e-2, warmup_steps=2)
    eps = 1e-3  # of the gradient's size: at the usual 1e-8 Adam's step is the same whatever it is clipped to
    optimizer = make_optimizer(rate, b2=0.99, eps=eps, weight_decay=0.1, max_grad_norm=max_grad_norm)
    step = jax.jit(make_step(problem, optimizer, decay, 1, rate))
    now = state.create(params, optimizer)

    leaves, tree = jax.tree.flatten(params)
    theta = [torch.tensor(np.array(x), requires_grad=True) for x in leaves]
    target = [x.detach().clone() for x in theta]
    adamw = torch.optim.AdamW(theta, lr=1.0, betas=(0.9, 0.99), eps=eps, weight_decay=0.1)
    gradient = jax.jit(
        jax.value_and_grad(lambda p, ema, draws: lcm.lcd_loss(problem, p, ema, frozen, batch, draws).mean())
    )
    for n in range(3):
        now, metrics = step(now, frozen, batch, key)
        draws = objective.draw(problem, jax.random.fold_in(key, n), SHAPE)
        back = (jax.tree.unflatten(tree, [x.detach().numpy() for x in values]) for values in (theta, target))
        loss, grads = gradient(*back, draws)
        for x, g in zip(theta, jax.tree.leaves(grads), strict=True):
            x.grad = torch.tensor(np.array(g))
        norm = torch.nn.utils.clip_grad_norm_(theta, max_grad_norm or float("inf"))
        assert norm > 0.1  # so that clipping clips
        adamw.param_groups[0]["lr"] = rates[n]
        before = [x.detach().clone() for x in theta]
        adamw.step()
        for ema, x in zip(target, theta, strict=True):
            ema.mul_(decay).add_(x.detach(), alpha=1 - decay)
        parity.close(metrics["loss"], loss, rtol=1e-5)
        parity.close(metrics["grad_norm"], norm, rtol=1e-4)
        want = {
            "param_norm": total_norm(theta),
            "update_norm": total_norm([x - y for x, y in zip(theta, before, strict=True)]),
            "ema_distance": total_norm([x - y for x, y in zip(theta, target, strict=True)]) / total_norm(theta),
            "learning_rate": rates[n],
        }
        for name, value in want.items():
            parity.close(metrics[name], value, rtol=1e-4, what=name)
        assert now.step == n + 1
        for got, want in ((now.params, theta), (now.ema_params, target)):
            for a, b in zip(jax.tree.leaves(got), want, strict=True):
                parity.close(a, b.detach(), rtol=0, atol=1e-5)


def test_norms_are_the_same_numbers_on_a_gpu():
    """Both ways to sum squares, against float64. A GPU adds in a tree; a CPU, here, the 20,000 terms of an array one
    after another: its rounding errors walk at random to sqrt(20,000) 2^-24 = 8e-6."""
    rng = np.random.default_rng(0)
    trees = [{"a": rng.normal(0, s, (320, 64)), "b": [rng.normal(0, s, 640), rng.normal(0, s, ())]} for s in (1e-6, 1)]
    exact = [sum(float(np.square(x).sum()) for x in jax.tree.leaves(tree)) for tree in trees]
    trees = jax.tree.map(np.float32, trees)
    for way in (step_lib._squared_together, step_lib._squared_by_products):
        parity.close(jax.jit(way)(*trees), exact, rtol=3e-5, what=way.__name__)


def test_a_gpus_program_sums_the_norms_of_an_array_at_once():
    trees = [{name: jnp.zeros((n, 8)) for name, n in (("a", 3), ("b", 4))}] * 4
    traced = jax.jit(step_lib.measure).trace(*trees)
    gpu, *others = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu", "tpu"))
    grad_norm = 2  # a sum for each array, on every platform
    assert gpu.count("stablehlo.reduce(") == 2 + grad_norm
    assert "dot_general" not in gpu
    assert [text.count("stablehlo.dot_general") for text in others] == [3 * 2] * 2


@pytest.mark.gpu_aot
@gpu_kit.needs_compiler
def test_norms_cost_a_gpu_no_copies():
    """The kernel that updates an array in place also sums its squares; three separate sums would make XLA copy it."""
    where = jax.sharding.SingleDeviceSharding(topology.devices("rtx4090:1")[0])
    params = [jax.ShapeDtypeStruct((320, 64), jnp.float32, sharding=where)] * 3
    optimizer = make_optimizer(1e-3)
    initial = jax.eval_shape(lambda p: state.create(p, optimizer), params)
    initial = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), initial)

    def update(now, grads):
        updates, opt_state = optimizer.update(grads, now.opt_state, now.params)
        params = optax.apply_updates(now.params, updates)
        ema_params = state.update_ema(now.ema_params, params, 0.95)
        metrics = step_lib.measure(params, grads, updates, ema_params)
        return state.TrainState(now.step + 1, params, opt_state, ema_params), metrics

    text = jax.jit(update, donate_argnums=0).lower(initial, params).compile().as_text()
    assert " fusion(" in text and " copy(" not in text


def test_accumulation_changes_nothing_but_rounding():
    _, params, frozen, batch = make_case()
    results = []
    for accumulation_steps in (1, 2):
        now = state.create(params, OPTIMIZER)
        for _ in range(2):
            now, metrics = step_in(accumulation_steps)(now, frozen, batch, jax.random.key(1))
        results.append((now.params, now.ema_params, metrics))
    jax.tree.map(lambda a, b: parity.close(a, b, rtol=1e-5, atol=1e-5), *results)


def test_draws_depend_on_key_and_step_alone():
    _, params, frozen, batch = make_case()
    first = state.create(params, OPTIMIZER)
    later = first.replace(step=jnp.int32(5))
    cases = (first, 1), (first, 1), (later, 1), (first, 2)
    runs = [step_in(1)(now, frozen, batch, jax.random.key(seed)) for now, seed in cases]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert len({float(metrics["loss"]) for _, metrics in runs}) == 3


def test_compiles_once_and_donates_the_state():
    traces = []

    def distance(prediction, target):
        traces.append(prediction.shape)
        return objective.l2(prediction, target)

    problem, params, frozen, batch = make_case(distance)
    optimizer = make_optimizer(learning_rate_schedule(1e-3, 2, 10, 5), weight_decay=1e-2)
    step = jax.jit(make_step(problem, optimizer, 0.95), donate_argnums=0)
    now, frozen = state.create(params, optimizer), jax.device_put(frozen)
    kept = jax.device_put(params)
    for _ in range(3):
        before = now
        now, _ = step(now, frozen, batch, jax.random.key(0))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert len(traces) == 1 and step._cache_size() == 1
    assert not any(x.is_deleted() for x in jax.tree.leaves((now, frozen, kept)))


def lowered_text(width: int) -> tuple[str, int]:
    """The step's program for UNets of one level of that width, from shapes; and their parameter count."""
    teacher = unet_lib.from_config(tiny.UNETS["micro"] | {"block_out_channels": (width,)})
    weights = names.abstract_params(teacher)
    student, params = student_of(teacher, weights, 16)
    problem = problem_of(student, teacher)
    optimizer = make_optimizer(1e-6)
    array = jax.ShapeDtypeStruct
    cond, null = ({"encoder_hidden_states": array((b, 7, 32), jnp.float32)} for b in (4, 1))
    latents = array((4, 8, 8, 4), jnp.float32)
    initial = jax.eval_shape(lambda p: state.create(p, optimizer), params)
    frozen = objective.Frozen(teacher=weights, null=null)
    batch = {"mean": latents, "logvar": latents, "cond": cond}
    key = jax.eval_shape(jax.random.key, 0)
    step = jax.jit(make_step(problem, optimizer, 0.95), donate_argnums=0)
    lowered = step.lower(initial, frozen, batch, key)
    arguments = sum(x.size for x in jax.tree.leaves((initial, frozen)) if x.dtype == jnp.float32)
    count = names.num_params(teacher)
    # theta, theta^- and Adam's two moments have a cond_proj [16 width], the teacher has none; null text [1 7 32].
    assert arguments == 5 * count + 4 * 16 * width + 7 * 32
    return lowered.as_text(), count


def test_program_holds_no_weights():
    (small, few), (large, many) = lowered_text(32), lowered_text(128)
    assert many > 8 * few
    assert abs(len(large) - len(small)) < 0.02 * len(small)
    # Written out as hexadecimal; the largest are the noise table's [1000] float32.
    constants = re.findall(r'dense<"0x([0-9A-F]+)"', large)
    assert max(len(digits) // 2 for digits in constants) <= 4000


def test_learning_rate_schedule():
    warm = learning_rate_schedule(2.0, warmup_steps=3)
    parity.close([warm(n) for n in range(6)], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    constant = learning_rate_schedule(1e-6)
    parity.close([constant(n) for n in (0, 1, 10**6)], 1e-6)
    decayed = learning_rate_schedule(1.0, decay_start=10, decay_steps=4)
    parity.close([decayed(n) for n in (0, 10, 11, 12, 13, 14, 99)], [1, 1, 0.75, 0.5, 0.25, 0, 0])
    both = learning_rate_schedule(1.0, warmup_steps=1, decay_start=0, decay_steps=10)
    parity.close([both(n) for n in (0, 1, 5)], [0.5, 0.9, 0.5])
    parity.close(jax.jit(decayed)(jnp.int32(12)), 0.5)


def test_frozen_arrays_and_batch_stay_as_they_are():
    """With learning rate and decay 0 nothing changes but the step, and theta^- = theta."""
    problem, params, frozen, batch = make_case()
    optimizer = optax.sgd(0.0)
    now = state.create(params, optimizer)
    after, metrics = jax.jit(make_step(problem, optimizer, 0.0))(now, frozen, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    jax.tree.map(np.testing.assert_array_equal, after.ema_params, params)
    assert after.step == 1 and metrics["grad_norm"] > 0
    assert metrics["update_norm"] == 0 and metrics["ema_distance"] == 0 and "learning_rate" not in metrics


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_loss_by_timestep(accumulation_steps):
    """Sums and counts over the parts of the grid, from the examples' own losses."""
    problem, params, frozen, batch = make_case()
    loss = jax.jit(lambda draws: lcm.lcd_loss(problem, params, params, frozen, batch, draws))
    seen = set()
    for seed in range(4):
        key = jax.random.key(seed)
        _, metrics = step_in(accumulation_steps)(state.create(params, OPTIMIZER), frozen, batch, key)
        draws = objective.draw(problem, jax.random.fold_in(key, 0), SHAPE)
        each = np.asarray(loss(draws))
        which = np.digitize(draws.index, [10, 20, 30, 40])
        bins = metrics["loss_bins"]
        np.testing.assert_array_equal(bins["count"], np.bincount(which, minlength=5))
        parity.close(bins["sum"], np.bincount(which, each, minlength=5), rtol=1e-5)
        parity.close(bins["sum"].sum() / 4, metrics["loss"], rtol=1e-5)
        seen |= set(which.tolist())
    assert len(seen) >= 3


@pytest.mark.slow
def test_first_moment_in_half_precision():
    problem, params, frozen, batch = make_case()
    results = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(1e-3, mu_dtype=dtype)
        step, now = jax.jit(make_step(problem, optimizer, 0.9)), state.create(params, optimizer)
        for _ in range(3):
            now, _ = step(now, frozen, batch, jax.random.key(1))
        moments = [optax.tree.get(now.opt_state, name) for name in ("mu", "nu")]
        assert [{x.dtype.name for x in jax.tree.leaves(tree)} for tree in moments] == [{dtype}, {"float32"}]
        results[dtype] = optax.tree.sub(now.params, jax.tree.map(jnp.asarray, params))
    off = optax.tree.sub(*results.values())
    deviation = optax.tree.norm(off) / optax.tree.norm(results["float32"])
    print(f"three updates deviate by {deviation:.1e}")
    assert 0 < deviation < 4e-3  # bfloat16 keeps 8 bits
