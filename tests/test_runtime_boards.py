"""Weights & Biases, by a module that stands for it: one run per workdir, the records of metrics.jsonl, one pip line."""

import io
import json
import sys
import types

import numpy as np
import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime.reporting import boards
from lcm_jax.runtime.reporting.telemetry import Telemetry, read_metrics


class Run:
    def __init__(self, name):
        self.id, self.logged, self.metrics, self.finished = name, [], [], False

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, record):
        self.logged.append(record)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """The module; `.calls`: what `init` was told, `.runs`: what it gave."""
    module = types.ModuleType("wandb")
    module.calls, module.runs = [], []

    def init(**settings):
        module.calls.append(settings)
        module.runs.append(Run(settings["id"] or f"run{len(module.runs)}"))
        return module.runs[-1]

    module.init, module.Image = init, lambda grid: ("image", grid.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def train(workdir, first, last, project="demo"):
    with Telemetry(workdir, 20, batch_size=8, start_step=first, log_every=5, stream=io.StringIO(), wandb=project,
                   config={"train": {"steps": 20}}) as telemetry:
        for step in range(first + 1, last + 1):
            telemetry.update(step, {"loss": 1.0 / step})
        telemetry.settle()
        telemetry.images(last, np.zeros((2, 3, 3), np.uint8))


def test_the_same_run_goes_on(tmp_path, wandb):
    train(tmp_path, 0, 10)
    train(tmp_path, 7, 20)
    first, second = wandb.calls
    assert first["project"] == second["project"] == "demo" and first["config"] == {"train": {"steps": 20}}
    assert first["id"] is None and second["id"] == "run0" and second["resume"] == "allow"
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "demo", "id": "run0"}
    for run in wandb.runs:
        assert run.finished and run.metrics == [("*", "step")]
        assert run.logged[-1]["samples"] == ("image", (2, 3, 3))
    records = [record for record in wandb.runs[1].logged if "loss" in record]
    assert records == [record for record in read_metrics(tmp_path) if record["step"] > 7]


def test_another_project_is_another_run(tmp_path, wandb):
    train(tmp_path, 0, 5)
    train(tmp_path, 5, 10, "other")
    assert wandb.calls[1]["id"] is None
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "other", "id": "run1"}


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LcmError, match="pip install") as error:
        Telemetry(tmp_path, 20, batch_size=8, stream=io.StringIO(), wandb="demo")
    assert "\n" not in str(error.value)
    with pytest.raises(LcmError, match="wandb"):
        boards.import_wandb()
    with Telemetry(tmp_path, 20, batch_size=8, stream=io.StringIO()):
        assert not (tmp_path / "wandb.json").exists()
