"""Inpainting against diffusers, the goldens of its loop, masks and crops, kept pixels, flags, and what is refused."""

import re
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from test_sample import compilations
from test_sampling_control import MIDDLE, picture, save_net

import lcm_jax
from lcm_jax import sample
from lcm_jax.diffusion import samplers, schedule, timesteps
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling import like
from lcm_jax.sampling.image import read_mask
from lcm_jax.sampling.image_to_image import Source, begin
from lcm_jax.sampling.inpaint import Mask, canvas, cells, crop_box
from lcm_jax.sampling.noise import TorchGenerator
from lcm_jax.sampling.request import make_request, warnings

PROMPT = "a red circle"


def hole(height: int = 16, width: int = 16, at: tuple[slice, slice] = np.s_[4:12, 6:14]) -> Image.Image:
    """A mask that is white there; on whole latents, where diffusers' nearest pixel is the maximum over a cell."""
    mask = np.zeros((height, width), np.uint8)
    mask[at] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def model():
    """A one-level LCM, conditioned on w; factor 2, 16 pixels."""
    return lcm_jax.load(tiny.folder("micro lcm"))


def nine(name: str, target: Path, w: int | None = None) -> Path:
    """The folder `name` with a UNet of 9 channels."""
    folder = tiny.copy(name, target)
    config = dict(tiny.UNETS["micro" if name == "micro lcm" else name], in_channels=9, time_cond_proj_dim=w)
    tiny.randomise(UNet2DConditionModel(**config), 5).save_pretrained(folder / "unet")
    return folder


def theirs(folder: Path, image, mask, scheduler=LCMScheduler, seed: int = 5, output_type: str = "latent", **options):
    """What diffusers' pipeline gives with its own draws: latents [b h w c], or Pillow images."""
    kind = StableDiffusionXLInpaintPipeline if (folder / "text_encoder_2").exists() else StableDiffusionInpaintPipeline
    pipe = tiny.torch_pipeline(kind, folder, scheduler)
    asked = dict(height=image.height, width=image.width) | options
    found = pipe(
        prompt=PROMPT,
        image=image,
        mask_image=mask,
        generator=tiny.generator(seed),
        output_type=output_type,
        **asked,
    ).images
    return found.numpy().transpose(0, 2, 3, 1) if output_type == "latent" else found


def ours(model, image, mask, seed: int = 5, **options) -> np.ndarray:
    """Latents [1 h w c]."""
    asked = make_request(model.pipeline, image=image, mask=mask, noise="torch", **options)
    noise, painting, _ = model.start(asked, [0], seed)
    scale, settings = asked.guidance_scale, asked.settings
    return np.asarray(model.latents(model.encode([PROMPT]), noise, scale, settings, painting=painting))


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (1, 0.5)])
def test_latents_of_diffusers_with_a_unet_that_knows_nothing_of_masks(model, steps, strength):
    want = theirs(
        tiny.folder("micro lcm"),
        picture(1),
        hole(),
        num_inference_steps=round(steps / strength),
        strength=strength,
        guidance_scale=8.0,
    )
    got = ours(model, picture(1), hole(), steps=steps, strength=strength, start="noise")
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)


def test_latents_of_diffusers_with_a_unet_of_nine_channels(tmp_path):
    """Conditioned on w, from noise; the image's latents are drawn for strengths below 1 alone."""
    folder = nine("micro lcm", tmp_path / "nine", 16)
    model = lcm_jax.load(folder)
    for steps, strength in ((4, 1.0), (1, 0.5)):
        options = dict(num_inference_steps=round(steps / strength), strength=strength, guidance_scale=8.0)
        want = theirs(folder, picture(1), hole(), **options)
        got = ours(model, picture(1), hole(), steps=steps, strength=strength)
        parity.close(got, want, rtol=0, of_max=parity.NETWORK)
    with pytest.raises(LcmError, match="the model is an inpainting model .*; give an image and a mask, or a text-to"):
        model(PROMPT)


CASES = [
    (name, channels, scheduler, scale)
    for name in ("sd1", "sd2", "sdxl")
    for channels in (4, 9)
    for scheduler, scale in ((LCMScheduler, 1.0), (LCMScheduler, 1.5), (DDIMScheduler, 5.0))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels", "scheduler", "scale"), CASES)
def test_latents_of_diffusers_for_the_family_in_one_pass_and_in_two(name, channels, scheduler, scale, tmp_path):
    folder = tiny.folder(name) if channels == 4 else nine(name, tmp_path / "nine")
    model = lcm_jax.load(folder)
    for steps, strength in ((4, 1.0), (1, 0.5)):
        options = dict(num_inference_steps=round(steps / strength), strength=strength, guidance_scale=scale)
        want = theirs(folder, picture(1), hole(), scheduler, **options)
        sampler = "lcm" if scheduler is LCMScheduler else "ddim"
        options = dict(sampler=sampler, steps=steps, strength=strength, guidance_scale=scale, start="noise")
        parity.close(ours(model, picture(1), hole(), **options), want, rtol=0, of_max=parity.NETWORK)


@pytest.mark.parametrize(
    "channels",
    [4, pytest.param(9, marks=pytest.mark.slow)],
)
def test_images_of_diffusers_with_a_crop_pasted_back(model, channels, tmp_path):
    """Off by a level in the hole, where both round; bit for bit outside."""
    folder = tiny.folder("micro lcm")
    if channels == 9:
        folder = nine("micro lcm", tmp_path / "nine", 16)
        model = lcm_jax.load(folder)
    image, mask = picture(1, 40, 48), hole(40, 48, np.s_[10:22, 20:28])
    want = theirs(
        folder,
        image,
        mask,
        output_type="pil",
        height=16,
        width=16,
        padding_mask_crop=2,
        num_inference_steps=4,
        strength=0.5 if channels == 4 else 1.0,
        guidance_scale=8.0,
    )[0]
    (got,) = model(
        PROMPT,
        image=image,
        mask=mask,
        seed=5,
        noise="torch",
        crop_padding=2,
        steps=2 if channels == 4 else 4,
        strength=0.5 if channels == 4 else 1.0,
    )
    got, want, white = (np.asarray(one, int) for one in (got, want, mask))
    assert got.shape == (40, 48, 3) and np.abs(got - want).max() <= 2
    np.testing.assert_array_equal(got[white == 0], np.asarray(image, int)[white == 0])
    assert np.abs(got - np.asarray(image, int))[white > 0].mean() > 8


def test_goldens_of_the_loop_without_a_network():
    noise_schedule = schedule.from_config(tiny.scheduler_config("epsilon"))
    pipeline = types.SimpleNamespace(
        schedule=noise_schedule, purpose="text-to-image", vae=types.SimpleNamespace(factor=1)
    )
    z = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 4, 8, 8).transpose(0, 2, 3, 1)
    encoder = types.SimpleNamespace(latents=lambda *_: z)
    right = np.arange(8) >= 4

    def model(x, t):
        return 0.5 * (x + jnp.roll(x, 1, axis=2)) * t / (t + 1)

    for (steps, strength, start), want in {
        (4, 0.5, "image"): (180.8548, -12.3022),
        (2, 1.0, "noise"): (901.5336, -72.5872),
        (1, 1.0, "noise"): (1099.0272, -111.0107),
        (2, 1.0, "image"): (902.1381, -72.5547),
        (1, 1.0, "image"): (1099.7976, -110.7967),
    }.items():
        mask = Mask((np.broadcast_to(right, (8, 8)),), start=start)
        source, t = Source((np.zeros((8, 8, 3), np.uint8),), mask=mask), timesteps.lcm(steps, 1000, 50, strength)
        draws = TorchGenerator(0)
        drawn = np.stack([draws.randn(256).reshape(1, 4, 8, 8).transpose(0, 2, 3, 1) for _ in range(steps)])
        noise, painting, _ = begin(pipeline, encoder, source, (8, 8), t, drawn, strength)
        found = samplers.lcm(model, noise[0], noise[1:], noise_schedule, t, painting.hook())
        found = np.asarray(found, np.float64)
        parity.close([abs(found).sum(), found.sum()], want, rtol=0, atol=1e-3)


def test_one_step_has_seen_the_surroundings_unless_it_starts_from_noise(model):
    inside = np.s_[0, 2:6, 3:7]
    for start, seen in (("image", True), ("noise", False)):
        one, other = (ours(model, picture(n), hole(), steps=1, start=start)[inside] for n in (1, 2))
        assert (np.abs(one - other).max() > 1e-4) == seen, start
    one, other = (ours(model, picture(n), hole(), steps=2, start="noise")[inside] for n in (1, 2))
    assert np.abs(one - other).max() > 1e-4


def test_cells_with_any_pixel_to_be_painted_are_painted():
    mask = np.zeros((64, 64), np.uint8)
    mask[12:52, 12:52] = 255
    found = cells(mask >= 128, 8)[:, :, 0]
    want = np.zeros((8, 8))
    want[1:7, 1:7] = 1
    np.testing.assert_array_equal(found, want)
    grey = np.full((16, 16), 127, np.uint8)
    grey[3, 5] = 128
    made = canvas(np.zeros((16, 16, 3), np.uint8), grey, Mask(()), 16, 16, "crop")
    assert np.argwhere(made.hole).tolist() == [[3, 5]]


def test_a_mask_without_white_at_the_size_of_the_request_is_refused():
    """Cut off at the left, or one pixel of many: what is painted would be nothing."""
    image = np.zeros((64, 128, 3), np.uint8)
    left, dot = (np.asarray(hole(64, 128, at)) for at in (np.s_[:, :8], np.s_[9:10, 9:10]))
    with pytest.raises(BadArgument, match="mask=128 x 64: nothing of its white is left in 64 x 64 pixels: it is cut"):
        canvas(image, left, Mask(()), 64, 64, "crop")
    assert canvas(image, left, Mask(()), 64, 64, "stretch").hole.any()
    for options in ({"padding": 64, "grow": 8}, {"padding": 0}):
        assert canvas(image, dot, Mask((), **options), 16, 32, "crop").hole.any()
    for options in ({}, {"padding": 64}):
        with pytest.raises(BadArgument, match="or too small there; use another fit, more white, or a larger size"):
            canvas(image, dot, Mask((), **options), 16, 32, "crop")


def test_crops_are_those_of_diffusers():
    mask = np.asarray(hole(64, 64, np.s_[12:52, 12:52]))
    assert crop_box(mask, 4, 512, 512) == (8, 8, 56, 56)
    assert crop_box(mask, 4, 256, 512) == (8, 0, 56, 64)
    rng = np.random.default_rng(0)
    for _ in range(200):
        h, w = rng.integers(20, 90, 2)
        (top, bottom), (left, right) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (h, w))
        mask = np.asarray(hole(h, w, np.s_[top:bottom, left:right]))
        padding, height, width = int(rng.integers(0, 20)), *(8 * int(side) for side in rng.integers(8, 100, 2))
        x1, y1, x2, y2 = VaeImageProcessor.get_crop_region(Image.fromarray(mask), width, height, padding)
        assert crop_box(mask, padding, height, width) == (y1, x1, y2, x2), (h, w, top, bottom, left, right)


def test_kept_pixels_are_those_of_the_image_bit_for_bit(model):
    image, mask = picture(1), np.asarray(hole())
    kept = np.asarray(image)
    for options, changed in (({}, mask > 0), ({"mask_blur": 1.0}, None), ({"mask_grow": 1, "mask_blur": 1.0}, None)):
        got = np.asarray(model(PROMPT, image=image, mask=mask, steps=1, **options)[0])
        made = canvas(kept, mask, Mask((), options.get("mask_blur", 0.0), options.get("mask_grow", 0)), 16, 16, "crop")
        np.testing.assert_array_equal(got[made.soft == 0], kept[made.soft == 0])
        assert (got != kept)[made.soft == 255].mean() > 0.5
        if changed is not None:
            np.testing.assert_array_equal(made.soft > 0, changed)
    assert (made.soft[3:13, 5:15] == 255).all() and 0 < made.soft[2, 10] < 255 and made.soft[0, 0] == 0
    raw = np.asarray(model(PROMPT, image=image, mask=mask, steps=1, paste=False)[0])
    assert (raw != kept)[mask == 0].mean() > 0.5
    # An image that is no multiple of a latent is cut, not resized.
    got = np.asarray(model(PROMPT, image=picture(3, 17, 19), mask=np.asarray(hole(17, 19)), steps=1)[0])
    np.testing.assert_array_equal(got[:3], np.asarray(picture(3, 17, 19))[:3, :18])


def test_one_program_serves_all_masks_and_strengths(model):
    found = [ours(model, picture(1), hole())]
    with compilations() as compiled:
        found.append(ours(model, picture(1), hole(at=np.s_[0:4, 0:4])))
        found.append(ours(model, picture(1), hole(), strength=0.8))
    assert compiled == []
    for n, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-3 for other in found[:n])


def test_masks_of_every_kind(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 16), np.uint8)
    image = Image.fromarray(values)
    alpha = Image.merge("RGBA", [Image.fromarray(255 - values)] * 3 + [image])
    solid = Image.merge("RGBA", [image] * 3 + [Image.new("L", image.size, 255)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, given, want, options in (
        ("grey.png", image, values, {}),
        ("alpha.png", alpha, values, {}),
        ("solid.png", solid, values, {}),
        ("rgb.png", image.convert("RGB"), values, {}),
        ("two.png", image.point(lambda v: 255 * (v >= 128)).convert("1"), np.where(values >= 128, 255, 0), {}),
        ("deep.png", Image.fromarray(values.astype(np.uint16) * 257), values, {}),
        ("turned.png", image, np.rot90(values, -1), {"exif": exif}),
    ):
        given.save(tmp_path / name, **options)
        np.testing.assert_array_equal(read_mask(tmp_path / name), want, err_msg=name)
        if not options:
            np.testing.assert_array_equal(read_mask(given), want, err_msg=name)
    for array in (values, np.repeat(values[:, :, None], 3, axis=2), values / np.float32(255)):
        np.testing.assert_array_equal(read_mask(array), values)
    np.testing.assert_array_equal(read_mask(values >= 128), np.where(values >= 128, 255, 0))


def test_a_mask_that_is_white_all_over_is_a_warning(model):
    for mask, count in ((hole(), 0), (hole(at=np.s_[:, :]), 1)):
        found = warnings(model.pipeline, make_request(model.pipeline, image=picture(1), mask=mask))
        assert len(found) == count
    assert re.search("the mask is all white: the whole image is painted, as from text alone", found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": hole(16, 18)}, "mask=.*: has 18 x 16 pixels, another aspect than its image's 16 x 16"),
        ({"mask": hole(at=np.s_[0:0, 0:0])}, "mask=.*: has no white, which is what is painted; invert"),
        ({"mask": "/nowhere.png"}, "mask=/nowhere.png: cannot be read"),
        ({"mask": np.full((16, 16), np.nan)}, "has values that are not finite"),
        ({"mask": [hole()] * 3}, "mask=3 masks: for 1 prompts; give one mask, or one for each prompt"),
        ({"mask_blur": -1.0}, "mask_blur=-1: out of range; choose 0 to 1024 pixels"),
        ({"mask_grow": 2000}, "mask_grow=2000: out of range"),
        ({"crop_padding": -1}, "crop_padding=-1: out of range"),
        ({"start": "grey"}, "start=grey: choose one of image, noise"),
        ({"mask": None, "mask_blur": 2.0}, "mask_blur=2.0: is for inpainting; give a mask"),
        ({"image": None}, "mask=.*: is for image to image; give an image"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(model, options, message):
    with compilations() as compiled, pytest.raises(BadArgument, match=message) as caught:
        model(PROMPT, **{"image": picture(1), "mask": hole()} | options)
    assert compiled == [] and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [9, 4])
def test_control_nets_steer_inpainting_of_both_kinds(channels, tmp_path):
    folder = tiny.copy("micro lcm", tmp_path / "model")
    tiny.randomise(UNet2DConditionModel(**MIDDLE | {"in_channels": channels}), 1).save_pretrained(folder / "unet")
    model = lcm_jax.load(folder)
    net = model.control_net(save_net(MIDDLE, 10, tmp_path / "net"))
    plain, steered = (
        np.asarray(model(PROMPT, image=picture(1), mask=hole(), steps=1, control=control)[0], int)
        for control in ([], [lcm_jax.Control(net, picture(2))])
    )
    white = np.asarray(hole()) > 0
    assert np.abs(plain - steered)[white].max() > 2
    np.testing.assert_array_equal(plain[~white], steered[~white])


def run(out: Path, *flags: str) -> dict[str, Image.Image]:
    words = [f"--model={tiny.folder('micro lcm')}", f"--out={out}", "--seed=5", "--steps=1", "--prompt=a"]
    assert sample.main([*words, *flags]) == 0
    return {path.name: Image.open(path) for path in sorted(out.glob("*.png"))}


def test_the_program_paints_a_folder_with_masks_of_its_names_and_repeats_one(tmp_path):
    for kind in ("in", "masks"):
        (tmp_path / kind).mkdir()
    for n, name in enumerate("ab"):
        picture(n, 20, 24).save(tmp_path / "in" / f"{name}.png")
        hole(20, 24, np.s_[4 + n : 12, 6:14]).save(tmp_path / "masks" / f"{name}.png")
        (tmp_path / "masks" / f"{name}.json").write_text("{}")  # sorts before it
    flags = [f"--image={tmp_path / 'in'}", f"--mask={tmp_path / 'masks'}", "--num_images=1", "--batch_size=2"]
    images = run(tmp_path / "out", *flags, "--crop_padding=2", "--mask_blur=1")
    assert [image.size for image in images.values()] == [(24, 20)] * 2
    assert like.recorded(tmp_path / "out" / "0000_0000.png")[0]["image"].endswith("a.png")
    for name, image in zip("ab", images.values(), strict=True):
        before = np.asarray(Image.open(tmp_path / "in" / f"{name}.png"))
        changed = np.argwhere((np.asarray(image) != before).any(axis=2))
        assert len(changed) and (changed >= 1).all() and (changed <= (15, 17)).all()
    about = images["0001_0000.png"].text
    keys = {"mask": str(tmp_path / "masks" / "b.png"), "mask_blur": "1.0", "crop_padding": "2", "size": "16x16"}
    assert {key: about[key] for key in keys} == keys and about["strength"] == "1.0" and "paste" not in about
    assert like.recorded(tmp_path / "out" / "0001_0000.png")[1] == []
    (again,) = run(tmp_path / "again", f"--like={tmp_path / 'out' / '0001_0000.png'}").values()
    assert again.text == about | {"prompt": again.text["prompt"]}
    assert np.abs(np.asarray(again, int) - np.asarray(images["0001_0000.png"], int)).max() <= 1  # of another batch


def test_a_mask_that_is_cut_off_is_named_before_the_first_image_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample.Generator, "generate", None)
    for name, at in (("a", np.s_[:, 20:30]), ("b", np.s_[:, :4])):
        for kind, one in (("in", picture(1, 16, 48)), ("masks", hole(16, 48, at))):
            (tmp_path / kind).mkdir(exist_ok=True)
            one.save(tmp_path / kind / f"{name}.png")
    words = [
        f"--model={tiny.folder('micro lcm')}",
        f"--out={tmp_path / 'out'}",
        "--prompt=a",
        "--width=16",
        "--height=16",
    ]
    assert sample.main([*words, f"--image={tmp_path / 'in'}", f"--mask={tmp_path / 'masks'}"]) == 2
    wanted = f"--mask={tmp_path / 'masks' / 'b.png'}: nothing of its white is left in 16 x 16 pixels"
    assert wanted in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_flags_are_one_line_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample.flags, "load_model", None)
    picture(1).save(tmp_path / "image.png")
    hole(at=np.s_[0:0, 0:0]).save(tmp_path / "black.png")
    (tmp_path / "masks").mkdir()
    image = f"--image={tmp_path / 'image.png'}"
    for flags, message in (
        ([f"--mask={tmp_path / 'black.png'}"], r"--mask=\S+: is for image to image; give --image"),
        ([image, f"--mask={tmp_path / 'black.png'}"], r"--mask=\S+black.png: has no white"),
        ([image, f"--mask={tmp_path / 'masks'}"], r"--mask=\S+masks: has no image, the mask of \S+image.png; add it"),
        ([image, "--mask_blur=2"], "--mask_blur=2.0: is for inpainting; give a mask"),
    ):
        assert sample.main(["--model=m", f"--out={tmp_path / 'bad'}", "--prompt=a", *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
