"""Where the records of a tar shard are: one pass over its headers, kept in a file beside the shard.

A shard holds groups of members as img2dataset writes them,

    000000123.jpg  000000123.txt  000000123.json     key.suffix, the key ending at the first dot of the base name

and its sidecar, an uncompressed npz, holds for its n usable records

    keys      S [n]         hashes   uint64 [n]      BLAKE2 of the key, which finds repeated keys over many shards
    spans     int64 [n 4]   offset and size of the image, offset and size of what holds the caption, in bytes
    is_json   bool [n]      the caption is a field of the JSON member, else the text of a member
    fields    float64 [f n] numbers in the JSON members, NaN where one is missing
    header    JSON of: format version, size and mtime of the shard, keys asked for, names of fields, bad records; counts
              of members that are not used

All sidecars of one shard are equal byte for byte, the reasons of bad records included: a change of their wording would
change the files. In a damaged tar the members before and after the damage are read; the gap is a bad record that names
the first byte lost.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import hashlib
import io
import json
import os
import posixpath
import stat
import tarfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcm_jax import files, foreign
from lcm_jax.data import images
from lcm_jax.data.records import BadRecordError
from lcm_jax.data.sources import parsing
from lcm_jax.errors import BadArgument, LcmError

VERSION = 3  # of the sidecar; one of another version is replaced

MAX_INDEX = 2**32  # bytes
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20  # bytes searched at once for the next header after damage
_LONGEST_PADDING = 1 << 20  # bytes of zeros that may end a tar; with more, its end was never written
_MAGIC_AT = 257  # of "ustar" in a header
_MAX_HEADER = 1 << 20  # bytes of an extended header, which holds a long name or a few numbers
_SHORT = 1 << 16  # bytes of a text that is kept when it is passed
_MAX_CHAIN = 16  # headers of one member; more than four are of no writer
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_NO_IMAGE, _NO_CAPTION = "no image", "no caption"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The n usable records of one shard, in its order: see the module.

    `bad_records` are (key, reason); `unused` counts members by why they are in no record.
    """

    size: int
    mtime_ns: int
    keys: np.ndarray
    hashes: np.ndarray
    spans: np.ndarray
    is_json: np.ndarray
    fields: dict[str, np.ndarray]
    bad_records: tuple[tuple[str, str], ...]
    unused: dict[str, int]


@dataclasses.dataclass
class _Sample:
    """Members of one key: suffix -> (offset, size), and the content of short text members.

    before: the previous sample of the key. mixed: a member may belong to that one instead.
    """

    key: str
    before: _Sample | None = None
    mixed: bool = False
    members: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    texts: dict[str, bytes] = dataclasses.field(default_factory=dict)


def sidecar_path(shard: Path, index_dir: Path | None) -> Path:
    """Beside the shard, or in `index_dir` under a name that differs for equal names in different folders."""
    if index_dir is None:
        return shard.with_name(f"{shard.name}.index.npz")
    folder = hashlib.blake2b(os.fsencode(os.path.realpath(shard.parent)), digest_size=6).hexdigest()
    return index_dir / f"{shard.name}.{folder}.index.npz"


def make(shard: Path, sidecar: Path, image_key: str | None, caption_key: str | None) -> ShardIndex:
    """`scan` the shard and keep the result as `sidecar`.

    Raises:
      BadArgument, LcmError: as `scan`; the sidecar cannot be written.
    """
    index = scan(shard, image_key, caption_key)
    try:
        with files.new_file(sidecar) as partial:
            partial.write_bytes(_packed(index, image_key, caption_key))
    except OSError as error:
        cause = error.__cause__ or error  # of `CannotWrite`
        problem = f"the index {sidecar.name} cannot be written there ({cause.strerror}); choose another folder"
        raise BadArgument("index_dir", sidecar.parent, problem) from None
    return index


def read(shard: Path, sidecar: Path, image_key: str | None, caption_key: str | None) -> ShardIndex | None:
    """What `sidecar` holds; None if it is missing, or was made of another state of the shard or for other keys.

    None as well if its arrays do not fit each other, or a span does not lie in the shard.

    Raises:
      LcmError: the shard cannot be read.
    """
    try:
        state = shard.stat()
    except OSError as error:
        raise LcmError(f"tar shard {shard} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(state.st_mode):
        raise LcmError(f"tar shard {shard} is not a regular file; remove it")
    try:
        with foreign.reading(sidecar, "an index"):
            arrays = foreign.read_npz(sidecar, MAX_INDEX)
            header = foreign.json_object(arrays["header"].tobytes(), sidecar)
            if header["made_of"] != [VERSION, state.st_size, state.st_mtime_ns, image_key, caption_key]:
                return None
            found = ShardIndex(
                state.st_size,
                state.st_mtime_ns,
                arrays["keys"],
                arrays["hashes"],
                arrays["spans"],
                arrays["is_json"],
                dict(zip(header["fields"], arrays["fields"], strict=True)),
                tuple((str(key), str(reason)) for key, reason in header["faults"]),
                {str(kind): int(count) for kind, count in header["unused"].items()},
            )
            return found if _fits(found) else None
    except (OSError, LcmError):  # no sidecar, or other bytes
        return None


def _fits(index: ShardIndex) -> bool:
    count, columns = index.keys.size, list(index.fields.values())
    wanted = [
        (index.keys, "S", (count,)),
        (index.hashes, "u8", (count,)),
        (index.spans, "i8", (count, 4)),
        (index.is_json, "b1", (count,)),
        *((column, "f8", (count,)) for column in columns),
    ]
    if any(array.dtype.str.lstrip("<|=")[: len(kind)] != kind or array.shape != shape for array, kind, shape in wanted):
        return False
    offsets, sizes = index.spans[:, ::2], index.spans[:, 1::2]
    return bool(((offsets >= 0) & (sizes >= 0) & (sizes <= index.size - np.minimum(offsets, index.size))).all())


def scan(shard: Path, image_key: str | None = None, caption_key: str | None = None) -> ShardIndex:
    """Find the records of a shard.

    Args:
      image_key: suffix of the images; None: the first member of a key that has an image's suffix.
      caption_key: suffix of the texts, or a field of the JSON members; None: .txt, .caption or .text, or "caption" in
        JSON if there are none.

    Raises:
      LcmError: the file cannot be read, is compressed or still being written.
      BadArgument: it is whole, but holds no images or no captions for these keys.
    """
    losses: list[tuple[str, str]] = []
    unused: collections.Counter = collections.Counter()
    keys, spans, is_json, numbers, bad = [], [], [], [], []
    try:
        with shard.open("rb") as stream:
            state = os.fstat(stream.fileno())
            _refuse_compressed(shard, stream)
            samples = _samples(stream, state.st_size, _texts(caption_key), losses, unused)
            for sample in samples:
                try:
                    span, from_json, row = _record(stream, sample, image_key, caption_key)
                except BadRecordError as error:
                    bad.append((sample.key, str(error)))
                    continue
                bad += [
                    (sample.key, f"a second image, .{suffix}; image_key chooses one")
                    for suffix in _images(sample, image_key)[1:]
                ]
                keys.append(sample.key.encode())
                spans.append(span)
                is_json.append(from_json)
                numbers.append(row)
        after = shard.stat()
    except OSError as error:
        raise LcmError(f"tar shard {shard} cannot be read ({error.strerror})") from None
    if (after.st_size, after.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
        raise LcmError(f"tar shard {shard} is being written to; wait until it is complete")
    if samples and not keys and not losses:
        _check_reasons(shard, samples, {reason for _, reason in bad}, image_key, caption_key)
    if (over := len(parsing.counted(numbers)) - parsing.MAX_FIELDS) > 0:
        unused["number that few records have"] += over
    hashes = [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys]
    return ShardIndex(
        state.st_size,
        state.st_mtime_ns,
        np.array(keys, np.bytes_),
        np.array(hashes, np.uint64),
        np.array(spans, np.int64).reshape(-1, 4),
        np.array(is_json, bool),
        parsing.columns(numbers),
        (*losses, *bad),
        dict(sorted(unused.items())),
    )


def _texts(caption_key: str | None) -> tuple[str, ...]:
    """Suffixes of members whose text is the caption, the first that there is."""
    return parsing.TEXT_SUFFIXES if caption_key is None else (caption_key.lower().lstrip("."),)


def caption_in(content: bytes, is_json: bool, caption_key: str | None) -> tuple[str, ...]:
    """The captions in a text or JSON member. Raises BadRecordError."""
    return parsing.captions_of(parsing.json_object(content).get(caption_key or "caption") if is_json else content)


def _packed(index: ShardIndex, image_key: str | None, caption_key: str | None) -> bytes:
    made_of = [VERSION, index.size, index.mtime_ns, image_key, caption_key]
    header = json.dumps(
        {"made_of": made_of, "fields": list(index.fields), "faults": index.bad_records, "unused": index.unused}
    )
    fields = np.array(list(index.fields.values()), np.float64).reshape(len(index.fields), len(index.keys))
    packed = io.BytesIO()  # NumPy writes no times into an npz: equal arrays give equal bytes
    np.savez(
        packed,
        header=np.frombuffer(header.encode(), np.uint8),
        keys=index.keys,
        hashes=index.hashes,
        spans=index.spans,
        is_json=index.is_json,
        fields=fields,
    )
    return packed.getvalue()


def _refuse_compressed(shard: Path, stream: BinaryIO) -> None:
    start = stream.read(8)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise LcmError(
                f"tar shard {shard} is compressed ({kind}), and records are read from plain tars only; unpack it first"
            )


def _record(stream: BinaryIO, sample: _Sample, image_key: str | None, caption_key: str | None):
    """((image offset, size, caption offset, size), is_json, numbers). Raises BadRecordError."""
    images = _images(sample, image_key)
    if sample.mixed:
        raise BadRecordError("several records have this key, and their members are mixed; give each its own key")
    if not images:
        raise BadRecordError(f"{_NO_IMAGE} among its members ({_suffixes([sample])})")
    offset, size = sample.members[images[0]]
    if size == 0:
        raise BadRecordError("image of 0 bytes")
    row = parsing.json_object(_text(stream, sample, "json")) if "json" in sample.members else {}
    holder = next((suffix for suffix in _texts(caption_key) if suffix in sample.members and suffix != "json"), None)
    if holder is None:
        if caption_key == "txt" or (caption_key or "caption") not in row:
            raise BadRecordError(_NO_CAPTION)
        holder = "json"
    caption_in(_text(stream, sample, holder), holder == "json", caption_key)
    return (offset, size, *sample.members[holder]), holder == "json", parsing.numbers_of(row)


def _text(stream: BinaryIO, sample: _Sample, suffix: str) -> bytes:
    if suffix in sample.texts:
        return sample.texts[suffix]
    offset, size = sample.members[suffix]
    if size > parsing.MAX_TEXT:
        raise BadRecordError(f"its .{suffix} has {size} bytes, but at most {parsing.MAX_TEXT} are read")
    return os.pread(stream.fileno(), size, offset)


def _images(sample: _Sample, image_key: str | None) -> list[str]:
    wanted = images.SUFFIXES if image_key is None else (image_key.lower().lstrip("."),)
    return [suffix for suffix in sample.members if suffix in wanted]


def _suffixes(samples: list[_Sample]) -> str:
    return " ".join(sorted({f".{suffix}" for sample in samples for suffix in sample.members}))


def _check_reasons(
    shard: Path, samples: list[_Sample], reasons: set[str], image_key: str | None, caption_key: str | None
) -> None:
    """Raises BadArgument if a whole shard lacks one kind of member, which points to a wrong key, not to bad records."""
    if not all(reason == _NO_CAPTION or reason.startswith(_NO_IMAGE) for reason in reasons):
        return
    if _NO_CAPTION in reasons:
        wanted = "a .txt or a JSON field 'caption'" if caption_key is None else f"{caption_key!r}"
        problem = (
            f"no captions in {shard}: it holds {_suffixes(samples)}, but nowhere {wanted}; name a JSON field or .SUFFIX"
        )
        raise BadArgument("caption_key", caption_key, problem)
    wanted = " ".join(images.SUFFIXES) if image_key is None else image_key
    problem = (
        f"no images in {shard}: it holds {_suffixes(samples)}, but none of {wanted}; name the images' suffix, which "
        "begins at a name's first dot (if that makes them all different: write names with one dot)"
    )
    raise BadArgument("image_key", image_key, problem)


def _split(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member; None for hidden files and for names without a suffix."""
    folder, slash, base = parsing.readable(name).rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _samples(
    stream: BinaryIO, size: int, texts: Sequence[str], losses: list[tuple[str, str]], unused: collections.Counter
) -> list[_Sample]:
    """Members by key, wherever they are in the tar. A suffix that the key already has starts a new sample of that key.

    Members one after another belong together: if the new sample's others had just been added to a sample whose members
    came earlier, as to a text that has lost its image, they move to the new one.

    texts: suffixes of members that are read, beside "json".
    """
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    previous, earlier = None, 0  # key of the member before this one; how many members its sample had before these
    for member in _members(stream, size, losses):
        name = _split(member.name)
        if member.isdir():
            continue
        if not member.isreg():
            unused["link" if member.issym() or member.islnk() else "special file"] += 1
            continue
        if member.issparse():
            unused["file stored sparsely"] += 1
            continue
        if name is None:
            hidden = posixpath.basename(member.name).startswith(".")
            unused["hidden file" if hidden else "file without a suffix"] += 1
            continue
        key, suffix = name
        sample = latest.get(key)
        if key != previous:
            previous, earlier = key, len(sample.members) if sample else 0
        if sample is None or suffix in sample.members:
            moved = list(sample.members)[earlier:] if earlier else []
            sample = latest[key] = _Sample(key, before=sample)
            samples.append(sample)
            if suffix not in moved:
                sample.members.update((other, sample.before.members.pop(other)) for other in moved)
            earlier = 0
        elif earlier and sample.before and suffix not in sample.before.members:
            sample.mixed = True
        sample.members[suffix] = (member.offset_data, member.size)
        if (suffix == "json" or suffix in texts) and member.size <= _SHORT:
            sample.texts[suffix] = os.pread(stream.fileno(), member.size, member.offset_data)
    return samples


def _members(stream: BinaryIO, size: int, losses: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """All members that can be found; the gaps between them are appended to `losses`."""
    offset, lost_from = 0, None
    while True:
        begun = offset
        offset, search_from, cut = yield from _stretch(stream, offset, size)
        if lost_from is not None and offset > begun:
            losses.append((f"byte {lost_from}", f"the tar is damaged from here to byte {begun}"))
            lost_from = None
        following = _next_header(stream, search_from)
        if following is None:
            if lost_from is None and _is_end(stream, offset, size):
                return
            if cut and lost_from is None:
                losses.append((f"byte {size}", "the tar is cut off here"))
            else:
                at = offset if lost_from is None else lost_from
                losses.append((f"byte {at}", "the tar is damaged from here to its end"))
            return
        lost_from = offset if lost_from is None else lost_from
        offset = following


def _is_end(stream: BinaryIO, offset: int, size: int) -> bool:
    stream.seek(offset)
    end_mark = stream.read(_BLOCK)
    return bool(end_mark) and not end_mark.strip(b"\0") and size - offset <= _LONGEST_PADDING


class _TooManyHeaders(Exception):
    """Of one member."""


class _Member(tarfile.TarInfo):
    """A member whose headers take bounded memory and time."""

    def _proc_member(self, tar: _Tar) -> tarfile.TarInfo:  # tarfile's own hook for subclasses
        tar.chain += 1
        if tar.chain > _MAX_CHAIN:
            raise _TooManyHeaders
        if self.type == tarfile.GNUTYPE_SPARSE or self.type in _EXTENDED and not 0 <= self.size <= _MAX_HEADER:
            raise tarfile.InvalidHeaderError("not read")
        return super()._proc_member(tar)

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, *others: Any) -> None:
        member.sparse = []  # `issparse`; where its pieces are is not read


class _Tar(tarfile.TarFile):
    """`chain`: headers of the member that is being read."""

    tarinfo = _Member
    chain = 0


def _stretch(stream: BinaryIO, offset: int, size: int) -> Generator[tarfile.TarInfo, None, tuple[int, int, bool]]:
    """Consecutive members from `offset` on.

    Returns the first byte after them, where the next one may begin, and whether the file ends there. A member that does
    not lie in the file is none.
    """
    stream.seek(offset)
    try:
        tar = _Tar(fileobj=stream, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None and member.size >= 0 and tar.offset > offset:
            whole = member.isreg() and not member.issparse()  # padding may be cut off
            if (member.offset_data + member.size if whole else tar.offset) > size:
                return offset, min(member.offset_data, size), True
            offset, tar.chain = min(tar.offset, size), 0
            yield member
            tar.members.clear()
    except (OSError, MemoryError):
        raise
    except _TooManyHeaders:
        return offset, stream.tell() - _BLOCK, False
    except Exception:  # tarfile raises anything of nonsense in a header
        pass
    return offset, offset + 1, offset >= size


def _next_header(stream: BinaryIO, start: int) -> int | None:
    """Offset of the first header at or after `start`, at any byte: lost bytes may have moved it off its block."""
    stream.seek(start)
    held = stream.read(_BLOCK)  # it is often there
    while len(held) >= _BLOCK:
        at = held.find(b"ustar", _MAGIC_AT)
        while 0 <= at <= len(held) - (_BLOCK - _MAGIC_AT):
            if _is_header(held[at - _MAGIC_AT : at - _MAGIC_AT + _BLOCK]):
                return start + at - _MAGIC_AT
            at = held.find(b"ustar", at + 1)
        moved = len(held) - (_BLOCK - 1)
        start, held = start + moved, held[moved:]
        after = start + len(held)
        if (data := _after_hole(stream, after)) is None:
            return None
        if data > after:
            start, held = data, b""
            stream.seek(start)
        held += stream.read(_CHUNK)
        if len(held) < _BLOCK:
            return None
    return None


def _after_hole(stream: BinaryIO, offset: int) -> int | None:
    """`offset`, or the end of the hole that it lies in: terabytes of zeros may take no room. None: nothing follows."""
    handle = stream.fileno()
    before = os.lseek(handle, 0, os.SEEK_CUR)
    try:
        return os.lseek(handle, offset, os.SEEK_DATA)
    except OSError as error:
        return None if error.errno == errno.ENXIO else offset  # another one: no such call on this file system
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
