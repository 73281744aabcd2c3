"""Images that a user gives: every kind becomes upright RGB of 8 bits, and what is none is one line."""

import struct
import zlib

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from lcm_jax.errors import BadArgument
from lcm_jax.sampling.image import FITS, fitted, parse_colour, read_image, resized

RGB = np.random.default_rng(0).integers(0, 256, (65, 70, 3), np.uint8)
GREY = np.repeat(RGB[:, :, :1], 3, axis=2)


def test_every_kind_of_image_is_rgb(tmp_path):
    image = Image.fromarray(RGB)
    alpha = np.full(RGB.shape[:2], 255, np.uint8)
    alpha[:, :30] = 0
    clear = Image.fromarray(np.dstack([RGB, alpha]))
    on_white = np.where(alpha[:, :, None] == 0, 255, RGB)
    palette = image.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    for name, given, want, options in (
        ("rgb.png", image, RGB, {}),
        ("alpha.png", clear, on_white, {}),
        ("palette.png", palette, np.asarray(palette.convert("RGB")), {}),
        ("deep.png", Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257), GREY, {}),
        ("grey.png", Image.fromarray(RGB[:, :, 0]), GREY, {}),
        ("turned.png", image, np.rot90(RGB, -1), {"exif": exif}),
    ):
        given.save(tmp_path / name, **options)
        np.testing.assert_array_equal(read_image(tmp_path / name), want, err_msg=name)
        if not options:
            np.testing.assert_array_equal(read_image(given), want, err_msg=name)
    np.testing.assert_array_equal(read_image(RGB), RGB)
    np.testing.assert_array_equal(read_image(RGB / np.float32(255)), RGB)


def test_resizing_is_pillows_lanczos_stretched():
    want = np.asarray(Image.fromarray(RGB).resize((48, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resized(RGB, 64, 48), want)
    np.testing.assert_array_equal(resized(RGB, 65, 70), RGB)


def test_a_strip_is_cropped_before_it_is_resized(monkeypatch):
    """Resized as a whole, 1 x 1,000,000 pixels would take 800 GB."""
    assert fitted(np.zeros((1, 1_000_000, 3), np.uint8), 512, 512, "crop").shape == (512, 512, 3)
    assert fitted(np.zeros((1_000_000, 1), np.uint8), 512, 512, "crop").shape == (512, 512)
    large = RGB.repeat(4, axis=0).repeat(4, axis=1)  # enlarged, the order of the two directions shows in noise
    for height, width in ((96, 40), (40, 96), (129, 64)):
        whole = fitted(large, height, width, "crop")
        with monkeypatch.context() as patch:
            patch.setattr("lcm_jax.sampling.image.images.MAX_PIXELS", 1)
            part = fitted(large, height, width, "crop")
        assert np.abs(part.astype(int) - whole).max() <= 1  # coefficients have 8 bits


@pytest.mark.parametrize("fit", FITS)
def test_the_geometry_of_diffusers(fit):
    mode = {"crop": "crop", "stretch": "default", "fill": "fill"}[fit]
    for height, width in ((64, 64), (40, 96), (96, 40), (128, 24), (130, 140)):
        want = np.asarray(VaeImageProcessor().resize(Image.fromarray(RGB), height, width, resize_mode=mode))
        got = fitted(RGB, height, width, fit)
        if fit == "fill":  # its bars are a filter's mean of the rows at the border; ours are the border
            h, w = min(height, width * 65 // 70), min(width, height * 70 // 65)
            top, left = height // 2 - h // 2, width // 2 - w // 2
            np.testing.assert_array_equal(got[:top], np.repeat(got[top : top + 1], top, axis=0))
            np.testing.assert_array_equal(got[:, left + w :], got[:, [left + w - 1] * (width - left - w)])
            got, want = (one[top : top + h, left : left + w] for one in (got, want))
        np.testing.assert_array_equal(got, want, err_msg=f"{height} {width}")


def test_transparency_is_laid_over_the_background(tmp_path):
    alpha = np.full(RGB.shape[:2], 255, np.uint8)
    alpha[:, :30] = 0
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "clear.png")
    deep = Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", transparency=257 * int(RGB[0, 0, 0]))
    for colour, values in (("white", (255,) * 3), ("#102030", (16, 32, 48)), ((1, 2, 3), (1, 2, 3))):
        found = parse_colour("background", colour)
        for name, want in (
            ("clear.png", np.where(alpha[:, :, None] == 0, values, RGB)),
            ("deep.png", np.where(GREY == RGB[0, 0, 0], values, GREY)),
        ):
            got = read_image(tmp_path / name, background=found)
            np.testing.assert_array_equal(got, want, err_msg=f"{name} {colour}")
    for bad in ("reddish", "#12", (1, 2), 3):
        with pytest.raises(BadArgument, match="background=.*: is no colour; give a name or #rrggbb"):
            parse_colour("background", bad)


def test_what_is_no_image_is_one_line(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(RGB).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:500])
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\1IDAT")
    floats = RGB / 255
    for given, message in (
        (tmp_path / "nowhere.png", r"nowhere.png: cannot be read \(No such file or directory\); give an image file"),
        (tmp_path, "cannot be read .Is a directory.; give an image file"),
        (tmp_path / "text.png", "text.png: not an image of a known format; give one image, such as a PNG"),
        (tmp_path / "cut.jpg", "cut.jpg: undecodable image"),
        (tmp_path / "moving.gif", "moving.gif: has 2 frames; give one image"),
        (Image.open(tmp_path / "moving.gif"), "has 2 frames; give one image"),
        (tmp_path / "huge.png", r"huge.png: undecodable image: .*900000000 pixels\) exceeds limit"),
        (RGB[:63], r"picture=uint8 \[63, 70, 3\]: has 70 x 63 pixels; each side needs at least 64"),
        (RGB.astype(np.int32), "is no image: arrays are .h w 3., of uint8, or of floats"),
        (RGB[:, :, 0], "is no image"),
        (np.where(floats > 0.9, np.nan, floats), "has values that are not finite"),
        (2 * floats - 1, r"has floats from -1 to 1, not in \[0, 1\]"),
    ):
        with pytest.raises(BadArgument, match=message) as caught:
            read_image(given, "picture")
        assert caught.value.name == "picture" and "\n" not in str(caught.value)
