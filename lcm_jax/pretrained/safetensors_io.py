"""Weight files of models: safetensors, in one file or in shards, with or without a variant.

    NAME[.VARIANT].safetensors                     one file
    NAME.safetensors.index[.VARIANT].json          {"weight_map": {key: shard}}, shards beside it

NAME is `diffusion_pytorch_model` for UNet and VAE, `model` for text encoders. Pickled weights (.bin, .ckpt) are never
opened. The writer streams: it holds one tensor at a time in memory, whatever the size of the model.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 only after this
import numpy as np
import safetensors
from jax.typing import DTypeLike

from lcm_jax import files, foreign
from lcm_jax.errors import LcmError

DIFFUSERS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_NAME = "model"
SUFFIX = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pt", ".pth")

HASH = "modelspec.hash_sha256"  # of a header: the SHA-256 of all that follows it
_NO_HASH = "0x" + 64 * "0"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SLACK = 1 << 20  # bytes for the header and the file system's own rounding
_PICKLED_START = b"PK\x03\x04", b"\x80\x02"  # torch.save's zip archives, and its older streams


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of one model on disk, none of them read yet.

    Attributes:
      source: the file or index that stands for them, to be named in errors.
      shapes: key -> shape.
      read: key -> tensor, read from its file now.
      metadata: text entries of the header; {} for shards.
    """

    source: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def file_name(name: str, variant: str | None) -> str:
    """`NAME[.VARIANT].safetensors`."""
    return f"{name}.{variant}{SUFFIX}" if variant else f"{name}{SUFFIX}"


def download_patterns(name: str, variant: str | None) -> list[str]:
    """Globs of every file that may belong to these weights, in today's and in the old spelling of shards."""
    shard = "-?????-of-?????"
    shards = [f"{name}.{variant}{shard}.safetensors", f"{name}{shard}.{variant}.safetensors"]
    return [
        file_name(name, variant),
        *_index_names(name, variant),
        *(shards if variant else [f"{name}{shard}.safetensors"]),
    ]


def find_weights(folder: Path, name: str, variant: str | None) -> tuple[Path, list[Path]]:
    """The file that stands for the weights NAME, and all files that hold their tensors.

    A variant is used only if it is asked for, and then nothing else is.

    Raises:
      LcmError: there are none (the error lists what there is and what to do), or a shard is missing.
    """
    single = folder / file_name(name, variant)
    if single.is_file():
        return single, [single]
    for index in (folder / file for file in _index_names(name, variant)):
        if index.is_file():
            return index, _shards(index)
    raise LcmError(_nothing_found(folder, name, variant))


def _index_names(name: str, variant: str | None) -> tuple[str, ...]:
    """Names that a shard index may have, today's first."""
    if variant is None:
        return (f"{name}.safetensors.index.json",)
    return f"{name}.safetensors.index.{variant}.json", f"{name}.safetensors.{variant}.index.json"


def _shards(index: Path) -> list[Path]:
    weight_map = foreign.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LcmError(f"{index} has no weight_map; download it again")
    if wrong := [name for name in weight_map.values() if not isinstance(name, str)]:
        raise LcmError(f"{index} names {wrong[0]!r} as a shard, which is no text; download it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise LcmError(f"{index} names {outside[0]!r}, which is not beside it; put all shards into the index's folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise LcmError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards ({', '.join(missing[:10])}); download them"
        )
    return [index.parent / name for name in names]


def _nothing_found(folder: Path, name: str, variant: str | None) -> str:
    wanted = file_name(name, variant)
    present = sorted(p.name for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    weights = [file for file in present if file.endswith((SUFFIX, *PICKLED))]
    safe = [file for file in weights if file.endswith(SUFFIX)]
    if variant and safe:
        return f"{folder} has no variant {variant!r} ({wanted}), only {', '.join(weights)}; ask for one of those"
    if safe:
        return f"{folder} has no {wanted}, only {', '.join(safe)}; name the variant (the word before .safetensors)"
    pickled = f"only pickled weights ({', '.join(weights)}), which can run code and are not opened; "
    why = pickled if weights else "no weights at all; if the original has them as .bin, "
    root = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    loader = "DiffusionPipeline" if root != folder else "AutoModel"
    # In the hub's cache a folder is .../models--owner--name/snapshots/revision.
    hub = next((part.split("--", 1)[1].replace("--", "/") for part in root.parts if part.startswith("models--")), None)
    return (
        f"{folder} has no {wanted}: {why}convert them once, in an environment with torch: "
        f"python -c \"from diffusers import {loader} as M; M.from_pretrained('{hub or root}', "
        f"use_safetensors=False).save_pretrained('{root.name}-safetensors')\""
    )


def open_weights(folder: Path, name: str, variant: str | None = None) -> contextlib.AbstractContextManager[Weights]:
    """Opens the weights NAME of a model's folder for reading, tensor by tensor.

    Raises:
      LcmError: not found (see `find_weights`), or a file is damaged or not a safetensors file; it is named.
    """
    return _open(*find_weights(folder, name, variant))


def open_file(path: Path) -> contextlib.AbstractContextManager[Weights]:
    """Opens one file as `open_weights` does, whatever its name."""
    return _open(path, [path])


@contextlib.contextmanager
def _open(source: Path, paths: Sequence[Path]) -> Iterator[Weights]:
    with contextlib.ExitStack() as stack:
        holders: dict[str, tuple[Path, Any]] = {}
        shapes, metadata = {}, {}
        for file in paths:
            with _errors_name(file):
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
                metadata = handle.metadata() or {}
                for key in handle.keys():
                    if key in holders:
                        raise LcmError(f"{key} is both in {holders[key][0].name} and in {file}; remove one of them")
                    holders[key] = file, handle
                    shapes[key] = tuple(handle.get_slice(key).get_shape())

        def read(key: str) -> np.ndarray:
            file, handle = holders[key]
            with _errors_name(file):
                return handle.get_tensor(key)

        yield Weights(source, shapes, read, metadata if len(paths) == 1 else {})


@contextlib.contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    """Turns an error of the safetensors library into one that names the file and what is wrong with it."""
    try:
        yield
    except (safetensors.SafetensorError, TypeError, KeyError, OverflowError) as error:
        with file.open("rb") as stream:
            start = stream.read(24)
        if start.startswith(_PICKLED_START):
            raise LcmError(
                f"{file} is pickled, which can run code, and is not opened; convert it once, in an environment with "
                f"torch: python -c \"import torch, safetensors.torch as s; t = torch.load('{file}', "
                "weights_only=True); s.save_file({k: v.contiguous() for k, v in t.get('state_dict', t).items()}, "
                f"'{file.with_suffix('')}-converted.safetensors')\""
            ) from None
        pointer = start == b"version https://git-lfs."
        why = "a git-lfs pointer: run `git lfs pull`" if pointer else "truncated or corrupt: copy or download it again"
        size = file.stat().st_size
        raise LcmError(f"{file} ({size} bytes) cannot be read as safetensors ({error}); {why}") from error


def weights_size(shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> int:
    """Bytes of these tensors in a file, without its header."""
    return sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


def check_file(out: str | Path, needed: int = 0) -> None:
    """Checks that `needed` bytes can be written to the new file `out`. Programs also call it before their long work.

    Raises:
      LcmError: another suffix, the file exists, or fewer than `needed` bytes are free.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise LcmError(f"{out} does not end in {SUFFIX}; choose a name that does")
    if out.exists():
        raise LcmError(f"{out} already exists; choose another name or remove it first")
    files.check_space(out, needed)


def save_file(
    out: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    dtype: DTypeLike,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """`write_weights` to a new file, which appears under the name `out` when it is complete.

    Raises:
      LcmError: see `check_file` and `write_weights`.
    """
    check_file(out, weights_size(shapes, _writable(dtype)) + _SLACK)
    with files.new_file(out) as partial:
        write_weights(partial, shapes, tensor, dtype, {**(metadata or {}), HASH: _NO_HASH})
        check_file(out)  # another program may have made it meanwhile
    return out


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    dtype: DTypeLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file and syncs it to disk. `tensor` is called for one key after another.

    Layout: 8 bytes of header length, a JSON header, the tensors' bytes in C order, little endian, without gaps.
    `metadata` stands in the header beside `format`. A HASH in it gets the digest of the tensors' bytes.

    Raises:
      LcmError: unknown dtype; a tensor of another shape or dtype, not contiguous, or not finite.
    """
    dtype = _writable(dtype)
    # `format`: transformers 4 does not open a file without it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        digest = hashlib.sha256()
        for key, shape in shapes.items():
            value = tensor(key)
            if value.shape != tuple(shape) or value.dtype != dtype or not value.flags.c_contiguous:
                raise LcmError(f"{key}: {value.dtype} {value.shape} instead of contiguous {dtype} {tuple(shape)}")
            if not np.isfinite(value).all():
                raise LcmError(
                    f"{key} has values that are not finite in {dtype}; write float32, or check whether the run diverged"
                )
            content = value.reshape(-1).view(np.uint8).data
            digest.update(content)
            stream.write(content)
        if (metadata or {}).get(HASH) == _NO_HASH:
            stream.seek(8 + text.index(_NO_HASH.encode()))
            stream.write(f"0x{digest.hexdigest()}".encode())
        files.sync(stream)


def _writable(dtype: DTypeLike) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise LcmError(f"weights cannot be written as {dtype.name}; choose one of {', '.join(_DTYPES)}")
    return dtype
