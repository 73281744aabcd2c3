"""metrics.jsonl, events.jsonl, TensorBoard, progress and alarms."""

import io
import json
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lcm_jax.errors import LcmError
from lcm_jax.runtime import telemetry
from lcm_jax.runtime.telemetry import (
    HORIZON,
    Goodput,
    Progress,
    RunInfo,
    SpikeDetector,
    Telemetry,
    cut_jsonl,
    device_memory,
    read_jsonl,
    read_metrics,
)


def train(workdir, first, last, total=20, every=5, bad=None):
    with Telemetry(workdir, RunInfo(total, batch_size=8, start_step=first), every=every) as recorder:
        for step in range(first + 1, last + 1):
            loss = jnp.float32(np.nan if step == bad else 1.0 / step)
            recorder.update(step, {"loss": loss, "grad_norm": jnp.float32(2.0)})
        recorder.settle()


@pytest.fixture
def clock(monkeypatch):
    """[seconds], which `time.monotonic()` returns."""
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    return now


def test_one_line_per_logged_step(tmp_path):
    train(tmp_path, 0, 18, total=18)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [5, 10, 15, 18], "every fifth and the last"
    for r in records:
        assert r["loss"] == pytest.approx(1 / r["step"]) and r["images"] == 8 * r["step"]
        assert r["images_per_second"] > 0 and r["grad_norm"] == 2.0 and r["seconds"] >= 0
    train(tmp_path, 0, 3, total=3, every=1)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3] and all(r["images_per_second"] > 0 for r in records)


def test_times_by_cause(tmp_path, clock):
    """20 steps of 2 s after one of 100 s; pauses of 3, 5 and 7 s; the devices need 30 / 18 s per step at their peak."""
    pauses = {3: ("data", 3.0), 5: ("checkpoint", 5.0), 8: ("evaluation", 7.0)}
    run = RunInfo(22, batch_size=8, flops_per_step=30e12, peak_flops=18e12)
    with Telemetry(tmp_path, run, every=11) as recorder:
        for step in range(1, 23):
            if step in pauses:
                kind, seconds = pauses[step]
                with recorder.pause(kind):
                    clock[0] += seconds
            clock[0] += 100.0 if step == 1 else 2.0
            recorder.update(step, {"loss": 1.0})
            recorder.settle()
    first, second = read_metrics(tmp_path)
    times = {f"time_{kind}": seconds for kind, seconds in pauses.values()}
    assert {name: first[name] for name in times} == times and first["time_step"] == 20
    assert first["data_wait"] == pytest.approx(3 / 23, abs=1e-4)
    assert first["images_per_second"] == pytest.approx(80 / 23, abs=1e-3)
    assert first["mfu"] == pytest.approx(300 / (18 * 23), abs=1e-4)
    assert "memory" not in first or jax.default_backend() != "cpu"
    assert not any(second[name] for name in times) and second["time_step"] == 22
    assert second["images_per_second"] == 4.0 and second["mfu"] == pytest.approx(30 / 36, abs=1e-4)


def test_a_pause_counts_only_while_no_step_runs(tmp_path, clock, monkeypatch):
    """A step takes 4 s and meanwhile the next batch 6 s: 4 of 6 s are the step's, 2 s are the data's."""
    ends_later = lambda: clock[0] + 4.0 * (threading.current_thread().name == "metrics")  # noqa: E731
    monkeypatch.setattr(telemetry.time, "monotonic", ends_later)
    with Telemetry(tmp_path, RunInfo(5, batch_size=8), every=5) as recorder:
        for step in range(1, 6):
            with recorder.waiting():
                clock[0] += 6.0
            recorder.update(step, {"loss": 1.0})
            recorder.settle()
    (record,) = read_metrics(tmp_path)
    assert record["time_step"] == 16 and record["time_data"] == 8
    assert record["data_wait"] == pytest.approx(1 / 3, abs=1e-4)


def test_loss_bins_are_means_since_the_previous_line(tmp_path):
    sums, counts = np.random.default_rng(0).integers(0, 3, (2, 20, 5)).astype(np.float32)
    counts[:, 3] = 0
    with Telemetry(tmp_path, RunInfo(20, batch_size=8)) as recorder:
        for step in range(1, 21):
            bins = {"sum": jnp.asarray(sums[step - 1]), "count": jnp.asarray(counts[step - 1])}
            recorder.update(step, {"loss": jnp.float32(1), "loss_bins": bins})
    early, late = read_metrics(tmp_path)
    for record, steps in ((early, slice(0, 10)), (late, slice(10, 20))):
        for i in (0, 1, 2, 4):
            assert record[f"loss_bin_{i}"] == pytest.approx(sums[steps, i].sum() / counts[steps, i].sum())
        assert "loss_bin_3" not in record and "loss_bins" not in record


def test_device_memory():
    class Device:
        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    stats = [{"bytes_in_use": used, "peak_bytes_in_use": 3 * used, "num_allocs": 1} for used in (5, 7)]
    assert device_memory([*map(Device, stats)]) == {"memory": 7, "memory_peak": 21}
    assert device_memory([Device(None), Device(None)]) == {} == device_memory([Device({"num_allocs": 1})])


def test_resuming_replaces_later_lines(tmp_path):
    train(tmp_path, 0, 20)
    whole = [(r["step"], r["loss"]) for r in read_metrics(tmp_path)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "lo')  # killed while writing
    train(tmp_path, 12, 20)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == whole


def test_cut_jsonl_keeps_what_it_cuts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert cut_jsonl(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_bytes() == b'{"step":1}\n{"step": 2}\n'
    for _ in range(2):
        cut_jsonl(path, 1)
    assert path.read_bytes() == b'{"step":1}\n'
    assert (tmp_path / "metrics.cut.jsonl").read_bytes() == b'{"step": 3}\n{"ste\n{"step": 2}\n'
    damaged = b'{"step": 1}\nnonsense\n{"step": 2}\n'
    path.write_bytes(damaged)
    with pytest.raises(LcmError, match="line 2 is not a JSON object with a step; repair or remove"):
        cut_jsonl(path, 1)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", '{"step": true, "loss": 1}'),
        ("metrics.jsonl", '{"step": 1}'),
        ("metrics.jsonl", '{"step": 1, "loss": "1"}'),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}"),
        ("events.jsonl", '{"step": 1}'),
        ("events.jsonl", '{"event": "start", "step": 1}'),
        ("events.jsonl", '{"event": "stop", "step": 1, "time": [2]}'),
        ("events.jsonl", '{"event": "steps", "step": 1, "time": 2, "from": 0, "seconds": null}'),
        ("events.jsonl", "[" * 10_000),
    ],
)
def test_a_line_of_other_types_is_one_line(tmp_path, name, line):
    (tmp_path / name).write_text(line + "\n")
    with pytest.raises(LcmError, match=f"{name} .*; repair or remove th(e|at) line$"):
        Telemetry(tmp_path, RunInfo(20, batch_size=8, start_step=5))


@pytest.mark.parametrize("bad", [1, 7, 10, 20])
def test_nan_stops_and_is_never_logged(tmp_path, bad):
    with pytest.raises(LcmError, match=f"loss of step {bad} is nan; training stopped"):
        train(tmp_path, 0, 20, bad=bad)
    assert all(r["step"] < bad for r in read_metrics(tmp_path))
    assert not (tmp_path / "bad_batch.json").exists()


@pytest.mark.parametrize("numbers", [{"loss": np.inf}, {"loss": 0.0, "grad_norm": -np.inf}])
def test_settle_finds_what_is_not_finite_before_a_checkpoint(tmp_path, numbers):
    name = "loss" if len(numbers) == 1 else "gradient norm"
    with Telemetry(tmp_path, RunInfo(20, batch_size=8)) as recorder:
        for step in (1, 2, 3):
            recorder.update(step, {"loss": jnp.float32(0)})
        recorder.update(4, {key: jnp.float32(value) for key, value in numbers.items()})
        with pytest.raises(LcmError, match=f"{name} of step 4 is -?inf"):
            recorder.settle()


@pytest.mark.parametrize("process", [0, 1])
def test_alarm_lists_the_records_of_the_batch(tmp_path, monkeypatch, process):
    """Every process stops, process 0 alone writes."""
    monkeypatch.setattr(jax, "process_index", lambda: process)
    asked = []

    def keys_of(step):
        asked.append(step)
        return [("a.tar", f"{step}-{row}") for row in range(3)]

    with Telemetry(tmp_path, RunInfo(20, batch_size=8, keys_of=keys_of)) as recorder:
        with pytest.raises(
            LcmError, match=r"step 4 is inf; .* saved no checkpoint of it\. metrics.jsonl .*bad_batch.json"
        ):
            for step in range(1, 10):
                recorder.update(step, {"loss": jnp.float32(np.inf if step == 4 else 1.0)})
    assert step == 4 + telemetry.LAG
    if process:
        assert not any(tmp_path.iterdir()) and not asked
        return
    records = [{"shard": "a.tar", "key": f"4-{row}"} for row in range(3)]
    wanted = {"step": 4, "reason": "loss of step 4 is inf", "records": records}
    assert asked == [4] and json.loads((tmp_path / "bad_batch.json").read_text()) == wanted


def test_spike_stops_and_stops_again_after_resuming(tmp_path):
    def run(first, spike):
        with Telemetry(tmp_path, RunInfo(60, batch_size=8, start_step=first), every=1, spike=spike) as recorder:
            for step in range(first + 1, 61):
                recorder.update(step, {"loss": 5.0 if step == 50 else 1.0 + step % 2})

    for first in (0, 48):
        with pytest.raises(LcmError, match=r"loss of step 50 is 5, 3.3 times its running mean 1.5"):
            run(first, 3.0)
        assert read_metrics(tmp_path)[-1]["step"] == 49
    run(48, 4.0)
    run(48, 0.0)
    assert read_metrics(tmp_path)[-1]["step"] == 60


def test_running_mean_of_the_loss():
    """The plain mean of the first losses; then the step response to a constant is 1 - (1 - 1 / HORIZON)^n."""
    losses = np.random.default_rng(0).uniform(1, 2, HORIZON)
    spikes = SpikeDetector(10.0)
    for n, loss in enumerate(losses, 1):
        assert spikes.check(n, loss) is None
        assert spikes.mean == pytest.approx(losses[:n].mean())
    before = spikes.mean
    for n in range(50):
        spikes.check(HORIZON + n, 3.0)
    assert spikes.mean - before == pytest.approx((3.0 - before) * (1 - (1 - 1 / HORIZON) ** 50))


def test_spikes_need_a_warm_up_and_do_not_enter_the_mean():
    spikes = SpikeDetector(3.0, [1.0] * telemetry.WARMUP)
    assert spikes.check(20, 3.0) is None  # not more than three times the mean
    mean = spikes.mean
    assert "loss of step 21 is 3.5, 3.2 times" in spikes.check(21, 3.5) and spikes.mean == mean
    early = SpikeDetector(3.0, [1.0] * (telemetry.WARMUP - 1))
    assert early.check(20, 100.0) is None
    assert SpikeDetector(0.0, [1.0] * 50).check(51, 1e9) is None


def test_errors_of_the_fetching_thread_are_raised(tmp_path, monkeypatch):
    def fail(values):
        raise FloatingPointError("device lost")

    with Telemetry(tmp_path, RunInfo(20, batch_size=8)) as recorder:
        monkeypatch.setattr(telemetry.jax, "device_get", fail)
        recorder.update(1, {"loss": jnp.float32(1)})
        with pytest.raises(FloatingPointError, match="device lost"):
            recorder.settle()


def test_progress_of_a_run(tmp_path, monkeypatch, capsys):
    train(tmp_path, 0, 20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("step 5/20: loss 0.20000, ")
    assert all("images/s" in line and line.endswith("left") for line in lines)

    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    train(tmp_path, 10, 20)
    assert "20/20 [" in terminal.getvalue() and "steps/s, loss 0.05000" in terminal.getvalue()


def test_progress_without_a_terminal(clock, capsys):
    """A line every LINE_SECONDS, with the rate after the first ones, which take long."""
    with Progress(100, 40, "rows") as progress:
        for seconds in (50.0, 4.0, 4.0, 4.0, 4.0):
            clock[0] += seconds
            progress.move(2)
    assert capsys.readouterr().err == "44/100 rows, 0.5 rows/s, 01:52 left\n50/100 rows, 0.5 rows/s, 01:40 left\n"


def read_events(folder):
    """The events of a folder's files in TensorBoard's record format."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:  # length (8), its crc (4), record, its crc (4)
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_and_images(tmp_path):
    grid = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with Telemetry(tmp_path, RunInfo(10, batch_size=8), every=5) as recorder:
        for step in range(1, 11):
            recorder.update(step, {"loss": jnp.float32(1)})
        path = recorder.images(10, grid)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), grid)
    assert path == tmp_path / "samples" / "00000010.png"
    values = {
        (event.step, value.tag, value.WhichOneof("value"))
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert {(5, "loss", "simple_value"), (10, "images_per_second", "simple_value"), (10, "samples", "image")} <= values


def test_tensorboard_hides_what_is_trained_again(tmp_path):
    """Also if a run without a checkpoint starts again."""
    from tensorboardX.proto.event_pb2 import SessionLog

    for start, end in ((0, 20), (10, 20), (0, 5)):
        train(tmp_path, start, end)
        marks = [e.step for e in read_events(tmp_path / "tensorboard") if e.session_log.status == SessionLog.START]
        assert start + 1 in marks


def test_events_and_goodput_over_restarts(tmp_path):
    """Also the steps of attempts that end before a line is due."""
    for done in (0, 9, 18):
        with Telemetry(tmp_path, RunInfo(1000, batch_size=8, start_step=done), every=100) as recorder:
            for step in range(done + 1, done + 10):
                recorder.update(step, {"loss": 1.0})
            recorder.settle()
            recorder.saved(step)
            recorder.saved(step)
    (tmp_path / "events.jsonl").open("a").write('{"event": "ste')  # killed while writing
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == 3 * ["start", "compiled", "saved", "steps", "stop"]
    steps = [(event["from"], event["step"]) for event in events if event["event"] == "steps"]
    assert steps == [(1, 9), (10, 18), (19, 27)]
    train(tmp_path, 27, 30, total=30, every=1)
    *events, stop = read_jsonl(tmp_path / "events.jsonl")
    assert [event["event"] for event in (*events, stop)][15:] == "start compiled steps steps stop".split()
    assert read_metrics(tmp_path)[-1]["goodput"] == round(Goodput(events).share, 4)


WHOLE = [
    {"event": "start", "time": 100.0, "step": 0},
    {"event": "compiled", "time": 130.0, "step": 1},
    {"event": "steps", "time": 150.0, "from": 1, "step": 11, "seconds": 18.0},
    {"event": "steps", "time": 180.0, "from": 11, "step": 21, "seconds": 20.0},  # 10 s of a checkpoint
    {"event": "stop", "time": 185.0, "step": 21},
]
AGAIN = [  # killed after step 21 with the checkpoint of step 16
    {"event": "start", "time": 50_000.0, "step": 16},
    {"event": "compiled", "time": 50_040.0, "step": 17},
    {"event": "steps", "time": 50_050.0, "from": 17, "step": 21, "seconds": 8.0},
    {"event": "stop", "time": 50_051.0, "step": 21},
]
RESUMED = [{"event": "start", "time": 200.0, "step": 21}, {"event": "stop", "time": 215.0, "step": 21}]


@pytest.mark.parametrize(
    ("events", "wall", "steps"),
    [
        ([], 0, 0),
        (WHOLE, 85, 38),
        (WHOLE + RESUMED, 100, 38),
        (WHOLE[:4] + AGAIN, 80 + 51, 18 + 10 + 8),  # half of steps 12 .. 21 is lost; the night does not count
        (WHOLE[:4] + AGAIN + [{"event": "start", "time": 60_000.0, "step": 0}], 131, 0),  # there was no checkpoint
        ([*WHOLE[:2], {"event": "stop", "time": 90.0, "step": 1}], 30, 0),  # the clock was set back
    ],
    ids=["none", "one attempt", "resumed", "killed", "started again", "clock"],
)
def test_goodput(events, wall, steps):
    total = Goodput(events)
    assert (total.wall, total.steps) == (wall, steps) and total.share == (steps / wall if wall else 0)
