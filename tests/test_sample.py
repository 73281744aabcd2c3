"""`python -m lcm_jax.sample`: files, what a picture depends on, errors, and the baselines against torch diffusers."""

import contextlib
import dataclasses
import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file, save_file

import lcm_jax
from lcm_jax import pretrained, sample
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling.generator import Generator, draw_noise
from lcm_jax.sampling.load import load_with_loras
from lcm_jax.sampling.png import grid
from lcm_jax.sampling.request import make_plan, make_request, warnings

RECORD = {"w_min": 2.0, "w_max": 8.0, "solver_steps": 20, "timestep_scaling": 10.0, "sigma_data": 0.5}
PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def lcm(tmp_path_factory) -> Path:
    """An LCM's folder with the record of its distillation."""
    folder = tiny.copy("micro lcm", tmp_path_factory.mktemp("sample") / "lcm")
    tiny.write_json(folder / pretrained.RECORD, RECORD)
    return folder


def draw(model, out, *options, prompt=PROMPT) -> dict[str, Image.Image]:
    """Runs the program; its pictures by name."""
    words = [f"--prompt={prompt}"] if prompt else []
    assert sample.main([f"--model={model}", f"--out={out}", *words, *options]) == 0
    return {path.name: Image.open(path) for path in sorted(Path(out).glob("*.png"))}


def arrays(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture).astype(int) for picture in pictures.values()])


@pytest.fixture(scope="module")
def three(lcm, tmp_path_factory) -> dict[str, Image.Image]:
    return draw(lcm, tmp_path_factory.mktemp("out"), "--num_images=3", "--batch_size=2", "--seed=5", "--steps=3")


def test_pictures_carry_prompt_seed_and_settings(three, lcm):
    assert list(three) == ["0000_0000.png", "0000_0001.png", "0000_0002.png"]
    for i, picture in enumerate(three.values()):
        assert (picture.mode, picture.size) == ("RGB", (16, 16))
        assert picture.text == {
            "prompt": PROMPT,
            "image": str(i),
            "model": str(lcm),
            "sampler": "lcm",
            "steps": "3",
            "guidance_scale": "8.0",
            "seed": "5",
            "size": "16x16",
            "dtype": "float32",
        }


def test_a_picture_depends_on_its_number_alone(three, lcm, tmp_path):
    seen = arrays(three)
    assert len(np.unique(seen.reshape(3, -1), axis=0)) == 3
    options = ("--seed=5", "--steps=3")
    one = draw(lcm, tmp_path / "one", "--num_images=1", "--batch_size=2", *options)
    np.testing.assert_array_equal(arrays(one)[0], seen[0])
    alone = draw(lcm, tmp_path / "alone", "--num_images=3", "--batch_size=1", *options)
    assert np.abs(arrays(alone) - seen).max() <= 1  # another program: sums may round differently
    other = draw(lcm, tmp_path / "other", "--num_images=1", "--batch_size=2", "--seed=6", "--steps=3")
    assert np.abs(arrays(other)[0] - seen[0]).max() > 8


def test_the_first_noise_is_the_same_for_every_number_of_steps():
    few, many = (draw_noise(3, [4, 9], steps, (2, 3, 4)) for steps in (1, 4))
    np.testing.assert_array_equal(few, many[:1])
    np.testing.assert_array_equal(draw_noise(3, [9], 4, (2, 3, 4))[:, 0], many[:, 1])
    assert abs(draw_noise(0, range(8), 4, (16, 16, 4)).std() - 1) < 0.02


def test_prompts_from_a_file_come_after_those_of_the_command_line(three, lcm, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"\n  a blue square \n\n{PROMPT}\n", encoding="utf-8")
    options = (f"--prompts={tmp_path / 'prompts.txt'}", "--num_images=1", "--batch_size=2", "--seed=5", "--steps=3")
    pictures = draw(lcm, tmp_path / "out", *options, prompt="große Kreise 圆")
    assert [p.text["prompt"] for p in pictures.values()] == ["große Kreise 圆", "a blue square", PROMPT]
    assert list(pictures) == ["0000_0000.png", "0001_0000.png", "0002_0000.png"]
    np.testing.assert_array_equal(arrays(pictures)[2], arrays(three)[0])
    assert np.abs(arrays(pictures)[1] - arrays(three)[0]).max() > 1


def test_unet_and_vae_are_exchanged(three, lcm, tmp_path, capsys):
    """A plain SD with an LCM's UNet folder, record beside it, draws what that LCM draws."""
    unet = shutil.copytree(lcm / "unet", tmp_path / "unet")
    shutil.copy(lcm / pretrained.RECORD, unet)
    options = ("--num_images=1", "--batch_size=2", "--seed=5", "--steps=3")
    pictures = draw(tiny.folder("sd1"), tmp_path / "out", f"--unet={unet}", *options)
    np.testing.assert_array_equal(arrays(pictures)[0], arrays(three)[0])
    assert pictures["0000_0000.png"].text["unet"] == str(unet)

    vae = tmp_path / "vae"
    other = tiny.randomise(type(tiny.torch_vae())(**tiny.VAE), 99)
    other.save_pretrained(vae)
    pictures = draw(lcm, tmp_path / "other", f"--vae={vae}", *options)
    pipeline, params = load_with_loras(str(lcm), vae=str(vae))
    assert pipeline.record == RECORD
    want = other.decoder.conv_out.bias.numpy()
    np.testing.assert_array_equal(params["vae"]["decoder"]["conv_out"]["bias"], want)
    assert np.abs(arrays(pictures)[0] - arrays(three)[0]).max() > 8


@pytest.mark.parametrize(("guidance_scale", "warned"), [(3, False), (9, False), (2.9, True), (9.5, True)])
def test_guidance_outside_the_record_is_warned_of(lcm, guidance_scale, warned):
    pipeline, _ = load_with_loras(str(lcm))
    found = warnings(pipeline, make_request(pipeline, guidance_scale=guidance_scale))
    assert len(found) == warned
    assert not warned or "3 to 9" in found[0] and f"{guidance_scale:g}" in found[0]
    unrecorded = dataclasses.replace(pipeline, record={})
    assert warnings(unrecorded, make_request(unrecorded, guidance_scale=guidance_scale)) == []


def test_the_warning_is_one_line_and_the_picture_comes_all_the_same(lcm, tmp_path, capsys):
    options = ("--guidance_scale=20", "--num_images=1", "--batch_size=2", "--seed=5", "--steps=3")
    assert len(draw(lcm, tmp_path, *options)) == 1
    assert capsys.readouterr().err == (
        "warning: guidance scale 20 is outside 3 to 9, the range this model was distilled on\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt=a", "--steps=0"], r"--steps=0: out of range; choose 1 to 50"),
        (["--prompt=a", "--steps=51"], r"--steps=51: out of range; choose 1 to 50"),
        (["--prompt=a", "--steps=21"], r"--steps=21: out of range; choose 1 to 20"),  # the record's solver steps
        (["--prompt=a", "--steps=two"], r"argument --steps: invalid int value: 'two'"),
        (["--prompt=a", "--stepz=4"], r"unrecognized arguments: --stepz=4"),
        (["--prompt=a", "--sampler=euler"], r"argument --sampler: invalid choice: 'euler'"),
        (["--prompt=a", "--height=17"], r"--height=17: not a multiple of the VAE's factor 2"),
        (["--prompt=a", "--width=0"], r"--width=0: not a multiple of the VAE's factor 2"),
        (["--prompt=a", "--guidance_scale=0.5"], r"--guidance_scale=0.5: .*use 1 or more"),
        (["--prompt=a", "--guidance_scale=nan"], r"--guidance_scale=nan: .*use 1 or more"),
        (["--prompt=a", "--seed=-1"], r"--seed=-1: out of range"),
        (["--prompt=a", "--num_images=0"], r"--num_images=0: must be at least 1"),
        ([], r"no prompt; give --prompt"),
        (["--prompts=NOWHERE"], r"--prompts=NOWHERE: cannot be read \(No such file or directory\)"),
        (["--prompt=a", "--model=/no/such/folder"], r"/no/such/folder does not exist; give a folder"),
        (["--prompt=a", "--negative_prompt=b"], r"--negative_prompt=b: this UNet has a w embedding.*LCM-LoRA"),
        (["--prompt=a", "--model_config=SD1"], r"--model_config=\S+ is for a single .safetensors file, which "),
        (["--prompt=a", "--lora=/no/such.safetensors"], r"--lora=\S+: /no/such.safetensors does not exist; give a"),
        (["--prompt=a", "--lora=TEXT:inf"], r"weight inf is not finite"),
        (["--prompt=a", "--lora=TEXT"], r"prompts.txt is not a .safetensors file"),
        (["--prompt=a", "--vae=TEXT"], r"prompts.txt is a file; a folder in diffusers format is needed"),
        (["--prompt=a", "--out=TEXT"], r"--out=.*prompts.txt: is a file; give a folder"),
        (["--prompt=a", "--model=BROKEN"], r"diffusion_pytorch_model.safetensors .*cannot be read"),
        (["--prompts=LATIN1"], r"--prompts=.*: cannot be read \(not UTF-8\)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(lcm, tmp_path, capsys, options, message):
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "latin1.txt").write_bytes("größe".encode("latin1"))
    if any("BROKEN" in option for option in options):
        weights = tiny.copy("micro lcm", tmp_path / "broken") / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    places = {
        "SD1": tiny.folder("sd1"),
        "TEXT": tmp_path / "prompts.txt",
        "LATIN1": tmp_path / "latin1.txt",
        "BROKEN": tmp_path / "broken",
    }
    for word, place in places.items():
        options = [option.replace(f"={word}", f"={place}") for option in options]
    out = tmp_path / "out"
    try:
        code = sample.main([f"--model={lcm}", f"--out={out}", *options])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not out.exists()


def test_a_broken_record_is_named(tmp_path, capsys):
    folder = tiny.copy("micro lcm", tmp_path / "lcm")
    (folder / pretrained.RECORD).write_text("{")
    assert sample.main([f"--model={folder}", f"--out={tmp_path / 'out'}", "--prompt=a"]) == 2
    assert "lcm_config.json is not valid JSON" in capsys.readouterr().err


def test_a_model_of_other_noise_is_one_line_and_exit_code_2(lcm, tmp_path, capsys):
    folder = tiny.copy("sd1", tmp_path / "edm")
    tiny.write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "EDMEulerScheduler"})
    for options in ([f"--model={folder}"], [f"--model={lcm}", f"--unet={folder}"]):
        assert sample.main([*options, f"--out={tmp_path / 'out'}", "--prompt=a"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: unsupported _class_name='EDMEulerScheduler'") and error.count("\n") == 1


def test_pictures_that_are_not_finite_are_refused(lcm, tmp_path, capsys, monkeypatch):
    def broken(self, request, prompts, numbers, seed):
        images = np.full((len(prompts), 4, 4, 3), np.nan, np.float32)
        images[1] = 0.5
        return images

    monkeypatch.setattr(Generator, "generate", broken)
    assert sample.main([f"--model={lcm}", f"--out={tmp_path}", f"--prompt={PROMPT}", "--num_images=3"]) == 2
    assert "0000_0000.png, 0000_0002.png: not finite, and would be black; try --dtype" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["0000_0001.png"]  # what is good is not lost
    with pytest.raises(LcmError, match="image 0 is not finite, and would be black; try dtype float32"):
        lcm_jax.load(lcm)(PROMPT, num_images=3)


def test_grid_lays_pictures_row_by_row():
    pictures = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((3, 2, 2, 3), np.uint8)
    laid = grid(pictures, 2)
    assert laid.shape == (4, 4, 3)
    assert (laid[:2, :2] == 0).all() and (laid[:2, 2:] == 1).all()
    assert (laid[2:, :2] == 2).all() and (laid[2:, 2:] == 255).all()


@pytest.mark.parametrize(
    ("sampler", "scheduler", "guidance_scale"),
    [
        ("ddim", DDIMScheduler, 5.0),
        pytest.param("ddim", DDIMScheduler, 1.0, marks=pytest.mark.slow),
        pytest.param("dpm_solver_pp_2m", DPMSolverMultistepScheduler, 5.0, marks=pytest.mark.slow),
    ],
)
def test_the_teacher_draws_what_diffusers_draws(tmp_path, sampler, scheduler, guidance_scale):
    """Guided by two passes (scale 5), and unguided by one (scale 1); trailing spacing, same latents."""
    folder, seed = tiny.folder("sd1"), 7
    options = (f"--sampler={sampler}", f"--guidance_scale={guidance_scale}", "--num_images=2", "--batch_size=2")
    ours = arrays(draw(folder, tmp_path, *options, f"--seed={seed}", "--steps=4"))

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    noise = draw_noise(seed, [0, 1], 1, (8, 8, 4))[0]
    theirs = pipe(
        [PROMPT] * 2,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="pil",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    ).images
    theirs = np.stack([np.asarray(picture).astype(int) for picture in theirs])
    assert ((theirs > 0) & (theirs < 255)).mean() > 0.5  # pictures, not saturation
    difference = np.abs(ours - theirs).max()
    print(f"{sampler} at {guidance_scale}: largest difference {difference}/255")
    assert difference <= 2


def test_another_size_and_a_half_precision(lcm, tmp_path):
    options = ("--height=10", "--width=14", "--num_images=1", "--batch_size=1", "--steps=1", "--dtype=bfloat16")
    picture = draw(lcm, tmp_path, *options)["0000_0000.png"]
    assert picture.size == (14, 10) and json.loads(picture.text["steps"]) == 1


def test_three_lines_give_the_programs_images(three, lcm):
    model = lcm_jax.load(lcm)
    images = model(PROMPT, steps=3, guidance_scale=8, seed=5, num_images=3, batch_size=2)
    np.testing.assert_array_equal(arrays(dict(enumerate(images))), arrays(three))
    assert len(model([PROMPT, "a blue square"], steps=3, height=10, width=14)) == 2
    with pytest.raises(BadArgument, match="^steps=21: out of range; choose 1 to 20$"):  # the record's solver steps
        model(PROMPT, steps=21)
    with pytest.raises(BadArgument, match="^seed=-1: out of range"):
        model(PROMPT, seed=-1)


def test_the_record_decides_how_an_lcm_is_sampled(lcm):
    """No call can sample with other constants than those of the distillation: nothing but the model tells them."""
    pipeline, _ = load_with_loras(str(lcm))
    others = {"solver_steps": 100, "timestep_scaling": 5.0, "sigma_data": 1.0}
    other = dataclasses.replace(pipeline, record=RECORD | others)
    settings = lcm_jax.Settings(steps=4)
    assert make_plan(pipeline, settings).timesteps == (999, 749, 499, 249)
    assert make_plan(other, settings).timesteps == (999, 749, 499, 249)
    assert make_plan(dataclasses.replace(pipeline, record={}), settings).timesteps == (999, 759, 499, 259)
    assert dict(make_plan(other, settings).options) == {"timestep_scaling": 5.0, "sigma_data": 1.0}
    assert pipeline != other and pipeline == dataclasses.replace(pipeline, record=RECORD | {"step": 3})


@contextlib.contextmanager
def compilations():
    """A list that receives an entry for every program that is compiled."""
    seen: list[str] = []

    def listen(event: str, _: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_model_compiles_nothing_and_a_dropped_one_is_freed(lcm, tmp_path):
    """Two fine-tunes of one architecture share every program; nothing keeps the weights of one that is gone."""

    other = tiny.copy("micro lcm", tmp_path / "other")
    tiny.write_json(other / pretrained.RECORD, RECORD | {"step": 7})
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: 1.5 * value for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})

    first = lcm_jax.load(lcm)
    one = first(PROMPT, steps=2)[0]
    with compilations() as compiled:
        second = lcm_jax.load(other)
        assert np.abs(np.subtract(one, second(PROMPT, steps=2)[0], dtype=int)).max() > 1
    assert compiled == []
    leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(first.params)]
    del first
    gc.collect()
    assert len(leaves) > 50 and not any(leaf() for leaf in leaves)
