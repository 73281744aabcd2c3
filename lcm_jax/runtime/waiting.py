"""Waiting for what may never come: in short slices between which a stop is noticed, with a line that says for what.

A call into a file server, a library or another process cannot be interrupted. It runs in a thread of its own, which the
program leaves behind if need be, and whoever needs its result waits here.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SLICE = 0.25  # seconds between two checks of whether to stop
PATIENCE = 60.0  # seconds until the first line about a wait; the time doubles with each further line
LONGEST = 600.0  # seconds between two lines, at most


class Stopped(Exception):
    """A stop was asked for before the result came."""


def say(line: str) -> None:
    """Prints a line on stderr, above a progress bar if there is one. No run ends because nobody reads it."""
    with contextlib.suppress(OSError):
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
        ready: called with the seconds that it may block.
        what: describes what is waited for, in a line after PATIENCE seconds.
        stop: whether to stop; called every SLICE seconds.
        check: called before each slice; an error that it raises ends the wait.

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


def next_item(source: queue.Queue, what: Callable[[], str], **options: Any) -> Any:
    """The next item of a queue; `options`: arguments of `wait`."""
    items: list[Any] = []

    def ready(seconds: float) -> bool:
        try:
            items.append(source.get(timeout=seconds))
        except queue.Empty:
            return False
        return True

    wait(ready, what, **options)
    return items[0]


def in_thread(call: Callable[[], Any], what: Callable[[], str], **options: Any) -> Any:
    """The result of `call()` in a thread that does not keep the process alive; `options`: arguments of `wait`."""
    results: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # raised in the calling thread
            results.put((None, error))

    threading.Thread(target=work, name="in_thread", daemon=True).start()
    value, error = next_item(results, what, **options)
    if error is not None:
        raise error
    return value
