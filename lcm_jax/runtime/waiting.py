"""Waiting for what may never come: in slices, so that a wish to stop is heard, and with a line that says for what.

A call into a file server, a library or another process cannot be interrupted. So it runs in a thread of its own, which
a program leaves behind if need be, and whoever needs its result waits here.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SLICE = 0.25  # seconds between two looks at whether to stop
PATIENCE = 60.0  # seconds until the first line about a wait; the next ones come after twice the time each
LONGEST = 600.0  # seconds between two lines


class Stopped(Exception):
    """What was waited for had not come when a stop was asked for."""


def say(line: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def wait(
    ready: Callable[[float], Any],
    what: Callable[[], str],
    *,
    stop: Callable[[], Any] = lambda: False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Returns when `ready` is true.

    Args:
        ready: takes the seconds that it may wait itself.
        what: is waited for, for a line after PATIENCE seconds.
        stop: whether to stop, asked every SLICE seconds.
        check: called before each slice; what it raises ends the wait.

    Raises:
        Stopped: `stop()` is true, and `ready` is not.
    """
    begun, due = time.monotonic(), PATIENCE
    check()
    while not ready(SLICE):
        check()
        if stop():
            raise Stopped
        waited = time.monotonic() - begun
        if waited >= due:
            say(f"waiting for {waited:.0f} s: {what()}")
            due = waited + min(waited, LONGEST)


def taken(source: queue.Queue, what: Callable[[], str], **how: Any) -> Any:
    """The next item of a queue; `how`: arguments of `wait`."""
    items: list[Any] = []

    def ready(seconds: float) -> bool:
        try:
            items.append(source.get(timeout=seconds))
        except queue.Empty:
            return False
        return True

    wait(ready, what, **how)
    return items[0]


def apart(call: Callable[[], Any], what: Callable[[], str], **how: Any) -> Any:
    """`call()`, made by a thread that does not keep the process; `how`: arguments of `wait`."""
    results: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # carried to the caller, who raises it
            results.put((None, error))

    threading.Thread(target=work, name="apart", daemon=True).start()
    value, error = taken(results, what, **how)
    if error is not None:
        raise error
    return value
