"""A folder of pictures, whose captions stand in metadata.jsonl or in one .txt beside each.

    cats/a.png                         cats/metadata.jsonl: {"file_name": "a.png", "text": "a cat", "score": 6.5}
    cats/b.jpg  cats/b.txt: a cat

A metadata.jsonl (the imagefolder convention of Hugging Face) speaks of files in its own folder and below; of two that
name one file, the nearer stands. Its numbers are fields. Records come in the order of their keys, which are the paths
within the folder. Hidden files and folders are left out.
"""

from __future__ import annotations

import operator
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.data.records import BadRecord, Fault, Record
from lcm_jax.data.sources import parsing
from lcm_jax.errors import LcmError

METADATA = "metadata.jsonl"
DEFAULT_CAPTION_KEY = "text"


def open(path: str | os.PathLike, *, caption_key: str | None = None) -> FolderSource:
    """The captioned pictures in a folder.

    Args:
      path: the folder; all folders in it are looked through.
      caption_key: column of metadata.jsonl, which holds a text or a list of texts; "txt": only .txt files count; None:
        "text", or the .txt of a picture that has none there.

    Raises:
      LcmError: no such folder, or none of its pictures is usable; it says what was found.
    """
    root = Path(path)
    if not root.is_dir():
        raise LcmError(f"{path} is no folder; name one as --config.data.path")
    sizes = dict(sorted(_files(root)))
    pictures = [name for name in sizes if _suffix(name) in parsing.IMAGE_SUFFIXES]
    if not pictures:
        known = " ".join(parsing.IMAGE_SUFFIXES)
        raise LcmError(f"no pictures ({known}) in {path}, {len(sizes)} other files; see --config.data.path")
    faults: list[Fault] = []
    rows = {} if caption_key == "txt" else _listed(root, sizes, set(pictures), faults)
    column = caption_key or DEFAULT_CAPTION_KEY
    keys, captions = [], []
    for name in pictures:
        try:
            captions.append(_caption(name, sizes, rows.get(name, {}), column, caption_key in (None, "txt")))
            keys.append(name)
        except BadRecord as error:
            faults.append(Fault(str(root), name, str(error)))
    if not keys:
        seen = sorted({key for row in rows.values() for key in row})
        raise LcmError(
            f"none of {len(pictures)} pictures in {path} is usable; the first: {faults[0]}. Captions are "
            f"taken from {_places(caption_key)}; columns of {METADATA}: {', '.join(seen) or 'none'}; "
            "see --config.data.caption_key"
        )
    numbers = [{name: x for name, x in parsing.numbers_of(rows.get(key, {})).items() if name != column} for key in keys]
    return FolderSource(root, keys, captions, parsing.columns(numbers), faults)


class FolderSource:
    """Random access to the pictures of a folder; they are read when they are asked for."""

    def __init__(
        self,
        root: Path,
        keys: Sequence[str],
        captions: Sequence[tuple[str, ...] | None],
        fields: Mapping[str, np.ndarray],
        faults: Sequence[Fault],
    ) -> None:
        """captions: of each key; None: in the .txt beside it. fields: name -> float64 [number of keys]."""
        self._root, self._keys, self._captions, self._fields = root, tuple(keys), tuple(captions), dict(fields)
        self.faults = tuple(faults)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> Record:
        key, captions = self._keys[self._checked(number)], self._captions[number]
        if captions is None:
            captions = parsing.captions_of(parsing.text_of(self._read(_text_beside(key))))
        values = ((name, float(column[number])) for name, column in self._fields.items())
        return Record(key, self._read(key), captions, {name: x for name, x in values if x == x})

    def field(self, name: str) -> np.ndarray | None:
        return self._fields.get(name)

    def where(self, number: int) -> tuple[str, str]:
        return str(self._root), self._keys[self._checked(number)]

    def _checked(self, number: int) -> int:
        if not 0 <= operator.index(number) < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return number

    def _read(self, name: str) -> bytes:
        return parsing.read_file(self._root / name)


def _files(folder: Path, inside: str = "") -> Iterator[tuple[str, int]]:
    """(path within the folder, bytes) of every file; -1 bytes for a link that leads nowhere."""
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


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def _text_beside(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"


def _places(caption_key: str | None) -> str:
    texts, column = "the .txt beside a picture", f"column {caption_key or DEFAULT_CAPTION_KEY!r} of {METADATA}"
    return {None: f"{column} or {texts}", "txt": texts}.get(caption_key, column)


def _caption(
    name: str, sizes: Mapping[str, int], row: Mapping[str, Any], column: str, text_counts: bool
) -> tuple[str, ...] | None:
    """The captions of a picture, None if they are to be read from its .txt. Raises BadRecord."""
    if sizes[name] <= 0:
        raise BadRecord("image of 0 bytes" if sizes[name] == 0 else "the link leads nowhere")
    if row.get(column) is not None:
        return parsing.captions_of(row[column])
    size = sizes.get(_text_beside(name)) if text_counts else None
    if not size or size < 0:
        raise BadRecord("no caption" if size is None else "no caption: its text is empty")
    return None


def _listed(root: Path, sizes: Mapping[str, int], pictures: set[str], faults: list[Fault]) -> dict[str, dict[str, Any]]:
    """Picture -> its row in a metadata.jsonl; lines that cannot be used are appended to `faults`."""
    rows: dict[str, dict[str, Any]] = {}
    lists = [name for name in sizes if posixpath.basename(name) == METADATA]
    for name in sorted(lists, key=lambda name: -name.count("/")):  # the nearest first; sorted() keeps the rest in order
        mine: set[str] = set()
        for line, content in enumerate((root / name).read_bytes().splitlines(), start=1):
            if not content.strip():
                continue
            try:
                picture, row = _row(content, posixpath.dirname(name), pictures)
                if picture in mine:
                    raise BadRecord(f"{picture} is listed already in this file")
            except BadRecord as error:
                faults.append(Fault(str(root / name), f"line {line}", str(error)))
                continue
            mine.add(picture)
            rows.setdefault(picture, row)
    return rows


def _row(content: bytes, folder: str, pictures: set[str]) -> tuple[str, dict[str, Any]]:
    """(picture, row) of one line of the metadata.jsonl in `folder`. Raises BadRecord."""
    row = parsing.json_object(content)
    file_name = row.pop("file_name", None)
    if not isinstance(file_name, str):
        raise BadRecord("no file_name")
    picture = posixpath.normpath(posixpath.join(folder, file_name))
    if picture not in pictures:
        raise BadRecord(f"no picture {file_name}")
    return picture, row
