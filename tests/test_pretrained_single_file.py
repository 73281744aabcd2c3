"""Single-file checkpoints: against diffusers' own conversion, and a round trip bit for bit."""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import diffusers
import family
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy
import safetensors.torch
import tiny
import tiny_configs
import torch
from absl import logging
from diffusers.loaders import single_file_utils as original
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_jax.diffusion import guidance, schedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip, unet, vae
from lcm_jax.pretrained import (
    load_pipeline,
    load_unet,
    load_vae,
    names,
    noise_marks,
    read_record,
    save_single_file,
    single_file,
)
from lcm_jax.pretrained import single_file_keys as keys
from lcm_jax.pretrained import single_file_spellings as spellings
from lcm_jax.pretrained.model import fold_w, make_module
from lcm_jax.pretrained.safetensors_io import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
BIG_G = dict(tiny.TEXT, hidden_act="gelu", hidden_size=48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> tiny diffusers folder. SDXL's encoders differ in width, by which diffusers distinguishes them."""
    patch = pytest.MonkeyPatch()
    patch.setitem(tiny.TEXT_ENCODERS, "wide", (CLIPTextModelWithProjection, BIG_G))
    patch.setitem(tiny.UNETS, "wide", dict(tiny.UNETS["sdxl"], cross_attention_dim=80))
    encoders = {"": ("clip", "sd1"), "_2": ("wide", "sdxl_2")}
    patch.setitem(tiny.FOLDERS, "wide", ("wide", "sdxl", encoders, "epsilon", "StableDiffusionXLPipeline"))
    wide = tiny.build("wide", tmp_path_factory.mktemp("wide") / "wide")
    yield lambda name: wide if name == "sdxl" else tiny.folder(name)
    patch.undo()


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """name -> ((pipeline, params), its single file in float32), each made once and not to be changed."""
    made = {}

    def get(name):
        if name not in made:
            model = load_pipeline(folders(name))
            out = tmp_path_factory.mktemp("single") / f"{name}.safetensors"
            made[name] = model, save_single_file(*model, out, dtype=jnp.float32)
        return made[name]

    return get


@pytest.fixture
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: logged.append(text % args))
    return logged


def rewrite(source: Path, out: Path, change, metadata=None) -> Path:
    """A copy of a file with its tensors changed by `change` (dict -> None or dict)."""
    tensors = safetensors.numpy.load_file(source)
    tensors = change(tensors) or tensors
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, out, metadata=metadata)
    return out


def same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def meta(layout: keys.Layout, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: torch.empty(stored.shape, device="meta") for key, stored in layout.tensors.items()}


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def published(kind, config) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the torch model of a config, a text encoder's with `text_model.`."""
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(CLIPTextConfig(**config))
    prefix = "text_model." if kind is CLIPTextModel else ""
    return {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["sd15", "lcm-dreamshaper", "sd21", "sdxl"])
def test_full_size_unet_keys(name):
    config = family.UNETS[name]
    module = unet.from_config(config)
    stored = meta(keys.unet_layout(module), UNET)
    assert len(stored) == family.UNET_SIZES[name][1]
    expected = published(diffusers.UNet2DConditionModel, config)
    if name == "lcm-dreamshaper":  # diffusers' conversion leaves the w embedding behind
        cond = stored.pop(UNET + "time_embed.cond_proj.weight")
        assert tuple(cond.shape) == expected.pop("time_embedding.cond_proj.weight") == (320, 256)
    assert shapes_of(original.convert_ldm_unet_checkpoint(stored, config)) == expected


def test_full_size_vae_keys():
    config = family.VAES["sdxl"]
    stored = meta(keys.vae_layout(vae.from_config(config)), VAE)
    assert len(stored) == 248 and stored[VAE + "decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    expected = published(diffusers.AutoencoderKL, config)
    assert shapes_of(original.convert_ldm_vae_checkpoint(stored, config)) == expected


@pytest.mark.parametrize("name", ["clip-l", "openclip-h", "openclip-bigg"])
def test_full_size_text_encoder_keys(name):
    config = family.TEXT_ENCODERS[name]
    module = clip.from_config(config)
    if name == "clip-l":
        stored = meta(keys.clip_layout(module), CLIP)
        assert len(stored) == 196
        assert shapes_of(original.convert_ldm_clip_checkpoint(stored)) == published(CLIPTextModel, config)
        return
    kind = CLIPTextModelWithProjection if module.with_projection else CLIPTextModel
    prefix = XL[1] if module.with_projection else OPEN_CLIP
    stored = meta(keys.open_clip_layout(module), prefix)
    assert len(stored) == {"openclip-h": 23 * 12 + 4, "openclip-bigg": 32 * 12 + 5}[name]
    model = type("Model", (), {"config": CLIPTextConfig(**config)})
    assert shapes_of(original.convert_open_clip_checkpoint(model, stored, prefix)) == published(kind, config)


WHOLE = {
    "sd15": ("sd1", ["clip-l"], 1130),
    "lcm-dreamshaper": ("sd1", ["clip-l"], 1131),
    "sd21": ("sd2", ["openclip-h"], 1214),
    "sdxl": ("sdxl", ["clip-l", "openclip-bigg"], 2513),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_need_no_configs(name):
    """Keys and shapes of a published file -> family -> configs -> the published modules."""
    kind, encoders, count = WHOLE[name]
    (family_,) = (f for f in single_file.FAMILIES if f.name == kind)
    vae_config = family.VAES["sdxl" if kind == "sdxl" else "sd15"]
    modules = {"unet": unet.from_config(family.UNETS[name]), "vae": vae.from_config(vae_config)}
    modules |= {
        part: clip.from_config(family.TEXT_ENCODERS[encoder])
        for part, encoder in zip(family_.encoders, encoders, strict=True)
    }
    shapes = {}
    for layout, prefix in single_file.layouts(family_, modules).values():
        shapes |= {prefix + key: stored.shape for key, stored in layout.tensors.items()}
    assert len(shapes) == count

    found = single_file._family(shapes, Path("x.safetensors"))
    assert found is family_
    of_v = np.array([-1.0, 1.0])  # by ComfyUI's guess, from the one tensor that is read

    def read(key):
        return of_v if key == UNET + single_file.SD2_GUESS else pytest.fail(f"{key} read")

    configs = single_file._configs(None, found, Weights(Path("x.safetensors"), shapes, read))
    modules["unet"] = modules["unet"].clone(upcast_attention=False)  # for the file; softmax is float32 anyway
    if kind == "sd2":
        modules["vae"] = modules["vae"].clone(sample_size=768)
    for part, module in modules.items():
        assert make_module(part, configs[part]) == module, part
    noise = schedule.from_config(configs["scheduler"])
    assert noise.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    expected = schedule.from_config(tiny.scheduler_config("epsilon"))
    np.testing.assert_array_equal(noise.alphas_cumprod, expected.alphas_cumprod)


def three_places(match: re.Match) -> str:
    """Number of a block of a UNet with one resnet a level -> diffusers' script's, which counts as for two."""
    half, number, place, rest = match[1], int(match[2]), match[3], match[4]
    level, resnet = divmod(number - (half == "input"), 2)
    if half == "output" and rest.startswith("conv."):
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"  # alone in its block
    if half == "output" and place == "1" and level == 0:
        return f"up_blocks.0.attentions.{resnet}.{rest}"  # where the script expects none
    return f"{half}_blocks.{3 * level + (2 * resnet + 1 if half == 'input' else resnet)}.{place}.{rest}"


BLOCK = r"(input|output)_blocks\.([1-9]\d*|(?<=output_blocks\.)0)\.(\d)\.(.*)"


STRUCTURES = [name for name in tiny_configs.UNETS if name not in ("prefixed", "sd21-768", "sd-turbo")]


@pytest.mark.parametrize("name", STRUCTURES)
def test_unet_config_is_read_off_the_tensors(name, monkeypatch):
    monkeypatch.setattr(keys, "_HEAD_CHANNELS", 16)
    module = unet.from_config(tiny_configs.UNETS[name])
    layout = keys.unet_layout(module)
    shapes = {key: stored.shape for key, stored in layout.tensors.items()}
    assert spellings._unet(shapes) == {key: key for key in shapes}
    if name in ("tiny-sd", "small-sd"):
        assert list(spellings._unet(re.sub(BLOCK, three_places, key) for key in shapes).values()) == list(shapes)
    sizes = {"addition_time_embed_dim": module.addition_time_embed_dim}  # which tensors do not show
    made = unet.from_config(keys.unet_config(shapes) | sizes)
    assert made.mid_block_type == module.mid_block_type
    if made.mid_block_type == "UNetMidBlock2DCrossAttn":
        assert made.mid_depth() == module.mid_depth()
    for i in range(module.num_levels):
        assert made.down_depths(i) == module.down_depths(i) and made.up_depths(i) == module.up_depths(i)
    for field in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
        assert made.per_level(field) == module.per_level(field)
    for field in (
        "in_channels",
        "out_channels",
        "use_linear_projection",
        "time_cond_proj_dim",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
        "down_block_types",
        "up_block_types",
    ):
        assert getattr(made, field) == getattr(module, field), field


@pytest.mark.parametrize("name", ["sd1", "lcm", "sd2", "sdxl", "refiner"])
def test_a_round_trip_is_exact(folders, written, tmp_path, name):
    (pipeline, params), path = written(name)
    again, weights = load_pipeline(path, config=folders(name))
    same_trees(weights, params)
    assert again == pipeline and again.tokenizers.keys() == {part for part in params if part.startswith("text")}
    second = save_single_file(again, weights, tmp_path / "second.safetensors", dtype=jnp.float32)
    assert second.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["second.safetensors"]


def test_square_matrices_are_not_mixed_up(written):
    """By value, since their shapes are the same: q, k, v of OpenCLIP stacked in this order, its projection [in out]."""
    tensors = safetensors.numpy.load_file(written("sdxl")[1])
    state = tiny.randomise(
        CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tiny.vocabulary()[0]), **BIG_G)), 4
    ).state_dict()
    layer = "text_model.encoder.layers.1.self_attn."
    stacked = np.concatenate([state[f"{layer}{x}_proj.weight"].numpy() for x in "qkv"])
    np.testing.assert_array_equal(tensors[XL[1] + "transformer.resblocks.1.attn.in_proj_weight"], stacked)
    np.testing.assert_array_equal(tensors[XL[1] + "text_projection"], state["text_projection.weight"].numpy().T)
    assert sum(key.startswith(XL[0] + "text_model.") for key in tensors) == 2 * 16 + 4
    assert tensors[VAE + "encoder.mid.attn_1.proj_out.weight"].shape == (32, 32, 1, 1)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_the_same_bits(folders, written, name):
    path, folder = written(name)[1], folders(name)
    kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_single_file(str(path), config=str(folder))
    other = kind.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if name == "sdxl" else [])):
        mine, expected = getattr(pipe, part).state_dict(), getattr(other, part).state_dict()
        assert mine.keys() == expected.keys()
        for key, value in mine.items():
            assert torch.equal(value, expected[key]), (part, key)


def test_half_precision_and_header(written, folders, tmp_path):
    (pipeline, params), path = written("sd1")
    record = {"w_min": 2.0}
    out = save_single_file(
        pipeline, params, tmp_path / "half.safetensors", metadata={"lcm_config.json": json.dumps(record)}
    )
    assert {value.dtype for value in safetensors.numpy.load_file(out).values()} == {np.dtype(np.float16)}
    half = load_pipeline(out, config=folders("sd1"))[1]
    same_trees(half, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), dict(params)))
    assert read_record(out) == record and read_record(path) == {}
    with safetensors.safe_open(out, framework="np") as handle:
        assert handle.metadata()["format"] == "pt"
        assert handle.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
    with safetensors.safe_open(written("sd2")[1], framework="np") as handle:
        assert handle.metadata()["modelspec.architecture"] == "stable-diffusion-v2-768-v"
        assert handle.metadata()["modelspec.prediction_type"] == "v" and "v_pred" in handle.keys()


def test_files_as_they_circulate(folders, written, tmp_path):
    """Leftovers of training, an unused 24th layer, no `text_model.`, matrices instead of 1x1 convolutions."""
    (_, params), path = written("sd2")
    last = OPEN_CLIP + "transformer.resblocks.2."

    def sd2(tensors):
        for key in [key for key in tensors if key.startswith(last)]:
            tensors[key.replace("resblocks.2.", "resblocks.3.")] = tensors[key] + 1
        tensors |= {
            OPEN_CLIP + "text_projection": np.eye(32, dtype=np.float32),
            OPEN_CLIP + "logit_scale": np.float32(4.6),
            "betas": np.zeros(1000),
            "alphas_cumprod": np.zeros(1000),
            "global_step": np.array(5),
            "model_ema.diffusion_modeltime_embed0weight": np.zeros((2, 2), np.float32),
            VAE + "loss.logvar": np.zeros((), np.float32),
        }

    same_trees(load_pipeline(rewrite(path, tmp_path / "sd2.safetensors", sd2), config=folders("sd2"))[1], params)
    (_, params), path = written("sd1")

    def sd1(tensors):
        changed = {key.replace(CLIP + "text_model.", CLIP): value for key, value in tensors.items()}
        changed[CLIP + "embeddings.position_ids"] = np.arange(77)[None]
        for key, value in changed.items():
            if key.endswith((".attn_1.q.weight", ".proj_in.weight")):
                changed[key] = value[:, :, 0, 0]
        return changed

    same_trees(load_pipeline(rewrite(path, tmp_path / "sd1.safetensors", sd1), config=folders("sd1"))[1], params)


def renamed(prefix, *changes):
    """A change for `rewrite`: of the keys behind a prefix, by regular expressions."""

    def change(tensors):
        for pattern, new in changes:
            tensors = {
                prefix + re.sub(pattern, new, key.removeprefix(prefix)) if key.startswith(prefix) else key: value
                for key, value in tensors.items()
            }
        return tensors

    return change


def in_transformers_names(prefix, encoder, params, middle):
    def change(tensors):
        state = names.to_torch(encoder, params)
        tensors = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
        return tensors | {prefix + key.replace("text_model.", middle): value for key, value in state.items()}

    return change


@pytest.mark.parametrize("middle", ["text_model.", "", "transformer.text_model."])
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_open_clip_in_transformers_names(folders, written, tmp_path, name, middle):
    """q, k and v apart, and nothing transposed."""
    (pipeline, params), path = written(name)
    part, prefix = ("text_encoder_2", XL[1]) if name == "sdxl" else ("text_encoder", OPEN_CLIP)
    change = in_transformers_names(prefix, getattr(pipeline, part), params[part], middle)
    same_trees(load_pipeline(rewrite(path, tmp_path / "a.safetensors", change), config=folders(name))[1], params)


def test_open_clip_as_diffusers_scripts_write_it(folders, written, tmp_path):
    """OpenCLIP's names, but for what the scripts leave; or all in the place of SD 1.x's encoder, or of SGM's first."""
    (_, params), path = written("sdxl")

    def script(tensors):
        tensors[XL[1] + "text_projection.weight"] = tensors.pop(XL[1] + "text_projection").T
        tensors[XL[1] + "text_model.embeddings.position_ids"] = np.arange(77)[None]
        tensors[XL[1] + "logit_scale"] = np.float32(4.6)

    file = rewrite(path, tmp_path / "script.safetensors", script)
    same_trees(load_pipeline(file, config=folders("sdxl"))[1], params)
    both = rewrite(file, tmp_path / "both.safetensors", lambda t: t.update({XL[1] + "text_projection": np.eye(48)}))
    refused(both, "holds .*text_projection.*text_projection.weight, which are one tensor", folders("sdxl"))

    (_, params), path = written("sd2")
    sgm = rewrite(path, tmp_path / "sgm.safetensors", renamed("", (OPEN_CLIP, "conditioner.embedders.0.model.")))
    same_trees(load_pipeline(sgm, config=folders("sd2"))[1], params)


def test_the_encoder_of_sd2_is_known_by_its_width(written):
    """As transformers 5 saves it, diffusers' script takes it for that of SD 1.x."""
    layout = keys.open_clip_layout(written("sd2")[0][0].text_encoder)
    table = {key for stored in layout.tensors.values() for key in stored.keys}
    shapes = {CLIP + key.removeprefix("text_model."): (1024, 1024) for key in table}
    file = Weights(Path("x.safetensors"), shapes, pytest.fail)
    assert spellings.original(file).shapes.keys() == {OPEN_CLIP + key for key in layout.tensors}


def test_attention_of_the_vae_in_diffusers_names(folders, written, tmp_path):
    (_, params), path = written("sd1")
    pairs = {"q": "to_q", "k": "key", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    change = renamed(VAE, *((rf"attn_1\.{a}\.", f"attn_1.{b}.") for a, b in pairs.items()))
    same_trees(load_pipeline(rewrite(path, tmp_path / "a.safetensors", change), config=folders("sd1"))[1], params)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_pruned_unets_in_the_numbers_of_diffusers_script(folders, written, tmp_path, name):
    (pipeline, params), path = written(name)
    file = rewrite(path, tmp_path / "a.safetensors", renamed(UNET, (BLOCK, three_places)))
    assert any("output_blocks.2.1.conv" in key for key in safetensors.numpy.load_file(file))
    again, tree = load_pipeline(file, config=folders(name))
    same_trees(tree, params)
    assert again == pipeline


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_unet_in_eight_bits_is_that_of_its_values(folders, written, tmp_path, dtype):
    tensors = safetensors.torch.load_file(written("sd1")[1])
    eight = {
        key: value.to(dtype) if key.startswith(UNET) and value.ndim > 1 else value for key, value in tensors.items()
    }
    safetensors.torch.save_file(eight, tmp_path / "eight.safetensors")
    wide = {key: value.float().numpy() for key, value in eight.items()}
    wide = rewrite(written("sd1")[1], tmp_path / "wide.safetensors", lambda tensors: wide)
    found, expected = (
        load_pipeline(tmp_path / f"{n}.safetensors", config=folders("sd1"))[1] for n in ("eight", "wide")
    )
    same_trees(found, expected)


def test_a_part_that_is_replaced_may_be_lacking(folders, written, tmp_path):
    (_, params), path = written("sd1")
    prefixes = {"unet": UNET, "vae": VAE}
    arguments = {"unet": r"unet= \(--unet, config.model.student\)", "vae": r"vae= \(--vae, config.model.vae\)"}
    for parts in (("unet",), ("vae",), ("unet", "vae")):
        left_out = tuple(prefixes[part] for part in parts)
        file = rewrite(
            path,
            tmp_path / f"{len(parts)}{parts[0]}.safetensors",
            lambda t, left_out=left_out: {key: value for key, value in t.items() if not key.startswith(left_out)},
        )
        same_trees(load_pipeline(file, config=folders("sd1"), **dict.fromkeys(parts, folders("sd1")))[1], params)
        words = " and ".join(arguments[part] for part in parts)
        refused(file, f"holds no {'.* and no '.join(parts)} .*; give the folder of one with {words}", folders("sd1"))
    refused(file, r"holds no unet \(.*with unet= \(--unet, config.model.student\)$", folders("sd1"), vae=folders("sd1"))


def test_another_kind_of_vae_may_replace_a_files(folders, written, tmp_path):
    tiny.torch_tiny_vae().save_pretrained(tmp_path)
    found = load_pipeline(written("sd1")[1], config=folders("sd1"), vae=tmp_path)[0]
    assert type(found.vae).__name__ == "AutoencoderTiny"


@pytest.mark.parametrize(("part", "prefix"), [("unet", UNET), ("vae", VAE)])
def test_a_part_alone_is_refused_with_the_flag_that_takes_it(written, tmp_path, part, prefix):
    for stripped in ("", prefix):
        alone = rewrite(
            written("sd1")[1],
            tmp_path / f"{bool(stripped)}.safetensors",
            lambda t, stripped=stripped: {k.removeprefix(stripped): v for k, v in t.items() if k.startswith(prefix)},
        )
        end = ", as a folder: make it .*M.from_single_file" if part == "unet" else "$"
        refused(alone, rf"not a checkpoint of .*a {part} alone is given as {part}= \(--{part}.*\) beside a model{end}")


def test_the_files_channels_and_w_embedding_count(folders, written):
    """The folder of a fine-tune's base as config: what the tensors decide is the file's."""
    pipeline, _ = load_pipeline(written("lcm")[1], config=folders("sd1"))
    assert pipeline.unet == load_pipeline(folders("lcm"))[0].unet and pipeline.has_w_embedding


def test_configs_that_a_folder_lacks_are_those_of_the_family(folders, written, tmp_path):
    """The tiny text encoder does not fit the published config."""
    for slot in ("tokenizer", "unet", "vae", "text_encoder"):
        shutil.copytree(folders("sd1") / slot, tmp_path / slot, ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline, _ = load_pipeline(written("sd1")[1], config=tmp_path)
    assert pipeline.configs["scheduler"]["_class_name"] == "PNDMScheduler"
    expected = schedule.from_config(tiny.scheduler_config("epsilon"))
    np.testing.assert_array_equal(pipeline.schedule.alphas_cumprod, expected.alphas_cumprod)
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(LcmError, match="sd1.safetensors with the configs of .*: .* the text encoders give 768"):
        load_pipeline(written("sd1")[1], config=tmp_path)


def without(part: str, folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", part)))


def test_prediction_type_of_sd2(folders, written, tmp_path, warnings):
    """From the file's marks, else the config's scheduler, else ComfyUI's rule."""
    bare = without("scheduler", folders("sd2"), tmp_path / "bare")
    epsilon = Path(shutil.copytree(bare, tmp_path / "epsilon"))
    (epsilon / "scheduler").mkdir()
    tiny.write_json(epsilon / "scheduler" / "scheduler_config.json", tiny.scheduler_config("epsilon"))

    def kind(metadata=None, config=bare, spread=None):
        def change(tensors):
            del tensors["v_pred"]
            bias = np.float16([1, -1, 1, -1]) * (spread or 0)
            return tensors | ({} if spread is None else {UNET + single_file.SD2_GUESS: bias})

        path = rewrite(written("sd2")[1], tmp_path / "unmarked.safetensors", change, metadata)
        return noise_of(path, config).prediction_type

    assert kind({"modelspec.prediction_type": "epsilon"}) == kind(config=epsilon) == "epsilon" and not warnings
    # noise_of reads no weights but that one: the tiny UNet has no such block.
    with pytest.raises(LcmError, match="1 unexpected"):
        kind(spread=0.12)
    assert "v_prediction is used" in warnings[0]
    assert kind() == "epsilon" and len(warnings) == 2 and all("give config=" in text for text in warnings)


def empty(*keys):
    return lambda tensors: tensors.update({key: np.zeros(0, np.float32) for key in keys})


def noise_of(path, config):
    return load_pipeline(path, config=config, weights=False)[0].schedule


MARKS = {
    "keys": (empty("v_pred", "ztsnr"), {}, True),
    "keys with content": (lambda t: t.update(v_pred=np.zeros(1, np.float16), ztsnr=np.zeros((), np.float16)), {}, True),
    "ComfyUI": (empty("v_pred"), {"modelspec.predict_key": "v"}, False),
    "its header alone": (empty(), {"modelspec.predict_key": "v"}, False),
    "sd-scripts": (empty(), {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v1"}, False),
    "sd-scripts with zero SNR": (empty(), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, True),
    "other spellings": (empty(), {"prediction_type": "v_prediction", "ss_v_prediction": "True"}, False),
    "both in one": (empty(), {"modelspec.prediction_type": "v-zsnr"}, True),
    "version": (empty(), {"ss_base_model_version": "sd_v1_v"}, False),
    "architecture": (empty(), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, False),
    "record": (empty(), {"lcm_config.json": '{"prediction_type": "v_prediction"}'}, False),
    "the key overrides the defaults in headers": (
        empty("v_pred", "ztsnr"),
        {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"},
        True,
    ),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_v_prediction_and_zero_snr(folders, written, tmp_path, warnings, name):
    """Without a scheduler, and with the one of a base model whose folder is given for its tokenizers."""
    change, header, zero = MARKS[name]
    path = rewrite(written("sd1")[1], tmp_path / "marked.safetensors", change, header)
    expected = schedule.from_config(tiny.scheduler_config("v_prediction") | {"rescale_betas_zero_snr": zero})
    doubt = 1 if name.startswith("the key overrides") else 0
    assert noise_of(path, without("scheduler", folders("sd1"), tmp_path / "bare")) == expected
    assert len(warnings) == doubt
    pipeline, _ = load_pipeline(path, config=folders("sd1"), weights=False)
    assert pipeline.schedule == expected and schedule.from_config(pipeline.configs["scheduler"]) == expected
    mark = next(iter(header)) if header and not doubt else "key v_pred"
    assert len(warnings) == 1 + 2 * doubt and mark in warnings[-1]
    assert "says epsilon, abar" in warnings[-1] and "the marks are used: v_prediction" in warnings[-1]
    agreeing = Path(shutil.copytree(folders("sd1"), tmp_path / "agreeing"))
    tiny.write_json(agreeing / "scheduler" / "scheduler_config.json", pipeline.configs["scheduler"])
    warnings.clear()
    assert noise_of(path, agreeing) == expected and len(warnings) == doubt


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n', "v_prediction"),
        ("      target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling # of SDXL\n", "v_prediction"),
        ("      target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n", "epsilon"),
        ('parameterization: "eps"\n# parameterization: v\n', "epsilon"),
    ],
)
def test_the_config_of_a1111_beside_a_file_is_a_mark(folders, written, tmp_path, warnings, text, kind):
    header = {"modelspec.prediction_type": "epsilon"}
    path, bare = tmp_path / "x.safetensors", without("scheduler", folders("sd1"), tmp_path / "bare")
    rewrite(written("sd1")[1], path, empty(), header)
    path.with_suffix(".yaml").write_text(text)
    assert noise_of(path, bare).prediction_type == kind
    said = "has a x.yaml (.*), but its header modelspec.prediction_type 'epsilon'; v_prediction is used"
    assert [bool(re.search(said, text)) for text in warnings] == [True] * (kind == "v_prediction")


def test_a_config_of_blank_lines_is_read_at_once(tmp_path):
    (tmp_path / "x.yaml").write_text("\n" * 2**16)
    start = time.monotonic()
    assert not noise_marks.read(tmp_path / "x.safetensors", (), {}).prediction_type
    assert time.monotonic() - start < 5  # a pattern that looks on over lines takes 30 s


def test_marks_against_a_scheduler_with_other_betas(folders, written, tmp_path, warnings):
    """The folder's betas stay, because the marks do not concern them. A missing mark contradicts nothing."""
    folder = Path(shutil.copytree(folders("sd1"), tmp_path / "folder"))
    path = folder / "scheduler" / "scheduler_config.json"
    betas = {"beta_start": 0.001, "beta_schedule": "linear"}
    tiny.write_json(path, tiny.scheduler_config("epsilon") | betas)
    marked = rewrite(written("sd1")[1], tmp_path / "marked.safetensors", empty("v_pred", "ztsnr"))
    both = tiny.scheduler_config("v_prediction") | betas | {"rescale_betas_zero_snr": True}
    assert noise_of(marked, folder) == schedule.from_config(both) and len(warnings) == 1
    tiny.write_json(path, both)
    half = rewrite(written("sd1")[1], tmp_path / "half.safetensors", empty("v_pred"))
    plain = rewrite(written("sd1")[1], tmp_path / "plain.safetensors", empty())
    for file in (marked, half, plain):
        assert noise_of(file, folder) == schedule.from_config(both) and len(warnings) == 1


CONTRADICTIONS = {
    "edm_mean": (empty("edm_mean", "edm_std"), {}, "key='edm_mean'; supported: the discrete ones"),
    "CosXL": (empty("edm_vpred.sigma_max", "edm_vpred.sigma_min", "v_pred"), {}, "key='edm_vpred.sigma_max'"),
    "flow": (empty(), {"modelspec.noise_process": "flow"}, "modelspec.noise_process in the header of .*='flow'"),
    "unknown": (empty(), {"modelspec.prediction_type": "velocity"}, "modelspec.prediction_type in .*'velocity'; supp"),
    "header": (
        empty(),
        {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"},
        r"contradicts itself: modelspec.prediction_type 'v' \(v_prediction\), modelspec.predict_key 'epsilon' \(eps",
    ),
    "zero SNR alone": (empty("ztsnr"), {}, "is marked key ztsnr, which goes with v prediction, but .*; add an empty"),
    "zero SNR of epsilon": (
        empty(),
        {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"},
        "which goes with v pred",
    ),
    "table": (
        lambda t: t.update(alphas_cumprod=schedule.from_config({"_class_name": "DDPMScheduler"}).alphas_cumprod),
        {},
        r"holds another noise table \(alphas_cumprod\) than",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_marks_that_are_refused(folders, written, tmp_path, name):
    change, header, words = CONTRADICTIONS[name]
    path = rewrite(written("sd1")[1], tmp_path / "marked.safetensors", change, header)
    for config in (folders("sd1"), without("scheduler", folders("sd1"), tmp_path / "bare")):
        refused(path, words, config, weights=False)


def test_epsilon_in_a_header_against_a_scheduler_of_v(folders, written, tmp_path):
    path = rewrite(
        written("sd2")[1],
        tmp_path / "epsilon.safetensors",
        lambda t: t.pop("v_pred") is None,
        {"modelspec.prediction_type": "epsilon"},
    )
    refused(
        path,
        "is marked modelspec.prediction_type 'epsilon', but scheduler/.* says v_prediction; correct",
        folders("sd2"),
        weights=False,
    )


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
def test_stored_noise_tables(folders, written, tmp_path, warnings, dtype):
    """Published files of SD 1.x and SDXL hold theirs; it may be the only sign of zero terminal SNR."""
    config = tiny.scheduler_config("v_prediction")
    plain, zero = (schedule.from_config(config | {"rescale_betas_zero_snr": z}) for z in (False, True))
    with np.errstate(divide="ignore"):
        stored = {
            "alphas_cumprod": lambda noise: noise.alphas_cumprod,
            "denoiser.sigmas": lambda noise: noise.sigmas / noise.alphas,
            "betas": lambda noise: 1 - noise.alphas_cumprod / np.append(1, noise.alphas_cumprod[:-1]),
        }
        files = {
            (key, which): rewrite(
                written("sd2")[1],
                tmp_path / f"{key}-{which}.safetensors",
                lambda t, key=key, table=table, noise=noise: t.update({key: table(noise).astype(dtype)}),
            )
            for key, table in stored.items()
            for which, noise in (("plain", plain), ("zero", zero))
        }
    for (_, which), path in files.items():
        bare = noise_of(path, without("scheduler", folders("sd2"), tmp_path / path.stem))
        assert bare == (zero if which == "zero" else plain) and not warnings
    assert noise_of(files["alphas_cumprod", "zero"], folders("sd2")) == zero
    assert len(warnings) == 1 and "key v_pred, alphas_cumprod (zero terminal SNR)" in warnings[0]
    both = rewrite(files["alphas_cumprod", "plain"], tmp_path / "both.safetensors", empty("ztsnr"))
    warnings.clear()
    assert noise_of(both, without("scheduler", folders("sd2"), tmp_path / "bare")) == zero
    assert len(warnings) == 1 and "without zero terminal SNR, which is ignored as left over" in warnings[0]


@pytest.mark.parametrize("zero", (False, True))
def test_v_prediction_students_are_written_with_marks(written, folders, tmp_path, warnings, zero):
    """A round trip of SDXL, whose files without a mark are epsilon for ComfyUI and for us."""
    config = tiny.scheduler_config("v_prediction") | {"rescale_betas_zero_snr": zero}
    noise = schedule.from_config(config)
    pipeline, params = written("sdxl")[0]
    out = save_single_file(
        dataclasses.replace(pipeline, schedule=noise), params, tmp_path / "v.safetensors", dtype=jnp.float32
    )
    with safetensors.safe_open(out, framework="np") as handle:
        assert {"v_pred", "ztsnr"} & set(handle.keys()) == ({"v_pred", "ztsnr"} if zero else {"v_pred"})
        assert handle.metadata()["modelspec.prediction_type"] == "v" and "alphas_cumprod" not in handle.keys()
    assert not warnings and noise_of(out, without("scheduler", folders("sdxl"), tmp_path / "bare")) == noise
    assert noise_of(out, folders("sdxl")) == noise and len(warnings) == 1


@pytest.mark.parametrize(
    ("kind", "spread", "words"),
    [
        ("v_prediction", 0.12, []),
        (
            "v_prediction",
            0.03,
            [r"predicts v_prediction, but ComfyUI will take it for epsilon: .* is 0\.0.*set v_pred"],
        ),
        ("epsilon", 0.03, ["InvokeAI and diffusers take every SD 2.x file for v_prediction"]),
        ("epsilon", 0.12, ["predicts epsilon, but ComfyUI will take it for v_prediction", "InvokeAI and diffusers"]),
    ],
)
def test_programs_that_will_guess_another_prediction_type_of_sd2_are_named(
    written, tmp_path, warnings, kind, spread, words
):
    pipeline, params = written("sd2")[0]
    module = unet.from_config(tiny_configs.UNETS["sd21-base"] | {"layers_per_block": 2})  # as SD 2.x: to block 11
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda x: (spread * rng.standard_normal(x.shape)).astype(x.dtype), names.param_shapes(module, np.float32)
    )
    pipeline = dataclasses.replace(pipeline, unet=module, schedule=schedule.from_config(tiny.scheduler_config(kind)))
    save_single_file(pipeline, {**params, "unet": tree}, tmp_path / "x.safetensors", dtype=jnp.bfloat16)
    assert len(warnings) == len(words) and all(map(re.search, words, warnings)), warnings


def test_another_noise_table_is_written_with_a_warning(written, folders, tmp_path, warnings):
    config = tiny.scheduler_config("epsilon") | {"beta_schedule": "linear"}
    pipeline, params = written("sd1")[0]
    pipeline = dataclasses.replace(pipeline, schedule=schedule.from_config(config))
    out = save_single_file(pipeline, params, tmp_path / "linear.safetensors")
    assert len(warnings) == 1 and "has another noise table than sd1" in warnings[0]
    refused(out, r"holds another noise table \(alphas_cumprod\) than", folders("sd1"), weights=False)
    folder = Path(shutil.copytree(folders("sd1"), tmp_path / "linear"))
    tiny.write_json(folder / "scheduler" / "scheduler_config.json", config)
    assert noise_of(out, folder) == pipeline.schedule
    sample = dataclasses.replace(pipeline, schedule=schedule.from_config(tiny.scheduler_config("sample")))
    out, bare = tmp_path / "s.safetensors", without("scheduler", folders("sd1"), tmp_path / "bare")
    assert noise_of(save_single_file(sample, params, out), bare) == sample.schedule
    assert len(warnings) == 2 and "takes every sd1 for epsilon; set sample by hand" in warnings[1]


def test_a_unet_of_other_noise_is_refused(folders, written, tmp_path):
    path = rewrite(written("sd1")[1], tmp_path / "marked.safetensors", empty("v_pred"))
    words = "says epsilon, .* used with v_prediction"
    refused(path, words, folders("sd1"), unet=folders("lcm"), weights=False)


def test_folding_w_changes_nothing_at_that_w(folders, written, tmp_path, warnings):
    pipeline, params = written("lcm")[0]
    folded, tree = fold_w(pipeline, params, 6.5)
    assert not folded.has_w_embedding and pipeline.has_w_embedding
    warnings.clear()
    out = save_single_file(pipeline, params, tmp_path / "folded.safetensors", dtype=jnp.float32, w=6.5)
    assert not warnings and UNET + "time_embed.cond_proj.weight" not in safetensors.numpy.load_file(out)
    model = diffusers.UNet2DConditionModel.from_single_file(str(out), config=str(folders("sd1")), subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    t = torch.tensor([999, 259])
    embedding = torch.tensor(np.array(guidance.w_embedding(jnp.full((2,), 6.5), 16)))
    with torch.no_grad():
        found = model(x, t, text).sample
        expected = tiny.torch_unet("lcm")(x, t, text, timestep_cond=embedding).sample
        without = tiny.torch_unet("lcm")(x, t, text).sample
    parity.close(found, expected, rtol=0, of_max=parity.NETWORK)
    assert (without - expected).abs().max() > 1e-2
    save_single_file(pipeline, params, tmp_path / "whole.safetensors", dtype=jnp.float32)
    assert len(warnings) == 1 and "fold one w" in warnings[0]
    with pytest.raises(LcmError, match="no w embedding to fold"):
        fold_w(folded, tree, 6.5)


def test_other_unet_and_vae(folders, written, tmp_path):
    """The file's own parts are not read: its tensors would not fit."""

    def cut(tensors):
        del tensors[VAE + "decoder.conv_in.bias"], tensors[UNET + "out.2.bias"]

    path = rewrite(written("sd1")[1], tmp_path / "cut.safetensors", cut)
    pipeline, params = load_pipeline(path, config=folders("sd1"), unet=folders("lcm"), vae=folders("sdxl"))
    assert pipeline.has_w_embedding and pipeline.vae.scaling_factor == 0.13025
    assert pipeline.configs["vae"]["scaling_factor"] == 0.13025
    same_trees(params["unet"], load_pipeline(folders("lcm"))[1]["unet"])


def test_what_a_file_cannot_record_is_logged(written, tmp_path, warnings):
    pipeline, params = written("sd1")[0]
    other = dataclasses.replace(pipeline, vae=pipeline.vae.clone(scaling_factor=0.5))
    save_single_file(other, params, tmp_path / "a.safetensors")
    assert len(warnings) == 1 and "scaling_factor is 0.5" in warnings[0] and "0.18215" in warnings[0]


def test_from_the_hub(folders, written, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(written("sd1")[1])

    with pytest.raises(LcmError, match="no file a/b/c.safetensors here, and it cannot be fetched"):
        load_pipeline("a/b/c.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_pipeline("Lykon/DreamShaper/DreamShaper_8.safetensors", config=folders("sd1"))
    address = "https://huggingface.co/Lykon/DreamShaper/blob/main/sub/DreamShaper_8.safetensors?download=true"
    load_pipeline(address, config=folders("sd1"))
    assert asked == [
        ("Lykon/DreamShaper", "DreamShaper_8.safetensors", None),
        ("Lykon/DreamShaper", "sub/DreamShaper_8.safetensors", "main"),
    ]
    # The suite runs offline: the family's tokenizers cannot be fetched. SD 2.x's are not where diffusers looks.
    for name, kind in (("sd1", "v1"), ("sd2", "v2"), ("sdxl", "xl_base"), ("refiner", "xl_refiner")):
        known = original.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        known = known.replace("stabilityai/", "sd2-community/") if name == "sd2" else known
        with pytest.raises(LcmError, match=f"holds no tokenizer, .*{name}.*{known}.*give config= .*, a local folder"):
            load_pipeline(written(name)[1])


def refused(path, match, config=None, **options):
    with pytest.raises(LcmError, match=match) as caught:
        load_pipeline(path, config=config, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_files_that_are_refused(folders, written, tmp_path):
    path, sd1 = written("sd1")[1], folders("sd1")

    def broken(name, change):
        return rewrite(path, tmp_path / f"{name}.safetensors", change)

    def drop(*prefixes):
        return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(prefixes)}

    error = str(refused(broken("text", drop(CLIP)), "not a checkpoint of a known family", sd1))
    wanted = (UNET + "input_blocks.0.0.weight", VAE + "encoder.conv_in.weight", *XL, CLIP, OPEN_CLIP)
    assert all(key in error for key in wanted)
    refused(
        sd1 / "unet" / "diffusion_pytorch_model.safetensors", "not a checkpoint of a known family.*conv_in.bias", sd1
    )
    refused(broken("few", drop(UNET + "input_blocks.1.0.in_layers")), "unet of .*4 missing .*in_layers", sd1)
    more = broken("more", lambda tensors: tensors.update({UNET + "extra.weight": np.zeros(3, np.float32)}))
    refused(more, r"unet of .*1 unexpected \(extra.weight\)", sd1)
    shape = broken("shape", lambda t: t.update({UNET + "out.2.bias": np.zeros(5, np.float32)}))
    refused(shape, r"1 mis-shaped \(out.2.bias \[5\] instead of \[4\]\)", sd1)
    narrow = refused(written("sd2")[1], "attention_head_dim", without("unet", folders("sd2"), tmp_path / "bare"))
    assert isinstance(narrow, UnsupportedConfig)
    whole = broken("whole", lambda t: t.update({UNET + "out.2.bias": np.zeros(4, np.int32)}))
    refused(whole, "out.2.bias is int32; only floating-point", sd1)
    label = broken("label", lambda t: t.update({UNET + "label_emb.0.0.weight": np.zeros((4, 4), np.float32)}))
    refused(label, "text encoders of sd1, but a .*label_emb", sd1)
    edm = broken("edm", lambda t: t.update(edm_mean=np.zeros(4, np.float32)))
    assert isinstance(refused(edm, "edm_mean", sd1), UnsupportedConfig)
    refused(tmp_path / "none.safetensors", "does not exist; give a .safetensors file")
    later = {UNET + "joint_blocks.0.x_block.attn.qkv.weight": np.zeros(2, np.float32)}  # of SD 3, with a VAE
    sd3 = broken("sd3", lambda t: later | {k: v for k, v in t.items() if k.startswith(VAE)})
    refused(sd3, "not a checkpoint of a known family.*; give a whole checkpoint of one of these", sd1)
    odd = rewrite(path, tmp_path / "odd.safetensors", drop("none"), {"lcm_config.json": '{"solver_steps": "x"}'})
    refused(odd, r"solver_steps of lcm_config.json='x'.*\(.*odd.safetensors\)", sd1)
    refused(path, "is a single file and has no variant 'fp16'", sd1, variant="fp16")
    refused(path, "tokenizer lacks vocab.json", tmp_path)
    refused(sd1, "is for a single .safetensors file, but", sd1)
    flat = broken("flat", lambda t: t.update({UNET + "input_blocks.0.0.weight": np.zeros(4, np.float32)}))
    refused(flat, "lacks tensors of its UNet; copy", sd1)
    empty = broken("empty", lambda t: {k: v for k, v in t.items() if not k.startswith(UNET) or "input_blocks.0." in k})
    refused(empty, "lacks tensors of its UNet; copy", without("unet", sd1, tmp_path / "no unet"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-8])
    refused(cut, "truncated or corrupt", sd1)
    with pytest.raises(LcmError, match="truncated or corrupt"):
        read_record(cut)
    record = rewrite(path, tmp_path / "record.safetensors", drop("none"), {"lcm_config.json": "{"})
    with pytest.raises(LcmError, match="is not valid JSON"):
        read_record(record)


def alone(tensors, prefix, keys):
    """A part of a checkpoint, as "whole" in it, or as "part" or "bare" alone, with or without its prefix."""
    own = {key: x for key, x in tensors.items() if key.startswith(prefix) or keys == "whole"}
    return {key.removeprefix(prefix) if keys == "bare" else key: x for key, x in own.items()}


@pytest.mark.parametrize("keys", ["whole", "part", "bare"])
def test_a_unet_given_as_a_file_tells_how_to_make_its_folder(folders, written, tmp_path, keys):
    (_, params), path = written("sd1")
    path = rewrite(path, tmp_path / "a.safetensors", lambda tensors: alone(tensors, UNET, keys))
    match = "is a file; a folder .* is needed here: make it .*from_single_file.*subfolder='unet'"
    command = re.search('python -c "(.*)"', str(refused(folders("sd1"), match, unet=path)))[1]
    exec(command.replace("MODEL", str(folders("sd1"))), {})
    same_trees(load_unet(tmp_path / "a-unet")[1], params["unet"])
    if keys != "whole":
        assert command in str(refused(path, "alone is given as", folders("sd1")))
    file = next((folders("sd1") / "unet").glob("*.safetensors"))
    refused(folders("sd1"), f"is a file; .*: give its folder, {file.parent}", unet=file)


def test_a_unet_in_diffusers_names_needs_a_config_alone(folders, tmp_path):
    """As few-step UNets are published."""
    file = tmp_path / "few_step_unet.safetensors"
    shutil.copy(next((folders("sd1") / "unet").glob("*.safetensors")), file)
    name = "diffusion_pytorch_model.safetensors"
    words = f"copy it into a new one as {name}, and unet/config.json of the model it goes with beside it"
    refused(folders("sd1"), f"is a file; a folder .*: {words}", unet=file)
    refused(file, f"a unet alone is given as unet= .*: {words}", folders("sd1"))


@pytest.mark.parametrize("keys", ["whole", "part", "bare", "diffusers"])
def test_a_vae_may_be_a_file(folders, written, tmp_path, monkeypatch, warnings, keys):
    """With the config of the model's own, from a folder or beside a file, and from the hub."""
    (_, params), path = written("sd1")
    file = tmp_path / "a" / "vae.safetensors"
    file.parent.mkdir()
    if keys == "diffusers":
        shutil.copy(next((folders("sd1") / "vae").glob("*.safetensors")), file)
    else:
        extra = {"loss.logvar": np.zeros(1, np.float32), "model_ema.decay": np.zeros(1, np.float32)}
        added = {(VAE if keys == "part" else "") + key: x for key, x in extra.items()}
        rewrite(path, file, lambda tensors: alone(tensors, VAE, keys) | added)
    other = rewrite(path, tmp_path / "b.safetensors", lambda t: {k: x for k, x in t.items() if not k.startswith(VAE)})
    folder = Path(shutil.copytree(folders("sd1"), tmp_path / "folder"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for source, config in ((folder, None), (other, folders("sd1"))):
        pipeline, found = load_pipeline(source, config=config, vae=file)
        same_trees(found["vae"], params["vae"])
        assert pipeline.vae == load_pipeline(folders("sd1"), weights=False)[0].vae and not warnings
    file = file.rename(file.with_name("sdxl_vae.safetensors"))
    load_pipeline(folders("sd1"), vae=file)
    assert len(warnings) == 1 and "by its name, for another family" in warnings[0]
    if keys != "bare":
        return
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, revision: str(file))
    same_trees(load_pipeline(folder, vae="owner/name/vae.safetensors")[1]["vae"], params["vae"])
    own = next((folders("sd1") / "vae").glob("*.safetensors"))  # whose config is in the cache, too
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, revision: str(own))
    same_trees(load_pipeline(folder, vae=f"owner/name/vae/{own.name}")[1]["vae"], params["vae"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, revision: str(unet))
    unet = next((folders("sd1") / "unet").glob("*.safetensors"))
    refused(folder, f"{unet} is a file; .*: give its folder", vae="owner/name/unet.safetensors")
    with pytest.raises(LcmError, match="holds a VAE without its config, and there is no model beside it: make it in"):
        load_vae(file)
    (folder / "vae" / "config.json").unlink()
    refused(folder, "holds a VAE without its config, and there is no model beside it: make it", vae=file)
    tiny.torch_tiny_vae().save_pretrained(folder / "vae")
    refused(folder, "holds a VAE without its config, and the model's own is an AutoencoderTiny: make it", vae=file)
    cut = rewrite(file, tmp_path / "a" / "cut.safetensors", lambda t: {k: x for k, x in t.items() if "mid." not in k})
    refused(folders("sd1"), "vae.* does not fit its config: .* missing .decoder.mid_block.*; take both from", vae=cut)
    file = next((folders("sd1") / "vae").glob("*.safetensors"))
    refused(folders("sd1"), f"is a file; .*: give its folder, {file.parent}", vae=file)


def test_targets_that_are_refused(written, tmp_path):
    (pipeline, params), path = written("sd1")
    with pytest.raises(LcmError, match="already exists"):
        save_single_file(pipeline, params, path)
    with pytest.raises(LcmError, match="int32"):
        save_single_file(pipeline, params, tmp_path / "y.safetensors", dtype=np.int32)
    loud = {**params, "vae": jax.tree.map(lambda leaf: leaf * 1e6, params["vae"])}
    with pytest.raises(LcmError, match="first_stage_model.* not finite in float16"):
        save_single_file(pipeline, loud, tmp_path / "y.safetensors")
    assert not any(tmp_path.iterdir())
    encoder = pipeline.text_encoder.clone(with_projection=True)
    with pytest.raises(UnsupportedConfig, match="text encoders of a single file"):
        save_single_file(dataclasses.replace(pipeline, text_encoder=encoder), params, tmp_path / "y.safetensors")
