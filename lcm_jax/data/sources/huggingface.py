"""Records of a Hugging Face data set: parquet files, a folder written by `save_to_disk`, or an id on the hub.

    FOLDER/data/train-00000-of-00002.parquet ...   splits by file or folder name, as the hub lays them out
    FOLDER/*.parquet, FILE.parquet, 'GLOB*.parquet'   without a split in their names: "train"
    FOLDER/dataset_dict.json or FOLDER/state.json  `save_to_disk`
    owner/name                                     the hub

An image column holds encoded bytes, alone or as {bytes, path}; a caption column a text or a list of texts; every number
column is a field. A record's key is its "key", "__key__" or (if no two are alike) "id", else "train-000000123".
Rows are read from the Arrow files that `datasets` maps into memory; parquet is converted once, into HF_HOME.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.data.records import BadRecord, Fault, Record
from lcm_jax.data.sources.parsing import captions_of, text_of
from lcm_jax.errors import LcmError

KEY_COLUMNS = ("key", "__key__", "id")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFace:
    """Random access to a map-style `datasets.Dataset`; see `open`."""

    def __init__(self, table: Any, *, root: Path | None, parts: tuple[tuple[str, int], ...], split: str,
                 image_key: str, caption_key: str):
        """`parts`: (file, rows) of the files that the rows of `table` stand in, in order; `root`: of image paths."""
        self.root, self.split = root, split
        self._image, self._caption = image_key, caption_key
        self._parts = [file for file, _ in parts]
        self._ends = np.cumsum([rows for _, rows in parts])
        self._key = _key_column(table)
        self._numbers = [column for column in table.column_names
                         if column not in (self._key, image_key, caption_key) and _is_number(table, column)]
        columns = [image_key, caption_key, *self._numbers, *([self._key] if self._key else [])]
        self._table = table.select_columns(list(dict.fromkeys(columns)))
        self._rows, repeated = _first_of_each(self._table, self._key)
        self.faults = [Fault(*self._place(row), f"its key is that of an earlier record (column {self._key!r})")
                       for row in repeated]

    def __len__(self) -> int:
        return len(self._table) if self._rows is None else len(self._rows)

    def __getitem__(self, number: int) -> Record:
        row = self._row(number)
        try:
            values = self._table[row]
        except UnicodeDecodeError as error:
            raise BadRecord(f"a text is not UTF-8 ({error})") from None
        numbers = {name: float(values[name]) for name in self._numbers if values[name] is not None}
        return Record(self._place(row)[1], self._picture(values[self._image]), _captions(values[self._caption]),
                      {name: value for name, value in numbers.items() if value == value})

    def field(self, name: str) -> np.ndarray | None:
        if name not in self._numbers:
            return None
        values = self._table.data.column(name).to_pandas().to_numpy(np.float64, na_value=np.nan)
        values = values if self._rows is None else values[self._rows]
        return None if np.isnan(values).all() else values

    def where(self, number: int) -> tuple[str, str]:
        return self._place(self._row(number))

    def _row(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return number if self._rows is None else int(self._rows[number])

    def _place(self, row: int) -> tuple[str, str]:
        file = self._parts[int(np.searchsorted(self._ends, row, side="right"))]
        key = None
        if self._key:
            key = _as_text(self._table.data.column(self._key)[row])
        return file, key or f"{self.split}-{row:09d}"

    def _picture(self, value: Any) -> bytes:
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
        if content is None and path:
            content = self._file(path)
        if not content:
            raise BadRecord(f"column {self._image!r} holds no image")
        return content

    def _file(self, path: str) -> bytes:
        place = Path(path) if self.root is None else self.root / path
        try:
            return place.read_bytes()
        except OSError as error:
            raise BadRecord(f"the image is not in the data set but at {place}, and {error.strerror}") from None


def open(path: str, *, split: str = "train", image_key: str | None = None,
         caption_key: str | None = None) -> HuggingFace:
    """The split of a data set as a source.

    Args:
      path: a folder, a parquet file, a glob pattern of parquet files, or an id on the hub.
      image_key: column of the images; None: "image".
      caption_key: column of the captions; None: "text".

    Raises:
      LcmError: no such path, split or column; a file that cannot be read; a hub id without network.
    """
    try:
        import datasets
    except ImportError:
        raise LcmError("the source 'huggingface' needs datasets: pip install 'lcm_jax[data]'") from None
    table, root, parts = _opened(datasets, str(path), split)
    image_key, caption_key = image_key or "image", caption_key or "text"
    for key, flag in ((image_key, "image_key"), (caption_key, "caption_key")):
        if key not in table.column_names:
            raise LcmError(f"{path} has no column {key!r}; name one of {', '.join(table.column_names)} by "
                           f"--config.data.{flag}")
    if isinstance(table.features[image_key], datasets.Image):
        table = table.cast_column(image_key, datasets.Image(decode=False))
    _check_types(datasets, path, table.features, image_key, caption_key)
    return HuggingFace(table, root=root, parts=parts, split=split, image_key=image_key, caption_key=caption_key)


def _opened(datasets: Any, path: str, split: str) -> tuple[Any, Path | None, tuple[tuple[str, int], ...]]:
    """(table, folder of image paths, (file, rows) of its parts)."""
    place = Path(path)
    try:
        if place.is_dir() and _is_saved(place):
            table = _saved(datasets, place, split)
            return table, place, ((path, len(table)),)
        if place.exists() or glob.has_magic(path):
            parts = _parquet(datasets, place, split)
            with_split = {split: [file for file, _ in parts]}
            root = place if place.is_dir() else Path(parts[0][0]).parent
            return datasets.load_dataset("parquet", data_files=with_split, split=split), root, parts
        if not _HUB_ID.fullmatch(path):
            raise LcmError(f"{path} does not exist and is no id on the hub (owner/name); correct --config.data.path")
        table = _from_hub(datasets, path, split)
        return table, None, ((f"{path} ({split})", len(table)),)
    except datasets.exceptions.DatasetsError as error:
        cause = error.__cause__ or error
        raise LcmError(f"{path} cannot be read as a data set ({_one_line(cause)}); copy or download it again") from None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(datasets: Any, folder: Path, split: str) -> Any:
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise LcmError(f"{folder} cannot be read ({_one_line(error)}); write it again by save_to_disk") from None
    if not isinstance(found, datasets.DatasetDict):
        found = {str(found.split or split): found}  # one that was made in memory has no split: it is any
    return _one_of(found, split, folder)


def _parquet(datasets: Any, place: Path, split: str) -> tuple[tuple[str, int], ...]:
    import pyarrow.parquet

    if place.is_dir():
        try:
            found = datasets.load_dataset_builder("parquet", data_dir=str(place)).config.data_files
        except FileNotFoundError:  # no files at all
            found = {}
        found = {str(name): [file for file in files if file.endswith(".parquet")] for name, files in found.items()}
        files = _one_of({name: files for name, files in found.items() if files}, split, place)
    else:
        files = _one_of({"train": sorted(glob.glob(str(place), recursive=True)) or [str(place)]}, split, place)
    try:
        return tuple((file, pyarrow.parquet.read_metadata(file).num_rows) for file in files)
    except (OSError, pyarrow.ArrowException) as error:
        raise LcmError(f"{place}: not all files are parquet ({_one_line(error)}); copy or download them again, or name "
                       "another --config.data.source") from None


def _one_of(splits: Mapping[str, Any], split: str, place: Path) -> Any:
    if not splits:
        raise LcmError(f"{place} has no parquet files; correct --config.data.path or --config.data.source")
    if split not in splits:
        raise LcmError(f"{place} has no split {split!r}; set --config.data.split to one of {', '.join(splits)}")
    return splits[split]


def _from_hub(datasets: Any, name: str, split: str) -> Any:
    try:
        return datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise LcmError(f"{name} is neither a folder here nor a data set on the hub ({_one_line(error)}); correct "
                       "--config.data.path") from None
    except OSError as error:
        raise LcmError(f"{name} is no folder here, and the hub cannot be reached ({_one_line(error)}); download it "
                       f"where there is network (hf download {name} --repo-type dataset --local-dir FOLDER) and set "
                       "--config.data.path=FOLDER") from None
    except ValueError as error:  # an unknown split; the message lists those that there are
        raise LcmError(f"{name}: {_one_line(error)} (--config.data.split, --config.data.path)") from None


def _check_types(datasets: Any, path: str, features: Mapping[str, Any], image_key: str, caption_key: str) -> None:
    image, caption = features[image_key], features[caption_key]
    encoded = isinstance(image, datasets.Image) or _kind(image) in ("binary", "large_binary")
    if not encoded and not (isinstance(image, Mapping) and "bytes" in image):
        raise LcmError(f"{path}: column {image_key!r} holds {_kind(image)}, not encoded images; name another by "
                       f"--config.data.image_key: {', '.join(features)}")
    inner = getattr(caption, "feature", caption)  # of a list
    if _kind(inner) not in ("string", "large_string", "binary", "large_binary", "null"):
        raise LcmError(f"{path}: column {caption_key!r} holds {_kind(inner)}, not text; name another by "
                       f"--config.data.caption_key: {', '.join(features)}")


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _is_number(table: Any, column: str) -> bool:
    import pyarrow

    kind = table.data.schema.field(column).type
    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)


def _key_column(table: Any) -> str | None:
    import pyarrow

    for name in KEY_COLUMNS:
        if name in table.column_names:
            kind, types = table.data.schema.field(name).type, pyarrow.types
            known = types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
            if known and (name != "id" or not len(_first_of_each(table, name)[1])):  # ids may be of classes or authors
                return name
    return None


def _first_of_each(table: Any, column: str | None) -> tuple[np.ndarray | None, np.ndarray]:
    """(rows whose key stands first, or None for all rows; the other rows). Rows without a key are all kept."""
    if column is None:
        return None, np.zeros(0, np.int64)
    chunks = table.data.column(column).dictionary_encode().chunks
    codes = np.concatenate([np.zeros(0), *(chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks)])
    codes = np.where(np.isnan(codes), -1 - np.arange(len(codes)), codes)
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    return None if first.all() else np.flatnonzero(first), np.flatnonzero(~first)


def _as_text(scalar: Any) -> str | None:
    """A key as text; bytes that are no UTF-8 are shown escaped."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        value = scalar.as_buffer().to_pybytes().decode(errors="backslashreplace")
    return None if value is None else str(value)


def _captions(value: Any) -> tuple[str, ...]:
    texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
    return captions_of([text_of(text) if isinstance(text, bytes) else text for text in texts])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
