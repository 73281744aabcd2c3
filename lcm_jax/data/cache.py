"""The latent cache on disk: pictures and captions that were encoded once, as rows that training reads at random.

    DIR/manifest.json                      written last: without it the cache is unfinished
    DIR/latents-GG-SSSSS.array_record      shard S of group G (an aspect bucket; 00 where there are none)
    DIR/bad_records.jsonl                  what could not be encoded, where there is any

A record is one row: its arrays as little-endian bytes one after another, in the manifest's order and with its dtypes
and shapes, then a JSON object {"key", "shard", "caption"} that says what it was made of. The manifest:

    format, made_by      version of this layout; the package that wrote it
    fingerprint          what decides how pictures and captions are encoded, see `check_fit`
    text                 "ids": token ids, encoded while training; "embeddings": encoded already
    arrays               [{"name", "dtype", "shapes": [of a row, for each group]}]
    groups               [{"rows", "shards": [{"file", "rows", "bytes"}]}]
    examples             records in each group
    variants             rows of one record (other crops, flips and captions), one after another
    data, seed, ...      what the rows were made of, and how
    faults               number of records that could not be used

`cache_writing.py` writes it.

Writing a latent cache, shard by shard, so that it can be stopped anywhere and come out the same.

    DIR/progress/plan.json       what the cache will hold: the manifest but for what comes of it
    DIR/progress/SHARD.json      SHARD is finished: {"rows", "bytes", "faults": [[shard, key, reason]]}

A shard has its name when it is whole, and its note after that. When all have theirs, the manifest is written and the
folder `progress` goes. See `cache.py` for what is left then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax import files
from lcm_jax.data.records import BadRecord, Fault
from lcm_jax.errors import LcmError

FORMAT = 1
MANIFEST = "manifest.json"
TEXTS = ("ids", "embeddings")
DTYPES = ("float32", "float16", "bfloat16")
_WAYS_OUT = {
    "resolution": "set --config.data.resolution to the cache's, or precompute again",
    "sizes": "set --config.data.aspect_buckets, bucket_step and bucket_max_aspect to the cache's, or precompute again",
    "time_ids": "the cache is of another family of models (SDXL or not); precompute again",
    "scaling_factor": "set --config.model.vae to the one it was made with, or precompute again",
    "vae": "set --config.model.vae to the one it was made with, or precompute again",
    "tokenizers": "set --config.model.teacher to a model with the same tokenizers, or precompute again",
    "text_encoders": "set --config.model.teacher to a model with the same text encoders, or precompute again",
}


def shard_name(group: int, shard: int) -> str:
    return f"latents-{group:02d}-{shard:05d}.array_record"


class Cached:
    """The rows of a cache: `loader.Examples`, and its `manifest`. See `open`.

    Rows are {"mean", "logvar"} float32 [h w c], unscaled, with {token ids int32 [l] by text encoder} or
    {"encoder_hidden_states" float32 [l d] (and SDXL's "text_embeds" [d])}, and SDXL's "time_ids" float32 [6]. What is
    stored in half precision is float32 when it is read.
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
        return {name: value for name, value in vars(self).items() if name != "_readers"}

    def __len__(self) -> int:
        return sum(self.groups)

    @functools.cached_property
    def _readers(self) -> list[Any]:
        """array_record's random access to each group; it opens a shard when it is first read."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return [
            ArrayRecordDataSource([_Shard(str(self.path / s["file"]), s["rows"], s["rows"]) for s in group["shards"]])
            if group["shards"]
            else ()
            for group in self.manifest["groups"]
        ]

    def row(self, group: int, rank: int, draws: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Arrays of one row, read-only; nothing about it is random. Raises BadRecord."""
        del draws
        record, offset, row = self._read(group, rank), 0, {}
        for name, dtype, shape in self._layouts[group]:
            count = math.prod(shape)
            value = np.frombuffer(record, dtype, count, offset).reshape(shape)
            row[name] = value.astype(np.float32) if dtype.itemsize == 2 else value
            offset += count * dtype.itemsize
        return row

    def about(self, group: int, rank: int) -> dict[str, str]:
        """{"key", "shard", "caption"} of the record that a row was made of. Raises BadRecord."""
        try:
            return json.loads(self._read(group, rank)[self._sizes[group] :])
        except ValueError as error:
            raise BadRecord(f"the row's description cannot be read ({error})") from None

    def where(self, group: int, rank: int) -> tuple[str, str]:
        """(shard, key) of the record that a row was made of; the row's own place where that cannot be read."""
        try:
            about = self.about(group, rank)
            return about["shard"], about["key"]
        except BadRecord:
            return str(self.path), f"row {rank} of group {group}"

    def _read(self, group: int, rank: int) -> bytes:
        try:
            record = self._readers[group][rank]
        except (RuntimeError, OSError) as error:
            raise BadRecord(f"the row cannot be read ({' '.join(str(error).split())})") from None
        if len(record) < self._sizes[group]:
            raise BadRecord(f"the row has {len(record)} bytes, its arrays {self._sizes[group]}")
        return record


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A whole shard, as array_record takes one whose length is known: without opening it."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


def open(path: str | Path) -> Cached:
    """The cache in the folder `path`.

    Raises:
      LcmError: no such folder, unfinished, of another format, shards missing or cut short, array_record not installed.
    """
    path = Path(path).expanduser().absolute()
    check_reader()
    manifest = read_manifest(path)
    _check_numbers(manifest, path)
    for shard in (shard for group in manifest["groups"] for shard in group["shards"]):
        file = files.inside(path, shard["file"])
        found = file.stat().st_size if file.is_file() else None
        if found != shard["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes where {shard['bytes']} were written"
            raise LcmError(f"{file} {state}; copy the cache again, or remove {path} and precompute again")
    files.allow_open_files(sum(len(group["shards"]) for group in manifest["groups"]))
    return Cached(path, manifest)


def _check_numbers(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises LcmError where the manifest's rows and shapes cannot be those of arrays."""
    try:
        rows = [(group["rows"], [shard["rows"] for shard in group["shards"]]) for group in manifest["groups"]]
        sizes = [size for array in manifest["arrays"] for shape in array["shapes"] for size in shape]
        counts = [count for whole, parts in rows for count in (whole, *parts)]
        good = all(type(n) is int and n >= 0 for n in counts + sizes) and all(n == sum(parts) for n, parts in rows)
    except (TypeError, KeyError):
        good = False
    if not good:
        raise LcmError(f"the rows or shapes in {path / MANIFEST} are not those of a cache; copy the cache again")


def check_reader() -> None:
    """Raises LcmError where array_record is not installed."""
    try:
        import array_record.python.array_record_module  # noqa: F401
    except ImportError:
        raise LcmError("a latent cache needs array_record: pip install 'lcm_jax[data]'") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished cache. Raises LcmError where there is none, or one of another format."""
    if not path.is_dir():
        raise LcmError(f"{path} is no folder; --config.data.path is the --out of lcm_jax.precompute")
    if not (path / MANIFEST).is_file():
        raise LcmError(
            f"{path} has no {MANIFEST}: it is no latent cache, or an unfinished one; run the same "
            "lcm_jax.precompute command again, it goes on where it was stopped"
        )
    manifest = files.read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise LcmError(
            f"{path} is a latent cache of format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "precompute again, or use the version that wrote it"
        )
    return manifest


def check_fit(manifest: Mapping[str, Any], fingerprint: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a cache that was encoded by other models, or in another size, than the run's.

    Args:
      manifest: of the cache.
      fingerprint: of the run, see `lcm_jax.data.encoding.fingerprint`. The text encoders count only where the cache
        holds embeddings.

    Raises:
      LcmError: names the key, both values, and the way out.
    """
    made = manifest["fingerprint"]
    for key, way_out in _WAYS_OUT.items():
        if key == "text_encoders" and manifest["text"] == "ids":
            continue
        if made.get(key) != fingerprint[key]:
            raise LcmError(
                f"the latent cache {path} was made with {key} {short(made.get(key))}, the run's is "
                f"{short(fingerprint[key])}; {way_out}"
            )


def short(value: Any) -> str:
    """A value in a message: hashes by their beginning."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(part)}" for key, part in value.items()) + "}"
    return value[:12] if isinstance(value, str) else str(value)


PROGRESS = "progress"
PLAN = Path(PROGRESS, "plan.json")
BAD_RECORDS = "bad_records.jsonl"

_OPTIONS = "group_size:1,uncompressed"  # one read for one record; noise does not compress
_RECORD_OVERHEAD = 1 << 10  # bytes of a record beside its arrays, about
_SHARD_OVERHEAD = 1 << 18  # array_record pads its files to whole blocks
_FOLLOWING = ("made_by", "arrays")  # of a plan: the version, which may change, and what follows from the rest


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the cache: `ranks` of a group's rows, those that cannot be made among them."""

    group: int
    number: int
    ranks: range

    @property
    def name(self) -> str:
        return shard_name(self.group, self.number)

    @property
    def note(self) -> Path:
        return Path(PROGRESS, f"{self.name}.json")


def shards_of(groups: Sequence[int], size: int) -> tuple[Shard, ...]:
    """The files of a cache with `groups` rows, `size` in each."""
    return tuple(
        Shard(group, number, range(rows)[first : first + size])
        for group, rows in enumerate(groups)
        for number, first in enumerate(range(0, rows, size))
    )


def space(arrays: Sequence[Mapping[str, Any]], shards: Sequence[Shard]) -> int:
    """Bytes that the shards will take, about."""

    def row(group: int) -> int:
        return sum(np.dtype(a["dtype"]).itemsize * math.prod(a["shapes"][group]) for a in arrays)

    return sum(len(s.ranks) * (row(s.group) + _RECORD_OVERHEAD) + _SHARD_OVERHEAD for s in shards)


def check_folder(out: Path) -> None:
    """Raises LcmError where `out` is a file, or a folder of other things."""
    if out.exists() and not out.is_dir():
        raise LcmError(f"--out={out} is a file; choose a folder")
    begun = (out / PROGRESS).is_dir() or (out / MANIFEST).exists()
    if out.exists() and not begun and any(not path.name.startswith(".") for path in out.iterdir()):
        raise LcmError(f"--out={out} holds other things; choose a new folder")


def begin(out: Path, plan: Mapping[str, Any]) -> bool:
    """Makes ready to write what is missing of `plan` (as it comes back from JSON); False where nothing is.

    Raises:
      LcmError: `out` was begun, or finished, with another plan; names the keys and both values. It was finished, and
        shards are missing.
    """
    known, saved = out / PLAN, out / MANIFEST
    before = files.read_json(saved if saved.exists() else known) if saved.exists() or known.exists() else plan
    if different := differences(before, plan):
        listed = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in different.items())
        raise LcmError(f"--out={out} was made with other settings ({listed}); use the same, or another folder")
    if saved.exists():
        open(out)  # its shards may be gone, on a disk that is not mounted
        shutil.rmtree(out / PROGRESS, ignore_errors=True)
        return False
    if not known.exists():
        _write_json(known, plan)
    return True


def differences(before: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{key: (value before, value now)} where two plans differ."""
    old, new = (
        flatten_dict({key: tree.get(key) for key in plan if key not in _FOLLOWING}, sep=".") for tree in (before, plan)
    )
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
    return {key: (short(a), short(b)) for key, (a, b) in pairs.items() if a != b}


def pack(row: Mapping[str, np.ndarray], arrays: Iterable[Mapping[str, Any]], about: Mapping[str, str]) -> bytes:
    """One row as the bytes of a record.

    Args:
      row: the arrays.
      arrays: of the manifest.
      about: {"key", "shard", "caption"} of the record that it was made of.

    Raises:
      LcmError: a value that is NaN, or infinite in the dtype it is to be stored in.
    """
    parts = []
    for name, dtype in ((array["name"], np.dtype(array["dtype"])) for array in arrays):
        with np.errstate(over="ignore"):  # told below
            value = np.asarray(row[name]).astype(dtype)
        if not np.isfinite(value.astype(np.float32)).all():
            raise LcmError(
                f"{about['shard']}: {about['key']}: {name} is not finite in {dtype}; use --dtype=float32, "
                "and if it is so already --config.model.dtype=float32"
            )
        parts.append(value.tobytes())
    return b"".join([*parts, json.dumps(about).encode()])


def write_shard(path: Path, records: Iterable[bytes]) -> int:
    """Writes a shard, the whole of it or nothing: also where `records` raises. The number of records.

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
    except (OSError, RuntimeError) as error:  # array_record's own is a RuntimeError
        raise LcmError(
            f"{path} cannot be written ({' '.join(str(error).split())}); make room or choose another disk, "
            "the same command goes on from the last whole shard"
        ) from error


def note(out: Path, shard: Shard, rows: int, faults: Iterable[Fault]) -> None:
    """Notes that a shard is finished: its rows, and what could not be among them."""
    told = [dataclasses.astuple(fault) for fault in dict.fromkeys(faults)]
    _write_json(out / shard.note, {"rows": rows, "bytes": (out / shard.name).stat().st_size, "faults": told})


def noted(out: Path, shard: Shard) -> tuple[int, int, list[Fault]] | None:
    """(rows, bytes, faults) of a finished shard; None where it is not finished."""
    path = out / shard.name
    if not (out / shard.note).exists() or not path.exists():
        return None
    found = files.read_json(out / shard.note)
    if path.stat().st_size != found["bytes"]:
        return None
    return found["rows"], found["bytes"], [Fault(*fault) for fault in found["faults"]]


def finish(out: Path, plan: Mapping[str, Any], shards: Sequence[Shard], faults: Sequence[Fault]) -> tuple[int, int]:
    """Writes the manifest, when all shards are finished.

    Args:
      out, plan: as `begin` took them.
      shards: all files of the cache.
      faults: what the source had left out before.

    Returns:
      The number of rows, and of records that could not be used.

    Raises:
      LcmError: a shard is not finished, or no row was made.
    """
    groups = [{"rows": 0, "shards": []} for _ in plan["examples"]]
    for shard in shards:
        state = noted(out, shard)
        if state is None:
            raise LcmError(f"{out / shard.name} is not finished; run the same command again, in as many processes")
        rows, size, found = state
        groups[shard.group]["rows"] += rows
        groups[shard.group]["shards"].append({"file": shard.name, "rows": rows, "bytes": size})
        faults = [*faults, *found]
    total, faults = sum(group["rows"] for group in groups), list(dict.fromkeys(faults))
    if not total:
        raise LcmError(f"none of {sum(plan['examples'])} records can be used; the first: {faults[0]}")
    list_faults(out, faults)
    for partial in out.glob(".*.partial"):  # of processes that were killed
        partial.unlink()
    _write_json(out / MANIFEST, {"format": FORMAT, **plan, "groups": groups, "faults": len(faults)})
    shutil.rmtree(out / PROGRESS)
    return total, len(faults)


def list_faults(out: Path, faults: Sequence[Fault]) -> None:
    """bad_records.jsonl anew: all faults in the data's order, whichever process found them, and in which run."""
    for path in out.glob(f"{Path(BAD_RECORDS).stem}*.jsonl"):
        path.unlink()
    if faults:
        with files.new_file(out / BAD_RECORDS) as partial:
            files.write_text(partial, "".join(json.dumps(dataclasses.asdict(fault)) + "\n" for fault in faults))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with files.new_file(path) as partial:
        files.write_text(partial, json.dumps(value, indent=1) + "\n")
