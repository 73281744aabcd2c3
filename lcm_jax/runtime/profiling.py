"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto: workdir/profile/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jax

from lcm_jax.errors import LcmError

FOLDER = "profile"


def parse_steps(spec: str) -> tuple[int, int]:
    """ "100:110" -> (100, 110): the first and the last step of a trace, counted as in metrics.jsonl.

    Raises:
      LcmError: anything else, or a range that is empty or begins before step 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise LcmError(f"--profile={spec} is no range of steps; write FIRST:LAST, as 100:110, the first step is 1")
    return first, last


def check(spec: str, total_steps: int) -> None:
    """Raises LcmError where `spec` is no range of steps, or none of a run of `total_steps`; "" is no trace."""
    if spec and parse_steps(spec)[1] > total_steps:
        raise LcmError(f"--profile={spec}: this run ends at step {total_steps}; choose steps up to it")


class Profile:
    """Traces the steps of `spec`; a context manager that costs nothing where `spec` is empty.

        with Profile(workdir, "100:110", start_step) as profile:
            profile.at(step, state)
            while step < total_steps:
                state, metrics = step_fn(state, ...)
                step += 1
                profile.at(step, state)

    A step is traced from its dispatch to its end on the device; leaving the context ends a trace that is under way.
    Process 0 traces, with the devices it sees. A run that goes on beyond the first of the steps has traced them, or
    was stopped amid them; it says so, and traces none.

    Args:
      workdir: of the run.
      spec: see `parse_steps`; "" for none.
      start_step: steps done before.
    """

    def __init__(self, workdir: str | Path, spec: str, start_step: int) -> None:
        self.folder, self._running = Path(workdir) / FOLDER, False
        self._steps = parse_steps(spec) if spec and jax.process_index() == 0 else None
        if self._steps and start_step >= self._steps[0]:
            print(f"--profile={spec}: {start_step} steps are done already; no trace", file=sys.stderr, flush=True)
            self._steps = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def at(self, step: int, value: Any) -> None:
        """Call it before the first step and after each one: how many are done, and what the last gave, as the state."""
        if self._steps is None:
            return
        first, last = self._steps
        if step in (first - 1, last):
            jax.block_until_ready(value)  # the step that gave it is whole, inside the trace or outside
        if step == first - 1:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif step == last:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
