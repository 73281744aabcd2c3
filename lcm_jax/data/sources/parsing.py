"""Captions and numbers from the texts and JSON objects beside the images, which nobody has checked."""

from __future__ import annotations

import codecs
import collections
import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax import files, foreign
from lcm_jax.data.records import BadRecordError
from lcm_jax.errors import BadArgument, LcmError

TEXT_SUFFIXES = ("txt", "caption", "text")  # of a text with the captions of the image beside it, the usual one first
MAX_BYTES = 2**30  # of an image: more than the largest image that is decoded has, uncompressed
MAX_TEXT = 2**24  # bytes of a text, a JSON object or a line of a list of images
# Characters of a caption, as of a prompt: 16 MB take half a minute and 1 GB to tokenize, and 75 tokens are used.
MAX_CAPTION = 100_000
MAX_FIELDS = 128  # numbers known of a record: each takes 8 bytes of every record, whether it has it or not
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a file that holds an image; with `most` = MAX_TEXT, a caption.

    Raises:
      BadRecordError: it cannot be read, is not a regular file, or has more than `most` bytes (None: MAX_BYTES).
    """
    try:
        return files.read_regular(path, most or MAX_BYTES)
    except OSError as error:
        raise BadRecordError(f"{path} cannot be read ({error.strerror})") from None
    except LcmError as error:
        raise BadRecordError(str(error)) from None


def matching(pattern: str) -> list[str]:
    """Sorted paths that match a glob pattern. What exists as it is written is no pattern, nor are folders that do."""
    if os.path.exists(pattern):
        return [pattern]
    head = next(filter(Path.is_dir, Path(pattern).parents), None)
    if head is None:  # of an empty text
        return []
    rest = str(Path(pattern).relative_to(head))
    return sorted(glob.glob(rest if head == Path() else os.path.join(glob.escape(str(head)), rest), recursive=True))


def readable(name: str) -> str:
    """The name of a file as a key: bytes that are not UTF-8 are escaped, so that it prints and encodes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_name(path: Path, argument: str = "path") -> None:
    """Raises BadArgument, of `argument`, if array_record cannot open files in the folder `path`."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        problem = "its name is not UTF-8, and array_record opens no such files; rename the folder"
        raise BadArgument(argument, readable(str(path)), problem) from None


def text_of(content: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises BadRecordError."""
    if content.startswith(UTF16):
        raise BadRecordError("the caption is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"the caption is not UTF-8 (byte {error.start})") from None


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a text or a list of texts, bytes among them, without white space around and without empty ones.

    Raises:
      BadRecordError: none is left, one is not UTF-8 or cannot be (half a surrogate pair, as JSON allows), has more than
        MAX_CAPTION characters, or `value` is something else.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text_of(text) if isinstance(text, bytes) else text for text in texts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecordError(f"the caption is {json.dumps(value, default=str)[:60]}, not text")
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise BadRecordError("no caption: its text is empty")
    for text in captions:
        if len(text) > MAX_CAPTION:
            raise BadRecordError(f"the caption has {len(text)} characters, at most {MAX_CAPTION} are read")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecordError(f"the caption has {ascii(text[error.start])}, which no UTF-8 text can have") from None
        if "\0" in text:  # as UTF-16 has without its mark
            raise BadRecordError("the caption has a zero byte; save it as UTF-8 text")
    return captions


def json_object(content: bytes) -> dict[str, Any]:
    """One JSON object. Raises BadRecordError."""
    try:
        return foreign.json_object(content, "its description", "repair or remove it")
    except LcmError as error:
        raise BadRecordError(str(error)) from None


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a JSON object's values; true is 1, false 0. Texts, null and lists are left out."""
    return {name: _as_float(value) for name, value in row.items() if isinstance(value, int | float)}


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no largest
        return float("inf") if value > 0 else float("-inf")


def most_frequent(counts: Mapping[str, int]) -> list[str]:
    """At most MAX_FIELDS names, sorted: those that most records have."""
    return sorted(sorted(counts, key=lambda name: (-counts[name], name))[:MAX_FIELDS])


def rare(counts: Mapping[str, int]) -> list[str]:
    """A note on the names that `most_frequent` leaves out."""
    over = len(counts) - MAX_FIELDS
    return [f"{over} of {len(counts)} numbers, those that the fewest records have"] if over > 0 else []


def counted(rows: Sequence[Mapping[str, float]]) -> collections.Counter[str]:
    """Name of a number -> how many rows have it."""
    return collections.Counter(name for row in rows for name in row)


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """n rows of numbers -> name: float64 [n], NaN where a row lacks it, for the `most_frequent` names."""
    found = {name: np.full(len(rows), np.nan) for name in most_frequent(counted(rows))}
    for number, row in enumerate(rows):
        for name in row.keys() & found.keys():
            found[name][number] = row[name]
    return {name: column for name, column in found.items() if not np.isnan(column).all()}


def row_of(columns: Mapping[str, np.ndarray], number: int) -> dict[str, float]:
    """The numbers of one row of `columns`, without those that it lacks."""
    values = {name: float(column[number]) for name, column in columns.items()}
    return {name: value for name, value in values.items() if value == value}  # NaN is not equal to itself


def repeated(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Numbers of the records whose key and size are another's, too: int64, sorted. Both arguments are [n]."""
    order = np.lexsort((sizes, keys))
    alike = (keys[order][1:] == keys[order][:-1]) & (sizes[order][1:] == sizes[order][:-1])
    return np.union1d(order[1:][alike], order[:-1][alike])
