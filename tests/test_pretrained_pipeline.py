"""Loading whole folders: every part of what torch wrote, all spellings of an index, one-line errors."""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import logging
from flax import traverse_util

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.pretrained import hub, load_pipeline, load_unet, load_vae, names, read_record

edit = tiny.change_json


def assert_same_weights(pipeline, params, part, model):
    back = names.to_torch(getattr(pipeline, part), params[part])
    for key, value in model.state_dict().items():
        key = key if key in back else "text_model." + key
        assert np.array_equal(back[key], value.numpy()), key
    assert len(back) == len(model.state_dict())


@pytest.fixture
def sd1(tmp_path):
    return tiny.copy("sd1", tmp_path / "model")


@pytest.mark.parametrize("name", ["lcm", "sd2", "sdxl", "refiner"])
def test_every_part_is_loaded(name):
    unet, vae, encoders, prediction_type, _ = tiny.FOLDERS[name]
    pipeline, params = load_pipeline(tiny.folder(name))
    assert_same_weights(pipeline, params, "unet", tiny.torch_unet(unet))
    assert_same_weights(pipeline, params, "vae", tiny.torch_vae(vae))
    for slot in ("", "_2"):
        if slot in encoders:
            assert_same_weights(pipeline, params, "text_encoder" + slot, tiny.torch_text_encoder(encoders[slot][0]))
            assert getattr(pipeline, "tokenizer" + slot).length == 77
        else:
            assert getattr(pipeline, "text_encoder" + slot) is None and getattr(pipeline, "tokenizer" + slot) is None
            assert "text_encoder" + slot not in params
    assert pipeline.schedule.prediction_type == prediction_type
    assert pipeline.vae.scaling_factor == tiny.VAES[vae].get("scaling_factor", 0.18215)
    assert pipeline.configs["scheduler"]["_class_name"] == "DDIMScheduler"
    assert pipeline.configs["unet"]["sample_size"] == 8
    assert pipeline.is_xl == ("_2" in encoders) and pipeline.has_w_embedding == ("lcm" in name)


def test_dtypes_and_variant(tmp_path):
    folder = tiny.build("sd1", tmp_path / "half", variant="fp16")
    pipeline, params = load_pipeline(folder, "fp16", jnp.bfloat16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in traverse_util.flatten_dict(dict(params)).values()} == {np.dtype("float32")}
    back = names.to_torch(pipeline.unet, params["unet"])
    for key, value in tiny.torch_unet("sd1").state_dict().items():
        assert np.array_equal(back[key], value.half().float().numpy()), key
    params = load_unet(folder, "fp16", param_dtype=jnp.float16)[1]
    assert params["conv_in"]["kernel"].dtype == np.float16
    with pytest.raises(LcmError, match="name the variant"):
        load_pipeline(folder)
    with pytest.raises(LcmError, match="no variant 'bf16'"):
        load_pipeline(folder, "bf16")


@pytest.fixture
def mixed(tmp_path):
    """The text encoder has no variant, UNet and VAE have fp16 alone."""
    folder = tiny.build("sd1", tmp_path / "mixed", variant="fp16")
    shutil.copytree(tiny.folder("sd1") / "text_encoder", folder / "text_encoder", dirs_exist_ok=True)
    (folder / "text_encoder" / "model.fp16.safetensors").unlink()
    return folder


def test_a_part_without_the_variant_is_read_without_it(mixed, monkeypatch):
    """As in diffusers, which reads them to the same numbers; also where the other part is from elsewhere."""
    logged = []
    monkeypatch.setattr(logging, "info", lambda text, *args: logged.append(text % args))
    pipeline, params = load_pipeline(mixed, "fp16")
    assert [line.split(": ")[0] for line in logged] == [f"text_encoder of {mixed} has no variant fp16"]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(mixed, variant="fp16", safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        assert_same_weights(pipeline, params, part, getattr(pipe, part).float())
    some = load_pipeline(mixed, "fp16", weights=["text_encoder"])[1]  # the variant is that of parts that are not read
    assert_same_weights(pipeline, some, "text_encoder", pipe.text_encoder)
    plain = tiny.folder("sd1")
    for parts in (("vae",), ("unet", "vae")):
        found = load_pipeline(tiny.copy("sd1", mixed.parent / parts[0]), "fp16", **dict.fromkeys(parts, mixed))[1]
        assert np.array_equal(found["vae"]["quant_conv"]["kernel"], params["vae"]["quant_conv"]["kernel"])
        assert_same_weights(pipeline, load_pipeline(mixed, "fp16", vae=plain)[1], "vae", tiny.torch_vae())
    with pytest.raises(LcmError, match="unet has no .*, only .*; name the variant, .*--variant, config.model.variant"):
        load_pipeline(mixed)


def test_a_variant_that_no_part_has_is_refused(mixed):
    plain = tiny.folder("sd1")
    for load in (load_pipeline, load_unet, load_vae):
        with pytest.raises(LcmError, match=r"has no variant 'fp16' \(.*, only .*; ask for one of those"):
            load(plain, "fp16")
    assert load_unet(plain, "fp16", or_without=True)[0] == load_unet(mixed, "fp16", or_without=True)[0]


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_part_that_is_replaced_may_be_lacking(sd1, part):
    shutil.rmtree(sd1 / part)
    with pytest.raises(
        LcmError, match=rf"{part}/config.json is missing; .* give another {part} with {part}= \(--{part}"
    ):
        load_pipeline(sd1)
    edit(sd1 / "model_index.json", **{part: ...})
    pipeline, params = load_pipeline(sd1, **{part: tiny.folder("sd1")})
    assert_same_weights(pipeline, params, part, tiny.torch_unet("sd1") if part == "unet" else tiny.torch_vae())


def test_old_folders_written_by_flax_and_with_a_safety_checker(sd1):
    edit(
        sd1 / "model_index.json",
        _class_name="FlaxStableDiffusionPipeline",
        safety_checker=["stable_diffusion", "FlaxStableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        unet=["diffusers", "FlaxUNet2DConditionModel"],
        text_encoder=["transformers", "FlaxCLIPTextModel"],
        vae=["diffusers", "FlaxAutoencoderKL"],
    )
    edit(sd1 / "unet" / "config.json", _class_name="FlaxUNet2DConditionModel", _diffusers_version="0.6.0", decay=0.9999)
    edit(sd1 / "vae" / "config.json", _class_name="FlaxAutoencoderKL", scaling_factor=..., force_upcast=...)
    edit(sd1 / "text_encoder" / "config.json", architectures=["FlaxCLIPTextModel"])
    pipeline, params = load_pipeline(sd1)
    assert pipeline.vae.scaling_factor == 0.18215 and not pipeline.text_encoder.with_projection
    assert_same_weights(pipeline, params, "text_encoder", tiny.torch_text_encoder("clip"))


def test_another_vae_of_another_scale_is_reported(sd1, monkeypatch):
    """Images would be noise; a tiny VAE takes latents as the UNet does, and the model's own need not be there."""
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    load_pipeline(sd1, vae=tiny.folder("sdxl"))
    assert len(warned) == 1 and re.search("VAE of .*sdxl has scaling_factor 0.13025, that of .* 0.18215", warned[0])
    load_pipeline(sd1, vae=tiny.folder("sd2"))
    tiny.torch_tiny_vae().save_pretrained(sd1 / "tiny")
    load_pipeline(sd1, vae=sd1 / "tiny")
    (sd1 / "vae" / "config.json").write_text("{")
    load_pipeline(sd1, vae=tiny.folder("sdxl"))
    assert len(warned) == 1


def test_parts_that_do_not_fit_are_named(sd1):
    other = tiny.folder("sdxl")
    with pytest.raises(LcmError, match=f"{sd1} with the unet of {other}: the UNet attends to text of width 64"):
        load_pipeline(sd1, unet=other, weights=False)


def test_a_refiners_encoder_under_the_first_name(tmp_path):
    folder = tiny.copy("refiner", tmp_path / "refiner")
    (folder / "text_encoder_2").rename(folder / "text_encoder")
    (folder / "tokenizer_2").rename(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    edit(
        folder / "model_index.json",
        text_encoder=index["text_encoder_2"],
        text_encoder_2=...,
        tokenizer=index["tokenizer_2"],
        tokenizer_2=[None, None],
    )
    pipeline, params = load_pipeline(folder)
    assert pipeline.text_encoder is None and pipeline.tokenizer is None and pipeline.tokenizer_2 is not None
    assert_same_weights(pipeline, params, "text_encoder_2", tiny.torch_text_encoder("openclip_projection"))


def test_parts_from_pipelines_and_from_folders_of_their_own(tmp_path):
    module, params = load_unet(tiny.folder("lcm"))
    assert module.time_cond_proj_dim == 16
    alone = shutil.copytree(tiny.folder("lcm") / "unet", tmp_path / "unet-only")
    again, same = load_unet(alone)
    assert again == module
    np.testing.assert_array_equal(same["conv_in"]["kernel"], params["conv_in"]["kernel"])
    vae, params = load_vae(tiny.folder("sdxl"))
    assert vae.scaling_factor == 0.13025 and set(params) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}

    base = tiny.copy("sd1", tmp_path / "base")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # is not needed
    pipeline, params = load_pipeline(base, unet=alone)
    assert pipeline.has_w_embedding and pipeline.configs["unet"]["time_cond_proj_dim"] == 16
    assert_same_weights(pipeline, params, "unet", tiny.torch_unet("lcm"))


def test_a_part_has_the_record_of_its_pipeline(sd1, tmp_path):
    """EXPORT/unet as EXPORT, or a phased LCM would be sampled as one to the origin; what is no part has none."""
    lcm, record = tiny.copy("lcm", tmp_path / "lcm"), {"solver_steps": 20, "phases": 2, "map": "phased"}
    tiny.write_json(lcm / "lcm_config.json", record)
    for unet in (lcm, lcm / "unet"):
        assert read_record(unet) == record
        constants = load_pipeline(sd1, unet=unet, weights=False)[0].constants
        assert (constants.solver_steps, constants.phases) == (20, 2)
    (lcm / "lora").mkdir()
    assert read_record(lcm / "lora") == {}


BROKEN = {
    "the hub's cache": (
        lambda f: (shutil.copytree(f, f / "snapshots" / "0a1b"), (f / "model_index.json").unlink()),
        r"has no model_index.json; give a diffusers folder, .*/snapshots/0a1b, which holds that file",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"has no model_index.json; give a diffusers folder"),
    "single model": (
        lambda f: (f / "model_index.json").rename(f / "config.json"),
        "holds a single model without model_index.json",
    ),
    "bad json": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
    "json list": (lambda f: (f / "model_index.json").write_text("[]"), "holds a list"),
    "transformer": (
        lambda f: edit(f / "model_index.json", unet=..., _class_name="FluxPipeline"),
        "is a FluxPipeline without a unet; .* is needed, or the UNet of one with unet=",
    ),
    "transformer instead": (
        lambda f: edit(f / "model_index.json", unet=..., transformer=["diffusers", "FluxTransformer2DModel"]),
        "without a unet; a model of the Stable Diffusion family is needed$",
    ),
    "no encoder": (lambda f: edit(f / "model_index.json", text_encoder=[None, None]), "is a .* without a text encoder"),
    "t5": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        r"text_encoder in model_index.json='T5EncoderModel'.*supported.*\(/.*\)",
    ),
    "no unet folder": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer lacks vocab.json, merges.txt"),
    "no text encoder weights": (
        lambda f: (f / "text_encoder" / "model.safetensors").unlink(),
        "text_encoder has no model.safetensors: no weights at all",
    ),
    "unet class": (
        lambda f: edit(f / "unet" / "config.json", _class_name="UNet3DConditionModel"),
        "unet/config.json='UNet3DConditionModel'; supported: 'UNet2DConditionModel'",
    ),
    "unet field": (
        lambda f: edit(f / "unet" / "config.json", class_embed_type="timestep"),
        "unsupported class_embed_type='timestep'",
    ),
    "prediction": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "unsupported prediction_type='flow'",
    ),
    "widths": (
        lambda f: shutil.copytree(tiny.folder("sdxl") / "unet", f / "unet", dirs_exist_ok=True),
        "attends to text of width 64, the text encoders give 32",
    ),
    "latents": (
        lambda f: edit(f / "vae" / "config.json", latent_channels=8),
        "takes 4 channels, the VAE's latents have 8",
    ),
    "config of another model": (
        lambda f: edit(f / "unet" / "config.json", layers_per_block=2),
        r"unet/diffusion_pytorch_model.safetensors does not fit its config: \d+ missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(sd1, case):
    damage, message = BROKEN[case]
    damage(sd1)
    with pytest.raises(LcmError, match=message) as caught:
        load_pipeline(sd1)
    assert "\n" not in str(caught.value)


def scheduler(folder, **changes):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)


@pytest.mark.parametrize("name", ("EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "MyScheduler"))
def test_schedulers_of_other_noise_are_refused(sd1, name):
    """As in Playground v2.5 or bigASP 2.5; also if only model_index.json names it, which diffusers goes by."""
    edit(sd1 / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(UnsupportedConfig, match=f"_class_name='{name}'"):
        load_pipeline(sd1, weights=False)
    edit(sd1 / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert load_pipeline(sd1, weights=False)
    scheduler(sd1, _class_name=name)
    with pytest.raises(UnsupportedConfig, match=rf"_class_name='{name}'.*\(scheduler of {sd1}\)"):
        load_pipeline(sd1, weights=False)


def test_a_scheduler_without_a_class_has_that_of_the_index(sd1):
    edit(sd1 / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    scheduler(sd1, _class_name=..., beta_start=..., beta_end=..., beta_schedule=...)
    pipeline = load_pipeline(sd1, weights=False)[0]
    assert pipeline.configs["scheduler"]["_class_name"] == "LCMScheduler"
    assert pipeline.schedule == load_pipeline(tiny.folder("sd1"), weights=False)[0].schedule
    scheduler(sd1, _class_name="PNDMScheduler")
    with pytest.raises(LcmError, match="names PNDMScheduler and leaves betas out, but model_index.json names LCMSched"):
        load_pipeline(sd1, weights=False)


def test_a_record_that_cannot_be_read_is_an_error(sd1):
    """Without it an LCM would be sampled with other constants, and no word."""
    (sd1 / "lcm_config.json").symlink_to("nowhere")
    with pytest.raises(LcmError, match="lcm_config.json is missing; the folder is incomplete"):
        load_pipeline(sd1, weights=False)


def test_a_unet_of_other_noise_is_refused(sd1, tmp_path):
    """By its folder's scheduler or its record."""
    other = tiny.copy("lcm", tmp_path / "other")
    assert load_pipeline(sd1, unet=other, weights=False)[0].has_w_embedding
    for changes in ({"prediction_type": "v_prediction"}, {"beta_end": 0.013}):
        scheduler(other, **changes)
        for unet in (other, other / "unet"):
            with pytest.raises(LcmError, match="other: scheduler/scheduler_config.json says .*take the UNet and"):
                load_pipeline(sd1, unet=unet, weights=False)
        scheduler(other, prediction_type="epsilon", beta_end=0.012)
    alone = shutil.copytree(other / "unet", tmp_path / "alone")
    tiny.write_json(alone / "lcm_config.json", {"prediction_type": "v_prediction"})
    with pytest.raises(LcmError, match="alone: lcm_config.json says v_prediction, but .* used with epsilon"):
        load_pipeline(sd1, unet=alone, weights=False)
    scheduler(sd1, prediction_type="v_prediction")
    assert load_pipeline(sd1, unet=alone, weights=False)
    tiny.write_json(sd1 / "lcm_config.json", {"prediction_type": "epsilon"})
    with pytest.raises(LcmError, match="model: lcm_config.json says epsilon, but .* used with v_prediction"):
        load_pipeline(sd1, weights=False)


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(LcmError, match="does not exist; give a folder in diffusers format, or owner/name"):
        load_pipeline(tmp_path / "nothing")
    single = tmp_path / "v1-5-pruned.safetensors"
    single.write_bytes(b"")
    with pytest.raises(LcmError, match="cannot be read as safetensors"):
        load_pipeline(single)
    # The suite runs with HF_HUB_OFFLINE=1, as a machine without network would.
    with pytest.raises(LcmError, match="no folder owner/name here, and it cannot be fetched .* local folder") as caught:
        load_pipeline("owner/name")
    assert "\n" not in str(caught.value)


def fake_hub(monkeypatch, folder: Path, target: Path) -> list[str]:
    """Makes snapshot_download copy from `folder` what the patterns allow; returns the list of copied files."""
    fetched = []

    def snapshot_download(repository, *, allow_patterns):
        assert repository == "owner/name"
        for file in folder.rglob("*"):
            name = str(file.relative_to(folder))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
                fetched.append(name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


def test_what_users_paste_of_the_hub(monkeypatch, tmp_path):
    """Names and addresses, with the escapes of a browser; and a path that looks like a name is one if it is there."""
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: asked.append((name, more.get("revision"))) or "x"
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **more: asked.append((*names, more)) or "x")
    page = "https://huggingface.co/owner/na.me"
    for source in ("owner/na.me", page, f"{page}/", f"{page}/tree/refs%2Fpr%2F1", "http://hf.co/owner/na.me?x=1"):
        hub.local_folder(source, ["*"])
        assert hub.repository(source) == "owner/na.me"
    assert asked == [("owner/na.me", revision) for revision in (None, None, None, "refs/pr/1", None)]
    asked.clear()
    address = f"{page}/resolve/refs%2Fpr%2F1/a/My%20Model.safetensors?download=true"
    for source in (address, "owner/na.me/a%20.safetensors"):
        hub.local_file(source)
        assert hub.repository(source) == "owner/na.me"
    assert asked == [
        ("owner/na.me", "a/My Model.safetensors", {"revision": "refs/pr/1"}),
        ("owner/na.me", "a%20.safetensors", {"revision": None}),
    ]
    for source in ("https://hf.co/datasets/owner/name", "https://example.org/owner/name", "owner/name/", "name"):
        assert hub.repository(source) is None
        with pytest.raises(LcmError, match="does not exist; give a folder"):
            hub.local_folder(source, ["*"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "na.me").mkdir(parents=True)
    assert hub.repository("owner/na.me") is None


def test_only_what_is_needed_is_fetched(monkeypatch, tmp_path, sd1):
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "v1-5.safetensors",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "unet/diffusion_flax_model.msgpack",
    ):
        (sd1 / name).parent.mkdir(exist_ok=True)
        (sd1 / name).write_bytes(b"x")
    fetched = fake_hub(monkeypatch, sd1, tmp_path / "cache")
    pipeline, params = load_pipeline("owner/name")
    assert_same_weights(pipeline, params, "unet", tiny.torch_unet("sd1"))
    assert sorted(fetched) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_of_a_vae_that_is_replaced_the_config_alone_is_fetched(monkeypatch, tmp_path, caplog):
    """A VAE of another scale is reported, too."""
    fetched = fake_hub(monkeypatch, tiny.folder("sd1"), tmp_path / "cache")
    load_pipeline("owner/name", vae=tiny.folder("sdxl"))
    assert [name for name in fetched if name.startswith("vae/")] == ["vae/config.json"]
    assert "has scaling_factor 0.13025, that of owner/name 0.18215" in caplog.text


def test_a_part_without_the_variant_is_fetched_without_it(monkeypatch, tmp_path, mixed):
    """And nothing twice: the UNet's float32 weights stay on the hub."""
    shutil.copy(tiny.folder("sd1") / "unet" / "diffusion_pytorch_model.safetensors", mixed / "unet")
    fetched = fake_hub(monkeypatch, mixed, tmp_path / "cache")
    load_pipeline("owner/name", "fp16")
    assert [name for name in fetched if name.endswith(".safetensors")][-1] == "text_encoder/model.safetensors"
    assert sorted({name for name in fetched if name.endswith(".safetensors")}) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    fetched = fake_hub(monkeypatch, mixed, tmp_path / "plain")
    with pytest.raises(LcmError, match="vae has no .*: no weights at all; if the original has a variant only, name it"):
        load_pipeline("owner/name")


def test_hub_repositories_of_one_part(monkeypatch, tmp_path):
    fetched = fake_hub(monkeypatch, tiny.folder("lcm") / "unet", tmp_path / "root")
    assert load_unet("owner/name")[0].time_cond_proj_dim == 16
    assert sorted(fetched) == ["config.json", "diffusion_pytorch_model.safetensors"]
    fetched = fake_hub(monkeypatch, tiny.folder("lcm"), tmp_path / "whole")
    load_vae("owner/name")
    assert sorted(fetched) == ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_what_is_no_pipeline_says_how_it_is_given(monkeypatch, tmp_path):
    """A UNet alone, a folder and a repository with single files."""
    unet = tiny.folder("lcm") / "unet"
    words = r"holds a single model .*, or this UNet with unet= \(--unet, .*\) beside a whole model$"
    fake_hub(monkeypatch, unet, tmp_path / "cache")
    for source in (unet, "owner/name"):
        with pytest.raises(LcmError, match=words):
            load_pipeline(source)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.safetensors").touch()
    fake_hub(monkeypatch, tmp_path / "models", tmp_path / "empty")
    for source, file in ((tmp_path / "models", r"files \(x"), ("owner/name", "file of it, owner/name/FILE")):
        with pytest.raises(LcmError, match=rf"has no model_index.json; .*, or one \w*.*{file}.safetensors"):
            load_pipeline(source)


def test_the_conversion_of_pickles_names_the_hub_repository(monkeypatch, tmp_path, sd1):
    (sd1 / "unet" / "diffusion_pytorch_model.safetensors").rename(sd1 / "unet" / "diffusion_pytorch_model.bin")
    fake_hub(monkeypatch, sd1, tmp_path / "models--owner--name" / "snapshots" / "0123")
    with pytest.raises(LcmError, match="DiffusionPipeline as M; M.from_pretrained.'owner/name'"):
        load_pipeline("owner/name")
