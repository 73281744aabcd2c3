"""Damaged checkpoints: found before anything is restored, reported, renamed; no silent restart, no wrong weight."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runtime_checkpoint import bits

from lcm_jax.errors import LcmError
from lcm_jax.runtime import checkpoints as checkpoints_module
from lcm_jax.runtime.checkpoints import DIGESTS_FILE, Checkpoints, find_damage, load_subtree


def make_state(step):
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "params": {
            "kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        },
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (10, 15):
            checkpoints.save(step, make_state(step), {"position": step}, {"loss": 1 / step})
    return folder


@pytest.fixture()
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "added to": lambda path: path.write_bytes(path.read_bytes() + b"\n0"),
    "flipped": flip,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_restore_falls_back_past_any_damage_to_any_file(saved, tmp_path, capfd, how):
    abstract = jax.eval_shape(lambda: make_state(0))
    names = [path.relative_to(saved / "15") for path in all_files(saved / "15")]
    assert {"digests.json", "metrics.json"} < set(map(str, names)) and len(names) > 10
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGE[how](folder / "15" / name)
        if str(name).startswith("state/"):
            with pytest.raises(LcmError, match=rf"15 is damaged: .*{name}.*use another step: 10"):
                load_subtree(folder, 15, "params")
        capfd.readouterr()
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.steps() == [10, 15]
            assert bits(checkpoints.restore(abstract)) == bits(make_state(10)), name
            said = capfd.readouterr().err
            assert "checkpoints/15 is DAMAGED" in said.replace(str(folder), "checkpoints") and str(name) in said
            assert checkpoints.latest_step() == 10 and checkpoints.extra() == {"position": 10}
            if number == 0:
                assert checkpoints.save(15, make_state(15)), "the step can be reached again"
        assert sorted(os.listdir(folder)) == (["10", "15", "15.damaged"] if number == 0 else ["10", "15.damaged"])


def test_flipped_bits_of_the_digests_themselves(folder):
    path = folder / "15" / DIGESTS_FILE
    whole = path.read_bytes()
    for at in np.random.default_rng(0).random(60):
        path.write_bytes(whole)
        flip(path, at)
        damage = find_damage(folder, 15)
        try:
            same = json.loads(path.read_bytes()) == json.loads(whole)
        except ValueError:
            same = False
        assert same or damage, "either it has the same meaning, as with a space for a line feed, or it is refused"


def test_damage_to_the_same_step_twice(folder, capfd):
    flip(folder / "15" / "extra" / "metadata")
    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(make_state(0))
        checkpoints.save(15, make_state(15))
    flip(folder / "15" / "state" / "_METADATA")
    with Checkpoints(folder) as checkpoints:
        assert bits(checkpoints.restore(make_state(0))) == bits(make_state(10))
    assert sorted(os.listdir(folder)) == ["10", "15.damaged", "15.damaged1"], "nothing of the user's is deleted"
    assert capfd.readouterr().err.count("DAMAGED") == 2


def test_all_damaged_is_an_error_again_and_again(folder):
    for step in (10, 15):
        flip(folder / str(step) / "state" / "manifest.ocdbt")
    before = sorted(map(str, folder.rglob("*")))
    for _ in range(2):
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.steps() == [10, 15], "so that the caller does not start again"
            with pytest.raises(LcmError, match=r"every checkpoint in .* is damaged \(15: .*; 10: .*another workdir"):
                checkpoints.restore(make_state(0))
        assert sorted(map(str, folder.rglob("*"))) == before


def test_a_requested_step_is_not_replaced_by_another(folder):
    flip(folder / "15" / "metrics.json")
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(LcmError, match="15 is damaged: the content of metrics.json is not what was written"):
            checkpoints.restore(make_state(0), 15)
        assert bits(checkpoints.restore(make_state(0), 10)) == bits(make_state(10))
        assert checkpoints.steps() == [10, 15]


def test_another_model_is_not_damage(folder):
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(LcmError, match=r"15 does not fit this run: params/bias: bfloat16\[7\] .*, not expected"):
            checkpoints.restore({"step": jnp.int32(0), "params": {"kernel": jnp.zeros((64, 32))}})
        assert checkpoints.steps() == [10, 15]


def test_missing_digests_are_damage(folder):
    """Even of all checkpoints: nothing else proves that the arrays are those that were written."""
    for step in (10, 15):
        (folder / str(step) / DIGESTS_FILE).unlink()
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(LcmError, match="every checkpoint .* is damaged .*15: digests.json is missing; 10: digests"):
            checkpoints.restore(make_state(0))
        assert checkpoints.steps() == [10, 15]


def test_a_file_that_cannot_be_read_is_not_damage(folder, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints_module, "_sha256", broken)
    with Checkpoints(folder) as checkpoints, pytest.raises(LcmError, match=r"15 cannot be read .*try again, or move"):
        checkpoints.restore(make_state(0))
    assert sorted(os.listdir(folder)) == ["10", "15"]


def test_files_added_later_do_not_matter(folder):
    (folder / "15" / "state" / ".nfs0001").write_bytes(b"x")
    (folder / "15" / "notes.txt").write_text("the good one")
    with Checkpoints(folder) as checkpoints:
        assert bits(checkpoints.restore(make_state(0))) == bits(make_state(15))


@pytest.mark.parametrize("content", ['{"loss": "x"}', '{"loss": [1]}', '{"loss": 1' + "0" * 400 + "}", "[1]", "{"])
def test_metrics_of_other_types_are_reported_and_do_not_count(tmp_path, capsys, content):
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "metrics.json").write_text(content)
    assert checkpoints_module.tidy(tmp_path, "loss") == [(5, None)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "5/metrics.json cannot be read" in line and line.endswith("does not count as the best")
