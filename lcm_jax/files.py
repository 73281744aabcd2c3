"""Files as all of the package reads and writes them: complete or not at all, and synced to the disk."""

import contextlib
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

_OTHER_FILES = 512  # that a process has open besides its data: libraries, sockets, logs
_MOST_FILES = 2**16


def inside(folder: Path, name: Any) -> Path:
    """`folder / name`, for a name that was read from a file: it must not lead out of `folder`.

    Only the text of the name is checked. Links are followed, because users and the hub's cache (to its blobs) use them.

    Raises:
      LcmError: the name is absolute, leads out by its `..`, or is not the name of a file.
    """
    normal = posixpath.normpath(name.replace("\\", "/")) if isinstance(name, str) else "/"
    if normal.startswith("/") or normal.split("/")[0] == ".." or "\0" in normal:
        raise LcmError(f"{ascii(name)[:200]} names no file inside {folder}; use a path relative to that folder")
    return folder / posixpath.normpath(name)


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file. Never waits, as opening a pipe would.

    Raises:
      LcmError: a pipe, a device or a folder; a file of more than `most` bytes.
      OSError: it cannot be opened or read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        state = os.fstat(stream.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise LcmError(f"{path} is no regular file; put a file in its place")
        if state.st_size > most:
            raise LcmError(f"{path} has {state.st_size} bytes, but at most {most} are read; remove it or shrink it")
        return stream.read(state.st_size)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. The file appears as `path` only if the block ends without an error."""
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
    """Raises LcmError if fewer than `needed` bytes are free for `target`, which need not exist."""
    existing = target.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise LcmError(f"{target} needs {needed} bytes, {free} are free; make room or choose another disk")


def allow_open_files(needed: int) -> None:
    """Raises this process's limit (`ulimit -n`) so that `needed` files may be open besides the usual ones.

    Raises:
      LcmError: the system's limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed + _OTHER_FILES:
        soft = max(soft, _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES))
        if soft < needed + _OTHER_FILES:
            raise LcmError(
                f"{needed} files must be open at once, but the limit of this process is {hard}; raise it "
                "(ulimit -n), or use fewer, larger files"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_text(path: Path, text: str | bytes) -> None:
    """Writes a new file and syncs it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        stream.write(text.encode() if isinstance(text, str) else text)
        sync(stream)


def sync(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Syncs the names in `folder`: a rename is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replaces a file as a whole: at any moment it has the old or the new content."""
    with new_file(Path(path)) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
