"""A folder of images with their captions in lists of images, or in a file beside each.

    cats/a.png                                            cats/metadata.jsonl: {"file_name": "a.png", "text": "a cat"}
    cats/b.jpg  cats/b.txt: a cat                         (or b.caption, b.text)
    cats/c.jpg  cats/c.json: {"caption": "a cat", "width": 640}         as the files of img2dataset

A metadata.jsonl or metadata.csv (the imagefolder convention of Hugging Face) lists files in its own folder and below;
if two list one file, the nearer one counts. Its numbers, and those of a .json beside an image, are fields. Records come
in the order of their keys, which are the paths within the folder. Linked folders are followed; hidden files, and those
of unknown kinds, are left out and counted in `notes`.
"""

from __future__ import annotations

import csv
import operator
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.data import images
from lcm_jax.data.records import BadRecord, BadRecordError, Record, digest_of
from lcm_jax.data.sources import parsing, tree
from lcm_jax.errors import BadArgument, printable

LISTS = ("metadata.jsonl", "metadata.csv")
NOT_READ = "metadata.parquet"  # imagefolder allows it, too
DEFAULT_CAPTION_KEY, KEY_BESIDE = "text", "caption"  # in a list; in a .json beside an image


class FolderSource:
    """Random access to the images of a folder, read from their files each time."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        captions: Sequence[tuple[str, ...] | str],
        fields: Mapping[str, np.ndarray],
        bad_records: Sequence[BadRecord],
        sizes: Mapping[str, int],
        notes: Sequence[str] = (),
    ) -> None:
        """names: of the images. captions: of each, or the file with them. fields: name -> float64 [number of names].

        sizes: file of an image or of captions -> bytes.
        """
        texts = (text if isinstance(text, str) else "" for text in captions)
        self._sizes = np.array([(sizes[name], sizes.get(text, 0)) for name, text in zip(names, texts, strict=True)])
        self._root, self._names, self._captions, self._fields = root, tuple(names), tuple(captions), dict(fields)
        self.bad_records, self.notes = tuple(bad_records), tuple(notes)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Record:
        name, captions = self._names[self._checked(number)], self._captions[number]
        if isinstance(captions, str):
            captions = parsing.captions_of(parsing.read_file(self._root / captions, parsing.MAX_TEXT))
        fields = parsing.row_of(self._fields, number)
        return Record(parsing.readable(name), parsing.read_file(self._root / name), captions, fields)

    def field(self, name: str) -> np.ndarray | None:
        return self._fields.get(name)

    def where(self, number: int) -> tuple[str, str]:
        return str(self._root), parsing.readable(self._names[self._checked(number)])

    def digest(self) -> str:
        captions = (texts if isinstance(texts, str) else "\0".join(texts) for texts in self._captions)
        return digest_of("\0".join(self._names), "\0\0".join(captions), self._sizes)

    def _checked(self, number: int) -> int:
        if not 0 <= operator.index(number) < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return number


def open(path: str | os.PathLike, *, caption_key: str | None = None) -> FolderSource:
    """The captioned images in a folder and in all folders below it.

    Args:
      path: the folder.
      caption_key: column of the lists, or field of the .json beside an image, which holds a text or a list of texts; or
        the suffix of the texts beside the images ("txt": nothing else is read). None: "text" of a list, or the .txt,
        .caption or .text of an image that has no text there, or "caption" of a list or .json.

    Raises:
      BadArgument: not a folder, or none of its images is usable; it says what was found.
    """
    root = Path(path)
    if not root.is_dir():
        raise BadArgument("path", path, "not a folder")
    sizes, notes = tree.walk(root)
    found = [name for name in sizes if tree.is_image(name)]
    beside, used = _beside(sizes, found), set(found)
    lists = [name for name in sizes if posixpath.basename(name) in LISTS]
    used |= {*lists, *(name for of_image in beside.values() for name in of_image.values())}
    not_read = [name for name in sizes if posixpath.basename(name) == NOT_READ]
    notes += [f"{printable(name)} (write it as metadata.jsonl)" for name in not_read]
    notes += tree.unknown(sizes.keys() - used - set(not_read))
    more = f"; not used: {', '.join(notes)}" if notes else ""
    if not found:
        known, others = " ".join(images.SUFFIXES), len(sizes)
        raise BadArgument("path", path, f"the folder holds no images ({known}), but {others} other files{more}")
    bad: list[BadRecord] = []
    rows = {} if caption_key == "txt" else _listed(root, lists, sizes, set(found), caption_key, bad)
    names, captions, numbers, columns = [], [], [], {key for row in rows.values() for key in row}
    for name in found:
        try:
            if sizes[name] <= 0:
                raise BadRecordError(_problem(root / name, sizes[name]))
            texts, row = beside.get(name, {}), rows.get(name, {})
            if "json" in texts and caption_key != "txt":
                row = parsing.json_object(parsing.read_file(root / texts["json"], parsing.MAX_TEXT)) | row
                columns |= row.keys()
            column, caption = _caption(sizes, texts, row, caption_key)
        except BadRecordError as error:
            bad.append(BadRecord(str(root), parsing.readable(name), str(error)))
            continue
        names.append(name)
        captions.append(caption)
        numbers.append({key: x for key, x in parsing.numbers_of(row).items() if key != column})
    if not names:
        texts = "the .txt, .caption or .text beside an image"
        listed = f"column {caption_key or DEFAULT_CAPTION_KEY!r} of {' or '.join(LISTS)}"
        places = {None: f"{listed}, or {texts}", "txt": "the .txt beside an image"}.get(caption_key, listed)
        raise BadArgument(
            "caption_key",
            caption_key,
            f"none of {len(found)} images in {path} is usable; the first: {bad[0]}. Captions are taken from {places}; "
            f"columns found: {', '.join(sorted(columns)) or 'none'}{more}",
        )
    notes += parsing.rare(parsing.counted(numbers))
    return FolderSource(root, names, captions, parsing.columns(numbers), bad, sizes, notes)


def _beside(sizes: Mapping[str, int], found: Sequence[str]) -> dict[str, dict[str, str]]:
    """Image -> {suffix: file} of the files of its name that may describe it, whose suffix may be in capitals."""
    by_stem: dict[str, dict[str, str]] = {}
    for name in sizes:  # sorted: of two that differ in capitals the one without them counts
        if tree.suffix_of(name) in tree.BESIDE:
            by_stem.setdefault(posixpath.splitext(name)[0], {})[tree.suffix_of(name)] = name
    stems = {name: posixpath.splitext(name)[0] for name in found}
    return {name: by_stem[stem] for name, stem in stems.items() if stem in by_stem}


def _problem(path: Path, size: int) -> str:
    """Why there is no image to read in a file of so many bytes; see `tree.walk`."""
    if size == 0:
        return "image of 0 bytes"
    return "not a regular file" if path.exists() else "the link is broken"


def _caption(
    sizes: Mapping[str, int], texts: Mapping[str, str], row: Mapping[str, Any], caption_key: str | None
) -> tuple[str | None, tuple[str, ...] | str]:
    """(the column that holds them, the captions of an image) or (None, the file that does). Raises BadRecordError.

    texts: suffix -> file of those beside the image. row: what lists and the .json beside it say.
    """
    column = caption_key or DEFAULT_CAPTION_KEY
    if caption_key != "txt" and row.get(column) is not None:
        return column, parsing.captions_of(row[column])
    for suffix in parsing.TEXT_SUFFIXES if caption_key is None else (caption_key.lower().lstrip("."),):
        if suffix in texts and suffix != "json":
            if sizes[texts[suffix]] <= 0:
                raise BadRecordError("no caption: its text is empty")
            return None, texts[suffix]
    if caption_key is None and row.get(KEY_BESIDE) is not None:
        return KEY_BESIDE, parsing.captions_of(row[KEY_BESIDE])
    raise BadRecordError("no caption")


def _listed(
    root: Path,
    lists: Sequence[str],
    sizes: Mapping[str, int],
    found: set[str],
    caption_key: str | None,
    bad: list[BadRecord],
) -> dict[str, dict[str, Any]]:
    """Image -> its row in a list; lines that cannot be used are appended to `bad`."""
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(lists, key=lambda name: -name.count("/")):  # the nearest first; sorted() keeps the rest in order
        if sizes[name] < 0:
            bad.append(BadRecord(str(root), name, _problem(root / name, -1)))
            continue
        mine: set[str] = set()
        texts = ("file_name", caption_key, DEFAULT_CAPTION_KEY, KEY_BESIDE)
        for line, row in _csv_rows(root / name, texts) if name.endswith(".csv") else _json_rows(root / name):
            try:
                image = _image_of(row, posixpath.dirname(name), found)
                if image in mine:
                    raise BadRecordError(f"{image} is listed already in this file")
            except BadRecordError as error:
                bad.append(BadRecord(str(root / name), f"line {line}", str(error)))
                continue
            mine.add(image)
            rows.setdefault(image, row)
    return rows


def _image_of(row: dict[str, Any] | BadRecordError, folder: str, found: set[str]) -> str:
    """The image that a row of a list in `folder` is of; its file_name is taken out. Raises BadRecordError."""
    if isinstance(row, BadRecordError):
        raise row
    file_name = row.pop("file_name", None)
    if not isinstance(file_name, str):
        raise BadRecordError("no file_name")
    image = posixpath.normpath(posixpath.join(folder, file_name))
    if image not in found:
        raise BadRecordError(f"no image {file_name[:200]}")
    return image


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecordError]]:
    """(number, object or what is wrong) of each line that is not empty."""
    for number, line in _lines(path):
        try:
            if isinstance(line, BadRecordError):
                raise line
            if line.strip():
                yield number, parsing.json_object(line)
        except BadRecordError as error:
            yield number, error


def _csv_rows(path: Path, texts: Sequence[str | None]) -> Iterator[tuple[int, dict[str, Any] | BadRecordError]]:
    """(number, cells by their columns or what is wrong) of each row; numbers become floats, but in columns `texts`."""
    wrong: list[tuple[int, BadRecordError]] = []

    def lines() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, BadRecordError):
                wrong.append((number, line))
            else:  # bytes that are not UTF-8 are found where the text is used
                yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")

    reader, header = csv.reader(lines(), strict=True), None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            wrong.append((reader.line_num, BadRecordError(f"not valid CSV ({error})")))
            continue
        yield from wrong
        wrong.clear()
        if cells is None:
            return
        if header is None:
            header = [cell.strip() for cell in cells]
            if "file_name" not in header:
                yield 1, BadRecordError(f"no column file_name, but {', '.join(header)[:200]}; separate them by commas")
                return
        elif len(cells) > len(header):
            yield reader.line_num, BadRecordError(f"{len(cells)} cells under {len(header)} columns; quote its texts")
        elif cells:
            named = zip(header, cells, strict=False)
            yield reader.line_num, {name: cell if name in texts else _value(cell) for name, cell in named}


def _value(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _lines(path: Path) -> Iterator[tuple[int, bytes | BadRecordError]]:
    """(number, content or what is wrong) of the lines of a file; no line takes more than MAX_TEXT bytes of memory."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(parsing.MAX_TEXT + 1):
            number += 1
            if number == 1 and line.startswith(parsing.UTF16):
                yield number, BadRecordError("the file is UTF-16; save it as UTF-8")
                return
            if len(line) <= parsing.MAX_TEXT:
                yield number, line
                continue
            yield number, BadRecordError(f"a line of more than {parsing.MAX_TEXT} bytes")
            while line and not line.endswith(b"\n"):
                line = stream.readline(parsing.MAX_TEXT)
