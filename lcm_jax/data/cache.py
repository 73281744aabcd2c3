"""The latent cache on disk: images and captions that were encoded once, as rows that training reads at random.

    DIR/manifest.json                      written last: without it the cache is unfinished
    DIR/latents-GG-SSSSS.array_record      shard S of group G (an aspect bucket; 00 without buckets)
    DIR/bad_records.jsonl                  what could not be encoded, if anything

A record is one row: its arrays as little-endian bytes one after another, in the manifest's order and with its dtypes
and shapes, then a JSON object {"key", "shard", "caption"} that says what it was made from. The manifest:

    format, made_by      version of this layout; the package that wrote it
    fingerprint          what determines how images and captions are encoded, see `fingerprint`
    text                 "ids": token ids, encoded during training; "embeddings": encoded already
    arrays               [{"name", "dtype", "shapes": [of a row, for each group]}]
    groups               [{"rows", "shards": [{"file", "rows", "bytes"}]}]
    examples             records in each group
    variants             rows of one record (other crops, flips and captions), one after another
    records              digest of the records that the rows were made from, see `records.Source`
    data, seed, ...      what the rows were made from, and how
    teacher              of images that the teacher made of prompts: its sampler, guidance and a hash of its weights
    faults               number of records that could not be used

A cache is written shard by shard. It can be stopped at any time and is the same in the end. Until it is finished:

    DIR/progress/plan.json       what the cache will hold: the manifest without the results
    DIR/progress/SHARD.json      SHARD is finished: {"rows", "bytes", "faults": [[shard, key, reason]]}

A shard gets its name when it is complete, and its note in `progress` after that. When all shards have theirs, the
manifest is written and the folder `progress` is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax import files, foreign
from lcm_jax.data.records import BadRecord, BadRecordError, digest_of
from lcm_jax.data.sources.parsing import check_name
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.model import Pipeline, PipelineParams, weights_hash

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress"
PLAN = Path(PROGRESS, "plan.json")
BAD_RECORDS = "bad_records.jsonl"
TEXTS = ("ids", "embeddings")
DTYPES = ("float32", "float16", "bfloat16")
_PARTS = {"fingerprint": dict, "examples": list, "variants": int, "data": dict, "faults": int}  # of a manifest

_REMEDIES = {  # for each part of a fingerprint that may differ from a run's
    "resolution": "set the cache's resolution",
    "sizes": "set the cache's aspect_buckets, bucket_step and bucket_max_aspect",
    "time_ids": "the cache is for another family of models (SDXL or not)",
    "scaling_factor": "use the VAE of the cache",
    "vae": "use the VAE of the cache",
    "tokenizers": "use a teacher with the tokenizers of the cache",
    "text_encoders": "use a teacher with the text encoders of the cache",
}
_OPTIONS = "group_size:1,uncompressed"  # one read for one record; noise does not compress
_SAMPLED = 64  # rows of each group that `Cached.digest` looks at
_RECORD_OVERHEAD = 1 << 10  # bytes of a record beside its arrays, about
_SHARD_OVERHEAD = 1 << 18  # array_record pads its files to whole blocks
_NOT_COMPARED = ("made_by", "arrays")  # of two plans: the version may change, and the arrays follow from the rest


# Reading


class Cached:
    """The rows of a cache as `rows.Examples`, and its `manifest`. See `open`.

    Rows are {"mean", "logvar"} float32 [h w c], unscaled, with {token ids int32 [l] by text encoder} or
    {"encoder_hidden_states" float32 [l d] (and SDXL's "text_embeds" [d])}, and SDXL's "time_ids" float32 [6]. Arrays
    stored in half precision become float32 when they are read.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest
        self.groups = tuple(group["rows"] for group in manifest["groups"])
        kinds = [(array["name"], np.dtype(array["dtype"]), array["shapes"]) for array in manifest["arrays"]]
        self._layouts = [
            [(name, dtype, tuple(shapes[group])) for name, dtype, shapes in kinds] for group in range(len(self.groups))
        ]
        self._sizes = [sum(d.itemsize * math.prod(shape) for _, d, shape in layout) for layout in self._layouts]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}  # open files

    def __len__(self) -> int:
        return sum(self.groups)

    def row(self, group: int, rank: int, draws: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Arrays of one row, read-only; nothing about it is random. Raises BadRecordError."""
        del draws
        record, offset, row = self._read(group, rank), 0, {}
        for name, dtype, shape in self._layouts[group]:
            count = math.prod(shape)
            value = np.frombuffer(record, dtype, count, offset).reshape(shape)
            row[name] = value.astype(np.float32) if dtype.itemsize == 2 else value
            offset += count * dtype.itemsize
        return row

    def about(self, group: int, rank: int) -> dict[str, str]:
        """{"key", "shard", "caption"} of the record that a row was made from. Raises BadRecordError."""
        try:
            return foreign.json_object(self._read(group, rank)[self._sizes[group] :], "the row's description")
        except LcmError as error:
            raise BadRecordError(str(error)) from None

    def where(self, group: int, rank: int) -> tuple[str, str]:
        """(shard, key) of the record that a row was made from; (cache, row) if that cannot be read."""
        try:
            about = self.about(group, rank)
            return about["shard"], about["key"]
        except BadRecordError:
            return str(self.path), f"row {rank} of group {group}"

    def bad_records(self) -> list[BadRecord]:
        """The records that could not be encoded. Raises LcmError if their list cannot be read."""
        path = self.path / BAD_RECORDS
        with foreign.reading(path, "a list of bad records", "copy the cache again"):
            lines = path.read_bytes().splitlines() if path.exists() else []
            return [BadRecord(**foreign.json_object(line, path)) for line in lines]

    def digest(self) -> str:
        """`digest_of` the manifest, and of what some rows of each group were made from, evenly spaced."""
        found = [json.dumps(self.manifest | {"made_by": None}, sort_keys=True)]
        for group, rows in enumerate(self.groups):
            for rank in np.unique(np.linspace(0, max(rows - 1, 0), min(rows, _SAMPLED), dtype=np.int64)):
                try:
                    found.append(self._read(group, int(rank))[self._sizes[group] :])
                except BadRecordError:
                    found.append(b"")
        return digest_of(*found)

    @functools.cached_property
    def _readers(self) -> list[Any]:
        """array_record's random access to each group; it opens a shard when it is first read."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        def whole(shard: Mapping[str, Any]) -> Any:  # of known length, so that array_record does not open it to count
            name, rows = str(self.path / shard["file"]), shard["rows"]
            return types.SimpleNamespace(filename=name, skip=0, take=rows, examples_in_shard=rows)

        groups = [group["shards"] for group in self.manifest["groups"]]
        return [ArrayRecordDataSource(list(map(whole, shards))) if shards else () for shards in groups]

    def _read(self, group: int, rank: int) -> bytes:
        try:
            record = self._readers[group][rank]
        except (RuntimeError, OSError) as error:
            raise BadRecordError(f"the row cannot be read ({' '.join(str(error).split())})") from None
        if len(record) < self._sizes[group]:
            raise BadRecordError(f"the row has {len(record)} bytes, its arrays {self._sizes[group]}")
        return record


def open(path: str | Path) -> Cached:
    """The cache in the folder `path`.

    Raises:
      BadArgument: no such folder, or not a finished cache.
      LcmError: another format, shards missing or cut short, array_record not installed.
    """
    path = files.expanded(path).absolute()
    check_reader(path)
    manifest = read_manifest(path)
    _check_numbers(manifest, path)
    for shard in (shard for group in manifest["groups"] for shard in group["shards"]):
        file = files.inside(path, shard["file"])
        found = file.stat().st_size if file.is_file() else None
        if found != shard["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, {shard['bytes']} were written"
            raise LcmError(f"{file} {state}; copy the cache again, or remove {path} and precompute again")
    files.allow_open_files(sum(len(group["shards"]) for group in manifest["groups"]))
    return Cached(path, manifest)


def check_reader(path: Path, argument: str = "path") -> None:
    """Raises LcmError if array_record is not installed, or cannot open files in the folder `path` (of `argument`)."""
    try:
        import array_record.python.array_record_module  # noqa: F401
    except ImportError:
        raise LcmError("a latent cache needs array_record: pip install 'lcm_jax[data]'") from None
    check_name(path, argument)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
      BadArgument: there is none. LcmError: it has another format.
    """
    if not path.is_dir():
        raise BadArgument("path", path, "not a folder; give the --out of lcm_jax.precompute")
    if not (path / MANIFEST).is_file():
        raise BadArgument(
            "path",
            path,
            f"has no {MANIFEST}, so it is not a latent cache or not finished; if it is unfinished, run the same "
            "lcm_jax.precompute command again to resume it",
        )
    manifest = foreign.read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise LcmError(
            f"{path} is a latent cache of format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "precompute again, or use the version that wrote it"
        )
    return manifest


def _check_numbers(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises LcmError if the manifest lacks a part, or its rows, shapes and dtypes cannot be those of arrays."""
    try:
        rows = [(group["rows"], [shard["rows"] for shard in group["shards"]]) for group in manifest["groups"]]
        sizes = [size for array in manifest["arrays"] for shape in array["shapes"] for size in shape]
        counts = [*manifest["examples"], *(count for whole, parts in rows for count in (whole, *parts))]
        good = all(type(n) is int and n >= 0 for n in counts + sizes) and all(n == sum(parts) for n, parts in rows)
        shards = [shard for group in manifest["groups"] for shard in group["shards"]]
        good &= all(type(shard["file"]) is str and type(shard["bytes"]) is int for shard in shards)
        good &= all(len(array["shapes"]) == len(rows) for array in manifest["arrays"])
        good &= {array["dtype"] for array in manifest["arrays"]} <= {*DTYPES, "int32"}
        good &= {type(array["name"]) for array in manifest["arrays"]} <= {str} and manifest["text"] in TEXTS
        good &= all(type(manifest[name]) is kind for name, kind in _PARTS.items())
    except (TypeError, KeyError):
        good = False
    if not good:
        raise LcmError(f"the content of {path / MANIFEST} is not that of a cache; copy the cache again")


def fingerprint(
    pipeline: Pipeline, params: PipelineParams, resolution: int, sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """What determines how images and captions are encoded: a cache and the run that reads it must agree in it.

    {"resolution", "sizes" (h, w of each group), "time_ids", "scaling_factor", "vae", "tokenizers", "text_encoders"};
    models and tokenizers are hashes of their weights and vocabularies. Values are as JSON returns them.
    """
    return {
        "resolution": resolution,
        "sizes": [list(size) for size in sizes],
        "time_ids": pipeline.is_xl,
        "scaling_factor": pipeline.vae.scaling_factor,
        "vae": weights_hash(params["vae"]),
        "tokenizers": {name: t.vocabulary_hash() for name, t in pipeline.tokenizers.items()},
        "text_encoders": {name: weights_hash(params[name]) for name in pipeline.tokenizers},
    }


def check_fit(manifest: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a cache that was encoded by other models, or in another size, than the run's.

    Args:
      manifest: of the cache.
      wanted: `fingerprint` of the run. The text encoders count only if the cache holds embeddings.
      path: of the cache, for the message.

    Raises:
      LcmError: names the part of the fingerprint, both values, and the remedy.
    """
    made = manifest["fingerprint"]
    for key, remedy in _REMEDIES.items():
        if key == "text_encoders" and manifest["text"] == "ids":
            continue
        if made.get(key) != wanted[key]:
            raise LcmError(
                f"the latent cache {path} was made with {key} {short(made.get(key))}, the run has "
                f"{short(wanted[key])}; {remedy}, or precompute again"
            )


def short(value: Any) -> str:
    """A value in a message: the beginning of a hash."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(part)}" for key, part in value.items()) + "}"
    return value[:12] if isinstance(value, str) else str(value)


# Writing


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the cache: `ranks` of a group's rows, including those that will turn out unusable."""

    group: int
    number: int
    ranks: range

    @property
    def name(self) -> str:
        return shard_name(self.group, self.number)

    @property
    def note(self) -> Path:
        return Path(PROGRESS, f"{self.name}.json")


def shard_name(group: int, shard: int) -> str:
    return f"latents-{group:02d}-{shard:05d}.array_record"


def shards_of(groups: Sequence[int], size: int) -> tuple[Shard, ...]:
    """The files of a cache with `groups` rows, `size` in each."""
    return tuple(
        Shard(group, number, range(rows)[first : first + size])
        for group, rows in enumerate(groups)
        for number, first in enumerate(range(0, rows, size))
    )


def disk_space(arrays: Sequence[Mapping[str, Any]], shards: Sequence[Shard]) -> int:
    """Bytes that the shards will take, about."""

    def row(group: int) -> int:
        return sum(np.dtype(a["dtype"]).itemsize * math.prod(a["shapes"][group]) for a in arrays)

    return sum(len(s.ranks) * (row(s.group) + _RECORD_OVERHEAD) + _SHARD_OVERHEAD for s in shards)


def check_folder(out: Path) -> None:
    """Raises BadArgument if `out` is a file, or a folder of other things."""
    if out.exists() and not out.is_dir():
        raise BadArgument("out", out, "is a file; choose a folder")
    begun = (out / PROGRESS).is_dir() or (out / MANIFEST).exists()
    if out.exists() and not begun and any(not path.name.startswith(".") for path in out.iterdir()):
        raise BadArgument("out", out, "holds other things; choose a new folder")


def begin(out: Path, plan: Mapping[str, Any]) -> bool:
    """Prepares to write what is missing of `plan`, a value as JSON returns it. False if nothing is missing.

    Raises:
      BadArgument: `out` was begun, or finished, with another plan; it names the keys and both values.
      LcmError: `out` was finished, and shards are missing.
    """
    known, saved = out / PLAN, out / MANIFEST
    before = foreign.read_json(saved if saved.exists() else known) if saved.exists() or known.exists() else plan
    if different := differences(before, plan):
        listed = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in different.items())
        raise BadArgument("out", out, f"was made with other settings ({listed}); use the same, or another folder")
    if saved.exists():
        open(out)  # its shards may be missing, as on a disk that is not mounted
        shutil.rmtree(out / PROGRESS, ignore_errors=True)
        return False
    if not known.exists():
        _write_json(known, plan)
    return True


def differences(before: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{key: (value before, value now)} of the values in which two plans differ.

    The records' digest says whether the data are the same, wherever they are now; older plans have none.
    """
    begun = before.get("records")
    skipped = {"records"} if begun is None else {"data.path"} if begun == plan.get("records") else set()
    old, new = (
        flatten_dict({key: tree.get(key) for key in plan if key not in _NOT_COMPARED}, sep=".")
        for tree in (before, plan)
    )
    pairs = {key: (old.get(key), new.get(key)) for key in sorted((old.keys() | new.keys()) - skipped)}
    return {key: (short(a), short(b)) for key, (a, b) in pairs.items() if a != b}


def pack(row: Mapping[str, np.ndarray], arrays: Iterable[Mapping[str, Any]], about: Mapping[str, str]) -> bytes:
    """One row as the bytes of a record.

    Args:
      row: the arrays.
      arrays: of the manifest.
      about: {"key", "shard", "caption"} of the record that it was made from.

    Raises:
      LcmError: a value that is NaN, or infinite in the dtype that it is to be stored in.
    """
    parts = []
    for name, dtype in ((array["name"], np.dtype(array["dtype"])) for array in arrays):
        with np.errstate(over="ignore"):  # an overflow is the error below
            value = np.asarray(row[name]).astype(dtype)
        if not np.isfinite(value.astype(np.float32)).all():
            raise LcmError(
                f"{about['shard']}: {about['key']}: {name} is not finite in {dtype}; store the cache with dtype=float32"
                ", or if that is set already, let the models compute in float32"
            )
        parts.append(value.tobytes())
    return b"".join([*parts, json.dumps(about).encode()])


def write_shard(path: Path, records: Iterable[bytes]) -> int:
    """Writes a shard completely, or nothing if it fails or `records` raises. Returns the number of records.

    Raises:
      LcmError: it cannot be written, as on a full disk.
    """
    from array_record.python import array_record_module

    count = 0
    with files.new_file(path) as partial:
        with _writing(path):
            writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
        try:
            for record in records:
                with _writing(path):
                    writer.write(record)
                count += 1
        finally:
            with _writing(path):
                writer.close()
        with _writing(path), partial.open("rb") as stream:
            files.sync(stream)
    return count


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises a RuntimeError
        raise LcmError(
            f"{path} cannot be written ({' '.join(str(error).split())}); make room or choose another disk, "
            "the same command resumes after the last complete shard"
        ) from error


def write_note(out: Path, shard: Shard, rows: int, bad_records: Iterable[BadRecord]) -> None:
    """Notes that a shard is finished: its rows, and the records that could not be used."""
    bad = [dataclasses.astuple(record) for record in dict.fromkeys(bad_records)]
    _write_json(out / shard.note, {"rows": rows, "bytes": (out / shard.name).stat().st_size, "faults": bad})


def read_note(out: Path, shard: Shard) -> tuple[int, int, list[BadRecord]] | None:
    """(rows, bytes, bad records) of a finished shard; None if it is not finished."""
    path = out / shard.name
    if not (out / shard.note).exists() or not path.exists():
        return None
    with foreign.reading(out / shard.note, "a note on a shard", "remove it: the shard is written again"):
        found = foreign.read_json(out / shard.note)
        if path.stat().st_size != found["bytes"]:
            return None
        return int(found["rows"]), found["bytes"], [BadRecord(*record) for record in found["faults"]]


def finish(out: Path, plan: Mapping[str, Any], shards: Sequence[Shard], bad: Sequence[BadRecord]) -> tuple[int, int]:
    """Writes the manifest when all shards are finished.

    Args:
      out, plan: as `begin` took them.
      shards: all files of the cache.
      bad: records that indexing had left out before.

    Returns:
      The number of rows, and of records that could not be used.

    Raises:
      LcmError: a shard is not finished, or there are no rows.
    """
    groups = [{"rows": 0, "shards": []} for _ in plan["examples"]]
    for shard in shards:
        note = read_note(out, shard)
        if note is None:
            raise LcmError(f"{out / shard.name} is not finished; run the same command again, in as many processes")
        rows, size, found = note
        groups[shard.group]["rows"] += rows
        groups[shard.group]["shards"].append({"file": shard.name, "rows": rows, "bytes": size})
        bad = [*bad, *found]
    total, bad = sum(group["rows"] for group in groups), list(dict.fromkeys(bad))
    if not total:
        raise LcmError(f"none of {sum(plan['examples'])} records can be used; the first: {bad[0]}")
    _list_bad_records(out, bad)
    for partial in out.glob(".*.partial"):  # of processes that were killed
        partial.unlink()
    _write_json(out / MANIFEST, {"format": FORMAT, **plan, "groups": groups, "faults": len(bad)})
    shutil.rmtree(out / PROGRESS)
    return total, len(bad)


def _list_bad_records(out: Path, bad: Sequence[BadRecord]) -> None:
    """Replaces bad_records.jsonl by all bad records in the data's order, whichever process and run found them."""
    for path in out.glob(f"{Path(BAD_RECORDS).stem}*.jsonl"):
        path.unlink()
    if bad:
        with files.new_file(out / BAD_RECORDS) as partial:
            files.write_text(partial, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in bad))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with files.new_file(path) as partial:
        files.write_text(partial, json.dumps(value, indent=1) + "\n")
