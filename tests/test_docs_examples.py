"""The examples of docs/extending.md, executed as they stand."""

import contextlib
import pickle
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_configs
from toy_unet import NOISE, Net, problem_of

from lcm_jax.data import filters, loader, rows
from lcm_jax.data.order import Order
from lcm_jax.data.records import BadRecordError
from lcm_jax.diffusion import samplers, timesteps
from lcm_jax.distill import OBJECTIVES, objective, state
from lcm_jax.distill.step import make_optimizer, make_step
from lcm_jax.errors import BadArgument
from lcm_jax.models import unet as unet_lib
from lcm_jax.models.attention import dot_product_attention
from lcm_jax.run import config as config_lib

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SHAPE = (4, 4, 4, 2)


def example(title: str) -> types.ModuleType:
    """The code of a section, as a module."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    module = types.ModuleType("example")
    exec(compile(code, f"docs/extending.md, {title}", "exec"), module.__dict__)
    return module


def test_every_example_is_tested():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert titles == ["An objective", "A sampler", "A source of data", "A kernel"]


@pytest.fixture
def objectives():
    """Restores what an example adds."""
    before = dict(OBJECTIVES)
    yield OBJECTIVES
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_objective(objectives, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = example("An objective")
    config_lib.validate(found.get_config())
    loss = objectives["guided"].loss
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    teacher, student = Net(), Net(time_cond_proj_dim=8)
    weights = jax.jit(teacher.init)(jax.random.key(0), jnp.zeros(SHAPE), jnp.zeros(4, jnp.int32), jnp.zeros((4, 3, 6)))[
        "params"
    ]
    params = {**weights, "cond_proj": {"kernel": jnp.zeros((8, 8))}}  # as a student begins
    batch = {"mean": draw(*SHAPE), "logvar": draw(*SHAPE), "cond": {"encoder_hidden_states": draw(4, 3, 6)}}
    problem = problem_of(student, teacher, objective="guided")
    frozen = objective.Frozen(teacher=weights, null={"encoder_hidden_states": draw(1, 3, 6)})
    draws = jax.jit(lambda key: objective.draw(problem, key, SHAPE))(jax.random.key(1))
    of_w = jax.jit(lambda w: loss(problem, params, params, frozen, batch, draws.replace(w=w)))
    each = of_w(jnp.array([0.0, 1.0, 5.0, 0.0]))
    assert np.all(each[np.array([0, 3])] < 1e-9) and np.all(each[np.array([1, 2])] > 1e-6)
    optimizer = make_optimizer(1e-2)
    step, now = jax.jit(make_step(problem, optimizer, 0.0)), jax.jit(lambda p: state.create(p, optimizer))(params)
    losses = []
    for _ in range(20):
        now, metrics = step(now.replace(step=jnp.int32(0)), frozen, batch, jax.random.key(2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def exact(x, t):
    """eps of data that are normal with std 2."""
    abar = jnp.asarray(NOISE.alphas_cumprod)[t]
    return jnp.sqrt(1 - abar) * x / (4 * abar + 1 - abar)


def test_sampler():
    found = example("A sampler")
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 2)).astype(np.float32)
    last, first = (NOISE.alphas_cumprod[t].astype(np.float64) for t in (0, 999))
    expected = start * np.sqrt((4 * last + 1 - last) / (4 * first + 1 - first))
    errors = {}
    for steps in (10, 20, 40):
        t = timesteps.ddim(steps)
        errors[steps] = np.abs(found.heun(exact, start, None, NOISE, t) - expected).max()
        ddim = samplers.ddim(exact, start, None, NOISE, t, set_alpha_to_one=False)
        assert errors[steps] < np.abs(ddim - expected).max() / 4
    assert errors[20] < errors[10] / 4 and errors[40] < errors[20] / 4

    def hook(x0, x, t, i):
        return x + (i == 1)

    plain = found.heun(exact, start, None, NOISE, timesteps.ddim(4))
    *_, (_, stepwise) = found.heun(exact, start, None, NOISE, timesteps.ddim(4), loop=samplers.stepwise)
    parity.close(stepwise, plain, of_max=parity.NETWORK)  # compiled step by step
    hooked = found.heun(exact, start, None, NOISE, timesteps.ddim(4), hook)
    assert np.abs(hooked - plain).max() > 0.1


def test_source(tmp_path, monkeypatch):
    found = example("A source of data")
    monkeypatch.setitem(sys.modules, "example", found)
    images = np.arange(4 * 6 * 8 * 3, dtype=np.uint8).reshape(4, 6, 8, 3)
    np.savez(tmp_path / "a.npz", images=images, captions=["a", "b", "", "d"])
    source = found.open(tmp_path / "a.npz")
    assert len(source) == 4 and source[1].captions == ("b",) and np.array_equal(source[1].image, images[1])
    assert np.array_equal(source.field("width"), [8.0] * 4) and source.field("aesthetic") is None
    with pytest.raises(BadRecordError, match="caption is empty"):
        source[2]
    assert len(pickle.dumps(source)) < 300 and pickle.loads(pickle.dumps(source)).digest() == source.digest()
    chosen, report = filters.apply(source, ["width >= 8", "height < 7"])
    assert len(chosen) == 4
    transform = rows.ImageTransform(crop="center")
    examples = rows.ImageRows(chosen, ((6, 8),), transform, lambda texts: {"ids": np.array([[ord(t) for t in texts]])})
    bad = []
    order, log = Order(0, 4, (examples.groups,)), loader.BadRecordLog(0.5, bad.append)
    with contextlib.closing(loader.batches((examples,), order, bad_records=log, put=dict)) as batches:
        read = [next(batches) for _ in range(3)]
    for pixels, ids in ((one, of) for batch in read for one, of in zip(batch["pixels"], batch["ids"], strict=True)):
        assert np.array_equal(pixels, images["ab?d".index(chr(ids[0]))])
    assert {(one.key, one.reason) for one in bad} == {("000002", "its caption is empty")}
    np.savez(tmp_path / "b.npz", images=images, captions=["a", "b", "c", "d"])
    assert found.open(tmp_path / "b.npz").digest() != source.digest()
    with pytest.raises(BadArgument, match="no .npz file"):
        found.open(tmp_path / "none.npz")
    with pytest.raises(BadArgument, match="no .npz file"):
        np.savez(tmp_path / "c.npz", pictures=images)
        found.open(tmp_path / "c.npz")


def test_kernel():
    found = example("A kernel")
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 2, 8)) for i, length in enumerate((256, 77, 77)))

    def of(attention):
        def total(q, k, v):
            return jnp.sin(attention(q, k, v)).sum()

        return jax.jit(lambda *args: (attention(*args), *jax.grad(total, argnums=(0, 1, 2))(*args)))(q, k, v)

    for ours, plain in zip(of(found.attention), of(dot_product_attention), strict=True):
        parity.close(ours, plain, of_max=parity.NETWORK)
    causal = found.attention(q[:, :77], k, v, causal=True)
    parity.close(causal, dot_product_attention(q[:, :77], k, v, True))
    calls = []

    def counted(q, k, v, causal=False):
        calls.append(q.shape)
        return found.attention(q, k, v, causal)

    unet = unet_lib.from_config(tiny_configs.UNETS["tiny-sd"])
    text = jnp.zeros((1, 77, unet.cross_attention_dim))
    jax.eval_shape(unet.clone(attention_fn=counted).init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.ones(1), text)
    assert calls
