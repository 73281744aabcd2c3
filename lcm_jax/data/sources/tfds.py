"""Records of a TensorFlow Datasets data set in array_record form, read at random and without TensorFlow.

    FOLDER           the one with dataset_info.json, as NAME/VERSION; `lcm_jax.data.tfds_builder` writes such a folder
    NAME[/CONFIG]    registered with TFDS and prepared already (TFDS_DATA_DIR)

Encoded images come through as they were stored. Scalar number features are fields. What `tfds_builder` packed has its
keys and fields beside it in one array (INDEX_FILE), so that neither needs a scan; of other data sets the key is
"train-000000123" and the first question for a field reads all records once.
"""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lcm_jax import files
from lcm_jax.data.records import BadRecord, Fault, Record
from lcm_jax.data.sources.parsing import captions_of, text_of
from lcm_jax.errors import LcmError

INDEX_FILE = "{split}.index.npy"  # structured array [n]: KEY, UTF-8 bytes, and each field, float64 with NaN if missing
KEY = "key"
CAPTION_FEATURES = ("captions", "caption", "text")


class TFDS:
    """Random access to one split; see `open`."""

    def __init__(
        self,
        data: Any,
        *,
        split: str,
        rows: np.ndarray,
        shards: tuple[tuple[str, int], ...],
        numbers: tuple[str, ...],
        image_key: str,
        caption_key: str,
        index: Path | None,
    ):
        """Record i is row `rows[i]` of the split and item i of `data`; `shards`: (file, rows), in the split's order."""
        self.faults: tuple[Fault, ...] = ()
        self._data, self._split, self._rows = data, split, rows
        self._files, self._ends = [file for file, _ in shards], np.cumsum([rows for _, rows in shards])
        self._numbers, self._image, self._caption, self._index_path = numbers, image_key, caption_key, index
        self._fields: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Record:
        key = self.where(number)[1]
        example = self._example(number)
        picture = example[self._image]
        if isinstance(picture, np.ndarray) and (picture.dtype != np.uint8 or picture.shape[2:] != (3,)):
            raise BadRecord(f"feature {self._image!r} holds {picture.dtype} {list(picture.shape)}, not uint8 [h w 3]")
        if len(picture) == 0:
            raise BadRecord(f"feature {self._image!r} holds no image")
        captions = _captions(functools.reduce(lambda value, name: value[name], self._caption.split("/"), example))
        return Record(key, picture, captions, self._known(number, example))

    def field(self, name: str) -> np.ndarray | None:
        if name not in self._numbers:
            return None
        values = self._scan()[name] if self._index is None else np.array(self._index[name][self._rows])
        return None if np.isnan(values).all() else values

    def where(self, number: int) -> tuple[str, str]:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        row = int(self._rows[number])
        file = self._files[int(np.searchsorted(self._ends, row, side="right"))]
        return file, f"{self._split}-{row:09d}" if self._index is None else self._index[KEY][row].decode()

    @functools.cached_property
    def _index(self) -> np.ndarray | None:
        return None if self._index_path is None else np.load(self._index_path, mmap_mode="r")

    def _example(self, number: int) -> Mapping[str, Any]:
        try:
            return self._data[number]
        except (ValueError, KeyError, RuntimeError) as error:
            raise BadRecord(f"the record cannot be read ({_one_line(error)})") from None

    def _known(self, number: int, example: Mapping[str, Any]) -> dict[str, float]:
        """Fields of one record. The index has them in float64, the records of other data sets as they are."""
        values = example if self._index is None else self._index[self._rows[number]]
        known = {name: float(values[name]) for name in self._numbers}
        return {name: value for name, value in known.items() if value == value}

    def _scan(self) -> dict[str, np.ndarray]:
        if self._fields is None:
            fields = {name: np.full(len(self), np.nan) for name in self._numbers}
            for number in tqdm(range(len(self)), "fields", unit=" records", disable=None):
                try:
                    example = self._example(number)
                except BadRecord:
                    continue  # NaN; reading the record says why
                for name, values in fields.items():
                    values[number] = example[name]
            self._fields = fields
        return self._fields

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"}


def open(path: str, *, split: str = "train", image_key: str | None = None, caption_key: str | None = None) -> TFDS:
    """The split of a data set as a source.

    Args:
      path: a folder with dataset_info.json, or a name known to TFDS.
      split: its name, or a slice of it as "train[:10%]".
      image_key: feature of the images; None: "image".
      caption_key: feature of the captions, nested ones as "captions/text"; None: the first of CAPTION_FEATURES.

    Raises:
      LcmError: no such data set, split or feature; one that is not prepared, or not in array_record form.
    """
    try:
        import array_record.python.array_record_data_source  # noqa: F401  what TFDS reads through
        import tensorflow_datasets as tfds
    except ImportError:
        raise LcmError(
            "the source 'tfds' needs tensorflow-datasets and array_record: pip install 'lcm_jax[data]'"
        ) from None
    builder = _from_folder(tfds, Path(path)) if Path(path).exists() else _by_name(tfds, str(path))
    _check_format(builder, str(path))
    features, info = builder.info.features, _split_info(builder, str(path), split)
    image_key = image_key or "image"
    caption_key = caption_key or next((name for name in CAPTION_FEATURES if name in features), CAPTION_FEATURES[0])
    _check_features(tfds, features, path, image_key, caption_key)
    skip = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    base = split.partition("[")[0]
    index = Path(builder.data_path) / INDEX_FILE.format(split=base)
    whole, numbers = builder.info.splits[base], _numbers(features, {image_key, caption_key})
    shards = _shards(whole, builder.data_path)
    return TFDS(
        _data(builder, split, skip),
        split=base,
        rows=_rows(shards, info),
        shards=shards,
        numbers=numbers,
        image_key=image_key,
        caption_key=caption_key,
        index=_checked(index, whole, numbers) if index.is_file() else None,
    )


def _from_folder(tfds: Any, folder: Path) -> Any:
    if not (folder / "dataset_info.json").is_file():
        inside = sorted(glob.glob(f"{glob.escape(str(folder))}/**/dataset_info.json", recursive=True))
        hint = f"; set --config.data.path={Path(inside[-1]).parent}" if inside else ""
        raise LcmError(f"{folder} has no dataset_info.json, so it is no data set prepared by TFDS{hint}")
    try:
        return tfds.builder_from_directory(folder)
    except (OSError, ValueError, KeyError) as error:
        raise LcmError(f"{folder} cannot be read as a TFDS data set ({_one_line(error)}); prepare it again") from None


def _by_name(tfds: Any, name: str) -> Any:
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        raise LcmError(
            f"{name} is neither a folder nor a data set that TFDS knows; correct --config.data.path"
        ) from None
    except (ImportError, ValueError) as error:  # many of TFDS' own builders import TensorFlow
        raise LcmError(
            f"TFDS cannot make the data set {name} ({_one_line(error)}); set --config.data.path to the "
            "folder it was prepared in (the one with dataset_info.json)"
        ) from None
    if not builder.is_prepared():
        raise LcmError(
            f"{name} is not prepared in {builder.data_path}; where TensorFlow is, run tfds.builder({name!r})"
            ".download_and_prepare(file_format='array_record'), or set TFDS_DATA_DIR to where it was"
        )
    return builder


def _check_format(builder: Any, path: str) -> None:
    found = builder.info.file_format.value if builder.info.file_format else "no known format"
    if found != "array_record":
        raise LcmError(
            f"{path} is stored as {found}, which cannot be read at random; where TensorFlow is, run "
            f"tfds.builder({builder.info.name!r}).download_and_prepare(file_format='array_record') into "
            "another data_dir"
        )


def _split_info(builder: Any, path: str, split: str) -> Any:
    splits = builder.info.splits
    if split.partition("[")[0] not in splits:
        raise LcmError(f"{path} has no split {split!r}; set --config.data.split to one of {', '.join(splits)}")
    try:
        return splits[split]
    except ValueError as error:
        raise LcmError(
            f"{path}: {split!r} is no slice of a split ({_one_line(error)}); write it as "
            "--config.data.split='train[:10%]'"
        ) from None


def _check_features(tfds: Any, features: Any, path: str, image_key: str, caption_key: str) -> None:
    for key, flag in ((image_key, "image_key"), (caption_key, "caption_key")):
        found = features
        for name in key.split("/"):
            found = getattr(found, "feature", found)  # of a sequence
            found = found[name] if isinstance(found, tfds.features.FeaturesDict) and name in found else None
        if found is None:
            raise LcmError(
                f"{path} has no feature {key!r}; name one of {', '.join(sorted(features))} by --config.data.{flag}"
            )


def _numbers(features: Any, without: set[str]) -> tuple[str, ...]:
    return tuple(
        name
        for name, feature in sorted(features.items())
        if name not in without and feature.shape == () and np.issubdtype(feature.np_dtype, np.number)
    )


def _data(builder: Any, split: str, decoders: dict[str, Any]) -> Any:
    files.allow_open_files(sum(part.num_shards for part in builder.info.splits.values()))
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except (OSError, ValueError, RuntimeError) as error:
        raise LcmError(
            f"{builder.data_path}: split {split!r} cannot be opened ({_one_line(error)}); prepare or copy it again"
        ) from None


def _shards(whole: Any, folder: Any) -> tuple[tuple[str, int], ...]:
    for file in whole.filepaths:  # dataset_info.json says how they are called
        files.inside(Path(folder), os.path.relpath(file, folder))
    found = tuple((str(file), rows) for file, rows in zip(whole.filepaths, whole.shard_lengths, strict=True))
    missing = [file for file, _ in found if not Path(file).is_file()]
    if missing:
        raise LcmError(f"{missing[0]} is missing ({len(missing)} of {len(found)} files are); copy the folder again")
    return found


def _rows(shards: Sequence[tuple[str, int]], part: Any) -> np.ndarray:
    """Numbers in the whole split, of these shards, of the records of a slice of it."""
    starts = np.cumsum([0] + [rows for _, rows in shards])
    first = {Path(file).name: int(start) for (file, _), start in zip(shards, starts, strict=False)}
    pieces = [np.arange(piece.take) + piece.skip + first[Path(piece.filename).name] for piece in part.file_instructions]
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def _checked(index: Path, whole: Any, numbers: tuple[str, ...]) -> Path:
    try:
        found = np.load(index, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise LcmError(f"{index} cannot be read ({_one_line(error)}); copy the folder again") from None
    kinds = {name: found.dtype[name].kind for name in found.dtype.names or ()}
    if found.shape != (whole.num_examples,) or kinds != {KEY: "S", **dict.fromkeys(numbers, "f")}:
        raise LcmError(
            f"{index} has {found.size} records of {found.dtype.names}, the split {whole.num_examples} of "
            f"{(KEY, *numbers)}, or of another kind; copy the folder again"
        )
    return index


def _captions(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, bytes | str) else list(value)
    return captions_of([text_of(text) if isinstance(text, bytes) else text for text in texts])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
