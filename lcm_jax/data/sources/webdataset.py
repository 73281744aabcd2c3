"""Tar shards as img2dataset writes them (the webdataset layout), with random access.

`path` is one or several, by commas or as a list, of: a file, a folder (its *.tar), a glob, a brace pattern as in bash
(`laion-{00000..00099}.tar`, `{a,b}/{0..9}.tar`, nested too); what exists as it is written is no pattern. A shard is
read once even if it is named twice. Records come in the order of the shards and of the members in each tar. If a key
and its image occur more than once, only the first record is used, across all shards; other images of the same key,
as in two downloads that were numbered alike, are used as KEY#2 and so on. What is known of a record without reading it
comes from an index beside its shard: `tar_index`.
"""

from __future__ import annotations

import collections
import functools
import glob
import itertools
import operator
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lcm_jax import files
from lcm_jax.data.records import BadRecord, BadRecordError, Record, digest_of
from lcm_jax.data.sources import parsing, tar_index
from lcm_jax.data.sources.tar_index import ShardIndex
from lcm_jax.errors import BadArgument

MAX_NAMES = 1_000_000  # of shards that a pattern stands for: LAION-5B has 232,000
MAX_OPEN = 64  # shards a process keeps open at once
_THREADS = 8  # that index shards; they wait for the disk, or for each other if the disk is quick

_PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz|txz|zip)$")
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?")


def open(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
    index_dir: str | os.PathLike | None = None,
) -> TarSource:
    """The records of tar shards.

    Args:
      path: shards, as in the module's docstring.
      image_key: suffix of the images, "jpg"; None: a key's first member with an image's suffix.
      caption_key: suffix of the texts ("txt", "caption.txt"), or a field of the JSON if a key has no such member; None:
        the .txt, .caption or .text, or "caption" in JSON if there are none.
      index_dir: folder for the indices; None: each beside its shard.

    Raises:
      BadArgument: nothing is found under `path`, a shard holds no images or captions, an index cannot be written, no
        record is usable.
      LcmError: a shard cannot be read.
    """
    shards = find_shards(path)
    folder = None if index_dir is None else files.expanded(index_dir)
    sidecars = [tar_index.sidecar_path(shard, folder) for shard in shards]
    source = TarSource(shards, _indices(shards, sidecars, image_key, caption_key), caption_key)
    if not len(source):
        bad = source.bad_records
        first = f"; the first of {len(bad)} unusable ones: {bad[0]}" if bad else ""
        raise BadArgument("path", path, f"no usable record in {len(shards)} tar shards{first}")
    return source


class TarSource:
    """Random access to the records of indexed shards. It holds arrays and names, no open files."""

    def __init__(self, shards: Sequence[Path], indices: Sequence[ShardIndex], caption_key: str | None = None) -> None:
        """`indices` [number of shards]; records with key and image of an earlier one become bad records."""
        self._shards = tuple(map(str, shards))
        self._states = tuple((index.size, index.mtime_ns) for index in indices)
        self._caption_key = caption_key
        kept, earlier, repeats = _repeated(self._shards, self._states, indices)
        bounds = list(itertools.pairwise(_starts([index.keys for index in indices])))
        self._keys = [
            _numbered(index.keys, earlier[a:b])[kept[a:b]] for index, (a, b) in zip(indices, bounds, strict=True)
        ]
        self._starts = _starts(self._keys)
        self._spans = np.concatenate([index.spans for index in indices])[kept]
        self._is_json = np.concatenate([index.is_json for index in indices])[kept]
        self._fields = {name: column[kept] for name, column in _columns(indices).items()}
        self.bad_records = (
            *(
                BadRecord(shard, key, reason)
                for shard, index in zip(self._shards, indices, strict=True)
                for key, reason in index.bad_records
            ),
            *repeats,
        )
        unused = sum((collections.Counter(index.unused) for index in indices), collections.Counter())
        self.notes = tuple(f"{count} x {kind} in the tars" for kind, count in sorted(unused.items()))
        self.notes += tuple(parsing.rare(_counts(indices)))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> Record:
        shard, key = self._shard_and_key(number)
        offset, size, caption_offset, caption_size = map(int, self._spans[number])
        file = _handle(self._shards[shard], *self._states[shard])
        caption = file.bytes_at(caption_offset, caption_size)
        captions = tar_index.caption_in(caption, bool(self._is_json[number]), self._caption_key)
        return Record(key, file.bytes_at(offset, size), captions, parsing.row_of(self._fields, number))

    def field(self, name: str) -> np.ndarray | None:
        column = self._fields.get(name)
        return None if column is None or np.isnan(column).all() else column

    def where(self, number: int) -> tuple[str, str]:
        shard, key = self._shard_and_key(number)
        return self._shards[shard], key

    def digest(self) -> str:
        keys = b"\0".join(b"\0".join(keys.tolist()) for keys in self._keys if len(keys))
        return digest_of(keys, self._spans[:, 1::2], self._is_json)

    def _shard_and_key(self, number: int) -> tuple[int, str]:
        number = operator.index(number)
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, self._keys[shard][number - self._starts[shard]].decode()


class _Handle:
    """An open shard. It closes when no thread uses it any more, which may be after the cache has dropped it."""

    def __init__(self, shard: str, state: tuple[int, int]) -> None:
        self.fd = -1
        try:
            self.fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadRecordError(f"the shard cannot be opened ({error.strerror})") from None
        found = os.fstat(self.fd)
        if (found.st_size, found.st_mtime_ns) != state:
            raise BadRecordError("the shard has changed since it was indexed")

    def bytes_at(self, offset: int, size: int) -> bytes:
        if size > parsing.MAX_BYTES:
            raise BadRecordError(f"a member of {size} bytes; at most {parsing.MAX_BYTES} are read")
        try:
            content = os.pread(self.fd, size, offset)  # moves no file position: threads may share the handle
        except OSError as error:
            raise BadRecordError(f"the shard cannot be read at byte {offset} ({error.strerror})") from None
        if len(content) != size:
            raise BadRecordError(f"the shard has changed since it was indexed: it ends before byte {offset + size}")
        return content

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@functools.lru_cache(maxsize=MAX_OPEN)
def _handle(shard: str, size: int, mtime_ns: int) -> _Handle:
    return _Handle(shard, (size, mtime_ns))


def _starts(per_shard: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, per_shard)])


def _counts(indices: Sequence[ShardIndex]) -> collections.Counter[str]:
    """Name of a number -> how many records have it."""
    found: collections.Counter[str] = collections.Counter()
    for index in indices:
        found.update({name: int(np.sum(~np.isnan(column))) for name, column in index.fields.items()})
    return found


def _columns(indices: Sequence[ShardIndex]) -> dict[str, np.ndarray]:
    names = parsing.most_frequent(_counts(indices))
    missing = [np.full(len(index.keys), np.nan) for index in indices]
    return {
        name: np.concatenate([index.fields.get(name, gap) for index, gap in zip(indices, missing, strict=True)])
        for name in names
    }


def _repeated(
    shards: Sequence[str], states: Sequence[tuple[int, int]], indices: Sequence[ShardIndex]
) -> tuple[np.ndarray, np.ndarray, list[BadRecord]]:
    """Which records are used, bool [n over all shards]; how many earlier ones have their key, int64 [n]; the others.

    A record is not used if an earlier one has its key and its image, byte for byte. Only images of one key and one
    size are read for it.
    """
    starts = _starts([index.keys for index in indices])
    hashes = np.concatenate([index.hashes for index in indices])
    sizes = np.concatenate([index.spans[:, 1] for index in indices])
    order = np.argsort(hashes, kind="stable")
    first = np.append(True, np.diff(hashes[order]) != 0)[: len(order)]  # of its key
    group = np.cumsum(first) - 1
    earlier = np.zeros(len(hashes), np.int64)
    earlier[order] = np.arange(len(order)) - np.flatnonzero(first)[group]
    kept, bad = np.ones(len(hashes), bool), []

    def image(shard: int, row: int) -> bytes | None:
        try:
            return _handle(shards[shard], *states[shard]).bytes_at(*map(int, indices[shard].spans[row, :2]))
        except BadRecordError:  # found again when it is read
            return None

    found: dict[tuple[bytes, int], list[tuple[int, int]]] = {}  # key, size -> (shard, row) of different images
    numbers = parsing.repeated(hashes, sizes)
    for number in tqdm(numbers.tolist(), "repeated keys", unit=" records", disable=None):
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        place = shard, int(number - starts[shard])
        key = bytes(indices[shard].keys[place[1]])
        others = found.setdefault((key, int(sizes[number])), [])
        content = image(*place) if others else None
        twin = next((other for other in others if content is not None and content == image(*other)), None)
        if twin is None:
            others.append(place)
        else:
            kept[number] = False
            bad.append(BadRecord(shards[shard], key.decode(), f"its key and image occur already in {shards[twin[0]]}"))
    return kept, earlier, bad


def _numbered(keys: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """S [n]: the second record of a key is KEY#2, and so on."""
    if not earlier.any():
        return keys
    numbers = np.char.add(b"#", (earlier + 1).astype(np.bytes_))
    return np.char.add(keys, np.where(earlier > 0, numbers, b""))


def _indices(
    shards: Sequence[Path], sidecars: Sequence[Path], image_key: str | None, caption_key: str | None
) -> list[ShardIndex]:
    """The shards' indices; missing and outdated ones are made."""
    found = [
        tar_index.read(shard, sidecar, image_key, caption_key) for shard, sidecar in zip(shards, sidecars, strict=True)
    ]
    missing = [number for number, index in enumerate(found) if index is None]
    if not missing:
        return found

    def make(number: int) -> ShardIndex:
        return tar_index.make(shards[number], sidecars[number], image_key, caption_key)

    bar = tqdm(total=len(missing), desc="indexing", unit="shard", file=sys.stderr, disable=None, dynamic_ncols=True)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        try:
            for number, index in zip(missing, pool.map(make, missing), strict=True):
                found[number] = index
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def find_shards(path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """The files that `path` names, each once, in order: see the module's docstring.

    Raises:
      BadArgument: one of its patterns names nothing, a file that does not exist, or more than MAX_NAMES.
    """
    if isinstance(path, str) and not _is_one(path):
        path = [part.strip() for part in _at_commas(path)]
    patterns = [path] if isinstance(path, str | os.PathLike) else path
    names = [name for pattern in patterns for name in _files_of(os.fspath(pattern))]
    if not names:
        raise BadArgument("path", path, "names no tar shards")
    once = {os.path.realpath(name): Path(name).absolute() for name in reversed(names)}  # the first of two names
    return list(dict.fromkeys(once[os.path.realpath(name)] for name in names))


def _is_one(path: str) -> bool:
    """Whether a path names files as it is, commas in their names included."""
    try:
        names = itertools.islice(expand_braces(path), 1000)
    except BadArgument:  # of three patterns of 1000 shards each it would be a thousand million names
        names = ()
    return any(map(parsing.matching, [path, *names]))


def _files_of(pattern: str) -> list[str]:
    literal = bool(parsing.matching(pattern))
    if not literal and ("://" in pattern or pattern.startswith("pipe:")):
        raise BadArgument("path", pattern, "tar shards are read from disks only; download or mount them")
    expanded = [pattern] if literal else expand_braces(pattern)
    missing = [name for name in expanded if not os.path.exists(name) and not glob.has_magic(name)]
    if missing:
        count = f" ({len(missing)} of {len(expanded)} files are missing; a glob takes those that exist)"
        raise BadArgument("path", pattern, f"no tar shard {missing[0]!r}{count if len(expanded) > 1 else ''}")
    return [file for name in expanded for file in _matches(name)]


def _matches(name: str) -> list[str]:
    """The shards that a file, a folder or a glob stands for, of which there is at least one."""
    if os.path.isfile(name):
        return [name]
    found = parsing.matching(os.path.join(name, "*.tar") if os.path.isdir(name) else name)
    if not found:
        packed = list(filter(_PACKED.search, parsing.matching(os.path.join(name, "*"))))
        deeper = os.path.join(name, "**", "*.tar")
        hint = f", but {len(packed)} as {os.path.basename(packed[0])}; unpack them to .tar" if packed else ""
        if not packed and os.path.isdir(name) and parsing.matching(deeper):
            hint = f", but some are below it; give {deeper}"
        raise BadArgument("path", name, f"no tar shard matches it{hint}")
    return found


def _at_commas(text: str) -> list[str]:
    """`text` cut at the commas outside braces."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def expand_braces(pattern: str) -> list[str]:
    """Bash's brace expansion: lists, ranges of integers with leading zeros and a step, nested, several of them.

    Braces with neither a comma nor a range stay as they are, as do those without a partner.

    Raises:
      BadArgument: more than MAX_NAMES.
    """
    start = pattern.find("{")
    while start >= 0:
        end = _partner(pattern, start)
        inside = pattern[start + 1 : end] if end else ""
        heads = _numbers(inside) or _alternatives(inside)
        if heads:
            tails = expand_braces(pattern[end + 1 :])
            _check_count(len(heads) * len(tails), pattern)
            return [pattern[:start] + head + tail for head in heads for tail in tails]
        start = pattern.find("{", start + 1)
    return [pattern]


def _check_count(count: int, pattern: str) -> None:
    if count > MAX_NAMES:
        problem = f"stands for {count} names, at most {MAX_NAMES} are taken; give a folder, or fewer"
        raise BadArgument("path", pattern[:200], problem)


def _partner(text: str, start: int) -> int | None:
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return end
    return None


def _numbers(inside: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if not found:
        return []
    first, last = int(found[1]), int(found[2])
    step = abs(int(found[3] or 1)) or 1
    _check_count(abs(last - first) // step + 1, inside)
    padded = any(re.match(r"-?0\d", end) for end in found.group(1, 2))
    width = max(map(len, found.group(1, 2))) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _alternatives(inside: str) -> list[str]:
    parts = _at_commas(inside)
    return [whole for part in parts for whole in expand_braces(part)] if len(parts) > 1 else []
