"""Writing a latent cache, shard by shard, so that it can be stopped anywhere and come out the same.

    DIR/progress/plan.json       what the cache will hold: the manifest but for what comes of it
    DIR/progress/SHARD.json      SHARD is finished: {"rows", "bytes", "faults": [[shard, key, reason]]}

A shard has its name when it is whole, and its note after that. When all have theirs, the manifest is written and the
folder `progress` goes. See `cache.py` for what is left then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax import files
from lcm_jax.data import cache
from lcm_jax.data.records import Fault
from lcm_jax.errors import LcmError

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
        return cache.shard_name(self.group, self.number)

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
    begun = (out / PROGRESS).is_dir() or (out / cache.MANIFEST).exists()
    if out.exists() and not begun and any(not path.name.startswith(".") for path in out.iterdir()):
        raise LcmError(f"--out={out} holds other things; choose a new folder")


def begin(out: Path, plan: Mapping[str, Any]) -> bool:
    """Makes ready to write what is missing of `plan` (as it comes back from JSON); False where nothing is.

    Raises:
      LcmError: `out` was begun, or finished, with another plan; names the keys and both values. It was finished, and
        shards are missing.
    """
    known, saved = out / PLAN, out / cache.MANIFEST
    before = files.read_json(saved if saved.exists() else known) if saved.exists() or known.exists() else plan
    if different := differences(before, plan):
        listed = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in different.items())
        raise LcmError(f"--out={out} was made with other settings ({listed}); use the same, or another folder")
    if saved.exists():
        cache.open(out)  # its shards may be gone, on a disk that is not mounted
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
    return {key: (cache.short(a), cache.short(b)) for key, (a, b) in pairs.items() if a != b}


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
    _write_json(out / cache.MANIFEST, {"format": cache.FORMAT, **plan, "groups": groups, "faults": len(faults)})
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
