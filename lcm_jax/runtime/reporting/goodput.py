"""What part of a run's time went into training: events.jsonl, which no restart shortens, and the sum of it.

    {"event": "start", "time": 1790000000.0, "step": 0}                       an attempt begins, `step` steps are done
    {"event": "compiled", "time": ..., "step": 1}                             its first step is done
    {"event": "steps", "time": ..., "from": 1, "step": 10, "seconds": 2.5}    steps 2 .. 10 took 2.5 s of computing
    {"event": "saved", "time": ..., "step": 500}                              a checkpoint is on disk
    {"event": "stop", "time": ..., "step": 500}                               it ends in order

Times are seconds since 1970. An attempt that was killed ends with its last event; the time between attempts does not
count. Steps that a later attempt does again, because it went on from an older checkpoint, are lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_jax.runtime.reporting import jsonl

EVENTS_FILE = "events.jsonl"


class Goodput:
    """The sum of events, in seconds.

    Attributes:
      attempts: how many there were.
      wall: from each attempt's start to its end.
      steps: of `wall`, computing steps that count.
      redone: computing steps that were done again later.
      startup: from an attempt's start to the end of its first step: loading, compiling.

    What is left of `wall` went into waiting for data, checkpoints and evaluation.
    """

    def __init__(self) -> None:
        self.attempts, self.wall, self.redone, self.startup = 0, 0.0, 0.0, 0.0
        self._ranges: list[tuple[int, int, float]] = []  # (from, to, seconds), rising
        self._seconds = self._last = 0.0

    @property
    def steps(self) -> float:
        return self._seconds

    @property
    def share(self) -> float:
        """Of the wall time, what went into steps that count; 0 before there is any."""
        return self._seconds / self.wall if self.wall else 0.0

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next event."""
        if event["event"] == "start":
            self.attempts += 1
            self._go_back(event["step"])
            self._last = event["time"]
            return
        passed = max(0.0, event["time"] - self._last)
        self.wall += passed
        self._last = event["time"]
        if event["event"] == "compiled":
            self.startup += passed
        elif event["event"] == "steps":
            self._ranges.append((event["from"], event["step"], event["seconds"]))
            self._seconds += event["seconds"]

    def _go_back(self, step: int) -> None:
        while self._ranges and self._ranges[-1][1] > step:
            first, last, seconds = self._ranges.pop()
            kept = seconds * max(0, step - first) / (last - first)
            self.redone += seconds - kept
            self._seconds -= seconds - kept
            if step > first:
                self._ranges.append((first, step, kept))


def goodput(workdir: str | Path) -> Goodput:
    """The sum of a workdir's events. Raises LcmError where a line of the file is damaged."""
    total = Goodput()
    for event in jsonl.read(Path(workdir) / EVENTS_FILE):
        total.add(event)
    return total


class Events:
    """Appends to a workdir's events and keeps their sum, `goodput`."""

    def __init__(self, workdir: str | Path) -> None:
        path = Path(workdir) / EVENTS_FILE
        jsonl.keep(path)
        self.goodput = goodput(workdir)
        self._file = open(path, "a")

    def add(self, event: str, time: float, step: int, **values: Any) -> None:
        record = {"event": event, "time": round(time, 3), "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.goodput.add(record)

    def close(self) -> None:
        self._file.close()
