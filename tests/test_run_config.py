"""Keys, values and the command line of the config; what may differ when a run goes on."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shapes():
    return runpy.run_path(str(ROOT / "configs" / "shapes_lcm.py"))["get_config"]()


def test_promised_keys_exist():
    flat = config_lib._flat(config_lib.default_config().to_dict())
    promised = """seed objective model.teacher model.student data.source data.path data.batch_size data.resolution
        train.steps train.learning_rate train.ema_decay distill.solver_steps distill.w_min distill.w_max distill.loss
        checkpoint.every log.every sample.every""".split()
    assert set(promised) <= set(flat)


BAD = {
    "seed": -1,
    "objective": "lcf2",
    "model.teacher": None,
    "model.student": "",
    "model.dtype": "float16",
    "data.source": "imagenet",
    "data.path": "/x",
    "data.batch_size": 0,
    "data.resolution": 0,
    "data.num_examples": 0,
    "data.style": "oil",
    "data.crop": "left",
    "data.flip": 1.5,
    "data.decoder": "gd",
    "data.encode": "never",
    "data.caption_dropout": -0.1,
    "data.max_bad_fraction": 2.0,
    "data.workers": -1,
    "data.bucket_step": 0,
    "data.bucket_max_aspect": 0.5,
    "data.mixture": ("1 folder /x",),
    "train.steps": 0,
    "train.learning_rate": 0.0,
    "train.lr_warmup_steps": -1,
    "train.lr_decay_steps": -5,
    "train.ema_decay": 1.0,
    "train.weight_decay": -0.1,
    "train.adam_b1": 1.5,
    "train.adam_b2": -0.1,
    "train.adam_eps": 0.0,
    "train.max_grad_norm": -1.0,
    "train.accumulation_steps": 0,
    "distill.solver_steps": 1001,
    "distill.w_min": -0.5,
    "distill.w_max": float("nan"),
    "distill.loss": "l1",
    "distill.huber_c": 0.0,
    "distill.solver": "euler",
    "distill.w_embedding_dim": 255,
    "distill.lcd_weight": -1.0,
    "lora.rank": -1,
    "lora.alpha": 0.0,
    "lora.targets": (1,),
    "model.vae": "",
    "model.config": "x",
    "model.prediction_type": "eps",
    "distill.timestep_scaling": 0.0,
    "distill.sigma_data": float("inf"),
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "log.every": 0,
    "sample.every": -1,
    "sample.steps": 51,
    "sample.guidance_scale": 0.5,
    "sample.prompts": (3,),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_value_names_key_and_value(shapes, key):
    with shapes.unlocked():
        shapes.update_from_flattened_dict({key: BAD[key]})
    with pytest.raises(LcmError) as info:
        config_lib.validate(shapes)
    text = str(info.value)
    assert f"config.{key} = {BAD[key]!r}" in text and "\n" not in text


def test_values_that_contradict_each_other(shapes):
    shapes.distill.w_min, shapes.distill.w_max = 9.0, 8.0
    with pytest.raises(LcmError, match=r"distill.w_max = 8.0.*distill.w_min = 9.0"):
        config_lib.validate(shapes)
    shapes.distill.w_min, shapes.train.lr_decay_start, shapes.train.lr_warmup_steps = 0.0, 400, 500
    with pytest.raises(LcmError, match=r"train.lr_decay_start = 400.*500"):
        config_lib.validate(shapes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.rank": 64}, r"w_embedding_dim = 256: w-embedding student asked of a LoRA run.*set 0"),
        ({"objective": "lcf"}, r"model.student = None: LCF fine-tunes"),
        (
            {"objective": "lcf", "model.student": "/lcm", "model.teacher": None, "distill.lcd_weight": 0.5},
            r"model.teacher = None: no teacher.*lcd_weight",
        ),
        ({"distill.lcd_weight": 0.5}, r"lcd_weight = 0.5: only objective \"lcf\""),
        (
            {"objective": "lcf", "model.student": "/lcm", "distill.solver": "dpm_solver"},
            r"no teacher jumps in plain LCF",
        ),
        ({"distill.w_embedding_dim": 0}, r"guidance_scale = 3.0: .*set 1 "),
    ],
)
def test_objectives_and_what_they_train(shapes, changes, words):
    shapes.update_from_flattened_dict(changes)
    with pytest.raises(LcmError, match=words) as error:
        config_lib.validate(shapes)
    assert "\n" not in str(error.value)


def test_lora_and_lcf_configs(shapes):
    shapes.lora.rank, shapes.distill.w_embedding_dim, shapes.sample.guidance_scale = 64, 0, 1.0
    config_lib.validate(shapes)
    resolved = config_lib.resolve(shapes)
    assert len(resolved.lora.targets) == 14 and "to_out.0" in resolved.lora.targets and shapes.lora.targets == ()
    assert config_lib.resolve(resolved).to_dict() == resolved.to_dict() and config_lib.asks_teacher(shapes)
    shapes.objective, shapes.model.student, shapes.model.teacher = "lcf", "/lcm", None
    config_lib.validate(shapes)
    config_lib.validate(config_lib.resolve(shapes))
    assert not config_lib.asks_teacher(shapes)


def test_unknown_and_missing_keys(shapes):
    with pytest.raises(AttributeError, match="steps"):  # the file itself: the config is locked
        shapes.train.stepz = 3
    with shapes.unlocked():
        shapes.train.stepz = 3
    with pytest.raises(LcmError, match=r"config.train.stepz = 3: unknown key"):
        config_lib.validate(shapes)
    with shapes.unlocked():
        del shapes.train["stepz"], shapes.train["steps"]
    with pytest.raises(LcmError, match=r"config.train.steps is missing"):
        config_lib.validate(shapes)


def test_resolve_fills_in_what_follows(shapes):
    resolved = config_lib.resolve(shapes)
    assert resolved.model.student == "shapes" and resolved.model.dtype in ("float32", "bfloat16")
    assert shapes.model.student is None, "the argument stays as it was"
    config_lib.validate(resolved)
    assert config_lib.resolve(resolved).to_dict() == resolved.to_dict()


def test_differences(shapes):
    shapes.train.lr_decay_steps = 400
    saved = json.loads(config_lib.to_json(shapes))
    assert config_lib.differences(saved, shapes) == {}  # tuples became lists on the way
    shapes.train.steps, shapes.checkpoint.every, shapes.log.every, shapes.sample.every = 7, 7, 7, 7
    shapes.train.accumulation_steps, shapes.train.remat = 2, "block"  # the same steps on fewer devices
    shapes.data.workers, shapes.data.max_bad_fraction, shapes.data.index_dir = 3, 0.5, "/elsewhere"
    assert config_lib.differences(saved, shapes) == {}
    shapes.train.lr_decay_steps, shapes.sample.prompts = 9, ("x",)
    different = config_lib.differences(saved, shapes)
    assert different["train.lr_decay_steps"] == (400, 9) and different["sample.prompts"][1] == ["x"]
    assert set(different) == {"train.lr_decay_steps", "sample.prompts"}
    del saved["distill"]["huber_c"]
    assert config_lib.differences(saved, shapes)["distill.huber_c"] == ("<absent>", 0.001)


APP = """
from absl import app, flags
from ml_collections import config_flags
from lcm_jax.run import config as config_lib
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
flags.DEFINE_string("workdir", None, "where to")
def main(_):
    print(config_lib.to_json(CONFIG.value))
app.run(main, flags_parser=config_lib.parse_flags)
"""
CONFIG = "--config=configs/shapes_lcm.py"


def run_app(*arguments):
    return subprocess.run([sys.executable, "-c", APP, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command_line_overrides():
    done = run_app(CONFIG, "--config.train.steps=7", "--config.train.learning_rate=1", "--config.model.student=/a")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["train"]["steps"] == 7 and config["train"]["learning_rate"] == 1.0
    assert config["model"]["student"] == "/a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CONFIG, "--config.train.stepz=3"), ["stepz", "steps", "--config.train.stepz=3"]),
        ((CONFIG, "--config.trane.steps=3"), ["trane", "train"]),
        ((CONFIG, "--config.train.steps=many"), ["many", "train.steps"]),
        (("--config=configs/none.py",), ["configs/none.py"]),
        ((CONFIG, "--config.train.steps=", "3"), ["train.steps"]),
        ((CONFIG, "stray"), ["stray"]),
        ((CONFIG, "--workdirr=x"), ["workdirr", "workdir"]),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(arguments, words):
    done = run_app(*arguments)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_asset_names():
    assert assets.resolve("/some/folder") == "/some/folder"
    with pytest.raises(LcmError, match="no_such_asset"):
        assets.path("no_such_asset")
