"""`python -m lcm_jax.export`: what it writes, that diffusers generates the same images from it, and its refusals."""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import optax
import pytest
import tiny
import torch
from diffusers.schedulers import scheduling_lcm
from ml_collections import ConfigDict
from PIL import Image

import lcm_jax
from lcm_jax import export, pretrained, sample
from lcm_jax.distill.state import TrainState, create
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import digests, load_pipeline, load_unet, safetensors_io
from lcm_jax.run import models
from lcm_jax.run.config import default_config, resolve, to_json
from lcm_jax.runtime.checkpoints import Checkpoints
from lcm_jax.sampling import verify
from lcm_jax.sampling.generator import draw_noise

STEPS_SAVED = (3, 7)
PROMPTS = ("a red circle", "hello")
TABLE = "| steps | accuracy |\n|---|---|\n| 4 | 0.93 |\n"


def make_config(teacher, **changes) -> ConfigDict:
    config = default_config()
    config.model.teacher = teacher and str(teacher)
    config.data.source, config.data.resolution = "shapes", 64
    config.train.steps = 7
    config.distill.w_embedding_dim = 16
    config.distill.w_min, config.distill.w_max = 2.0, 8.0
    config.sample.prompts = PROMPTS
    config.update_from_flattened_dict(changes)
    return resolve(config)


def make_run(workdir: Path, teacher: Path | None, steps=STEPS_SAVED, **changes) -> dict[int, TrainState]:
    """A workdir as training leaves it. All checkpoints and their EMA have different weights, and w has an effect."""
    config = make_config(teacher, **changes)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config))
    begun = models.load(config).trainable
    states = {}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in steps:
            trees = []
            for seed in (2 * step, 2 * step + 1):
                rng = np.random.default_rng(seed)
                tree = jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), begun)  # noqa: B023
                if "cond_proj" in tree.get("time_embedding", {}):
                    tree["time_embedding"]["cond_proj"]["kernel"] *= 10.0
                trees.append(tree)
            state = create(trees[0], optax.sgd(0.1)).replace(step=np.int32(step), ema_params=trees[1])
            checkpoints.save(step, state)
            states[step] = state
    return states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, states) of a run on the tiny SD 1."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    return workdir, make_run(workdir, tiny.folder("sd1"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    (out.parent / "table.md").write_text(TABLE)
    words = [f"--workdir={run[0]}", f"--out={out}", f"--table={out.parent / 'table.md'}"]
    assert export.main(words) == 0
    return out


def kernel(state: TrainState, part: str) -> np.ndarray:
    return np.asarray(getattr(state, part)["time_embedding"]["cond_proj"]["kernel"])


def torch_kernel(unet) -> np.ndarray:
    return unet.time_embedding.cond_proj.weight.detach().numpy().T


def diffusers_images(pipe, monkeypatch, prompts, noise, size, **options) -> np.ndarray:
    """uint8 images as int [b h w 3], the scheduler's noise replaced by noise[1:] ([steps b h w c])."""
    pipe.set_progress_bar_config(disable=True)
    start, *between = (torch.from_numpy(n.transpose(0, 3, 1, 2).copy()) for n in noise)
    draws = iter(between)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda shape, **_: next(draws).reshape(shape))
    images = pipe(
        list(prompts), height=size, width=size, num_inference_steps=len(noise), latents=start, **options
    ).images
    assert next(draws, None) is None
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_diffusers_generates_the_images_of_sample(exported, tmp_path, monkeypatch):
    """The PNG files of lcm_jax.sample against LatentConsistencyModelPipeline.from_pretrained."""
    words = [f"--prompt={prompt}" for prompt in PROMPTS]
    options = ["--num_images=2", "--batch_size=4", "--seed=3", "--steps=4", "--guidance_scale=8"]
    assert sample.main([f"--model={exported}", f"--out={tmp_path}", *words, *options]) == 0
    ours = np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(tmp_path.glob("*.png"))])

    pipe = diffusers.LatentConsistencyModelPipeline.from_pretrained(exported)
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    noise = draw_noise(3, [0, 1, 0, 1], 4, (8, 8, 4))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    theirs = diffusers_images(pipe, monkeypatch, prompts, noise, 16, guidance_scale=8.0)
    assert ((theirs > 0) & (theirs < 255)).mean() > 0.5  # images, not saturation
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference}/255")
    assert difference <= 2
    other = diffusers_images(pipe, monkeypatch, prompts, noise, 16, guidance_scale=3.0)
    assert np.abs(other - theirs).max() > 8  # w has an effect


def test_verify(run, exported, tmp_path, capsys):
    out = tmp_path / "model"
    assert export.main([f"--workdir={run[0]}", f"--out={out}", "--verify"]) == 0
    output = capsys.readouterr().out
    print(output)
    pixel = re.search(r"4 images, 4 steps, guidance scale 8, .* pixel difference (\d+)/255, .* (\S+)\n", output)
    assert int(pixel[1]) <= 2 and float(pixel[2]) < 2e-3

    record = json.loads((out / pretrained.RECORD).read_text())
    tiny.write_json(out / pretrained.RECORD, record | {"timestep_scaling": 1e-3})  # ours now has other scalings
    assert export.report_difference(out, record) == 1
    assert re.search(r"(?m)^error: the images differ by \d+/255, more than 2/255", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["sd2", "sdxl"])
def test_v_prediction_and_sdxl(teacher, tmp_path, capsys):
    """v prediction; and SDXL, with two encoders, sizes and a pipeline class of its own."""
    make_run(tmp_path / "run", tiny.folder(teacher), steps=(3,), **{"distill.solver_steps": 20})
    out = tmp_path / "model"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--verify"]) == 0
    print(capsys.readouterr().out)
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["original_inference_steps"] == 20
    prediction_type = {"sd2": "v_prediction", "sdxl": "epsilon"}[teacher]
    record = json.loads((out / pretrained.RECORD).read_text())
    assert scheduler["prediction_type"] == record["prediction_type"] == prediction_type


PHASED = {"distill.map": "phased", "distill.phases": 2, "sample.steps": 2}


@pytest.mark.parametrize(
    ("teacher", "changes"),
    [
        ("sd1", {}),
        pytest.param("sd2", {"distill.solver_steps": 40}, marks=pytest.mark.slow),
        pytest.param("sdxl", {}, marks=pytest.mark.slow),
        pytest.param(
            "sd1", {"lora.rank": 4, "distill.w_embedding_dim": 0, "sample.guidance_scale": 1.0}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_phased_map_makes_the_same_images_in_diffusers(teacher, changes, tmp_path, capsys):
    """With TCDScheduler in as many steps as it has phases, also conditioned on w and as a merged LoRA; v prediction."""
    make_run(tmp_path / "run", tiny.folder(teacher), steps=(3,), **PHASED | changes)
    out, is_lora = tmp_path / "model", "lora.rank" in changes
    words = [f"--workdir={tmp_path / 'run'}", f"--out={out}", "--verify", *(["--format=merged"] if is_lora else [])]
    assert export.main(words) == 0
    output = capsys.readouterr().out
    print(output)
    assert "4 images, 2 steps" in output
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "TCDScheduler"
    assert scheduler["original_inference_steps"] == changes.get("distill.solver_steps", 50)
    plain = "StableDiffusionXLPipeline" if teacher == "sdxl" else "StableDiffusionPipeline"
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == plain
    record, card = pretrained.read_record(out), (out / "README.md").read_text()
    assert (record["map"], record["phases"]) == ("phased", 2)
    assert "A Phased Consistency Model: images in 2 steps, no fewer" in card and "num_inference_steps=2" in card
    assert (
        "each step jumps to the edge of one of 2 phases" in card and "--steps=2" in card and "LCMScheduler" not in card
    )
    if not is_lora and teacher == "sd1":  # other timesteps than those written for diffusers: the check notices
        tiny.write_json(out / pretrained.RECORD, record | {"solver_steps": 30})
        assert export.report_difference(out, record) == 1


def test_a_checkpoint_of_an_earlier_stage_has_the_phases_that_it_was_trained_for(tmp_path, capsys):
    """The run ends with 2 phases, trained from step 4 on; step 3 was trained for 4. The EMA is 0.95^3 teacher."""
    make_run(tmp_path / "run", tiny.folder("sd1"), **PHASED | {"distill.phases": 4, "distill.stages": ("2:3",)})
    for step, phases in zip(STEPS_SAVED, (4, 2), strict=True):
        out = tmp_path / f"unet {phases}"
        words = [f"--workdir={tmp_path / 'run'}", f"--out={out}", "--format=unet", f"--step={step}"]
        assert export.main(words if step == 3 else [*words, "--weights=online"]) == 0
        assert pretrained.read_record(out)["phases"] == phases
        assert f"num_inference_steps={phases}" in (out / "README.md").read_text()
        said = f"at step {step} the EMA has {0.95**step:.0%} of the initial weights" in capsys.readouterr().err
        assert said is (step == 3)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_changed_file_is_reported_when_it_is_loaded(exported, tmp_path, caplog):
    folder = shutil.copytree(exported, tmp_path / "model")
    digests.warn(folder)
    (folder / "README.md").write_text("a better card")
    digests.warn(folder)
    assert not caplog.messages
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    flip(weights, -3)
    flip(folder / "vae" / "config.json", 10)
    digests.warn(folder, ["vae"])  # which another one replaces
    assert len(caplog.messages) == 1 and str(weights) in caplog.messages[0] and "SHA-256" in caplog.messages[0]
    digests.warn(folder / "vae")
    assert len(caplog.messages) == 2 and "vae/config.json" in caplog.messages[1]
    digests.warn(tiny.folder("sd1"))  # no export
    digests.warn(tmp_path / "nowhere")
    assert len(caplog.messages) == 2


def test_a_changed_single_file_is_reported(tmp_path, caplog):
    for name, metadata, warned in (("own", {pretrained.RECORD: "{}"}, True), ("foreign", {}, False)):
        path = tmp_path / f"{name}.safetensors"
        safetensors_io.save_file(path, {"a": (300,)}, lambda _: np.ones(300, np.float32), "float32", metadata)
        with safetensors_io.open_file(path) as stored:  # as the modelspec has it: of the bytes after the header
            hashed = stored.metadata["modelspec.hash_sha256"]
        assert hashed == "0x" + hashlib.sha256(np.ones(300, np.float32).tobytes()).hexdigest()
        digests.warn(path)
        assert not caplog.messages
        flip(path, -1)
        digests.warn(path)
        assert [str(path) in message for message in caplog.messages] == [True] * warned
        caplog.clear()


def test_a_signal_says_what_is_there(run, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write", stop)
    words = [f"--workdir={run[0]}", f"--out={tmp_path / 'out'}"]
    assert export.main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; nothing was written" and not any(tmp_path.iterdir())


def test_record_and_scheduler(run, exported):
    record = json.loads((exported / pretrained.RECORD).read_text())
    digests = record.pop("sha256")
    assert pretrained.read_record(exported) == record, "digests are of a folder, no part of a model"
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert (
        digests.keys() == files - {"README.md", pretrained.RECORD}
        and "unet/diffusion_pytorch_model.safetensors" in digests
    )
    assert record == {
        "objective": "lcd",
        "w_embedding_dim": 16,
        "w_min": 2.0,
        "w_max": 8.0,
        "solver_steps": 50,
        "timestep_scaling": 10.0,
        "sigma_data": 0.5,
        "prediction_type": "epsilon",
        "teacher": str(tiny.folder("sd1")),
        "student": str(tiny.folder("sd1")),
        "step": 7,
        "weights": "ema",
        "lcm_jax": lcm_jax.__version__,
    }
    scheduler = diffusers.LCMScheduler.from_pretrained(exported, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 50 and scheduler.config.timestep_scaling == 10.0
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        copied, original = (folder / "tokenizer" / name for folder in (exported, tiny.folder("sd1")))
        assert copied.read_bytes() == original.read_bytes()


def test_model_card(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and card.count("---\n") == 2
    for words in (
        str(tiny.folder("sd1")),
        "the EMA target network after step 7 of 7",
        "| End of a step | the guided teacher's jump |",
        "32 images of 64 pixels",
        "w in [2, 8], that is `guidance_scale` 3 to 9",
        "| `train.learning_rate` | `8e-06` |",
        TABLE,
        'DiffusionPipeline.from_pretrained("model")',
        "--model=model --prompt=",
        "guidance_scale=8",
    ):
        assert words in card, words


@pytest.mark.parametrize(
    ("options", "step", "part", "dtype"),
    [
        ([], 7, "ema_params", np.float32),
        (["--step=3", "--weights=online", "--dtype=float16"], 3, "params", np.float16),
        (["--step=3", "--weights=ema", "--dtype=bfloat16"], 3, "ema_params", "bfloat16"),
    ],
)
def test_unet_format_has_the_chosen_weights(run, tmp_path, options, step, part, dtype):
    workdir, states = run
    out = tmp_path / "unet"
    assert export.main([f"--workdir={workdir}", f"--out={out}", "--format=unet", *options]) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
        pretrained.RECORD,
    }
    unet, info = diffusers.UNet2DConditionModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and unet.config.time_cond_proj_dim == 16
    wanted = kernel(states[step], part).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(torch_kernel(unet), wanted)
    module, params = load_unet(out)
    saved = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), getattr(states[step], part))
    jax.tree.map(np.testing.assert_array_equal, params, saved)
    record = json.loads((out / pretrained.RECORD).read_text())
    assert (record["step"], record["weights"]) == (step, "ema" if part == "ema_params" else "online")


def test_model_card_of_a_unet_runs(run, exported, tmp_path, monkeypatch):
    """The example of the model card, with the teacher's folder filled in, loads what the whole export is."""
    out = tmp_path / "unet"
    assert export.main([f"--workdir={run[0]}", f"--out={out}", "--format=unet"]) == 0
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    code = code.replace("folder of the teacher", str(tiny.folder("sd1"))).replace('"unet"', f'"{out}"')
    names = {}
    exec(code.split("image = ")[0], names)
    pipe, whole = names["pipe"], diffusers.DiffusionPipeline.from_pretrained(exported)
    assert type(pipe) is type(whole)
    for key in ("original_inference_steps", "timestep_scaling", "prediction_type", "beta_start", "num_train_timesteps"):
        assert pipe.scheduler.config[key] == whole.scheduler.config[key]
    for mine, other in zip(pipe.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(mine, other)


def error_of(capsys, *words) -> str:
    """The line on stderr of a program that exits with 2."""
    try:
        code = export.main(list(words))
    except SystemExit as exit:
        code = exit.code
    warnings, error = capsys.readouterr().err.rpartition("error: ")[::2]
    assert code == 2 and all(line.startswith("warning: ") for line in warnings.splitlines()), (code, warnings)
    assert error.count("\n") == 1, error
    return f"error: {error}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workdir=EMPTY"], r"config.json does not exist; give the workdir of a run"),
        (["--workdir=BROKEN"], r"config.json is not valid JSON .*restore it"),
        (["--workdir=INVALID"], r"is not a config of this lcm_jax: config.train.steps = 0: must be at least 1"),
        (["--workdir=UNTRAINED"], r"no checkpoint in .*train until the first is saved"),
        (["--step=5"], r"--step=5: no such checkpoint in .*; present: 3, 7"),
        (["--step=x"], r"argument --step: invalid int value: 'x'"),
        (["--weights=both"], r"argument --weights: invalid choice: 'both'"),
        (["--out=FULL"], r"full already exists and is not empty; choose another folder"),
        (["--table=NOWHERE"], r"--table=NOWHERE: cannot be read \(No such file or directory\)"),
        (["--verify", "--format=unet"], r"--verify generates images and --format=unet is not a pipeline; .*=pipeline"),
        (["--format=lora-peft"], r"--format=lora-peft: this run trained every weight .*use --format=pipeline or unet"),
        (["--format=merged"], r"--format=merged: this run trained every weight"),
        (["--out=mine.safetensors"], r"--out=mine.safetensors: --format=pipeline writes a folder; .*=single-file"),
        (["--format=single-file"], r"out does not end in .safetensors; choose a name that does"),
        (["--guidance_scale=8"], r"--guidance_scale=8 is folded into a single file only; use --format=single-file"),
    ],
)
def test_refusals_before_any_work(run, tmp_path, capsys, monkeypatch, options, message):
    def no_work(*_, **__):
        raise AssertionError("the teacher is loaded")

    monkeypatch.setattr(models, "load_pipeline", no_work)
    for name in ("empty", "broken", "invalid", "untrained", "full"):
        (tmp_path / name).mkdir()
    config = json.loads((run[0] / "config.json").read_text())
    config["data"] |= {"decoder": "opencv", "resize_filter": "area"}  # which need not be installed here
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "broken" / "config.json").write_text('{"seed": ')
    tiny.write_json(tmp_path / "untrained" / "config.json", config)
    config["train"]["steps"] = 0
    tiny.write_json(tmp_path / "invalid" / "config.json", config)
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("empty", "broken", "invalid", "untrained", "full"):
        options = [option.replace(f"={name.upper()}", f"={tmp_path / name}") for option in options]
    out = tmp_path / "out"
    error = error_of(capsys, f"--workdir={run[0]}", f"--out={out}", *options)
    assert re.search(message, error), error
    assert not out.exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_the_base_of_a_card_is_on_the_hub_unless_a_folder_here_has_its_name(tmp_path, monkeypatch):
    """`models/mine` names both. The front matter would link another's repository."""
    config = make_config(tiny.folder("sd1"))
    teacher = models.load_teacher(config, weights=False)
    student = models.load_student(config, *teacher)[0]
    record = student.record | {"teacher": "models/mine", "student": "models/mine", "step": 7, "weights": "ema"}
    monkeypatch.chdir(tmp_path)
    for is_here in (False, True):
        card = export.model_card(config.to_dict(), record, student, "unet", "unet", None)
        assert ("base_model: models/mine\n" in card) is ('from_pretrained("models/mine"' in card) is not is_here
        (tmp_path / "models" / "mine").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(("scale", "is_trained"), [("1.57", True), ("1.58", False), ("1.56", False), ("nan", False)])
def test_the_only_scale_of_a_run_can_be_folded(tmp_path, scale, is_trained):
    """As it is typed: 0.57 + 1.0 is 1.5699999999999998. Others are refused before models are read."""
    config = make_config("teacher", **{"distill.w_min": 0.57, "distill.w_max": 0.57})
    args = export.parser().parse_args(["--workdir=x", "--out=x.safetensors", f"--guidance_scale={scale}"])
    with contextlib.nullcontext() if is_trained else pytest.raises(LcmError, match="choose 1.57 to 1.57"):
        export.check_options(args, config, "single-file")


def test_verify_without_torch(run, tmp_path, capsys, monkeypatch):
    find = verify.importlib.util.find_spec
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    error = error_of(capsys, f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", "--verify")
    assert error == "error: --verify needs torch; pip install lcm_jax[torch], or leave --verify out\n"


def test_images_that_are_not_finite_are_no_verification(monkeypatch):
    """Of a run that diverged both programs give black images, which are equal."""
    model = lcm_jax.load(tiny.folder("micro lcm"))
    monkeypatch.setattr(model, "generate", lambda *_: np.full((2, 16, 16, 3), np.nan, np.float32))
    monkeypatch.setattr(verify, "load", lambda *_, **__: model)
    with pytest.raises(LcmError, match="out: 2 of 2 images are not finite, and would be black; check whether the run"):
        verify.compare("out", ["a", "b"])


def test_missing_or_other_teacher_is_refused(run, tmp_path, capsys):
    workdir = Path(shutil.copytree(run[0], tmp_path / "run"))
    for teacher, message in (
        (tiny.folder("sd2"), r"is not of the student that its config.json describes .*proj_in/kernel"),
        (tmp_path / "moved" / "teacher", r"moved/teacher does not exist"),
    ):
        (workdir / "config.json").write_text(to_json(make_config(teacher)))
        assert re.search(message, error_of(capsys, f"--workdir={workdir}", f"--out={tmp_path / 'out'}"))
        assert not (tmp_path / "out").exists()


def test_models_that_changed_since_the_run_began_are_refused(run, tmp_path, capsys):
    workdir = Path(shutil.copytree(run[0], tmp_path / "run"))
    entry = {"digest": "12", "name": "teacher owner/name@1a"}
    tiny.write_json(workdir / "models.json", {"text_encoder": entry})
    error = error_of(capsys, f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    assert "models.json: text_encoder was teacher owner/name@1a (digest 12) when this run began" in error
    assert not (tmp_path / "out").exists()


def test_full_disk_is_reported_before_writing(run, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = error_of(capsys, f"--workdir={run[0]}", f"--out={tmp_path / 'out'}")
    assert re.search(r"out needs \d+ bytes, 1000 are free; make room", error)
    assert not any(tmp_path.iterdir())


def test_default_guidance_scale():
    lcm, teacher = (load_pipeline(tiny.folder(name), weights=False)[0] for name in ("lcm", "sd1"))
    ranges = (
        ({"w_min": 2.0, "w_max": 14.0}, 8.0),
        ({"w_min": 0.0, "w_max": 4.0}, 3.0),
        ({}, 8.0),
        ({"w_min": 9}, 10.0),
    )
    for record, scale in ranges:
        assert dataclasses.replace(lcm, record=record).default_guidance_scale() == scale
    distilled = dataclasses.replace(teacher, record={"w_min": 2.0, "w_max": 14.0})
    assert distilled.default_guidance_scale() == distilled.default_guidance_scale("euler") == 1.0
    assert teacher.default_guidance_scale("ddim") == 8.0
