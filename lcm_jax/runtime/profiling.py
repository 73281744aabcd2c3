"""A trace of some steps of a run in workdir/profile/, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jax

from lcm_jax.errors import LcmError
from lcm_jax.runtime import waiting

FOLDER = "profile"


def parse_steps(spec: str) -> tuple[int, int]:
    """The first and last step of a trace, counted as in metrics.jsonl: "100:110" -> (100, 110).

    Raises:
      LcmError: not such a range, an empty range, or one that begins before step 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise LcmError(f"--profile={spec} is not a range of steps; write FIRST:LAST, for example 100:110, from step 1")
    return first, last


def check(spec: str, total_steps: int) -> None:
    """Raises LcmError if `spec` is not a range of steps, or one beyond `total_steps`; "" means no trace."""
    if spec and parse_steps(spec)[1] > total_steps:
        raise LcmError(f"--profile={spec}: this run ends at step {total_steps}; choose steps up to it")


class Profile(contextlib.AbstractContextManager):
    """Traces the steps of `spec`; a context manager.

        with Profile(workdir, "100:110", start_step) as profile:
            profile.at(start_step, state)
            for step in range(start_step + 1, total_steps + 1):
                state, metrics = step_fn(state, ...)
                profile.at(step, state)

    A step is traced from its dispatch to its end on the device; leaving the context ends a trace in progress. Only
    process 0 traces, with the devices that it sees. A run that resumes at or after the first step of the range does not
    trace, and says so: an earlier attempt has traced these steps or was stopped amid them.

    Args:
      workdir: of the run.
      spec: see `parse_steps`; "": no trace.
      start_step: steps done by earlier attempts.
    """

    def __init__(self, workdir: str | Path, spec: str, start_step: int) -> None:
        self.folder, self._running = Path(workdir) / FOLDER, False
        self._steps = parse_steps(spec) if spec and jax.process_index() == 0 else None
        if self._steps and start_step >= self._steps[0]:
            waiting.say(f"--profile={spec}: no trace, because {start_step} steps are already done")
            self._steps = None

    def __exit__(self, *_: object) -> None:
        self._stop()

    def at(self, step: int, value: Any) -> None:
        """Call it before the first step and after each step.

        Args:
          step: steps done.
          value: what the last step returned, for example the state.
        """
        if self._steps is None:
            return
        first, last = self._steps
        if step in (first - 1, last):
            jax.block_until_ready(value)  # so that the trace has whole steps: not the one before, all of the last
        if step == first - 1:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif step == last:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
