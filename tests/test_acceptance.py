"""experiments/acceptance: published models in one command; here on stand-ins, from a hub on loopback and its faults."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import acceptance_kit
import family
import hub_kit
import numpy as np
import pytest
from acceptance_kit import SDXL, StandIns

from experiments.acceptance import __main__ as program
from experiments.acceptance import cases, ours, theirs, train
from experiments.gpu_day import driver
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import load_pipeline, lora_keys
from lcm_jax.sampling import presets

REPOSITORY = Path(__file__).parents[1]
PUBLISHED = cases.read(cases.PUBLISHED)
SIZES = {"sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "ssd-1b": "ssd-1b", "vega": "vega"}
WITH_W = {"sd15": "lcm-dreamshaper", "sdxl": "lcm-sdxl", "ssd-1b": "lcm-ssd-1b"}
TEXTS = {"sd15": ("clip-l",), "sd21": ("openclip-h",)}


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_what_is_expected_of_a_published_model_is_what_its_architecture_has(case):
    """Its counts are `family`'s, which are torch's."""
    if case.config or case.refuses:
        assert not case.expects and Path(case.config or ".").exists()
        return
    has_w = "unet.time_cond_proj_dim" in case.expects
    expected = family.UNET_SIZES[(WITH_W if has_w else SIZES)[case.family]]
    assert (case.expects["unet.parameters"], case.expects["unet.keys"]) == expected
    texts = TEXTS.get(case.family, ("clip-l", "openclip-bigg"))
    for slot, name in zip(("", "_2"), texts, strict=False):
        assert case.expects[f"text_encoder{slot}.parameters"] == family.TEXT_SIZES[name][0]
    assert case.expects["vae.parameters"] == family.VAE_SIZES["sd15"][0]
    for steps in case.steps:
        asked = ours.asked(case, steps)
        made_for = presets.PRESETS[case.preset].steps if case.preset else ()
        assert asked["steps"] == steps and (not made_for or steps in made_for)


@pytest.mark.slow
def test_what_is_expected_of_a_published_lora_is_rank_64_on_all_the_layers():
    """The file of 134,621,556 bytes has these tensors in half precision, an alpha beside each pair, and its header."""
    (case,) = (one for one in PUBLISHED if one.name == "lcm-lora-sd15")
    pipeline, _ = load_pipeline(case.model, weights=False)
    shapes = {
        name: layer.torch_shape
        for name, layer in lora_keys.layers(pipeline.unet).items()
        if any(f".{name}".endswith(f".{target}") for target in lora.DEFAULT_TARGETS)
    }
    count = sum(64 * (int(np.prod(shape[1:])) + shape[0]) for shape in shapes.values())
    assert (case.expects["lora.layers"], case.expects["lora.parameters"]) == (len(shapes), count) == (278, 67_252_224)
    assert 2 * (count + len(shapes)) + 8 + 116_544 == 134_621_556


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "unsupported rows=None"),
        ({"rows": [{"name": "a", "model": "b", "presets": "c"}]}, "row a has presets, but its keys are name, model"),
        ({"rows": [{"name": "a"}]}, "row a has no model; add it"),
        ({"rows": [{"name": "a", "model": "b", "steps": [0.5]}]}, "unsupported steps=.0.5.; .*row a"),
        ({"rows": [{"name": "a", "model": "b", "family": "c"}]}, "row a has the family c, which is not among"),
        ({"families": {"c": 1}, "rows": [{"name": "a", "model": "b", "family": "c"}]}, "unsupported families="),
        ({"rows": [{"name": "a", "model": "b"}] * 2}, "two rows have the name a; rename one"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content, words):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(LcmError, match=words):
        cases.read(path)


def test_a_row_has_its_familys_facts_and_its_own(tmp_path):
    path = tmp_path / "table.json"
    rows = [{"name": "a", "model": "b", "family": "f", "expects": {"x": 2}, "steps": [], "lora": ["c:0.5"]}]
    path.write_text(json.dumps({"families": {"f": {"x": 1, "y": 1}}, "rows": rows}))
    (case,) = cases.read(path)
    assert case.expects == {"x": 2, "y": 1} and case.steps == () and case.sources == ["b", "c:0.5"]
    assert ours.differences(case, {"x": 2, "y": 3}) == ["y is 3, not 1"]
    assert cases.of_json(json.loads(json.dumps(dataclasses.asdict(case))), "it") == case
    trained = dataclasses.replace(case, name="t", config="configs/sd15_lcm_lora.py")
    assert [row.name for row in cases.rows([case, trained], tmp_path, 0.0, "", ())] == ["a"]
    assert "--seconds=60" in cases.rows([case, trained], tmp_path, 60.0, "d", ("--x",))[1].command


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--train=1y",), "train=1y: is no time"),
        (("--train=0h",), "train=0h: is no time"),
        (("--train=1h",), "train=1h: needs images with captions; add --data=FOLDER"),
        (("--only=nothing",), "only=nothing: no row has that in its name"),
        ((), "no folder for the results"),
        (("--only=train-", "--out=x"), "only=train-: names only rows that train"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(words, error):
    with pytest.raises(LcmError, match=error):
        program.main(words)


def test_the_list(capsys):
    assert program.main(["--list", "--only=turbo, vega,"]) == 0 and program.seconds("train", "1.5h") == 5400
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sd-turbo", "sdxl-turbo", "vega-rt", "3"]


def test_what_a_training_says_of_its_speed():
    """The time of steps alone counts; a line that is not whole is left out."""
    line = {"loss": 2.0, "images_per_second": 8.0, "data_wait": 0.0, "time_step": 5.0, "time_data": 0.5}
    lines = [line | {"step": step, "images": 4 * step} for step in (10, 20)]
    lines[1] |= {"loss": 1.0, "memory_peak": 2**31, "mfu": 0.4}
    lines[0] |= {"mfu": 0.2}
    found = train.measured(lines)
    assert found["seconds"] == 11 and found["seconds_per_step"] == 0.5 and found["batch_size"] == 4
    said = ["20 steps, 0.5 s/step, 8 images/s", "2.00 GiB", "MFU 30.0%", "loss 2, then 1.5"]
    assert cases.texts({"training": found}) == said
    assert train.data_flags("shapes")[0] == "--config.data.source=shapes"


def test_the_room_for_a_file_is_not_taken_for_that_of_its_config(tmp_path, monkeypatch):
    repos = [SimpleNamespace(repo_id="a/base", size_on_disk=7e9), SimpleNamespace(repo_id="a/fi", size_on_disk=7e9)]
    monkeypatch.setattr(ours.constants, "HF_HUB_CACHE", tmp_path)
    monkeypatch.setattr(ours, "scan_cache_dir", lambda cache: SimpleNamespace(repos=repos))
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    with pytest.raises(LcmError, match="7.0 GB are to be downloaded, and 5.0 GB are free"):
        ours.check_space(cases.Case("c", "a/file/x.safetensors", model_config="a/base", gigabytes=7.0))
    ours.check_space(cases.Case("c", "a/base", gigabytes=7.0))


def test_lines_of_metrics_that_are_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert train.read(path) == []
    path.write_text('{"step": 1, "time_step": 2.0}\n{"step": 2, "ti')
    assert train.spent(train.read(path)) == 2.0


def asked(hub: hub_kit.Hub, home: Path, table: Path, out: Path, *flags: str) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the program."""
    command = [sys.executable, "-m", "experiments.acceptance", f"--table={table}", f"--out={out}", *flags]
    quick = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return command, os.environ | hub.environment(home) | quick


def run(*args, **more: str) -> tuple[int, dict[str, dict]]:
    """(exit code, what is kept of each row)."""
    command, environment = asked(*args)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment | more, stdout=subprocess.PIPE, text=True)
    rows = args[3] / "rows"
    return done.returncode, {path.stem: json.loads(path.read_text()) for path in sorted(rows.glob("*.json"))}


def made(folder: Path, deep: bool, names: tuple[str, ...] = ()) -> tuple[Path, Path, list[str]]:
    """(folder of repositories, table, names of its rows) of stand-ins."""
    content = StandIns(folder / "root", deep).build(names)
    (folder / "table.json").write_text(json.dumps(content))
    return folder / "root", folder / "table.json", [row["name"] for row in content["rows"]]


def failed(kept: dict[str, dict]) -> dict[str, str]:
    return {name: one.get("error", "") for name, one in kept.items() if one["status"] != driver.DONE}


@pytest.mark.slow
def test_published_key_sets_through_a_hub(tmp_path):
    """Every row's files, with all the keys that are published, fetched over HTTP and read; nothing else is fetched."""
    root, table, names = made(tmp_path, deep=True)
    with hub_kit.serving(root) as hub:
        code, kept = run(hub, tmp_path / "home", table, tmp_path / "out")
        assert code == 0 and not failed(kept)
        assert set(kept) == {name for name in names if not name.startswith("train-")}
        fetched = hub.fetched(SDXL)
    assert len(fetched) == len(set(fetched)) == 4 and all(name.endswith(".fp16.safetensors") for name in fetched)
    assert kept["lcm-sdxl"]["facts"]["unet.keys"] == 1681 and kept["lcm-lora-sd15"]["facts"]["lora.layers"] == 278
    assert kept["lcm-lora-sdxl"]["facts"]["lora.layers"] == 788
    assert kept["noobai-vpred"]["facts"]["final_alpha"] == 0.0
    assert "thresholding" in kept["lcm-anything-v5"]["refused"]


@pytest.mark.slow
def test_images_from_the_hubs_cache_are_those_of_diffusers(tmp_path):
    """Every row, offline; the command is killed in the third, and resumes."""
    root, table, names = made(tmp_path, deep=False)
    acceptance_kit.as_cache(root, tmp_path / "home", hub_kit.revision)
    args = hub_kit.Hub(root, "http://127.0.0.1:9"), tmp_path / "home", table, tmp_path / "out"
    command, environment = asked(*args)
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment | {"HF_HUB_OFFLINE": "1"})
    while not (tmp_path / "out" / "logs" / f"{names[2]}.log").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, kept = run(*args, HF_HUB_OFFLINE="1")
    assert code == 0 and not failed(kept)
    assert [kept[name]["tries"] for name in names[:4]] == [1, 1, 2, 1]
    compared = {name: one["diffusers"] for name, one in kept.items() if "diffusers" in one}
    assert {name for name, one in compared.items() if "skipped" in one} == {"noobai-vpred"}
    assert all(image["largest"] <= theirs.CLOSE for one in compared.values() for image in one.get("images", ()))
    images = {path.name for path in (tmp_path / "out" / "images").iterdir()}
    assert {f"lcm-dreamshaper-v7-{steps}.png" for steps in (1, 2, 4, 8)} <= images
    table, summary = (tmp_path / "out" / name for name in ("table.md", "acceptance.json"))
    assert all(f"| {name} | done |" in table.read_text() for name in kept)
    assert json.loads(summary.read_text())["rows"].keys() == kept.keys()


ERRORS = {
    "lcm-dreamshaper-v7": ("SimianLuo/LCM_Dreamshaper_v7", "404", "RepositoryNotFoundError: 404"),
    "lcm-lora-sd15": ("latent-consistency/lcm-lora-sdv1-5", "gated", "GatedRepoError: 403"),
    "tcd-sd15": ("h1t/TCD-SD15-LoRA", "slow", "ReadTimeout"),
    "pcm-sd15": ("wangfuyun/PCM_Weights", "truncated", "peer closed connection"),
    "hyper-sd15": ("ByteDance/Hyper-SD", "damaged", "truncated or corrupt"),
    "lcm-lora-sd15-dreamshaper-8": ("Lykon/dreamshaper-8", "lost", "RemoteEntryNotFoundError: 404"),
}


@pytest.mark.slow
def test_each_fault_of_the_network_is_one_line_and_other_rows_continue(tmp_path):
    """Each fault of a row, a row that is not as expected, and one that finds no room; then the faults are over."""
    root, table, _ = made(tmp_path, False, (*ERRORS, "lcm-anything-v5", "tdm-dreamshaper", "sd-turbo"))
    content = json.loads(table.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    for row in rows.values():
        row["steps"] = []  # images are another test
    rows["sd-turbo"]["expects"] = {"prediction_type": "v_prediction"}
    rows["tdm-dreamshaper"]["gigabytes"] = 1e9
    table.write_text(json.dumps(content))
    with hub_kit.serving(root) as hub:
        hub.faults |= {repository: fault for repository, fault, _ in ERRORS.values()}
        code, kept = run(hub, tmp_path / "home", table, tmp_path / "out")
        errors = failed(kept)
        assert code == 1 and kept["lcm-anything-v5"]["status"] == driver.DONE
        assert errors.keys() == {*ERRORS, "sd-turbo", "tdm-dreamshaper"}
        for name, (_, _, words) in ERRORS.items():
            assert words in errors[name], name
        assert errors["sd-turbo"] == "error: prediction_type is epsilon, not v_prediction"
        assert "GB are to be downloaded" in errors["tdm-dreamshaper"]
        lines = (tmp_path / "out" / "table.md").read_text().splitlines()
        assert sum(line.startswith("| ") for line in lines) == 1 + len(rows)
        hub.faults.clear()
        hub.faults["ByteDance/Hyper-SD"] = "down"  # what it has sent already is in the cache, and broken
        code, kept = run(hub, tmp_path / "home", table, tmp_path / "out")
        assert code == 1 and failed(kept).keys() == {"hyper-sd15", "sd-turbo", "tdm-dreamshaper"}


@pytest.mark.slow
def test_trainings_by_hub_id_stop_after_their_time_and_resume(tmp_path):
    """LCM-LoRA of SD1.5, of an SDXL fine-tune, and of a v-prediction teacher with zero terminal SNR in one file."""
    root, table, names = made(tmp_path, False, ("train-sd15-lcm-lora", "train-sdxl-lcm-lora", "train-noobai-lcm-lora"))
    with hub_kit.serving(root) as hub:
        args = hub, tmp_path / "home", table, tmp_path / "out", "--data=shapes", "--only=train"
        code, first = run(*args, "--train=1s")
        assert code == 0 and not failed(first) and set(first) == set(names)
        longer = 1 + math.ceil(max(first[name]["training"]["seconds"] for name in names))  # on a busy machine over 1
        code, second = run(*args, f"--train={longer}s")
    assert code == 0 and not failed(second)
    for name in names:
        one, other = first[name]["training"], second[name]["training"]
        assert one["seconds"] >= 1 and other["seconds"] >= longer and other["steps"] > one["steps"]
        assert one["batch_size"] == 2 and np.isfinite(one["last_loss"])
        assert (tmp_path / "out" / "train" / name / "checkpoints").is_dir()
