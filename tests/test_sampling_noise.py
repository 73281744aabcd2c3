"""`sampling.noise` against torch's generator and diffusers' pipeline; `sample --noise` and `--like`."""

import re

import numpy as np
import pytest
import tiny
import torch
from diffusers import LatentConsistencyModelPipeline
from PIL import Image, PngImagePlugin

import lcm_jax
from lcm_jax import sample
from lcm_jax.errors import BadArgument
from lcm_jax.sampling import like
from lcm_jax.sampling.noise import Philox, TorchGenerator, draw_noise

PROMPT = "a small red circle"
PARAMETERS = (
    "a small,\nred circle\nNegative prompt: blue\nSteps: 2, Sampler: LCM, CFG scale: 1.5, Seed: 9, Size: 16x14, "
    'Model hash: 0123abcd, Lora hashes: "a: 1, b: 2", RNG: CPU, Version: v1.9.4'
)


def test_vectors_of_the_generators():
    def begins(found, *values):  # the last digit of a vector is rounded
        np.testing.assert_allclose(found[: len(values)], values, rtol=0, atol=6e-8)

    begins(TorchGenerator(0).randn(16), -1.1258398, -1.1523602, -0.2505786, -0.4338788)
    begins(TorchGenerator(0).randn(5), 1.5409961, -0.2934289, -2.1787894, 0.5684313, -1.0845224)
    latent = TorchGenerator(0).randn(4 * 64 * 64).astype(np.float64)
    begins(latent[-2:], -1.3664697, -1.0782080)
    np.testing.assert_allclose([latent.sum(), abs(latent).sum()], [-124.11269989912398, 13111.53356347722], rtol=1e-7)
    begins(Philox(0).randn(5), -0.9246624, -0.4253440, -2.6438458, 0.1451839, -0.1208665)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 7])
def test_torch_generator_is_torch_randn_call_after_call(seed):
    """Bit for bit; without AVX2 torch takes its logarithms and sines from the C library, a few ulp away."""
    bound = 0 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 2.4e-6
    ours, theirs = TorchGenerator(seed), tiny.generator(seed)
    # 7 leaves a spare number, which is the first of the 1 behind 4 * 8 * 8.
    for n in (*range(1, 65), 7, 4 * 8 * 8, 1, 4 * 64 * 64, 4 * 9 * 7, 3):
        np.testing.assert_allclose(ours.randn(n), torch.randn(n, generator=theirs), rtol=0, atol=bound, err_msg=str(n))


def test_philox_differs_by_call_and_by_both_halves_of_the_seed():
    one = Philox(3)
    calls = np.stack([one.randn(4096) for _ in range(3)] + [Philox(3 + 2**32).randn(4096)])
    np.testing.assert_array_equal(calls[0, :100], Philox(3).randn(100))
    assert np.abs(np.corrcoef(calls) - np.eye(4)).max() < 0.08  # 5 / sqrt(4096)
    assert np.abs(calls.std(axis=1) - 1).max() < 0.06 and np.abs(calls.mean(axis=1)).max() < 0.08


@pytest.mark.parametrize("source", ["jax", "torch", "nv"])
def test_noise_of_an_image_does_not_depend_on_those_beside_it(source):
    found = draw_noise(3, [4, 9], 3, (2, 3, 4), source)
    assert found.shape == (3, 2, 2, 3, 4) and found.dtype == np.float32
    np.testing.assert_array_equal(draw_noise(3, [9], 1, (2, 3, 4), source)[0, 0], found[0, 1])
    if source != "jax":
        np.testing.assert_array_equal(draw_noise(7, [0], 3, (2, 3, 4), source)[:, 0], found[:, 0])


def test_torch_batch_is_one_generator_for_all_images():
    found = draw_noise(3, [2, 1], 2, (2, 3, 4), "torch-batch", 5)
    theirs = tiny.generator(3)
    want = np.stack([torch.randn(5, 4, 2, 3, generator=theirs).numpy() for _ in range(2)]).transpose(0, 1, 3, 4, 2)
    np.testing.assert_allclose(found, want[:, [2, 1]], rtol=0, atol=2.4e-6)
    assert np.abs(found - draw_noise(3, [2, 1], 2, (2, 3, 4), "torch-batch")).max() > 0.1  # of three images


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_latents_are_those_of_diffusers_for_the_same_seed(steps):
    """To 1e-4, the rounding of four steps in float32: a list of generators, and one for the batch."""
    folder = tiny.folder("micro lcm")
    pipe = tiny.torch_pipeline(LatentConsistencyModelPipeline, folder)
    model = lcm_jax.load(folder)
    cond, settings = model.encode([PROMPT] * 2), lcm_jax.Settings(steps=steps)
    for source, generators in (("torch", [tiny.generator(5), tiny.generator(6)]), ("torch-batch", tiny.generator(5))):
        options = dict(num_images_per_prompt=2, num_inference_steps=steps, guidance_scale=8.0, output_type="latent")
        theirs = pipe(PROMPT, height=16, width=16, generator=generators, **options).images
        ours = model.latents(cond, model.noise(5, [0, 1], steps, 16, 16, source), 8.0, settings)
        np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return tiny.copy("micro lcm", tmp_path_factory.mktemp("noise") / "lcm")


def generate(out, *options) -> dict[str, Image.Image]:
    assert sample.main([f"--out={out}", *options]) == 0
    return {path.name: Image.open(path) for path in sorted(out.glob("*.png"))}


def difference(a: Image.Image, b: Image.Image) -> int:
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def test_like_repeats_the_pixels_of_an_image(lcm, tmp_path):
    """To the last bit, because it is the same program: a batch of one."""
    options = (f"--model={lcm}", f"--prompt={PROMPT}", "--seed=5", "--steps=2", "--num_images=1", "--tiled")
    (image,) = generate(tmp_path / "a", *options, "--first_image=3", "--noise=nv").values()
    assert (image.text["noise"], image.text["tiled"]) == ("nv", "True")
    (again,) = generate(tmp_path / "b", f"--like={tmp_path / 'a' / '0000_0003.png'}").values()
    assert again.text == image.text and difference(again, image) == 0
    options = ("--seed=6", f"--like={tmp_path / 'a' / '0000_0003.png'}", "--noise=jax", "--prompt=b", "--prompt=c")
    others = generate(tmp_path / "c", *options, "--batch_size=1")  # flags given win, whatever their order
    assert list(others) == ["0000_0003.png", "0001_0003.png"]
    for prompt, other in zip("bc", others.values(), strict=True):
        assert other.text | {"noise": "nv"} == image.text | {"prompt": prompt, "seed": "6"}
        assert difference(other, image) > 8


OURS = {"prompt": "a", "image": "3", "seed": "1", "size": "16x24", "model": "m"}
BY_HAND = {"sampler": "tcd", "gamma": "0.3", "steps": "2", "timesteps": "999,499"}
LEADING = {"sampler": "ddim", "spacing": "leading", "steps": "2"}
EDGES = {"control": "canny:edges.png", "canny": "1,2", "control_guess": "True"}


@pytest.mark.parametrize(
    ("about", "given", "wanted"),
    [
        (BY_HAND, [], {"timesteps": (999, 499), "gamma": 0.3, "first_image": 3, "width": 16}),
        (BY_HAND, ["--steps=4"], {"timesteps": (), "steps": 4, "gamma": 0.3}),
        (BY_HAND, ["--sampler=euler"], {"timesteps": (999, 499), "steps": 2, "gamma": None}),
        (BY_HAND, ["--sampler=tcd"], {"gamma": 0.3}),
        (LEADING, ["--timesteps=9,8,7", "--sampler=euler"], {"steps": None, "spacing": "trailing"}),
        (LEADING, ["--sampler=dpm_solver_2m"], {"spacing": "leading"}),
        (LEADING | {"hires": "2.0", "hires_by": "pixel"}, ["--refiner=r"], {"hires": None, "hires_by": None}),
        (LEADING | {"hires": "2.0"}, ["--image=b.png"], {"hires": None, "width": None, "spacing": "trailing"}),
        (LEADING | EDGES, ["--control=depth:b.png"], {"control": ["depth:b.png"], "canny": None, "width": None}),
        (LEADING, ["--control=depth:b.png"], {"control": ["depth:b.png"], "width": 16, "height": 24}),
        (LEADING | EDGES, ["--model=n"], {"control": ["canny:edges.png"], "canny": "1,2", "control_guess": True}),
        (LEADING | {"prompt_syntax": "a1111", "emphasis": "no_norm"}, ["--prompt_syntax=plain"], {"emphasis": None}),
        (LEADING | {"prompt_syntax": "a1111", "emphasis": "no_norm"}, ["--prompt=b"], {"emphasis": "no_norm"}),
    ],
)
def test_what_is_given_replaces_what_goes_with_it(about, given, wanted, tmp_path):
    """Else a recorded flag would be refused beside it, with no way to leave it out, or act unasked."""
    write(path := tmp_path / "a.png", **OURS | about)
    args = sample.repeated(sample.parser(), [f"--out={tmp_path}", *given], path)
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_lists_are_recorded_as_a1111_quotes_them():
    names = ['"a"', 'b"', "c,d", " e", 'x, "y\\\\', "z"]
    for values in (["a.safetensors", "b:0.5"], ["a, b.safetensors:0.8", "c"], names):
        assert like.split(like.join(values)) == values
    assert like.join(["a, b:0.8", "c d"]) == '"a, b:0.8", c d'
    assert like.split('a,b, c, "d') == ["a,b", "c", '"d']  # of before, and what is no JSON string


@pytest.mark.slow
def test_like_repeats_the_whole_of_a_torch_batch(lcm, tmp_path):
    """Images of the program and of the library; one of another size of batch differs by a level of 255 at most."""
    options = (f"--model={lcm}", f"--prompt={PROMPT}", "--seed=5", "--steps=2")
    first = generate(tmp_path / "a", *options, "--num_images=2", "--noise=torch-batch")
    second = generate(tmp_path / "b", f"--like={tmp_path / 'a' / '0000_0001.png'}")
    api = lcm_jax.load(lcm)(PROMPT, steps=2, seed=5, num_images=2, noise="torch-batch")
    for image, again, third in zip(first.values(), second.values(), api, strict=True):
        assert again.text == image.text and image.text["num_images"] == "2"
        assert difference(image, again) == difference(image, third) == 0
    pieces = generate(tmp_path / "c", f"--like={tmp_path / 'a' / '0000_0001.png'}", "--batch_size=1")
    assert max(map(difference, first.values(), pieces.values())) <= 1


def write(path, **texts) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)


def test_parameters_of_a1111_are_flags_as_far_as_they_go(lcm, tmp_path, capsys):
    path = tmp_path / "a1111.png"
    write(path, parameters=PARAMETERS)
    flags, lost = like.recorded(path)
    assert flags == {
        "prompt": "a small,\nred circle",
        "negative_prompt": "blue",
        "prompt_syntax": "a1111",
        "steps": "2",
        "sampler": "lcm",
        "guidance_scale": "1.5",
        "seed": "9",
        "width": "16",
        "height": "14",
        "num_images": "1",
        "noise": "torch",
    }
    assert lost == ["Model hash 0123abcd", 'Lora hashes "a: 1, b: 2"']
    options = ("--negative_prompt=", "--guidance_scale=8", "--height=16")  # as in the other tests: nothing is compiled
    (image,) = generate(tmp_path / "out", f"--like={path}", f"--model={lcm}", *options).values()
    assert (image.size, image.text["noise"], "negative_prompt" in image.text) == ((16, 16), "torch", False)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == f'warning: --like={path}: not repeated: Model hash 0123abcd, Lora hashes "a: 1, b: 2"'
    write(path, parameters=PARAMETERS + ", \x1b[2J: 1" + "".join(f", N{n}: 1" for n in range(30)))
    assert generate(tmp_path / "out", f"--like={path}", f"--model={lcm}", *options)
    (warning,) = capsys.readouterr().err.splitlines()
    assert r", \x1b[2J 1, N0 1" in warning and warning.endswith("N16 1 and 13 more")
    write(path, parameters="a\nSteps: 20, Sampler: Euler a, Seed: 1, Size: 512x512, Version: 1")
    flags, lost = like.recorded(path)
    assert (flags["noise"], lost) == ("nv", ["Sampler Euler a"]) and "sampler" not in flags  # its default is a GPU's


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (None, [], r"--like=\S+: is no file; give a PNG file"),
        ({}, [], r"--like=\S+: does not record how it was made; give a PNG file of lcm_jax.sample, or of A1111"),
        ({"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"}, [], "does not record how it was made"),
        ({"parameters": "a red circle"}, [], "does not record how it was made"),
        (
            {"parameters": "a\nSteps: 4, Seed: 1, Size: 8by8"},
            [],
            r"records what cannot be used \(.*--width: invalid int",
        ),
        ({"parameters": "a\nSteps: four, Seed: 1"}, [], r"records what cannot be used \(.*--steps: invalid int value"),
        ({"parameters": "a\nSteps: 4, Seed: 1, CFG scale: 0"}, ["--model=m"], r"--guidance_scale=0: .*use 1 or more"),
        ({"parameters": "a\nSteps: 4, Seed: 1"}, [], r"error: no model; give --model=FOLDER"),
        ({"parameters": "a\nSteps: 4, Seed: 1," + 9_000 * " "}, [], r"error: no model; give --model=FOLDER"),
        ({"parameters": "a\nSteps: 4"}, ["--model=m", "--noise=torch-batch", "--first_image=2"], "leave it out"),
    ],
)
def test_what_cannot_be_repeated_is_one_line(texts, options, message, tmp_path, capsys):
    if texts is not None:
        write(tmp_path / "a.png", **texts)
    assert sample.main([f"--out={tmp_path / 'out'}", f"--like={tmp_path / 'a.png'}", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_noise_that_does_not_exist_or_fit_is_refused(lcm):
    model = lcm_jax.load(lcm)
    with pytest.raises(BadArgument, match="^noise=cuda: choose one of jax, torch, torch-batch, nv$"):
        model(PROMPT, noise="cuda")
    with pytest.raises(BadArgument, match=r"^num_images=1000000000: noise torch-batch draws all images .* GiB"):
        model(PROMPT, noise="torch-batch", num_images=10**9)
