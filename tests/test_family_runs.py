"""The whole family, at toy widths, through a step of `train`, `lcm_jax.export` and torch diffusers.

Random weights in the structure of each architecture. One large step, because the w embedding starts at zero and has to
matter in the comparison. And docs/my_model.md, by its commands: a fine-tune in one file becomes an LCM-LoRA.
"""

import functools
import re
from pathlib import Path

import diffusers
import jax
import numpy as np
import parity
import pytest
import safetensors
import tiny_family
import torch
import training_processes as runs
from PIL import Image
from test_export import diffusers_images

from lcm_jax import export, sample, train
from lcm_jax.data import shapes
from lcm_jax.diffusion import denoiser, guidance
from lcm_jax.pretrained import load_pipeline, names, save_single_file
from lcm_jax.run import config as config_lib
from lcm_jax.run.models import load_student, load_teacher
from lcm_jax.sampling.generator import draw_noise

PROMPTS = ("a red circle", "hello")
W = np.array([3.0, 11.5], np.float32)
pytestmark = pytest.mark.slow  # test_configs.py traces these steps, test_export*.py exports them


def run(teacher: Path, workdir: Path, **changes) -> tuple[config_lib.ConfigDict, dict]:
    """(config, weights of the target) of a run of one step."""
    config = config_lib.default_config()
    config.model.teacher = str(teacher)
    config.data.source, config.data.resolution = "shapes", 64
    config.data.batch_size, config.data.num_examples = 2, 4
    config.train.steps, config.train.learning_rate, config.train.ema_decay = 1, 0.01, 0.5
    config.distill.w_embedding_dim = tiny_family.W_DIM
    config.log.every, config.sample.every = 1, 0
    config.update_from_flattened_dict(changes)
    state = train.train(config, workdir)
    return config_lib.resolve(config), jax.device_get(state.ema_params)


def exported(workdir: Path, out: Path, *options: str) -> Path:
    assert export.main([f"--workdir={workdir}", f"--out={out}", *options]) == 0
    return out


def inputs(unet) -> tuple[np.ndarray, np.ndarray, dict]:
    """(z [2 8 8 4], t, conditioning) of a UNet of the family."""
    rng = np.random.default_rng(4)
    is_xl = unet.addition_embed_type is not None
    cond = {"encoder_hidden_states": rng.standard_normal((2, 77, 64 if is_xl else 32), np.float32)}
    if is_xl:
        ids = np.array([[1024, 768, 0, 12, 1024, 1024], [512, 513, 3, 0, 640, 333]], np.float32)
        cond |= {"text_embeds": rng.standard_normal((2, 32), np.float32), "time_ids": ids}
    return rng.standard_normal((2, 8, 8, 4), np.float32), np.array([999, 259], np.int32), cond


def torch_output(unet, z, t, cond, w) -> np.ndarray:
    """diffusers' output [2 8 8 4]; w: None if the UNet has no w embedding."""
    cond = {key: torch.from_numpy(value) for key, value in cond.items()}
    embedding = None if w is None else torch.from_numpy(np.array(guidance.w_embedding(w, tiny_family.W_DIM)))
    with torch.no_grad():
        out = unet(
            torch.from_numpy(z).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            cond.pop("encoder_hidden_states"),
            timestep_cond=embedding,
            added_cond_kwargs=cond or None,
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", tiny_family.FAMILY)
def test_trained_and_exported_it_is_the_same_model_in_diffusers(name, tmp_path):
    config, weights = run(tiny_family.folder(name), tmp_path / "run")
    out = exported(tmp_path / "run", tmp_path / "out")
    loaded, info = diffusers.UNet2DConditionModel.from_pretrained(out / "unet", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.time_cond_proj_dim == tiny_family.W_DIM
    student = load_student(config, *load_teacher(config))[0].unet
    begun = diffusers.UNet2DConditionModel.from_pretrained(tiny_family.folder(name) / "unet")
    assert len(loaded.state_dict()) == len(begun.state_dict()) + 1 == len(names.torch_table(student))

    z, t, cond = inputs(student)
    ours = jax.jit(functools.partial(denoiser.student_output, student))
    want = torch_output(loaded.eval(), z, t, cond, W)
    assert 0.1 < want.std() < 30
    got = ours(weights, z, t, cond, W)
    print(f"{name}: largest difference {np.abs(got - want).max():.1e}, outputs of {want.std():.2f}")
    parity.close(got, want, rtol=0, atol=2e-5 * max(1.0, want.std()))
    assert np.abs(ours(weights, z, t, cond, W + 1.0) - want).max() > 1e-3  # w counts
    assert np.abs(torch_output(begun.eval(), z, t, cond, None) - want).max() > 1e-2  # the step counts

    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    is_xl = student.addition_embed_type is not None
    assert type(pipe).__name__ == ("StableDiffusionXLPipeline" if is_xl else "LatentConsistencyModelPipeline")
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    assert pipe.scheduler.config.prediction_type == tiny_family.FAMILY[name][1]


def our_images(out: Path, *options: str) -> np.ndarray:
    """The PNG files of `lcm_jax.sample`: two prompts, two steps; int [2 64 64 3]."""
    words = [*(f"--prompt={prompt}" for prompt in PROMPTS), "--num_images=1", "--batch_size=2", "--steps=2", "--seed=3"]
    assert sample.main([f"--out={out}", *words, *options]) == 0
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))])


def check_images(pipe, ours: np.ndarray, monkeypatch, guidance_scale: float) -> None:
    noise = draw_noise(3, [0, 0], 2, (8, 8, 4))
    theirs = diffusers_images(pipe, monkeypatch, PROMPTS, noise, 64, guidance_scale=guidance_scale)
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference}/255")
    assert ((theirs > 0) & (theirs < 255)).mean() > 0.5  # images, not saturation
    assert difference <= 2


def test_sdxl_generates_the_same_images_in_diffusers(tmp_path, monkeypatch):
    run(tiny_family.folder("sdxl", short=True), tmp_path / "run")
    out = exported(tmp_path / "run", tmp_path / "out")
    ours = our_images(tmp_path / "images", f"--model={out}", "--guidance_scale=8")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    check_images(pipe, ours, monkeypatch, 8.0)


def test_a_student_without_w_as_a_bare_unet_beside_another_vae(tmp_path, monkeypatch):
    """As with diffengine's results: their UNet, the half-precision VAE, the teacher's pipeline, LCMScheduler."""
    changes = {"distill.w_embedding_dim": 0, "sample.guidance_scale": 1.0, "model.vae": str(tiny_family.vae_folder())}
    base, vae = tiny_family.folder("sdxl", short=True), tiny_family.vae_folder()
    run(base, tmp_path / "run", **changes)
    out = exported(tmp_path / "run", tmp_path / "unet", "--format=unet")
    unet, info = diffusers.UNet2DConditionModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and unet.config.time_cond_proj_dim is None

    options = [f"--model={base}", f"--unet={out}", f"--vae={vae}", "--guidance_scale=1"]
    ours = our_images(tmp_path / "images", *options)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        base, unet=unet, vae=diffusers.AutoencoderKL.from_pretrained(vae)
    )
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    check_images(pipe, ours, monkeypatch, 1.0)
    own = our_images(tmp_path / "own", *options[:2], options[3])
    assert np.abs(own - ours).max() > 8  # the VAE counts


# Config -> folder whose model the file holds, folder that is given for its tokenizers, keys of the file.
MINE = {
    "my_sd15_24gb": (functools.partial(tiny_family.folder, "sd15", short=True), None, set()),
    "my_sdxl_24gb": (functools.partial(tiny_family.folder, "sdxl", short=True), None, set()),
    "illustrious_lcm_lora": (functools.partial(tiny_family.folder, "sdxl", short=True), None, set()),
    "noobai_vpred_lcm_lora": (  # the folder says epsilon: the keys decide
        tiny_family.zero_snr_folder,
        functools.partial(tiny_family.folder, "sdxl", short=True),
        {"v_pred", "ztsnr"},
    ),
}


def program(name: str, config: str, *options: object) -> None:
    runs.ended(runs.start(*options, program=("-m", f"lcm_jax.{name}", f"--config=configs/{config}.py")))


@pytest.mark.parametrize(("config", "data"), [*((name, "prompts") for name in MINE), ("my_sd15_24gb", "images")])
def test_a_fine_tune_in_one_file_becomes_a_lora_for_diffusers(config, data, tmp_path, monkeypatch):
    make, tokenizers, keys = MINE[config]
    folder, lora = make(), tmp_path / "lora"
    others = tokenizers() if tokenizers else folder
    model = save_single_file(*load_pipeline(folder), tmp_path / "model.safetensors", dtype=np.float32)
    with safetensors.safe_open(model, "np") as file:
        assert {"v_pred", "ztsnr"} & set(file.keys()) == keys

    of_model = f"--config.model.teacher={model}", f"--config.model.config={others}", "--config.data.resolution=64"
    if data == "prompts":
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        made = f"--prompts={tmp_path / 'prompts.txt'}", "--variants=2", "--steps=4", "--batch_size=2"
        program("precompute", config, "--what=teacher", *of_model, *made, f"--out={tmp_path / 'cache'}")
        where = "--config.data.source=latents", f"--config.data.path={tmp_path / 'cache'}"
    else:
        for number in range(4):
            image, caption, *_ = shapes.example(number, "train")
            Image.fromarray(image).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(caption)
        where = (f"--config.data.path={tmp_path}",)
    short = "--config.train.steps=2", "--config.train.learning_rate=0.01", "--config.log.every=1"
    workdir = f"--workdir={tmp_path / 'run'}"
    program(
        "train", config, *of_model, *where, *short, "--config.data.batch_size=3", "--config.sample.every=0", workdir
    )
    exported(tmp_path / "run", lora)

    ours = our_images(
        tmp_path / "images", f"--model={model}", f"--model_config={others}", f"--lora={lora}", "--guidance_scale=1"
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    is_zero = pipe.scheduler.alphas_cumprod[-1] < 1e-6
    assert (pipe.scheduler.config.prediction_type == "v_prediction") == is_zero == ("ztsnr" in keys)
    card = (lora / "README.md").read_text()
    noise = ', prediction_type="v_prediction", rescale_betas_zero_snr=True)' if keys else ', prediction_type="epsilon")'
    assert '.from_single_file("file of the teacher")\n' in card and noise in card
    alone = diffusers_images(pipe, monkeypatch, PROMPTS, draw_noise(3, [0, 0], 2, (8, 8, 4)), 64, guidance_scale=1.0)
    pipe.load_lora_weights(lora)
    check_images(pipe, ours, monkeypatch, 1.0)
    assert np.abs(ours - alone).max() > 8  # the LoRA counts
    if config == "my_sd15_24gb":  # diffusers reads no SDXL file of toy width
        code = re.search(r"```python\n(.*?)image = ", card, re.S)[1].replace('"lora"', f'"{lora}"')
        exec(code.replace('"file of the teacher"', f'"{model}", config="{folder}"'), names := {})
        check_images(names["pipe"], ours, monkeypatch, 1.0)
