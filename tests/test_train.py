"""`python -m lcm_jax.train`: what a workdir holds, going on bit for bit, stop on NaN, refused input, one trace.

One teacher, one batch shape and one matmul precision everywhere, so that the step is compiled once for all runs.
"""

import functools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from PIL import Image
from test_run_models import make_lcm

from lcm_jax import train
from lcm_jax.data.order import batch_indices
from lcm_jax.distill import step as step_lib
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import load_pipeline
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data
from lcm_jax.run import models as student_lib
from lcm_jax.runtime import checkpoints as checkpoint
from lcm_jax.runtime import telemetry

ROOT = Path(__file__).parents[1]
STEPS, STOP_FROM = 120, 15  # of the interrupted run: its length, and the step from which it is asked to stop
PROGRAM = [sys.executable, "-m", "lcm_jax.train"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("train") / "teacher")


def arguments(workdir, teacher, *more: str) -> list[str]:
    """The command's options; later ones win."""
    return [
        "--config=configs/shapes_lcm.py",
        f"--workdir={workdir}",
        f"--config.model.teacher={teacher}",
        f"--config.train.steps={STEPS}",
        "--config.data.num_examples=64",
        "--config.data.batch_size=4",
        "--config.log.every=5",
        "--config.checkpoint.every=1000",
        "--config.sample.every=0",
        *more,
    ]


def command(workdir, teacher, *more: str) -> int:
    """The program in this process: its exit code."""
    argv = ["train", *arguments(workdir, teacher, *more)]
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:  # of the command before
        delattr(flags.FLAGS, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
        try:
            config_lib.parse_flags(argv)
            return train.main([])
        except SystemExit as stop:
            return stop.code


def start(workdir, teacher, *more: str) -> subprocess.Popen:
    """The program in a process of its own."""
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as conftest.py: the same cached programs
    return subprocess.Popen(
        [*PROGRAM, *arguments(workdir, teacher, *more)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def logged(workdir) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in telemetry.read_metrics(workdir)]


def saved_steps(workdir) -> list[int]:
    return checkpoint.list_steps(Path(workdir) / "checkpoints")


def arrays(workdir, step: int) -> dict[str, np.ndarray]:
    """Everything in a checkpoint that moves: parameters, target, optimiser."""
    folder = Path(workdir) / "checkpoints"
    parts = {name: checkpoint.load_subtree(folder, step, name) for name in ("params", "ema_params", "opt_state")}
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def snapshot(workdir) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for p in sorted(Path(workdir).rglob("*")) if p.is_file()}


PICTURES = ("--config.sample.every=40", "--config.sample.steps=2", "--config.sample.prompts=('a red circle', 'a star')")


@pytest.fixture(scope="module")
def stopped(teacher, tmp_path_factory) -> tuple[Path, int, str]:
    """A workdir whose run got SIGTERM and then the same command again; the step of the stop; what it said."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    process = start(workdir, teacher, *PICTURES)
    while process.poll() is None and not [r for r in logged(workdir) if r[0] >= STOP_FROM]:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 0, said
    (step,) = saved_steps(workdir)
    assert STOP_FROM <= step < STEPS and f"SIGTERM: saved step {step}" in said
    assert logged(workdir)[-1][0] == step - step % 5
    process = start(workdir, teacher, *PICTURES)
    _, more = process.communicate()
    assert process.returncode == 0, more
    return workdir, step, said + more


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> tuple[Path, list[int]]:
    """A workdir of the same run in one go; and how often its step was traced (each trace one number)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    traces, make_step = [], step_lib.make_step

    def counting(*args):
        step = make_step(*args)

        @functools.wraps(step)  # a program of the same name, so the cached one
        def traced(state, frozen, batch, key):
            traces.append(1)
            return step(state, frozen, batch, key)

        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "make_step", counting)
        assert command(workdir, teacher, *PICTURES) == 0
    return workdir, traces


def test_the_workdir_holds_what_is_promised(stopped, teacher):
    workdir, _, said = stopped
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"] == {
        "teacher": str(teacher),
        "student": str(teacher),
        "dtype": "float32",
        "vae": None,
        "prediction_type": None,
        "config": None,
        "teacher_dtype": "float32",
        "attention": "auto",
    }
    assert saved["train"]["steps"] == STEPS and set(saved) == set(config_lib.default_config())
    for record in telemetry.read_metrics(workdir):
        assert {"step", "loss", "images_per_second", "grad_norm", "learning_rate"} <= set(record)
        assert record["loss"] > 0 and record["images_per_second"] > 0
        assert math.isclose(record["learning_rate"], 1e-3, rel_tol=1e-6)
    assert saved_steps(workdir)[-1] == STEPS
    events = list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 2 and all(e.stat().st_size > 200 for e in events)
    pictures = sorted((workdir / "samples").iterdir())
    assert [p.name for p in pictures] == [f"{step:08d}.png" for step in range(40, STEPS + 1, 40)]
    first, last = (np.asarray(Image.open(p)).astype(int) for p in (pictures[0], pictures[-1]))
    assert first.shape == last.shape == (2 * 64, train.GRID_COLUMNS * 64, 3) and (first != last).any()
    assert f"step {STEPS}/{STEPS}: loss" in said and "Traceback" not in said


def test_stopped_and_gone_on_is_bitwise_the_same_as_never_stopped(stopped, whole):
    (one, step, _), (other, _) = stopped, whole
    a, b = arrays(one, STEPS), arrays(other, STEPS)
    assert a.keys() == b.keys() and any(name.startswith("opt_state") for name in a)
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)
    assert [line[0] for line in logged(one)] == list(range(5, STEPS + 1, 5))
    assert logged(one) == logged(other)
    assert snapshot(one / "samples") == snapshot(other / "samples")
    # It moved, and the target follows behind.
    kernel = "time_embedding/cond_proj/kernel"
    early = arrays(one, step)
    assert (early[f"params/{kernel}"] != a[f"params/{kernel}"]).any()
    assert (a[f"params/{kernel}"] != a[f"ema_params/{kernel}"]).any() and np.abs(a[f"params/{kernel}"]).max() > 0


def test_the_step_is_traced_once(whole):
    assert len(whole[1]) == 1


def test_more_steps_go_on_until_one_is_not_finite(whole, teacher, tmp_path, capsys, monkeypatch):
    """`train.steps` raised; of the data that then come, the first example of step 205 is infinite."""
    workdir, bad_step = Path(shutil.copytree(whole[0], tmp_path / "run")), STEPS + 5
    before, encode = logged(workdir), training_data.encode_at_start

    def one_bad(*args):
        examples = encode(*args)
        mean = examples.parts[0]["mean"]
        mean[batch_indices(0, bad_step - 1, 4, len(mean))[0]] = np.inf
        return examples

    monkeypatch.setattr(training_data, "encode_at_start", one_bad)
    more = (*PICTURES, f"--config.train.steps={STEPS + 9}", "--config.log.every=2", "--config.checkpoint.every=1")
    assert command(workdir, teacher, *more) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: loss of step {bad_step} is nan")
    assert logged(workdir)[: len(before)] == before
    assert [line[0] for line in logged(workdir)] == [*range(5, STEPS + 1, 5), STEPS + 2, STEPS + 4]
    assert all(math.isfinite(value) for line in logged(workdir) for value in line)
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == STEPS + 9
    assert saved_steps(workdir) == [bad_step - 2, bad_step - 1]  # checkpoint.keep = 2
    for step in saved_steps(workdir):
        assert all(np.isfinite(value).all() for value in arrays(workdir, step).values())

    fewer = (*PICTURES, "--config.train.steps=50")
    assert command(workdir, teacher, *fewer) == 0
    assert f"already trained to step {bad_step - 1}" in capsys.readouterr().err


TARGETS = tuple(name for name in lora.DEFAULT_TARGETS if "samplers" not in name)  # the teacher has one level
LORA = (
    "--config.lora.rank=4",
    "--config.lora.alpha=8",
    "--config.distill.w_embedding_dim=0",
    f"--config.lora.targets={TARGETS}",
)
FEW = ("--config.sample.every=6", *PICTURES[1:], "--config.checkpoint.every=6", "--config.log.every=2")


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(teacher, tmp_path, capsys, monkeypatch):
    """At the next step that looks, not at the next checkpoint, which may be hours away."""

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.digests, "write", full)
    assert command(tmp_path / "run", teacher, "--config.checkpoint.every=20") == 2
    assert "saving checkpoint 20 in " in (said := capsys.readouterr().err) and "free disk space" in said
    assert 20 <= logged(tmp_path / "run")[-1][0] < STEPS and saved_steps(tmp_path / "run") == []


def test_a_run_whose_checkpoints_are_gone_is_refused(whole, teacher, tmp_path, capsys):
    workdir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    shutil.move(workdir / "checkpoints", tmp_path / "away")
    before = snapshot(workdir)
    words = [f"metrics.jsonl has step {STEPS}", "holds no checkpoint", "bring the checkpoints back"]
    refused(capsys, words, workdir, teacher, *PICTURES)
    (workdir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    refused(capsys, ["checkpoints links to", "elsewhere"], workdir, teacher, *PICTURES)
    (workdir / "checkpoints").unlink()
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_a_lora_run_saves_adapters_alone_and_goes_on_bit_for_bit(teacher, tmp_path):
    options = (*FEW, *LORA, "--config.sample.guidance_scale=1", "--config.train.ema_decay=0")
    halves, whole = tmp_path / "halves", tmp_path / "whole"
    for steps in (6, 12):
        assert command(halves, teacher, *options, f"--config.train.steps={steps}") == 0
    assert command(whole, teacher, *options, "--config.train.steps=12") == 0
    assert saved_steps(halves) == saved_steps(whole) == [6, 12] and logged(halves) == logged(whole)
    a, b = arrays(halves, 12), arrays(whole, 12)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)
        assert "/lora_" in name or value.ndim == 0, "the base is in no checkpoint"
    for name in a:
        if name.startswith("params/"):
            np.testing.assert_array_equal(a[name], a[name.replace("params/", "ema_params/", 1)])
            assert np.any(a[name])
    config = json.loads((whole / "config.json").read_text())
    assert config["lora"] == {"rank": 4, "alpha": 8.0, "targets": list(TARGETS)}
    pictures = snapshot(whole / "samples")
    assert list(pictures) == ["00000006.png", "00000012.png"] and pictures == snapshot(halves / "samples")
    assert pictures["00000006.png"] != pictures["00000012.png"]


@pytest.mark.slow
def test_an_lcf_run_takes_the_lcm_alone_or_beside_a_pipeline(teacher, tmp_path):
    """A bare UNet with the teacher's other parts, stopped halfway; the same UNet in a pipeline, at once, no teacher."""
    lcm = make_lcm(teacher, tmp_path / "lcm")
    options = (
        *FEW,
        "--config.objective=lcf",
        f"--config.model.student={lcm / 'unet'}",
        "--config.distill.w_embedding_dim=16",
    )
    for steps in (6, 12):
        assert command(tmp_path / "halves", teacher, *options, f"--config.train.steps={steps}") == 0
    config = config_lib.ConfigDict(json.loads((tmp_path / "halves" / "config.json").read_text()))
    config.model.update(teacher=None, student=str(lcm))
    train.train(config, tmp_path / "whole")
    a, b = arrays(tmp_path / "halves", 12), arrays(tmp_path / "whole", 12)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)
    begun = load_pipeline(lcm)[1]["unet"]["conv_in"]["kernel"]
    assert (a["params/conv_in/kernel"] != begun).any() and (a["ema_params/conv_in/kernel"] != begun).any()
    assert np.abs(a["params/conv_in/kernel"] - begun).max() < 0.1
    assert snapshot(tmp_path / "halves" / "samples") == snapshot(tmp_path / "whole" / "samples") != {}


def truncate(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def unsupported(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    tiny.write_json(path, json.loads(path.read_text()) | {"class_embed_type": "timestep"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["broken"]),
        (truncate, ["unet/diffusion_pytorch_model.safetensors"]),
        (unsupported, ["class_embed_type", "timestep"]),
    ],
)
def test_a_bad_teacher_is_refused_and_the_corrected_command_runs(teacher, tmp_path, capsys, monkeypatch, damage, words):
    broken, workdir = Path(shutil.copytree(teacher, tmp_path / "broken")), tmp_path / "run"
    damage(broken)
    refused(capsys, words, workdir, broken)

    def begun(*args, **kwargs):
        raise LcmError("the set-up has passed")

    monkeypatch.setattr(train, "Checkpoints", begun)
    refused(capsys, ["the set-up has passed"], workdir, teacher, "--config.seed=3")


def refused(capsys, words, *args) -> None:
    """The command ends with exit code 2 and says `words` in one line."""
    capsys.readouterr()  # what making the models said
    assert command(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_models_that_cannot_be_distilled(teacher, tmp_path, capsys):
    refused(capsys, ["Latent Consistency Model", "w embedding", "lcm"], tmp_path / "a", tiny.folder("lcm"))
    inpainting = tiny.build("inpainting", tmp_path / "inpainting")
    refused(capsys, ["inpainting", "9 channels"], tmp_path / "b", inpainting)
    student = f"--config.model.student={inpainting}"
    refused(capsys, [str(inpainting), "in_channels 9", "teacher 4"], tmp_path / "c", teacher, student)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--config.train.stepz=3", ["stepz", "steps"]),
        ("--config.train.steps=many", ["many"]),
        ("--config.train.steps=0", ["train.steps", "0"]),
        ("--config.objective=lcm", ["objective", "'lcm'", "lcd"]),
        ("--config.distill.w_max=1e999", ["w_max", "inf"]),
        ("--config.data.resolution=0", ["data.resolution", "0"]),
    ],
)
def test_config_keys_and_values(teacher, tmp_path, capsys, option, words):
    refused(capsys, words, tmp_path / "run", teacher, option)
    assert not (tmp_path / "run").exists()


def test_resolution_and_batch_must_fit_vae_and_devices(teacher, monkeypatch):
    config = config_lib.default_config()
    config.model.teacher, config.data.resolution = str(teacher), 60
    with pytest.raises(train.LcmError, match=r"data\.resolution = 60 .* factor 8"):
        student_lib.shapes(config)
    config = runpy.run_path(str(ROOT / "configs" / "shapes_lcm.py"))["get_config"]()
    config.data.batch_size, config.train.accumulation_steps = 6, 6
    assert train.prepared(config)[1].size == 1
    devices = jax.devices() * 4
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(train.LcmError, match=r"data\.batch_size = 6 in 6 parts .* 4 devices; use a multiple of 24"):
        train.prepared(config)


def test_another_runs_workdir_is_refused_with_both_values_and_left_alone(whole, teacher, capsys):
    workdir, _ = whole
    before = snapshot(workdir)
    different = (*PICTURES, "--config.train.learning_rate=5e-4", "--config.distill.loss=l2")
    refused(capsys, ["train.learning_rate", "0.001", "0.0005", "'huber'", "'l2'"], workdir, teacher, *different)
    with train.locked(workdir):
        refused(capsys, ["in use", str(workdir)], workdir, teacher, *PICTURES, "--config.train.steps=99")
    refused(capsys, ["config.json", "is a file"], workdir / "config.json", teacher)
    assert snapshot(workdir) == before


def test_a_missing_flag_is_one_line_of_the_program():
    done = subprocess.run([*PROGRAM, "--workdir=x"], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "--config" in line
