"""What is fuzzed: one target for each reader of files that other programs, or people, wrote.

A target gets the bytes of one file, reads them as the programs do, and looks at what was read: numbers that multiply
weights are finite, a tensor's bytes come from its file, prompts are the lines of their file. Odd files may be refused,
in one line that names the file. `fault` says what else happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import struct
import sys
import tarfile
import traceback
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import fuzz_mutations as mutations
import numpy as np
from PIL import Image

from lcm_jax import assets, sample
from lcm_jax.data import cache, images
from lcm_jax.data.records import BadRecordError
from lcm_jax.data.sources import open_source, tar_index
from lcm_jax.errors import LcmError
from lcm_jax.metrics import statistics, table
from lcm_jax.metrics.networks import torch_file
from lcm_jax.models.config import RUN_FIELDS
from lcm_jax.models.controlnet import ControlNetModel
from lcm_jax.models.unet import Encoder
from lcm_jax.pretrained import Pipeline, embeddings, load_pipeline, lora_files, lora_keys, safetensors_io
from lcm_jax.pretrained.controlnets import load_controlnet
from lcm_jax.pretrained.names import torch_table
from lcm_jax.pretrained.tokenizer import tokenize
from lcm_jax.runtime import boards, checkpoints, lost, telemetry, workdir
from lcm_jax.sampling import png, prompts

SECONDS = 5.0  # of all processors together that one input may take
_OUTSIDE = "outside.bin"  # beside the folder that a target reads: no reader may get there
_SECRET = b"content from outside of the folder"


class WrongError(Exception):
    """What was read is not what the file says."""


class TooSlowError(BaseException):
    """One input took more than SECONDS. No Exception, so that no reader takes it for a fault of its file."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      seeds: folder -> good inputs, after it has written to the folder what the reader needs besides.
      mutate: makes another input of one.
      read: (input, folder): reads it. Raises WrongError.
      memory: MiB that reading one input may take.
      names: what names the file in an error beside the names in its folder; None if the reader gets bytes.
    """

    seeds: Callable[[Path], list[bytes]]
    mutate: mutations.Mutation
    read: Callable[[bytes, Path], None]
    memory: int = 512
    names: tuple[str, ...] | None = ()


TARGETS: dict[str, Target] = {}


def fault(target: Target, content: bytes, folder: Path) -> tuple[str, str] | None:
    """(its kind, a traceback or a message), if reading an input did something else than to succeed or to refuse."""
    try:
        with _in_time(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            target.read(content, folder)
    except (LcmError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and not isinstance(error, LcmError) and error.filename is None:
            return _kind(error), f"an OSError without a file name: {traceback.format_exc()}"
        if not _one_line(message):
            return f"lines {_kind(error)}", f"not one line: {message!r}"
        if target.names is not None and not _names_file(message, folder, target.names):
            return f"name {_kind(error)}", f"does not name the file: {message!r}"
        try:
            message.encode()
        except UnicodeEncodeError:
            return f"surrogates {_kind(error)}", f"cannot be printed: {message!r}"
    except (Exception, TooSlowError) as error:
        return _kind(error), traceback.format_exc()
    return None


def _names_file(message: str, folder: Path, more: Iterable[str]) -> bool:
    known = [str(folder), *(path.name for path in folder.rglob("*") if path.is_file()), *more]
    return any(name in message for name in known)


def _one_line(message: str) -> bool:
    return bool(message) and not {"\n", "\r"} & set(message)


def _kind(error: BaseException) -> str:
    """The error's type, and the innermost place in the package; for a WrongError what is wrong."""
    if isinstance(error, WrongError):
        return f"WrongError {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/lcm_jax/" in frame.filename]
    frame = (own or frames)[-1]
    return f"{type(error).__name__} {Path(frame.filename).stem}.{frame.name}"


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _check_finite(what: str, *values: Any) -> None:
    for value in values:
        array = np.asarray(value)
        if array.dtype.kind not in "fiuc":
            raise WrongError(f"{what} is no number")
        if not np.isfinite(array).all():
            raise WrongError(f"{what} is not finite")


def _target(name: str, mutate: mutations.Mutation, seeds: Callable[[Path], list[bytes]], **options: Any) -> Callable:
    """Enters the decorated `read` as a target."""

    def enter(read: Callable[[bytes, Path], None]) -> Callable:
        TARGETS[name] = Target(seeds, mutate, read, **options)
        return read

    return enter


def _mixed(*ways: mutations.Mutation) -> mutations.Mutation:
    return lambda content, chance: chance.choice(ways)(content, chance)


# One of several files in a folder: an input is "NAME\0CONTENT".


def _of_files(files: Mapping[str, bytes]) -> list[bytes]:
    return [name.encode() + b"\0" + content for name, content in files.items()]


def _in_named(content: bytes, chance: Random) -> bytes:
    name, mark, content = content.partition(b"\0")
    if not mark:
        return mutations.in_bytes(name, chance)
    if name.endswith(b".jsonl"):
        content = mutations.in_lines(content, chance)
    elif name.endswith(b".safetensors"):
        content = mutations.in_safetensors(content, chance)
    elif name.endswith(b".txt"):
        content = chance.choice((mutations.in_text, mutations.in_bytes))(content, chance)
    else:
        content = (mutations.in_json if chance.random() < 0.95 else mutations.in_bytes)(content, chance)
    return name + b"\0" + content


@contextlib.contextmanager
def _exchanged(content: bytes, folder: Path) -> Iterator[Path | None]:
    """The named file of the folder has the input's content in this block; None if the folder has no such file."""
    name, _, content = content.partition(b"\0")
    path = folder / os.fsdecode(name) if b".." not in name and name[:1] != b"/" else folder
    if not path.is_file():
        yield None
        return
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield path
    finally:
        path.write_bytes(before)


# Models


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@functools.cache
def _tiny_folder() -> Mapping[str, bytes]:
    """The files of a model with one level, but for its weights; text encoder and tokenizer are those of "shapes"."""
    folder = Path(assets.resolve("shapes"))
    names = ("model_index.json", "scheduler/scheduler_config.json", *(f"{p}/config.json" for p in _PARTS))
    found = {name: (folder / name).read_bytes() for name in names}
    found |= {f"tokenizer/{path.name}": path.read_bytes() for path in sorted((folder / "tokenizer").iterdir())}
    unet = {"block_out_channels": [8], "attention_head_dim": 2, "norm_num_groups": 4, "cross_attention_dim": 8}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    vae = {"block_out_channels": [4], "down_block_types": ["DownEncoderBlock2D"], "norm_num_groups": 2}
    vae |= {"up_block_types": ["UpDecoderBlock2D"]}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for part, fields in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        name = f"{part}/config.json"
        found[name] = _json(**{**json.loads(found[name]), **fields})
    record = {"solver_steps": 50, "timestep_scaling": 10.0, "sigma_data": 0.5, "w_min": 2.0, "w_max": 14.0}
    return found | {"lcm_config.json": _json(**record)}


_PARTS = ("unet", "vae", "text_encoder")


def _write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _check_modules(pipeline: Any) -> None:
    """Values of a pipeline's modules have the types that the modules declare; numbers are finite."""
    for part, module in pipeline.parts.items():
        hints = typing.get_type_hints(type(module))
        for field in dataclasses.fields(module):
            if field.name in ("parent", "name", "dtype", "attention_fn", "weights_fn", "remat"):
                continue
            value, hint = getattr(module, field.name), hints.get(field.name)
            good = {bool: bool, int: int, float: int | float, str: str}.get(hint, object)
            if not isinstance(value, good) or (hint in (int, float) and isinstance(value, bool)):
                raise WrongError(f"{part}.{field.name} is of another type than {hint.__name__}")
            if isinstance(value, float):
                _check_finite(f"{part}.{field.name}", value)
    if not pipeline.vae.scaling_factor > 0:
        raise WrongError("vae.scaling_factor is not positive")
    _check_finite("the noise table", pipeline.schedule.alphas_cumprod)
    constants = getattr(pipeline, "constants", None)
    if constants is not None:
        _check_finite("a constant of the record", constants.timestep_scaling, constants.sigma_data, constants.w_min)


_NAMES = ("UNet", "VAE", "text encoder", "tokenizer", "scheduler")  # folders of these parts


def _configs(folder: Path) -> list[bytes]:
    files = {name: text for name, text in _tiny_folder().items() if not name.startswith("tokenizer/")}
    return _of_files({name: (_write(folder, _tiny_folder()) / name).read_bytes() for name in files})


@_target("configs", _in_named, _configs, memory=1024, names=_NAMES)
def _(content: bytes, folder: Path) -> None:
    with _exchanged(content, folder) as path:
        if path is not None:
            _check_modules(load_pipeline(folder, weights=False)[0])


def _tokenizer(folder: Path) -> list[bytes]:
    """The tokenizer's files; a tokenizer is read with its text encoder, here that of "shapes"."""
    encoder = Path(assets.resolve("shapes"), "text_encoder")
    files = dict(_tiny_folder()) | {f"text_encoder/{path.name}": path.read_bytes() for path in encoder.iterdir()}
    unet = json.loads(files["unet/config.json"])
    files["unet/config.json"] = _json(**{**unet, "cross_attention_dim": 96})
    _write(folder, files)
    return _of_files({name: text for name, text in files.items() if name.startswith("tokenizer/")})


@_target("tokenizer", _in_named, _tokenizer)
def _(content: bytes, folder: Path) -> None:
    with _exchanged(content, folder) as path:
        if path is not None:
            found = load_pipeline(folder, weights=("text_encoder",))[0].tokenizer
            if type(found.length) is not int or not 2 <= found.length <= 10_000:
                raise WrongError("the tokenizer's length is no length")
            ids = tokenize(found, ["a red star", ""])
            if ids.shape != (2, found.length) or ids.min() < 0:
                raise WrongError("ids are not those of a vocabulary")
            found.vocabulary_hash()


def _tensor_file(tensors: Mapping[str, np.ndarray], **metadata: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, value in tensors.items():
        raw = value.tobytes()
        kind = {"float16": "F16", "float32": "F32", "uint16": "BF16"}[value.dtype.name]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return mutations.safetensors(header, data)


def _check_tensors(weights: Any) -> dict[str, np.ndarray]:
    found = {}
    for key, shape in weights.shapes.items():
        found[key] = weights.read(key)
        if found[key].shape != tuple(shape):
            raise WrongError("a tensor has another shape than its header says")
    return found


def _two_tensors(folder: Path) -> list[bytes]:
    return [_tensor_file({"a": np.ones((2, 3), "f4"), "b": np.ones(4, "u2"), "c": np.ones((), "f2")}, format="pt")]


@_target("safetensors", mutations.in_safetensors, _two_tensors)
def _(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with safetensors_io.open_file(path) as weights:
        _check_tensors(weights)


_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _index(folder: Path) -> list[bytes]:
    shards = {name: _tensor_file({key: np.ones(3, "f4")}) for key, name in zip("ab", _SHARDS, strict=True)}
    index = _json(metadata={"total_size": 24}, weight_map=dict(zip("ab", _SHARDS, strict=True)))
    _write(folder, {"model.safetensors.index.json": index, **shards})
    return [b"model.safetensors.index.json\0" + index, *_of_files(shards)]


@_target("index", _in_named, _index)
def _(content: bytes, folder: Path) -> None:
    with _exchanged(content, folder) as path:
        if path is not None:
            with safetensors_io.open_weights(folder, "model") as weights:
                _check_tensors(weights)


@functools.cache
def _single_file() -> bytes:
    """The tiny model as one file."""
    from flax import traverse_util

    from lcm_jax.pretrained import save_single_file

    folder = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp", f"lcm_jax_fuzz_single_{os.getpid()}")
    try:
        pipeline, shapes = load_pipeline(_write(folder, _tiny_folder()), weights=False)
        flat = traverse_util.flatten_dict(shapes)
        params = traverse_util.unflatten_dict({path: np.full(one.shape, 0.01, "f4") for path, one in flat.items()})
        return save_single_file(pipeline, params, folder / "one.safetensors").read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _singles(folder: Path) -> list[bytes]:
    _write(folder / "config", _tiny_folder())
    return [_single_file()]


@_target("single_file", mutations.in_safetensors, _singles, memory=1024)
def _(content: bytes, folder: Path) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(content)
    pipeline, _ = load_pipeline(path, config=folder / "config")
    _check_modules(pipeline)  # weights that are not finite show in the images


@functools.cache
def _pipeline() -> Pipeline:
    folder = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp", f"lcm_jax_fuzz_pipeline_{os.getpid()}")
    try:
        return load_pipeline(_write(folder, _tiny_folder()), weights=False)[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _controlnets(folder: Path) -> list[bytes]:
    """A net for the tiny model, of one latent for one pixel, by diffusers' keys."""
    names = {field.name for field in dataclasses.fields(Encoder)} - RUN_FIELDS
    fields = {name: getattr(_pipeline().unet, name) for name in names}
    net = ControlNetModel(**fields, conditioning_embedding_out_channels=(4,))
    tensors = {key: np.full(one.torch_shape, 0.01, "f4") for key, one in torch_table(net).items()}
    return [_tensor_file(tensors)]


@_target("controlnet", mutations.in_safetensors, _controlnets)
def _(content: bytes, folder: Path) -> None:
    path = folder / "net.safetensors"
    path.write_bytes(content)
    load_controlnet(path, _pipeline())  # weights that are not finite show in the images


@functools.cache
def _modules() -> Mapping[str, Any]:
    return lora_files.modules_of(_pipeline())


def _loras(folder: Path) -> list[bytes]:
    """Kohya's keys with alphas, and peft's with alpha in the header."""
    kohya, peft, layers = {}, {}, []
    for name, kernel in lora_keys.layers(_modules()["unet"]).items():
        if not name.endswith(("attn2.to_q", "attn2.to_v")):
            continue
        fan, out = kernel.shape
        a, b, stem = np.full((2, fan), 0.1, "f4"), np.full((out, 2), 0.1, "f4"), lora_keys.underscored(name)
        stem = stem if stem.startswith("lora_unet_") else f"lora_unet_{stem}"
        kohya |= {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b,
            f"{stem}.alpha": np.float32(2).reshape(()),
        }
        peft |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
        layers.append(name)
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": layers, "unet.alpha_pattern": {"to_q": 4}}
    return [
        _tensor_file(kohya, ss_network_alpha="2", ss_network_module="networks.lora"),
        _tensor_file(peft, lora_adapter_metadata=json.dumps(config)),
    ]


@_target("lora", mutations.in_safetensors, _loras)
def _(content: bytes, folder: Path) -> None:
    path = folder / "lora.safetensors"
    path.write_bytes(content)
    found = lora_files.read_lora(path, _modules())
    for layers in found.parts.values():
        for factors in layers.values():
            _check_finite("a scale", factors.scale)
            _check_finite("a factor", factors.lora_A, factors.lora_B)


def _embeddings(folder: Path) -> list[bytes]:
    value = np.full((2, _pipeline().text_encoder.hidden_size), 0.1, "f4")
    return [_tensor_file({"emb_params": value}), _tensor_file({"<word>": value[0].astype("f2")})]


@_target("embedding", mutations.in_safetensors, _embeddings)
def _(content: bytes, folder: Path) -> None:
    path = folder / "word.safetensors"
    path.write_bytes(content)
    found = embeddings.read_embedding(_pipeline(), path)
    if not found.name:
        raise WrongError("an embedding has no name")
    _check_finite("a vector", *found.vectors.values())


# torch's files and NumPy's


def _torch_file(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A state dict of one tensor in a storage of 8 numbers, as torch.save writes it."""

    def name(module: bytes, one: bytes) -> bytes:
        return b"c" + module + b"\n" + one + b"\n"

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    def many(*values: bytes) -> bytes:
        return b"(" + b"".join(values) + b"t"

    def numbers(values: tuple[int, ...]) -> bytes:
        return many(*(b"K" + bytes([value]) for value in values))

    storage = many(text(b"storage"), name(b"torch", b"FloatStorage"), text(b"0"), text(b"cpu"), b"K\x08") + b"Q"
    parts = storage, b"K" + bytes([offset]), numbers(shape), numbers(strides), b"\x89", b"}"
    tensor = name(b"torch._utils", b"_rebuild_tensor_v2") + many(*parts) + b"R"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        content = np.arange(1, 9, dtype="<f4").tobytes()
        for member, value in (("data.pkl", b"\x80\x02}(" + text(b"w") + tensor + b"u."), ("data/0", content)):
            archive.writestr(zipfile.ZipInfo(f"archive/{member}"), value)
    return packed.getvalue()


@_target("pth", mutations.in_zip, lambda folder: [_torch_file((2, 2), (2, 1)), _torch_file((2,), (1,), 3)], memory=256)
def _(content: bytes, folder: Path) -> None:
    path = folder / "weights.pth"
    path.write_bytes(content)
    for value in torch_file.read(path).values():
        for number in np.unique(np.ascontiguousarray(value).view(f"V{value.dtype.itemsize}"))[:1000]:
            if number.tobytes() not in content:
                raise WrongError("a tensor holds bytes that are not in the file")


def _npz(**arrays: Any) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


def _statistics(folder: Path) -> list[bytes]:
    origin = {"name": "inception", "hash": "0" * 8, "resolution": np.array([8, 8]), "count": 5}
    return [_npz(**origin, mu=np.zeros(3), sigma=np.eye(3)), _npz(**origin, features=np.ones((5, 3), np.float32))]


@_target("statistics", mutations.in_zip, _statistics, memory=256)
def _(content: bytes, folder: Path) -> None:
    path = folder / "statistics.npz"
    path.write_bytes(content)
    found = statistics.load(path)
    _check_finite("a statistic", found.stats.mean, found.stats.covariance)
    if found.count < 2:
        raise WrongError("a covariance of fewer than 2 images")


# Data


@functools.cache
def _picture(form: str = "JPEG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 4), np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, form, **({"quality": 40} if form == "JPEG" else {}))
    return stream.getvalue()


def _pictures(folder: Path) -> list[bytes]:
    forms = (("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("GIF", "P"))
    forms += (("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "L"))
    return [_picture(*form) for form in forms if form[1] != "I;16"]


@_target("images", mutations.in_bytes, _pictures, memory=2048, names=None)
def _(content: bytes, folder: Path) -> None:
    found = images.decode(content)
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or not found.size:
        raise WrongError("a decoded image is not uint8 [h w 3]")
    if images.header_size(content) != found.shape[:2]:
        raise WrongError("a header gives another size than the image has")


def _read_source(source: Any, folder: Path) -> list[Any]:
    """All records that can be used; the texts of all can become tokens."""
    found = []
    for bad in source.bad_records:
        if not _one_line(str(bad)):
            raise WrongError("the reason of a bad record is not one line")
    for number in range(len(source)):
        source.where(number)
        try:
            record = source[number]
            with contextlib.suppress(LcmError):
                tokenize(_words(), record.captions)
            if isinstance(record.image, bytes) and _SECRET in record.image:
                raise WrongError("a file outside of the folder was read")
            found.append(record)
        except BadRecordError as error:
            if not _one_line(str(error)):
                raise WrongError("the reason of a bad record is not one line") from None
    for name in ("width", "height"):
        source.field(name)
    return found


@functools.cache
def _words() -> Any:
    return load_pipeline(assets.resolve("shapes"), weights=("text_encoder",))[0].tokenizer


def _tar(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@functools.cache
def _first_record() -> bytes:
    """The first record of every shard: whatever follows, it must be found."""
    return _tar(first_jpg=_picture(), first_txt=b"the first one").rstrip(b"\0").ljust(3 * 1024, b"\0")


def _shard(folder: Path) -> list[bytes]:
    numbers = _json(caption="a red star", width=10, height=12)
    return [_tar(a_jpg=_picture(), a_json=numbers, b_jpg=_picture(), b_txt=b"a blue circle")]


@_target("tar", mutations.in_tar, _shard)
def _(content: bytes, folder: Path) -> None:
    path = folder / "00000.tar"
    path.write_bytes(_whole_blocks(_first_record()) + content)
    tar_index.sidecar_path(path, None).unlink(missing_ok=True)
    found = _read_source(open_source("webdataset", str(path)), folder)
    if not any(record.key == "first" and record.captions == ("the first one",) for record in found):
        raise WrongError("the first record of a shard is lost by what follows it")


def _whole_blocks(tar: bytes) -> bytes:
    """A tar without its end, in whole blocks."""
    kept = tar.rstrip(b"\0")
    return kept + bytes(-len(kept) % 512)


def _sidecar(folder: Path) -> list[bytes]:
    path = folder / "00000.tar"
    path.write_bytes(_tar(a_jpg=b"a picture", a_json=_json(caption="a red star", width=10), b_jpg=b"x", b_txt=b"text"))
    os.utime(path, ns=(10**18, 10**18))  # an index is of one state of its shard
    sidecar = tar_index.sidecar_path(path, None)
    tar_index.make(path, sidecar, None, None)
    return [sidecar.read_bytes()]


@_target("tar_index", mutations.in_zip, _sidecar, memory=256)
def _(content: bytes, folder: Path) -> None:
    path = folder / "00000.tar"
    tar_index.sidecar_path(path, None).write_bytes(content)
    found = tar_index.read(path, tar_index.sidecar_path(path, None), None, None)
    if found is not None and (found.spans.min(initial=0) < 0 or found.spans[:, ::2].max(initial=0) > found.size):
        raise WrongError("an index points outside of its shard")
    _read_source(open_source("webdataset", str(path)), folder)  # rebuilt if it cannot be used


def _folder(folder: Path) -> list[bytes]:
    (folder / "set").mkdir(exist_ok=True)
    (folder / _OUTSIDE).write_bytes(_SECRET)
    _write(folder / "set", {"a.jpg": _picture(), "b/c.png": _picture("PNG")})
    lines = [_json(file_name="a.jpg", text="a red star", width=10), _json(file_name="b/c.png", text=["x", "y"])]
    return [b"\n".join([*lines, b""])]


def _in_paths(content: bytes, chance: Random) -> bytes:
    """A value replaced by the name of the file outside."""
    names = (f"../{_OUTSIDE}", f"b/../../{_OUTSIDE}", f"./../set/../{_OUTSIDE}", f"..\\{_OUTSIDE}", "@outside@")
    return mutations.in_json(content, chance, names * 4)


def _in_metadata(content: bytes, chance: Random) -> bytes:
    if chance.random() < 0.6:
        return mutations.in_lines(content, chance)
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = _in_paths(lines[at], chance)
    return b"\n".join(lines)


@_target("metadata", _in_metadata, _folder)
def _(content: bytes, folder: Path) -> None:
    content = content.replace(b"@outside@", os.fsencode(folder / _OUTSIDE))
    (folder / "set" / "metadata.jsonl").write_bytes(content)
    _read_source(open_source("folder", str(folder / "set")), folder)


def _rows(folder: Path) -> list[bytes]:
    """Rows of a table as JSON, from which the target writes parquet; a picture's bytes are hex."""
    _folder(folder)
    shutil.rmtree(folder / "set")
    _write(folder / "set", {"b/c.png": _picture("PNG")})
    rows = [{"image": {"bytes": "ffd8", "path": None}, "text": "a", "width": 1, "key": "1"}]
    rows += [{"image": {"bytes": None, "path": "b/c.png"}, "text": "b", "width": 2, "key": "2"}]
    return [json.dumps(rows).encode()]


@_target("parquet", _mixed(mutations.in_json, _in_paths), _rows, memory=2048)
def _(content: bytes, folder: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    datasets.disable_progress_bars()
    path = folder / "set" / "train-00000-of-00001.parquet"
    if content.startswith(b"PAR1"):
        path.write_bytes(content)
    else:
        content = content.replace(b"@outside@", os.fsencode(folder / _OUTSIDE))
        try:
            rows = json.loads(content)
            for row in rows:
                raw = row["image"].get("bytes")
                row["image"]["bytes"] = bytes.fromhex(raw) if isinstance(raw, str) else None
            table = pa.Table.from_pylist(rows)
            pa.parquet.write_table(table, path)
        except Exception:  # no table that parquet can hold
            return
    _read_source(open_source("huggingface", str(folder / "set")), folder)


def _cache(folder: Path) -> list[bytes]:
    """A manifest, and the list of bad records; the shard's rows are not read."""
    shard = {"file": "latents-00-00000.array_record", "rows": 2, "bytes": 3}
    arrays = [{"name": "mean", "dtype": "float32", "shapes": [[2, 2, 4]]}]
    groups, data = [{"rows": 2, "shards": [shard]}], {"source": "shapes", "split": "train"}
    manifest = _json(
        **{
            "format": cache.FORMAT,
            "made_by": "lcm_jax",
            "fingerprint": {"resolution": 16},
            "text": "ids",
            "variants": 1,
        },
        **{"dtype": "float32", "shard_size": 2, "seed": 0, "compute_dtype": "float32", "data": data, "examples": [2]},
        **{"arrays": arrays, "groups": groups, "faults": 0, "bad_records": 0},
    )
    bad = _json(shard="0.tar", key="a", reason="no caption") + b"\n"
    found = {cache.MANIFEST: manifest, cache.BAD_RECORDS: bad}
    _write(folder, {**found, shard["file"]: b"abc"})
    return _of_files(found)


@_target("cache", _in_named, _cache)
def _(content: bytes, folder: Path) -> None:
    with _exchanged(content, folder) as path:
        if path is not None:
            found = cache.open(folder)
            if len(found) < 0:
                raise WrongError("a cache of fewer than no rows")
            for bad in found.bad_records():
                if not _one_line(str(bad)):
                    raise WrongError("the reason of a bad record is not one line")


def _table(folder: Path) -> list[bytes]:
    """A row, and the table of it."""
    shared = {"seed": 0, "pictures": 8, "prompts": {"from": "a", "sha256": "b"}, "height": 64, "width": 64}
    program = {"dtype": "float32", "negative_prompt": None, "tiled": False, "fsdp": 1, "timings": 1, "batch_size": 4}
    program |= {"device": "1 x cpu"}
    row = {"model": "m", "sampler": "ddim", "steps": 1, "guidance_scale": 8.0, "evaluations": 2, "values": {"fid": 1.0}}
    row |= {"milliseconds": 4.5, "quartiles": [4.0, 5.0], "timings": 1, "compile_seconds": 9.0}
    settings = {
        "model": {"unet": "c"},
        "program": program,
        "sampling": {"sampler": "ddim", "steps": 1, "spacing": "trailing"},
    }
    files = {"rows/a.json": _json(**row, comparison={**shared, "metrics": {}}, settings=settings)}
    models = {"m": {"model": {"unet": "c"}, "program": program}}
    rows = [{**row, "settings": {"sampling": settings["sampling"]}}]
    files["table.json"] = _json(**shared, metrics={}, notes=[], models=models, rows=rows)
    _write(folder, files)
    return _of_files(files)


@_target("table", _in_named, _table)
def _(content: bytes, folder: Path) -> None:
    with _exchanged(content, folder) as path:
        if path is not None:
            comparison = {
                "seed": 0,
                "pictures": 8,
                "prompts": {"from": "a", "sha256": "b"},
                "height": 64,
                "width": 64,
                "metrics": {},
            }
            table.check_comparable(folder, table.read_rows(folder), comparison)
            if rows := table.read_rows(folder):
                table.markdown(rows)
            rows, _ = table.newest(folder, "m", {})
            if rows:
                table.markdown(rows)


# Texts


def _prompts(folder: Path) -> list[bytes]:
    return [b"a red star\na blue circle\r\n\n a dog \n"]


@_target("prompts", mutations.in_text, _prompts, names=("--prompts",))
def _(content: bytes, folder: Path) -> None:
    path = folder / "prompts.txt"
    path.write_bytes(content)
    arguments = sample.parser().parse_args(["--model=shapes", "--out=out", f"--prompts={path}"])
    found = sample.read_prompts(arguments)
    lines = content.decode("utf-8-sig").split("\n")
    if len(found) != sum(bool(line.lstrip("\ufeff \t\xa0\u3000").strip()) for line in lines):
        raise WrongError("prompts are not the lines of their file")
    if lines[0].strip() and content.startswith(b"\xef\xbb\xbf") and found[0].startswith("\ufeff"):
        raise WrongError("a prompt begins with a byte order mark")


def _syntax(folder: Path) -> list[bytes]:
    return [rb"a (red:1.3) [hat] ((b) \(c\)), x BREAK y <lora:z:0.8>", rb"(a (b:0.5) c:1.2:1.5) [[d]] \\ e:f"]


@_target("syntax", mutations.in_text, _syntax, names=("prompt=",))
def _(content: bytes, folder: Path) -> None:
    text = content.decode(errors="ignore")
    for syntax in prompts.SYNTAXES:
        prompts.check_readable(syntax, prompt=text)
        found = prompts.parse(text, syntax)
        _check_finite("a weight", *(piece.weight for piece in found))
        if {*"".join(piece.text or "" for piece in found)} - {*text}:
            raise WrongError("a piece has characters that its prompt has not")


def _recorded(folder: Path) -> list[bytes]:
    """What A1111 and this program record of an image."""
    flags = {"prompt": "a", "image": "0", "seed": "0", "steps": "2", "size": "16x16", "lora": "x:0.5", "tiled": "True"}
    return [
        b"a\nNegative prompt: b\nSteps: 2, Sampler: LCM, CFG scale: 1.5, Seed: 9, Size: 16x16, RNG: CPU",
        _json(**flags),
    ]


@_target("like", _mixed(mutations.in_json, mutations.in_text), _recorded, names=("--like", "like="))
def _(content: bytes, folder: Path) -> None:
    try:
        about = dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):
        about = {"parameters": content.decode(errors="replace")}
    about = {key: str(value) for key, value in about.items() if key.isascii() and 0 < len(key) < 80 and "\0" not in key}
    png.write_png(folder / "like.png", np.zeros((1, 1, 3), np.uint8), about)
    given = [f"--like={folder / 'like.png'}", f"--out={folder}"]
    if sample.repeated(sample.parser(), given, folder / "like.png").out != folder:
        raise WrongError("an image chooses where to write")


# A run's own files, which a crash, another version or a person may have changed


def _run_files() -> dict[str, bytes]:
    metrics = [{"step": step, "loss": 0.5, "grad_norm": 1.0, "images": 4 * step, "seconds": 1.0} for step in (1, 2, 3)]
    events = [
        {"event": "start", "time": 1.0, "step": 0},
        {"event": "compiled", "time": 2.0, "step": 1},
        {"event": "steps", "time": 3.0, "from": 1, "step": 3, "seconds": 1.0},
        {"event": "saved", "time": 4.0, "step": 2},
        {"event": "end", "time": 5.0, "step": 3},
    ]
    lines = {"metrics.jsonl": metrics, "events.jsonl": events}
    return {
        **{name: b"".join(_json(**line) + b"\n" for line in found) for name, found in lines.items()},
        "config.json": _json(checkpoint={"every": 2}, train={"steps": 3}),
        "data.json": _json(**_DATA),
        "wandb.json": _json(project="p", id="i"),
        "checkpoints/2/sha256.json": b"",
        "checkpoints/2/metrics.json": _json(loss=0.5),
        "checkpoints/2/state": b"state",
    }


_DATA = {"records": 12, "parts": [12]}


def _run(folder: Path) -> list[bytes]:
    files = _run_files()
    files["checkpoints/2/" + checkpoints.DIGESTS_FILE] = files.pop("checkpoints/2/sha256.json")
    files["checkpoints/2/" + checkpoints.METRICS_FILE] = files.pop("checkpoints/2/metrics.json")
    _write(folder, {name: content for name, content in files.items() if content})
    checkpoints.write_digests(folder / "checkpoints" / "2")
    kept = {name: (folder / name).read_bytes() for name in files if not name.endswith("state")}
    return _of_files(kept)


class _Wandb:
    """As much of the package as a board needs."""

    id = "i"

    def init(self, **_: object) -> _Wandb:
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...


@_target("workdir", _in_named, _run)
def _(content: bytes, folder: Path) -> None:
    with _exchanged(content, folder) as path:
        if path is None:
            return
        workdir.read_config(folder)
        lost.check(folder, 2)
        workdir.same_as_before(folder, "data.json", _DATA)
        share = telemetry.Goodput(telemetry.read_events(folder)).share
        if isinstance(share, float) and not 0 <= share <= 1:
            raise WrongError("the goodput is no share")
        kept = {name: (folder / name).read_bytes() for name in (telemetry.METRICS_FILE, telemetry.EVENTS_FILE)}
        try:
            with mock.patch.object(boards, "start", lambda *_: []):
                telemetry.Telemetry(folder, telemetry.RunInfo(10, 4, start_step=2)).close()
        finally:
            _write(folder, kept)
        with mock.patch.dict(sys.modules, wandb=_Wandb()):
            boards.WeightsAndBiases(folder, "p")
        checkpoints.tidy(folder / "checkpoints", "loss")
        checkpoints.find_damage(folder / "checkpoints", 2)
