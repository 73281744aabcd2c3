"""The folder `checkpoints/`: which steps it holds, which of them are whole, which may go. Files only, no arrays.

On several processes the functions that change something are for the first one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from lcm_jax.errors import LcmError
from lcm_jax.runtime.checkpoints import digests

METRICS_FILE = "metrics.json"
# What a killed run leaves; the last is what orbax alone named so.
_LEFT_OVER = re.compile(r"\.\d+\.(partial|removed)|\.seen-|\d+\.orbax-checkpoint-tmp")


def short(error: BaseException) -> str:
    """An error of orbax, which can have pages, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def unreadable(path: Path, error: BaseException) -> LcmError:
    """The checkpoint `path` may be whole, but reading it failed."""
    return LcmError(
        f"checkpoint {path} cannot be read ({short(error)}); try again, or move that folder elsewhere "
        "to go on from the checkpoint before it"
    )


def list_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; [] if there is no such folder."""
    folder = Path(folder)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()) if folder.is_dir() else []


def find_damage(folder: Path, step: int, under: str = "") -> str | None:
    """What is wrong with the checkpoint of `step`, or with its part `under`, in words; None: it is as it was written.

    Raises:
      LcmError: a file of it cannot be read.
    """
    path = folder / str(step)
    try:
        return digests.find_damage(path, under)
    except OSError as error:
        raise unreadable(path, error) from error


def _say(line: str) -> None:
    print(f"WARNING: {line}", file=sys.stderr, flush=True)


def check_present(folder: Path, step: int | None, steps: list[int]) -> None:
    """Raises LcmError unless `step` is among `steps`."""
    if step not in steps:
        wanted = "" if step is None else f" of step {step}"
        raise LcmError(f"no checkpoint{wanted} in {folder}; present: {_list(steps)}")


def check_whole(folder: Path, step: int, under: str = "") -> None:
    """Raises LcmError where a checkpoint, or its part `under`, is damaged or cannot be read."""
    damage = find_damage(folder, step, under)
    if damage:
        others = [other for other in list_steps(folder) if other != step]
        raise LcmError(f"checkpoint {folder / str(step)} is damaged: {damage}; use another step: {_list(others)}")


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def kept(steps: Mapping[int, float | None], keep: int, keep_every: int = 0) -> set[int]:
    """Of {step: metric or None}: the newest `keep`, those that `keep_every` divides, and the one of the lowest metric.

    Of equal metrics the newest counts; None and NaN are no metric. `keep_every` 0: none.
    """
    values = {step: value for step, value in steps.items() if value is not None and not math.isnan(value)}
    best = [min(values, key=lambda step: (values[step], -step))] if values else []
    return {*sorted(steps)[-keep:], *(step for step in steps if keep_every and step % keep_every == 0), *best}


def tidy(folder: Path, best: str = "") -> list[tuple[int, float | None]]:
    """Makes the folder, removes what killed runs left; (step, its metric `best`) of the checkpoints there.

    Raises:
      LcmError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LcmError(f"{folder} cannot be made ({error.strerror}); choose another workdir") from error
    for path in list(folder.iterdir()):
        if _LEFT_OVER.match(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [(step, _metric(folder, step, best)) for step in list_steps(folder)]


def _metric(folder: Path, step: int, best: str) -> float | None:
    path = folder / str(step) / METRICS_FILE
    if not best or not path.exists():
        return None
    try:
        return json.loads(path.read_bytes()).get(best)
    except (OSError, ValueError, AttributeError) as error:
        _say(f"{path} cannot be read ({short(error)}); that checkpoint does not count as the best")
        return None


def begun(folder: Path, step: int) -> Path:
    """A mark that the checkpoint of `step` is being written; removed when it is there, or by the next run."""
    return folder / f".{step}.partial.begun"


def remove(folder: Path, step: int) -> None:
    """Away with a checkpoint; its number goes first, so that nobody takes half of it for whole."""
    aside = folder / f".{step}.removed"
    with contextlib.suppress(FileNotFoundError):  # its owner was quicker
        os.rename(folder / str(step), aside)
    shutil.rmtree(aside, ignore_errors=True)  # a reader may hold a file open (NFS); the next run removes it then


def newest_whole(folder: Path) -> int:
    """The newest undamaged step. Damaged ones that are newer are named on stderr and put aside.

    Raises:
      LcmError: there is no checkpoint, a file cannot be read, or all are damaged; then nothing is touched.
    """
    steps, damage = list_steps(folder), {}
    check_present(folder, max(steps, default=None), steps)
    for step in reversed(steps):
        found = find_damage(folder, step)
        if not found:
            break
        damage[step] = found
    else:
        listed = "; ".join(f"{step}: {found}" for step, found in damage.items())
        raise LcmError(
            f"every checkpoint in {folder} is damaged ({listed}); bring back a copy, or choose "
            "another workdir to begin anew"
        )
    for bad, found in damage.items():
        path = folder / str(bad)
        names = (path.with_name(f"{bad}.damaged{n or ''}") for n in itertools.count())
        aside = next(name for name in names if not name.exists())
        os.rename(path, aside)
        _say(f"checkpoint {path} is DAMAGED: {found}. It is {aside.name} now; going on from step {step}")
    return step
