"""Files that other programs wrote: JSON, zip containers and whatever a library parses.

Nobody has checked them. A size that a file declares is compared with what is there before memory is taken for it, depth
and digits are bounded, and whatever a parser raises becomes one line that names the file and the way out.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcm_jax import files
from lcm_jax.errors import LcmError

AGAIN = "copy or download it again"
MAX_JSON = 2**28  # bytes: the largest that circulate are tokenizers of some MB and indices of some 100 KB
_LINE = 300  # characters of another package's message
_DENSEST = 1100  # times that deflate can shrink a file, and more


def one_line(error: BaseException) -> str:
    """The message of another package's error, without line breaks; its type if it has none."""
    return " ".join(str(error).split())[:_LINE] or type(error).__name__


@contextlib.contextmanager
def reading(path: Path, kind: str, remedy: str = AGAIN) -> Iterator[None]:
    """In this block whatever a parser raises of the file `path` becomes an LcmError that names it.

    Args:
      path: the file.
      kind: what it should be, such as "a safetensors file".
      remedy: the way out.

    Raises:
      LcmError: for any error but MemoryError, and OSErrors that name a file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, LcmError) and str(path) in str(error):
            raise
        if isinstance(error, OSError) and error.filename is not None:  # a SyntaxError has a file's name, too
            raise
        size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise LcmError(f"{path}{size} cannot be read as {kind}: {reason}; {remedy}") from error


def json_object(content: str | bytes, where: object, remedy: str = AGAIN) -> dict[str, Any]:
    """The JSON object in a text, in UTF-8 with or without a byte order mark if it is bytes.

    Args:
      content: the text.
      where: what holds it, to be named in errors.
      remedy: the way out.

    Raises:
      LcmError: it is not one JSON object, is nested too deeply, or has an integer of thousands of digits.
    """
    try:
        value = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except RecursionError:
        raise LcmError(f"{where} is not valid JSON (it is nested too deeply); {remedy}") from None
    except ValueError as error:  # neither UTF-8 nor JSON, or more digits than Python takes
        raise LcmError(f"{where} is not valid JSON ({one_line(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise LcmError(f"{where} holds a {type(value).__name__}, not a JSON object; {remedy}")
    return value


def read_json(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      LcmError: no such file, no regular one, more than MAX_JSON bytes, or it does not hold one JSON object.
    """
    try:
        content = files.read_regular(path, MAX_JSON)
    except FileNotFoundError:
        raise LcmError(f"{path} is missing; the folder is incomplete, {remedy}") from None
    except IsADirectoryError:
        raise LcmError(f"{path} is a folder, not a file; {remedy}") from None
    return json_object(content, path, remedy)


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is nothing by its name, while a broken link is an error of `read_json`."""
    return read_json(path) if os.path.lexists(path) else {}


def open_zip(path: Path | BinaryIO, most: int) -> zipfile.ZipFile:
    """A zip archive whose members may be read: none is encrypted, and together they have at most `most` bytes.

    Raises:
      LcmError: they are more, or declare more than they can have; encrypted, or compressed otherwise than by deflate;
        two have one name. Others: as `zipfile`; use it within `reading`.
    """
    archive = zipfile.ZipFile(path)
    members = archive.infolist()
    size, total = archive.fp.seek(0, 2), sum(info.file_size for info in members)
    if total > most:
        raise LcmError(f"its members declare {total} bytes, at most {most} are read")
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise LcmError(f"{info.filename} is compressed by method {info.compress_type}, not stored or deflated")
        if info.compress_size > size or info.file_size > _DENSEST * max(info.compress_size, 1):
            of_it = f"{info.file_size} bytes in {info.compress_size}"
            raise LcmError(f"{info.filename} declares {of_it}, which cannot be in a file of {size}")
    if len({info.filename for info in members}) < len(members):
        raise LcmError("two of its members have one name")
    if any(info.flag_bits & 1 for info in members):
        raise LcmError("it is encrypted")
    return archive


def read_npz(path: Path, most: int) -> dict[str, np.ndarray]:
    """The arrays of a .npz of at most `most` bytes. Raises as `open_zip`; use it within `reading`."""
    arrays = {}
    with open_zip(path, most) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = header[version](stream)
                count = 1
                for side in shape:
                    count *= side
                content = stream.read()
                if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize != len(content):
                    raise LcmError(f"{info.filename} declares {dtype} {list(shape)} and holds {len(content)} bytes")
                array = np.frombuffer(content, dtype)
                arrays[info.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if fortran else "C")
    return arrays
