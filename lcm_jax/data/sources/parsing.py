"""Captions and numbers from the texts and JSON objects beside the images, which nobody has checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax import files, foreign
from lcm_jax.data.records import BadRecordError
from lcm_jax.errors import LcmError

# Files taken for images. Each is the usual suffix of a format that Pillow reads.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MAX_BYTES = 2**30  # of an image or a caption: more than the largest image that is decoded has, uncompressed


def read_file(path: Path) -> bytes:
    """The content of a file that holds an image or a caption.

    Raises:
      BadRecordError: it cannot be read, is not a regular file, or has more than MAX_BYTES.
    """
    try:
        return files.read_regular(path, MAX_BYTES)
    except OSError as error:
        raise BadRecordError(f"{path} cannot be read ({error.strerror})") from None
    except LcmError as error:
        raise BadRecordError(str(error)) from None


def text_of(content: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises BadRecordError."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"the caption is not UTF-8 (byte {error.start})") from None


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a text or a list of texts, bytes among them, without white space around and without empty ones.

    Raises:
      BadRecordError: none is left, bytes are not UTF-8, or `value` is something else.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text_of(text) if isinstance(text, bytes) else text for text in texts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecordError(f"the caption is {json.dumps(value, default=str)[:60]}, not text")
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise BadRecordError("no caption: its text is empty")
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


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """n rows of numbers -> name: float64 [n], NaN where a row lacks it; names are sorted."""
    found = {name: np.full(len(rows), np.nan) for name in sorted({name for row in rows for name in row})}
    for number, row in enumerate(rows):
        for name, value in row.items():
            found[name][number] = value
    return {name: column for name, column in found.items() if not np.isnan(column).all()}


def row_of(columns: Mapping[str, np.ndarray], number: int) -> dict[str, float]:
    """The numbers of one row of `columns`, without those that it lacks."""
    values = {name: float(column[number]) for name, column in columns.items()}
    return {name: value for name, value in values.items() if value == value}  # NaN is not equal to itself
