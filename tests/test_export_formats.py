"""`python -m lcm_jax.export`: LoRA files, merged pipelines, single files, students without w embedding, LCF runs.

Workdirs are as training leaves them; test_train.py exports those of real runs.
"""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors
import tiny
from test_export import diffusers_images, error_of, make_run
from test_sample import arrays, generate

from lcm_jax import export, pretrained
from lcm_jax.models import lora
from lcm_jax.pretrained import digests, lora_files, lora_keys
from lcm_jax.sampling.generator import draw_noise

PROMPT = "a small red circle"
SEED, STEPS = 3, 4
OPTIONS = (f"--seed={SEED}", f"--steps={STEPS}", "--num_images=4", "--batch_size=4")
TINY_RUN = {"distill.w_embedding_dim": 0, "sample.guidance_scale": 1.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("deep teacher", tmp_path_factory.mktemp("formats") / "teacher")


@pytest.fixture(scope="module")
def lora_run(teacher, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("formats") / "run"
    changes = {"lora.rank": 4, "lora.alpha": 8.0, "train.steps": 40, "train.ema_decay": 0.0}
    make_run(workdir, teacher, steps=(40,), **TINY_RUN, **changes)
    return workdir


@pytest.fixture(scope="module")
def exports(lora_run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for form in ("lora-kohya", "lora-peft", "merged", "single-file"):
        out = folder / (form + (".safetensors" if form == "single-file" else ""))
        words = [] if form == "lora-kohya" else [f"--format={form}"]  # of a LoRA run it is the default
        assert export.main([f"--workdir={lora_run}", f"--out={out}", *words]) == 0
    return {path.stem: path for path in folder.iterdir() if path.suffix != ".md"}


@pytest.fixture(scope="module")
def ours(teacher, exports, tmp_path_factory) -> dict[str, np.ndarray]:
    """Images of `lcm_jax.sample` with the LoRA's files, with the merged models, and with the teacher alone."""
    sources = {
        "lora-kohya": (teacher, f"--lora={exports['lora-kohya']}"),
        "lora-peft": (teacher, f"--lora={exports['lora-peft'] / lora_files.FILE_NAME}:1.0"),
        "merged": (exports["merged"],),
        "single-file": (exports["single-file"], f"--model_config={teacher}"),
        "alone": (teacher,),
    }
    out = tmp_path_factory.mktemp("images")
    return {
        form: arrays(generate(model, out / form, *words, *OPTIONS, prompt=PROMPT))
        for form, (model, *words) in sources.items()
    }


def theirs(pipe, monkeypatch, size=64) -> np.ndarray:
    """The four images by diffusers, of `size` pixels, from latents of 8 x 8."""
    noise = draw_noise(SEED, range(4), STEPS, (8, 8, 4))
    return diffusers_images(pipe, monkeypatch, [PROMPT] * 4, noise, size, guidance_scale=1.0)


@pytest.mark.parametrize("form", ["lora-kohya", "lora-peft", "merged"])
def test_diffusers_generates_the_images_of_sample(form, teacher, exports, ours, monkeypatch):
    if form == "merged":
        pipe = diffusers.DiffusionPipeline.from_pretrained(exports[form])
        assert type(pipe.scheduler) is diffusers.LCMScheduler and type(pipe) is diffusers.StableDiffusionPipeline
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(teacher)
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(exports[form])
    images = theirs(pipe, monkeypatch)
    assert ((images > 0) & (images < 255)).mean() > 0.5  # images, not saturation
    difference = np.abs(ours[form] - images).max()
    print(f"{form}: largest difference {difference}/255")
    assert difference <= 2


def test_all_formats_give_the_same_images_but_not_the_teachers(ours):
    for form in ("lora-peft", "merged", "single-file"):
        assert np.abs(ours[form] - ours["lora-kohya"]).max() <= 2, form
    change = np.abs(ours["alone"] - ours["lora-kohya"]).max()
    print(f"the LoRA changes images by up to {change}/255")
    assert change > 8


def header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="np") as handle:
        return handle.metadata()


def test_lora_folder(lora_run, exports, teacher):
    trained = json.loads((lora_run / "config.json").read_text())
    unet = pretrained.load_unet(teacher)[0]
    for form in ("lora-kohya", "lora-peft"):
        folder = exports[form]
        assert {path.name for path in folder.iterdir()} == {lora_files.FILE_NAME, "README.md", pretrained.RECORD}
        record = pretrained.read_record(folder)
        assert record == pretrained.read_record(folder / lora_files.FILE_NAME), "a file alone has the same record"
        wanted = {
            "objective": "lcd",
            "w_embedding_dim": 0,
            "solver_steps": 50,
            "step": 40,
            "teacher": str(teacher),
            "lora": {"rank": 4, "alpha": 8.0, "targets": list(lora.DEFAULT_TARGETS)},
        }
        assert wanted.items() <= record.items() and trained["lora"] == record["lora"]
        read = lora_files.read_lora(folder, {"unet": unet}).parts["unet"]
        layers = [name for name in lora_keys.layers(unet) if name.endswith(lora.DEFAULT_TARGETS)]
        assert len(read) == len(layers) > 20
        assert {(one.rank, one.alpha) for one in read.values()} == {(4, 8.0)}
    peft_card = (exports["lora-peft"] / "README.md").read_text()
    assert "export with `--format=lora-kohya`" in peft_card and "ComfyUI: half a LoRA" in peft_card
    headers = {form: header(exports[form] / lora_files.FILE_NAME) for form in ("lora-kohya", "lora-peft")}
    assert "lora_adapter_metadata" in headers["lora-peft"]
    assert {one["ss_base_model_version"] for one in headers.values()} == {"sd_v1"}
    with safetensors.safe_open(exports["lora-kohya"] / lora_files.FILE_NAME, framework="np") as handle:
        keys = list(handle.keys())
        assert len(keys) == 3 * len(layers) and all(key.startswith("lora_unet_") for key in keys)
        assert {str(handle.get_tensor(key).dtype) for key in keys} == {"float16"}


@pytest.mark.parametrize("form", ["lora-kohya", pytest.param("lora-peft", marks=pytest.mark.slow)])
def test_model_card_of_a_lora_runs(form, teacher, exports, monkeypatch, ours):
    card = (exports[form] / "README.md").read_text()
    assert "LoRA of rank 4, alpha 8" in card and "- lora\n" in card and "guidance_scale=1" in card
    assert (f"<lora:{form}:1>" in card and "models/loras" in card) == (form == "lora-kohya")
    assert f"--model={teacher} --lora={form} --prompt" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = code.replace("folder of the teacher", str(teacher)).replace(f'"{form}"', f'"{exports[form]}"')
    names = {}
    exec(code.split("image = ")[0], names)
    assert np.abs(theirs(names["pipe"], monkeypatch) - ours[form]).max() <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format=pipeline"], r"--format=pipeline: this is a LoRA run \(config.lora.rank = 4\).*use --format=merged"),
        (["--format=unet"], r"--format=unet: this is a LoRA run .*lora-kohya, lora-peft"),
        (["--verify"], r"--format=lora-kohya is not a pipeline; use --format=merged"),
        (["--format=single-file", "--guidance_scale=8"], r"no w embedding to fold; leave it out"),
    ],
)
def test_refusals_of_a_lora_run(lora_run, tmp_path, capsys, options, message):
    suffix = ".safetensors" if "--format=single-file" in options else ""
    assert re.search(message, error_of(capsys, f"--workdir={lora_run}", f"--out={tmp_path / 'out'}{suffix}", *options))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["lora-kohya", "merged", "single-file"])
def test_failed_write_leaves_nothing(form, lora_run, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("rename", "fsync"):
        monkeypatch.setattr(f"os.{name}", fail)
    out = tmp_path / ("out.safetensors" if form == "single-file" else "out")
    assert "No space left" in error_of(capsys, f"--workdir={lora_run}", f"--out={out}", f"--format={form}")
    assert not any(tmp_path.iterdir())


def test_every_format_has_digests(exports, tmp_path, caplog):
    for source in (exports["merged"], exports["single-file"], *exports["lora-kohya"].glob("*.safetensors")):
        digests.warn(source)
        copy = tmp_path / source.name
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        damaged = next(copy.glob("unet/*.safetensors")) if copy.is_dir() else copy
        with damaged.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(bytes([damaged.read_bytes()[-1] ^ 1]))
        assert not caplog.messages
        digests.warn(copy)
        assert [str(damaged) in message for message in caplog.messages] == [True]
        caplog.clear()


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_student_without_w_is_a_plain_pipeline(name, tmp_path, capsys):
    make_run(tmp_path / "run", tiny.folder(name), steps=(3,), **TINY_RUN)
    out = tmp_path / "model"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--verify"]) == 0
    output = capsys.readouterr().out
    print(output)
    assert "guidance scale 1, " in output
    index = json.loads((out / "model_index.json").read_text())
    kind = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[name]
    assert index["_class_name"] == kind and index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert pretrained.read_record(out)["w_embedding_dim"] == 0
    card = (out / "README.md").read_text()
    assert "Guidance is distilled in" in card and "guidance_scale=1)" in card


@pytest.mark.slow
def test_model_card_of_an_sdxl_unet_runs(tmp_path, monkeypatch):
    """As in diffengine: our UNet folder, another VAE, the base pipeline, LCMScheduler; and the same in lcm_jax."""
    make_run(tmp_path / "run", tiny.folder("sdxl"), steps=(3,), **TINY_RUN)
    out = tmp_path / "unet"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--format=unet"]) == 0
    card = (out / "README.md").read_text()
    assert "--unet=unet --vae=madebyollin/sdxl-vae-fp16-fix" in card
    vae = diffusers.AutoencoderKL(**tiny.VAES["sdxl"], force_upcast=False)
    tiny.randomise(vae, 42).save_pretrained(tmp_path / "vae")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].split("image = ")[0]
    vae = "madebyollin/sdxl-vae-fp16-fix"
    for name, path in {"folder of the teacher": tiny.folder("sdxl"), "unet": out, vae: tmp_path / "vae"}.items():
        code = code.replace(f'"{name}"', f'"{path}"')
    names = {}
    exec(code.replace("torch.float16", "torch.float32"), names)  # half precision is for accelerators
    assert type(names["pipe"]) is diffusers.StableDiffusionXLPipeline
    options = (f"--unet={out}", f"--vae={tmp_path / 'vae'}", *OPTIONS)
    images = arrays(generate(tiny.folder("sdxl"), tmp_path / "out", *options, prompt=PROMPT))
    difference = np.abs(images - theirs(names["pipe"], monkeypatch, 16)).max()
    print(f"largest difference {difference}/255")
    assert difference <= 2


def test_single_file_with_and_without_w(tmp_path, capsys, monkeypatch):
    folder = tiny.folder("sd1")
    make_run(tmp_path / "run", folder, steps=(3,))
    word = f"--workdir={tmp_path / 'run'}"
    assert export.main([word, f"--out={tmp_path / 'whole'}"]) == 0
    single = ["--format=single-file", "--dtype=float32"]
    assert export.main([word, f"--out={tmp_path / 'w.safetensors'}", *single]) == 0
    assert export.main([word, f"--out={tmp_path / 'folded.safetensors'}", *single, "--guidance_scale=5"]) == 0
    capsys.readouterr()
    assert "choose 3 to 9" in error_of(
        capsys, word, f"--out={tmp_path / 'x.safetensors'}", *single, "--guidance_scale=2"
    )
    kept, folded = (pretrained.read_record(tmp_path / f"{name}.safetensors") for name in ("w", "folded"))
    assert kept == pretrained.read_record(tmp_path / "whole")
    assert folded == kept | {"w_embedding_dim": 0, "guidance_scale": 5.0}
    assert "do not know the w embedding" in (tmp_path / "w.md").read_text()
    card = (tmp_path / "folded.md").read_text()
    assert "models/checkpoints" in card and "`guidance_scale` 5 folded in" in card
    assert "node `ModelSamplingDiscrete` with `lcm`" in card and 'prediction_type="epsilon")' in card
    assert "stable-diffusion.cpp and InvokeAI do not take it" in card  # the tiny UNet is none of SD 1.x

    config = f"--model_config={folder}"
    whole = arrays(generate(tmp_path / "whole", tmp_path / "a", "--guidance_scale=5", *OPTIONS, prompt=PROMPT))
    with_w = generate(tmp_path / "w.safetensors", tmp_path / "b", config, "--guidance_scale=5", *OPTIONS, prompt=PROMPT)
    without = generate(tmp_path / "folded.safetensors", tmp_path / "c", config, *OPTIONS, prompt=PROMPT)
    assert np.abs(arrays(with_w) - whole).max() <= 1 and np.abs(arrays(without) - whole).max() <= 1
    assert without["0000_0000.png"].text["guidance_scale"] == "1.0" and not capsys.readouterr().err

    code = re.search(r"```python\n(.*?)```", card, re.S)[1].split("image = ")[0]
    code = code.replace('"folded.safetensors"', f'"{tmp_path / "folded.safetensors"}", config="{folder}"')
    names = {}
    exec(code, names)
    difference = np.abs(arrays(without) - theirs(names["pipe"], monkeypatch, 16)).max()
    print(f"largest difference {difference}/255")
    assert difference <= 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_lcf_runs(rank, tmp_path, capsys):
    """No teacher; the student is an LCM with w embedding, trained whole or by adapters."""
    lcm = tiny.copy("lcm", tmp_path / "lcm")
    changes = {"objective": "lcf", "model.student": str(lcm), "lora.rank": rank, "lora.alpha": 4.0}
    make_run(tmp_path / "run", None, steps=(3,), **changes)
    out, form = tmp_path / "model", "merged" if rank else "pipeline"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", f"--format={form}", "--verify"]) == 0
    output = capsys.readouterr().out
    print(output)
    assert "guidance scale 8, " in output
    record = pretrained.read_record(out)
    wanted = {"objective": "lcf", "teacher": None, "student": str(lcm), "w_embedding_dim": 16, "w_max": 8.0}
    assert wanted.items() <= record.items() and ("lora" in record) == bool(rank)
    card = (out / "README.md").read_text()
    assert "latent consistency fine-tuning" in card and f"| Fine-tuned | `{lcm}`" in card and "None" not in card
