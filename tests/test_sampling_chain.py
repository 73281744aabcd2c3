"""Two passes: hires and SDXL's refiner beside diffusers' pipelines, where they hand over, and what is refused."""

import itertools
import re
from unittest import mock

import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_img2img as lcm_img2img
from diffusers.schedulers import scheduling_lcm
from PIL import Image
from test_sample import compilations

import lcm_jax
from lcm_jax import Hires, Refine, sample
from lcm_jax.diffusion import samplers
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling import chain
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.noise import draw_noise
from lcm_jax.sampling.plan import make_plan
from lcm_jax.sampling.request import make_request

PROMPTS, SEED = ["a red circle", "a blue square"], 3


@pytest.fixture(scope="module")
def lcm() -> Generator:
    return lcm_jax.load(tiny.folder("micro lcm"))


@pytest.fixture(scope="module")
def base() -> Generator:
    return lcm_jax.load(tiny.folder("sdxl"))


@pytest.fixture(scope="module")
def refiner(base) -> Generator:
    return base.refiner(tiny.folder("refiner"))


def asked(model, then, **options):
    return chain.followed(model.pipeline, make_request(model.pipeline, **options), then)


def to_torch(latents) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(latents).transpose(0, 3, 1, 2)))


def drawn(*rows: np.ndarray):
    """In place of `randn_tensor`: gives these latents [b h w c], one after the other."""
    left = [to_torch(one) for one in rows]
    return lambda *_, **__: left.pop(0)


def test_hires_is_diffusers_image_to_image_from_enlarged_latents(lcm):
    request = asked(lcm, Hires(2.0, 0.5, 3), steps=2)
    got = lcm.generate(request, PROMPTS, [0, 0], SEED)
    assert got.shape == (2, 32, 32, 3)
    first = lcm.latents(lcm.encode(PROMPTS), lcm.noise(SEED, [0, 0], 2, 16, 16), 8.0, lcm_jax.Settings(steps=2))
    large = torch.nn.functional.interpolate(to_torch(first), scale_factor=2, mode="bilinear")
    noise = lcm.noise(SEED, [0, 0], 3, 32, 32, again=True)
    pipe = tiny.torch_pipeline(LatentConsistencyModelImg2ImgPipeline, tiny.folder("micro lcm"))
    draws = drawn(*noise)
    with (
        mock.patch.object(lcm_img2img, "randn_tensor", draws),
        mock.patch.object(scheduling_lcm, "randn_tensor", draws),
        torch.inference_mode(),
    ):
        want = pipe(PROMPTS, large, num_inference_steps=3, strength=0.5, guidance_scale=8.0, output_type="np").images
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)
    with compilations() as compiled:  # strengths are arrays
        other = lcm.generate(asked(lcm, Hires(2.0, 0.3, 3), steps=2), PROMPTS, [0, 0], SEED)
    assert compiled == [] and np.abs(other - got).max() > 0.02


def test_pixels_are_enlarged_by_lanczos_and_encoded_again(lcm):
    z = np.asarray(lcm.noise(SEED, [0, 1], 1, 16, 16)[0])
    got = chain.enlarged(lcm, z, 24, 32, "pixel")
    images = [Image.fromarray(image) for image in (np.asarray(lcm.decode(z)) * 255).round().astype(np.uint8)]
    large = [np.asarray(image.resize((32, 24), Image.Resampling.LANCZOS)) for image in images]
    vae = tiny.torch_vae()
    pixels = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        want = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    parity.close(got, want.permute(0, 2, 3, 1).numpy(), rtol=0, of_max=parity.NETWORK)
    flat = chain.enlarged(lcm, z, 24, 32, "latent")
    assert flat.shape == got.shape and np.abs(flat - got).max() > 0.1


def test_the_second_pass_has_noise_of_its_own():
    """jax: another key; torch and GPUs: a new generator of the same seed, as in A1111."""
    shape = (4, 4, 4)
    first, again = (draw_noise(0, [0, 5], 2, shape, again=again) for again in (False, True))
    assert not np.isin(again, first).any()
    for source in ("torch", "nv"):
        np.testing.assert_array_equal(*(draw_noise(0, [5], 2, shape, source, again=again) for again in (False, True)))


# Sampler, steps, spacing, start -> the base's timesteps, where the refiner starts.
HAND_OVERS = [
    ("lcm", 4, "trailing", 0.8, [999, 759, 499, 259], 199),
    ("lcm", 8, "trailing", 0.8, [999, 879, 759, 639, 499, 379, 259], 139),
    ("lcm", 1, "trailing", 0.5, [999], 499),
    ("ddim", 10, "trailing", 0.8, [999, 899, 799, 699, 599, 499, 399, 299], 199),
    ("ddim", 10, "leading", 0.8, [901, 801, 701, 601, 501, 401, 301, 201], 101),
    ("dpm_solver_pp_2m", 10, "trailing", 0.75, [999, 899, 799, 699, 599, 499, 399, 299], 199),
]


@pytest.mark.parametrize(("sampler", "steps", "spacing", "start", "timesteps", "last"), HAND_OVERS)
def test_where_the_base_hands_over(base, refiner, sampler, steps, spacing, start, timesteps, last):
    request = asked(base, Refine(refiner, start, 2), sampler=sampler, steps=steps, spacing=spacing)
    assert make_plan(base.pipeline, request.settings).t.tolist() == timesteps
    second = request.second.request
    assert make_plan(refiner.pipeline, second.settings).t.tolist() == [last, round((last + 1) / 2) - 1]
    assert second.guidance_scale == 5.0 and second.settings.sampler == ("ddim" if sampler == "lcm" else sampler)


def test_an_lcm_hands_over_with_the_noise_of_the_refiners_first_timestep(base, refiner, monkeypatch):
    """Of 4 steps all are the base's: then they end at x0."""
    given = []
    monkeypatch.setattr(refiner, "sampled", lambda request, prompts, noise: given.append(noise) or noise[0])
    base.generate(asked(base, Refine(refiner)), PROMPTS, [0, 1], SEED)
    noise = base.noise(SEED, [0, 1], 5, 16, 16)
    x0 = base.latents(base.encode(PROMPTS), noise[:4], 1.0, lcm_jax.Settings(steps=4))
    alpha, sigma = (table[199] for table in (base.pipeline.schedule.alphas, base.pipeline.schedule.sigmas))
    parity.close(given[0], (alpha * x0 + sigma * noise[4])[None], rtol=0, of_max=4 * parity.EPS)


@pytest.mark.parametrize(
    ("options", "entries"), [({"sampler": "euler_ancestral"}, 3), ({"sampler": "tcd", "gamma": 0.5}, 1)]
)
def test_fresh_noise_of_the_bases_last_step_is_in_what_it_hands_over(options, entries, base, refiner, monkeypatch):
    """The refiner starts from what the whole sampler has at that timestep, and has noise of its own for its steps."""
    given, schedule = [], base.pipeline.schedule
    monkeypatch.setattr(refiner, "sampled", lambda request, prompts, noise: given.append(noise))
    request, noise = asked(base, Refine(refiner, 0.5, 3), steps=4, **options), base.noise(SEED, [0, 1], 7, 16, 16)
    whole, stopped = (make_plan(base.pipeline, s) for s in (lcm_jax.Settings(steps=4, **options), request.settings))
    kept = len(stopped.t)
    assert 1 < kept < 4

    def model(x, t):
        return 0.5 * x

    z = stopped(model, noise[:4], schedule)
    chain.second_pass(base, request, z, PROMPTS, [0, 1], SEED)
    *_, (_, want) = itertools.islice(whole(model, noise[:4], schedule, loop=samplers.stepwise), kept)
    assert len(given[0]) == entries
    parity.close(given[0][0], want, rtol=0, of_max=8 * parity.EPS)
    np.testing.assert_array_equal(given[0][1:], noise[kept + 1 : kept + entries])
    assert np.abs(given[0][0] - z).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_base_and_refiner_are_diffusers_pipelines(sampler, base, refiner):
    """LCM: 999, 499, then 199 and 99; DDIM: the first 8 and the last 2 of 10. The negative prompt is for both."""
    steps = {"lcm": 2, "ddim": 10}[sampler]
    options = {"guidance_scale": 1.5, "negative_prompt": "hello"}
    got = base.generate(
        asked(base, Refine(refiner, 0.8, 2, 3.0), steps=steps, sampler=sampler, **options), PROMPTS, [0, 1], SEED
    )
    noise = base.noise(SEED, [0, 1], 3, 16, 16)
    refining = dict(scheduler=DDIMScheduler, requires_aesthetics_score=True)
    second = tiny.torch_pipeline(StableDiffusionXLImg2ImgPipeline, tiny.folder("refiner"), **refining)
    first = tiny.torch_pipeline(StableDiffusionXLPipeline, tiny.folder("sdxl"))
    table = {"timesteps": [999, 499, 199]}
    if sampler == "ddim":
        first.scheduler, table = second.scheduler, {"num_inference_steps": steps}
    texts = {"prompt": PROMPTS, "negative_prompt": ["hello"] * 2}
    start = to_torch(noise[0])
    with mock.patch.object(scheduling_lcm, "randn_tensor", drawn(*noise[1:])), torch.inference_mode():
        z = first(**texts, **table, latents=start, denoising_end=0.8, guidance_scale=1.5, output_type="latent").images
        want = second(
            **texts, image=z, num_inference_steps=10, denoising_start=0.8, guidance_scale=3.0, output_type="np"
        ).images
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)


def test_what_cannot_follow_is_one_line(lcm, base, refiner):
    plain, sdxl, other = lcm.pipeline, base.pipeline, lcm_jax.load(tiny.folder("sd1"))
    image = np.zeros((16, 16, 3), np.uint8)
    for model, then, options, message in (
        (plain, Hires(0.5), {}, "hires=0.5: times the size; choose 1 to 4"),
        (plain, Hires(strength=0.0), {}, "hires_strength=0: out of range"),
        (plain, Hires(strength=0.05), {}, "hires_strength=0.05: leaves 2 of the 50 solver steps for 4 steps; use 2"),
        (plain, Hires(steps=51), {}, "hires_steps=51: out of range; choose 1 to 50"),
        (plain, Hires(by="bislerp"), {}, "hires_by=bislerp: choose one of latent, pixel"),
        (plain, Hires(), {"image": image}, "hires=2: a second pass follows images from text alone"),
        (sdxl, Refine("owner/name"), {}, "refiner=owner/name: is no refiner; give what model.refiner returns"),
        (sdxl, Refine(base), {}, "refiner=.*: is no refiner"),
        (sdxl, Refine(refiner, 1.0), {}, "refiner_start=1: the base's part of the noise; choose between 0 and 1"),
        (sdxl, Refine(refiner, 0.99), {}, "refiner_start=0.99: leaves 4 of 4 steps to the base, at timesteps 999 to 2"),
        (sdxl, Refine(refiner), {"sampler": "ddim"}, "refiner_start=0.8: leaves 4 of 4 steps to the base"),
        (sdxl, Refine(refiner, 0.0004), {}, "refiner_start=0.0004: leaves 0 of 4 steps to the base"),
        (sdxl, Refine(refiner, 0.97, 30), {}, "refiner_steps=30: the refiner has 20 timesteps; use as many steps at"),
        (sdxl, Refine(refiner, guidance_scale=0.5), {}, "refiner_guidance_scale=0.5: 1 is no guidance"),
    ):
        with pytest.raises(BadArgument, match=message) as caught:
            chain.followed(model, make_request(model, **options), then)
        assert "\n" not in str(caught.value)
    with pytest.raises(LcmError, match=r"sdxl is no SDXL refiner; give one, such as stabilityai/"):
        base.refiner(tiny.folder("sdxl"))
    with pytest.raises(LcmError, match=r"refiner refines the latents of SDXL, this model has others"):
        other.refiner(tiny.folder("refiner"))
    with pytest.raises(LcmError, match="this refiner refines the latents of SDXL, this model has others"):
        chain.followed(other.pipeline, make_request(other.pipeline), Refine(refiner))


def test_control_images_are_read_again_at_the_larger_size(lcm):
    net = chain.control_lib.Net("net", mock.Mock(), None)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    control = [lcm_jax.Control(net, image)]
    with mock.patch.object(chain.control_lib, "check_fit"):
        request = make_request(lcm.pipeline, control=control, height=16, width=16)
        request = chain.followed(lcm.pipeline, request, Hires(1.5), control)
    small, large = request.control[0].image, request.second.request.control[0].image
    assert (small.shape, large.shape) == ((16, 16, 3), (24, 24, 3))
    np.testing.assert_array_equal(large, Image.fromarray(image).resize((24, 24), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("kind", ["hires", "refiner"])
def test_the_program_asks_for_what_its_flags_say_and_repeats_it(kind, tmp_path, monkeypatch, capsys):
    seen, model = [], {"hires": "micro lcm", "refiner": "sdxl"}[kind]

    def generate(self, request, prompts, numbers, seed):
        seen.append(request)
        return np.zeros((len(prompts), 16, 16, 3), np.float32)

    monkeypatch.setattr(Generator, "generate", generate)
    flags = {
        "hires": ["--hires=1.5", "--hires_strength=0.6", "--hires_steps=2", "--hires_by=pixel"],
        "refiner": [f"--refiner={tiny.folder('refiner')}", "--refiner_start=0.7", "--refiner_steps=3"],
    }[kind]
    words = [f"--model={tiny.folder(model)}", "--prompt=a", "--num_images=1", f"--out={tmp_path / 'a'}", *flags]
    assert sample.main(words) == 0
    first, second = seen[0], seen[0].second.request
    about = Image.open(tmp_path / "a" / "0000_0000.png").text
    if kind == "hires":
        assert (second.height, second.width, second.settings.steps, second.settings.strength) == (24, 24, 2, 0.6)
        assert first.second.then == Hires(1.5, 0.6, 2, "pixel") and about["size"] == "16x16"
        assert [about[name] for name in ("hires", "hires_strength", "hires_steps", "hires_by")] == [
            "1.5",
            "0.6",
            "2",
            "pixel",
        ]
        assert "timesteps 999 759 499 259 then 599 299\n" in capsys.readouterr().out
    else:
        assert first.settings.stop == 300 and second.settings == lcm_jax.Settings("ddim", 3, strength=0.26)
        assert about["refiner"] == str(tiny.folder("refiner")) and about["refiner_guidance_scale"] == "5.0"
        assert "timesteps 999 759 499 then 259 172 86\n" in capsys.readouterr().out
    assert sample.main([f"--like={tmp_path / 'a' / '0000_0000.png'}", f"--out={tmp_path / 'b'}"]) == 0
    assert Image.open(tmp_path / "b" / "0000_0000.png").text == about
    again = seen[1].second.then
    assert again == first.second.then if kind == "hires" else (again.start, again.steps) == (0.7, 3)


def test_flags_of_no_pass_and_of_two_are_one_line(tmp_path, capsys):
    png = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(png)
    for flags, message in (
        (["--hires_steps=2"], r"--hires_steps=2: is for a second pass; give --hires, too, or leave it out"),
        (["--refiner_start=0.5"], r"--refiner_start=0.5: is for a second pass; give --refiner, too"),
        (["--hires=2", "--refiner=/r"], r"--refiner=/r: and --hires are second passes both; give one"),
        (["--hires=5"], r"--hires=5: times the size; choose 1 to 4"),
        (["--hires=2", f"--image={png}"], r"--hires=2: a second pass follows images from text alone"),
    ):
        assert sample.main(["--model=/nowhere", "--prompt=a", f"--out={tmp_path / 'out'}", *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error


def test_an_image_that_is_not_finite_stays_so_in_pixels(lcm):
    z = np.array(lcm.noise(SEED, [0, 1], 1, 16, 16)[0])
    z[0, 0, 0, 0] = np.nan
    got = chain.enlarged(lcm, z, 24, 24, "pixel")
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()
