"""Records of a TensorFlow Datasets data set in array_record form, read at random and without TensorFlow.

    FOLDER           the one with dataset_info.json, as NAME/VERSION
    NAME[/CONFIG]    registered with TFDS and prepared already (TFDS_DATA_DIR)

Encoded images come through as they were stored. Scalar number features are fields; the first question for one reads
all records once. A record's key is its place in the split, as "train-000000123".
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
from lcm_jax.data.records import BadRecord, BadRecordError, Record, digest_of
from lcm_jax.data.sources.parsing import captions_of, check_name
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.foreign import one_line

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
    ):
        """Record i is row `rows[i]` of the split and item i of `data`; `shards`: (file, rows), in the split's order."""
        self.bad_records: tuple[BadRecord, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._data, self._split, self._rows = data, split, rows
        self._files, self._ends = [file for file, _ in shards], np.cumsum([rows for _, rows in shards])
        self._numbers, self._image, self._caption = numbers, image_key, caption_key
        self._fields: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Record:
        key = self.where(number)[1]
        example = self._example(number)
        image = example[self._image]
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.shape[2:] != (3,)):
            raise BadRecordError(f"feature {self._image!r} holds {image.dtype} {list(image.shape)}, not uint8 [h w 3]")
        if len(image) == 0:
            raise BadRecordError(f"feature {self._image!r} holds no image")
        captions = functools.reduce(lambda value, name: value[name], self._caption.split("/"), example)
        captions = captions_of(captions if isinstance(captions, bytes | str) else list(captions))
        numbers = {name: float(example[name]) for name in self._numbers}
        return Record(key, image, captions, {name: x for name, x in numbers.items() if x == x})  # without NaN

    def field(self, name: str) -> np.ndarray | None:
        if name not in self._numbers:
            return None
        if self._fields is None:
            self._fields = self._scan()
        return None if np.isnan(self._fields[name]).all() else self._fields[name]

    def where(self, number: int) -> tuple[str, str]:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        row = int(self._rows[number])
        return self._files[int(np.searchsorted(self._ends, row, side="right"))], f"{self._split}-{row:09d}"

    def digest(self) -> str:
        ends = [_last_bytes(file) for file in self._files]  # where array_record keeps the positions of records
        return digest_of(self._split, self._rows, self._ends, *ends)

    def _example(self, number: int) -> Mapping[str, Any]:
        try:
            return self._data[number]
        except (ValueError, KeyError, RuntimeError) as error:
            raise BadRecordError(f"the record cannot be read ({one_line(error)})") from None

    def _scan(self) -> dict[str, np.ndarray]:
        fields = {name: np.full(len(self), np.nan) for name in self._numbers}
        for number in tqdm(range(len(self)), "fields", unit=" records", disable=None):
            try:
                example = self._example(number)
            except BadRecordError:
                continue  # NaN; training reports the reason when it reads the record
            for name, values in fields.items():
                values[number] = example[name]
        return fields


def open(path: str, *, split: str = "train", image_key: str | None = None, caption_key: str | None = None) -> TFDS:
    """The split of a data set as a source.

    Args:
      path: a folder with dataset_info.json, or a name known to TFDS.
      split: its name, or a slice of it as "train[:10%]".
      image_key: feature of the images; None: "image".
      caption_key: feature of the captions, nested ones as "captions/text"; None: the first of CAPTION_FEATURES.

    Raises:
      BadArgument: no such data set, split or feature; one that is not prepared, or not in array_record form.
      LcmError: files that are missing or cannot be read; a package that is not installed.
    """
    try:
        import array_record.python.array_record_data_source  # noqa: F401  what TFDS reads through
        import tensorflow_datasets as tfds
    except ImportError:
        raise LcmError(
            "the source 'tfds' needs tensorflow-datasets and array_record: pip install 'lcm_jax[data]'"
        ) from None
    path = str(path)
    check_name(Path(path))
    builder = _from_folder(tfds, Path(path)) if Path(path).exists() else _by_name(tfds, path)
    _check_format(builder, path)
    features, part = builder.info.features, _split_info(builder, path, split)
    image_key = image_key or "image"
    caption_key = caption_key or next((name for name in CAPTION_FEATURES if name in features), CAPTION_FEATURES[0])
    _check_features(tfds, features, path, image_key, caption_key)
    undecoded = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    base = split.partition("[")[0]
    shards = _shards(builder.info.splits[base], builder.data_path)
    return TFDS(
        _data(builder, split, undecoded),
        split=base,
        rows=_rows(shards, part),
        shards=shards,
        numbers=_numbers(features, {image_key, caption_key}),
        image_key=image_key,
        caption_key=caption_key,
    )


def _last_bytes(file: str, count: int = 1 << 16) -> bytes:
    with Path(file).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - count))
        return b"%d " % size + stream.read()


def _from_folder(tfds: Any, folder: Path) -> Any:
    if not (folder / "dataset_info.json").is_file():
        inside = sorted(glob.glob(f"{glob.escape(str(folder))}/**/dataset_info.json", recursive=True))
        hint = f"; try {Path(inside[-1]).parent}" if inside else ""
        raise BadArgument("path", folder, f"has no dataset_info.json, so it is not a data set prepared by TFDS{hint}")
    try:
        return tfds.builder_from_directory(folder)
    except (OSError, ValueError, KeyError) as error:
        raise LcmError(f"{folder} cannot be read as a TFDS data set ({one_line(error)}); prepare it again") from None


def _by_name(tfds: Any, name: str) -> Any:
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        raise BadArgument("path", name, "neither a folder nor a data set that TFDS knows") from None
    except (ImportError, ValueError) as error:  # many of TFDS' own builders import TensorFlow
        raise BadArgument(
            "path",
            name,
            f"TFDS cannot build this data set ({one_line(error)}); give the folder it was prepared in (the one with "
            "dataset_info.json)",
        ) from None
    if not builder.is_prepared():
        raise BadArgument(
            "path",
            name,
            f"not prepared in {builder.data_path}; where TensorFlow is installed, run tfds.builder({name!r})"
            ".download_and_prepare(file_format='array_record'), or set TFDS_DATA_DIR to where it was prepared",
        )
    return builder


def _check_format(builder: Any, path: str) -> None:
    found = builder.info.file_format.value if builder.info.file_format else "no known format"
    if found != "array_record":
        raise BadArgument(
            "path",
            path,
            f"stored as {found}, which cannot be read at random; where TensorFlow is installed, run tfds.builder("
            f"{builder.info.name!r}).download_and_prepare(file_format='array_record') into another data_dir",
        )


def _split_info(builder: Any, path: str, split: str) -> Any:
    splits = builder.info.splits
    if split.partition("[")[0] not in splits:
        raise BadArgument("split", split, f"{path} has no such split; choose of {', '.join(splits)}")
    try:
        return splits[split]
    except ValueError as error:
        raise BadArgument("split", split, f"not a slice ({one_line(error)}); write it as 'train[:10%]'") from None


def _check_features(tfds: Any, features: Any, path: str, image_key: str, caption_key: str) -> None:
    for argument, key in {"image_key": image_key, "caption_key": caption_key}.items():
        found = features
        for name in key.split("/"):
            found = getattr(found, "feature", found)  # of a sequence
            found = found[name] if isinstance(found, tfds.features.FeaturesDict) and name in found else None
        if found is None:
            raise BadArgument(argument, key, f"{path} has no such feature; choose of {', '.join(sorted(features))}")


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
            f"{builder.data_path}: split {split!r} cannot be opened ({one_line(error)}); prepare or copy it again"
        ) from None


def _shards(whole: Any, folder: Any) -> tuple[tuple[str, int], ...]:
    for file in whole.filepaths:  # their names come from dataset_info.json
        files.inside(Path(folder), os.path.relpath(file, folder))
    found = tuple((str(file), rows) for file, rows in zip(whole.filepaths, whole.shard_lengths, strict=True))
    missing = [file for file, _ in found if not Path(file).is_file()]
    if missing:
        raise LcmError(f"{missing[0]} is missing ({len(missing)} of {len(found)} files are); copy the folder again")
    return found


def _rows(shards: Sequence[tuple[str, int]], part: Any) -> np.ndarray:
    """Numbers in the whole split, which has these shards, of the records of a slice of it."""
    starts = np.cumsum([0] + [rows for _, rows in shards])
    first = {Path(file).name: int(start) for (file, _), start in zip(shards, starts, strict=False)}
    pieces = [np.arange(piece.take) + piece.skip + first[Path(piece.filename).name] for piece in part.file_instructions]
    return np.concatenate([np.zeros(0, np.int64), *pieces])
