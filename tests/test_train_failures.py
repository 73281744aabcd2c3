"""The training loop if something besides the step fails or hangs: the state is saved first. The step is a counter."""

import dataclasses
import os
import pickle
import runpy
import signal
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from test_runtime_boards import failing

from lcm_jax import train
from lcm_jax.data import loader
from lcm_jax.data.order import Order
from lcm_jax.data.rows import Arrays
from lcm_jax.errors import LcmError
from lcm_jax.run.models import Models
from lcm_jax.runtime.checkpoints import list_steps
from lcm_jax.runtime.telemetry import read_jsonl, read_metrics

ROWS = Arrays(({"label": np.arange(64, dtype=np.int32)},))
ORDER = Order(0, 4, (ROWS.groups,))
STEPS, BAD = 12, 5  # of a run; steps done when it fails


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    ema_params: dict


MODELS = Models(None, {}, types.SimpleNamespace(unet=None), {"unet": None})


class Program:
    problem = frozen = None

    def __init__(self):
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(jax.devices()[0]))
        self.key, self.state = scalar, State(scalar, {"labels": scalar})
        self._add = jax.jit(lambda state, batch: State(state.step + 1, {"labels": state.ema_params["labels"] + batch}))

    def begin(self, trained):
        return State(jnp.int32(0), {"labels": jnp.int32(0)})

    def place_frozen(self, models):
        return None

    def step(self, state, frozen, batch, key):
        return self._add(state, batch), {"loss": 1.0, "grad_norm": 1.0}

    def model_flops(self):
        return 1.0


@pytest.fixture
def run(tmp_path, monkeypatch):
    """options -> the run in tmp_path / "run", whose state is the sum of its data's labels."""
    for name, value in {
        "run.models.shapes": lambda _: None,
        "run.models.load": lambda *_: MODELS,
        "run.data.open_parts": lambda _: [],
        "run.data.check_caches": lambda *_: None,
        "run.data.open_examples": lambda *_: ((ROWS,), ORDER),
        "run.step.make": lambda *_: Program(),
        "run.step.as_batch": lambda batch: batch,
        "data.encoding.make_encode": lambda *_: jax.jit(lambda rows: rows["label"].sum()),
        "train.report_unsharded": lambda *_: "",
        "data.loader.CLOSE": 0.1,
    }.items():
        monkeypatch.setattr(f"lcm_jax.{name}", value)

    def call(profile="", **options):
        config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "shapes_lcm.py"))["get_config"]()
        config.data.batch_size, config.train.steps, config.log.every, config.sample.every = 4, STEPS, 1, 0
        config.update_from_flattened_dict(options)
        return train.train(config, tmp_path / "run", profile)

    call.workdir = tmp_path / "run"
    return call


def saved(run) -> list[int]:
    return list_steps(run.workdir / "checkpoints")


ROW = Arrays.row


def check_resumed(run, monkeypatch) -> None:
    """The same command ends as if nothing had failed."""
    monkeypatch.setattr(Arrays, "row", ROW)
    labels = [index.rank for step in range(STEPS) for index in ORDER.batch(step)]
    assert int(run().ema_params["labels"]) == sum(labels)
    assert [record["step"] for record in read_metrics(run.workdir)] == [*range(1, STEPS + 1)]


def bad_row(monkeypatch, call, step=BAD) -> None:
    """Reading one row of the batch after `step` steps calls `call`."""
    bad = ORDER.batch(step)[1].rank
    monkeypatch.setattr(
        Arrays, "row", lambda self, group, rank, draws: call() if rank == bad else ROW(self, group, rank, draws)
    )


@pytest.mark.parametrize(
    "error",
    [
        LcmError("bad"),
        OSError(5, "Input/output error"),
        BrokenPipeError(),
        EOFError(),
        MemoryError(),
        RuntimeError("x"),
        pickle.UnpicklingError("truncated"),
        TimeoutError(),
        KeyError("image"),
        StopIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_data_is_raised_after_the_state_is_saved(run, monkeypatch, capsys, error):
    bad_row(monkeypatch, failing(error))
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        run()
    assert saved(run) == [BAD] and f"an error: saved step {BAD}" in capsys.readouterr().err
    assert read_metrics(run.workdir)[-1]["step"] == BAD
    check_resumed(run, monkeypatch)


def test_before_the_first_step_there_is_nothing_to_save(run, monkeypatch, capsys):
    bad_row(monkeypatch, failing(MemoryError()), step=0)
    with pytest.raises(MemoryError):
        run()
    assert saved(run) == [] and "saved" not in capsys.readouterr().err
    check_resumed(run, monkeypatch)


def test_a_signal_is_noticed_while_data_hang(run, monkeypatch):
    event, lines = threading.Event(), []
    bad_row(monkeypatch, event.wait)

    def say(line):
        lines.append(line)
        if f"step {BAD + 1};" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loader.waiting, "PATIENCE", 0.3)
    monkeypatch.setattr(loader.waiting, "say", say)
    assert int(run().step) == BAD
    event.set()
    assert saved(run) == [BAD] and any(line.startswith(f"SIGTERM: saved step {BAD};") for line in lines)
    check_resumed(run, monkeypatch)


def test_an_error_besides_the_data_does_not_lose_the_state(run, monkeypatch):
    monkeypatch.setattr(train, "sample_grid", lambda *_: failing(MemoryError()))
    with pytest.raises(MemoryError):
        run(**{"sample.every": 3})
    assert saved(run) == [3]
    (run.workdir / "samples").write_text("a file")
    monkeypatch.setattr(train, "sample_grid", lambda *_: lambda _: np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(OSError, match="samples"):
        run(**{"sample.every": 4})
    assert saved(run) == [3, 4]
    monkeypatch.setattr(train, "sample_grid", lambda *_: None)
    monkeypatch.setattr(train.run_step, "as_batch", failing(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert saved(run) == [3, 4]
    monkeypatch.setattr(train.run_step, "as_batch", lambda batch: batch)
    check_resumed(run, monkeypatch)


def test_a_trace_that_cannot_be_written(run, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", failing(OSError(13, "Permission denied")))
    with pytest.raises(OSError, match="Permission"):
        run(profile="2:3")
    assert saved(run) == [1]


def events(run) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_jsonl(run.workdir / "events.jsonl")]


def test_a_start_without_checkpoints_knows_that_there_were_some(run, monkeypatch, tmp_path):
    """Even if metrics.jsonl has no line yet, as after a kill; and after an error."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train.StopSignal, "agreed", lambda self: seen.append(events(run)) or False)
        run(**{"checkpoint.every": 2, "log.every": 100, "train.steps": 9})
    assert any(("saved", step) in found for found in seen for step in (2, 4, 6))
    assert events(run)[-2:] == [("saved", 9), ("stop", 9)]
    assert not list((run.workdir / "checkpoints").glob(".*"))
    (run.workdir / "metrics.jsonl").write_text("")

    def check_refused(step):
        (run.workdir / "checkpoints").rename(tmp_path / "away")
        with pytest.raises(LcmError, match=f"has step {step}, but .*checkpoints holds no checkpoint"):
            run()
        (tmp_path / "away").rename(run.workdir / "checkpoints")

    check_refused(9)
    bad_row(monkeypatch, failing(MemoryError()), step=10)
    with pytest.raises(MemoryError):
        run()
    check_refused(10)
