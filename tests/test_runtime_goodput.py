"""The share of a run's time that went into training, on lists of events written by hand."""

import json

import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime.telemetry import EVENTS_FILE, Events, goodput

WHOLE = [
    {"event": "start", "time": 100.0, "step": 0},
    {"event": "compiled", "time": 130.0, "step": 1},
    {"event": "steps", "time": 150.0, "from": 1, "step": 11, "seconds": 18.0},
    {"event": "steps", "time": 180.0, "from": 11, "step": 21, "seconds": 20.0},  # 10 s of a checkpoint
    {"event": "stop", "time": 185.0, "step": 21},
]


def write(workdir, events, tail=""):
    (workdir / EVENTS_FILE).write_text("".join(json.dumps(event) + "\n" for event in events) + tail)


def numbers(workdir):
    total = goodput(workdir)
    return total.attempts, total.wall, total.steps, total.redone, total.startup


def test_one_attempt(tmp_path):
    assert numbers(tmp_path) == (0, 0, 0, 0, 0) and goodput(tmp_path).share == 0
    write(tmp_path, WHOLE)
    assert numbers(tmp_path) == (1, 85, 38, 0, 30)
    assert goodput(tmp_path).share == pytest.approx(38 / 85)


def test_a_crash_loses_the_steps_that_are_done_again(tmp_path):
    """Killed after step 21 with the checkpoint of step 16: half of steps 12 .. 21 is lost; the night does not count."""
    again = [
        {"event": "start", "time": 50_000.0, "step": 16},
        {"event": "compiled", "time": 50_040.0, "step": 17},
        {"event": "steps", "time": 50_050.0, "from": 17, "step": 21, "seconds": 8.0},
        {"event": "stop", "time": 50_051.0, "step": 21},
    ]
    write(tmp_path, WHOLE[:4] + again)
    assert numbers(tmp_path) == (2, 80 + 51, 18 + 10 + 8, 10, 70)
    # ... then from the beginning again, without a checkpoint: everything is lost.
    write(tmp_path, WHOLE[:4] + again + [{"event": "start", "time": 60_000.0, "step": 0}])
    assert numbers(tmp_path) == (3, 131, 0, 46, 70)


def test_going_on_in_order_loses_nothing(tmp_path):
    more = [{"event": "start", "time": 200.0, "step": 21}, {"event": "stop", "time": 215.0, "step": 21}]
    write(tmp_path, WHOLE + more)
    assert numbers(tmp_path) == (2, 100, 38, 0, 30)


def test_a_half_line_is_cut_off_and_the_sum_goes_on(tmp_path):
    write(tmp_path, WHOLE[:3], tail='{"event": "ste')
    assert goodput(tmp_path).wall == 50
    events = Events(tmp_path)
    events.add("start", 300.0, 11)
    events.add("compiled", 310.0, 12)
    events.add("steps", 320.0, 22, **{"from": 12, "seconds": 9.0})
    events.close()
    assert numbers(tmp_path) == (2, 70, 27, 0, 40)
    assert events.goodput.share == goodput(tmp_path).share == pytest.approx(27 / 70)
    write(tmp_path, WHOLE[:1], tail='nonsense\n{"event": "stop", "time": 1, "step": 1}\n')
    with pytest.raises(LcmError, match="line 2"):
        goodput(tmp_path)


def test_a_clock_that_was_set_back_takes_nothing_away(tmp_path):
    write(tmp_path, [*WHOLE[:2], {"event": "stop", "time": 90.0, "step": 1}])
    assert numbers(tmp_path) == (1, 30, 0, 0, 30)
