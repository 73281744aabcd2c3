"""Image to image against diffusers, the goldens of its loop, its timesteps, sizes, flags, and what is refused."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from test_sample import compilations
from test_sampling_control import picture

import lcm_jax
from lcm_jax import sample
from lcm_jax.diffusion import samplers, schedule, timesteps
from lcm_jax.errors import BadArgument
from lcm_jax.sampling import like, request
from lcm_jax.sampling.image_to_image import Encoder, listed, size_of
from lcm_jax.sampling.inpaint import Canvas
from lcm_jax.sampling.noise import TorchGenerator, draw_noise
from lcm_jax.sampling.plan import Settings, make_plan
from lcm_jax.sampling.request import make_request

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model():
    """A one-level LCM, conditioned on w; factor 2, 16 pixels."""
    return lcm_jax.load(tiny.folder("micro lcm"))


def ours(model, image, numbers=(0,), seed=5, **options) -> np.ndarray:
    """Latents [b h w c]."""
    asked = make_request(model.pipeline, image=image, **options)
    asked = dataclasses.replace(asked, num_images=len(numbers))
    noise, cond = model.start(asked, numbers, seed).noise, model.encode([PROMPT] * len(numbers))
    return np.asarray(model.latents(cond, noise, asked.guidance_scale, asked.settings, asked.negative_prompt))


def theirs(folder: Path, kind, image, generators, scheduler=LCMScheduler, **options) -> np.ndarray:
    """Latents [b h w c] of diffusers' pipeline with its own draws."""
    pipe = tiny.torch_pipeline(kind, folder, scheduler)
    found = pipe(prompt=PROMPT, image=image, generator=generators, output_type="latent", **options).images
    return found.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (1, 0.8)])
def test_latents_of_diffusers_lcm_pipeline_with_torchs_noise(model, steps, strength):
    """Of one generator for all images, which draws the posterior's noise once, and of a list of generators."""
    for noise, generators in (("torch-batch", tiny.generator(5)), ("torch", [tiny.generator(5), tiny.generator(6)])):
        want = theirs(
            tiny.folder("micro lcm"),
            LatentConsistencyModelImg2ImgPipeline,
            picture(1),
            generators,
            num_images_per_prompt=2,
            num_inference_steps=steps,
            strength=strength,
            guidance_scale=8.0,
        )
        got = ours(model, picture(1), (0, 1), noise=noise, steps=steps, strength=strength)
        parity.close(got, want, rtol=0, of_max=parity.NETWORK)


CASES = [
    ("sd1", LCMScheduler, 1.0),
    ("sd1", LCMScheduler, 1.5),
    ("sd1", DDIMScheduler, 5.0),
    ("sd1", DPMSolverMultistepScheduler, 5.0),
    ("sd2", LCMScheduler, 1.0),
    ("sd2", DDIMScheduler, 5.0),
    ("sdxl", LCMScheduler, 1.5),
    ("sdxl", DPMSolverMultistepScheduler, 5.0),
]
NAMES = {LCMScheduler: "lcm", DDIMScheduler: "ddim", DPMSolverMultistepScheduler: "dpm_solver_pp_2m"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheduler", "scale"), CASES)
def test_latents_of_diffusers_other_pipelines_with_steps_and_strength_of_theirs(name, scheduler, scale):
    """N steps at strength s are N / s there."""
    kind = StableDiffusionXLImg2ImgPipeline if name == "sdxl" else StableDiffusionImg2ImgPipeline
    model = lcm_jax.load(tiny.folder(name))
    for steps, strength in ((4, 0.5), (1, 0.2)):
        options = dict(num_inference_steps=round(steps / strength), strength=strength, guidance_scale=scale)
        want = theirs(tiny.folder(name), kind, picture(1), tiny.generator(5), scheduler, **options)
        options = dict(sampler=NAMES[scheduler], steps=steps, strength=strength, guidance_scale=scale, noise="torch")
        parity.close(ours(model, picture(1), **options), want, rtol=0, of_max=parity.NETWORK)


def test_timesteps_of_an_lcm_are_those_of_diffusers_for_every_strength_of_the_grid():
    theirs = LCMScheduler()
    for kept in range(1, 51):
        for steps in range(1, min(kept, 8) + 1):
            theirs.set_timesteps(steps, original_inference_steps=50, strength=(kept + 0.01) / 50)
            got = timesteps.lcm(steps, 1000, 50, kept / 50)
            np.testing.assert_array_equal(got, theirs.timesteps, err_msg=f"{steps} of {kept}")
    for steps, strength, want in (
        (4, 0.99, [979, 739, 499, 259]),
        (4, 0.5, [499, 379, 259, 139]),
        (2, 0.3, [299, 159]),
        (8, 0.2, [199, 179, 159, 139, 99, 79, 59, 39]),
        (1, 0.02, [19]),
        (1, 0.58, [579]),  # 28.999999999999996 in binary
    ):
        np.testing.assert_array_equal(timesteps.lcm(steps, 1000, 50, strength), want)
    np.testing.assert_array_equal(timesteps.lcm(4, 1000, 100, 0.5), [499, 379, 249, 129])


def test_timesteps_of_a_teacher_end_a_part_of_the_way(model):
    for steps, strength, want in (
        (4, 0.5, [499, 374, 249, 124]),
        (10, 0.5, [499 - 50 * n for n in range(10)]),
        (2, 0.05, [49, 24]),
        (4, 1.0, [999, 749, 499, 249]),
    ):
        for name in ("ddim", "dpm_solver_2m", "dpm_solver_pp_2m"):
            plan = make_plan(model.pipeline, Settings(name, steps, strength=strength))
            np.testing.assert_array_equal(plan.t, want)


def golden(table: samplers.Table, prediction_type: str, sampler=samplers.lcm) -> tuple[float, float]:
    """Sums of |x| and x after the loop, from an image that is a ramp and a model that is a multiple of x."""
    noise_schedule = schedule.from_config(tiny.scheduler_config(prediction_type))
    z = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 4, 8, 8)
    draws = TorchGenerator(0)
    noise = np.stack([draws.randn(256).reshape(z.shape) for _ in table[0]])
    x = noise_schedule.alphas[table[0][0]] * z + noise_schedule.sigmas[table[0][0]] * noise[0]
    found = np.asarray(sampler(lambda x, t: x * t / (t + 1), x, noise[1:], noise_schedule, table), np.float64)
    return abs(found).sum(), found.sum()


def test_goldens_of_the_loop_without_a_network():
    noise_schedule = schedule.from_config(tiny.scheduler_config("epsilon"))
    for (steps, strength), wants in {
        (4, 0.5): [(67.1873, 0.9653), (45.5826, -2.1652), (192.3236, 19.0765)],
        (1, 0.5): [(49.9721, 1.6135), (55.7281, -1.7993), (173.1220, 5.5897)],
        (2, 0.8): [(62.0564, 7.3636), (20.7095, -1.6378), (201.5481, 23.3925)],
        (4, 1.0): [(66.0755, -2.6749), (29.7369, -2.2679), (203.3319, 13.3479)],
    }.items():
        table = samplers.lcm_table(noise_schedule, timesteps.lcm(steps, 1000, 50, strength))
        for prediction_type, want in zip(("epsilon", "v_prediction", "sample"), wants, strict=True):
            parity.close(golden(table, prediction_type), want, rtol=0, atol=1e-3)
    for steps, want in ((4, (83.9664, 2.7111)), (10, (90.2669, 2.9145))):
        table = samplers.ddim_table(noise_schedule, timesteps.ddim(steps, 500), stride=500 // steps)
        parity.close(golden(table, "epsilon", samplers.ddim), want, rtol=0, atol=1e-3)


def test_one_program_serves_all_strengths_and_that_of_text_alone_stays(model):
    plain = np.asarray(model.latents(model.encode([PROMPT]), model.noise(5, [0], 4, 16, 16), 8.0, Settings()))
    found = [ours(model, picture(1), strength=0.3)]
    with compilations() as compiled:
        found += [ours(model, picture(n), strength=strength) for n, strength in ((1, 0.6), (2, 0.6), (1, 1.0))]
        again = model.latents(model.encode([PROMPT]), model.noise(5, [0], 4, 16, 16), 8.0, Settings())
    assert compiled == []
    np.testing.assert_array_equal(again, plain)
    for n, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-3 for other in [plain, *found[:n]])


def test_a_sample_of_the_posterior_is_its_mode_and_noise_that_follows_the_image_alone(model):
    mode = ours(model, picture(1), steps=1, strength=0.02)
    many = [ours(model, picture(1), numbers, steps=1, strength=0.02, posterior="sample") for numbers in ((0, 1), (1,))]
    parity.close(many[0][1:], many[1], rtol=0, of_max=parity.NETWORK)
    assert np.abs(many[0][0] - mode[0]).max() > 0.01 and np.abs(many[0][0] - many[0][1]).max() > 0.01
    posterior = Encoder(model.pipeline.vae, model.weights, None, False)
    xi = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    image = torch.from_numpy(np.asarray(picture(1), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
    found = tiny.torch_vae().encode(image).latent_dist
    want = [x.numpy().transpose(0, 2, 3, 1) for x in (found.mean, found.std)]
    parity.close(posterior.latents([Canvas(np.asarray(picture(1)))]), 0.18215 * want[0], rtol=0, of_max=parity.NETWORK)
    got = posterior.latents([Canvas(np.asarray(picture(1)))], xi)
    parity.close(got, 0.18215 * (want[0] + want[1] * xi), rtol=0, of_max=parity.NETWORK)


@pytest.mark.parametrize("source", ["jax", "torch", "torch-batch", "nv"])
def test_draws_for_posteriors_leave_a_seed_its_own_numbers(source):
    shape = (8, 8, 4)
    plain, both = (draw_noise(3, [0, 1], 3, shape, source, 2, *extra) for extra in ((), (1, 1)))
    assert both.shape == (5, 2, *shape)
    assert len({entry.tobytes() for entry in both}) == 5
    if source == "jax":
        np.testing.assert_array_equal(both[2:], plain)
    if source == "torch-batch":  # one row, start, one row, the rest
        drawn = TorchGenerator(3)
        for entry, rows in ((0, 1), (2, 2), (1, 1), (3, 2), (4, 2)):
            want = drawn.randn(rows * 256).reshape(rows, 4, 8, 8).transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(both[entry], np.broadcast_to(want, (2, *shape)))
    if source == "torch":
        drawn = TorchGenerator(4)
        for entry in (0, 2, 1, 3, 4):
            np.testing.assert_array_equal(both[entry, 1], drawn.randn(256).reshape(4, 8, 8).transpose(1, 2, 0))


def test_images_have_the_size_of_theirs_reduced_to_the_longest_side(model):
    def size(h, w, height=None, width=None, max_side=None):
        return size_of(model.pipeline, (h, w), height, width, max_side)

    assert size(21, 25) == (20, 24) and size(64, 48) == (32, 24)  # twice the model's 16
    assert size(64, 48, max_side=24) == (24, 18) and size(64, 48, max_side=99) == (64, 48)
    assert size(64, 48, height=32) == (32, 24) and size(64, 48, width=20) == (26, 20)
    assert size(64, 48, height=64, width=16) == (64, 16)
    asked = make_request(model.pipeline, image=picture(1, 21, 25))
    assert (asked.height, asked.width, asked.settings.strength) == (20, 24, 0.5)


def test_prompts_have_images_of_their_own_or_one_for_all(model):
    images = [picture(1), picture(2)]
    both = model([PROMPT, PROMPT], image=images, strength=0.3, batch_size=4, num_images=2)
    for n, image in enumerate(images):
        one = model(PROMPT, image=image, strength=0.3, batch_size=4, num_images=2)
        for got, want in zip(both[2 * n : 2 * n + 2], one, strict=True):
            assert np.abs(np.asarray(got, int) - np.asarray(want, int)).max() <= 1  # of another batch
    assert np.abs(np.asarray(both[0], int) - np.asarray(both[2], int)).max() > 8
    with pytest.raises(BadArgument, match="image=2 images: for 1 prompts; give one image, or one for each prompt"):
        model(PROMPT, image=images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength=0: out of range; choose more than 0"),
        ({"strength": 1.5}, "strength=1.5: out of range"),
        ({"strength": float("nan")}, "strength=nan: out of range"),
        ({"strength": 0.05}, "strength=0.05: leaves 2 of the 50 solver steps for 4 steps; use 2 steps or fewer, or a "
                             "strength of 0.08 or more"),
        ({"strength": 0.01}, "leaves 0 of the 50 solver steps for 4 steps; use a strength of 0.08 or more"),
        ({"sampler": "ddim", "steps": 50, "strength": 0.04}, "leaves 40 of the 1000 timesteps for 50 steps; use 40"),
        ({"sampler": "ddim", "spacing": "leading"}, "spacing=leading: image to image starts within trailing timesteps"),
        ({"fit": "squeeze"}, "fit=squeeze: choose one of crop, stretch, fill"),
        ({"posterior": "mean"}, "posterior=mean: choose one of mode, sample"),
        ({"background": "whitish"}, "background=whitish: is no colour; give a name or #rrggbb"),
        ({"max_side": 4}, "max_side=4: choose 16 or more"),
        ({"height": 15}, "height=15: not a multiple of the VAE's factor 2"),
        ({"image": "/nowhere.png"}, "image=/nowhere.png: cannot be read"),
        ({"image": []}, r"image=\[\]: has no image"),
        ({"image": picture(1, 15, 16)}, "has 16 x 15 pixels; each side needs at least 16"),
        ({"image": None, "strength": 0.5}, "strength=0.5: is for image to image; give an image"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_compiled(model, options, message):
    with compilations() as compiled, pytest.raises(BadArgument, match=message) as caught:
        model(PROMPT, **{"image": picture(1)} | options)
    assert compiled == [] and "\n" not in str(caught.value)


def test_memory_counts_the_encoder(model, monkeypatch):
    sizes = dict(height=16, width=16)
    plain, source = (make_request(model.pipeline, image=image, **sizes) for image in (None, picture(1)))
    counted = [request._bytes_needed(model.pipeline, one, 1, 64, False, False)[0] for one in (plain, source)]
    assert counted[0] <= counted[1]
    wide = dataclasses.replace(model.pipeline, vae=model.pipeline.vae.clone(block_out_channels=(512, 32)))
    counted = [request._bytes_needed(wide, one, 1, 64, False, False)[0] for one in (plain, source)]
    assert counted[1] - counted[0] == 16 * 16 * 4 * (2 * 512 - (512 + 32))


def run(out: Path, *flags: str) -> dict[str, Image.Image]:
    assert sample.main([f"--model={tiny.folder('micro lcm')}", f"--out={out}", "--seed=5", *flags]) == 0
    return {path.name: Image.open(path) for path in sorted(out.glob("*.png"))}


@pytest.mark.slow
def test_the_program_takes_each_image_of_a_folder_with_each_prompt_and_repeats_one(tmp_path, capsys, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("notes.txt", "d.heic", "._a.png"):  # the last is what macOS writes beside files on other disks
        (folder / name).write_text("no image")
    (folder / "old.png").mkdir()
    for n, (name, size) in enumerate((("b.jpg", (16, 16)), ("a.png", (20, 16)), ("c.png", (16, 16)))):
        picture(n, *size).save(folder / name)
    flags = ["--strength=0.3", "--num_images=2", "--batch_size=2", "--prompt=a", "--prompt=blue"]
    images = run(tmp_path / "out", f"--image={folder}", *flags)
    assert "timesteps 299 239 159 79" in capsys.readouterr().out
    assert "3 images; not used: 1 text without an image, as notes.txt, 1 file of unknown kind (.heic)" in caplog.text
    assert list(images) == [f"{pair:04d}_{number:04d}.png" for pair in range(6) for number in range(2)]
    abouts = [image.text for image in images.values()]
    assert [about["source"] for about in abouts[::4]] == [str(folder / name) for name in ("a.png", "b.jpg", "c.png")]
    assert [about["prompt"] for about in abouts] == ["a", "a", "blue", "blue"] * 3
    assert [image.size for image in images.values()] == [(16, 20)] * 4 + [(16, 16)] * 8
    keys = {"strength": "0.3", "fit": "crop", "posterior": "mode", "image": "1"}
    assert {key: abouts[-1][key] for key in keys} == keys and "spacing" not in abouts[-1]

    made = tmp_path / "out" / "0003_0001.png"
    assert like.recorded(made)[0]["image"] == str(folder / "b.jpg") and like.recorded(made)[1] == []
    again = run(tmp_path / "again", f"--like={made}")
    assert list(again) == ["0000_0001.png"]
    (again,), want = again.values(), images[made.name]
    assert again.text == want.text
    assert np.abs(np.asarray(again, int) - np.asarray(want, int)).max() <= 1  # of another batch
    assert run(tmp_path / "out", f"--image={folder}", *flags)  # the same command may be repeated
    assert (
        sample.main([f"--model={tiny.folder('micro lcm')}", f"--out={tmp_path / 'out'}", f"--image={made}", *flags])
        == 2
    )
    assert "has 0000_0000.png of another prompt, model or settings" in capsys.readouterr().err


def test_bad_flags_are_one_line_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample.flags, "load_model", None)
    (tmp_path / "empty").mkdir()
    picture(1).save(tmp_path / "image.png")
    for flags, message in (
        (["--strength=0.5"], "--strength=0.5: is for image to image; give --image=FILE or a folder"),
        (["--fit=fill"], "--fit=fill: is for image to image"),
        ([f"--image={tmp_path / 'empty'}"], r"--image=\S+/empty: has no images; give a file, or a folder of JPEG, PNG"),
        (["--image=/nowhere.png"], "--image=/nowhere.png: cannot be read"),
        ([f"--image={tmp_path / 'image.png'}", "--strength=0"], "--strength=0: out of range"),
    ):
        assert sample.main(["--model=m", f"--out={tmp_path / 'bad'}", "--prompt=a", *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
    assert listed(tmp_path / "image.png") == [tmp_path / "image.png"]
