"""The process of one side: how the driver asks it until a deadline (`Worker`), and how it answers (`serve`).

    {"do": "prepare", "workload"}       -> {"ways", "flops", "prepare_s"}
    {"do": "time", "way", "runs"}       -> {"seconds" of all runs, "peak_bytes"}
    {"do": "facts", "folder"}           -> facts about the work
    {"do": "profile", "folder"}         -> where the time goes

A request that fails is answered by {"error"}.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from experiments import processes
from experiments.speed.workloads import Workload
from lcm_jax.errors import LcmError

TOGETHER, ALONE = 0.45, 0.92  # share of a card's memory that JAX takes at its start
PATIENCE_S = 3


class OutOfTime(Exception):
    """The driver's time is used up; what was being measured is left for another command."""


class Failed(Exception):
    """The worker answered with an error, or died."""


class Worker:
    """A process of one side ("jax" or "torch") with a workload in memory; a context manager that ends it.

    Attributes:
      ready: its answer to "prepare".
    """

    def __init__(
        self, side: str, workload: Workload, device: str, deadline: float, log: Path, package: str = __package__
    ):
        """Starts the process and waits until the workload is in memory. Raises as `ask`.

        Args:
          deadline: of `time.monotonic()`.
          log: file for what the process prints.
          package: whose module SIDE_side has `prepare`: workload -> `side.Prepared`.
        """
        self.deadline = deadline
        environment = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(ALONE if workload.alone else TOGETHER),
            "HF_HUB_OFFLINE": "1",
        }
        if device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if workload.narrow:  # the time of a rehearsal goes into compiling
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(other, f"{package}.{side}_side", environment, log), daemon=True
        )
        self._process.start()
        other.close()  # so that the death of the process closes the pipe
        try:
            self.ready = self.ask({"do": "prepare", "workload": workload})
        except BaseException:
            self._end()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises OutOfTime, Failed."""
        try:
            self._pipe.send(request)
            if not self._pipe.poll(max(0.0, self.deadline - time.monotonic())):
                raise OutOfTime
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise Failed(f"the process ended, code {self._process.exitcode}") from None
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def time(self, way: str, runs: int) -> dict[str, Any]:
        return self.ask({"do": "time", "way": way, "runs": runs})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._pipe.close()  # an idle process ends by itself, and cleans up
        self._process.join(PATIENCE_S)
        self._process.kill()
        self._process.join()


def serve(pipe: Connection, module: str, environment: Mapping[str, str], log: Path) -> None:
    """The life of a worker's process: answers requests until the pipe closes.

    This module imports neither jax nor torch, which read the environment when they are imported.
    """
    processes.end_with(multiprocessing.parent_process().pid)
    os.environ.update(environment)
    with log.open("a") as stream:
        for output in (1, 2):
            os.dup2(stream.fileno(), output)
    made = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if request["do"] == "prepare":
                prepare = importlib.import_module(module).prepare
                begun = time.perf_counter()
                made = prepare(request["workload"])
                seconds = time.perf_counter() - begun
                answer = {"ways": list(made.ways), "flops": made.flops, "prepare_s": seconds}
            elif request["do"] in ("facts", "profile"):
                answer = getattr(made, request["do"])(request["folder"])
            else:
                answer = timed(made, request["way"], request["runs"])
        except Exception as error:  # out of memory, a compiler that gives up: other ways may still work
            answer = failure(error)
        pipe.send(answer)


def timed(made: Any, way: str, runs: int) -> dict[str, Any]:
    """{"seconds", "peak_bytes"} of a `side.Prepared`; runs are not awaited one by one, as in a training."""
    work = made.ways[way]
    made.reset_peak()
    begun = time.perf_counter()
    for _ in range(runs):
        result = work()
    made.wait(result)
    seconds = time.perf_counter() - begun
    if not made.finite(result):
        raise FloatingPointError(f"{way} gave values that are not finite")
    return {"seconds": seconds, "peak_bytes": made.peak_bytes()}


def failure(error: Exception) -> dict[str, str]:
    """An answer with the error in one line; the log gets the traceback."""
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, LcmError):
        return {"error": str(error)}
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return {"error": f"{type(error).__name__}: {first[:300]}"}
