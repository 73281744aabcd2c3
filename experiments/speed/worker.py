"""A side's process, seen from the driver: lines of JSON to it and from it, and an end to its patience."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.speed.workloads import Workload

TOGETHER, ALONE = 0.45, 0.92  # share of a card's memory that JAX takes at its start


class OutOfTime(Exception):
    """The driver's time is used up; what was being measured is left for another call."""


class Worker:
    """A worker of one side ("jax" or "torch") with a workload in memory; a context manager that ends it.

    Attributes:
      ready: its first answer, {"ways", "flops", "prepare_s"} or {"error"}.
    """

    def __init__(self, side: str, workload: Workload, device: str, deadline: float, log: Path):
        """deadline: of `time.monotonic()`; log: file that takes the process's standard error."""
        self.deadline = deadline
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(ALONE if workload.alone else TOGETHER),
            "HF_HUB_OFFLINE": "1",
        }
        if device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.speed.{side}_side"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._buffer = b""
        try:
            self.ready = self.ask(dataclasses.asdict(workload))
        except BaseException:
            self._end()
            raise

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """The answer to a line. {"error"} where the process has died. Raises OutOfTime."""
        try:
            self._process.stdin.write((json.dumps(what) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"the process ended, code {self._process.wait()}"}
        while b"\n" not in self._buffer:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise OutOfTime
            chunk = os.read(self._process.stdout.fileno(), 2**16)
            if not chunk:
                return {"error": f"the process ended, code {self._process.wait()}"}
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def time(self, way: str, runs: int) -> dict[str, Any]:
        """{"seconds" of all runs, "peak_bytes"} or {"error"}."""
        return self.ask({"do": "time", "way": way, "runs": runs})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()
