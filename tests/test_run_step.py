"""The step that `training_step.make` makes: the same on every mesh and by every switch; what it moves; what it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import tiny

ROOT = Path(__file__).parents[1]
QUICK = {  # (data, fsdp, slices), None: one device; options
    "all": ((2, 4, 1), {"train.remat": "block", "train.accumulation_steps": 2, "model.attention": "chunked"}),
}
SLOW = {
    "data 8": ((8, 1, 1), {}),
    "data 2, fsdp 4": ((2, 4, 1), {}),
    "fsdp 8": ((1, 8, 1), {}),
    "2 slices, fsdp 2": ((2, 2, 2), {}),
    "block": (None, {"train.remat": "block"}),
    "attention": (None, {"train.remat": "attention"}),
    "accumulation": (None, {"train.accumulation_steps": 4}),
    "chunked attention": (None, {"model.attention": "chunked"}),
    "fsdp 8, attention": ((1, 8, 1), {"train.remat": "attention"}),
}
EXACT = 1e-10  # float64: far above its rounding, far below that of anything in float32


def told(teacher: Path | str, cases: dict, steps: int = 2, small: int = 64) -> dict:
    options = str(teacher), json.dumps(cases), str(steps), str(small)
    program = [sys.executable, str(ROOT / "tests" / "run_step_process.py"), *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(case: str, distances: dict, moved: list, weights: list, same_text: bool) -> None:
    """Raises AssertionError unless a case computes what one device does, and moves weights and gradients alone."""
    print(case, distances)
    assert {"gradient", "loss 2", "params", "ema_params", "moments"} < distances.keys()
    parity.close(max(distances.values()), 0, atol=EXACT)
    assert same_text, "the step of shapes and that of weights differ"
    data, fsdp, slices = (QUICK | SLOW)[case][0] or (1, 1, 1)
    whole, shards = ({tuple(shape) for shape in shapes} for shapes in weights)
    for kind, axes, shape in moved:
        if kind == "all-gather":
            assert axes == ["fsdp"] and tuple(shape) in whole, (axes, shape)
        else:  # norms, the loss, and its bins and their counts [5] are no weights
            assert kind in ("all-reduce", "reduce-scatter"), (kind, axes, shape)
            assert tuple(shape) in whole | shards | {(), (5,)}, (kind, axes, shape)
    kinds = {kind for kind, *_ in moved}
    assert ("all-gather" in kinds) == (fsdp > 1) and bool(kinds) == (data * fsdp * slices > 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("step") / "teacher")


@pytest.mark.slow
def test_a_sharded_step_with_all_switches_is_the_step(teacher):
    for case, about in told(teacher, QUICK).items():
        check(case, **about)


@pytest.mark.slow
def test_each_mesh_and_each_switch(teacher):
    found = told(teacher, SLOW)
    assert found.keys() == SLOW.keys()
    for case, about in found.items():
        check(case, **about)


@pytest.mark.slow
def test_twenty_steps_of_the_shapes_model():
    """The embedded teacher, weights split by the rule as it is; Adam has had time to make much of little."""
    cases = {name: (QUICK | SLOW)[name] for name in ("all", "data 8", "fsdp 8")}
    for case, about in told("shapes", cases, steps=20, small=2**16).items():
        del about["moved"], about["weights"]
        print(case, about)
        assert about["same_text"]
        parity.close(max(about["distances"].values()), 0, atol=1e-8)
