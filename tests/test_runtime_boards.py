"""Weights & Biases, by a module that stands for it: one run per workdir, the records of metrics.jsonl, one pip line."""

import io
import json
import sys
import threading
import types

import numpy as np
import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime import boards
from lcm_jax.runtime.telemetry import Telemetry, read_metrics


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


def train(workdir, first, last, project="demo", stream=None):
    with Telemetry(
        workdir,
        20,
        batch_size=8,
        start_step=first,
        log_every=5,
        stream=stream or io.StringIO(),
        wandb=project,
        config={"train": {"steps": 20}},
    ) as telemetry:
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


def lines_of(workdir, project="") -> list[str]:
    """What a run of 20 steps says beside its steps; metrics.jsonl has them all."""
    stream = io.StringIO()
    train(workdir, 0, 20, project, stream)
    assert [record["step"] for record in read_metrics(workdir)] == [5, 10, 15, 20]
    assert (workdir / "samples" / "00000020.png").exists()
    return [line for line in stream.getvalue().splitlines() if not line.startswith("step ")]


@pytest.fixture
def hang(monkeypatch):
    """A call that ends with the test."""
    monkeypatch.setattr(boards, "CLOSE", 0.2)
    event = threading.Event()
    yield lambda *_, **__: event.wait()
    event.set()


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_board_that_blocks(tmp_path, wandb, hang, monkeypatch):
    wandb.init = hang
    monkeypatch.setattr(boards.TensorBoard, "scalars", hang)
    first, second = lines_of(tmp_path, "demo")
    assert first.startswith("Weights & Biases did not end within") and "metrics.jsonl has all numbers" in first
    assert second.startswith("TensorBoard did not end")


@pytest.mark.parametrize("method", ["scalars", "picture", "close"])
@pytest.mark.parametrize("error", [RuntimeError("no route\nto host"), SystemExit(1), MemoryError()])
def test_a_board_that_fails(tmp_path, monkeypatch, method, error):
    monkeypatch.setattr(boards.TensorBoard, method, failing(error))
    (line,) = lines_of(tmp_path)
    assert line.startswith(f"TensorBoard ended ({type(error).__name__}") and "to host" not in line


def test_a_board_that_cannot_begin(tmp_path, wandb):
    wandb.init = failing(ConnectionError("api.wandb.ai"))
    (tmp_path / "tensorboard").write_text("a file")
    first, second = sorted(lines_of(tmp_path, "demo"))
    assert first.startswith("TensorBoard ended (") and second.startswith("Weights & Biases ended (ConnectionError: api")


def test_a_thread_of_tensorboard_that_dies_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", failing(OSError(28, "disk full")))
    (line,) = lines_of(tmp_path)
    assert line.startswith("TensorBoard ended (OSError: [Errno 28] disk full") and capfd.readouterr().err == ""


def test_a_board_that_is_slow_gets_less(hang):
    lines: list[str] = []
    shown = boards.Shown("Slow", hang, lines.append)
    for step in range(2 * boards.WAITING["scalars"]):
        shown.scalars({"step": step})
        shown.picture(step, "samples", np.zeros((2, 2, 3), np.uint8))
    assert shown._queue.qsize() == sum(boards.WAITING.values()) and lines == [
        "Slow takes no more for now; what it does not take is left out, metrics.jsonl has all numbers"
    ]


def test_a_board_that_has_blocked_for_long_is_told_of_and_not_waited_for(hang, monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
    shown = boards.Shown("Slow", hang, lines.append)
    while shown._since is None:
        pass
    now[0] = 61.0
    shown.scalars({"step": 1})
    boards.close([shown])  # though no time passes
    assert lines == ["Slow has not answered for 61 s; what it does not take is left out, metrics.jsonl has all numbers"]
