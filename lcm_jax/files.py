"""Files as all of the package reads and writes them: complete or not at all, and synced to the disk.

A new file or folder is written as `.NAME.<8 hex digits>.partial` beside its name, locked as long as its writer lives.
What a killed one leaves is removed by the next program that writes to the same folder.
"""

import contextlib
import errno
import fcntl
import os
import posixpath
import re
import resource
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lcm_jax.errors import LcmError

_OTHER_FILES = 512  # that a process has open besides its data: libraries, sockets, logs
_MOST_FILES = 2**16


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with the home folder in place of its ~. The ~ of an unknown user stays, where Path's own way raises."""
    return Path(os.path.expanduser(path))


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


def read_regular(path: Path, most: int, pipes: bool = False) -> bytes:
    """The content of a regular file. Never waits, as opening a pipe would.

    pipes: a pipe that somebody writes to, as `<(...)` in a shell, may stand for it, and is read to its end.

    Raises:
      LcmError: a pipe, a device or a folder; a file of more than `most` bytes.
      OSError: it cannot be opened or read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISDIR(os.fstat(handle).st_mode):  # Python's own error names the number of the handle, which stays open
        os.close(handle)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with open(handle, "rb") as stream:
        state = os.fstat(stream.fileno())
        if pipes and stat.S_ISFIFO(state.st_mode):
            os.set_blocking(stream.fileno(), True)
            content = stream.read(most + 1)
            if len(content) > most:
                raise LcmError(f"{path} gives more than {most} bytes; give less")
            return content
        if not stat.S_ISREG(state.st_mode):
            raise LcmError(f"{path} is no regular file; put a file in its place")
        if state.st_size > most:
            raise LcmError(f"{path} has {state.st_size} bytes, but at most {most} are read; remove it or shrink it")
        return stream.read(state.st_size)


class CannotWrite(OSError, LcmError):
    """The system cannot write a file; one line that names it and the way out."""


_REMEDIES = {
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a folder that can be written to"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "choose another name"),
}


@contextlib.contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """In this block an OSError of writing `path`, which is called `partial` until it is whole, names it.

    Raises:
      CannotWrite: for any OSError but those of other files, and of an output that nobody reads.
    """
    try:
        yield
    except OSError as error:
        given, whole = error.filename, path.absolute()
        name = Path(os.fsdecode(given)).absolute() if isinstance(given, str | bytes) else whole
        ours = name in (whole, *whole.parents) or (partial and partial.absolute() in (name, *name.parents))
        if isinstance(error, CannotWrite) and partial:
            text = str(error).replace(str(partial), str(path))
        elif isinstance(error, CannotWrite | BrokenPipeError) or not ours:
            raise
        else:
            remedy = _REMEDIES.get(error.errno, "make room, or choose another place")
            text = f"{path} cannot be written ({error.strerror or error}); {remedy}"
        found = CannotWrite(text)
        found.errno = error.errno
        raise found from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. The file appears as `path` only if the block ends without an error.

    Raises:
      CannotWrite: it names `path`.
    """
    with _partial(path, Path.touch) as partial:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that gets that name if the block ends without an error; whoever writes to it syncs files.

    Raises:
      CannotWrite: it names `path`, which must not exist, or be an empty folder.
    """
    with _partial(path, Path.mkdir) as partial:
        yield partial
        for folder in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
            sync_folder(folder)


_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial", re.DOTALL)
_tidied: set[Path] = set()  # folders that this process has looked into


@contextlib.contextmanager
def _partial(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Makes a new file or folder beside `path`, locked in the block; at its end it is renamed to `path`, or removed."""
    folder = path.absolute().parent
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    if folder not in _tidied:
        tidy(folder)
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # between making and locking another process may have taken it for a killed one's
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
            with writing(path, partial):
                make(partial)
            stack.callback(remove, partial)
            if _held(partial, stack) and partial.exists():
                break
        with writing(path, partial):
            yield partial
            os.rename(partial, path)
            sync_folder(folder)


def tidy(folder: Path) -> None:
    """Removes what killed programs left in `folder`, see the module."""
    _tidied.add(folder)
    with contextlib.suppress(OSError):  # it cannot be read or written: whoever needs it will say so
        for path in [path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name)]:
            with contextlib.ExitStack() as stack:
                if _held(path, stack):
                    remove(path)


def _held(path: Path, stack: contextlib.ExitStack) -> bool:
    """Locks a file or folder until `stack` ends. False: another process has it, or its file system has no locks."""
    try:
        handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_CLOEXEC)  # NFS locks what it writes
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
    """Writes a file and syncs it to the disk. Not for final names: see `new_file`. Raises CannotWrite."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(_bytes(text))
            sync(stream)


def _bytes(text: str | bytes) -> bytes:
    """UTF-8, also of text that names a file whose name is not."""
    return text.encode(errors="backslashreplace") if isinstance(text, str) else text


def append(path: Path, text: str | bytes, synced: bool = False) -> None:
    """Adds to the end of a file; synced: it is on the disk then. Raises CannotWrite."""
    with writing(path), path.open("ab", buffering=0) as stream:  # whole lines, also of several processes
        rest = memoryview(_bytes(text))
        while rest:
            rest = rest[stream.write(rest) :]
        if synced:
            os.fsync(stream.fileno())


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
        partial.write_bytes(_bytes(data))
