"""Checkpoints: bitwise round trip, strict restore, nothing incomplete under a final name, old checkpoints."""

import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax.distill.state import create
from lcm_jax.distill.step import learning_rate_schedule, make_optimizer
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.runtime import checkpoints as checkpoints_module
from lcm_jax.runtime.checkpoints import Checkpoints, kept, list_steps, load_subtree
from lcm_jax.runtime.distributed import Barrier

ROOT = Path(__file__).parents[1]


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema_params: Any


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "norm1": {"scale": jnp.asarray([np.nan, -0.0, 1e-45], jnp.float32)},
    }
    optimiser = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 2)
    return State(jnp.int32(seed), params, optimiser.init(params), jax.tree.map(jnp.copy, params))


def bits(tree):
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (5, 10, 15):
            assert checkpoints.save(step, make_state(step), {"images": 32 * step})
        assert not checkpoints.save(15, make_state(0)), "an existing step is not written again"
    return folder


def test_round_trip_is_bitwise(saved):
    assert sorted(os.listdir(saved)) == ["10", "15"], "plain numbers, the newest two"
    assert list_steps(saved) == [10, 15]
    abstract = jax.eval_shape(make_state)
    with Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.steps() == [10, 15] and checkpoints.latest_step() == 15
        for step, restored in ((15, checkpoints.restore(abstract)), (10, checkpoints.restore(make_state(), 10))):
            assert bits(restored) == bits(make_state(step))
            assert jax.tree.structure(restored) == jax.tree.structure(make_state())
            assert checkpoints.extra(step) == {"images": 32 * step}


def test_donated_right_after_save(tmp_path):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = {"x": jnp.arange(2**20, dtype=jnp.float32)}
    with Checkpoints(tmp_path / "c", keep=9) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state)
            state = double(state)
        checkpoints.wait()
        for step in range(4):  # x -> 2x + 1 in closed form
            want = np.arange(2**20, dtype=np.float32) * 2**step + (2**step - 1)
            np.testing.assert_array_equal(checkpoints.restore(state, step)["x"], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond_proj": jnp.zeros((2, 2))}, "params/cond_proj: not in the checkpoint, expected float32[2,2]"),
        ({"norm1": None}, "params/norm1/scale: float32[3] in the checkpoint, not expected"),
        ({"norm1": {"scale": jnp.zeros(4)}}, "params/norm1/scale: float32[3] in the checkpoint, expected float32[4]"),
        ({"bias": jnp.zeros(8)}, "params/bias: bfloat16[8] in the checkpoint, expected float32[8]"),
        (
            {f"x{i}": jnp.zeros(1) for i in range(30)},
            "params/x15: not in the checkpoint, expected float32[1]; and 22 more",
        ),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "many"],
)
def test_restore_refuses_any_difference(saved, change, message):
    state = make_state()
    with Checkpoints(saved) as checkpoints, pytest.raises(LcmError) as refused:
        checkpoints.restore(state._replace(params={**state.params, **change}))
    assert f"{message}. Use the config it was made with" in str(refused.value) and "\n" not in str(refused.value)
    assert "ema_params" not in str(refused.value), "only what differs is listed"


def test_load_subtree_reads_one_part(saved, tmp_path):
    tree = load_subtree(saved, 10, "ema_params")
    assert bits(tree) == bits(make_state(10).ema_params) and isinstance(tree["bias"], np.ndarray)
    with pytest.raises(LcmError, match=r"no part 'weights'; it has ema_params, opt_state, params, step"):
        load_subtree(saved, 10, "weights")
    with pytest.raises(LcmError, match=r"no checkpoint of step 11 .*present: 10, 15"):
        load_subtree(saved, 11, "params")
    with pytest.raises(LcmError, match=r"present: none"):
        load_subtree(saved / "nowhere", 11, "params")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(LcmError, match=r"no checkpoint in .*none"):
        checkpoints.restore(make_state())


def test_kept():
    none = dict.fromkeys(range(1, 31))
    assert kept(none, 3) == {28, 29, 30}
    assert kept(none, 1, keep_every=10) == {10, 20, 30}
    assert kept({1: 0.5, 2: 0.1, 3: 0.1, 4: 0.7, 5: None, 6: float("nan")}, 1) == {3, 6}, "the newest of equals"
    assert kept({1: float("nan"), 2: None}, 1) == {2}
    assert kept({1: None}, 3) == {1}


def test_other_folders_among_checkpoints_are_no_steps(tmp_path):
    for name in ("2", "10", "007", "\u0663", "\u00b2", "-3", "9" * 30, "10.tmp"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [2, 10]


def test_every_tenth_and_the_best_are_kept(tmp_path):
    losses = {5: 0.5, 10: 0.9, 15: 0.2, 20: 0.3, 25: 0.4}
    options = {"keep": 1, "keep_every": 10, "best": "loss"}
    with Checkpoints(tmp_path / "c", **options) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"x": jnp.float32(step)}, metrics={"loss": jnp.float32(loss), "other": -step})
            assert checkpoints.latest_step() == step
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15, 20, 25]
    assert list_steps(tmp_path / "c") == [10, 15, 20, 25]
    with Checkpoints(tmp_path / "c", **options) as checkpoints:  # the metric of 15 is read again
        assert not checkpoints.save(17, {"x": jnp.float32(17)}), "no step before an existing one"
        checkpoints.save(30, {"x": jnp.float32(30)}, metrics={"loss": float("nan")})
        checkpoints.save(31, {"x": jnp.float32(31)})
    assert list_steps(tmp_path / "c") == [10, 15, 20, 30, 31]
    with Checkpoints(tmp_path / "c", **options) as checkpoints:
        checkpoints.save(33, {"x": jnp.float32(33)}, metrics={"loss": 0.1})
    assert list_steps(tmp_path / "c") == [10, 20, 30, 33], "a better one replaces the best"
    with Checkpoints(tmp_path / "c", best="los") as checkpoints, pytest.raises(LcmError, match="choose one of loss"):
        checkpoints.save(40, {"x": jnp.float32(1)}, metrics={"loss": 0.1})


def test_an_old_one_that_its_owner_removed(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "c" / "1")
        checkpoints.save(2, {"x": jnp.zeros(3)})
    assert os.listdir(tmp_path / "c") == ["2"]


def test_save_returns_before_the_digests(tmp_path, monkeypatch):
    begun, go, write = threading.Event(), threading.Event(), checkpoints_module.write_digests

    def slow(folder):
        begun.set()
        assert go.wait(60)
        write(folder)

    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        checkpoints.wait()
        monkeypatch.setattr(checkpoints_module, "write_digests", slow)
        assert checkpoints.save(2, {"x": jnp.ones(3)})
        assert begun.wait(60), "orbax has committed, digests are being written"
        assert checkpoints.latest_step() == 2, "the run that saves it counts it already"
        assert list_steps(tmp_path / "c") == [1], "not complete, and the previous one is still there"
        go.set()
        checkpoints.wait()
        assert list_steps(tmp_path / "c") == [2]


def full(folder):
    raise OSError(122, "Disk quota exceeded")


def test_failing_digests_fail_the_next_call_and_lose_nothing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints_module, "write_digests", full)
            assert checkpoints.save(2, {"x": jnp.ones(3)})
            with pytest.raises(LcmError, match=r"saving checkpoint 2 in .*quota.*Earlier checkpoints are w"):
                checkpoints.save(3, {"x": jnp.ones(3)})
        assert checkpoints.steps() == [1] == list_steps(tmp_path / "c")
        assert checkpoints.save(2, {"x": jnp.ones(3)}), "the step may be tried again"
    assert os.listdir(tmp_path / "c") == ["2"]


def test_check_raises_what_failed(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.check()
        monkeypatch.setattr(checkpoints_module, "write_digests", full)
        checkpoints.save(1, {"x": jnp.zeros(3)})
        with pytest.raises(LcmError, match=r"saving checkpoint 1 in .*quota"):
            for _ in range(600):
                checkpoints.check()
                time.sleep(0.1)
        checkpoints.check()


def test_a_process_that_fails_does_not_wait_but_reports(tmp_path, monkeypatch):
    calls = []

    checkpoints = Checkpoints(tmp_path / "c")
    monkeypatch.setattr(checkpoints_module, "write_digests", full)
    monkeypatch.setattr(Barrier, "wait", lambda self: calls.append("waits"))
    monkeypatch.setattr(Barrier, "give_up", lambda self, error: calls.append(str(error)))
    checkpoints.save(1, {"x": jnp.zeros(3)})
    with pytest.raises(LcmError, match="quota"):
        checkpoints.close()
    (message,) = calls
    assert message.startswith(f"saving checkpoint 1 in {tmp_path}")


def test_nobody_waits_for_a_process_that_failed(tmp_path, monkeypatch):
    go, waited = threading.Event(), []
    monkeypatch.setattr(Barrier, "wait", lambda self: (go.wait(60), waited.append(self)))  # it never comes
    monkeypatch.setattr(Barrier, "given_up", lambda self: "process 1 of 2: saving checkpoint 1 failed")
    with pytest.raises(LcmError, match="^process 1 of 2: saving checkpoint 1 failed$"):
        with Checkpoints(tmp_path / "c") as checkpoints:
            checkpoints.save(1, {"x": jnp.zeros(3)})
            checkpoints.save(2, {"x": jnp.zeros(3)})
    assert waited == [] and checkpoints.steps() == []
    go.set()


OLD = ROOT / "tests" / "assets" / "checkpoint_de81b78"  # the folder `checkpoints` that commit de81b78 wrote
OLD_EXTRA = {"step": 7, "images": 224, "config": {"seed": 0}}


def old_state():
    """What is in OLD: saved as step 7 with OLD_EXTRA and {"loss": 0.125}. Every value follows from its name."""
    schedule = learning_rate_schedule(1e-4, warmup_steps=2)
    params = {
        "conv_in": {"kernel": jnp.zeros((3, 3, 4, 2)), "bias": jnp.zeros(2)},
        "down_blocks_0": {"resnets_1": {"norm1": {"scale": jnp.zeros(8)}}},
    }

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers = (np.arange(leaf.size) - zlib.crc32(name.encode()) % 97) / 7
        return jnp.asarray(numbers.reshape(leaf.shape).astype(leaf.dtype))

    state = create(params, make_optimizer(schedule, weight_decay=0.01, max_grad_norm=1.0, mu_dtype="bfloat16"))
    return jax.tree_util.tree_map_with_path(value, state)


def test_a_checkpoint_of_an_older_version_is_restored_bitwise(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "c")
    with Checkpoints(folder, best="loss") as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(old_state))
        assert bits(restored) == bits(old_state()) and int(restored.opt_state[1][0].count) != 0
        assert jax.tree.structure(restored) == jax.tree.structure(old_state())
        assert checkpoints.extra() == OLD_EXTRA
        assert checkpoints.save(8, old_state(), OLD_EXTRA), "and the run resumes"
    assert bits(load_subtree(folder, 7, "ema_params")) == bits(old_state().ema_params)


def test_a_damaged_checkpoint_of_an_older_version_is_refused(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "c")
    largest = max(
        (path for path in (folder / "7" / "state" / "ocdbt.process_0").rglob("*") if path.is_file()),
        key=os.path.getsize,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(LcmError, match=f"every checkpoint .* is damaged .*{largest.name} is not what was written"):
            checkpoints.restore(jax.eval_shape(old_state))


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


FULL = """
import resource, signal, sys, jax.numpy as jnp, numpy as np
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.runtime.checkpoints import Checkpoints
noise = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)
try:
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {"x": jnp.full(1000, 1.0)})
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the disk is full
        checkpoints.save(2, {f"x{i}": jnp.asarray(noise[i:]) for i in range(8)})
        checkpoints.wait()
except LcmError as error:
    print("refused:", error)
"""


def test_full_disk(tmp_path):
    done = run_python(FULL, tmp_path / "c")
    assert "refused: saving" in done.stdout and "free disk space" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1 and not done.stderr, "pages of the libraries' own"
    assert list_steps(tmp_path / "c") == [1]
    with Checkpoints(tmp_path / "c") as checkpoints:
        x = checkpoints.restore({"x": jax.ShapeDtypeStruct((1000,), jnp.float32)})["x"]
    assert (np.asarray(x) == 1).all()


@pytest.mark.parametrize("name", ["run [x]", "a*", "b?", "a\\b", "gs:", "caf\udce9"])
def test_names_that_orbax_expands_are_refused_before_anything_is_written(tmp_path, name):
    """It writes to runs/[x] and then reads runs/x: a checkpoint that cannot be restored."""
    with pytest.raises(BadArgument, match=r"^workdir=.*cannot be read back from a folder with .*; choose another$"):
        Checkpoints(tmp_path / name / "checkpoints")
    assert not (tmp_path / name).exists()
