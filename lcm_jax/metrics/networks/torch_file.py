"""Tensors in a file of `torch.save`, read without torch and without running what the file says.

A pickle may call any function by name. Here the only names are those that a state dict of plain tensors needs, and
they stand for functions of ours; a file with any other name is refused. Both layouts of torch are read:

    zip (torch >= 1.6)   NAME/data.pkl, NAME/data/KEY: bytes of storage KEY, uncompressed
    before               pickles: magic, protocol, system, the object, [KEY, ...]; per KEY: int64 count, bytes
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.errors import LcmError

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8",
             "IntStorage": "<i4", "ByteStorage": "|u1"}


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of which the bytes are not read yet; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    **{("torch", name): np.dtype(code) for name, code in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise LcmError(f"it names {module}.{name}, more than a state dict of plain tensors needs")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", type, key, device, count[, view])
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], np.dtype):
            raise LcmError(f"it refers to {str(pid)[:80]!r}, no storage of numbers")
        return _Storage(str(pid[2]), pid[1])


def read(path: Path) -> dict[str, np.ndarray]:
    """Key -> tensor of the state dict in `path`.

    Raises:
      LcmError: the file is damaged, or holds something else than a state dict of plain tensors; it is named.
    """
    try:
        content = path.read_bytes()
        state, raw = _zipped(content) if zipfile.is_zipfile(io.BytesIO(content)) else _before_zip(content)
        if not isinstance(state, dict) or not all(isinstance(value, _Tensor) for value in state.values()):
            raise LcmError("it holds no state dict of plain tensors")
        return {str(key): _array(tensor, raw(tensor.storage)) for key, tensor in state.items()}
    except (LcmError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError, ValueError, TypeError,
            AttributeError, struct.error, OverflowError) as error:
        raise LcmError(f"{path} ({path.stat().st_size} bytes) cannot be read as weights of torch.save: {error}; fetch "
                       "it again, or give the same tensors as .safetensors") from error


def _zipped(content: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(inside) != 1:
        raise LcmError(f"a zip with {len(inside)} files data.pkl")
    root = inside[0].removesuffix("data.pkl")
    state = _Unpickler(io.BytesIO(archive.read(inside[0]))).load()
    return state, lambda storage: archive.read(f"{root}data/{storage.key}")


def _before_zip(content: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
    stream = io.BytesIO(content)
    if _Unpickler(stream).load() != _MAGIC:
        raise LcmError("it does not begin as torch's files do")
    _Unpickler(stream).load(), _Unpickler(stream).load()  # protocol and system
    state = _Unpickler(stream).load()
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in state.values()}
    found = {}
    for key in _Unpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        found[key] = stream.read(count * dtypes[key].itemsize)
    return state, lambda storage: found[storage.key]


def _array(tensor: _Tensor, raw: bytes) -> np.ndarray:
    values = np.frombuffer(raw, tensor.storage.dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) and not 0 <= tensor.offset <= last < values.size:
        raise LcmError(f"a tensor of {last + 1} numbers in a storage of {values.size}")
    strides = [s * values.itemsize for s in tensor.strides]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)
