"""experiments/methods: what is trained, what is refused before that, and what the tables say of rows."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
from PIL import Image

from experiments import embedded, measuring, results, stage
from experiments.methods import cost, latents, report, rival, run
from experiments.methods.arms import ARMS, LORAS, config_of, config_of_lora
from experiments.shapes_lcm_lora import train_style
from lcm_jax import assets, evaluate, pretrained
from lcm_jax.errors import LcmError
from lcm_jax.metrics import table
from lcm_jax.metrics.shapes import Endpoints
from lcm_jax.models import lora
from lcm_jax.pretrained import lora_files
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as run_models
from lcm_jax.sampling.load import load
from lcm_jax.sampling.request import make_request

ROOT = Path(__file__).parents[1]
SCALES = (2.0, embedded.HIGH_SCALE)


def test_every_model_is_a_valid_run(monkeypatch):
    """Seeds differ in nothing else; stages share the steps equally, and the sampler's steps are the last's phases."""
    monkeypatch.chdir(ROOT)
    for arm in ARMS.values():
        for steps in (None, 24):
            one, other = (config_lib.resolve(config_of(arm, seed, steps)) for seed in (0, 1))
            config_lib.validate(one)
            assert one.train.steps == (steps or stage.read_config(arm.config).train.steps)
            assert config_lib.phases_at_end(one) == (arm.phases[-1] if arm.phases else 0)
            other.seed = 0
            assert one == other
    assert config_of(ARMS["staged"], 0, 24).distill.stages == ("4:6", "2:12", "1:18")
    assert config_of(ARMS["lcm"], 0).distill.map == "origin"
    for name in LORAS:
        config = config_of_lora(name, "style", "teacher", 0)
        config_lib.validate(config)
        assert (config.model.teacher, config.data.style, config.lora.rank) == ("teacher", "card", 16)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--only=lcm,tcd", "there is no tcd; give some of teacher, lcm, phased2"),
        ("--seeds=0", "--seeds=0 must be at least 1"),
        ("--steps=4", "--steps=4: 4 stages need more"),
        ("--count=64", "give at least 65"),
    ],
)
def test_refused_before_any_work(flags, words, monkeypatch):
    monkeypatch.setattr(run.stage, "made", lambda *args: pytest.fail("trained"))
    with pytest.raises(LcmError, match=re.escape(words)):
        run.main([flags])


def test_measures_of_latents():
    end = np.random.default_rng(0).standard_normal((8, 4, 4, 4))
    assert latents.error(end, end) == 0 and latents.spread(end, end) == 1
    parity.close(latents.error(end + 0.5 * np.std(end), end), 0.5, rtol=1e-12)
    parity.close(latents.spread(2 * end + 1, end), 2.0, rtol=1e-12)
    black = np.zeros((2, 4, 4, 3), np.uint8)
    parity.close(latents.consistency([black, black + 3, black + 9]), (3 + 9 + 6) / 3)


def row(model: str, seed, steps: int, scale: float, phases: int, error: float | None, spread: float, coverage: float):
    of = {"model": model, "seed": seed, "steps": steps, "guidance_scale": scale, "phases": phases}
    of |= {"sampler": "tcd", "evaluations": steps, "accuracy": 0.9, "frechet": 40.0}
    return of | {"error": error, "spread": spread, "coverage": coverage}


def rows_of(seeds: int) -> list[dict]:
    """LCM's error is 0.4, by tcd 0.3; a phased map's at N = M 0.2 + 0.1 seed, so that it holds in the first seed."""
    found = [row("teacher", None, 50, scale, 0, None, 1.0, 0.05) for scale in SCALES]
    for seed in range(seeds):
        for scale in SCALES:
            for n in measuring.STEPS:
                found.append(row("LCM", seed, n, scale, 0, 0.4, 0.8, 0.1))
                found.append(row("LCM by tcd", seed, n, scale, 0, 0.3, 0.8, 0.2))
                for m in (2, 4, 8):
                    found.append(row(f"phased, M = {m}", seed, n, scale, m, 0.2 + 0.1 * seed, 0.96, 0.1))
    return found


def test_what_was_asked():
    """A phased map is compared in as many steps as phases, with LCM by the sampler that comes nearer."""
    asked = report.asked(rows_of(2))
    assert len(asked) == 3 * 2 * 2  # maps, scales, seeds
    parity.close([one["error_ratio"] for one in asked if one["seed"] == 0], [2 / 3] * 6)
    assert {one["coverage_gain"] for one in asked} == {0.0}
    lines = report.verdicts(asked).splitlines()
    assert lines[2] == "| phased, M = 2 | 2 | 0.83 ± 0.24 (1) | 0.960 ± 0.000 | +0.000 ± 0.000 (2) |"
    assert lines[3].startswith("| phased, M = 2 | 7.5 |") and "0.960 ± 0.000 (2)" in lines[3]
    assert report.asked([one for one in rows_of(1) if one["model"] != "LCM"]) == []

    means = report.means(rows_of(2), report.KEYS)
    (one,) = (r for r in means if (r["model"], r["steps"], r["guidance_scale"]) == ("phased, M = 4", 4, 2.0))
    parity.close([one["error"], one["deviations"]["error"]], [0.25, np.sqrt(0.005)])
    assert means[0]["model"] == "teacher" and means[0]["error"] is None
    about = {"seeds": 2, "count": 99, "coverage_count": 99, "training_steps": {"lcm": 7}}
    costs = {"training": [{"model": "lcm", "units": 6.0, "seconds": 0.5}]}
    costs["sampling"] = [{"model": "LCM", "steps": n, "milliseconds": 1.5 * n} for n in measuring.STEPS]
    found = {"rows": rows_of(2), "alike": [], "rival": []} | costs
    text = report.markdown(found, about | {"asked": asked})
    assert "| **phased, M = 4** | **2** | **4** | **4** | **90.0% ± 0.0%** |" in text and "| **LCM**" not in text
    assert "| teacher | 2 | 50 | 50 | 90.0% | 40.0 | 0.050 |  | 1.000 |" in text
    assert "| lcm | 6.00 | 0.500 |" in text and "| LCM | 1.5 | 3.0 | 6.0 | 12.0 |" in text


def stand_in(out, name, count, *flags, each=embedded.EACH):
    """Rows as `embedded.evaluated` returns them."""
    asked = evaluate.parse_rows([flag.removeprefix("--row=") for flag in flags if flag.startswith("--row=")])
    values = {"caption_accuracy": 0.9, "shapes_frechet": 40.0, "coverage_distance": 0.1 if each > 1 else None}
    shared = values, 1.0, (1.0, 1.0), 1, 0.0, {}, {}
    return [table.Row(name, one.sampler, one.steps, one.guidance_scale, one.steps, *shared) for one in asked]


def test_the_whole_command_with_stand_ins_for_training_and_generating(tmp_path, monkeypatch):
    """What is trained and measured, and in which order; the tables are written after each seed."""
    monkeypatch.chdir(ROOT)
    made, published = [], {}

    def train(config, workdir, say):
        made.append(f"{workdir.relative_to(tmp_path)} {config.seed}")
        workdir.mkdir(parents=True, exist_ok=True)
        return "seed1/phased4" not in made[-1]

    def generated(source, cache, sampler, steps, scale, count):
        z = np.random.default_rng(len(str(source)) + len(sampler)).standard_normal((len(steps), count, 2, 2, 4))
        return z, np.zeros((len(steps), 2, 4, 4, 3), np.uint8)

    monkeypatch.setattr(stage, "made", train)
    monkeypatch.setattr(embedded, "evaluated", stand_in)
    monkeypatch.setattr(latents, "kept", generated)
    monkeypatch.setattr(rival, "fine_tune", lambda workdir, steps, say: workdir / "teacher")
    monkeypatch.setattr(cost, "training", lambda arms: [{"model": n, "units": 6.0, "seconds": 0.5} for n in arms])
    monkeypatch.setattr(cost, "sampling", lambda of: [{"model": n, "steps": 1, "milliseconds": 1.5} for n in of])
    monkeypatch.setattr(results, "publish", lambda folder, sources: published.update(sources))
    assert run.main([f"--workdir={tmp_path}", "--seeds=1", "--count=99", "--publish"]) == 0
    assert made == [f"seed0/{name} 0" for name in ARMS] + [
        f"rival/seed0/{name} 0" for name in ("lcm_plain", "lcm_style", "phased_plain", "phased_style")
    ]
    assert list(published) == list(run.RESULTS) and Image.open(published["figure.png"]).format == "PNG"
    found = json.loads((tmp_path / "table.json").read_text())
    counts = {"rows": 2 + 6 * 4 * 2, "asked": 3 * 2, "alike": 7 * 2, "training": 5, "sampling": 6, "rival": 2 + 4 * 2}
    assert {key: len(found[key]) for key in counts} == counts
    assert {row["coverage"] for row in found["rows"]} == {0.1} and found["training_steps"]["lcm"] == 800
    assert "| phased, style | plain | 4 | 90.0% | 40.0 | 40.0 | 0.100 |" in (tmp_path / "table.md").read_text()

    assert run.main([f"--workdir={tmp_path}", "--seeds=2", "--count=99"]) == 1 and made[-1] == "seed1/phased4 1"
    assert json.loads((tmp_path / "table.json").read_text())["seeds"] == 1


def test_the_teachers_rows_are_the_recorded_ones(monkeypatch):
    """Of as many captions; for any other number they are measured."""
    monkeypatch.setattr(embedded, "evaluated", stand_in)
    scales = embedded.best_guidance_scale(), embedded.HIGH_SCALE
    recorded, measured = (run.of_teacher(ROOT, scales, count) for count in (2000, 99))
    assert [row["guidance_scale"] for row in recorded] == [row["guidance_scale"] for row in measured] == list(scales)
    assert [set(row) for row in recorded] == [set(row) for row in measured]
    of_2000 = {row["guidance_scale"]: row for row in embedded.recorded_rows(embedded.THOROUGH) if row["steps"] == 50}
    of_512 = {row["guidance_scale"]: row for row in embedded.recorded_rows(embedded.DEMO) if row["steps"] == 50}
    for row in recorded:
        scale = row["guidance_scale"]
        assert row["accuracy"] == of_2000[scale]["accuracy"] != measured[0]["accuracy"]
        assert (
            row["coverage"] == of_512[scale]["coverage"] != of_2000[scale]["coverage"]
        )  # of 8 images of each, as here


@pytest.mark.slow
def test_the_fine_tune_is_a_teacher(tmp_path, monkeypatch):
    """The style LoRA merged: a folder that both LoRAs of it can be distilled on."""
    monkeypatch.chdir(ROOT)
    teacher, params = pretrained.load_pipeline(assets.path("shapes"))

    def train(workdir, steps):
        adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), params["unet"], 2))
        adapters = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), adapters)
        return lora_files.write_lora(workdir / "style.safetensors", adapters, teacher.unet, alpha=2.0, rank=2)

    monkeypatch.setattr(train_style, "train", train)
    folder = rival.fine_tune(tmp_path, None, print)
    _, merged = pretrained.load_pipeline(folder)
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), merged["unet"], params["unet"])
    assert 0 < sum(jax.tree.leaves(differ)) < len(jax.tree.leaves(differ))
    config = config_lib.resolve(config_of_lora("phased", "style", str(folder), 0))
    assert run_models.shapes(config).teacher.schedule == teacher.schedule
    monkeypatch.setattr(train_style, "train", lambda *args: pytest.fail("trained again"))
    assert rival.fine_tune(tmp_path, None, print) == folder


@pytest.mark.slow
def test_a_small_run_is_kept_and_published(tmp_path, monkeypatch):
    """All rows of two models; the same call again trains and generates nothing. The ends of the teacher's paths are
    those of the one-step error of `lcm_jax.evaluate`; a step of distillation costs 6 passes for every map."""
    monkeypatch.chdir(ROOT)
    flags = [f"--workdir={tmp_path}", "--steps=5", "--count=65", "--seeds=1", "--only=lcm,phased2"]
    assert run.main(flags) == 0
    folder = tmp_path / "5-steps"
    text, found = (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())
    assert [len(found[key]) for key in ("rows", "asked", "alike", "training", "sampling", "rival")] == [
        24,
        2,
        6,
        2,
        12,
        0,
    ]
    assert all(abs(one["units"] - 6.0) < 0.2 and one["seconds"] > 0 for one in found["training"])
    assert all(one["milliseconds"] > 0 for one in found["sampling"])
    monkeypatch.setattr(stage, "trained_and_exported", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(cost, "_medians", lambda *args: pytest.fail("timed again"))
    monkeypatch.setattr(latents, "_generated", lambda *args: pytest.fail("generated again"))
    assert run.main(flags) == 0 and (folder / "table.md").read_text() == text

    teacher = load("shapes", dtype="float32")
    captions = embedded.captions_of(65, 1)
    ends = Endpoints(teacher, captions, latents.ENDPOINT_STEPS, 0, make_request(teacher.pipeline, sampler="ddim"))
    got = latents.endpoints(folder / "latents", 2.0, 64)
    parity.close(got, ends.at(2.0), atol=1e-3)
