"""The paper's ablations as configs: every variant can be trained, and models that are the same are one."""

import argparse
import runpy
from pathlib import Path

import pytest
from PIL import Image

from experiments import stage
from experiments.ablations import figure, run, studies
from lcm_jax.errors import LcmError
from lcm_jax.metrics import table
from lcm_jax.run import config as config_lib

ROOT = Path(__file__).parents[1]


def config(name: str):
    found = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    if name != "shapes_lcm":
        found.data.path = "/shards/{0..9}.tar"
    return found


@pytest.mark.parametrize("name", ("shapes_lcm", "sd21_base_lcm", "sd15_lcm"))
def test_every_variant_is_a_config_that_validates(name):
    for study in studies.STUDIES.values():
        for changes in study.variants.values():
            config_lib.validate(stage.changed(config(name), changes))


def test_equal_models_have_one_folder():
    base = config("shapes_lcm")
    folders = {
        name: [studies.folder(base, changes) for changes in study.variants.values()]
        for name, study in studies.STUDIES.items()
    }
    assert all(len(set(found)) == len(found) for found in folders.values())
    assert set(folders["skip"]) < set(folders["solver"]) and len(folders["solver"]) == 15
    assert [name for name, found in folders.items() if "base" in found] == ["solver", "skip", "ema", "loss"]
    assert studies.folder(base, {"distill.solver": "dpm_solver", "distill.solver_steps": 50}) == "solver=dpm_solver"
    assert studies.folder(config("sd21_base_lcm"), studies.STUDIES["guidance"].variants["w in [2, 14]"]) == "base"


def test_variants_do_not_change_the_config_they_come_from():
    base = config("shapes_lcm")
    assert stage.changed(base, {"train.ema_decay": 0.5}).train.ema_decay == 0.5 and base.train.ema_decay == 0.95


def test_settings_of_the_command_line():
    texts = ("data.batch_size=8", "train.learning_rate=1e-4", "data.path=/a/{0..9}.tar", "data.filters=('side > 9',)")
    wanted = {
        "data.batch_size": 8,
        "train.learning_rate": 1e-4,
        "data.path": "/a/{0..9}.tar",
        "data.filters": ("side > 9",),
    }
    assert stage.parse_settings(texts) == wanted
    changed = stage.changed(config("sd15_lcm"), wanted)
    assert (changed.data.batch_size, changed.data.path, changed.data.filters) == (8, "/a/{0..9}.tar", ("side > 9",))
    with pytest.raises(LcmError, match="--set=train.steps: write --set=KEY=VALUE"):
        stage.parse_settings(["train.steps"])
    for wrong in ({"train.step": 3}, {"train.steps": "many"}, {"train": 3}, {"nothing": 3}):
        with pytest.raises(LcmError, match="no such key, or no such value"):
            stage.changed(config("shapes_lcm"), wrong)


def asked(name: str, **changes) -> argparse.Namespace:
    options = {
        "config": ROOT / "configs" / f"{name}.py",
        "set": [],
        "steps": None,
        "count": None,
        "evaluate": None,
        "plot": False,
    }
    return argparse.Namespace(**options | changes)


def test_the_decay_follows_the_steps():
    """Unless --set says where it is."""
    own, longer = (run.read_config(asked("shapes_lcm", steps=steps)).train for steps in (None, 1000))
    assert (longer.steps, longer.lr_decay_start, longer.lr_decay_steps) == (1000, 500, 500)
    assert (own.steps, own.lr_decay_start, own.lr_decay_steps) == (500, 250, 250)
    told = run.read_config(asked("shapes_lcm", steps=1000, set=["train.lr_decay_steps=7"])).train
    assert (told.lr_decay_start, told.lr_decay_steps) == (500, 7)
    with pytest.raises(LcmError, match="not beside --set=train.steps"):
        run.read_config(asked("shapes_lcm", steps=9, set=["train.steps=8"]))


def test_how_models_are_measured_is_known_before_any_training(tmp_path):
    study, plain = studies.STUDIES["ema"], config("sd21_base_lcm")
    with pytest.raises(LcmError, match="sd21_base_lcm.py needs --evaluate='--source=... --metric=...'"):
        run.check(study, plain, asked("sd21_base_lcm"))
    with pytest.raises(LcmError, match="CLIP does not exist"):
        options = f"--source=folder --path={tmp_path} --metric=clip_score:CLIP"
        run.check(study, plain, asked("sd21_base_lcm", evaluate=options))
    run.check(study, config("shapes_lcm"), asked("shapes_lcm", count=99))


def row(model: str, steps: int, scale: float, accuracy: float) -> table.Row:
    return table.Row(model, "lcm", steps, scale, steps, {"caption_accuracy": accuracy}, 1.0, (1.0, 1.0), 1, 0.0, {}, {})


def test_a_line_of_the_figure_ends_with_its_solver(tmp_path):
    variants = ["DDIM, k = 1", "DDIM, k = 5", "DPM-Solver, k = 1"]
    assert figure._lines([(0, 0.1), (1, 0.2), (2, 0.3)], variants) == [[(0, 0.1), (1, 0.2)], [(2, 0.3)]]
    assert figure._lines([(0, 0.1), (1, 0.2)], ["EMA 0", "EMA 0.9"]) == [[(0, 0.1), (1, 0.2)]]
    rows = [row(name, steps, 3.0, 0.5) for name in variants for steps in (1, 2)]
    figure.write(rows, variants, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").format == "PNG"
