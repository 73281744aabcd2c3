"""Whether a workdir's checkpoints are lost: its other files record how far the run has come.

A run without checkpoints starts again, one with older checkpoints trains steps again. That is right if it was killed
before it could save. It is wrong if a disk is not mounted, a link is broken, or folders were moved.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import jax

from lcm_jax.errors import LcmError
from lcm_jax.runtime.checkpoints import list_steps
from lcm_jax.runtime.telemetry import EVENTS_FILE, METRICS_FILE, read_jsonl
from lcm_jax.runtime.workdir import CONFIG_FILE, read_config

_WAS_COMPLETE = re.compile(r"(\d+)\.damaged\d*|\.(\d+)\.removed")
_INCOMPLETE = re.compile(r"\.(\d+)\.partial")


def check(workdir: Path, every: int) -> None:
    """Warns on stderr if the newest checkpoint is older than it can be; call it before `workdir` is changed.

    Args:
        workdir: existing folder.
        every: steps between checkpoints, if config.json does not have the previous value.

    Raises:
        LcmError: there is no checkpoint, but there was one; `checkpoints` is a broken link; metrics.jsonl or
            events.jsonl is damaged.
    """
    folder, metrics = workdir / "checkpoints", workdir / METRICS_FILE
    for link in (folder, metrics):
        if link.is_symlink() and not link.exists():
            raise LcmError(
                f"{link} links to {os.readlink(link)}, which does not exist; mount or restore it, or remove the link"
            )
    if not (metrics.exists() and (workdir / CONFIG_FILE).exists()):
        return  # a new run, or one that `prepare_workdir` refuses
    every = _interval(read_config(workdir), every)
    known, saved = known_steps(workdir)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    steps = list_steps(folder)
    newest = max(steps, default=0)
    writing = [int(found[1]) for found in map(_INCOMPLETE.match, names) if found]
    # Training continues while a checkpoint is written, at most to the next one, which waits for it.
    due = max([newest, *(step for step in writing if step - newest <= every)]) + every
    if steps and (known > due or max(saved, default=0) > newest) and jax.process_index() == 0:
        print(
            f"WARNING: {METRICS_FILE} has step {known}, but the newest checkpoint in {folder} is of step {newest}: "
            f"steps {newest + 1} to {known} are trained again, and their lines move to metrics.cut.jsonl. If newer "
            "checkpoints are elsewhere, stop this run and bring them back",
            file=sys.stderr,
            flush=True,
        )
    saved |= {int(found[1] or found[2]) for found in map(_WAS_COMPLETE.match, names) if found}
    if not steps and (known > due or saved):
        there = f" (only {', '.join(names)})" if names else ""
        raise LcmError(
            f"{metrics} has step {max([known, *saved])}, but {folder} holds no checkpoint{there}; "
            f"bring the checkpoints back, or delete {METRICS_FILE} to start again, or choose another workdir"
        )


def known_steps(workdir: Path) -> tuple[int, set[int]]:
    """(last step in the files, steps of checkpoints that were on disk), both of the last attempt."""
    known, saved = 0, set()
    for event in read_jsonl(workdir / EVENTS_FILE):
        if event.get("event") == "start":
            known, saved = event["step"], {event["step"]} - {0}
        elif event.get("event") == "saved":
            saved |= {event["step"]} - {0}
        known = max(known, event["step"])
    return max([known, *(record["step"] for record in read_jsonl(workdir / METRICS_FILE))]), saved


def _interval(config: dict[str, Any], default: int) -> int:
    checkpoint = config.get("checkpoint")
    every = checkpoint.get("every") if isinstance(checkpoint, dict) else None
    return every if type(every) is int and every > 0 else default
