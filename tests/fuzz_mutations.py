"""Mutations that keep a file's structure, so that what is odd in it reaches the code behind the parser.

Each is a function (content, chance) -> content: JSON with other values, a safetensors header of the right length, a zip
archive whose members are mutated in turn, tar headers with right checksums, a pickle's operations. `chance` is a
`random.Random`: the same one gives the same mutation.
"""

from __future__ import annotations

import bz2
import copy
import functools
import io
import json
import math
import pickletools
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

NUMBERS = (0, 1, -1, 2, 3, 7, 100, 0.5, -0.5, 1e-30, 1e308, 2**15, 2**31 - 1, 2**31, 2**63, 2**64, 10**12, 10**30)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
DEEP, DIGITS = "@deep@", "@digits@"  # what Python's own writer cannot write: see `_text`
WORDS = ("", "x", "no", "1", "NaN", "../x", "/etc/passwd", "*?[", "é" * 300)
WORDS += ("a\0b", "a\nb", "\ud800", "\ufeff", "a\u2028b")
VALUES = (None, True, False, *NUMBERS, *NOT_FINITE, *WORDS, [], {}, [[]], [None], {"a": None}, [1, "x"], DEEP, DIGITS)
DTYPES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8},
    **{"I64": 8, "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 1, "F6_E2M3": 1},
}
BOMB = 320 * 2**20  # more than the readers of zip archives may take
_NOT_FINITE_BYTES = {"F16": b"\0\x7e", "BF16": b"\xc0\x7f", "F32": b"\0\0\xc0\x7f", "F64": b"\0\0\0\0\0\0\xf8\x7f"}
_INFINITE_BYTES = {"F16": b"\0\x7c", "BF16": b"\x80\x7f", "F32": b"\0\0\x80\x7f", "F64": b"\0\0\0\0\0\0\xf0\x7f"}


def in_bytes(content: bytes, chance: Random) -> bytes:
    """Bytes changed, cut, repeated or put in; numbers of 1 to 8 bytes."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(found) + 1)
        length = chance.choice((1, 2, 4, 8, 16, 100))
        match chance.randrange(6):
            case 0 if found:
                found[at % len(found)] ^= 1 << chance.randrange(8)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length] * chance.choice((1, 2, 50))
            case 3:
                number = int(chance.choice(NUMBERS)) % 2**64
                found[at : at + 8] = struct.pack(chance.choice("<>") + "Q", number)[: chance.choice((1, 2, 4, 8))]
            case 4:
                del found[at:]
            case _:
                found[at:at] = chance.randbytes(length)
    return bytes(found)


def in_text(content: bytes, chance: Random) -> bytes:
    """Marks, ends of lines and characters that programs treat in different ways."""
    odd = "\ufeff \u2028 \u2029 \x85 \x0b \x0c \x1c \x1e \0 \r \r\n \n\n \t é \u202e".split(" ")
    pieces = [*(text.encode() for text in odd), b"\xff", b"\xed\xa0\x80", b"word " * 3000]
    at = chance.choice((0, chance.randrange(len(content) + 1)))
    return content[:at] + chance.choice(pieces) + content[at:]


def in_json(content: bytes, chance: Random, words: tuple = ()) -> bytes:
    """A value of a JSON text exchanged, removed, moved, wrapped or renamed.

    words: more values to put in.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return in_bytes(content, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            tree = copy.deepcopy(chance.choice(VALUES))
            continue
        holder, key = chance.choice(places)
        value = holder[key]
        match chance.randrange(10):
            case 0:
                del holder[key]
            case 1:
                other, name = chance.choice(places)
                holder[key] = copy.deepcopy(other[name])
            case 2:
                holder[key] = chance.choice(([value], {"a": value}, str(value)))
            case 3 if isinstance(holder, dict):
                holder[chance.choice(WORDS)] = holder.pop(key)
            case 4 if type(value) in (int, float):
                holder[key] = chance.choice((-value, value + 1, value * 1000, float(value), value / 3))
            case 5 if isinstance(value, list):
                holder[key] = value * chance.choice((0, 2, 200))
            case _:
                holder[key] = copy.deepcopy(chance.choice((*VALUES, *words)))
        if len(json.dumps(tree)) > 2**16:  # lists multiplied, again and again
            return in_bytes(content, chance)
    return (b"\xef\xbb\xbf" if chance.random() < 0.03 else b"") + _text(tree)


def _places(tree: Any) -> Any:
    """(holder, key) of every value."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _text(tree: Any) -> bytes:
    text = json.dumps(tree).replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 60_000 + "]" * 60_000)
    return text.encode()


def in_lines(content: bytes, chance: Random) -> bytes:
    """A line of a .jsonl mutated, repeated or removed."""
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    match chance.randrange(8):
        case 0:
            lines[at] = in_text(lines[at], chance)
        case 1:
            lines.insert(at, lines[chance.randrange(len(lines))])
        case 2:
            del lines[at]
        case _:
            lines[at] = in_json(lines[at], chance)
    return b"\n".join(lines)


def safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = _text(header)
    return struct.pack("<Q", len(text)) + text + data


def in_safetensors(content: bytes, chance: Random) -> bytes:
    """Names, types, shapes and places of tensors, values that are not finite, entries of the metadata."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        name = chance.choice(list(tensors))
        entry = tensors[name]
        begin, end = entry["data_offsets"]
        match chance.randrange(8):
            case 0:
                return in_bytes(content, chance)
            case 1 | 2:
                text = in_json(content[8 : 8 + length], chance, (*DTYPES, [0, 0], [2**40, 2**40]))
                return struct.pack("<Q", len(text)) + text + data
            case 3 | 4:
                values = chance.choice((_NOT_FINITE_BYTES, _INFINITE_BYTES)).get(entry["dtype"], b"\xff")
                at = begin + len(values) * chance.randrange(max(1, (end - begin) // len(values)))
                data = data[:at] + values + data[at + len(values) :]
            case 5 | 6:
                kept = {key: (one, data[slice(*one["data_offsets"])]) for key, one in tensors.items()}
                data = b""
                for key, (one, values) in kept.items():
                    if key == name:
                        one["dtype"] = chance.choice(list(DTYPES))
                        if chance.random() < 0.2:
                            one["shape"] = chance.choice(([], [0], [1], [*one["shape"], 1], one["shape"][::-1]))
                        count = math.prod(one["shape"])
                        if not 0 <= count <= 2**20:
                            return in_bytes(content, chance)
                        values = (values + bytes(8 * count))[: count * DTYPES[one["dtype"]]]
                    one["data_offsets"] = [len(data), len(data) + len(values)]
                    data += values
            case _:
                metadata = header.setdefault("__metadata__", {})
                key = chance.choice([*metadata, "format"])
                inner = metadata.get(key, "x").encode("utf-8", "replace")
                metadata[key] = in_json(inner, chance).decode("utf-8", "replace")
        return safetensors(header, data)
    except (ValueError, KeyError, TypeError, IndexError, struct.error, RecursionError, AttributeError):
        return in_bytes(content, chance)


@functools.cache
def _bomb() -> bytes:
    """Zeros of BOMB bytes, compressed."""
    packer = bz2.BZ2Compressor()
    return b"".join(packer.compress(bytes(2**20)) for _ in range(BOMB // 2**20)) + packer.flush()


def in_zip(content: bytes, chance: Random) -> bytes:
    """Members mutated by their kind, renamed, repeated, compressed, inflated; numbers in the headers."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        name = chance.choice(list(members))
    except Exception:  # it is broken already
        return in_bytes(content, chance)
    method, way = zipfile.ZIP_STORED, chance.randrange(12)
    match way:
        case 0:
            del members[name]
        case 1:
            word = chance.choice(WORDS).encode(errors="replace").decode()
            members[name + word] = members[chance.choice(list(members))]
        case 2:
            method = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case 3 | 4:
            pass
        case _:
            members[name] = in_member(members[name], chance)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for key, value in members.items():
            archive.writestr(zipfile.ZipInfo(key), value, method)  # without today's time
    if way == 3 and chance.random() < 0.1:  # it takes a second
        return _inflated(packed.getvalue(), name)
    return _patched(packed.getvalue(), chance) if way == 4 else packed.getvalue()


def _inflated(content: bytes, name: str) -> bytes:
    """The archive with another member of this name, which declares and holds zeros of BOMB bytes."""
    packed, raw = io.BytesIO(), _bomb()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(packed, "w") as archive:
        for info in before.infolist():
            archive.writestr(zipfile.ZipInfo(info.filename), raw if info.filename == name else before.read(info))
    found = bytearray(packed.getvalue())
    for mark, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):  # method 12, and the size of what it inflates to
        at = found.find(name.encode()) if mark == b"PK\3\4" else found.rfind(name.encode())
        start = found.rfind(mark, 0, at)
        struct.pack_into("<H", found, start + offset, zipfile.ZIP_BZIP2)
        struct.pack_into("<I", found, start + offset + 14, BOMB)
    return bytes(found)


def _patched(content: bytes, chance: Random) -> bytes:
    """A number in a header of the archive changed: flags, methods, sizes, offsets."""
    found = bytearray(content)
    marks = [match.start() for match in re.finditer(rb"PK[\x01-\x08][\x02-\x07]", content)]
    at = chance.choice(marks) + chance.randrange(4, 44)
    if at + 4 <= len(found):
        width = chance.choice("BHI")
        value = int(chance.choice((*NUMBERS, 9, 99))) % 2 ** (8 * struct.calcsize(width))
        struct.pack_into("<" + width, found, at, value)
    return bytes(found)


def in_member(content: bytes, chance: Random) -> bytes:
    """A member of a zip archive, by what it is."""
    if content.startswith(b"\x93NUMPY"):
        return in_npy(content, chance)
    if content.startswith(b"\x80"):
        return in_pickle(content, chance)
    return in_bytes(content, chance)


def in_npy(content: bytes, chance: Random) -> bytes:
    """The type, the order and the shape of an array; values that are not finite; JSON in its bytes."""
    start = 10 + struct.unpack("<H", content[8:10])[0]
    header, data = content[10:start].decode("latin-1"), content[start:]
    kinds = ("|O", "<f8", "<f4", ">f4", "<f2", "<c16", "<i8", "<u8", "|b1", "|S9", "<U3", "<M8[s]", "|V8", "f8,i4")
    match chance.randrange(6):
        case 0:
            header = re.sub(r"'descr': '[^']*'", f"'descr': {chance.choice(kinds)!r}", header)
        case 1:
            shapes = ("()", "(0,)", "(2,)", "(-1,)", f"({2**40}, {2**40})", f"({10**30},)", "(1.5,)", "(True,)", "'x'")
            header = re.sub(r"\([^)]*\)", chance.choice(shapes), header)
        case 2:
            header = header.replace("False", chance.choice(("True", "None", "0")))
        case 3 if len(data) >= 8:
            value = struct.pack(chance.choice("<>") + chance.choice("fd"), chance.choice((*NOT_FINITE, -1.0, 1e30)))
            at = len(value) * chance.randrange(max(1, len(data) // len(value)))
            data = data[:at] + value + data[at + len(value) :]
        case 4 if data.startswith((b"{", b"[")):
            data = in_json(data, chance)
            header = re.sub(r"\([^)]*\)", f"({len(data)},)", header)
        case _:
            return in_bytes(content, chance)
    return content[:8] + struct.pack("<H", len(header)) + header.encode("latin-1") + data


def in_pickle(content: bytes, chance: Random) -> bytes:
    """Numbers, texts and operations of a pickle."""
    try:
        found = list(pickletools.genops(content))
    except Exception:
        return in_bytes(content, chance)
    ends = [*(at for _, _, at in found[1:]), len(content)]
    pieces = [content[at:end] for (_, _, at), end in zip(found, ends, strict=True)]
    numbers = [i for i, (_, value, _) in enumerate(found) if type(value) is int]
    texts = [i for i, (_, value, _) in enumerate(found) if type(value) is str]
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(pieces))
        match chance.randrange(8):
            case 0:
                pieces[at] = b""
            case 1:
                pieces[at] *= chance.choice((2, 1000, 50_000))
            case 2:
                pieces[at] = chance.choice(pieces)
            case 3 if texts:
                word = chance.choice(WORDS).encode("utf-8", "surrogatepass")
                pieces[chance.choice(texts)] = b"X" + struct.pack("<I", len(word)) + word
            case _ if numbers:
                value = int(chance.choice((*NUMBERS, 1000, -1000, 2**20, -(2**20), 2**30, -(2**30), -2)))
                length = value.bit_length() // 8 + 1
                long = b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
                pieces[chance.choice(numbers)] = b"J" + struct.pack("<i", value) if length <= 4 else long
    return b"".join(pieces)


def in_tar(content: bytes, chance: Random) -> bytes:
    """Fields of a header, under a right checksum; long names, extended headers, kinds of members; contents."""
    entries, at = [], 0
    while at + 512 <= len(content):
        block = content[at : at + 512]
        try:
            size = int(block[124:135].strip(b"\0 ") or b"0", 8)
        except ValueError:
            size = 0
        entries.append([block, content[at + 512 : at + 512 + size]])
        at += 512 + -(-size // 512) * 512
    if not entries or chance.random() < 0.1:
        return in_bytes(content, chance)
    number = chance.randrange(len(entries))
    entry = entries[number]
    match chance.randrange(8):
        case 0 | 1:
            name = entry[0][:100].split(b"\0")[0].decode("latin-1")
            info = tarfile.TarInfo(chance.choice((name, *WORDS)).encode("ascii", "replace").decode())
            info.type, info.size = entry[0][156:157], len(entry[1])
            match chance.randrange(4):
                case 0:
                    info.size = int(chance.choice((0, 1, 511, 2**31, 2**40, 10**15, 2**62, -1, -5)))
                case 1:
                    info.type = bytes([chance.choice(b"0123567KLSgxD\0")])
                case 2:
                    info.mtime = chance.choice((-1, 2**40, 2**62))
            entry[0] = _header(info)
        case 2 | 3:
            keys = ("size", "path", "linkpath", "mtime", "uid", "hdrcharset", "GNU.sparse.major", "GNU.sparse.map",
                    "GNU.sparse.size", "GNU.sparse.realsize", "GNU.sparse.name", "GNU.sparse.numbytes")  # fmt: skip
            values = ("-5", "9" * 400, "x", "", "1e3", "nan", "0", "1", "../x", "1,2,3", "-1,-1", str(2**63), "BINARY")
            text = "".join(_pax(chance.choice(keys), chance.choice(values)) for _ in range(chance.choice((1, 1, 3))))
            if chance.random() < 0.2:
                odd = "-7 path=x\n", "0 path=x\n", "99999 path=x\n", "x", "7 path\n", f"{'9' * 5000} a=b\n"
                text = chance.choice(odd)
            entries.insert(number, _member(chance.choice((b"x", b"g")), text.encode()))
        case 4:
            times = chance.choice((1, 1, 1, 2, 2, 50, 400))
            kind, name = chance.choice(((b"L", b"n\0"), (b"K", b"n\0"), (b"x", _pax("path", "n").encode())))
            entries[number:number] = [_member(kind, name)] * times
        case 5:
            entries.insert(number, entries[chance.randrange(len(entries))])
        case 6:
            entries.insert(number, [bytes(512 * chance.choice((1, 2, 3))), b""])
        case _:
            changed = in_json(entry[1], chance) if entry[1].startswith(b"{") else in_text(entry[1], chance)
            name = entry[0][:100].split(b"\0")[0].decode("latin-1")
            entries[number] = _member(entry[0][156:157], changed, name)
    return b"".join(block + data + bytes(-len(data) % 512) for block, data in entries)


def _pax(key: str, value: str) -> str:
    length = len(key) + len(value) + 3
    while len(f"{length} {key}={value}\n") != length:
        length = len(f"{length} {key}={value}\n")
    return f"{length} {key}={value}\n"


def _member(kind: bytes, data: bytes, name: str = "././@LongLink") -> list[bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    return [_header(info), data]


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.GNU_FORMAT, "latin-1", "replace")[-512:]
