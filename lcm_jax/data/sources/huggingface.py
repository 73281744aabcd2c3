"""Records of a Hugging Face data set: parquet files, a folder written by `save_to_disk`, or an id on the hub.

    FOLDER/data/train-00000-of-00002.parquet ...   splits by file or folder name, as the hub lays them out
    FOLDER/*.parquet, FILE.parquet, 'GLOB*.parquet'   without a split in their names: "train"
    FOLDER/dataset_dict.json or FOLDER/state.json  `save_to_disk`
    owner/name                                     the hub

An image column holds encoded bytes, alone or as {bytes, path}; a caption column a text or a list of texts; every number
column is a field. A record's key is its "key", "__key__" or (if no two are alike) "id", else "train-000000123". A row
with key and image of an earlier one is not used; other images of a key are, by their numbers, as two downloads of
img2dataset have them. Rows of img2dataset that hold no image, as their status says, are left out.
Rows are read from the Arrow files that `datasets` maps into memory; parquet is converted once, into HF_HOME. They are
read as Arrow, since `datasets` would open whatever file or address a row names when it decodes that row.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lcm_jax import files, foreign
from lcm_jax.data import images
from lcm_jax.data.records import BadRecord, BadRecordError, Record, digest_of
from lcm_jax.data.sources import tree
from lcm_jax.data.sources.parsing import captions_of, matching, read_file, repeated
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.foreign import one_line

KEY_COLUMNS = ("key", "__key__", "id")
IMAGE_COLUMNS = ("image", *images.SUFFIXES)  # the first that there is; img2dataset and webdataset: "jpg"
CAPTION_COLUMNS = ("text", "caption", "txt")
LINKS = "lcm_jax_links"  # in the cache of `datasets`, see `_plain`
_PLAIN = re.compile(r"[\w./ ,=+@%#-]+")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFace:
    """Random access to a map-style `datasets.Dataset`; see `open`."""

    def __init__(
        self,
        table: Any,
        *,
        roots: tuple[Path | None, ...],
        parts: tuple[tuple[str, int], ...],
        split: str,
        image_key: str,
        caption_key: str,
    ):
        """`parts`: (file, rows) of the files that hold the rows of `table`, in order; `roots`: see `_opened`."""
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
        self._unnamed = np.zeros(0, bool)  # [rows] whose key is another row's
        failed = _failed(table, image_key)
        self.notes = [f"{failed.sum()} x row without an image, as its status says"] if failed.any() else []
        again = self._repeated(failed)
        self._rows = np.flatnonzero(~(failed | again)) if (failed | again).any() else None
        reason = f"key (column {self._key!r}) and image are those of an earlier record"
        self.bad_records = [BadRecord(*self._file_and_key(row), reason) for row in np.flatnonzero(again)]

    def __len__(self) -> int:
        return len(self._table) if self._rows is None else len(self._rows)

    def __getitem__(self, number: int) -> Record:
        row = self._row(number)
        values = self._values(row)
        numbers = {name: float(values[name]) for name in self._numbers if values[name] is not None}
        texts = values[self._caption] if isinstance(values[self._caption], list) else [values[self._caption]]
        return Record(
            self._file_and_key(row)[1],
            self._content(row, values[self._image]),
            captions_of([text for text in texts if text is not None]),
            {name: value for name, value in numbers.items() if value == value},  # without NaN
        )

    def _values(self, row: int) -> dict[str, Any]:
        try:
            found = self._table[row]
            found.flatten().validate(full=True)  # an Arrow file itself says where each value begins and ends
            return found.to_pylist()[0]
        except ValueError as error:
            raise BadRecordError(f"a text is not UTF-8, or the row is damaged ({one_line(error)})") from None

    def field(self, name: str) -> np.ndarray | None:
        if name not in self._numbers:
            return None
        values = self._table.data.column(name).to_pandas().to_numpy(np.float64, na_value=np.nan)
        values = values if self._rows is None else values[self._rows]
        return None if np.isnan(values).all() else values

    def where(self, number: int) -> tuple[str, str]:
        return self._file_and_key(self._row(number))

    def digest(self) -> str:
        rows = np.arange(len(self)) if self._rows is None else self._rows
        chunks = self._table.data.column(self._key).chunks if self._key else ()
        keys = b"\0".join(b"\0".join(_as_bytes(chunk)) for chunk in chunks if len(chunk))
        sizes = (size for name in (self._image, self._caption) for size in _sizes(self._table.data.column(name)))
        paths = list(map(self._below, _paths(self._table, self._image)))
        return digest_of(self.split, rows, keys, *sizes, *([b"\0".join(paths)] if paths else ()))

    def _below(self, path: bytes) -> bytes:
        """The path of an image, of a download without the folder that it is in on this machine."""
        for folder in self.roots[1:]:
            if path.startswith(prefix := os.fsencode(f"{folder}/")):
                return path.removeprefix(prefix).partition(b"/")[2]  # what is unpacked has a hash of its whole path
        return path

    def _row(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return number if self._rows is None else int(self._rows[number])

    def _file_and_key(self, row: int) -> tuple[str, str]:
        file, key = self._parts[int(np.searchsorted(self._ends, row, side="right"))], None
        if self._key and not (len(self._unnamed) and self._unnamed[row]):
            key = _as_text(self._table.data.column(self._key)[row])
        return file, key or f"{self.split}-{row:09d}"

    def _repeated(self, failed: np.ndarray) -> np.ndarray:
        """bool [rows]: those with key and image of an earlier one; the others of a key lose it (`_unnamed`)."""
        again = np.zeros(len(self._table), bool)
        if self._key is None:
            return again
        codes, sizes = _codes(self._table, self._key), _image_sizes(self._table, self._image)
        codes[failed] = -1 - np.flatnonzero(failed)
        unnamed = np.ones(len(codes), bool)
        unnamed[np.unique(codes, return_index=True)[1]] = False
        earlier: dict[tuple[int, int], list[int]] = {}  # of a key, size -> rows of different images
        for row in tqdm(repeated(codes, sizes).tolist(), "repeated keys", unit=" rows", disable=None):
            others = earlier.setdefault((int(codes[row]), int(sizes[row])), [])
            if any(self._same_image(row, other) for other in others):
                again[row] = True
            else:
                others.append(row)
        self._unnamed = unnamed & ~again
        return again

    def _same_image(self, row: int, other: int) -> bool:
        try:
            a, b = (self._content(number, self._values(number)[self._image]) for number in (row, other))
            return a == b
        except BadRecordError:  # found again when it is read
            return False

    def _content(self, row: int, value: Any) -> bytes:
        """The bytes of an image column's value in a row."""
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
        if content is None and path:
            content = self._file(row, path)
        if not content:
            raise BadRecordError(f"column {self._image!r} holds no image")
        return content

    def _file(self, row: int, name: Any) -> bytes:
        root, *downloads = self.roots
        root = root or Path(self._file_and_key(row)[0]).parent
        for folder in downloads:
            if isinstance(name, str) and name.startswith(f"{folder}/"):
                root, name = folder, name.removeprefix(f"{folder}/")
        try:
            return read_file(files.inside(root, name))
        except LcmError as error:
            raise BadRecordError(f"no image in the row, nor at its path: {error}") from None


def open(
    path: str, *, split: str = "train", image_key: str | None = None, caption_key: str | None = None
) -> HuggingFace:
    """The split of a data set as a source.

    Args:
      path: a folder, a parquet file, a glob pattern of parquet files, or an id on the hub.
      image_key: column of the images; None: the first of IMAGE_COLUMNS.
      caption_key: column of the captions; None: the first of CAPTION_COLUMNS.

    Raises:
      BadArgument: no such path, split or column; a column of another type; a hub id without network.
      LcmError: a file that cannot be read; `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise LcmError("the source 'huggingface' needs datasets: pip install 'lcm_jax[data]'") from None
    said = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of an error is in ours
    try:
        table, roots, parts = _opened(datasets, str(path), split)
    finally:
        datasets.logging.set_verbosity(said)
    image_key = image_key or _first_of(IMAGE_COLUMNS, table.column_names)
    caption_key = caption_key or _first_of(CAPTION_COLUMNS, table.column_names)
    for argument, key in {"image_key": image_key, "caption_key": caption_key}.items():
        if key not in table.column_names:
            raise BadArgument(argument, key, f"{path} has no such column; choose of {', '.join(table.column_names)}")
    if isinstance(table.features[image_key], datasets.Image):
        table = table.cast_column(image_key, datasets.Image(decode=False))
    _check_types(datasets, path, table.features, image_key, caption_key)
    return HuggingFace(table, roots=roots, parts=parts, split=split, image_key=image_key, caption_key=caption_key)


def _first_of(wanted: Sequence[str], names: Sequence[str]) -> str:
    return next((name for name in wanted if name in names), wanted[0])


def _opened(datasets: Any, path: str, split: str) -> tuple[Any, tuple[Path | None, ...], tuple[tuple[str, int], ...]]:
    """(table, folders of image paths, (file, rows) of its parts).

    Image paths are relative to the first folder; None: to that of the row's own file. For files of the hub `datasets`
    writes the whole path to where it has put them, which is below one of the other folders.
    """
    where = Path(path)
    try:
        if where.is_dir() and any((where / name).is_file() for name in ("dataset_dict.json", "state.json")):
            table = _saved(datasets, where, split)
            return table, (where,), ((path, len(table)),)
        if where.exists() or glob.has_magic(path):
            parts = _parquet(datasets, where, split)
            with_split = {split: [str(_plain(datasets, Path(file))) for file, _ in parts]}
            root = where if where.is_dir() else None
            return datasets.load_dataset("parquet", data_files=with_split, split=split), (root,), parts
        if not _HUB_ID.fullmatch(path):
            raise BadArgument("path", path, "does not exist, and is not an id on the hub (owner/name)")
        table = _from_hub(datasets, path, split)
        return table, _hub_folders(datasets, path), ((f"{path} ({split})", len(table)),)
    except (LcmError, MemoryError):
        raise
    except Exception as error:  # `datasets` lets through what its readers raise, or names it as the cause
        cause = error.__cause__ or error
        raise LcmError(
            f"{path} cannot be read as a data set ({one_line(cause)}); correct it, or copy it again"
        ) from None


def _plain(datasets: Any, path: Path) -> Path:
    """The file or folder under a name that `datasets` takes literally: it expands [], *, ? and what looks like a URL.

    If its own name is not of that kind, a link in the cache of `datasets` is. Its name changes with the file, by which
    `datasets` knows what it has converted.
    """
    if _PLAIN.fullmatch(str(path)):
        return path
    path, state = path.absolute(), path.stat()
    known = f"{state.st_size} {state.st_mtime_ns} {state.st_ino}" * path.is_file()
    name = hashlib.blake2b(os.fsencode(path) + known.encode(), digest_size=12).hexdigest() + path.suffix
    link = Path(datasets.config.HF_DATASETS_CACHE, LINKS, name)
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return link


def _saved(datasets: Any, folder: Path, split: str) -> Any:
    try:
        for name in _named_files(folder):
            if Path(name).name != name:
                raise LcmError(f"it names {ascii(name)[:200]}, which is not in it")
        found = datasets.load_from_disk(str(_plain(datasets, folder)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LcmError(f"{folder} cannot be read ({one_line(error)}); write it again with save_to_disk") from None
    if not isinstance(found, datasets.DatasetDict):
        found = {str(found.split or split): found}  # one that was made in memory has no split: it serves for any
    table = _one_of(found, split, folder)
    _check_arrow(folder, table)
    return table


def _named_files(folder: Path) -> Iterator[str]:
    """Names in the JSON files of a folder of `save_to_disk`: splits, which are folders in it, and files in those."""
    places = [folder] if (folder / "state.json").is_file() else []
    if (folder / "dataset_dict.json").is_file():
        splits = foreign.read_json(folder / "dataset_dict.json")["splits"]
        yield from splits
        places += [folder / split for split in splits]
    for part_folder in places:
        yield from (part["filename"] for part in foreign.read_json(part_folder / "state.json")["_data_files"])


def _check_arrow(folder: Path, table: Any) -> None:
    """Raises LcmError if columns lack bytes, or keys point outside of theirs.

    A row's texts and image are checked when it is read.
    """
    import pyarrow

    try:
        table.data.validate()
        for name in set(KEY_COLUMNS) & set(table.column_names):
            keys = table.data.column(name)
            as_bytes = {"string": pyarrow.binary(), "large_string": pyarrow.large_binary()}  # they need not be UTF-8
            keys.cast(as_bytes.get(str(keys.type), keys.type)).validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise LcmError(f"{folder} is damaged ({one_line(error)}); copy it again") from None


def _parquet(datasets: Any, path: Path, split: str) -> tuple[tuple[str, int], ...]:
    import pyarrow.parquet

    if path.is_dir():
        files = _one_of(_splits(datasets, path), split, path)
    else:
        files = _one_of({"train": matching(str(path)) or [str(path)]}, split, path)
    # Opening a pipe would wait for its writer.
    if odd := [file for file in files if Path(file).exists() and not Path(file).is_file()]:
        raise LcmError(f"{odd[0]} is not a regular file; remove it, or choose another path")
    try:
        counted = tuple((file, _rows_of(file)) for file in files)
    except (OSError, pyarrow.ArrowException) as error:
        raise BadArgument(
            "path",
            path,
            f"not all of its files are parquet ({one_line(error)}); copy them again, or change the source",
        ) from None
    # `datasets` fails of a file without rows; img2dataset writes one for a shard without images.
    if not any(rows for _, rows in counted):
        raise BadArgument("path", path, "its parquet files have no rows; copy them again, or choose another path")
    return tuple((file, rows) for file, rows in counted if rows)


def _splits(datasets: Any, folder: Path) -> dict[str, list[str]]:
    """{split: parquet files} of a folder, by the rules of `datasets`, which takes the names in a path for patterns.

    So it is shown plain names alone, below another folder.
    """
    names: dict[str, str] = {}  # as shown -> in the folder
    for name in tree.walk(folder)[0]:
        if name.endswith(".parquet"):
            shown = re.sub(f"(?!{_PLAIN.pattern}).", "_", name, flags=re.DOTALL)
            while shown in names:
                shown = shown.replace(".parquet", "_.parquet")
            names[shown] = name
    with tempfile.TemporaryDirectory(prefix="lcm_jax-") as root:
        for shown in names:
            Path(root, shown).parent.mkdir(parents=True, exist_ok=True)
            Path(root, shown).touch()
        found = datasets.load_dataset_builder("parquet", data_dir=root).config.data_files if names else {}
        below = Path(root).resolve()
        relative = {split: [str(Path(file).relative_to(below)) for file in files] for split, files in found.items()}
    return {str(split): [str(folder / names[shown]) for shown in files] for split, files in relative.items()}


def _rows_of(file: str) -> int:
    import pyarrow.parquet

    with Path(file).open("rb") as stream:  # a name could be a URL to pyarrow
        return pyarrow.parquet.read_metadata(stream).num_rows


def _hub_folders(datasets: Any, name: str) -> tuple[Path, Path, Path]:
    """Where files of a data set on the hub are: its own folder in the cache (twice), and what was unpacked of it."""
    import huggingface_hub

    own = Path(huggingface_hub.constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return own, own, Path(datasets.config.EXTRACTED_DATASETS_PATH)


def _one_of(splits: Mapping[str, Any], split: str, path: Path) -> Any:
    if not splits:
        raise BadArgument("path", path, "holds no parquet files; correct it, or the source")
    if split not in splits:
        raise BadArgument("split", split, f"{path} has no such split; choose of {', '.join(splits)}")
    return splits[split]


def _from_hub(datasets: Any, name: str, split: str) -> Any:
    try:
        return datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise BadArgument("path", name, f"neither a folder nor a data set on the hub ({one_line(error)})") from None
    except OSError as error:
        raise BadArgument(
            "path",
            name,
            f"not a folder, and the hub cannot be reached ({one_line(error)}); download the data set where there is "
            f"network (hf download {name} --repo-type dataset --local-dir FOLDER), and give that FOLDER as the path",
        ) from None
    except ValueError as error:  # an unknown split; the message lists those that there are
        raise BadArgument("split", split, f"{name}: {one_line(error)}") from None


def _check_types(datasets: Any, path: str, features: Mapping[str, Any], image_key: str, caption_key: str) -> None:
    image, caption = features[image_key], features[caption_key]
    content = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(image, datasets.Image) and _kind(content) not in ("binary", "large_binary", "null"):
        raise BadArgument(
            "image_key",
            image_key,
            f"this column of {path} holds {_kind(image)}, not encoded images; choose of {', '.join(features)}",
        )
    inner = getattr(caption, "feature", caption)  # of a list
    if _kind(inner) not in ("string", "large_string", "binary", "large_binary", "null"):
        raise BadArgument(
            "caption_key",
            caption_key,
            f"this column of {path} holds {_kind(inner)}, not text; choose of {', '.join(features)}",
        )


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _is_number(table: Any, column: str) -> bool:
    import pyarrow

    kind = table.data.schema.field(column).type
    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)


def _as_bytes(column: Any) -> list[bytes]:
    """Keys of any type, without a look at whether texts are UTF-8."""
    import pyarrow

    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    values = column.cast(pyarrow.large_binary() if text else pyarrow.large_string()).to_pylist()
    return [value.encode() if isinstance(value, str) else value or b"" for value in values]


def _sizes(column: Any) -> Iterator[np.ndarray]:
    """Bytes of each text or image, -1 for null; of lists also their lengths. The contents are not read."""
    import pyarrow
    from pyarrow import compute

    kind, types = column.type, pyarrow.types
    if types.is_struct(kind):  # {bytes, path}
        yield from _sizes(compute.struct_field(column, "bytes")) if "bytes" in kind.names else ()
    elif not types.is_null(kind):  # texts, images or lists of texts
        of_lists = types.is_nested(kind)
        sizes = compute.list_value_length(column) if of_lists else compute.binary_length(column)
        yield sizes.fill_null(-1).to_numpy().astype(np.int64)
        yield from _sizes(compute.list_flatten(column)) if of_lists else ()


def _key_column(table: Any) -> str | None:
    import pyarrow

    for name in KEY_COLUMNS:
        if name in table.column_names:
            kind, types = table.data.schema.field(name).type, pyarrow.types
            known = types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
            if known and (name != "id" or len(np.unique(_codes(table, name))) == len(table)):  # may be of classes
                return name
    return None


def _codes(table: Any, column: str) -> np.ndarray:
    """int64 [rows], equal for rows with equal values; rows without a value have one each."""
    chunks = table.data.column(column).dictionary_encode().chunks
    codes = np.concatenate([np.zeros(0), *(chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks)])
    return np.where(np.isnan(codes), -1 - np.arange(len(codes)), codes).astype(np.int64)


def _image_sizes(table: Any, image_key: str) -> np.ndarray:
    """int64 [rows]: bytes of the images; -1 if there are none, as for one that is named by its path."""
    return next(_sizes(next(iter(_contents(table, image_key).values()))), np.full(len(table), -1))


def _failed(table: Any, image_key: str) -> np.ndarray:
    """bool [rows]: those of img2dataset that hold no image and say so in their status."""
    import pyarrow.compute as pc

    failed = np.zeros(len(table), bool)
    if "status" in table.column_names and str(table.data.schema.field("status").type) in ("string", "large_string"):
        wrong = pc.fill_null(pc.not_equal(table.data.column("status"), "success"), False)
        for part in _contents(table, image_key).values():
            wrong = pc.and_(wrong, pc.is_null(part))
        failed |= wrong.to_numpy()
    return failed


def _contents(table: Any, image_key: str) -> dict[str, Any]:
    """The column of the images' "bytes", and that of their "path" if there is one."""
    import pyarrow.compute as pc

    column = table.data.column(image_key)
    fields = [field.name for field in column.type] if str(column.type).startswith("struct") else []
    return {name: pc.struct_field(column, name) for name in ("bytes", "path") if name in fields} or {"bytes": column}


def _paths(table: Any, image_key: str) -> list[bytes]:
    """[rows] paths of images, b"" where the bytes are in the table; [] if there are none."""
    import pyarrow.compute as pc

    found = _contents(table, image_key)
    paths = found.get("path")
    if paths is not None and "bytes" in found:
        paths = pc.if_else(pc.is_null(found["bytes"]), paths, None)
    if paths is None or paths.null_count == len(paths):
        return []
    return [name for chunk in paths.chunks for name in _as_bytes(chunk)]


def _as_text(scalar: Any) -> str | None:
    """A key as text; bytes that are not UTF-8 are escaped."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        value = scalar.as_buffer().to_pybytes().decode(errors="backslashreplace")
    return None if value is None else str(value)
