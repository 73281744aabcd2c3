"""Saved folders: torch loads the same bits, diffusers' pipelines run them, and they appear whole or not at all."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny
import torch
from transformers import CLIPTextModel

from lcm_jax.diffusion import schedule
from lcm_jax.errors import LcmError
from lcm_jax.models.config import to_config
from lcm_jax.pretrained import (
    load_pipeline,
    load_vae,
    safetensors_io,
    save,
    save_pipeline,
    save_unet,
)
from lcm_jax.pretrained.save import lcm_scheduler_config

FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
}


def slot_files(slot: str) -> set[str]:
    tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    encoder = ("config.json", "model.safetensors")
    return {f"tokenizer{slot}/{n}" for n in tokenizer} | {f"text_encoder{slot}/{n}" for n in encoder}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> ((pipeline, params), its saved folder), each made once."""
    made = {}

    def get(name):
        if name not in made:
            model = tiny.loaded(name)
            made[name] = model, save_pipeline(*model, tmp_path_factory.mktemp("saved") / name)
        return made[name]

    return get


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def same_tensors(model, original):
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["lcm", "sd2", "sdxl", "refiner"])
def test_torch_loads_the_same_bits_and_configs(saved, name):
    unet, vae, encoders, _, _ = tiny.FOLDERS[name]
    out = saved(name)[1]
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == FILES.union(*map(slot_files, encoders))

    for part, kind, original in (
        ("unet", diffusers.UNet2DConditionModel, tiny.torch_unet(unet)),
        ("vae", diffusers.AutoencoderKL, tiny.torch_vae(vae)),
    ):
        model, info = kind.from_pretrained(out / part, output_loading_info=True)
        assert not any(info.values()), info
        same_tensors(model, original)
        mine, full = read(out / part / "config.json"), json.loads(original.to_json_string())
        assert mine.keys() == full.keys()
        assert {k: v for k, v in mine.items() if v != full[k]} == {}
    for slot, (encoder, _) in encoders.items():
        original = tiny.torch_text_encoder(encoder)
        # The source has no dtype; without torch_dtype= transformers uses the one in the config.
        model, info = type(original).from_pretrained(out / f"text_encoder{slot}", output_loading_info=True)
        assert not any(info.values()), info
        same_tensors(model, original)
        config = read(out / f"text_encoder{slot}" / "config.json")
        assert config["dtype"] == config["torch_dtype"] == "float32" and "_name_or_path" not in config
        source = read(tiny.folder(name) / f"text_encoder{slot}" / "config.json")
        changed = {key for key in source if config.get(key) != source[key]}
        assert changed <= {"dtype", "_name_or_path"}
        for file in (out / f"tokenizer{slot}").iterdir():
            assert file.read_bytes() == (tiny.folder(name) / f"tokenizer{slot}" / file.name).read_bytes()


def test_text_encoders_are_prefixed_and_files_marked_as_torchs(saved):
    for path in saved("sdxl")[1].rglob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as handle:
            assert handle.metadata() == {"format": "pt"}
            if path.name == "model.safetensors":
                assert all(key.startswith(("text_model.", "text_projection.")) for key in handle.keys())


def test_a_second_round_changes_nothing(saved, tmp_path):
    out = saved("sdxl")[1]
    again = save_pipeline(*load_pipeline(out), tmp_path / "again")
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(out)).read_bytes(), path


INDEX = {
    "lcm": ("LatentConsistencyModelPipeline", "LCMScheduler"),
    "sd2": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sdxl": ("StableDiffusionXLPipeline", "DDIMScheduler"),
    "refiner": ("StableDiffusionXLImg2ImgPipeline", "DDIMScheduler"),
}


@pytest.mark.parametrize("name", INDEX)
def test_diffusers_loads_and_runs_one_step(saved, name):
    out = saved(name)[1]
    index = read(out / "model_index.json")
    assert (index["_class_name"], index["scheduler"][1]) == INDEX[name]
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == INDEX[name][0] and type(pipe.scheduler).__name__ == INDEX[name][1]
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0))
    if name == "refiner":
        options |= dict(image=torch.zeros(1, 3, 16, 16), strength=0.9, num_inference_steps=2)
    else:
        options |= dict(height=16, width=16)
    image = pipe("a red circle", **options).images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()
    if name == "refiner":
        assert index["text_encoder"] == [None, None] and index["force_zeros_for_empty_prompt"] is False
        assert index["requires_aesthetics_score"] is True
    if name == "sdxl":
        assert index["force_zeros_for_empty_prompt"] is True


def test_a_float16_config_of_the_source_is_not_passed_on(tmp_path):
    """Published SDXL has float16: transformers would load the text encoder in it, beside a float32 UNet."""
    folder = tiny.copy("sd1", tmp_path / "source")
    config = read(folder / "text_encoder" / "config.json") | {"torch_dtype": "float16", "_name_or_path": "somewhere"}
    config.pop("dtype", None)
    tiny.write_json(folder / "text_encoder" / "config.json", config)
    out = save_pipeline(*load_pipeline(folder), tmp_path / "out")
    assert next(CLIPTextModel.from_pretrained(out / "text_encoder").parameters()).dtype == torch.float32


def test_half_precision_variant(saved, tmp_path):
    out = save_pipeline(*saved("lcm")[0], tmp_path / "half", dtype=jnp.float16, variant="fp16")
    assert (out / "text_encoder" / "model.fp16.safetensors").is_file()
    pipe = diffusers.LatentConsistencyModelPipeline.from_pretrained(out, variant="fp16", dtype=torch.float16)
    for key, value in tiny.torch_unet("lcm").state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[key], value.half()), key
    with pytest.raises(LcmError, match="name the variant"):
        load_pipeline(out)


def test_unet_alone_has_its_files_at_the_root(saved, tmp_path):
    pipeline, params = saved("lcm")[0]
    out = save_unet(pipeline.unet, params["unet"], tmp_path / "u", extra_files={"README.md": "card"})
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    same_tensors(diffusers.UNet2DConditionModel.from_pretrained(out), tiny.torch_unet("lcm"))
    assert read(out / "config.json") == to_config(pipeline.unet)


def test_a_tiny_autoencoder_takes_the_vaes_place(saved, tmp_path):
    tiny.torch_tiny_vae().save_pretrained(tmp_path / "taesd")
    module, weights = load_vae(tmp_path / "taesd")
    pipeline, params = saved("sd1")[0]
    out = save_pipeline(dataclasses.replace(pipeline, vae=module), {**params, "vae": weights}, tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    same_tensors(pipe.vae, tiny.torch_tiny_vae())
    assert load_pipeline(out)[0].vae == module


@pytest.mark.parametrize(
    "name, channels, expected",
    [("sd1", 9, "StableDiffusionInpaintPipeline"), ("sdxl", 9, "StableDiffusionXLInpaintPipeline")],
)
def test_class_of_inpainting_models(saved, name, channels, expected):
    pipeline = saved(name)[0][0]
    other = dataclasses.replace(pipeline, unet=pipeline.unet.clone(in_channels=channels))
    assert save._pipeline_class(other) == expected
    assert hasattr(diffusers, expected)


def test_scheduler_configs(saved):
    source = tiny.scheduler_config("v_prediction")
    config = lcm_scheduler_config(source, original_inference_steps=100)
    torchs = diffusers.LCMScheduler.from_config(config)
    assert torchs.config.prediction_type == "v_prediction" and torchs.config.original_inference_steps == 100
    assert {k for k in json.loads(torchs.to_json_string())} == config.keys()
    expected = diffusers.DDIMScheduler.from_config(source).alphas_cumprod.numpy()
    np.testing.assert_array_equal(torchs.alphas_cumprod.numpy(), expected)
    np.testing.assert_array_equal(schedule.from_config(config).alphas_cumprod, expected)
    # betas that the source leaves out are those of its class, not LCMScheduler's
    bare = {"_class_name": "DDPMScheduler"}
    torchs = diffusers.LCMScheduler.from_config(lcm_scheduler_config(bare))
    np.testing.assert_array_equal(torchs.alphas_cumprod.numpy(), diffusers.DDPMScheduler().alphas_cumprod.numpy())
    assert lcm_scheduler_config(config) == config
    with pytest.raises(LcmError, match="LCMScheduler has no steps"):
        lcm_scheduler_config(source, steps=4)


def test_a_scheduler_with_another_noise_table_is_refused(saved, tmp_path):
    for wrong in ({"beta_end": 0.02}, {"prediction_type": "v_prediction"}, {"_class_name": ...}):
        config = {k: v for k, v in (tiny.scheduler_config("epsilon") | wrong).items() if v is not ...}
        with pytest.raises(LcmError, match="scheduler config"):
            save_pipeline(*saved("sd1")[0], tmp_path / "out", scheduler_config=config)
    assert not (tmp_path / "out").exists()


def test_a_given_scheduler_index_keys_and_files(saved, tmp_path):
    pipeline, params = saved("sd1")[0]
    config = lcm_scheduler_config(pipeline.configs["scheduler"])
    out = save_pipeline(
        pipeline,
        params,
        tmp_path / "deep" / "out",
        scheduler_config=config,
        model_index_extra={"_note": "x"},
        extra_files={"README.md": "card é", "samples/grid.png": b"\x89PNG"},
    )
    index = read(out / "model_index.json")
    assert index["scheduler"] == ["diffusers", "LCMScheduler"] and index["_note"] == "x"
    assert (out / "README.md").read_text(encoding="utf-8") == "card é"
    assert (out / "samples" / "grid.png").read_bytes() == b"\x89PNG"
    for bad in ("unet/config.json", "../up.txt", "/etc/x"):
        with pytest.raises(LcmError, match="extra file"):
            save_pipeline(pipeline, params, tmp_path / "bad", extra_files={bad: ""})


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_targets_in_use_are_refused_and_untouched(saved, tmp_path):
    model = saved("sd1")[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("1")
    (tmp_path / "file").write_text("2")
    for name in ("full", "file"):
        with pytest.raises(LcmError, match=f"{name} already exists and is not empty; choose another"):
            save_pipeline(*model, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "1" and left_in(tmp_path) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    assert (save_pipeline(*model, tmp_path / "empty") / "model_index.json").is_file()


def test_too_little_space_is_an_error_before_anything_is_written(saved, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 12345, 12345))
    with pytest.raises(LcmError, match=r"needs (\d+) bytes, 12345 are free") as caught:
        save_pipeline(*saved("sd1")[0], tmp_path / "out")
    needed = int(str(caught.value).split(" needs ")[1].split()[0])
    actual = sum(p.stat().st_size for p in saved("sd1")[1].rglob("*") if p.is_file())
    assert actual <= needed < actual + 2**21
    assert left_in(tmp_path) == []


def test_an_interrupted_save_leaves_nothing(saved, tmp_path, monkeypatch):
    write, calls = safetensors_io.write_weights, []

    def failing(path, shapes, tensor, dtype):
        assert not (tmp_path / "out").exists(), "a killed process would leave part of a model under its name"
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, shapes, tensor, dtype)

    monkeypatch.setattr(safetensors_io, "write_weights", failing)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(*saved("sd1")[0], tmp_path / "out")
    assert len(calls) == 2 and calls[0].parents[1].parent == tmp_path
    assert left_in(tmp_path) == []


def test_device_arrays_are_saved_like_host_arrays(saved, tmp_path):
    pipeline, params = saved("sd1")[0]
    out = save_unet(pipeline.unet, jax.device_put(params["unet"]), tmp_path / "u")
    name = "diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (saved("sd1")[1] / "unet" / name).read_bytes()
