"""Every file in configs/: a card, valid values, and its step, traced and run, on random folders of its architecture.

Models and batch are reduced; everything else is the file's own.
"""

import ast
import contextlib
import functools
import json
import re
import runpy
import shutil
from pathlib import Path

import gpu_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tangent
import tiny_family
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lcm_jax import aot, assets, train
from lcm_jax.cost import chips
from lcm_jax.distill import OBJECTIVES
from lcm_jax.errors import LcmError
from lcm_jax.models import attention
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as student_lib
from lcm_jax.run import step as training_step
from lcm_jax.runtime import checkpoints as checkpoint
from lcm_jax.runtime import kernels, telemetry

FILES = {file.stem: file for file in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))}
MODELLED_ROWS = Path(__file__).parents[1] / "experiments" / "aot" / "rows"
FAMILIES = {
    "dreamshaper_v7_lcm": "sd15",
    "sd15_lcm": "sd15",
    "sd15_lcm_lora": "sd15",
    "collage_lcm_lora": "sd15",
    "sd15_pcm": "sd15",
    "sd15_pcm_lora": "sd15",
    "sdxl_pcm_lora": "sdxl",
    "pokemon_lcf": "sd15",
    "simpsons_lcf": "sd15",
    "sd21_base_lcm": "sd21-base",
    "sd21_lcm": "sd21-768",
    "sdxl_lcm": "sdxl",
    "sdxl_lcm_lora": "sdxl",
    "lcm_xl_pokemon_blip": "sdxl",
    "lcm_xl_lora_pokemon_blip": "sdxl",
    "ssd1b_lcm": "ssd-1b",
    "ssd1b_lcm_lora": "ssd-1b",
    "my_sd15_24gb": "sd15",
    "my_sdxl_24gb": "sdxl",
    "illustrious_lcm_lora": "sdxl",
    "noobai_vpred_lcm_lora": "sdxl",
}
# One of each architecture.
LOWERED = ("sd15_lcm_lora", "sd21_lcm", "sdxl_lcm", "ssd1b_lcm_lora", "shapes_lcm_lora")
EMBEDDED = {name for name in FILES if name.startswith("shapes_")}
# By default: every objective and map; the others are slow tests.
TRACED = {*LOWERED, *EMBEDDED} - {"ssd1b_lcm_lora", "shapes_lcm_long"}


def load(name: str) -> ConfigDict:
    return runpy.run_path(str(FILES[name]))["get_config"]()


def reduced(name: str) -> ConfigDict:
    """The config with random folders instead of its models, for one step on a few embedded images."""
    config, family = load(name), FAMILIES.get(name, "sd15")
    if config.model.teacher is not None:
        config.model.teacher = str(tiny_family.folder(family, short=True))
        if family == "sdxl" and config.model.prediction_type == "v_prediction":
            config.model.teacher = str(tiny_family.zero_snr_folder())
    if config.model.student is not None:
        config.model.student = str(tiny_family.folder(family, short=True, w_dim=tiny_family.W_DIM))
    if config.model.vae is not None:
        config.model.vae = str(tiny_family.vae_folder())
    config.data.source, config.data.path, config.data.filters = "shapes", None, ()
    config.data.resolution, config.data.num_examples = 64, 4
    config.data.batch_size = max(2, config.train.accumulation_steps)
    config.train.steps = config.log.every = 1
    if config.distill.stages:  # of one step there is only the first
        config.distill.stages, config.sample.steps = (), config.distill.phases
    return config


@pytest.mark.parametrize("name", FILES)
def test_card_and_values(name, tmp_path, monkeypatch):
    """The card has every heading; the values are valid from any folder, once the path of the data is given."""
    card = runpy.run_path(str(FILES[name]))["__doc__"]
    if name in FAMILIES:
        assert f"--config=configs/{name}.py --workdir=" in card
        for word in ("Command", "Data", "Hardware", "Time", "Source", "Result"):
            assert re.search(rf"^{word} {{2,}}\S", card, re.MULTILINE), word
        assert "measured" in card
    monkeypatch.chdir(tmp_path)
    config = load(name)
    if name not in EMBEDDED:
        assert config.data.resolution in (512, 768, 1024)
        assert (config.data.path is None) == ("--config.data.path=" in card)
    if config.data.source != "shapes" and config.data.path is None:
        with pytest.raises(LcmError, match=r"config\.data\.path = None"):
            config_lib.validate(config)
        config.data.path = "images"
    config_lib.validate(config)
    config_lib.validate(config_lib.resolve(config))


def differences(a: str, b: str) -> set[str]:
    one, other = (flatten_dict(load(name).to_dict(), sep=".") for name in (a, b))
    return {key for key in one | other if one[key] != other[key]}


def test_variants_change_what_their_cards_say_and_nothing_else():
    assert differences("sd21_base_lcm", "sd21_lcm") == {
        "model.teacher",
        "model.prediction_type",
        "data.resolution",
        "data.batch_size",
    }
    assert differences("sdxl_lcm", "ssd1b_lcm") == {"model.teacher"}
    adapters = {
        "lora.rank",
        "train.learning_rate",
        "train.ema_decay",
        "distill.w_embedding_dim",
        "distill.w_min",
        "distill.w_max",
        "sample.guidance_scale",
    }
    for full in ("sd15_lcm", "sdxl_lcm", "ssd1b_lcm"):
        assert differences(full, f"{full}_lora") == adapters
    phased = {"distill.map", "distill.solver_steps"}
    assert differences("shapes_lcm", "shapes_pcm") == phased
    assert differences("sd15_lcm", "sd15_pcm") == phased | {"distill.phases", "distill.stages"}
    second_pass = {"train.learning_rate", "data.caption_dropout", "distill.w_min", "distill.w_max"}
    assert differences("sd15_lcm_lora", "sd15_pcm_lora") == phased | second_pass | {"train.weight_decay"}
    assert differences("sdxl_lcm_lora", "sdxl_pcm_lora") == phased | second_pass
    assert differences("pokemon_lcf", "simpsons_lcf") == {"sample.prompts", "data.path"}
    mine = {"model.prediction_type", "data.source", "data.encode_chunk"}
    assert differences("sd15_lcm_lora", "my_sd15_24gb") == mine
    in_24_gb = {"model.vae", "data.filters", "train.remat", "train.accumulation_steps"}
    assert differences("sdxl_lcm_lora", "my_sdxl_24gb") == mine | in_24_gb
    named = {"model.teacher", "model.prediction_type", "distill.w_min", "distill.w_max"}
    assert differences("my_sdxl_24gb", "illustrious_lcm_lora") == named | {"sample.prompts"}
    assert differences("illustrious_lcm_lora", "noobai_vpred_lcm_lora") == named


PUBLISHED = {
    "sd15_lcm": {
        "train.learning_rate": 1e-6,
        "distill.loss": "huber",
        "distill.huber_c": 1e-3,
        "data.batch_size": 12,
        "data.crop": "random",
        "data.resize_filter": "bilinear",
        "train.steps": 1000,
        "train.ema_decay": 0.95,
        "distill.w_min": 5.0,
        "distill.w_max": 15.0,
    },
    "sd21_base_lcm": {
        "data.resolution": 512,
        "data.batch_size": 72,
        "train.steps": 100_000,
        "distill.w_min": 2.0,
        "train.learning_rate": 8e-6,
        "train.ema_decay": 0.999943,
        "distill.w_max": 14.0,
        "distill.solver_steps": 50,
        "distill.loss": "l2",
    },
    "sd21_lcm": {"data.resolution": 768, "data.batch_size": 16, "model.prediction_type": "v_prediction"},
    "dreamshaper_v7_lcm": {"data.resolution": 768, "train.steps": 4000, "model.teacher": "Lykon/dreamshaper-7"},
    "sdxl_lcm": {
        "data.resolution": 1024,
        "data.filters": ("side >= 700", "pwatermark <= 0.5 or missing"),
        "distill.w_min": 3.0,
        "distill.w_max": 15.0,
        "train.learning_rate": 1e-6,
    },
    "sdxl_lcm_lora": {
        "lora.rank": 64,
        "lora.alpha": 64.0,
        "train.learning_rate": 1e-4,
        "distill.w_min": 6.5,
        "distill.w_max": 6.5,
        "train.weight_decay": 0.0,
    },
    "lcm_xl_pokemon_blip": {
        "data.flip": 0.5,
        "data.filters": (),
        "distill.w_embedding_dim": 0,
        "train.learning_rate": 1e-6,
        "data.batch_size": 4,
        "train.accumulation_steps": 2,
        "train.ema_decay": 0.95,
        "distill.w_min": 3.0,
    },
    "lcm_xl_lora_pokemon_blip": {"lora.rank": 8, "lora.alpha": 8.0, "train.learning_rate": 1e-5},
    "pokemon_lcf": {"objective": "lcf", "train.steps": 30_000, "model.teacher": None, "distill.lcd_weight": 0.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hyper_parameters_are_the_published_ones(name):
    values = flatten_dict(load(name).to_dict(), sep=".")
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


MODELLED = {
    name: MODELLED_ROWS / f"config-{name}.json" for name in FILES if (MODELLED_ROWS / f"config-{name}.json").exists()
}


@pytest.mark.parametrize("name", MODELLED)
def test_the_modelled_memory_is_that_of_the_compiled_step(name):
    """`python -m experiments.aot.run` compiled it for the card that the docstring names."""
    one = json.loads(MODELLED[name].read_text())
    memory, (card, _) = one["report"]["memory"], chips.of_topology(one["row"]["topology"])
    docs = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert f"Modelled: {memory['needed'] / chips.GIB:.1f} GiB on one {card.name}" in " ".join(docs.split())
    assert memory["needed"] <= memory["available"]
    assert one["report"]["images_per_step"] == load(name).data.batch_size


# Keys that change numbers in a program, or nothing at all. Configs that are equal but for these share one trace.
NUMBERS = (
    *("seed", "data.", "log.", "checkpoint.", "sample.prompts", "sample.every", "distill.w_m", "distill.huber_c"),
    *("train.steps", "train.learning_rate", "train.ema_decay", "train.lr_", "model.teacher", "model.student"),
)


def structure(name: str) -> str:
    """Equal for configs of one program, at `reduced` sizes."""
    values = flatten_dict(load(name).to_dict(), sep=".")
    values["model.prediction_type"] = values["model.prediction_type"] or "epsilon"  # that of the folders
    return FAMILIES.get(name, "shapes") + repr(sorted((k, v) for k, v in values.items() if not k.startswith(NUMBERS)))


PROGRAMS = {structure(name): name for name in FILES}.values()


def test_every_promised_config_is_there():
    """And every objective and map is among those that are traced by default."""
    assert set(FAMILIES) | EMBEDDED == set(FILES) and {"shapes_lcm", "shapes_lcm_long"} <= EMBEDDED
    kinds = {name: (config.objective, config.distill.map) for name, config in ((name, load(name)) for name in FILES)}
    traced = TRACED & set(PROGRAMS)
    assert set(LOWERED) <= set(PROGRAMS) and {kinds[name] for name in traced} == set(kinds.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TRACED else pytest.mark.slow) for name in PROGRAMS]
)
def test_every_program_traces_for_a_gpu(name):
    """From shapes alone, as `train` and `sample` build them: the state keeps its shapes, the loss is one number.

    One config of each architecture is lowered for CUDA as well.
    """
    with gpu_kit.tracing_for(gpu_kit.H100):
        traced = gpu_kit.traced(aot.prepared(reduced(name)), gpu_kit.H100)
        lowers = traced.items() if name in LOWERED else ()
        texts = {program: gpu_kit.lowered(each) for program, each in lowers}
    (before, *_), _ = traced["step"].in_avals
    after, metrics = traced["step"].out_info
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, before)
    assert all(jax.tree.leaves(same)) and metrics["loss"].shape == ()
    check_names(load(name), flatten_dict(after.params, sep="/"))
    if texts:
        assert "@__cudnn$fmhaSoftmaxBackward(" in texts["step"] and "@__cudnn$fmhaSoftmax(" in texts["sampler"]


def check_names(config: ConfigDict, weights: dict) -> None:
    """Adapters alone are trained, or all weights, with a w embedding if the config has one."""
    if config.lora.rank:
        assert all("/lora_" in key for key in weights)
    else:
        assert ("time_embedding/cond_proj/kernel" in weights) == (config.distill.w_embedding_dim > 0)


@pytest.mark.slow
def test_a_forward_mode_objective_needs_an_attention_that_has_it(monkeypatch):
    """What an objective declares is what the run reads: no teacher is loaded, and kernels without `jvp` are refused.

    With the others the step differentiates through weights that are split and blocks that are rematerialised.
    """
    monkeypatch.setitem(OBJECTIVES, "tangent", tangent.TANGENT)
    config = load("shapes_lcm")
    config.objective = "tangent"
    config.data.batch_size = 4
    config_lib.validate(config)
    config = config_lib.resolve(config)
    mesh, models = gpu_kit.devices("cpu", 4, fsdp=4), student_lib.shapes(config)
    for config.model.attention in ("auto", "cudnn", "splash"):
        words = f"attention = '{config.model.attention}': .*'tangent' .* forward mode.*xla, chunked"
        with pytest.raises(LcmError, match=words):
            training_step.make(config, models, mesh)
    for config.model.attention, config.train.remat in (("xla", "attention"), ("chunked", "block")):
        program = training_step.make(config, models, mesh)
        assert program.problem.teacher is None and program.frozen.teacher is None
        _, metrics = jax.eval_shape(program.step, program.state, program.frozen, program.batch, program.key)
        assert metrics["loss"].shape == ()


# Layers of attention in a UNet; of them those with heads of 160, which Ampere's cuDNN does not differentiate.
LAYERS = {"sd15": (32, 12), "sd21-base": (32, 0), "sd21-768": (32, 0), "sdxl": (140, 0), "ssd-1b": (68, 0)}
LAYERS["shapes"] = 8, 0
MESHES = {"H100": gpu_kit.H100, "A100": gpu_kit.A100, "TPU": gpu_kit.devices("tpu")}


@pytest.mark.aot
@pytest.mark.parametrize("target", MESHES)
@pytest.mark.parametrize("name", FILES)
def test_every_program_lowers_at_full_size(name, target, tmp_path):
    """Attention of every layer is cuDNN's, forward and backward, and on TPUs splash's where it is long."""
    mesh, config = MESHES[target], load(name)
    if name == "shapes_lcf":
        config.model.student = str(embedded_lcm(tmp_path))
    with gpu_kit.tracing_for(mesh):
        traced = gpu_kit.traced(aot.prepared(config), mesh)
        texts = {program: gpu_kit.lowered(each, mesh) for program, each in traced.items()}
    layers, others = LAYERS[FAMILIES.get(name, "shapes")]
    if target == "TPU":
        splash = ["@tpu_custom_call(" in texts[program] for program in ("step", "sampler")]
        assert splash == [name not in EMBEDDED] * 2  # which have 1,024 tokens or more
    else:
        others = others if target == "A100" else 0
        assert texts["step"].count("@__cudnn$fmhaSoftmaxBackward(") == layers - others


def embedded_lcm(folder: Path) -> Path:
    """Configs of the LCM that `make demo` exports, which `shapes_lcf` starts from."""
    shutil.copytree(assets.path("shapes"), folder / "lcm", ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "lcm" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 256}))
    return folder / "lcm"


KERNELS = {
    "xla": attention.dot_product_attention,
    "chunked": functools.partial(attention.chunked_attention, rows=64),
    "splash": functools.partial(kernels.splash_attention, interpret=True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_which_attention_has_a_forward_mode(name):
    def tangent(q):
        return jax.jvp(lambda x: KERNELS[name](x, x, x), (q,), (q,))

    refused = contextlib.nullcontext() if name in kernels.FORWARD_MODE else pytest.raises(TypeError, match="jvp")
    with refused:
        jax.jit(tangent).lower(jnp.ones((1, 128, 1, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_one_step(name, tmp_path):
    config = reduced(name)
    state = train.train(config, tmp_path / "run")
    assert int(state.step) == 1 and checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [1]
    (metrics,) = telemetry.read_metrics(tmp_path / "run")
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0 and metrics["grad_norm"] > 0
    weights = flatten_dict(state.params, sep="/")
    assert all(np.isfinite(value).all() for value in weights.values())
    check_names(config, weights)
    if config.lora.rank:
        moved = [np.any(value) for key, value in weights.items() if key.endswith("/lora_B")]  # they start at zero
        assert np.mean(moved) > 0.9
    target = flatten_dict(state.ema_params, sep="/")
    lag = max(np.abs(target[key] - value).max() for key, value in weights.items())
    assert (lag > 0) == (config.train.ema_decay > 0)
