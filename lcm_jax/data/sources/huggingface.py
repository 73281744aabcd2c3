"""Records of a Hugging Face data set: parquet files, a folder written by `save_to_disk`, or an id on the hub.

    FOLDER/data/train-00000-of-00002.parquet ...   splits by file or folder name, as the hub lays them out
    FOLDER/*.parquet, FILE.parquet, 'GLOB*.parquet'   without a split in their names: "train"
    FOLDER/dataset_dict.json or FOLDER/state.json  `save_to_disk`
    owner/name                                     the hub

An image column holds encoded bytes, alone or as {bytes, path}; a caption column a text or a list of texts; every number
column is a field. A record's key is its "key", "__key__" or (if no two are alike) "id", else "train-000000123".
Rows are read from the Arrow files that `datasets` maps into memory; parquet is converted once, into HF_HOME. They are
taken as Arrow has them: decoding a row, `datasets` would open whatever file or address the row names.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax import files
from lcm_jax.data.records import BadRecord, Fault, Record
from lcm_jax.data.sources.parsing import captions_of, read_file, text_of
from lcm_jax.errors import LcmError

KEY_COLUMNS = ("key", "__key__", "id")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFace:
    """Random access to a map-style `datasets.Dataset`; see `open`."""

    def __init__(
        self,
        table: Any,
        *,
        roots: tuple[Path, ...],
        parts: tuple[tuple[str, int], ...],
        split: str,
        image_key: str,
        caption_key: str,
    ):
        """`parts`: (file, rows) of the files that the rows of `table` stand in, in order; `roots`: of image paths."""
        self.roots, self.split = roots, split
        self._image, self._caption = image_key, caption_key
        self._parts = [file for file, _ in parts]
        self._ends = np.cumsum([rows for _, rows in parts])
        self._key = _key_column(table)
        self._numbers = [
            column
            for column in table.column_names
            if column not in (self._key, image_key, caption_key) and _is_number(table, column)
        ]
        columns = [image_key, caption_key, *self._numbers, *([self._key] if self._key else [])]
        self._table = table.select_columns(list(dict.fromkeys(columns))).with_format("arrow")
        self._rows, repeated = _first_of_each(self._table, self._key)
        self.faults = [
            Fault(*self._place(row), f"its key is that of an earlier record (column {self._key!r})") for row in repeated
        ]

    def __len__(self) -> int:
        return len(self._table) if self._rows is None else len(self._rows)

    def __getitem__(self, number: int) -> Record:
        row = self._row(number)
        try:
            found = self._table[row]
            found.flatten().validate(full=True)  # an Arrow file says itself where in it a value begins and ends
            (values,) = found.to_pylist()
        except ValueError as error:
            raise BadRecord(f"a text is not UTF-8, or the row is damaged ({_one_line(error)})") from None
        numbers = {name: float(values[name]) for name in self._numbers if values[name] is not None}
        return Record(
            self._place(row)[1],
            self._picture(values[self._image]),
            _captions(values[self._caption]),
            {name: value for name, value in numbers.items() if value == value},
        )

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

    def _file(self, name: Any) -> bytes:
        root, *downloads = self.roots
        for folder in downloads:
            if isinstance(name, str) and name.startswith(f"{folder}/"):
                root, name = folder, name.removeprefix(f"{folder}/")
        try:
            return read_file(files.inside(root, name))
        except LcmError as error:
            raise BadRecord(f"no image in the row, nor where it says: {error}") from None


def open(
    path: str, *, split: str = "train", image_key: str | None = None, caption_key: str | None = None
) -> HuggingFace:
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
    table, roots, parts = _opened(datasets, str(path), split)
    image_key, caption_key = image_key or "image", caption_key or "text"
    for key, flag in ((image_key, "image_key"), (caption_key, "caption_key")):
        if key not in table.column_names:
            raise LcmError(
                f"{path} has no column {key!r}; name one of {', '.join(table.column_names)} by --config.data.{flag}"
            )
    if isinstance(table.features[image_key], datasets.Image):
        table = table.cast_column(image_key, datasets.Image(decode=False))
    _check_types(datasets, path, table.features, image_key, caption_key)
    return HuggingFace(table, roots=roots, parts=parts, split=split, image_key=image_key, caption_key=caption_key)


def _opened(datasets: Any, path: str, split: str) -> tuple[Any, tuple[Path, ...], tuple[tuple[str, int], ...]]:
    """(table, folders of image paths, (file, rows) of its parts).

    Paths are within the first folder. For files of the hub `datasets` writes the whole path of where it has put them,
    which are the other folders.
    """
    place = Path(path)
    try:
        if place.is_dir() and _is_saved(place):
            table = _saved(datasets, place, split)
            return table, (place,), ((path, len(table)),)
        if place.exists() or glob.has_magic(path):
            parts = _parquet(datasets, place, split)
            with_split = {split: [file for file, _ in parts]}
            root = place if place.is_dir() else Path(parts[0][0]).parent
            return datasets.load_dataset("parquet", data_files=with_split, split=split), (root,), parts
        if not _HUB_ID.fullmatch(path):
            raise LcmError(f"{path} does not exist and is no id on the hub (owner/name); correct --config.data.path")
        table = _from_hub(datasets, path, split)
        return table, _hub_folders(datasets, path), ((f"{path} ({split})", len(table)),)
    except datasets.exceptions.DatasetsError as error:
        cause = error.__cause__ or error
        raise LcmError(f"{path} cannot be read as a data set ({_one_line(cause)}); copy or download it again") from None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(datasets: Any, folder: Path, split: str) -> Any:
    try:
        for name in _named_files(folder):
            if Path(name).name != name:
                raise LcmError(f"it names {ascii(name)[:200]}, which is not in it")
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LcmError(f"{folder} cannot be read ({_one_line(error)}); write it again by save_to_disk") from None
    if not isinstance(found, datasets.DatasetDict):
        found = {str(found.split or split): found}  # one that was made in memory has no split: it is any
    table = _one_of(found, split, folder)
    _check_arrow(folder, table)
    return table


def _named_files(folder: Path) -> Iterator[str]:
    """Names in the JSON files of a folder of `save_to_disk`: splits, which are folders in it, and files in those."""
    places = [folder] if (folder / "state.json").is_file() else []
    if (folder / "dataset_dict.json").is_file():
        splits = files.read_json(folder / "dataset_dict.json")["splits"]
        yield from splits
        places += [folder / split for split in splits]
    for place in places:
        yield from (part["filename"] for part in files.read_json(place / "state.json")["_data_files"])


def _check_arrow(folder: Path, table: Any) -> None:
    """Raises LcmError where columns have not the bytes that they should, or keys lie outside of theirs.

    What a row's texts and image are is checked when it is read.
    """
    import pyarrow

    try:
        table.data.validate()
        for name in set(KEY_COLUMNS) & set(table.column_names):
            keys = table.data.column(name)
            as_bytes = {"string": pyarrow.binary(), "large_string": pyarrow.large_binary()}  # they need not be UTF-8
            keys.cast(as_bytes.get(str(keys.type), keys.type)).validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise LcmError(f"{folder} is damaged ({_one_line(error)}); copy it again") from None


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
    if odd := [file for file in files if Path(file).exists() and not Path(file).is_file()]:  # to open a pipe is to wait
        raise LcmError(f"{odd[0]} is no regular file; remove it, or name another --config.data.path")
    try:
        return tuple((file, pyarrow.parquet.read_metadata(file).num_rows) for file in files)
    except (OSError, pyarrow.ArrowException) as error:
        raise LcmError(
            f"{place}: not all files are parquet ({_one_line(error)}); copy or download them again, or name "
            "another --config.data.source"
        ) from None


def _hub_folders(datasets: Any, name: str) -> tuple[Path, Path, Path]:
    """Where files of a data set on the hub lie: its own folder in the cache (twice), and what was unpacked of it."""
    import huggingface_hub

    own = Path(huggingface_hub.constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return own, own, Path(datasets.config.EXTRACTED_DATASETS_PATH)


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
        raise LcmError(
            f"{name} is neither a folder here nor a data set on the hub ({_one_line(error)}); correct "
            "--config.data.path"
        ) from None
    except OSError as error:
        raise LcmError(
            f"{name} is no folder here, and the hub cannot be reached ({_one_line(error)}); download it "
            f"where there is network (hf download {name} --repo-type dataset --local-dir FOLDER) and set "
            "--config.data.path=FOLDER"
        ) from None
    except ValueError as error:  # an unknown split; the message lists those that there are
        raise LcmError(f"{name}: {_one_line(error)} (--config.data.split, --config.data.path)") from None


def _check_types(datasets: Any, path: str, features: Mapping[str, Any], image_key: str, caption_key: str) -> None:
    image, caption = features[image_key], features[caption_key]
    content = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(image, datasets.Image) and _kind(content) not in ("binary", "large_binary", "null"):
        raise LcmError(
            f"{path}: column {image_key!r} holds {_kind(image)}, not encoded images; name another by "
            f"--config.data.image_key: {', '.join(features)}"
        )
    inner = getattr(caption, "feature", caption)  # of a list
    if _kind(inner) not in ("string", "large_string", "binary", "large_binary", "null"):
        raise LcmError(
            f"{path}: column {caption_key!r} holds {_kind(inner)}, not text; name another by "
            f"--config.data.caption_key: {', '.join(features)}"
        )


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
