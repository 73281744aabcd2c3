"""metrics.jsonl, TensorBoard, progress, and the stop on numbers that are not finite."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lcm_jax.errors import LcmError
from lcm_jax.runtime import telemetry as telemetry_lib
from lcm_jax.runtime.telemetry import Telemetry, device_memory, goodput, keep_until, read_metrics


def train(workdir, first, last, total=20, log_every=5, bad=None, stream=None):
    stream = stream or io.StringIO()
    with Telemetry(workdir, total, batch_size=8, start_step=first, log_every=log_every, stream=stream) as telemetry:
        for step in range(first + 1, last + 1):
            loss = jnp.float32(np.nan if step == bad else 1.0 / step)
            telemetry.update(step, {"loss": loss, "grad_norm": jnp.float32(2.0)})
        telemetry.settle()
    return stream


def test_one_object_per_logged_step(tmp_path):
    train(tmp_path, 0, 18, total=18)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [5, 10, 15, 18], "every fifth and the last"
    for r in records:
        assert r["loss"] == pytest.approx(1 / r["step"]) and r["images"] == 8 * r["step"]
        assert r["images_per_second"] > 0 and r["grad_norm"] == 2.0 and r["seconds"] >= 0
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_first_step_logged_even_if_every_one(tmp_path):
    train(tmp_path, 0, 3, total=3, log_every=1)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3] and all(r["images_per_second"] > 0 for r in records)


def test_images_per_second(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(telemetry_lib.time, "monotonic", lambda: now[0])
    with Telemetry(tmp_path, 20, batch_size=8, log_every=5, stream=io.StringIO()) as telemetry:
        for step in range(1, 11):
            now[0] += 100.0 if step == 1 else 2.0  # the first step compiles
            telemetry.update(step, {"loss": 1.0})
            if step == 5:
                telemetry.settle()
                with telemetry.pause("evaluation"):
                    now[0] += 50.0
                    telemetry.images(5, np.zeros((2, 2, 3), np.uint8))
        telemetry.settle()
    assert [r["images_per_second"] for r in read_metrics(tmp_path)] == [4.0, 4.0], "8 images in 2 s"


def test_where_the_time_went(tmp_path, monkeypatch):
    """Ten steps of 2 s after one of 100; 3 s, 5 s and 7 s between them; the device needs 15 of the 18 TFLOP/s."""
    now = [0.0]
    monkeypatch.setattr(telemetry_lib.time, "monotonic", lambda: now[0])
    pauses = {3: ("data", 3.0), 5: ("checkpoint", 5.0), 8: ("evaluation", 7.0)}
    with Telemetry(
        tmp_path, 11, batch_size=8, log_every=11, stream=io.StringIO(), flops_per_step=30e12, peak_flops=18e12
    ) as telemetry:
        for step in range(1, 12):
            if step in pauses:
                kind, seconds = pauses[step]
                with telemetry.pause(kind):
                    now[0] += seconds
            now[0] += 100.0 if step == 1 else 2.0
            telemetry.update(step, {"loss": 1.0})
    (record,) = read_metrics(tmp_path)
    assert record["time_step"] == 20 and record["time_data"] == 3
    assert record["time_checkpoint"] == 5 and record["time_evaluation"] == 7
    assert record["data_wait"] == pytest.approx(3 / 23, abs=1e-4)
    assert record["images_per_second"] == pytest.approx(80 / 23, abs=1e-3)
    assert record["mfu"] == pytest.approx(300 / (18 * 23), abs=1e-4)
    assert "memory" not in record or jax.default_backend() != "cpu"


def test_waiting_beside_a_step_in_progress_is_the_steps_time(tmp_path, monkeypatch):
    """A step takes 4 s, its data 6 s, both at once: 4 of 6 s are the step's, 2 are the data's."""
    now = [0.0]
    monkeypatch.setattr(telemetry_lib.time, "monotonic", lambda: now[0])
    with Telemetry(tmp_path, 5, batch_size=8, log_every=5, stream=io.StringIO()) as telemetry:
        results = [telemetry_lib.Future() for _ in range(5)]
        monkeypatch.setattr(telemetry._fetched, "submit", lambda metrics: results[metrics["n"]])
        for step in range(1, 6):
            with telemetry.waiting():
                now[0] += 6.0
            results[step - 1].set_result(({"loss": 1.0}, now[0] + 4.0))
            telemetry.update(step, {"n": step - 1})
    (record,) = read_metrics(tmp_path)
    assert record["time_step"] == 16 and record["time_data"] == 8
    assert record["data_wait"] == pytest.approx(1 / 3, abs=1e-4)


def test_loss_by_bins_is_a_mean_since_the_line_before(tmp_path):
    sums, counts = np.random.default_rng(0).integers(0, 3, (2, 20, 5)).astype(np.float32)
    counts[:, 3] = 0
    with Telemetry(tmp_path, 20, batch_size=8, log_every=10, stream=io.StringIO()) as telemetry:
        for step in range(1, 21):
            bins = {"sum": jnp.asarray(sums[step - 1]), "count": jnp.asarray(counts[step - 1])}
            telemetry.update(step, {"loss": jnp.float32(1), "loss_bins": bins})
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


def test_going_on_drops_later_lines(tmp_path):
    train(tmp_path, 0, 20)
    whole = [(r["step"], r["loss"]) for r in read_metrics(tmp_path)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "lo')  # killed while writing
    train(tmp_path, 12, 20)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == whole
    keep_until(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\nnonsense\n{"step": 2, "loss": 1}\n')
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(LcmError, match="line 2"):
        keep_until(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("bad", [1, 7, 10, 20])
def test_stops_on_nan_and_never_logs_it(tmp_path, bad):
    with pytest.raises(LcmError, match=f"loss of step {bad} is nan"):
        train(tmp_path, 0, 20, bad=bad)
    assert all(r["step"] < bad for r in read_metrics(tmp_path))


def test_nan_is_found_before_a_checkpoint(tmp_path):
    with Telemetry(tmp_path, 20, batch_size=8, log_every=100, stream=io.StringIO()) as telemetry:
        for step in (1, 2, 3):
            telemetry.update(step, {"loss": jnp.float32(0)})
        telemetry.update(4, {"loss": jnp.float32(np.inf)})
        with pytest.raises(LcmError, match="step 4"):
            telemetry.settle()


def test_plain_lines_without_a_terminal(tmp_path):
    lines = train(tmp_path, 0, 20).getvalue().splitlines()
    assert len(lines) == 4 and lines[0].startswith("step 5/20: loss 0.20000, ")
    assert all("images/s" in line and line.endswith("left") for line in lines)


def test_bar_on_a_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = train(tmp_path, 0, 20, stream=Terminal()).getvalue()
    assert "20/20 steps" in text and "loss 0.05000" in text and "images/s" in text and "left" in text


def read_events(folder):
    """The events of the folder's files, by TensorBoard's own record format."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:  # length (8), its crc (4), record, its crc (4)
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_and_pictures(tmp_path):
    grid = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with Telemetry(tmp_path, 10, batch_size=8, log_every=5, stream=io.StringIO()) as telemetry:
        for step in range(1, 11):
            telemetry.update(step, {"loss": jnp.float32(1)})
        path = telemetry.images(10, grid)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), grid)
    assert path == tmp_path / "samples" / "00000010.png"
    events = [
        (event.step, value.tag, value.WhichOneof("value"))
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert {(5, "loss", "simple_value"), (10, "images_per_second", "simple_value"), (10, "samples", "image")} <= set(
        events
    )


def test_goodput_goes_on_after_a_restart(tmp_path):
    train(tmp_path, 0, 20)
    train(tmp_path, 10, 20)
    total = goodput(tmp_path)
    assert total.attempts == 2 and 0 < total.share < 1 and total.redone > 0
    assert read_metrics(tmp_path)[-1]["goodput"] > 0


def test_steps_after_the_last_line_are_no_lost_time(tmp_path):
    """Attempts that end before a line is due have trained, too: what each computed is in the events."""
    for done in (0, 9, 18):
        with Telemetry(tmp_path, 1000, batch_size=8, start_step=done, log_every=100, stream=io.StringIO()) as telemetry:
            for step in range(done + 1, done + 10):
                telemetry.update(step, {"loss": 1.0})
            telemetry.settle()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == 3 * ["start", "compiled", "steps", "stop"]
    steps = [(event["from"], event["step"]) for event in events if event["event"] == "steps"]
    assert steps == [(1, 9), (10, 18), (19, 27)]


def test_a_run_that_begins_anew_hides_what_was_shown_before(tmp_path):
    """Killed before its first checkpoint, a run's TensorBoard shows the second attempt alone."""
    from tensorboardX.proto.event_pb2 import SessionLog

    for start, end in ((0, 20), (10, 20), (0, 5)):
        train(tmp_path, start, end)
        last = max((tmp_path / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime_ns)
        marks = [event.step for event in read_events(last.parent) if event.session_log.status == SessionLog.START]
        assert start + 1 in marks


def test_the_records_of_a_bad_batch_are_listed(tmp_path):
    asked = []

    def keys_of(step):
        asked.append(step)
        return [("a.tar", f"{step}-{row}") for row in range(3)]

    with Telemetry(tmp_path, 20, batch_size=8, stream=io.StringIO(), keys_of=keys_of) as telemetry:
        with pytest.raises(LcmError, match="bad_batch.json") as error:
            for step in range(1, 10):
                telemetry.update(step, {"loss": jnp.float32(np.inf if step == 4 else 1.0)})
    assert step == 4 + telemetry_lib.LAG and "\n" not in str(error.value)
    found = json.loads((tmp_path / "bad_batch.json").read_text())
    assert asked == [4] and found["step"] == 4 and found["reason"] == "loss of step 4 is inf"
    assert found["records"] == [{"shard": "a.tar", "key": f"4-{row}"} for row in range(3)]


def test_stops_at_a_spike_and_again_where_the_run_goes_on(tmp_path):
    def run(first, spike):
        with Telemetry(
            tmp_path, 60, batch_size=8, start_step=first, log_every=1, stream=io.StringIO(), spike=spike
        ) as telemetry:
            for step in range(first + 1, 61):
                telemetry.update(step, {"loss": 5.0 if step == 50 else 1.0 + step % 2})

    for first in (0, 48):
        with pytest.raises(LcmError, match=r"loss of step 50 is 5, 3.3 times its running mean 1.5"):
            run(first, 3.0)
        assert read_metrics(tmp_path)[-1]["step"] == 49
    run(48, 4.0)
    run(48, 0.0)
    assert read_metrics(tmp_path)[-1]["step"] == 60


def test_numbers_are_fetched_by_a_thread_and_its_errors_are_raised(tmp_path, monkeypatch):
    def fail(values):
        raise FloatingPointError("device lost")

    with Telemetry(tmp_path, 20, batch_size=8, stream=io.StringIO()) as telemetry:
        monkeypatch.setattr(telemetry_lib.jax, "device_get", fail)
        telemetry.update(1, {"loss": jnp.float32(1)})
        with pytest.raises(FloatingPointError, match="device lost"):
            telemetry.settle()
