"""Which run a folder belongs to, in a file of the folder: where the file system has no locks.

The file is made by the one call that can succeed for one process alone, and touched as long as the run lives. One that
nobody has touched for STALE seconds is of a run that was killed, and is replaced. Times are compared as the file system
writes them, as the clocks of two machines differ. The process number is for people: containers that share a host's name
do not see each other's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_jax.errors import LcmError

FILE = ".owner"
REFRESH = 30  # seconds between two touches
STALE = 300  # seconds untouched, after which the run counts as dead: a machine may be busy, a file system slow
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps `folder` to this process. Its owner file goes at the end, unless another run has it by then.

    Raises:
      LcmError: another run has the folder.
      OSError: the file cannot be written.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}
    me |= {"job": next((os.environ[name] for name in _JOBS if name in os.environ), None), "token": uuid.uuid4().hex}
    path, over = folder / FILE, threading.Event()
    _take(path, me)
    thread = threading.Thread(target=_refresh, args=(path, me, over), name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if _read(path).get("token") == me["token"]:
            path.unlink(missing_ok=True)


def _take(path: Path, me: dict[str, Any]) -> None:
    if _create(path, me):
        return
    other = _read(path)
    silent = _silent(path)
    if silent < STALE:
        raise LcmError(_in_use(path, other, f"{max(silent, 0):.0f} s ago"))
    aside = path.with_name(f"{FILE}.taken")  # one at a time: of two that find it stale, one would take the other's
    if not _create(aside, me):
        raise LcmError(f"{_in_use(path, other, 'long ago')}, and {aside.name}, too")
    try:
        if _read(path) != other:
            raise LcmError(_in_use(path, _read(path), "just now"))
        path.unlink(missing_ok=True)
        if not _create(path, me):
            raise LcmError(_in_use(path, _read(path), "just now"))
    finally:
        aside.unlink()


def _in_use(path: Path, other: dict[str, Any], touched: str) -> str:
    who = ", ".join(f"{key} {other[key]}" for key in ("host", "pid", "job", "since") if other.get(key)) or "unknown"
    return (
        f"{path.parent} is in use by another run ({who}; last sign of life {touched}); wait for it or choose "
        f"another folder. If that run is dead, delete {path}, or wait until it is {STALE} s old"
    )


def _refresh(path: Path, me: dict[str, Any], over: threading.Event) -> None:
    """Touches the file. A process that slept for so long that another run took the folder ends: two never write."""
    while not over.wait(REFRESH):
        found = _read(path).get("token")
        if found == me["token"]:
            with contextlib.suppress(OSError):  # a server that is away for a moment
                os.utime(path)
        elif found is not None:
            print(
                f"error: {path.parent} belongs to another run now, as this one gave no sign of life for {STALE} s",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)


def _create(path: Path, content: dict[str, Any]) -> bool:
    """Whether there was no such file until now."""
    try:
        with open(path, "x") as file:
            json.dump(content, file)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """What the file says; {} where it is gone or not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _silent(path: Path) -> float:
    """Seconds since the file was touched; 0 where it is gone."""
    probe = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink()
