"""Reads the tensors in a file of `torch.save` without torch and without executing anything in the file.

A pickle may call any function by name, and Python's unpickler trusts its sizes, indices and nesting. So this module
interprets only the few operations that a state dict of plain tensors needs. It refuses any other operation or name, and
checks every number of the file against its bounds before it uses it. Both layouts of torch are read:

    zip (torch >= 1.6)   NAME/data.pkl, NAME/data/KEY: bytes of storage KEY, uncompressed
    before               pickles: magic, protocol, system, the object, [KEY, ...]; per KEY: int64 count, bytes
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcm_jax import files, foreign
from lcm_jax.errors import LcmError

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "|u1",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS = _INTEGERS | _TEXTS | {"BINFLOAT"}
MAX_BYTES = 2**34  # of a file: all of it is read into memory
_MAX_DIMENSIONS = 64  # of NumPy and of torch


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor whose bytes are not read yet; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> dict[str, np.ndarray]:
    """Key -> tensor of the state dict in `path`, read-only.

    Raises:
      LcmError: the file, which is named, is damaged or holds anything but a state dict of plain tensors.
    """
    remedy = "fetch it again, or give the same tensors as .safetensors"
    with foreign.reading(path, "a file of torch.save", remedy):
        content = files.read_regular(path, MAX_BYTES)
        state, raw = _zipped(content) if zipfile.is_zipfile(io.BytesIO(content)) else _before_zip(content)
        return {key: _array(tensor, raw(tensor.storage), len(content)) for key, tensor in state.items()}


def _zipped(content: bytes) -> tuple[dict[str, _Tensor], Callable[[_Storage], bytes]]:
    archive = foreign.open_zip(io.BytesIO(content), most=len(content))
    inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(inside) != 1:
        raise LcmError(f"a zip with {len(inside)} files data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise LcmError("a zip with compressed files, which torch.save does not write")
    root = inside[0].removesuffix("data.pkl")
    read = functools.cache(archive.read)  # tensors may share a storage
    return _state(io.BytesIO(archive.read(inside[0]))), lambda storage: read(f"{root}data/{storage.key}")


def _before_zip(content: bytes) -> tuple[dict[str, _Tensor], Callable[[_Storage], bytes]]:
    stream = io.BytesIO(content)
    if _load(stream) != _MAGIC:
        raise LcmError("it does not begin like a file of torch")
    _load(stream), _load(stream)  # protocol and system
    state = _state(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    found = {}
    for key in _all(str, _load(stream)):
        storage = storages[key]
        if struct.unpack("<q", stream.read(8)) != (storage.count,):
            raise LcmError(f"storage {key[:80]} does not have the {storage.count} numbers that its tensors declare")
        found[key] = stream.read(storage.count * storage.dtype.itemsize)
    return state, lambda storage: found[storage.key]


def _array(tensor: _Tensor, raw: bytes, most: int) -> np.ndarray:
    """The tensor, of at most `most` bytes, as a view of its storage's bytes `raw`."""
    storage, count, dtype = tensor.storage, tensor.storage.count, tensor.storage.dtype
    dims = list(zip(tensor.shape, tensor.strides, strict=True))
    if len(raw) != count * dtype.itemsize:
        raise LcmError(f"storage {storage.key[:80]} has {len(raw)} bytes, {count} numbers of {dtype} are declared")
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in dims)  # sizes, strides and offset are at least 0
    if last >= count:
        raise LcmError(f"a tensor that ends at number {last} in a storage of {count}")
    if math.prod(tensor.shape) * dtype.itemsize > most:  # strides may visit an element again and again
        raise LcmError(f"a tensor of shape {list(tensor.shape)} in a storage of {count} numbers repeats them too often")
    strides = [s * dtype.itemsize if n > 1 else 0 for n, s in dims]
    return np.ndarray(tensor.shape, dtype, raw, tensor.offset * dtype.itemsize, strides)  # checks the bounds again


def _state(stream: BinaryIO) -> dict[str, _Tensor]:
    state = _load(stream)
    if type(state) is not dict or not all(type(value) is _Tensor for value in state.values()):
        raise LcmError("it holds no state dict of plain tensors")
    return state


def _load(stream: BinaryIO) -> Any:
    """The object of the pickle at the position of `stream`, which then is at its end.

    Nested objects of the file are never hashed, compared or printed: neither their depth nor their size has a bound.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if not 0 <= count <= len(stack):
            raise LcmError("its pickle takes more objects than it has")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def since_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    for operation, value, _ in pickletools.genops(stream):
        match operation.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _LITERALS:
                stack.append(value)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(pop(int(name[-1]))))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS" as name:
                items = pop(1) if name == "APPEND" else since_mark()
                _all(list, stack[-1:])[0].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS" as name:
                items = pop(2) if name == "SETITEM" else since_mark()
                _all(dict, stack[-1:])[0].update(_pairs(items))
            case "GLOBAL":
                stack.append(_named(value))
            case "STACK_GLOBAL":
                stack.append(_named(" ".join(_all(str, pop(2)))))
            case "REDUCE":
                function, arguments = pop(2)
                if function not in _CALLED or type(arguments) is not tuple:
                    raise LcmError("it calls a function that cannot be called here")
                stack.append(function(*arguments))
            case "BUILD":  # attributes of a dict, as the `_metadata` of a module: skipped
                stack.pop()
                _all(dict, stack[-1:])
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case name:
                raise LcmError(f"its pickle has the operation {name}, more than a state dict of plain tensors needs")
    raise LcmError("its pickle does not end")


def _all(kind: type, values: Any) -> Any:
    """`values`, which must be a list or tuple of this type alone: a file may hold anything instead."""
    if type(values) not in (list, tuple) or not all(type(value) is kind for value in values):
        raise LcmError(f"it has values of another type where only {kind.__name__.strip('_')} can be")
    return values


def _indices(values: Any) -> tuple[int, ...]:
    if len(_all(int, values)) > _MAX_DIMENSIONS or not all(0 <= value < 2**63 for value in values):
        raise LcmError("an offset, count, size or stride is below 0 or above 2^63, or a tensor has too many of them")
    return tuple(values)


def _pairs(items: list[Any]) -> Iterable[tuple[str, Any]]:
    return zip(_all(str, items[::2]), items[1::2], strict=True)


def _ordered(items: Any = ()) -> dict[str, Any]:
    """An OrderedDict; in files of Python 2 its items are [[key, value], ...]."""
    return dict(_pairs([part for item in items for part in item]))


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    _all(_Storage, [storage])
    return _Tensor(storage, *_indices([offset]), _indices(shape), _indices(strides))


def _storage(pid: Any) -> _Storage:
    """("storage", type, key, device, count[, view of another storage])."""
    if type(pid) is not tuple or len(pid) < 5 or not isinstance(pid[1], np.dtype) or pid[5:] not in ((), (None,)):
        raise LcmError("it refers to something other than a whole storage of numbers")
    return _Storage(*_all(str, [pid[2]]), pid[1], *_indices([pid[4]]))


_CALLED = (_ordered, _rebuild)
_NAMES = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor_v2": _rebuild,
    **{f"torch {name}": np.dtype(code) for name, code in _STORAGES.items()},
}


def _named(name: str) -> Any:
    if name not in _NAMES:
        raise LcmError(f"it names {'.'.join(name.split())}, more than a state dict of plain tensors needs")
    return _NAMES[name]
