"""The folder of a run: one config, one process at a time, whole files only; and how a run is asked to stop.

    workdir/
      config.json          the resolved config; a command with another one is refused
      metrics.jsonl        runtime/telemetry.py
      data.json            sizes of the data: a run goes on with data of the same
      bad_records.jsonl    runtime/telemetry.py, where there are any
      tensorboard/         runtime/telemetry.py
      samples/             runtime/telemetry.py
      checkpoints/<step>/  runtime/checkpoint.py
      .lock                held (flock) by the process that trains here
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax
from ml_collections import ConfigDict

from lcm_jax import config as config_lib
from lcm_jax import files
from lcm_jax.errors import LcmError

CONFIG_FILE = "config.json"


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file so that its name holds the old or the new content, never a part."""
    with files.new_file(Path(path)) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


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


def prepare_workdir(workdir: str | os.PathLike[str], config: ConfigDict) -> Path:
    """Makes the workdir of a new run, or checks that this config may go on in an old one.

    Args:
        workdir: folder, created with its parents if need be.
        config: resolved config (`config.resolve`).

    Returns:
        The workdir as an absolute path, with config.json in it. On going on, config.json takes over the values that may
        differ (`config.differences`).

    Raises:
        LcmError: the workdir is a file, holds a run without a config, or holds a run with another config.
    """
    workdir = Path(workdir).expanduser().absolute()
    if workdir.exists() and not workdir.is_dir():
        raise LcmError(f"workdir {workdir} is a file; choose a folder")
    path = workdir / CONFIG_FILE
    begun = _begun(workdir)
    if path.exists() and begun:
        different = config_lib.differences(read_config(workdir), config)
        if different:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
            raise LcmError(f"workdir {workdir} holds a run with another config ({listed}); "
                           "use the same values or another workdir")
    elif begun:
        raise LcmError(f"workdir {workdir} holds a run but no {CONFIG_FILE}; "
                       "restore the file or choose another workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        text = config_lib.to_json(config)
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomic(path, text)
    return workdir


def same_as_before(workdir: Path, name: str, found: dict) -> None:
    """Keeps `found` in the file `name` of a new run. Raises LcmError where a run that goes on finds something else."""
    path = workdir / name
    if not (path.exists() and _begun(workdir)):
        if jax.process_index() == 0:
            write_atomic(path, json.dumps(found, indent=2) + "\n")
        return
    for key, before in json.loads(path.read_text()).items():
        if before != found.get(key):
            raise LcmError(f"{path} says that {key} of this run were {before}, now they are {found.get(key)}: the data "
                           "have changed; restore them, or choose another workdir")


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps the workdir to one training process; the operating system frees it when the process ends, however it ends.

    Raises LcmError if another process holds it. On a file system without locks nothing is checked.
    """
    if jax.process_index() != 0:
        yield
        return
    with open(Path(workdir) / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LcmError(f"{workdir} is in use by another process; wait for it or choose another folder"
                           ) from None
        except OSError:  # no lock service there
            pass
        yield


class StopSignal:
    """Context that turns SIGTERM and SIGINT into a flag, so that a step in progress ends and is saved.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop: save; break

    A second signal takes its usual effect at once. Handlers are those of before when the context ends.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came, for the message
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self.name is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
