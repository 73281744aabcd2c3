"""The paper's ablations as configs: every variant can be trained, and equal models are trained once."""

import argparse
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
    found = stage.read_config(ROOT / "configs" / f"{name}.py")
    if name != "shapes_lcm":
        found.data.path = "/shards/{0..9}.tar"
    return found


def test_variants():
    """Every variant of every study is valid and has its changes; the config that it comes from stays as it is."""
    for name in ("shapes_lcm", "sd21_base_lcm", "sd15_lcm"):
        base = config(name)
        for study in studies.STUDIES.values():
            for changes in (studies.changes(base, variant) for variant in study.variants.values()):
                variant = stage.changed(base, changes)
                config_lib.validate(variant)
                for key, value in changes.items():
                    section, _, field = key.partition(".")
                    assert variant[section][field] == value
        assert base == config(name)


def test_folder():
    """Equal models have one folder, over all studies."""
    base = config("shapes_lcm")
    folders = {
        name: [studies.folder(base, studies.changes(base, variant)) for variant in study.variants.values()]
        for name, study in studies.STUDIES.items()
    }
    assert all(len(set(found)) == len(found) for found in folders.values())
    assert set(folders["skip"]) < set(folders["solver"]) and len(folders["solver"]) == 15
    assert [name for name, found in folders.items() if "base" in found] == ["solver", "skip", "ema", "loss"]
    assert folders["ema"][:2] == ["ema_decay=0.0,learning_rate=0.0001", "ema_decay=0.0"]
    assert studies.folder(base, {"distill.solver": "dpm_solver", "distill.solver_steps": 50}) == "solver=dpm_solver"
    assert studies.folder(config("sd21_base_lcm"), studies.STUDIES["guidance"].variants["w in [2, 14]"]) == "base"


def test_a_value_made_from_the_configs_own():
    """Whatever the config's learning rate is, the slow training without EMA has a tenth of it."""
    for name in ("shapes_lcm", "sd15_lcm"):
        base = config(name)
        found = studies.changes(base, studies.STUDIES["ema"].variants["EMA 0, lr / 10"])
        rate = base.train.learning_rate / 10
        assert found == {"train.ema_decay": 0.0, "train.learning_rate": rate}


def test_parse_settings():
    texts = ("data.batch_size=8", "train.learning_rate=1e-4", "data.path=/a/{0..9}.tar", "data.filters=('side > 9',)")
    found = stage.parse_settings(texts)
    assert list(found.values()) == [8, 1e-4, "/a/{0..9}.tar", ("side > 9",)]
    changed = stage.changed(config("sd15_lcm"), found)
    assert (changed.data.batch_size, changed.data.path, changed.data.filters) == (8, "/a/{0..9}.tar", ("side > 9",))
    with pytest.raises(LcmError, match="--set=train.steps: write --set=KEY=VALUE"):
        stage.parse_settings(["train.steps"])
    for wrong in ({"train.step": 3}, {"train.steps": "many"}, {"train": 3}, {"nothing": 3}):
        with pytest.raises(LcmError, match="there is no such key, or its value has another type"):
            stage.changed(config("shapes_lcm"), wrong)


def asked(name: str, **changes) -> argparse.Namespace:
    path = ROOT / "configs" / f"{name}.py"
    options = {"config": path, "set": [], "steps": None, "count": None, "evaluate": None, "plot": False}
    return argparse.Namespace(**options | changes)


def test_read_config():
    """The decay is scaled with --steps, unless --set gives it."""
    own, longer = (run.read_config(asked("shapes_lcm", steps=steps)).train for steps in (None, 1000))
    assert (longer.steps, longer.lr_decay_start, longer.lr_decay_steps) == (1000, 500, 500)
    assert (own.steps, own.lr_decay_start, own.lr_decay_steps) == (800, 400, 400)
    given = run.read_config(asked("shapes_lcm", steps=1000, set=["train.lr_decay_steps=7"])).train
    assert (given.lr_decay_start, given.lr_decay_steps) == (500, 7)
    with pytest.raises(LcmError, match="not together with --set=train.steps"):
        run.read_config(asked("shapes_lcm", steps=9, set=["train.steps=8"]))


def test_check(tmp_path):
    """How models are measured is known before any training."""
    study, plain = studies.STUDIES["ema"], config("sd21_base_lcm")
    with pytest.raises(LcmError, match="sd21_base_lcm.py needs --evaluate='--source=... --metric=...'"):
        run.check(study, plain, asked("sd21_base_lcm"))
    with pytest.raises(LcmError, match="CLIP does not exist"):
        options = f"--source=folder --path={tmp_path} --metric=clip_score:CLIP"
        run.check(study, plain, asked("sd21_base_lcm", evaluate=options))
    run.check(study, config("shapes_lcm"), asked("shapes_lcm", count=99))


def test_figure(tmp_path):
    """A line ends with its solver."""
    variants = ["DDIM, k = 1", "DDIM, k = 5", "DPM-Solver, k = 1"]
    assert figure._lines([(0, 0.1), (1, 0.2), (2, 0.3)], variants) == [[(0, 0.1), (1, 0.2)], [(2, 0.3)]]
    assert figure._lines([(0, 0.1), (1, 0.2)], ["EMA 0", "EMA 0.9"]) == [[(0, 0.1), (1, 0.2)]]
    alone = [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert figure._lines(alone, ["EMA 0, lr / 10", "EMA 0", "EMA 0.9"]) == [alone[:1], alone[1:]]
    rows = [
        table.Row(name, "lcm", n, 3.0, n, {"caption_accuracy": 0.5}, 1.0, (1.0, 1.0), 1, 0.0, {}, {})
        for name in variants
        for n in (1, 2)
    ]
    figure.write(rows, variants, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").format == "PNG"
