"""metrics.jsonl, TensorBoard, progress, and the stop on numbers that are not finite."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lcm_jax.errors import LcmError
from lcm_jax.runtime import telemetry as telemetry_lib
from lcm_jax.runtime.telemetry import Telemetry, check_finite, keep_until, read_metrics


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
                now[0] += 50.0
                telemetry.images(5, np.zeros((2, 2, 3), np.uint8))
    assert [r["images_per_second"] for r in read_metrics(tmp_path)] == [4.0, 4.0], "8 images in 2 s"


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite(value):
    check_finite(3, 1.0, 2.0)
    with pytest.raises(LcmError, match=f"loss of step 3 is {value}"):
        check_finite(3, value, 1.0)
    with pytest.raises(LcmError, match=f"gradient norm of step 3 is {value}"):
        check_finite(3, 1.0, value)


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
    """(step, tag, kind) of every value in the folder's event files, by TensorBoard's own record format."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:  # length (8), its crc (4), record, its crc (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, v.tag, v.WhichOneof("value")) for v in event.summary.value]
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
    events = read_events(tmp_path / "tensorboard")
    assert {(5, "loss", "simple_value"), (10, "images_per_second", "simple_value"),
            (10, "samples", "image")} <= set(events)
