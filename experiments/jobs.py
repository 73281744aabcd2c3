"""Commands in processes of their own: they end with this one, and their output is a log."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments import processes
from lcm_jax.errors import LcmError

GRACE_S = 10  # between asking a command's processes to end, and ending them


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """In this block no other call fills the folder. Raises LcmError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LcmError(f"{folder}: another call fills this folder; wait for it, or use another") from None
        yield


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    seconds: float | None = None,
    cwd: Path | None = None,
) -> int | None:
    """The exit code of a process, whose group has ended when this returns or raises; None: the time was over.

    log: a file for what it prints.
    environment: besides this process's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, processes.__file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=cwd,
            start_new_session=True,
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a process and its group."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # what it has left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_error(log: str) -> str:
    """The line of a log that says what went wrong: the last that looks like an error, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Failed)\b", line)]
    return (errors or lines or [""])[-1][:500]
