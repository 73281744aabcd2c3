"""Any source of records packed into one TensorFlow Datasets data set in array_record form, written without TensorFlow.

    OUT/records-train.array_record-00000-of-00008 ...   one tf.Example per record, in the source's order
    OUT/dataset_info.json, features.json                what tfds.builder_from_directory(OUT) reads
    OUT/train.index.npy                                 keys and fields of all records, see `sources.tfds`

    key Text, image Image, captions Sequence(Text), width, height and every other field: float64, NaN where missing

Encoded images are stored byte for byte: `Image` without an encoding takes bytes of any format and decodes each by its
own header, so plain TFDS users get pixels and `SkipDecoding` the bytes. Numbers are stored as raw bytes, since a
tf.Example's own floats have 32 bits. `GeneratorBasedBuilder` is not used: past 1 GB its shuffler needs TensorFlow, and
without shuffling it sorts the whole data set in memory.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcm_jax import files
from lcm_jax.data import images
from lcm_jax.data.records import BadRecord, Fault, Record, Source
from lcm_jax.data.sources.tfds import INDEX_FILE, KEY
from lcm_jax.errors import LcmError

SHARD_BYTES = 256 << 20  # what TFDS aims at as well
SPLIT = "train"
_SAMPLE = 64  # records read beforehand, to know how many shards and how much disk
_OPTIONS = "group_size:1,uncompressed"  # one read per record; images are compressed already
_OVERHEAD = 1 << 10  # bytes per record of field names, numbers and framing
_SHARD_OVERHEAD = 1 << 18  # files are padded to whole blocks
_OTHER_FEATURES = ("key", "image", "captions")


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` wrote: `records` in `shards` files, and the faults: the source's own, then what packing found."""

    records: int
    shards: int
    faults: tuple[Fault, ...]


def pack(
    source: Source,
    out: str | Path,
    *,
    name: str = "records",
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write all usable records of `source` to the new folder `out`, all of it or nothing.

    Records that cannot be read, or whose image has no readable header, are left out. Width and height are read from
    the image where the record does not know them. The same source gives the same bytes.

    Args:
      name: of the data set, a word.
      shard_bytes: approximate size of one file.
      report: called as (records done, records in all) after each.

    Raises:
      LcmError: `out` exists, is being written by another process, or the disk is too small; no usable record.
    """
    out = Path(out).absolute()
    tfds = _tfds()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise LcmError(f"{name!r} cannot name a TFDS data set; use a-z, 0-9 and _, a letter first")
    if out.exists():
        raise LcmError(f"{out} exists already; choose another folder or remove it first")
    needed = _needed(source)
    files.check_space(out, needed)
    count = max(1, min(len(source), round(needed / shard_bytes)))
    with _new_folder(out) as folder:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=SPLIT, filetype_suffix="array_record"
        )
        paths = [Path(template.sharded_filepath(shard_index=i, num_shards=count)) for i in range(count)]
        try:
            writing = _write_shards(source, paths, report)
        except (OSError, RuntimeError) as error:  # array_record's own is a RuntimeError
            raise LcmError(
                f"packing into {out} stopped ({' '.join(str(error).split())}); where the disk is full make "
                "room or choose another, then run the same command again"
            ) from error
        if not writing.keys:
            first = f"; the first: {writing.faults[0]}" if writing.faults else ""
            raise LcmError(f"none of {len(source)} records can be used{first} (--config.data.path)")
        _write_metadata(tfds, folder, template, writing)
    return Packed(len(writing.keys), count, (*source.faults, *writing.faults))


@dataclasses.dataclass
class _Writing:
    """What is known after some shards."""

    keys: list[bytes] = dataclasses.field(default_factory=list)
    fields: dict[str, array.array] = dataclasses.field(default_factory=dict)  # one number per key, NaN where missing
    complete_from: int = 0  # examples before this one lack a field
    faults: list[Fault] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)  # records per shard
    num_bytes: int = 0


def _write_shards(source: Source, paths: list[Path], report: Callable[[int, int], None] | None) -> _Writing:
    writing = _Writing()
    for i, path in enumerate(paths):
        numbers = range(i * len(source) // len(paths), (i + 1) * len(source) // len(paths))
        _write_shard(path, (example for number in numbers for example in _example(source, number, writing, report)))
        writing.lengths.append(len(writing.keys) - sum(writing.lengths))
    start = 0
    for path, length in zip(paths, writing.lengths, strict=True):
        if start < writing.complete_from:  # every example must have every field, or TFDS refuses to read it
            _complete(path, writing.fields)
        _check_count(path, length)
        start += length
        writing.num_bytes += path.stat().st_size
    return writing


def _example(source: Source, number: int, writing: _Writing, report: Callable | None) -> Iterator[bytes]:
    """The serialized example of one record, or nothing and a fault."""
    try:
        record = source[number]
        numbers = _numbers(record)
        image = _encoded(record.image)
    except BadRecord as error:
        writing.faults.append(Fault(*source.where(number), str(error)))
    else:
        for name in [name for name in numbers if name not in writing.fields]:
            writing.fields[name] = array.array("d", [np.nan]) * len(writing.keys)
            writing.complete_from = len(writing.keys)
        for name, values in writing.fields.items():
            values.append(numbers.get(name, np.nan))
        writing.keys.append(record.key.encode())
        yield _serialized(record, image, numbers, writing.fields)
    if report is not None:
        report(number + 1, len(source))


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _numbers(record: Record) -> dict[str, float]:
    height, width = images.header_size(record.image)
    taken = [name for name in record.fields if name in _OTHER_FEATURES]
    if taken:
        raise LcmError(
            f"record {record.key} has a number named {taken[0]!r}, which is what another feature of the "
            "packed data set is named; rename it in the data"
        )
    return {"width": float(width), "height": float(height), **record.fields}


def _serialized(record: Record, image: bytes, numbers: Mapping[str, float], fields: Iterable[str]) -> bytes:
    """A tf.Example as TFDS writes it for `_features`; `deterministic`, since a protobuf's maps have no order."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    texts = {"key": [record.key], "captions": record.captions}
    for name, values in {**texts, "image": [image]}.items():
        values = [value.encode() if isinstance(value, str) else value for value in values]
        example.features.feature[name].bytes_list.value.extend(values)
    for name in fields:
        example.features.feature[name].bytes_list.value.append(_raw(numbers.get(name, np.nan)))
    return example.SerializeToString(deterministic=True)


def _raw(number: float) -> bytes:
    return np.float64(number).astype("<f8").tobytes()


def _features(tfds: Any, fields: Iterable[str]) -> dict[str, Any]:
    texts = {"key": tfds.features.Text(), "captions": tfds.features.Sequence(tfds.features.Text())}
    numbers = {name: tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes") for name in sorted(fields)}
    return {**texts, "image": tfds.features.Image(), **numbers}


def _write_shard(path: Path, examples: Iterator[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
    try:
        for example in examples:
            writer.write(example)
    finally:
        writer.close()


def _complete(path: Path, fields: Iterable[str]) -> None:
    """Give every example of a shard the fields that were not known when it was written."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    def examples() -> Iterator[bytes]:
        reader = array_record_module.ArrayRecordReader(str(path))
        for _ in range(reader.num_records()):
            example = tf_example_pb2.Example.FromString(reader.read())
            for name in fields:
                if name not in example.features.feature:
                    example.features.feature[name].bytes_list.value.append(_raw(np.nan))
            yield example.SerializeToString(deterministic=True)
        reader.close()

    with files.new_file(path) as partial:
        _write_shard(partial, examples())


def _check_count(path: Path, expected: int) -> None:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != expected:
        raise RuntimeError(f"{path} holds {found} records after {expected} were written")


def _write_metadata(tfds: Any, folder: Path, template: Any, writing: _Writing) -> None:
    info = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=writing.lengths, num_bytes=writing.num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=_features(tfds, writing.fields), split_infos=[info], version="1.0.0", check_data=False
    )  # its check needs TensorFlow
    kinds = [(KEY, f"S{max(map(len, writing.keys))}"), *((name, "<f8") for name in sorted(writing.fields))]
    index = np.empty(len(writing.keys), kinds)
    index[KEY] = writing.keys
    for name, values in writing.fields.items():
        index[name] = values
    np.save(folder / INDEX_FILE.format(split=SPLIT), index)


def _needed(source: Source) -> int:
    """Bytes that packing will take, from a sample of records."""
    numbers = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)) if len(source) else []
    found = []
    for number in numbers:
        with contextlib.suppress(BadRecord):  # counted when it is packed
            record = source[int(number)]
            texts = sum(len(text.encode()) for text in record.captions)
            size = record.image.nbytes if isinstance(record.image, np.ndarray) else len(record.image)
            found.append(size + texts + _OVERHEAD)
    return int(np.mean(found or [0]) * len(source)) + _SHARD_OVERHEAD


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well. What a killed process left is removed."""
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        os.close(handle)
        raise LcmError(f"{out} is being written by another process; wait for it or choose another folder") from None
    try:
        for place in folder.iterdir():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        yield folder
        for place in folder.iterdir():
            with place.open("rb") as stream:
                files.sync(stream)
        files.sync_folder(folder)
        os.rename(folder, out)
        files.sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _tfds() -> Any:
    try:
        import array_record.python.array_record_module  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError:
        raise LcmError(
            "packing records needs tensorflow-datasets and array_record: pip install 'lcm_jax[data]'"
        ) from None
    return tfds
