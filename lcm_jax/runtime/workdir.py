"""The folder of a run: one config, one run at a time, whole files only; and how a run is asked to stop.

workdir/
  config.json          the resolved config; a command with another one is refused
  metrics.jsonl        telemetry.py
  metrics.cut.jsonl    lines of metrics.jsonl for steps that were trained again
  data.json            numbers of records and a digest of each data source; see `same_as_before`
  models.json          digests of the parts of the models that the run began with; likewise
  events.jsonl         telemetry.py
  bad_records.jsonl    data/loader.py, if there are unusable records
  bad_batch.json       telemetry.py, if a loss ended the run
  wandb.json           boards.py, if config.log.wandb
  tensorboard/         boards.py
  samples/             telemetry.py
  profile/             profiling.py, with --profile
  aot_report.json      lcm_jax.train --aot_report
  checkpoints/<step>/  checkpoints.py; <step>.damaged is kept for its owner
  .lock                locked by the first process of the run that trains here
  .lock-1, .lock-2 ..  locked by its other processes
  .owner               instead of .lock, held by the first process, if the file system has no locks
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from filelock import FileLock, LeaseCompromise, SoftFileLease, SoftFileLock, Timeout

from lcm_jax import ending, files, foreign
from lcm_jax.errors import LcmError
from lcm_jax.runtime import distributed

CONFIG_FILE = "config.json"


def read_config(workdir: str | os.PathLike[str]) -> dict:
    """The workdir's config.json as a nested dict. Raises LcmError if there is none or it is not JSON."""
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise LcmError(f"{path} does not exist; give the workdir of a run of lcm_jax.train")
    return foreign.read_json(path, "restore it or choose another workdir")


def _begun(workdir: Path) -> bool:
    """Whether a run got anywhere here. A first command that failed early must not block the corrected one."""
    metrics = workdir / "metrics.jsonl"
    return any((workdir / "checkpoints").glob("[0-9]*")) or (metrics.exists() and metrics.stat().st_size > 0)


def prepare_workdir(
    workdir: str | os.PathLike[str],
    config: str,
    differences: Callable[[Mapping[str, Any]], Mapping[str, tuple[Any, Any]]],
    moved: Callable[[Mapping[str, tuple[Any, Any]]], Mapping[str, str]] = lambda different: {},
) -> dict[str, tuple[Any, Any]]:
    """Writes config.json into the workdir of a new run, or checks that this config may resume the run that is there.

    Args:
        workdir: existing folder.
        config: resolved config as JSON text. When a run resumes, config.json takes over the values that may differ.
        differences: saved config -> {key: (saved value, present value)} of the keys that differ and may not.
        moved: of those, {key of a path: name of the file in which `same_as_before` finds whether the same is there}.

    Returns:
        The differences that are still to be checked so; unless there are none, config.json is not written yet, see
        `write_config`.

    Raises:
        LcmError: the workdir holds a run without a config or with another one, or a config.json of something else; the
            processes of the run have different configs. Raised on every process, whichever found it.
    """
    workdir = Path(workdir)
    distributed.assert_same("the config", config)
    different: Mapping[str, tuple[Any, Any]] = {}
    with distributed.together():
        path, begun = workdir / CONFIG_FILE, _begun(workdir)
        if begun and not path.exists():
            raise LcmError(
                f"workdir {workdir} holds a run but no {CONFIG_FILE}; restore the file or choose another workdir"
            )
        if path.exists() and not begun:
            _check_replaceable(path, config)
        if begun and (different := differences(read_config(workdir))):
            places = moved(different)
            unknown = [key for key, name in places.items() if not _has_digest(workdir, name)]
            if unknown or different.keys() - places.keys():
                listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
                link = f" If it was only moved, put a link in its old place, or change {path}" if unknown else ""
                raise LcmError(
                    f"workdir {workdir} holds a run with another config ({listed}); use the same values or another "
                    f"workdir.{link}".rstrip(".")
                )
    different = distributed.broadcast_from_first(lambda: different)  # links may differ between machines
    if not different:
        write_config(workdir, config)
    return {key: (old, new) for key, (old, new) in different.items()}


def _check_replaceable(path: Path, config: str) -> None:
    """Raises LcmError if `path` is not the config of an earlier attempt, as in the folder of a model."""
    sections = json.loads(config).keys()
    try:
        common = sections & foreign.read_json(path).keys()
    except LcmError:
        common = set()
    if 2 * len(common) < len(sections):
        raise LcmError(f"{path} is not the config of a run, and would be replaced; choose another workdir or remove it")


def _has_digest(workdir: Path, name: str) -> bool:
    return (workdir / name).exists() and any(isinstance(value, dict) for value in _saved(workdir / name).values())


def write_config(workdir: Path, config: str) -> None:
    """Replaces config.json, on the first process."""
    path = workdir / CONFIG_FILE
    with distributed.together():
        if jax.process_index() == 0 and (not path.exists() or path.read_bytes() != config.encode()):
            files.write_atomic(path, config)


def digest_entry(digest: str, name: str) -> dict[str, str]:
    """An entry for `same_as_before` of something that may be elsewhere another time: only the digests are compared.

    name: what it is and where, for people.
    """
    return {"digest": digest, "name": name}


def check_same(workdir: Path, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that a run that was begun finds what the file `name` of its workdir says; returns the file's content.

    Args:
        found: {what: value as JSON returns it, or a `digest_entry`}.

    Raises:
        LcmError: a value differs from the file's, which names the value, both sides, and the ways out.
    """
    path = workdir / name
    before = _saved(path) if path.exists() and _begun(workdir) else {}
    for key in (key for key in found if key in before):
        if _digest(before[key]) != _digest(found[key]):
            raise LcmError(
                f"{path}: {key} was {_shown(before[key])} when this run began, and is {_shown(found[key])} now; "
                f"restore what it began with, choose another workdir, or delete {path} to continue anyway"
            )
    return before


def same_as_before(workdir: Path, name: str, found: Mapping[str, Any]) -> None:
    """Writes `found` to the file `name` of a new run, or checks that a run that resumes finds the same.

    What the file of an older version lacks is added to it, with a warning.

    Raises:
        LcmError: on every process, as `check_same`, or if `found` differs between processes.
    """
    distributed.assert_same(name, json.dumps(found, indent=2))
    with distributed.together():
        before, path = check_same(workdir, name, found), workdir / name
        if jax.process_index() == 0:
            if (lacking := sorted(found.keys() - before.keys())) and _begun(workdir):
                print(
                    f"WARNING: {path} does not record with which {', '.join(lacking)} this run began; what is found "
                    "now is recorded",
                    file=sys.stderr,
                    flush=True,
                )
            if before | found != before:
                files.write_atomic(path, json.dumps(before | found, indent=2) + "\n")


def _saved(path: Path) -> dict[str, Any]:
    return foreign.read_json(path, "restore it or choose another workdir")


def _digest(value: Any) -> Any:
    return value.get("digest", value) if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    """A value in a message: an entry with its digest's beginning."""
    if isinstance(value, dict) and "digest" in value:
        return f"{value.get('name')} (digest {str(value['digest'])[:12]})"
    return str(value)


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Reserves the workdir, which is created if need be, for one run; gives its absolute path.

    The operating system frees it when the last process of the run ends, however it ends. On a file system without locks
    a file with the owner's name takes the place of the lock, see `_owned`.

    Raises:
        LcmError: in all processes: it is a file, or another run uses it.
    """
    workdir = files.expanded(workdir).absolute()
    index = jax.process_index()
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if workdir.exists() and not workdir.is_dir():
                raise LcmError(f"workdir {workdir} is a file; choose a folder")
            workdir.mkdir(parents=True, exist_ok=True)
            if index == 0:
                _keep_others_out(workdir, stack)
        # If process 0 is killed, the others may still write for a while; these locks keep the next run out until then.
        with distributed.together():
            if index > 0:
                _lock(workdir / f".lock-{index}", stack)
        yield workdir


def _keep_others_out(workdir: Path, stack: contextlib.ExitStack) -> None:
    without_locks = _lock(workdir / ".lock", stack)
    if without_locks is not None:
        owner = workdir / ".owner"
        reason = f"the file system of {workdir} has no locks ({without_locks.strerror})"
        print(f"WARNING: {reason}; the file {owner.name} there keeps other runs out", file=sys.stderr, flush=True)
        stack.enter_context(_owned(owner))
        return
    for path in workdir.glob(".lock-*"):
        with contextlib.ExitStack() as attempt:
            _lock(path, attempt)
            path.unlink()


def _lock(path: Path, stack: contextlib.ExitStack) -> OSError | None:
    """Holds the lock `path` until `stack` ends. Returns the error of a file system that has no locks."""
    path.touch()  # here, so that an OSError of the lock is not one of the file
    try:
        stack.enter_context(FileLock(path, blocking=False, fallback_to_soft=False))
    except Timeout:
        raise LcmError(f"{path.parent} is in use by another process; wait for it or choose another folder") from None
    except OSError as error:  # ENOSYS of Lustre, ENOLCK of NFS, and others
        return error
    return None


REFRESH = 30  # seconds between two signs of life of the owner
STALE = 300  # seconds without one until a run counts as dead: a machine may be busy, a file server slow


@contextlib.contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Makes this process the owner that the file `path` names, on a file system without locks.

    filelock creates the file, touches it every REFRESH seconds, and replaces that of a dead process of this machine. An
    owner on another machine counts as dead after STALE seconds, by the times that the file system writes.

    Raises:
        LcmError: another run owns it.
    """
    lease = SoftFileLease(path, lease_duration=STALE, heartbeat_interval=REFRESH, on_compromise=_end_run)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        silent = _seconds_untouched(path)
        if silent < STALE:
            raise _in_use(lease, f"{silent:.0f} s ago") from None
        try:  # One at a time: of two runs that find the file stale, the second would remove that of the first.
            with SoftFileLock(path.with_name(f"{path.name}.taken"), blocking=False):
                if _seconds_untouched(path) >= STALE:
                    lease.force_break()
                lease.acquire(blocking=False)
        except Timeout as taken:
            raise _in_use(lease, f"just now, see {taken.lock_file}") from None
    try:
        yield
    finally:
        lease.release()


def _in_use(lease: SoftFileLease, sign_of_life: str) -> LcmError:
    owner = lease.owner
    # In a container filelock appends "?" and the container's namespace to the host's name.
    who = f"pid {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "unknown"
    return LcmError(
        f"{Path(lease.lock_file).parent} is in use by another run ({who}; last sign of life {sign_of_life}); wait for "
        f"it or choose another folder. If that run is dead, delete {lease.lock_file}, or wait until it is {STALE} s old"
    )


def _end_run(lost: LeaseCompromise) -> None:
    """Ends a process that was silent for so long that another run took the folder: two must never write."""
    print(
        f"error: {Path(lost.lock_file).parent} no longer belongs to this run ({lost.reason}): it gave no sign of life "
        f"for {STALE} s, or {lost.lock_file} was deleted",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _seconds_untouched(path: Path) -> float:
    """By the clock of the file system, as machines' clocks differ; 0 if the file is gone."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return max(probe.stat().st_mtime - path.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink()


class StopSignal:
    """A context in which SIGTERM and SIGINT ask for a stop, so that the step in progress ends and is saved.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.agreed():  # all processes at the same step
                    save; break

    A loop whose processes do not wait for each other asks `if stop:` wherever it can end. A signal to one of several
    processes stops them all; further ones have no effect, as launchers send one to each process. In a single process a
    second signal takes its usual effect at once. On exit the previous handlers are restored. In a thread that is not
    the main one, signals are left to whoever started it: nothing stops but by another process.

    Attributes:
        name: of the signal that came, for messages; "SIGTERM" if another process got it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._several = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._several = jax.distributed.is_initialized()
        # From `distributed.initialize` on SIGTERM belongs to jax, which would not see it if Python handled it.
        numbers = (signal.SIGINT,) if self._several else self.SIGNALS
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # Python takes no handlers from there
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        """Whether this process is to stop. Several processes see it at different times."""
        if not self._several:
            return self.name is not None
        return self._named(distributed.stop_asked())  # also for its own signal: not before the others can see it

    def agreed(self) -> bool:
        """Whether all processes stop here. Each calls it once after every step."""
        if not self._several:
            return bool(self)
        return self._named(distributed.stop_agreed())

    def _named(self, stop: bool) -> bool:
        if stop:
            self.name = self.name or signal.SIGTERM.name
        return stop

    def _handle(self, number: int, _: FrameType | None) -> None:
        ending.signals.heard()
        self.name = signal.Signals(number).name
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # jax tells the other processes
        else:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
