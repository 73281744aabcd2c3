"""Weight files of models: safetensors, in one file or in shards, with or without a variant.

    NAME[.VARIANT].safetensors                     one file
    NAME.safetensors.index[.VARIANT].json          {"weight_map": {key: shard}}, shards beside it

NAME is `diffusion_pytorch_model` for UNet and VAE, `model` for text encoders. Pickled weights (.bin, .ckpt) are never
opened, and quantised ones, whose numbers mean nothing without their scales, are refused; plain 8-bit floats are read.
The writer streams: it holds one tensor at a time in memory, whatever the size of the model.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # numpy knows bfloat16 only after this
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

# Floats that the safetensors library checks, but does not make arrays of.
_EIGHT_BITS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_SHARED_BYTES = ("F4", "F6_E2M3", "F6_E3M2")  # several numbers in one; programs differ in their order
# What quantisers put beside weights or into the header: ComfyUI, llm-compressor, GPTQ, bitsandbytes, quanto.
_QUANTISED = re.compile(
    r"(.*\.)?(scaled_fp8|comfy_quant|_quantization_metadata|scale_(weight|input)|(weight|input|output)_scale(_\d|_inv)?"
    r"|weight_zero_point|qweight|qzeros|SCB|(weight\.)?((nested_)?(absmax|quant_map)|quant_state\..*|_(data|scale|shift)))"
)

_CONVERT = (
    "is pickled, which can run code, and is not opened; convert it once, in an environment with torch: "
    "python -c \"import torch, safetensors.torch as s; t = torch.load('{0}', weights_only=True); "
    "s.save_file({{k: v.clone().contiguous() for k, v in t.get('state_dict', t).items() if hasattr(v, 'clone')}}, "
    "'{1}-converted.safetensors')\"; use that file in its place. If torch refuses it, as it does objects of "
    "pytorch_lightning, and you trust its source: weights_only=False"
)
# Files of other kinds under a weight file's name: how they begin -> what is wrong, and the way out.
_OTHERS = (
    (rb"PK\x03\x04(?s:.){1,250}\.pkl|\x80[\x02-\x05][^\x00]", _CONVERT),  # torch.save's zips, and its older streams
    (rb"GGUF", "is a GGUF file, whose weights are quantised; give the .safetensors that it was made from"),
    (rb"version https://git-lfs\.", "is a git-lfs pointer: run `git lfs pull`"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is an archive; unpack it and give what is in it"),
    (rb"\x89HDF\r\n", "is an HDF5 file; give the .safetensors of the model"),
    (rb"[\s -~]{8}", "is text, such as a web page or a server's error ({2}); download the file itself"),
)


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


def is_of_folder(path: Path) -> bool:
    """Whether a file is that of a UNet's or VAE's folder in diffusers format, whose config is beside it."""
    return path.name.startswith(DIFFUSERS_NAME) and (path.parent / "config.json").is_file()


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
    path = next(_present(folder, name, variant), None)
    if path is None:
        raise LcmError(_nothing_found(folder, name, variant))
    check_regular(path)
    return path, [path] if path.suffix == SUFFIX else _shards(path)


def has_weights(folder: Path, name: str, variant: str | None) -> bool:
    """Whether `find_weights` finds something, whole or not."""
    return any(_present(folder, name, variant))


def _present(folder: Path, name: str, variant: str | None) -> Iterator[Path]:
    paths = (folder / file for file in (file_name(name, variant), *_index_names(name, variant)))
    return filter(os.path.lexists, paths)


def check_regular(path: Path) -> None:
    """Raises LcmError unless `path` is a file that can be read without waiting: no folder, pipe or broken link."""
    if not path.exists():
        wrong = f"is a link to {os.readlink(path)}, which is missing" if path.is_symlink() else "does not exist"
        raise LcmError(f"{path} {wrong}; copy or download it again")
    if not path.is_file():
        raise LcmError(f"{path} is no regular file; put the weights in its place")


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
    if variant and (safe or not weights):
        only = f", only {', '.join(weights)}; ask for one of those" if safe else "; ask for another"
        return f"{folder} has no variant {variant!r} ({wanted}){only}, or leave the variant out"
    name_it = "the word before .safetensors (--variant, config.model.variant)"
    if safe:
        if variants := [file for file in safe if re.fullmatch(rf"{name}(-[\d-]+of-\d+)?\.[\w.-]+{SUFFIX}", file)]:
            return f"{folder} has no {wanted}, only {', '.join(variants)}; name the variant, {name_it}"
        if any(re.fullmatch(rf"{name}-\d+-of-\d+{SUFFIX}", file) for file in safe):
            return f"{folder} has shards, but no {_index_names(name, None)[0]}; copy or download it"
        return f"{folder} has no {wanted}, only {', '.join(safe)}; if that is this model, rename it to {wanted}"
    pickled = f"only pickled weights ({', '.join(weights)}), which can run code and are not opened; "
    nothing = f"no weights at all; if the original has a variant only, name it, {name_it}; if it has them as .bin, "
    why = pickled if weights else nothing
    root = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    loader = "DiffusionPipeline" if root != folder else "AutoModel"
    # In the hub's cache a folder is .../models--owner--name/snapshots/revision.
    hub = next((part.split("--", 1)[1].replace("--", "/") for part in root.parts if part.startswith("models--")), None)
    return (
        f"{folder} has no {wanted}: {why}convert them once, in an environment with torch: "
        f"python -c \"from diffusers import {loader} as M; M.from_pretrained('{hub or root}')"
        f".save_pretrained('{root.name}-safetensors')\""
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
            check_regular(file)
            with _reading(file):
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
                metadata = handle.metadata() or {}
                for key in handle.keys():
                    if key in holders:
                        raise LcmError(f"{key} is both in {holders[key][0].name} and in {file}; remove one of them")
                    holders[key] = file, handle
                    shapes[key] = tuple(handle.get_slice(key).get_shape())
            if marks := [key for key in (*shapes, *metadata) if _QUANTISED.fullmatch(key)]:
                raise LcmError(
                    f"{file} is quantised ({marks[0]}); give the file in 16 or 32 bits that it was made from"
                )
        header_of = functools.cache(_header)

        def read(key: str) -> np.ndarray:
            file, handle = holders[key]
            with _reading(file):
                dtype = handle.get_slice(key).get_dtype()
                if dtype in _SHARED_BYTES:
                    raise LcmError(f"{file}: {key} has numbers of {dtype}; give the file in 8 or more bits")
                if dtype not in _EIGHT_BITS:
                    return handle.get_tensor(key)
                header, start = header_of(file)
                offset = start + header[key]["data_offsets"][0]
                flat = np.fromfile(file, _EIGHT_BITS[dtype], math.prod(shapes[key]), offset=offset)
                return flat.reshape(shapes[key])

        yield Weights(source, shapes, read, metadata if len(paths) == 1 else {})


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the position of the first tensor's bytes."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), 8 + size


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns whatever the safetensors library raises into one line that names the file and what is wrong with it."""
    try:
        with foreign.reading(file, "safetensors", "truncated or corrupt: copy or download it again"):
            yield
    except LcmError:
        check_kind(file)
        raise


def check_kind(file: Path) -> None:
    """Raises LcmError, with the way out, if the first bytes of a file show another kind than safetensors."""
    with file.open("rb") as stream:
        start = stream.read(300)
    for pattern, why in _OTHERS:
        if re.match(pattern, start) and start[8:9] != b"{":  # with which the header of safetensors begins
            text = ascii(start[:40].decode(errors="ignore"))
            raise LcmError(f"{file} {why.format(file, file.with_suffix(''), text)}")


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
