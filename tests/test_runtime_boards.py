"""Boards beside metrics.jsonl: Weights & Biases by a fake module, and boards that block, fail or are slow."""

import json
import sys
import threading
import types

import numpy as np
import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime import boards
from lcm_jax.runtime.boards import QueuedBoard
from lcm_jax.runtime.telemetry import RunInfo, Telemetry, read_metrics


class FakeRun:
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
    """The fake module; `.calls`: arguments of `init`, `.runs`: what it returned."""
    module = types.ModuleType("wandb")
    module.calls, module.runs = [], []

    def init(**settings):
        module.calls.append(settings)
        module.runs.append(FakeRun(settings["id"] or f"run{len(module.runs)}"))
        return module.runs[-1]

    module.init, module.Image = init, lambda image: ("image", image.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def train(workdir, first, last, project="demo"):
    run = RunInfo(20, batch_size=8, start_step=first, config={"train": {"steps": 20}})
    with Telemetry(workdir, run, every=5, wandb=project) as telemetry:
        for step in range(first + 1, last + 1):
            telemetry.update(step, {"loss": 1.0 / step})
        telemetry.settle()
        telemetry.images(last, np.zeros((2, 3, 3), np.uint8))


def test_resuming_continues_the_run_of_the_project(tmp_path, wandb):
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
    train(tmp_path, 10, 15, "other")
    assert wandb.calls[2]["id"] is None
    before = (tmp_path / "wandb.json").read_bytes()
    for content in ('["run2"]', '{"project": "other", "id": 2}', "{"):
        (tmp_path / "wandb.json").write_text(content)
        with pytest.raises(LcmError, match="wandb.json .*; delete it to begin another run there"):
            boards.WeightsAndBiases(tmp_path, "other")
    (tmp_path / "wandb.json").write_bytes(before)
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "other", "id": "run2"}


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LcmError, match="log.wandb needs the package wandb: pip install") as error:
        boards.import_wandb()
    assert "\n" not in str(error.value)


@pytest.fixture
def reports(tmp_path, capsys):
    """project -> the lines that a run of 20 steps prints besides its steps, all of which reach metrics.jsonl."""

    def run(project=""):
        train(tmp_path, 0, 20, project)
        assert [record["step"] for record in read_metrics(tmp_path)] == [5, 10, 15, 20]
        assert (tmp_path / "samples" / "00000020.png").exists()
        return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]

    return run


@pytest.fixture
def hang(monkeypatch):
    """A call that lasts as long as the test."""
    monkeypatch.setattr(boards, "CLOSE_SECONDS", 0.2)
    event = threading.Event()
    yield lambda *_, **__: event.wait()
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("board "):
            thread.join()


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_board_that_blocks(reports, wandb, hang, monkeypatch):
    wandb.init = hang
    monkeypatch.setattr(boards.TensorBoard, "scalars", hang)
    first, second = reports("demo")
    assert first.startswith("Weights & Biases did not end within") and "metrics.jsonl has them all" in first
    assert second.startswith("TensorBoard did not end")


@pytest.mark.parametrize(
    ("method", "error"),
    [("scalars", RuntimeError("no route\nto host")), ("image", SystemExit(1)), ("close", MemoryError())],
)
def test_a_board_that_fails(reports, monkeypatch, method, error):
    monkeypatch.setattr(boards.TensorBoard, method, failing(error))
    (line,) = reports()
    assert line.startswith(f"TensorBoard ended ({type(error).__name__}") and "to host" not in line


def test_a_board_that_cannot_begin(reports, tmp_path, wandb):
    wandb.init = failing(ConnectionError("api.wandb.ai"))
    (tmp_path / "tensorboard").write_text("a file")
    first, second = sorted(reports("demo"))
    assert first.startswith("TensorBoard ended (") and second.startswith("Weights & Biases ended (ConnectionError: api")


def test_a_thread_of_tensorboard_that_dies_is_one_line(reports, monkeypatch):
    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", failing(OSError(28, "disk full")))
    (line,) = reports()
    assert line.startswith("TensorBoard ended (OSError: [Errno 28] disk full")


def test_a_slow_board_misses_what_its_queue_cannot_hold(hang):
    lines: list[str] = []
    board = QueuedBoard("Slow", hang, lines.append)
    for step in range(2 * boards.QUEUE_LIMITS["scalars"]):
        board.scalars({"step": step})
        board.image(step, "samples", np.zeros((2, 2, 3), np.uint8))
    assert board._queue.qsize() == sum(boards.QUEUE_LIMITS.values())
    assert lines == ["Slow is too slow; it may miss numbers, metrics.jsonl has them all"]


def test_a_blocked_board_is_reported_once_and_not_waited_for(hang, monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
    board = QueuedBoard("Slow", hang, lines.append)
    while board._call_began is None:
        pass
    now[0] = 61.0
    board.scalars({"step": 1})
    boards.close([board])  # though no time passes
    assert lines == ["Slow has not answered for 61 s; it may miss numbers, metrics.jsonl has them all"]
