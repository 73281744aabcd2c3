"""Weight files: every spelling that torch writes is read, damaged files are named, and nothing is unpickled."""

import fnmatch
import json
import os
import re
import shutil
import struct
import zipfile

import jax.numpy as jnp
import lora_kit
import numpy as np
import pytest
import safetensors
import safetensors.torch
import tiny
import torch

from lcm_jax.errors import LcmError
from lcm_jax.pretrained import hub, load_unet, lora_files, names
from lcm_jax.pretrained.safetensors_io import (
    DIFFUSERS_NAME,
    check_file,
    download_patterns,
    open_file,
    open_weights,
    save_file,
    weights_size,
    write_weights,
)

NAME = DIFFUSERS_NAME


def read_all(folder, variant=None, name=NAME):
    with open_weights(folder, name, variant) as weights:
        return {key: weights.read(key) for key in weights.shapes}


def same(read, state_dict, dtype=torch.float32):
    return read.keys() == state_dict.keys() and all(
        np.array_equal(read[key], value.to(dtype).float().numpy()) for key, value in state_dict.items()
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """unet/ as torch writes it in shards, plain and as variant fp16."""
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny.torch_unet("sd1")
    model.save_pretrained(folder, max_shard_size="1MB")
    half = type(model).from_config(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder, variant="fp16", max_shard_size="1MB")
    return folder


def test_files_and_shards_written_by_torch(sharded):
    assert same(read_all(tiny.folder("sd1") / "unet"), tiny.torch_unet("sd1").state_dict())
    assert len(list(sharded.glob("*.safetensors"))) >= 6
    assert same(read_all(sharded), tiny.torch_unet("sd1").state_dict())
    assert same(read_all(sharded, "fp16"), tiny.torch_unet("sd1").state_dict(), torch.float16)


def test_old_spelling_of_shards_and_index(sharded, tmp_path):
    index = json.loads((sharded / f"{NAME}.safetensors.index.fp16.json").read_text())
    renamed = {}
    for file in set(index["weight_map"].values()):
        renamed[file] = re.sub(r"\.fp16(-\d+-of-\d+)\.safetensors", r"\1.fp16.safetensors", file)
        assert renamed[file] != file
        shutil.copy(sharded / file, tmp_path / renamed[file])
    index["weight_map"] = {key: renamed[file] for key, file in index["weight_map"].items()}
    (tmp_path / f"{NAME}.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert same(read_all(tmp_path, "fp16"), tiny.torch_unet("sd1").state_dict(), torch.float16)


def test_a_single_file_is_read_before_an_index(sharded, tmp_path):
    target = shutil.copytree(sharded, tmp_path / "both")
    marked = {"only": torch.ones(2)}
    safetensors.torch.save_file(marked, target / f"{NAME}.safetensors")
    assert read_all(target).keys() == {"only"}
    assert "only" not in read_all(target, "fp16")


def test_variants_are_never_mixed_up(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / f"{NAME}.safetensors")
    with pytest.raises(LcmError, match=r"no variant 'fp16' .*\.fp16\.safetensors.*only diffusion_pytorch_model.safet"):
        read_all(tmp_path, "fp16")
    (tmp_path / f"{NAME}.safetensors").rename(tmp_path / f"{NAME}.fp16.safetensors")
    with pytest.raises(LcmError, match="has no .*, only .*name the variant, .*--variant, config.model.variant"):
        read_all(tmp_path)
    assert read_all(tmp_path, "fp16").keys() == {"a"}
    for name, words in {
        f"{NAME} (1).safetensors": rf"\(1\).safetensors; .* rename it to {NAME}.safetensors",
        "model.safetensors": "only model.safetensors; .* rename it",
        f"{NAME}-00001-of-00002.safetensors": "has shards, but no .*.index.json",
    }.items():
        next(tmp_path.iterdir()).rename(tmp_path / name)
        with pytest.raises(LcmError, match=words):
            read_all(tmp_path)


def test_a_folder_of_pickles_is_refused_and_the_conversion_works(tmp_path, monkeypatch):
    tiny.torch_unet("sd1").save_pretrained(tmp_path / "unet", safe_serialization=False)
    with pytest.raises(LcmError) as caught:
        load_unet(tmp_path / "unet")
    message = str(caught.value)
    assert "only pickled weights (diffusion_pytorch_model.bin)" in message and "\n" not in message
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', message)[1], {})
    module, params = load_unet(tmp_path / "unet-safetensors")
    assert same(names.to_torch(module, params), tiny.torch_unet("sd1").state_dict())


def test_a_pickled_part_of_a_pipeline_names_the_whole_pipeline(tmp_path):
    folder = tiny.copy("sd1", tmp_path / "model")
    (folder / "unet" / f"{NAME}.safetensors").rename(folder / "unet" / f"{NAME}.bin")
    with pytest.raises(LcmError) as caught:
        load_unet(folder)
    assert f"DiffusionPipeline as M; M.from_pretrained('{folder}').save_pretrained(" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_truncated_file_is_named(tmp_path, kept):
    content = (tiny.folder("sd1") / "unet" / f"{NAME}.safetensors").read_bytes()
    path = tmp_path / f"{NAME}.safetensors"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(LcmError, match="truncated or corrupt") as caught:
        read_all(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_garbage_and_git_lfs_pointers_are_named(tmp_path):
    path = tmp_path / f"{NAME}.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(LcmError, match="truncated or corrupt"):
        read_all(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167536\n")
    with pytest.raises(LcmError, match="git lfs pull"):
        read_all(tmp_path)


def opened(path):
    """Each tensor of a file, or the one line that refuses it."""
    try:
        with open_file(path) as weights:
            return {key: weights.read(key) for key in weights.shapes}
    except LcmError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_eight_bit_floats_are_read_as_torch_reads_them(tmp_path, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    tensors = {"a": torch.ones(3), "every": every.reshape(16, 16), "one": every[57].clone(), "none": every[:0].clone()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    found = opened(tmp_path / "x.safetensors")
    for key, value in tensors.items():
        np.testing.assert_array_equal(found[key].astype(np.float32), value.float().numpy())


def test_a_lora_in_eight_bits_is_that_of_its_values(tmp_path):
    modules = lora_files.modules_of(lora_kit.pipeline("sd1"))
    tensors = lora_kit.tensors_of("kohya", lora_kit.factors(modules["unet"]), alpha=2)
    eight = {key: torch.tensor(np.asarray(value)).to(torch.float8_e4m3fn) for key, value in tensors.items()}
    for name, found in (("eight", eight), ("wide", {key: value.float() for key, value in eight.items()})):
        safetensors.torch.save_file(found, tmp_path / f"{name}.safetensors")
    lora_kit.same_lora(*(lora_files.read_lora(tmp_path / f"{n}.safetensors", modules) for n in ("eight", "wide")))


def one(dtype, shape, end, begin=0):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


HEADERS = {  # header, its declared length, words of the refusal
    "long": (b"{}", 2**63, "header too large"),
    "longer than the file": (b"{}", 2**20, "header"),
    "deep": (b'{"a":' + b"[" * 100_000, None, "recursion limit"),
    "no object": (b"[]", None, "invalid type"),
    "no text": (b'{"\xff":1}', None, "UTF-8"),
    "dtype": (one("F99", [1], 4), None, "F99"),
    "huge": (one("F32", [10**12], 4), None, "invalid shape"),
    "overflow": (one("F32", [2**62, 2**62], 4), None, "overflow"),
    "negative": (one("F32", [-1], 4), None, "integer `-1`"),
    "offsets": (one("F32", [1], 0, 4), None, "offset"),
    "overlap": (one("F32", [1], 4) | {"b": one("F32", [1], 4)["a"]}, None, "offset"),
    "metadata": ({"__metadata__": {"a": 1}}, None, "expected a string"),
    "half bytes": (one("F4", [8], 4), None, "a has numbers of F4; give the file in 8 or more bits"),
    "ComfyUI, old": (
        one("F8_E4M3", [4], 4) | {"scaled_fp8": one("F8_E4M3", [0], 4, 4)["a"]},
        None,
        "quantised .scaled",
    ),
    "ComfyUI": ({"l.comfy_quant": one("U8", [4], 4)["a"]}, None, "quantised .l.comfy_quant.; give the file in 16"),
    "ComfyUI, header": (one("F32", [1], 4) | {"__metadata__": {"_quantization_metadata": "{}"}}, None, "quantised"),
    "scale": ({"l.scale_weight": one("F32", [], 4)["a"]}, None, "quantised"),
    "other scale": ({"l.weight_scale": one("F32", [1], 4)["a"]}, None, "quantised"),
    "bitsandbytes": ({"l.weight.absmax": one("F32", [1], 4)["a"]}, None, "quantised"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_odd_headers_are_one_line(tmp_path, case):
    header, length, words = HEADERS[case]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(4))
    assert re.search(words, opened(path))


def test_files_of_other_kinds_say_what_to_do(tmp_path):
    """Whatever their name; also where a folder is asked for, as by vae=."""
    torch.save({"state_dict": {}}, tmp_path / "new.ckpt")
    torch.save({}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model/unet/config.json", "{}")
    contents = {
        "x.gguf": b"GGUF\x03\0\0\0" + bytes(40),
        "page.safetensors": b"<!DOCTYPE html>\n<html>",
        "error.safetensors": b"Invalid username or password.",
        "pointer.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    words = {
        "new.ckpt": "is pickled, .* convert it once, .*new-converted.safetensors",
        "old.safetensors": "is pickled",
        "model.zip": "is an archive; unpack it",
        "x.gguf": "is a GGUF file, .*; give the .safetensors",
        "page.safetensors": "is text, such as a web page .*<!DOCTYPE html>.*; download the file itself",
        "error.safetensors": "Invalid username",
        "pointer.bin": "git lfs pull",
    }
    for name, expected in words.items():
        assert hub.is_single_file(tmp_path / name)
        assert re.search(expected, opened(tmp_path / name)), name
        with pytest.raises(LcmError, match=expected):
            hub.local_folder(tmp_path / name, [])


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("gone")
    for name, words in (("pipe", "is no regular file"), ("link", "is a link to gone, which is missing")):
        path = tmp_path / f"{name}.safetensors"
        assert words in opened(path)
        with pytest.raises(LcmError, match=words):
            hub.local_file(path)
        folder = tmp_path / name
        folder.mkdir()
        path.rename(folder / f"{NAME}.safetensors")
        with pytest.raises(LcmError, match=words):
            read_all(folder)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (1, "names 1 as a shard"),
        (None, "names None as a shard"),
        ("weights.bin", "weights.bin is pickled"),
        ("folder.safetensors", "lacks 1 of 1 shards"),
        ("a\0b", "lacks 1 of 1 shards"),
    ],
)
def test_shards_of_other_kinds(tmp_path, shard, words):
    (tmp_path / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    (tmp_path / "folder.safetensors").mkdir()
    torch.save({}, tmp_path / "weights.bin")
    with pytest.raises(LcmError, match=words):
        read_all(tmp_path)


def test_damaged_shard_sets(sharded, tmp_path):
    target = shutil.copytree(sharded, tmp_path / "copy")
    index = target / f"{NAME}.safetensors.index.json"
    first = sorted(target.glob(f"{NAME}-*.safetensors"))[0]
    first.rename(tmp_path / "aside")
    with pytest.raises(LcmError, match=f"lacks 1 of .* shards .{first.name}"):
        read_all(target)
    (tmp_path / "aside").rename(first)

    original = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": original["weight_map"] | {"x": "../../x.safetensors"}}))
    with pytest.raises(LcmError, match="not beside it"):
        read_all(target)
    index.write_text(json.dumps({}))
    with pytest.raises(LcmError, match="no weight_map"):
        read_all(target)
    index.write_text("{")
    with pytest.raises(LcmError, match="not valid JSON"):
        read_all(target)

    index.write_text(json.dumps(original))
    other = sorted(target.glob(f"{NAME}-*.safetensors"))[1]
    shutil.copy(first, other)
    with pytest.raises(LcmError, match=f"both in {first.name} and in"):
        read_all(target)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_files_are_torchs(tmp_path, dtype):
    rng = np.random.default_rng(0)
    values = {"a.weight": rng.standard_normal((3, 4, 1, 2)), "b": rng.standard_normal(5), "scalar": np.array(2.5)}
    values = {key: value.astype(jnp.dtype(dtype)) for key, value in values.items()}
    path = tmp_path / "x.safetensors"
    shapes = {key: value.shape for key, value in values.items()}
    write_weights(path, shapes, values.__getitem__, jnp.dtype(dtype))
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == values.keys()
    for key, value in values.items():
        assert loaded[key].dtype == getattr(torch, dtype) and tuple(loaded[key].shape) == value.shape
        assert np.array_equal(loaded[key].float().numpy(), value.astype(np.float32))
    with safetensors.safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0 and path.stat().st_size == 8 + header + weights_size(shapes, jnp.dtype(dtype))


def test_the_writer_checks_every_tensor(tmp_path):
    square = np.arange(4, dtype=np.float32).reshape(2, 2)
    for i, (bad, what) in enumerate(
        [
            (square.T, "contiguous"),  # a writer of raw bytes would ignore its strides
            (square.astype(np.float64), "float64"),
            (square[:1], "instead of"),
            (square + np.nan, "not finite"),
        ]
    ):
        with pytest.raises(LcmError, match=what):
            write_weights(tmp_path / str(i), {"w": (2, 2)}, lambda key, bad=bad: bad, np.float32)
    with pytest.raises(LcmError, match="int8"):
        write_weights(tmp_path / "int", {"w": (2, 2)}, lambda key: square, np.int8)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.safetensors"

    def save(tensor):
        return save_file(path, {"a": (2,), "b": (2,)}, tensor, np.float32)

    def interrupted(key):
        assert not path.exists()
        if key == "b":
            raise KeyboardInterrupt
        return np.ones(2, np.float32)

    def made_meanwhile(key):
        path.write_bytes(b"mine")
        return np.ones(2, np.float32)

    with pytest.raises(KeyboardInterrupt):
        save(interrupted)
    assert not any(tmp_path.iterdir())
    for tensor in (made_meanwhile, pytest.fail):  # the second file is refused before anything is computed
        with pytest.raises(LcmError, match="x.safetensors already exists; choose another name"):
            save(tensor)
        assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(LcmError, match="does not end in .safetensors"):
        check_file(tmp_path / "x")
    with pytest.raises(LcmError, match=r"\d+ are free"):
        check_file(tmp_path / "y.safetensors", 1 << 60)


def test_download_patterns_are_of_one_variant():
    present = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.safetensors.fp16.index.json",
    ]

    def downloaded(variant):
        patterns = ["unet/" + pattern for pattern in download_patterns(NAME, variant)]
        return {file for file in present if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)}

    assert downloaded(None) == {present[0], present[2], present[8]}
    assert downloaded("fp16") == {present[1], present[4], present[6], present[9], present[10]}
