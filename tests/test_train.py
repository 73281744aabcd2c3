"""`python -m lcm_jax.train`: what a workdir holds, bitwise resume, stop on NaN, refused input, one trace.

One teacher, one batch shape and one matmul precision everywhere, so that the step is compiled once for all runs.
"""

import contextlib
import io
import json
import math
import runpy
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import training_processes as runs
from absl import flags
from jax._src.compiler import get_compile_options
from PIL import Image
from test_run_models import make_lcm
from training_processes import logged, saved, saved_steps, snapshot

from lcm_jax import train
from lcm_jax.data.order import batch_indices
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import load_pipeline
from lcm_jax.run import data as run_data
from lcm_jax.run.config import ConfigDict, default_config, parse_flags
from lcm_jax.run.models import shapes
from lcm_jax.runtime import checkpoints, telemetry

ROOT = Path(__file__).parents[1]
STEPS, STOP_FROM = 120, 15  # of the interrupted run: its length, and the step from which it is asked to stop
train.define_flags()


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
            parse_flags(argv)
            return train.main([])
        except SystemExit as stop:
            return stop.code


IMAGES = ("--config.sample.every=40", "--config.sample.steps=2", "--config.sample.prompts=('a red circle', 'a star')")


@pytest.fixture(scope="module")
def stopped(teacher, tmp_path_factory) -> tuple[Path, int, str]:
    """A workdir whose run got SIGTERM in its process, and was resumed in this one; the step of the stop; the output."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    processes = runs.start(*arguments(workdir, teacher, *IMAGES))
    while processes[0].poll() is None and not [line for line in logged(workdir) if line[0] >= STOP_FROM]:
        time.sleep(0.005)
    processes[0].send_signal(signal.SIGTERM)
    (output,) = runs.ended(processes)
    (step,) = saved_steps(workdir)
    assert STOP_FROM <= step < STEPS and f"SIGTERM: saved step {step}" in output
    assert logged(workdir)[-1][0] == step - step % 5
    with contextlib.redirect_stderr(io.StringIO()) as more:
        assert command(workdir, teacher, *IMAGES) == 0
    return workdir, step, output + more.getvalue()


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    """A workdir of the same run in one go, whose step is traced once."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with runs.traces() as traces:
        assert command(workdir, teacher, *IMAGES) == 0
    assert len(traces) == 1
    return workdir


def test_the_workdir_holds_what_is_promised(stopped, teacher):
    workdir, _, output = stopped
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"] == {
        "teacher": str(teacher),
        "student": str(teacher),
        "dtype": "float32",
        "vae": None,
        "variant": None,
        "prediction_type": None,
        "config": None,
        "teacher_dtype": "float32",
        "attention": "auto",
    }
    assert config["train"]["steps"] == STEPS and set(config) == set(default_config())
    for line in telemetry.read_metrics(workdir):
        assert {"step", "loss", "images_per_second", "grad_norm", "learning_rate"} <= set(line)
        assert line["loss"] > 0 and line["images_per_second"] > 0
        assert math.isclose(line["learning_rate"], 1e-3, rel_tol=1e-6)
    assert saved_steps(workdir)[-1] == STEPS
    events = list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 2 and all(event.stat().st_size > 200 for event in events)
    grids = sorted((workdir / "samples").iterdir())
    assert [path.name for path in grids] == [f"{step:08d}.png" for step in range(40, STEPS + 1, 40)]
    first, last = (np.asarray(Image.open(path)).astype(int) for path in (grids[0], grids[-1]))
    assert first.shape == last.shape == (2 * 64, train.GRID_COLUMNS * 64, 3) and (first != last).any()
    assert f"step {STEPS}/{STEPS}: loss" in output and "Traceback" not in output


def test_stopped_and_resumed_is_bitwise_the_same_as_never_stopped(stopped, whole):
    workdir, step, _ = stopped
    last = runs.check_same(workdir, whole, STEPS)
    assert [line[0] for line in logged(workdir)] == list(range(5, STEPS + 1, 5))
    assert snapshot(workdir / "samples") == snapshot(whole / "samples")
    # The parameters changed, and the target follows behind.
    kernel = "time_embedding/cond_proj/kernel"
    params, target = last[f"params/{kernel}"], last[f"ema_params/{kernel}"]
    assert (saved(workdir, step)[f"params/{kernel}"] != params).any() and (params != target).any() and np.any(params)


def test_more_steps_resume_until_one_is_not_finite(whole, teacher, tmp_path, capsys, monkeypatch):
    """`train.steps` raised; of the data that follow, the first example of step 125 is infinite."""
    workdir, bad_step = Path(shutil.copytree(whole, tmp_path / "run")), STEPS + 5
    before, encode = logged(workdir), run_data.encode_at_start

    def one_bad(*args):
        examples = encode(*args)
        mean = examples.parts[0]["mean"]
        mean[batch_indices(0, bad_step - 1, 4, len(mean))[0]] = np.inf
        return examples

    monkeypatch.setattr(run_data, "encode_at_start", one_bad)
    more = (*IMAGES, f"--config.train.steps={STEPS + 9}", "--config.log.every=2", "--config.checkpoint.every=1")
    assert command(workdir, teacher, *more) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: loss of step {bad_step} is nan")
    assert logged(workdir)[: len(before)] == before
    assert [line[0] for line in logged(workdir)] == [*range(5, STEPS + 1, 5), STEPS + 2, STEPS + 4]
    assert all(math.isfinite(value) for line in logged(workdir) for value in line)
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == STEPS + 9
    assert saved_steps(workdir) == [bad_step - 2, bad_step - 1]  # checkpoint.keep = 2
    for step in saved_steps(workdir):
        assert all(np.isfinite(value).all() for value in saved(workdir, step).values())

    assert command(workdir, teacher, *IMAGES, "--config.train.steps=50") == 0
    assert f"already trained to step {bad_step - 1}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(teacher, tmp_path, capsys, monkeypatch):
    """At the next step that checks, not at the next checkpoint, which may be hours away."""

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_digests", full)
    assert command(tmp_path / "run", teacher, "--config.checkpoint.every=20") == 2
    assert "saving checkpoint 20 in " in (printed := capsys.readouterr().err) and "free disk space" in printed
    assert 20 <= logged(tmp_path / "run")[-1][0] < STEPS and saved_steps(tmp_path / "run") == []


def test_a_run_whose_checkpoints_are_gone_is_refused(whole, teacher, tmp_path, capsys):
    workdir = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.move(workdir / "checkpoints", tmp_path / "away")
    before = snapshot(workdir)
    words = [f"metrics.jsonl has step {STEPS}", "holds no checkpoint", "bring the checkpoints back"]
    refused(capsys, words, workdir, teacher, *IMAGES)
    (workdir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    refused(capsys, ["checkpoints links to", "elsewhere"], workdir, teacher, *IMAGES)
    (workdir / "checkpoints").unlink()
    assert snapshot(workdir) == before


FEW = ("--config.sample.every=6", *IMAGES[1:], "--config.checkpoint.every=6", "--config.log.every=2")


@pytest.mark.slow
def test_a_lora_run_saves_adapters_alone(teacher, tmp_path):
    targets = tuple(name for name in lora.DEFAULT_TARGETS if "samplers" not in name)  # the teacher has one level
    options = ("--config.lora.rank=4", "--config.lora.alpha=8", f"--config.lora.targets={targets}")
    options += ("--config.distill.w_embedding_dim=0", "--config.sample.guidance_scale=1", "--config.train.ema_decay=0")
    for steps in (6, 12):
        assert command(tmp_path / "run", teacher, *FEW, *options, f"--config.train.steps={steps}") == 0
    assert saved_steps(tmp_path / "run") == [6, 12] and [line[0] for line in logged(tmp_path / "run")][-1] == 12
    arrays = saved(tmp_path / "run", 12)
    for name, value in arrays.items():
        assert "/lora_" in name or value.ndim == 0, "the base is in a checkpoint"
        if name.startswith("params/"):
            np.testing.assert_array_equal(value, arrays[name.replace("params/", "ema_params/", 1)])
            assert np.any(value)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lora"] == {"rank": 4, "alpha": 8.0, "targets": list(targets)}
    first, second = snapshot(tmp_path / "run" / "samples").values()
    assert first != second


@pytest.mark.slow
def test_an_lcf_run_takes_the_lcm_alone_or_with_a_pipeline(teacher, tmp_path):
    """A bare UNet with the teacher's other parts, stopped halfway; the same UNet in a pipeline, at once, no teacher."""
    lcm, one, other = make_lcm(teacher, tmp_path / "lcm"), tmp_path / "one", tmp_path / "other"
    options = (*FEW, "--config.objective=lcf", "--config.distill.w_embedding_dim=16")
    for steps in (6, 12):
        more = (f"--config.model.student={lcm / 'unet'}", f"--config.train.steps={steps}")
        assert command(one, teacher, *options, *more) == 0
    config = ConfigDict(json.loads((one / "config.json").read_text()))
    config.model.update(teacher=None, student=str(lcm))
    train.train(config, other)
    arrays = runs.check_same(one, other, 12)
    begun = load_pipeline(lcm)[1]["unet"]["conv_in"]["kernel"]
    assert (arrays["params/conv_in/kernel"] != begun).any() and (arrays["ema_params/conv_in/kernel"] != begun).any()
    assert np.abs(arrays["params/conv_in/kernel"] - begun).max() < 0.1
    assert snapshot(one / "samples") == snapshot(other / "samples") != {}


def refused(capsys, words, *args) -> None:
    """The command ends with exit code 2 and one line that has the `words`."""
    capsys.readouterr()  # printed when the models were made
    assert command(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_a_bad_teacher_is_refused_and_the_corrected_command_runs(teacher, tmp_path, capsys, monkeypatch):
    broken, workdir = Path(shutil.copytree(teacher, tmp_path / "broken")), tmp_path / "run"
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(capsys, ["unet/diffusion_pytorch_model.safetensors"], workdir, broken)

    def begun(*args, **kwargs):
        raise LcmError("the set-up has passed")

    monkeypatch.setattr(train, "Checkpoints", begun)
    refused(capsys, ["the set-up has passed"], workdir, teacher, "--config.seed=3")


def test_models_that_cannot_be_distilled(teacher, tmp_path, capsys):
    refused(capsys, ["Latent Consistency Model", "w embedding", "lcm"], tmp_path / "a", tiny.folder("lcm"))
    inpainting = tiny.build("inpainting", tmp_path / "inpainting")
    refused(capsys, ["inpainting", "9 channels"], tmp_path / "b", inpainting)
    student = f"--config.model.student={inpainting}"
    refused(capsys, [str(inpainting), "in_channels 9", "teacher 4"], tmp_path / "c", teacher, student)


def test_a_bad_key_or_value_leaves_no_workdir(teacher, tmp_path, capsys):
    refused(capsys, ["stepz", "steps"], tmp_path / "run", teacher, "--config.train.stepz=3")
    refused(capsys, ["objective", "'lcm'", "lcd"], tmp_path / "run", teacher, "--config.objective=lcm")
    assert not (tmp_path / "run").exists()


def test_resolution_and_batch_must_fit_vae_and_devices(teacher, monkeypatch):
    config = default_config()
    config.model.teacher, config.data.resolution = str(teacher), 60
    with pytest.raises(LcmError, match=r"data\.resolution = 60 .* factor 8"):
        shapes(config)
    config = runpy.run_path(str(ROOT / "configs" / "shapes_lcm.py"))["get_config"]()
    config.data.batch_size, config.train.accumulation_steps = 6, 6
    assert train.prepared(config)[1].size == 1
    devices = jax.devices() * 4
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(LcmError, match=r"data\.batch_size = 6 in 6 parts .* 4 devices; use a multiple of 24"):
        train.prepared(config)


def test_only_grids_of_large_images_are_decoded_one_at_a_time(monkeypatch):
    """16 images of SDXL at once take more than a card of 24 GB has."""

    class Stub:
        def __init__(self, *_, sliced):
            found.append(sliced)

        noise = encode = staticmethod(lambda *_: None)

    found = []
    monkeypatch.setattr(train, "Generator", Stub)
    for name in ("sd15_lcm_lora", "my_sdxl_24gb"):
        config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
        student = types.SimpleNamespace(default_sampler="lcm")
        assert train.sample_grid(config, None, student, {}, None, None) is not None
    assert found == [False, True]


def test_the_compilation_cache_also_keeps_what_a_gpus_autotuner_found(tmp_path):
    """jax has XLA put it into a folder of the cache (`jax_persistent_cache_enable_xla_caches`), from there on."""
    config = runpy.run_path(str(ROOT / "configs" / "shapes_lcm.py"))["get_config"]()
    config.compilation_cache = str(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    try:
        train.prepared(config)
        options = get_compile_options(num_replicas=1, num_partitions=1)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    folder = options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
    assert folder == f"{tmp_path}/xla_gpu_per_fusion_autotune_cache_dir"


def test_the_workdir_of_another_run_is_refused_with_both_values_and_left_alone(whole, teacher, capsys):
    before = snapshot(whole)
    different = (*IMAGES, "--config.train.learning_rate=5e-4", "--config.distill.loss=l2")
    refused(capsys, ["train.learning_rate", "0.001", "0.0005", "'huber'", "'l2'"], whole, teacher, *different)
    with train.locked(whole):
        refused(capsys, ["in use", str(whole)], whole, teacher, *IMAGES, "--config.train.steps=99")
    refused(capsys, ["config.json", "is a file"], whole / "config.json", teacher)
    assert snapshot(whole) == before


def test_a_run_resumes_only_with_the_models_and_data_it_began_with(whole, teacher, tmp_path, capsys, monkeypatch):
    """Also where they have been moved; config.json then has the new place."""
    workdir, moved = Path(shutil.copytree(whole, tmp_path / "run")), Path(shutil.copytree(teacher, tmp_path / "moved"))
    more = (*IMAGES, f"--config.train.steps={STEPS + 9}")
    before = snapshot(workdir)
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    begun = weights.read_bytes()
    weights.write_bytes(begun[:-1] + bytes([begun[-1] ^ 1]))
    words = [
        "models.json: vae was teacher",
        f"now; restore what it began with, choose another workdir, or delete {workdir}",
    ]
    refused(capsys, words, workdir, moved, *more)
    weights.write_bytes(begun)
    data = json.loads(before["data.json"])
    assert data["records"] == [[64]] and data["source 1"]["name"] == "shapes"
    tiny.write_json(workdir / "data.json", data | {"source 1": {"digest": "1", "name": "folder x"}})
    refused(capsys, ["data.json: source 1 was folder x (digest 1) when this run began"], workdir, moved, *more)
    (workdir / "data.json").write_bytes(before["data.json"])
    assert snapshot(workdir) == before

    def loop():
        raise LcmError("the loop begins")

    monkeypatch.setattr(train, "StopSignal", loop)
    assert command(workdir, moved, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: the loop begins" and len([line for line in lines if "the run goes on" in line]) == 2
    assert json.loads((workdir / "config.json").read_text())["model"]["teacher"] == str(moved)
    assert json.loads((workdir / "models.json").read_text())["vae"]["name"] == f"teacher {moved}"
    for name in ("models.json", "data.json"):  # as an older version left it
        (workdir / name).unlink()
    assert command(workdir, moved, *more) == 2
    printed = capsys.readouterr().err
    assert (
        "models.json does not record with which scheduler, student," in printed and "which records, source 1" in printed
    )
    assert (workdir / "models.json").exists()


def test_a_missing_flag_is_one_line_of_the_program(capsys):
    assert runs.run_here("lcm_jax.train", "--workdir=x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--config" in line
