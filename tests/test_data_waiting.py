"""Waiting in slices: what is printed and when, the stop, errors of calls in a thread."""

import queue
import threading

import pytest

from lcm_jax.runtime import waiting


@pytest.fixture
def clock(monkeypatch):
    """Time that only waits move."""
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


def test_wait_prints_what_it_waits_for_ever_more_rarely(clock, monkeypatch):
    lines = []
    monkeypatch.setattr(waiting, "say", lines.append)

    def ready(seconds):
        clock[0] += seconds
        return clock[0] >= 4000

    waiting.wait(ready, lambda: "worker 3")
    seconds = [float(line.split()[2]) for line in lines]
    assert lines[0] == "waiting for 60 s: worker 3"
    assert seconds == [60, 120, 240, 480, 960, 1560, 2160, 2760, 3360, 3960]


def test_a_stop_ends_a_wait_unless_the_result_is_there(clock):
    def ready(seconds):
        clock[0] += seconds
        return False

    with pytest.raises(waiting.Stopped):
        waiting.wait(ready, lambda: "", stop=lambda: clock[0] >= 2)
    assert clock[0] == 2
    items = queue.Queue()
    items.put("item")
    assert waiting.next_item(items, lambda: "", stop=lambda: True) == "item"


def test_a_check_that_fails_ends_a_wait():
    def check():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        waiting.next_item(queue.Queue(), lambda: "", check=check)


def test_in_thread():
    assert waiting.in_thread(lambda: threading.current_thread().daemon, lambda: "")
    with pytest.raises(SystemExit):
        waiting.in_thread(lambda: exec("raise SystemExit"), lambda: "")
    event = threading.Event()
    with pytest.raises(waiting.Stopped):
        waiting.in_thread(event.wait, lambda: "", stop=lambda: True)
    event.set()
