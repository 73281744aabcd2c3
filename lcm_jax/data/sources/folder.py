"""A folder of images with their captions in metadata.jsonl, or in one .txt beside each.

    cats/a.png                         cats/metadata.jsonl: {"file_name": "a.png", "text": "a cat", "score": 6.5}
    cats/b.jpg  cats/b.txt: a cat

A metadata.jsonl (the imagefolder convention of Hugging Face) lists files in its own folder and below; if two list one
file, the nearer one counts. Its numbers are fields. Records come in the order of their keys, which are the paths within
the folder. Hidden files and folders are left out.
"""

from __future__ import annotations

import operator
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.data.records import BadRecord, BadRecordError, Record, digest_of
from lcm_jax.data.sources import parsing
from lcm_jax.errors import BadArgument

METADATA = "metadata.jsonl"
DEFAULT_CAPTION_KEY = "text"


class FolderSource:
    """Random access to the images of a folder, read from their files each time."""

    def __init__(
        self,
        root: Path,
        keys: Sequence[str],
        captions: Sequence[tuple[str, ...] | None],
        fields: Mapping[str, np.ndarray],
        bad_records: Sequence[BadRecord],
        sizes: Mapping[str, int],
    ) -> None:
        """captions: of each key; None: in the .txt beside it. fields: name -> float64 [number of keys].

        sizes: file of an image or caption -> bytes.
        """
        self._sizes = np.array([(sizes[key], sizes.get(_text_beside(key), 0)) for key in keys], np.int64)
        self._root, self._keys, self._captions, self._fields = root, tuple(keys), tuple(captions), dict(fields)
        self.bad_records = tuple(bad_records)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> Record:
        key, captions = self._keys[self._checked(number)], self._captions[number]
        if captions is None:
            captions = parsing.captions_of(parsing.read_file(self._root / _text_beside(key)))
        fields = parsing.row_of(self._fields, number)
        return Record(key, parsing.read_file(self._root / key), captions, fields)

    def field(self, name: str) -> np.ndarray | None:
        return self._fields.get(name)

    def where(self, number: int) -> tuple[str, str]:
        return str(self._root), self._keys[self._checked(number)]

    def digest(self) -> str:
        captions = ("\0".join(texts or ()) for texts in self._captions)
        return digest_of("\0".join(self._keys), "\0\0".join(captions), self._sizes)

    def _checked(self, number: int) -> int:
        if not 0 <= operator.index(number) < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return number


def open(path: str | os.PathLike, *, caption_key: str | None = None) -> FolderSource:
    """The captioned images in a folder and in all folders below it.

    Args:
      path: the folder.
      caption_key: column of metadata.jsonl, which holds a text or a list of texts; "txt": only .txt files count; None:
        "text", or the .txt of an image that has no text there.

    Raises:
      BadArgument: not a folder, or none of its images is usable; it says what was found.
    """
    root = Path(path)
    if not root.is_dir():
        raise BadArgument("path", path, "not a folder")
    sizes = dict(sorted(_files(root)))
    images = [name for name in sizes if posixpath.splitext(name)[1][1:].lower() in parsing.IMAGE_SUFFIXES]
    if not images:
        known = " ".join(parsing.IMAGE_SUFFIXES)
        raise BadArgument("path", path, f"the folder holds no images ({known}), but {len(sizes)} other files")
    bad: list[BadRecord] = []
    rows = {} if caption_key == "txt" else _listed(root, sizes, set(images), bad)
    column = caption_key or DEFAULT_CAPTION_KEY
    keys, captions = [], []
    for name in images:
        try:
            captions.append(_caption(name, sizes, rows.get(name, {}), column, caption_key in (None, "txt")))
            keys.append(name)
        except BadRecordError as error:
            bad.append(BadRecord(str(root), name, str(error)))
    if not keys:
        beside, listed = "the .txt beside an image", f"column {column!r} of {METADATA}"
        places = {None: f"{listed} or {beside}", "txt": beside}.get(caption_key, listed)
        seen = ", ".join(sorted({key for row in rows.values() for key in row})) or "none"
        raise BadArgument(
            "caption_key",
            caption_key,
            f"none of {len(images)} images in {path} is usable; the first: {bad[0]}. Captions are taken from {places}; "
            f"columns of {METADATA}: {seen}",
        )
    numbers = [{name: x for name, x in parsing.numbers_of(rows.get(key, {})).items() if name != column} for key in keys]
    return FolderSource(root, keys, captions, parsing.columns(numbers), bad, sizes)


def _files(folder: Path, inside: str = "") -> Iterator[tuple[str, int]]:
    """(path within the folder, bytes) of every file; -1 bytes for a broken link."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = inside + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), name + "/")
            elif entry.is_file():
                yield name, entry.stat().st_size
            elif entry.is_symlink() and not os.path.exists(entry.path):
                yield name, -1


def _text_beside(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"


def _caption(
    name: str, sizes: Mapping[str, int], row: Mapping[str, Any], column: str, text_counts: bool
) -> tuple[str, ...] | None:
    """The captions of an image, None if they are to be read from its .txt. Raises BadRecordError."""
    if sizes[name] <= 0:
        raise BadRecordError("image of 0 bytes" if sizes[name] == 0 else "the link is broken")
    if row.get(column) is not None:
        return parsing.captions_of(row[column])
    size = sizes.get(_text_beside(name)) if text_counts else None
    if not size or size < 0:
        raise BadRecordError("no caption" if size is None else "no caption: its text is empty")
    return None


def _listed(root: Path, sizes: Mapping[str, int], images: set[str], bad: list[BadRecord]) -> dict[str, dict[str, Any]]:
    """Image -> its row in a metadata.jsonl; lines that cannot be used are appended to `bad`."""
    rows: dict[str, dict[str, Any]] = {}
    lists = [name for name in sizes if posixpath.basename(name) == METADATA]
    for name in sorted(lists, key=lambda name: -name.count("/")):  # the nearest first; sorted() keeps the rest in order
        mine: set[str] = set()
        for line, content in enumerate((root / name).read_bytes().splitlines(), start=1):
            if not content.strip():
                continue
            try:
                image, row = _row(content, posixpath.dirname(name), images)
                if image in mine:
                    raise BadRecordError(f"{image} is listed already in this file")
            except BadRecordError as error:
                bad.append(BadRecord(str(root / name), f"line {line}", str(error)))
                continue
            mine.add(image)
            rows.setdefault(image, row)
    return rows


def _row(content: bytes, folder: str, images: set[str]) -> tuple[str, dict[str, Any]]:
    """(image, row) of one line of the metadata.jsonl in `folder`. Raises BadRecordError."""
    row = parsing.json_object(content)
    file_name = row.pop("file_name", None)
    if not isinstance(file_name, str):
        raise BadRecordError("no file_name")
    image = posixpath.normpath(posixpath.join(folder, file_name))
    if image not in images:
        raise BadRecordError(f"no image {file_name}")
    return image, row
