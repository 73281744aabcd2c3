"""The table of keys: values, docs and the command line; what a resumed run may change."""

import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from lcm_jax import aot, assets
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.run import keys

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shapes():
    return runpy.run_path(str(ROOT / "configs" / "shapes_lcm.py"))["get_config"]()


BAD = {
    "seed": -1,
    "objective": "lcf2",
    "mesh.slices": 0,
    "mesh.data": 0,
    "mesh.fsdp": -2,
    "model.teacher": None,
    "model.student": "",
    "model.vae": "",
    "model.variant": "",
    "model.config": "x",
    "model.prediction_type": "eps",
    "model.dtype": "float16",
    "model.teacher_dtype": "float16",
    "model.attention": "flash",
    "data.source": "imagenet",
    "data.path": "/x",
    "data.batch_size": 0,
    "data.resolution": 0,
    "data.num_examples": 0,
    "data.style": "oil",
    "data.aspect_buckets": 1,
    "data.crop": "left",
    "data.flip": 1.5,
    "data.decoder": "gd",
    "data.encode": "never",
    "data.encode_chunk": -1,
    "data.caption_dropout": -0.1,
    "data.max_bad_fraction": 2.0,
    "data.workers": -1,
    "data.bucket_step": 0,
    "data.bucket_max_aspect": 0.5,
    "data.mixture": ("1 folder /x",),
    "train.steps": 0,
    "train.learning_rate": 0.0,
    "train.lr_warmup_steps": -1,
    "train.lr_decay_start": -1,
    "train.lr_decay_steps": -5,
    "train.ema_decay": 1.0,
    "train.weight_decay": -0.1,
    "train.adam_b1": 1.5,
    "train.adam_b2": -0.1,
    "train.adam_eps": 0.0,
    "train.max_grad_norm": -1.0,
    "train.mu_dtype": "auto",
    "train.remat": "all",
    "train.accumulation_steps": 0,
    "distill.solver": "euler",
    "distill.solver_steps": 1001,
    "distill.w_min": -0.5,
    "distill.w_max": float("nan"),
    "distill.loss": "l1",
    "distill.huber_c": 0.0,
    "distill.w_embedding_dim": 255,
    "distill.timestep_scaling": 1e7,
    "distill.sigma_data": float("inf"),
    "distill.lcd_weight": -1.0,
    "distill.map": "phase",
    "distill.phases": 0,
    "lora.rank": -1,
    "lora.alpha": 0.0,
    "lora.targets": (1,),
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": -1,
    "checkpoint.best": "accuracy",
    "log.every": 0,
    "log.spike": -1.0,
    "sample.every": -1,
    "sample.steps": 51,
    "sample.guidance_scale": 0.5,
    "sample.prompts": (3,),
}


PHASED = {"distill.map": "phased"}


def test_validate_names_key_and_value(shapes):
    assert {key.name for key in keys.KEYS if key.check is not None} <= set(BAD)
    good = flatten_dict(shapes.to_dict(), sep=".")
    for key, value in BAD.items():
        with pytest.raises(LcmError) as info:
            config_lib.validate(ConfigDict(unflatten_dict(good | {key: value}, sep=".")))
        text = str(info.value)
        assert text.startswith(f"config.{key} = {value!r}: ") and "\n" not in text, text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill.w_min": 9.0, "distill.w_max": 8.0}, r"distill.w_max = 8.0.*distill.w_min = 9.0"),
        ({"train.lr_decay_start": 400, "train.lr_warmup_steps": 500}, r"train.lr_decay_start = 400.*500"),
        ({"data.batch_size": 9, "train.accumulation_steps": 2}, r"accumulation_steps = 2: must divide .* = 9"),
        ({"mesh.fsdp": -1}, r"mesh.data = -1: mesh.fsdp is -1 as well"),
        ({"data.source": None}, r"data.source = None: no training data; set --config.data.source"),
        ({"lora.rank": 64}, r"w_embedding_dim = 256: a LoRA run cannot train .*set 0"),
        ({"objective": "lcf"}, r"model.student = None: LCF fine-tunes"),
        (
            {"objective": "lcf", "model.student": "/lcm", "model.teacher": None, "distill.lcd_weight": 0.5},
            r"model.teacher = None: no teacher.*lcd_weight",
        ),
        ({"distill.lcd_weight": 0.5}, r"lcd_weight = 0.5: only objective \"lcf\""),
        (
            {"objective": "lcf", "model.student": "/lcm", "distill.solver": "dpm_solver"},
            r"the loss evaluates no teacher; .* set distill.lcd_weight",
        ),
        ({"distill.w_embedding_dim": 0, "sample.guidance_scale": 3.0}, r"guidance_scale = 3.0: .*set 1 "),
        ({"distill.phases": 2}, r'phases = 2: distill.map = "origin" has none'),
        ({"distill.stages": ("2:10",)}, r'stages = .*: distill.map = "origin" has none'),
        (PHASED | {"distill.sigma_data": 1.0}, r'sigma_data = 1.0: distill.map = "phased" has none'),
        (PHASED | {"distill.phases": 60, "sample.steps": 50}, r"phases = 60: at most distill.solver_steps = 50"),
        (PHASED | {"sample.steps": 2}, r"sample.steps = 2: the map that is trained last has 4 phases.*set 4"),
        (PHASED | {"distill.stages": ("2:100", "1:300")}, r"sample.steps = 4: .* last has 1 phases"),
        (PHASED | {"distill.stages": ("2:100", "2:300")}, r"stages = '2:300': .* before it: 2 from step 100"),
        (PHASED | {"distill.stages": ("2:100", "1:100")}, r"stages = '1:100': .* begins at a later step"),
        (PHASED | {"distill.stages": ("8:100",)}, r"stages = '8:100': each stage has fewer phases"),
        (PHASED | {"distill.stages": ("0:100",)}, r"stages = '0:100': .*at least 1"),
        (PHASED | {"distill.stages": ("two at 100",)}, r"stages = 'two at 100': write PHASES:STEP"),
        (PHASED | {"distill.stages": ("2:800",), "sample.steps": 2}, r"begins after train.steps = 800"),
    ],
)
def test_values_that_contradict_each_other(shapes, changes, words):
    shapes.update_from_flattened_dict(changes)
    with pytest.raises(LcmError, match=words) as error:
        config_lib.validate(shapes)
    assert "\n" not in str(error.value)


def test_configs_beside_a_single_file(shapes):
    """Of the hub by its address, as its download button gives it; of the LCM that a fine-tune reads."""
    address, shapes.model.config = "https://huggingface.co/owner/name/resolve/main/x.safetensors", "owner/name"
    for shapes.model.teacher in ("mine.safetensors", "owner/name/x.safetensors", f"{address}?download=true"):
        config_lib.validate(shapes)
    shapes.objective, shapes.model.teacher, shapes.model.student = "lcf", None, "lcm.safetensors"
    config_lib.validate(shapes)
    shapes.model.student = "owner/lcm"
    with pytest.raises(LcmError, match="model.config = 'owner/name': goes with a single .*'owner/lcm' has its own"):
        config_lib.validate(shapes)


def test_stages_of_a_phased_map(shapes):
    assert config_lib.phases_at_end(shapes) == 0
    shapes.distill.map, shapes.distill.phases, shapes.distill.stages = "phased", 8, ("4:100", "1:300")
    shapes.sample.steps = 1
    config_lib.validate(shapes)
    assert config_lib.stages(shapes.distill) == [(8, 0), (4, 100), (1, 300)]
    assert config_lib.phases_at_end(shapes) == 1
    after = {step: config_lib.phases_after(shapes, step) for step in (0, 1, 100, 101, 300, 301, 800)}
    assert after == {0: 8, 1: 8, 100: 8, 101: 4, 300: 4, 301: 1, 800: 1}  # 100: the update of step 101 is of 4 phases
    config_lib.validate(ConfigDict(json.loads(config_lib.to_json(shapes))))  # tuples come back as lists


def test_resolve(shapes):
    """What follows from other values is filled in, in a copy; resolving again changes nothing."""
    shapes.lora.rank, shapes.distill.w_embedding_dim, shapes.sample.guidance_scale = 64, 0, 1.0
    config_lib.validate(shapes)
    resolved = config_lib.resolve(shapes)
    assert len(resolved.lora.targets) == 14 and "to_out.0" in resolved.lora.targets and shapes.lora.targets == ()
    assert resolved.model.student == "shapes" and resolved.model.dtype in ("float32", "bfloat16")
    assert shapes.model.student is None and config_lib.needs_teacher(shapes)
    assert config_lib.resolve(resolved).to_dict() == resolved.to_dict()
    shapes.objective, shapes.model.student, shapes.model.teacher = "lcf", "/lcm", None
    config_lib.validate(config_lib.resolve(shapes))
    assert not config_lib.needs_teacher(shapes)
    shapes.compilation_cache = "~/programs"  # jax would make a folder named ~
    assert config_lib.resolve(shapes).compilation_cache == str(Path.home() / "programs")


def test_a_decoder_need_not_be_installed_where_no_data_are_read(shapes, monkeypatch):
    """As of a run whose model is exported on another machine."""
    shapes.data.decoder, shapes.data.resize_filter = "opencv", "area"
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(LcmError, match="needs OpenCV"):
        config_lib.validate(shapes)
    config_lib.validate(shapes, data=False)
    assert aot.prepared(shapes).data.decoder == "opencv"
    shapes.data.source, shapes.data.path = "latents", "/cache"  # that OpenCV decoded the images of
    config_lib.validate(shapes)
    shapes.data.source, shapes.data.path, shapes.data.mixture = "mixture", None, ("1 latents /a", "2 latents /b")
    config_lib.validate(shapes)
    shapes.data.mixture = ("1 latents /a", "2 folder /b")
    with pytest.raises(LcmError, match="needs OpenCV"):
        config_lib.validate(shapes)


@pytest.mark.parametrize(
    ("platform", "dtype", "want"),
    [
        ("cpu", "auto", ("float32", "float32")),
        ("gpu", "auto", ("bfloat16", "bfloat16")),
        ("tpu", "auto", ("bfloat16", "bfloat16")),
        ("cpu", "bfloat16", ("bfloat16", "float32")),
        ("gpu", "float32", ("float32", "float32")),
    ],
)
def test_frozen_weights_are_held_in_the_compute_dtype_but_on_a_cpu(shapes, platform, dtype, want):
    shapes.model.dtype = dtype
    resolved = config_lib.resolve(shapes, platform)
    assert (resolved.model.dtype, resolved.model.teacher_dtype) == want
    for given in keys.DTYPES:
        shapes.model.teacher_dtype = given
        assert config_lib.resolve(shapes, platform).model.teacher_dtype == given


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


@pytest.mark.parametrize(("dtype", "differs"), [("bfloat16", False), ("float32", True)])
def test_the_dtype_of_frozen_weights_may_change_where_their_use_rounds_them_anyway(shapes, dtype, differs):
    """So a run that an older version began on an accelerator, with float32, resumes with the default of today."""
    shapes.model.dtype, shapes.model.teacher_dtype = dtype, "float32"
    saved = json.loads(config_lib.to_json(shapes))
    shapes.model.teacher_dtype = "bfloat16"
    changed = {"model.teacher_dtype": ("float32", "bfloat16")}
    assert config_lib.differences(saved, shapes) == (changed if differs else {})


def test_a_config_of_another_version_differs_only_in_what_the_run_would_do(shapes, capsys):
    """Absent and null keys, and whole sections, count as their defaults; unknown keys are reported."""
    saved = json.loads(config_lib.to_json(config_lib.resolve(shapes)))
    del saved["distill"]["huber_c"], saved["model"]["student"], saved["model"]["dtype"], saved["lora"]
    saved["train"]["mu_dtype"], saved["checkpoint"] = None, None
    assert config_lib.differences(saved, shapes) == {} and capsys.readouterr().err == ""
    shapes.distill.huber_c, shapes.lora.alpha = 0.5, 3.0
    assert config_lib.differences(saved, shapes) == {"distill.huber_c": (0.001, 0.5), "lora.alpha": (64.0, 3.0)}
    saved["distill"] |= {"huber_c": 0.5, "schedule": {"kind": "cosine"}}
    saved |= {"lora": {"alpha": 3}, "future": {}}
    assert config_lib.differences(saved, shapes) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: config.json has keys") and line.endswith("distill.schedule.kind = 'cosine'")


@pytest.mark.parametrize("path", ["{}/", "./{}", "x/../{}", "{}/.", "link", "HOME", "~/{}", "ROOT/{}"])
def test_paths_are_compared_as_places(shapes, tmp_path, monkeypatch, path):
    for folder in ("home/set", "set"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = path.replace("HOME", str(tmp_path / "set")).replace("ROOT", str(tmp_path)).format("set")
    for key in ("model.teacher", "model.student", "model.vae", "model.config", "data.path"):
        before = ConfigDict(shapes.to_dict())
        before.update_from_flattened_dict({"model.student": "other", key: "set"})
        now = ConfigDict(before.to_dict())
        now.update_from_flattened_dict({key: path})
        saved = json.loads(config_lib.to_json(before))
        assert config_lib.differences(saved, now) == {}, key
        now.update_from_flattened_dict({key: "home/set"})
        different = config_lib.differences(saved, now)
        assert different == {key: ("set", "home/set")} and list(config_lib.moved(different)) == [key]
        if key in ("model.vae", "model.config", "data.path"):
            now.update_from_flattened_dict({key: None})
            assert not config_lib.moved(config_lib.differences(saved, now)), "not moved, but left out"


def test_parts_of_a_mixture_are_compared_as_places(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.data.mixture = ("1 folder a", "2 shapes")
    saved = json.loads(config_lib.to_json(shapes))

    def found(*parts: str) -> tuple[bool, bool]:
        """(the mixture is another one, it may only have been moved)"""
        shapes.data.mixture = parts
        different = config_lib.differences(saved, shapes)
        return bool(different), bool(config_lib.moved(different))

    assert found("1  folder ./a/", "2 shapes") == found("1.0 folder a", "2e0 shapes") == (False, False)
    assert found("1 folder a/", "2 shapes") == found(f"1 folder {tmp_path}/b/../a", "2 shapes") == (False, False)
    assert found("1 folder /b", "2 shapes") == (True, True)
    assert found("3 folder a", "2 shapes") == found("1 tfds a", "2 shapes") == found("1 folder a") == (True, False)


def test_patterns_are_places_too(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.data.path = "a/{000..099}.tar"
    saved = json.loads(config_lib.to_json(shapes))
    for path, different in (("./a//{000..099}.tar", 0), (f"{tmp_path}/a/{{000..099}}.tar", 0), ("a/{000..098}.tar", 1)):
        shapes.data.path = path
        assert len(config_lib.differences(saved, shapes)) == different


@pytest.mark.parametrize("value", [5, [], "x", {"steps": [1]}, {"steps": {"a": 1}}, {"learning_rate": float("nan")}])
def test_a_config_json_of_other_types_is_one_line(shapes, value):
    saved = json.loads(config_lib.to_json(shapes)) | {"train": value}
    with pytest.raises(LcmError, match="^runs/config.json .*train.*restore it or choose another workdir$"):
        config_lib.from_saved(saved, "runs/config.json")
    for path in ("a\0b", "\ud800"):
        saved = json.loads(config_lib.to_json(shapes)) | {"data": {"path": path}}
        assert config_lib.differences(saved, shapes)["data.path"] == (path, None)


def test_every_number_has_a_range():
    numbers = [key for key in keys.KEYS if type(key.default) in (int, float)]
    for key, value in itertools.product(
        numbers, (10**30, 10**5000, -(10**30), True, float("nan"), float("inf"), "3", [1])
    ):
        with pytest.raises(LcmError, match=rf"^config.{key.name} = [^\n]*: must be [^\n]*$"):
            key.validate(value)


def test_docs_are_the_table():
    assert (ROOT / "docs" / "config.md").read_text() == config_lib.markdown()


def test_help_lists_every_key():
    done = subprocess.run([sys.executable, "-m", "lcm_jax.train", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr  # absl's
    text = "".join(done.stdout.split())
    for key in keys.KEYS:
        assert "".join(f"--config.{key.name}={key.default}  {key.meaning}".split()) in text, key.name


CONFIG = "--config=configs/shapes_lcm.py"


@pytest.fixture
def parse(monkeypatch):
    """Command line -> its config, as a program with the flags --config and --workdir has it."""

    def run(*arguments):
        values, argv = flags.FlagValues(), ["train", *arguments]
        config_flags.DEFINE_config_file("config", flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
        monkeypatch.chdir(ROOT)
        config_lib.parse_flags(argv)
        return values.config

    return run


def test_command_line_overrides(parse):
    config = parse(CONFIG, "--config.train.steps=7", "--config.train.learning_rate=1", "--config.model.student=/a")
    assert config.train.steps == 7 and type(config.train.learning_rate) is float and config.train.learning_rate == 1
    assert config.model.student == "/a"
    config = parse("--config=configs/sdxl_lcm.py", "--config.model.vae=None", "--config.data.path=None")
    assert config.model.vae is None and config.data.path is None and config.model.teacher  # the word would be a hub id


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CONFIG, "--config.train.stepz=3"), ["stepz", "steps", "--config.train.stepz=3"]),
        ((CONFIG, "--config.trane.steps=3"), ["trane", "train"]),
        ((CONFIG, "--config.train.steps=many"), ["many", "train.steps"]),
        (("--config=configs/none.py",), ["configs/none.py"]),
        ((CONFIG, "--config.train.steps=", "3"), ["train.steps"]),
        ((CONFIG, "stray"), ["stray"]),
        ((CONFIG, "--config.sample.prompts=a red fox"), ["a red fox", "use quotes"]),
        ((CONFIG, "--workdirr=x"), ["workdirr", "workdir"]),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(parse, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


BASE = "from lcm_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"{BASE}    config.data.resolution = SIDE\n", 6, "NameError: name 'SIDE' is not defined"),
        (f"{BASE}    config.train.stepz = 3\n", 6, 'Did you mean "steps" instead of "stepz"?'),
        (f"{BASE}    config.train.steps = 0.5\n", 6, "cannot be casted"),
        # A copy of a config without the one that it starts from.
        ("import runpy\n\ndef get_config():\n    runpy.run_path('none.py')\n", 4, "FileNotFoundError: .*none.py"),
        ("import no_such_module\n", 1, "No module named 'no_such_module'"),
        ("def get_config(:\n", 1, "invalid syntax"),
        ("def get_config():\n    return 1 / 0\n", 2, "ZeroDivisionError"),
    ],
)
def test_an_error_in_a_config_file_names_file_and_line(parse, tmp_path, capsys, text, line, words):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse(f"--config={file}", "--config.train.steps=3")
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and re.fullmatch(rf"error: {re.escape(str(file))}:{line}: .*{words}.*", error), error


def test_asset_names():
    assert assets.resolve("/some/folder") == "/some/folder"
    with pytest.raises(LcmError, match="no_such_asset"):
        assets.path("no_such_asset")
