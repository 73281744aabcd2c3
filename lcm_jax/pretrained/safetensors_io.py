"""Weight files of a model folder: safetensors, single or sharded, with or without a variant.

    NAME[.VARIANT].safetensors                     one file
    NAME.safetensors.index[.VARIANT].json          {"weight_map": {key: shard}}, shards beside it

NAME is `diffusion_pytorch_model` for UNet and VAE, `model` for text encoders. Pickled weights (.bin, .ckpt) are never
opened. The writer streams: one tensor at a time in memory, whatever the size of the model.
"""

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 only after this
import numpy as np
import safetensors

from lcm_jax.errors import LcmError
from lcm_jax.files import read_json, sync

DIFFUSERS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_NAME = "model"

_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of one model on disk, none of them read yet.

    Attributes:
      source: the file or index that stands for them, to be named in errors.
      shapes: key -> shape.
      read: key -> tensor, read from its file now.
    """

    source: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def single_file(name: str, variant: str | None) -> str:
    """`NAME[.VARIANT].safetensors`."""
    return f"{name}.{variant}.safetensors" if variant else f"{name}.safetensors"


def index_files(name: str, variant: str | None) -> tuple[str, ...]:
    """Names that a shard index may have, today's first."""
    if variant is None:
        return (f"{name}.safetensors.index.json",)
    return f"{name}.safetensors.index.{variant}.json", f"{name}.safetensors.{variant}.index.json"


def download_patterns(name: str, variant: str | None) -> list[str]:
    """Globs of every file that may belong to these weights, today's and old spellings of shards."""
    shard = "-?????-of-?????"
    shards = [f"{name}.{variant}{shard}.safetensors", f"{name}{shard}.{variant}.safetensors"]
    return [
        single_file(name, variant),
        *index_files(name, variant),
        *(shards if variant else [f"{name}{shard}.safetensors"]),
    ]


def weight_files(folder: Path, name: str, variant: str | None) -> tuple[Path, list[Path]]:
    """Where the weights NAME are: the file that stands for them, and all files that hold tensors.

    A variant is taken only if asked for, and then nothing else is.

    Raises:
      LcmError: there are none (the error tells what there is and the way out), or a shard is missing.
    """
    single = folder / single_file(name, variant)
    if single.is_file():
        return single, [single]
    for index in (folder / file for file in index_files(name, variant)):
        if index.is_file():
            return index, _shards(index)
    raise LcmError(_nothing_found(folder, name, variant))


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LcmError(f"{index} has no weight_map; download it again")
    names = sorted(set(weight_map.values()))
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise LcmError(f"{index} names {foreign[0]!r}, which is not beside it; shards must stand in the index's folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise LcmError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards ({', '.join(missing[:10])}); download them"
        )
    return [index.parent / name for name in names]


def _nothing_found(folder: Path, name: str, variant: str | None) -> str:
    wanted = single_file(name, variant)
    present = sorted(p.name for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    weights = [file for file in present if file.endswith((".safetensors", *_PICKLED))]
    if variant and any(file.endswith(".safetensors") for file in present):
        return f"{folder} has no variant {variant!r} ({wanted}); it holds {', '.join(weights)}: ask for one of those"
    safe = [file for file in weights if file.endswith(".safetensors")]
    if safe:
        return f"{folder} has no {wanted}; it holds {', '.join(safe)}: name the variant (the word before .safetensors)"
    pickled = f"only pickled weights ({', '.join(weights)}), which can run code and are not opened; "
    why = pickled if weights else "no weights at all; if its origin has them as .bin, "
    root = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    loader = "DiffusionPipeline" if root != folder else "AutoModel"
    # In the hub's cache a folder is .../models--owner--name/snapshots/revision.
    hub = next((part.split("--", 1)[1].replace("--", "/") for part in root.parts if part.startswith("models--")), None)
    return (
        f"{folder} has no {wanted}: {why}convert once, where torch is: "
        f"python -c \"from diffusers import {loader} as M; M.from_pretrained('{hub or root}', "
        f"use_safetensors=False).save_pretrained('{root.name}-safetensors')\""
    )


@contextlib.contextmanager
def open_weights(folder: Path, name: str, variant: str | None = None) -> Iterator[Weights]:
    """Open the weights NAME of a model's folder for reading, tensor by tensor.

    Raises:
      LcmError: not there (see `weight_files`), or a file is truncated or no safetensors file; it is named.
    """
    source, files = weight_files(folder, name, variant)
    with contextlib.ExitStack() as stack:
        holders: dict[str, tuple[Path, Any]] = {}
        shapes = {}
        for file in files:
            with _named(file):
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
                for key in handle.keys():
                    if key in holders:
                        raise LcmError(f"{key} is both in {holders[key][0].name} and in {file}; remove one of them")
                    holders[key] = file, handle
                    shapes[key] = tuple(handle.get_slice(key).get_shape())

        def read(key: str) -> np.ndarray:
            file, handle = holders[key]
            with _named(file):
                return handle.get_tensor(key)

        yield Weights(source, shapes, read)


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turns whatever reading `file` raises into an error that names it."""
    try:
        yield
    except (safetensors.SafetensorError, TypeError, KeyError, OverflowError) as error:
        size = file.stat().st_size
        with file.open("rb") as stream:
            pointer = stream.read(24) == b"version https://git-lfs."
        why = "a git-lfs pointer: run `git lfs pull`" if pointer else "truncated or corrupt: copy or download it again"
        raise LcmError(f"{file} ({size} bytes) cannot be read as safetensors ({error}); {why}") from error


def weights_size(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> int:
    """Bytes that a file of these tensors takes, but for its header."""
    return sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


def writable(dtype: Any) -> np.dtype:
    """`dtype` as numpy's. Raises LcmError where weights cannot be written in it."""
    dtype = np.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise LcmError(f"weights cannot be written as {dtype.name}; choose one of {', '.join(_DTYPES)}")
    return dtype


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    dtype: Any,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, calling `tensor` for one key after another, and see it onto the disk.

    Layout: 8 bytes of header length, a JSON header, the tensors' bytes in C order, little endian, without gaps.
    `metadata` stands in the header beside `format`.

    Raises:
      LcmError: unknown dtype; a tensor that is not of its shape and dtype, contiguous and finite.
    """
    dtype = writable(dtype)
    # `format`: transformers 4 does not open a file without it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key, shape in shapes.items():
            value = tensor(key)
            if value.shape != tuple(shape) or value.dtype != dtype or not value.flags.c_contiguous:
                raise LcmError(f"{key}: {value.dtype} {value.shape} instead of contiguous {dtype} {tuple(shape)}")
            if not np.isfinite(value).all():
                raise LcmError(f"{key} has values that are not finite in {dtype}; write float32, or look at the run")
            stream.write(value.reshape(-1).view(np.uint8).data)
        sync(stream)
