"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto: workdir/profile/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from lcm_jax.errors import LcmError

FOLDER = "profile"


def parse_steps(spec: str) -> tuple[int, int]:
    """"100:110" -> (100, 110): the first and the last step of a trace, counted as in metrics.jsonl.

    Raises:
      LcmError: anything else, or a range that is empty or begins before step 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise LcmError(f"--profile={spec} is no range of steps; write FIRST:LAST, as 100:110, the first step is 1")
    return first, last


class Profile:
    """Traces the steps of `spec`; a context manager that costs nothing where `spec` is empty.

        with Profile(workdir, "100:110", start_step, total_steps) as profile:
            profile.at(step, state)
            while step < total_steps:
                state, metrics = step_fn(state, ...)
                step += 1
                profile.at(step, state)

    A step is traced from its dispatch to its end on the device; leaving the context ends a trace that is under way.
    Process 0 traces, with the devices it sees.

    Args:
      workdir: of the run.
      spec: see `parse_steps`; "" for none.
      start_step: steps done before.
      total_steps: length of the run.

    Raises:
      LcmError: the run will not come by these steps.
    """

    def __init__(self, workdir: str | Path, spec: str, start_step: int, total_steps: int) -> None:
        self.folder, self._running = Path(workdir) / FOLDER, False
        self._steps = parse_steps(spec) if spec else None
        if self._steps and not (start_step < self._steps[0] and self._steps[1] <= total_steps):
            raise LcmError(f"--profile={spec}: this run goes from step {start_step + 1} to {total_steps}; "
                           "choose steps among them")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def at(self, step: int, value: Any) -> None:
        """Call it before the first step and after each one: how many are done, and what the last gave, as the state."""
        if self._steps is None or jax.process_index():
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
