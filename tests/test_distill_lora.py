"""LCM-LoRA: LCD of adapters against torch and peft, what a step costs and holds, and what it is conditioned on.

The torch side is `test_distill_objective.algorithm_1` on models whose adapters are peft's.
"""

import dataclasses
import functools
import math
import re

import family
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import test_distill_objective as lcd
import test_models_lora as peft
import tiny
from diffusers import UNet2DConditionModel
from flax.traverse_util import flatten_dict
from toy_unet import problem_of

from lcm_jax.distill import lcm, objective, state
from lcm_jax.distill.step import make_optimizer, make_step
from lcm_jax.distill.student import student_of
from lcm_jax.models import lora
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import names

SCALE = peft.ALPHA / peft.RANK


def make_problem(kind: str, prediction_type: str, distance=objective.l2) -> objective.Problem:
    unet = unet_lib.from_config(tiny.UNETS[kind])
    whole = lcd.make_problem(kind, prediction_type, distance)
    return dataclasses.replace(whole, student=lora.Adapted(unet, SCALE), teacher=unet)


CASES = [("sd1", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prediction_type"), CASES)
def test_loss_and_gradient_match_torch_with_peft(kind, prediction_type):
    """theta and theta^- are different adapters on one base, which is the teacher."""
    student, target = (peft.peft_unet(kind, seed) for seed in (21, 22))
    teacher = tiny.randomise(UNet2DConditionModel(**tiny.UNETS[kind]), 1)
    batch, null, draws = inputs(kind)
    p = make_problem(kind, prediction_type)
    base, theta, theta_minus = peft.base_params(p.teacher, student), peft.factors(student), peft.factors(target)

    models = {"student": student.double(), "target": target.double(), "teacher": teacher.double()}
    for name, value in models["student"].named_parameters():
        value.requires_grad_(".lora_" in name)
    want_loss = lcd.algorithm_1(models, prediction_type, "l2", batch, null, draws, None)
    want_loss.backward()
    gradient = {k: v.grad for k, v in models["student"].named_parameters() if ".lora_" in k}
    want = flatten_dict(peft.adapter_tree(gradient), sep="/")

    def loss(theta, theta_minus, base):
        frozen = objective.Frozen(teacher=base, null=null)
        return lcm.lcd_loss(p, theta, theta_minus, frozen, batch, objective.Draws(**draws)).mean()

    got_loss, got = peft.jit(jax.value_and_grad(loss))(theta, theta_minus, base)
    got = flatten_dict(got, sep="/")
    parity.close(got_loss, want_loss.item(), rtol=1e-4)
    assert got.keys() == want.keys() and len(got) == 2 * len(lora.target_paths(base))
    for key, value in want.items():
        parity.near(got[key], value, 1e-4, key)


def inputs(kind: str) -> tuple[dict, dict, dict]:
    """`test_distill_objective.inputs`; sd2 takes sd1's, whose text has the same width."""
    return lcd.inputs("sd1" if kind == "sd2" else kind)


def abstract_step(unet, text_width: int, rank: int, adapted: bool = True):
    """(step's arguments as shapes, jitted step) of LCM-LoRA on `unet`, or of full LCD."""
    weights = names.abstract_params(unet)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if adapted:
        student = lora.Adapted(unet, 1.0)
        theta = jax.eval_shape(lambda key: lora.init(key, weights, rank), jax.random.key(0))
    else:
        student, theta = student_of(unet, weights, 16)
    problem = problem_of(student, unet)
    optimizer = make_optimizer(1e-4)
    cond, null = ({"encoder_hidden_states": array((b, 7, text_width))} for b in (2, 1))
    latents = array((2, 8, 8, 4))
    initial = jax.eval_shape(lambda p: state.create(p, optimizer), theta)
    frozen = objective.Frozen(teacher=weights, null=null)
    key = jax.eval_shape(jax.random.key, 0)
    batch = {"mean": latents, "logvar": latents, "cond": cond}
    return (initial, frozen, batch, key), jax.jit(make_step(problem, optimizer, 0.0), donate_argnums=0)


@pytest.mark.slow
def test_a_step_takes_the_base_once():
    """By the arguments of the lowered step: LoRA holds W + 4 adapters, full LCD 5 W and the projections of w."""
    unet = unet_lib.from_config(tiny.UNETS["small"])
    held = {}
    for adapted in (True, False):
        arguments, step = abstract_step(unet, 32, 4, adapted=adapted)
        main = re.search(r"@main\((.*?)\) -> ", step.lower(*arguments).as_text(), re.DOTALL)[1]
        total = sum(math.prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<([\dx]+)xf32>", main))
        held[adapted] = total - size((arguments[2], arguments[1].null)), arguments[0]
    base = names.num_params(unet)
    adapters = size(held[True][1].params)
    assert 0 < adapters < base
    assert held[True][0] == base + 4 * adapters
    assert held[False][0] == 5 * base + 4 * 16 * 16
    (initial, *_), _ = abstract_step(unet_lib.from_config(family.UNETS["sd15"]), 768, 64)
    assert size(initial.params) == 67_252_224  # the published file of LCM-LoRA has 134.6 MB, float16


def size(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def costs(unet, rank: int, side: int, text_width: int) -> dict[str, float]:
    """Floating-point operations that XLA counts, from shapes alone: forward with adapters, and with gradients."""
    weights = names.abstract_params(unet)
    theta = jax.eval_shape(lambda key: lora.init(key, weights, rank), jax.random.key(0))
    adapted = lora.Adapted(unet, 1.0)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = array((1, side, side, 4)), array((1,)), array((1, 77, text_width))

    def output(theta, base, *inputs):
        return adapted.apply({"params": {"base": base, "lora": theta}}, *inputs).sum()

    def count(function, *arguments) -> float:
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

    return {
        "forward": count(output, theta, weights, *inputs),
        "gradient": count(jax.value_and_grad(output), theta, weights, *inputs),
    }


@pytest.mark.slow
def test_no_dense_gradient_is_formed():
    """At SD 1.5's widths and rank 64, 64x64 latents: at most 2.3 forward passes, where dense gradients take 2.9."""
    cost = costs(unet_lib.from_config(family.UNETS["sd15"]), 64, 64, 768)
    ratio = cost["gradient"] / cost["forward"]
    print(f"forward {cost['forward'] / 1e12:.3f} TFLOP, value and gradient {ratio:.3f} x")
    assert 1.9 < ratio <= 2.3


@pytest.mark.slow
def test_frozen_base_is_used_and_steps_move_adapters_alone():
    """If the student's base differs from the teacher; decay 0 makes the target the student."""
    unet = unet_lib.from_config(tiny.UNETS["small"])
    teacher, base = (
        names.from_torch(unet, tiny.randomise(UNet2DConditionModel(**tiny.UNETS["small"]), seed).state_dict())
        for seed in (1, 2)
    )
    (_, _, shapes, _), step = abstract_step(unet, 32, 4)
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    null = {"encoder_hidden_states": np.zeros((1, 7, 32), np.float32)}
    theta = lora.init(jax.random.key(0), base, 4)
    optimizer = make_optimizer(1e-4)
    losses_of = {}
    for name, own in (("own base", base), ("teacher's", None)):
        now = state.create(theta, optimizer)
        frozen = objective.Frozen(teacher=teacher, null=null, base=own)
        for _ in range(2):
            now, metrics = step(now, frozen, batch, jax.random.key(3))
        losses_of[name] = float(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, now.params, now.ema_params)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), now.params, theta)
        assert all(pair["lora_B"] for pair in lora.by_layer(moved).values())
    assert losses_of["own base"] != losses_of["teacher's"]
    assert jax.tree.structure(optax.tree.get(now.opt_state, "mu")) == jax.tree.structure(theta)


class Recorder:
    """Stands for a UNet in bfloat16; records its calls."""

    def __init__(self, time_cond_proj_dim=None):
        self.calls, self.time_cond_proj_dim, self.dtype = [], time_cond_proj_dim, jnp.bfloat16

    def apply(self, variables, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        self.calls.append((variables, z, t, text, timestep_cond, added_cond_kwargs))
        return z.astype(jnp.bfloat16)


def test_sizes_and_crops_reach_every_pass_in_float32():
    """bfloat16 would round 1023 to 1024; the null pass has the caption's sizes with the zero text."""
    batch, null, draws = lcd.inputs("sdxl")
    student, teacher = Recorder(), Recorder()
    p = dataclasses.replace(lcd.make_problem("sdxl"), student=student, teacher=teacher)
    lcm.lcd_loss(p, {}, {}, objective.Frozen(teacher={}, null=null), batch, objective.Draws(**draws))
    ids = batch["cond"]["time_ids"]
    for (*_, added), want in zip([*student.calls, *teacher.calls], [ids, ids, np.repeat(ids, 2, axis=0)], strict=True):
        assert added["time_ids"].dtype == jnp.float32
        np.testing.assert_array_equal(added["time_ids"], want)
    embeds = teacher.calls[0][-1]["text_embeds"]
    assert not embeds[1::2].any() and embeds[::2].all()
