"""The step of `run.step.make`: the same numbers on every mesh and with every switch, and which arrays move."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CASES = {  # (data, fsdp, slices), None: one device; options
    "all": ((2, 4, 1), {"train.remat": "block", "train.accumulation_steps": 2, "model.attention": "chunked"}),
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
TANGENT = {
    f"forward mode, {attention}, {remat}": (
        (2, 4, 1),
        {"objective": "tangent", "model.attention": attention, "train.remat": remat},
    )
    for attention, remat in (("xla", "none"), ("chunked", "block"), ("xla", "attention"))
}
ALL = CASES | TANGENT
EXACT = 1e-10  # float64: far above its rounding, far below that of anything in float32


def measured(teacher: Path | str, cases, steps: int = 2, small: int = 64) -> dict:
    """What run_step_process.py prints."""
    options = str(teacher), json.dumps({case: ALL[case] for case in cases}), str(steps), str(small)
    program = [sys.executable, str(ROOT / "tests" / "run_step_process.py"), *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "cases",
    [["all"], [case for case in CASES if case != "all"], list(TANGENT)],
    ids=["all switches", "each", "forward mode"],
)
def test_a_step_is_that_of_one_device_and_moves_weights_and_gradients_alone(cases, tmp_path):
    found = measured(tiny.build("teacher", tmp_path / "teacher"), cases)
    assert list(found) == cases
    for case, about in found.items():
        distances = about["distances"]
        print(case, distances)
        assert {"gradient", "loss 2", "params", "ema_params", "moments"} < distances.keys()
        parity.close(max(distances.values()), 0, atol=EXACT)
        assert about["same_text"], "the step of shapes and that of weights differ"
        data, fsdp, slices = ALL[case][0] or (1, 1, 1)
        whole, shards = ({tuple(shape) for shape in shapes} for shapes in about["weights"])
        for kind, axes, shape in about["moved"]:
            if kind == "all-gather":
                assert axes == ["fsdp"] and tuple(shape) in whole, (axes, shape)
            else:  # norms, the loss, and its bins and their counts [5] are not weights
                assert kind in ("all-reduce", "reduce-scatter"), (kind, axes, shape)
                assert tuple(shape) in whole | shards | {(), (5,)}, (kind, axes, shape)
        kinds = {kind for kind, *_ in about["moved"]}
        assert ("all-gather" in kinds) == (fsdp > 1) and bool(kinds) == (data * fsdp * slices > 1)


def test_twenty_steps_of_the_shapes_model():
    """The embedded teacher, its weights sharded by the rule; after 20 steps Adam has amplified small differences."""
    for case, about in measured("shapes", ("all", "data 8", "fsdp 8"), steps=20, small=2**16).items():
        print(case, about["distances"])
        assert about["same_text"]
        parity.close(max(about["distances"].values()), 0, atol=1e-8)
