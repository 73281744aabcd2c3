"""Files as every room writes and reads them: whole or not at all, and seen onto the disk."""

import contextlib
import json
import os
import posixpath
import resource
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_jax.errors import LcmError

_OTHER_FILES = 512  # what a process has open beside its data: libraries, sockets, logs, other data
_MOST_FILES = 2**16


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      LcmError: no such file, or it does not hold one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LcmError(f"{path} is missing; the folder is incomplete, copy or download it again") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LcmError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise LcmError(f"{path} holds a {type(value).__name__} where a JSON object is needed; download it again")
    return value


def inside(folder: Path, name: Any) -> Path:
    """`folder / name`, for a name that stands in a file: it may not lead out of `folder`.

    The text of the name counts. Links are followed, as users and the hub's cache (to its blobs) put them.

    Raises:
      LcmError: the name is absolute, leads out by its `..`, or no name of a file.
    """
    normal = posixpath.normpath(name.replace("\\", "/")) if isinstance(name, str) else "/"
    if normal.startswith("/") or normal.split("/")[0] == ".." or "\0" in normal:
        raise LcmError(f"{ascii(name)[:200]} names no file inside {folder}; name one by its path from there")
    return folder / posixpath.normpath(name)


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file; one that is no regular file is not waited for.

    Raises:
      LcmError: a pipe, a device or a folder; a file of more than `most` bytes.
      OSError: it cannot be opened or read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        state = os.fstat(stream.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise LcmError(f"{path} is no regular file; put a file in its place")
        if state.st_size > most:
            raise LcmError(f"{path} has {state.st_size} bytes, more than {most} are not read; remove it, or shrink it")
        return stream.read(state.st_size)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: the file appears as `path` when the block ends well, else not at all."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.absolute().parent)


def check_space(target: Path, needed: int) -> None:
    """Raises LcmError where fewer than `needed` bytes are free for `target`, which need not exist."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LcmError(f"{target} needs {needed} bytes, {free} are free; make room or choose another disk")


def allow_open_files(needed: int) -> None:
    """Raises this process's limit so that `needed` files may be open beside the usual ones; see `ulimit -n`.

    Raises:
      LcmError: the system's limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed + _OTHER_FILES:
        soft = max(soft, _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES))
        if soft < needed + _OTHER_FILES:
            raise LcmError(
                f"{needed} files must be open at once, the limit of this process is {hard}; raise it "
                "(ulimit -n), or make fewer, larger files"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_text(path: Path, text: str | bytes) -> None:
    """Write a new file and see it onto the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        stream.write(text.encode() if isinstance(text, str) else text)
        sync(stream)


def sync(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a rename is durable only with its directory."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file so that its name holds the old or the new content, never a part."""
    with new_file(Path(path)) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
