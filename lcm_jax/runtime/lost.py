"""Whether a workdir's checkpoints are gone: its other files know how far the run has come.

A run without checkpoints begins anew, one with older ones trains steps again. That is right if it was killed before it
could save; it is not if a disk is not mounted, a link leads nowhere, or folders were moved.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import jax

from lcm_jax.errors import LcmError
from lcm_jax.runtime import telemetry as jsonl
from lcm_jax.runtime import workdir as workdir_lib
from lcm_jax.runtime.checkpoints import list_steps
from lcm_jax.runtime.telemetry import EVENTS_FILE, METRICS_FILE

_WHOLE_ONCE = re.compile(r"(\d+)\.damaged\d*|\.(\d+)\.removed")
_WRITTEN_NOW = re.compile(r"\.(\d+)\.partial")


def check(workdir: Path, every: int) -> None:
    """Warns on stderr if the newest checkpoint is older than it can be. Before anything in `workdir` is changed.

    Args:
        workdir: existing folder.
        every: steps between checkpoints, if config.json does not say what they were.

    Raises:
        LcmError: there is no checkpoint, but there was one; `checkpoints` is a link to nothing; metrics.jsonl or
            events.jsonl is damaged.
    """
    folder, metrics = workdir / "checkpoints", workdir / METRICS_FILE
    for link in (folder, metrics):
        if link.is_symlink() and not link.exists():
            raise LcmError(
                f"{link} is a link to {os.readlink(link)}, which is not there; mount or restore it, or remove the link"
            )
    if not (metrics.exists() and (workdir / workdir_lib.CONFIG_FILE).exists()):
        return  # a new run, or one that `prepare_workdir` refuses
    every = _interval(workdir_lib.read_config(workdir), every)
    known, saved = known_steps(workdir)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    steps = list_steps(folder)
    newest = max(steps, default=0)
    writing = [int(found[1]) for found in map(_WRITTEN_NOW.match, names) if found]
    # While a checkpoint is written the steps go on, at most to the next one, which waits for it.
    due = max([newest, *(step for step in writing if step - newest <= every)]) + every
    if steps and (known > due or max(saved, default=0) > newest) and jax.process_index() == 0:
        print(
            f"WARNING: {METRICS_FILE} knows of step {known}, the newest checkpoint in {folder} is of step {newest}: "
            f"steps {newest + 1} to {known} are trained again, their lines go to metrics.cut.jsonl. If newer ones "
            "are elsewhere, stop this run and bring them back",
            file=sys.stderr,
            flush=True,
        )
    saved |= {int(found[1] or found[2]) for found in map(_WHOLE_ONCE.match, names) if found}
    if not steps and (known > due or saved):
        there = f" (only {', '.join(names)})" if names else ""
        raise LcmError(
            f"{metrics} knows of step {max([known, *saved])}, but {folder} holds no checkpoint{there}; "
            f"bring the checkpoints back, or delete {METRICS_FILE} to begin anew, or choose another workdir"
        )


def known_steps(workdir: Path) -> tuple[int, set[int]]:
    """(the last step that the files know of, steps of checkpoints that were on disk): of the last attempt."""
    known, saved = 0, set()
    for event in jsonl.read(workdir / EVENTS_FILE):
        if event.get("event") == "start":
            known, saved = event["step"], {event["step"]} - {0}
        elif event.get("event") == "saved":
            saved |= {event["step"]} - {0}
        known = max(known, event["step"])
    return max([known, *(record["step"] for record in jsonl.read(workdir / METRICS_FILE))]), saved


def _interval(config: dict[str, Any], default: int) -> int:
    checkpoint = config.get("checkpoint")
    every = checkpoint.get("every") if isinstance(checkpoint, dict) else None
    return every if isinstance(every, int) and every > 0 else default
