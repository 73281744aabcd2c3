"""The folder of a run: one config, one run at a time, whole files only; and how a run is asked to stop.

workdir/
  config.json          the resolved config; a command with another one is refused
  metrics.jsonl        runtime/reporting/telemetry.py
  metrics.cut.jsonl    lines of metrics.jsonl of steps that were trained again
  data.json            sizes of the data: a run goes on with data of the same
  events.jsonl         runtime/reporting/goodput.py
  bad_records.jsonl    runtime/reporting/telemetry.py, where there are any
  bad_batch.json       runtime/reporting/alarms.py, where a loss ended the run
  wandb.json           runtime/reporting/boards.py, where it is asked
  tensorboard/         runtime/reporting/boards.py
  samples/             runtime/reporting/telemetry.py
  profile/             runtime/reporting/profiling.py, where it is asked
  aot_report.json      lcm_jax.train --aot_report
  checkpoints/<step>/  runtime/checkpoints/checkpoint.py; <step>.damaged is kept for its owner
  .lock                held (flock) by the processes of the run that trains here
  .owner               runtime/processes/owner.py, in its place where the file system has no locks

Which run a folder belongs to, in a file of the folder: where the file system has no locks.

The file is made by the one call that can succeed for one process alone, and touched as long as the run lives. One that
nobody has touched for STALE seconds is of a run that was killed, and is replaced. Times are compared as the file system
writes them, as the clocks of two machines differ. The process number is for people: containers that share a host's name
do not see each other's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any

import jax

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.runtime import distributed

CONFIG_FILE = "config.json"


def read_config(workdir: str | os.PathLike[str]) -> dict:
    """The workdir's config.json as a nested dict. Raises LcmError if there is none or it is not JSON."""
    path = Path(workdir) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise LcmError(f"{path} does not exist; give the workdir of a run of lcm_jax.train") from None
    except (ValueError, OSError) as error:
        raise LcmError(f"{path} cannot be read ({error}); restore it or choose another workdir") from error
    if not isinstance(saved, dict):
        raise LcmError(f"{path} holds no config; restore it or choose another workdir")
    return saved


def _begun(workdir: Path) -> bool:
    """Whether a run got anywhere here; a first command that failed early must not bar the corrected one."""
    metrics = workdir / "metrics.jsonl"
    return any((workdir / "checkpoints").glob("[0-9]*")) or (metrics.exists() and metrics.stat().st_size > 0)


Differences = Callable[[Mapping[str, Any]], Mapping[str, tuple[Any, Any]]]


def prepare_workdir(workdir: str | os.PathLike[str], config: str, differences: Differences) -> None:
    """Writes config.json into the workdir of a new run, or checks that this config may resume the run that is there.

    Args:
        workdir: existing folder.
        config: resolved config as JSON text. On resuming, config.json takes over the values that may differ.
        differences: saved config -> {key: (saved value, present value)} of keys that may not differ, but do.

    Raises:
        LcmError: the workdir holds a run without a config, or a run with another config; the processes of the run have
            different configs. Raised on every process, whichever found it.
    """
    distributed.same("the config", config)
    distributed.everywhere(lambda: _prepare(Path(workdir), config, differences))


def _prepare(workdir: Path, config: str, differences: Differences) -> None:
    path = workdir / CONFIG_FILE
    begun = _begun(workdir)
    if path.exists() and begun:
        different = differences(read_config(workdir))
        if different:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
            raise LcmError(
                f"workdir {workdir} holds a run with another config ({listed}); use the same values or another workdir"
            )
    elif begun:
        raise LcmError(
            f"workdir {workdir} holds a run but no {CONFIG_FILE}; restore the file or choose another workdir"
        )
    if jax.process_index() == 0 and (not path.exists() or path.read_bytes() != config.encode()):
        files.write_atomic(path, config)


def same_as_before(workdir: Path, name: str, found: dict) -> None:
    """Keeps `found` in the file `name` of a new run. Raises LcmError where a run that goes on finds something else.

    All processes of a run come here, and fail together.
    """
    distributed.same(name, json.dumps(found, indent=2))
    distributed.everywhere(lambda: _same_as_before(workdir, name, found))


def _same_as_before(workdir: Path, name: str, found: dict) -> None:
    path = workdir / name
    if not (path.exists() and _begun(workdir)):
        if jax.process_index() == 0:
            files.write_atomic(path, json.dumps(found, indent=2) + "\n")
        return
    for key, before in json.loads(path.read_text()).items():
        if before != found.get(key):
            raise LcmError(
                f"{path} says that {key} of this run were {before}, now they are {found.get(key)}: the data "
                "have changed; restore them, or choose another workdir"
            )


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Keeps the workdir, made if need be, to one run; the operating system frees it when the run's last process ends.

    Gives its absolute path. On a file system without locks an owner file takes their place, see `owner.held`.

    Raises:
        LcmError: in all processes: it is a file, or another run holds it.
    """
    workdir = Path(workdir).expanduser().absolute()
    distributed.everywhere(lambda: _make(workdir))
    with contextlib.ExitStack() as stack:
        file = distributed.everywhere(lambda: stack.enter_context(open(Path(workdir) / ".lock", "a+")))
        distributed.everywhere(lambda: _hold(file, stack) if jax.process_index() == 0 else None)
        distributed.everywhere(lambda: _lock(file, fcntl.LOCK_SH) if jax.process_index() > 0 else None)
        yield workdir


def _make(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise LcmError(f"workdir {workdir} is a file; choose a folder")
    workdir.mkdir(parents=True, exist_ok=True)


def _hold(file: IO[str], stack: contextlib.ExitStack) -> None:
    """The lock, or until `stack` ends the owner file, which the first process has for all of its run."""
    without = _lock(file)
    if without is not None:
        workdir = Path(file.name).parent
        print(
            f"WARNING: the file system of {workdir} has no locks ({without.strerror}); the file {FILE} there "
            "keeps other runs out",
            file=sys.stderr,
            flush=True,
        )
        stack.enter_context(held(workdir))


def _lock(file: IO[str], shared: int = 0) -> OSError | None:
    """The first process gets the file for itself alone, then shares it with the others of its run.

    Returns why where the file system has no locks.
    """
    try:
        fcntl.flock(file, (shared or fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if not shared and jax.process_count() > 1:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LcmError(
            f"{Path(file.name).parent} is in use by another process; wait for it or choose another folder"
        ) from None
    except OSError as error:  # ENOSYS of Lustre, ENOLCK of NFS, and other words for it
        return error
    return None


class StopSignal:
    """Context that turns SIGTERM and SIGINT into a wish to stop, so that a step in progress ends and is saved.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.agreed():  # all processes at the same step
                    save; break

    A loop whose processes wait for none of the others asks `if stop:` wherever it can end. A signal to any process of
    several stops them all; SIGINT goes the way of SIGTERM then, which is jax's from `distributed.initialize` on (it
    would hear of none if Python took it), so further SIGTERMs, as a launcher sends them to each process, do nothing.
    Else a second signal takes its usual effect at once. Handlers are those of before when the context ends.

    Attributes:
        name: of the signal that came, for the message; "SIGTERM" where it came to another process.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._several = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._several = jax.distributed.is_initialized()
        numbers = (signal.SIGINT,) if self._several else self.SIGNALS
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        """Whether to stop: this process by itself. In several processes True at different times."""
        if not self._several:
            return self.name is not None
        return self._named(distributed.stop_asked())  # its own signal, too: once the others can hear of it

    def agreed(self) -> bool:
        """Whether to stop: every process, here. To be asked by each after every step, and once a step."""
        if not self._several:
            return bool(self)
        return self._named(distributed.stop_agreed())

    def _named(self, stop: bool) -> bool:
        if stop:
            self.name = self.name or signal.SIGTERM.name
        return stop

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


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
