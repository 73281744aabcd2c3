"""Decoding: every mode and format written by Pillow or byte by byte; the oracles are Pillow's operations, closed forms
and invariants. OpenCV is held to Pillow's pixels."""

import io
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
from image_kit import encoded, noise
from PIL import Image, ImageOps

from lcm_jax.data import images
from lcm_jax.data.records import BadRecordError
from lcm_jax.errors import LcmError

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:UserWarning") for text in ("Corrupt EXIF", "Truncated File")]
DECODERS = ("pillow", "opencv")


def smooth(height, width, seed=0):
    """Photo-like: noise of low frequency."""
    small = Image.fromarray(noise(5, 7, seed=seed))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(values, colour_type, depth, extra=(), after=(), size=None):
    """A PNG byte by byte; `values` [h w c] of uint8 or uint16."""
    height, width = size or values.shape[:2]
    rows = values.astype(">u2" if depth == 16 else "u1").reshape(len(values), -1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(body)), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


def over_white(colour, alpha):
    a = alpha[..., None] / 255
    return colour * a + 255 * (1 - a)


def apart(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


def orientation(number):
    exif = Image.Exif()
    exif[images.ORIENTATION] = number
    return exif


# Modes


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "form, options",
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("JPEG2000", {})],
)
def test_lossless_formats_come_back_equal(form, options, decoder):
    image = noise(23, 31)
    pixels = images.decode(encoded(image, form, **options), decoder)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, image)


@pytest.mark.parametrize("decoder", DECODERS)
def test_grey_gets_three_equal_channels(decoder):
    grey = noise(9, 14, 0)
    for data in (encoded(grey), encoded(grey, "TIFF"), png(grey, 0, 8)):
        np.testing.assert_array_equal(images.decode(data, decoder), np.repeat(grey[..., None], 3, axis=2))
    bits = grey > 127
    np.testing.assert_array_equal(images.decode(encoded(bits), decoder)[..., 1], bits * np.uint8(255))


@pytest.mark.parametrize("decoder", DECODERS)
def test_transparency_lies_over_white(decoder):
    colour, alpha = noise(12, 17), noise(12, 17, 0, seed=1)
    alpha[:3], alpha[3:6] = 0, 255
    rgba = np.dstack([colour, alpha])
    for data in (encoded(rgba), encoded(rgba, "TIFF"), encoded(rgba, "WEBP", lossless=True, exact=True)):
        pixels = images.decode(data, decoder)
        assert apart(pixels, over_white(colour, alpha)) <= 1
        assert (pixels[:3] == 255).all() and (pixels[3:6] == colour[3:6]).all()
    grey = images.decode(encoded(Image.fromarray(np.dstack([colour[..., 0], alpha]), "LA")), decoder)
    assert apart(grey, over_white(colour[..., :1].repeat(3, 2), alpha)) <= 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_palettes_with_and_without_transparency(decoder):
    colours, index = noise(1, 16)[0], noise(11, 13, 0) % 16
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    for form in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(images.decode(encoded(image, form), decoder), colours[index])
    for form in ("PNG", "GIF"):
        pixels = images.decode(encoded(image, form, transparency=5), decoder)
        np.testing.assert_array_equal(pixels, np.where((index == 5)[..., None], 255, colours[index]))
    alpha = noise(1, 16, 0, seed=2)[0]
    pixels = images.decode(encoded(image, transparency=alpha.tobytes()), decoder)
    assert apart(pixels, over_white(colours[index], alpha[index])) <= 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_sixteen_bits_are_scaled_not_clipped(decoder):
    deep = np.random.default_rng(0).integers(0, 65536, (10, 15), dtype=np.uint16)
    deep[0, :2] = 0, 65535
    for data in (encoded(deep), encoded(deep, "TIFF"), png(deep, 0, 16)):
        pixels = images.decode(data, decoder)
        assert apart(pixels, deep[..., None] / 257) <= 1
        assert pixels.min() == 0 and pixels.max() == 255
    colour = np.random.default_rng(1).integers(0, 65536, (10, 15, 3), dtype=np.uint16)
    assert apart(images.decode(png(colour, 2, 16), decoder), colour / 257) <= 1
    for data in (
        encoded(Image.frombytes("I;16B", (15, 10), deep.astype(">u2").tobytes()), "TIFF"),
        b"P5 15 10 65535 " + deep.astype(">u2").tobytes(),
    ):
        assert apart(images.decode(data, decoder), deep[..., None] / 257) <= 1
    grey_alpha = np.dstack([deep, np.full_like(deep, 65535)])
    assert apart(images.decode(png(grey_alpha, 4, 16), decoder), deep[..., None] / 257) <= 1


def test_a_transparent_value_of_deep_grey_is_white():
    deep = np.array([[0, 1000, 1001, 65535]], np.uint16)
    pixels = images.decode(png(deep, 0, 16, extra=[chunk(b"tRNS", struct.pack(">H", 1000))]))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 255, 3, 255])


@pytest.mark.parametrize("values", [np.full((3, 4), 70000, np.int32), np.full((3, 4), -1, np.int32)])
def test_values_of_unknown_range_are_refused(values):
    with pytest.raises(BadRecordError, match="16 bits"):
        images.decode(encoded(values, "TIFF"))
    with pytest.raises(BadRecordError, match="floats"):
        images.decode(encoded(values.astype(np.float32), "TIFF"))


@pytest.mark.parametrize("decoder", DECODERS)
def test_cmyk(decoder):
    cmyk = smooth(24, 32)
    cmyk = np.dstack([cmyk, smooth(24, 32, seed=1)[..., 0]])
    shown = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:]) / 255
    image = Image.fromarray(cmyk, "CMYK")
    assert apart(images.decode(encoded(image, "TIFF"), decoder), shown) <= 1
    jpeg = encoded(image, "JPEG", quality=100)  # with Adobe's marker, inverted
    assert b"Adobe" in jpeg
    assert apart(images.decode(jpeg, decoder), shown) <= 8
    np.testing.assert_array_equal(images.decode(jpeg, decoder), images.decode(jpeg))


@pytest.mark.parametrize("decoder", DECODERS)
def test_ycck(decoder):
    """YCCK is CMYK whose first three channels, as RGB complements, were converted to YCbCr; the marker has a 2 then."""
    rgb, black = smooth(24, 32), smooth(24, 32, seed=1)[..., 0]
    ycc = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    stored = np.dstack([255 - ycc, black])  # Pillow inverts all four when it writes
    jpeg = encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=100)
    at = jpeg.index(b"Adobe") + 11
    assert jpeg[at] == 0
    ycck = jpeg[:at] + b"\x02" + jpeg[at + 1 :]
    # libjpeg: C = 255 - R of the stored YCbCr, and Pillow inverts what it reads
    shown = (255 - rgb.astype(float)) * (255.0 - black[..., None]) / 255
    assert apart(images.decode(ycck, decoder), shown) <= 8


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("form, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_the_first_frame_of_an_animation(form, options, decoder):
    frames = [Image.new("RGB", (20, 14), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(images.decode(data, decoder), np.asarray(frames[0]))


@pytest.mark.parametrize("decoder", DECODERS)
def test_colour_profiles_change_nothing(decoder):
    from PIL import ImageCms

    image = smooth(32, 48)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for form in ("JPEG", "PNG"):
        with_profile = encoded(image, form, icc_profile=profile)
        assert Image.open(io.BytesIO(with_profile)).info["icc_profile"] == profile
        np.testing.assert_array_equal(
            images.decode(with_profile, decoder), images.decode(encoded(image, form), decoder)
        )


# Orientation


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("number", range(1, 9))
def test_orientation_is_applied(number, decoder):
    image = smooth(21, 34)
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encoded(image, form, exif=orientation(number))
        pixels = images.decode(data, decoder)
        np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
        assert images.header_size(data) == pixels.shape[:2] == ((34, 21) if number >= 5 else (21, 34))


@pytest.mark.parametrize("decoder", DECODERS)
def test_orientation_by_what_the_number_says(decoder):
    """EXIF 2.3, 4.6.4: the sides of the image that row 0 and column 0 of the file are at."""
    sides = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}
    stored = np.full((16, 32, 3), 128, np.uint8)
    stored[:8, :16] = 255  # the corner of row 0 and column 0
    stored[:8, 16:] = 64  # the rest of row 0's side
    for number, (row0, column0) in sides.items():
        pixels = images.decode(encoded(stored, "JPEG", quality=100, exif=orientation(number)), decoder)
        bright = np.argwhere(pixels[..., 0] > 200).mean(axis=0) / pixels.shape[:2] < 0.5
        assert "T" in row0 + column0 if bright[0] else "B" in row0 + column0
        assert "L" in row0 + column0 if bright[1] else "R" in row0 + column0
        dark = np.argwhere(pixels[..., 0] < 96).mean(axis=0) / pixels.shape[:2]
        side = {"T": dark[0] < 0.5, "B": dark[0] > 0.5, "L": dark[1] < 0.5, "R": dark[1] > 0.5}
        assert side[row0]


def test_a_png_may_state_its_orientation_after_its_pixels():
    image = noise(6, 10)
    exif = chunk(b"eXIf", orientation(6).tobytes().removeprefix(b"Exif\0\0"))
    data = png(image, 2, 8, after=[exif])
    np.testing.assert_array_equal(images.decode(data), np.rot90(image, -1))
    assert images.header_size(data) == (10, 6)


def test_the_size_of_a_png_is_read_without_its_pixels():
    whole = encoded(noise(40, 50))
    assert images.header_size(whole[:60]) == (40, 50)
    assert images.header_size(encoded(smooth(300, 400), "JPEG")[:700]) == (300, 400)
    with pytest.raises(BadRecordError):
        images.decode(whole[:60])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("block", [b"Exif\0\0garbage here", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_unreadable_exif_means_upright(block, decoder):
    jpeg = encoded(smooth(24, 32), "JPEG")
    app1 = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    np.testing.assert_array_equal(images.decode(jpeg[:2] + app1 + jpeg[2:], decoder), images.decode(jpeg, decoder))
    odd = encoded(smooth(24, 32), "JPEG", exif=orientation(9))
    np.testing.assert_array_equal(images.decode(odd, decoder), images.decode(jpeg, decoder))


# Bad files


def jpeg_with_thumbnail(**options):
    """A JPEG whose EXIF block contains another one, complete with its end marker."""
    jpeg, thumbnail = encoded(smooth(120, 160), "JPEG", **options), encoded(smooth(16, 16), "JPEG")
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


@pytest.fixture
def lenient(monkeypatch):
    """OpenCV as before release 5: the missing part of a JPEG is grey, without an error."""
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: np.full((120, 160, 3), 128, np.uint8))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_truncated_jpegs(options, decoder, lenient):
    whole = jpeg_with_thumbnail(quality=90, **options)
    assert images.decode(whole, decoder).shape == (120, 160, 3)
    end = len(whole)
    for length in (1, 2, 20, 500, 1000, end // 2, end * 9 // 10, end - 20, end - 2, end - 1):
        with pytest.raises(BadRecordError, match="truncated|not an image|undecodable"):
            images.decode(whole[:length], decoder)


def test_installed_opencv_and_truncated_jpegs():
    whole = jpeg_with_thumbnail()
    assert apart(images.decode(whole, "opencv"), images.decode(whole)) <= 1
    for length in (len(whole) // 2, len(whole) - 1):
        with pytest.raises(BadRecordError, match="truncated"):
            images.decode(whole[:length], "opencv")


def test_bytes_after_the_end_do_no_harm(lenient):
    trailing = jpeg_with_thumbnail() + bytes(100)
    assert images.decode(trailing).shape == (120, 160, 3)
    assert (images.decode(trailing, "opencv") == 128).all()  # decoded by OpenCV


def test_pillow_judges_what_opencv_refuses(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: None)
    jpeg = jpeg_with_thumbnail()
    np.testing.assert_array_equal(images.decode(jpeg, "opencv"), images.decode(jpeg))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_truncated_files_of_other_formats(form, decoder):
    whole = encoded(noise(60, 80), form)
    assert images.decode(whole, decoder).shape == (60, 80, 3)
    for length in (9, len(whole) // 2):
        with pytest.raises(BadRecordError):
            images.decode(whole[:length], decoder)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_no_truncation_yields_other_pixels(form):
    """A cut is noticed, unless what is missing was not needed, as the end mark of a PNG."""
    whole = encoded(noise(20, 30), form)
    image, refused = images.decode(whole), 0
    for length in range(len(whole)):
        try:
            np.testing.assert_array_equal(images.decode(whole[:length]), image)
        except BadRecordError:
            refused += 1
    assert refused >= len(whole) - 20


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "0 bytes"),
        (bytes(100), "not an image"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image|undecodable"),
        (encoded(noise(4, 4), "EPS"), "not an image"),
        (png(np.zeros((1, 1, 3)), 2, 8, size=(0, 5)), "image"),
        (png(np.zeros((1, 1, 3)), 2, 8, size=(9000, 10000)), "9000 x 10000"),
        (png(np.zeros((1, 1, 3)), 2, 8, size=(60000, 60000)), "Bomb"),
        (np.zeros((0, 5, 3), np.uint8), "no size"),
        (np.zeros((5, 5), np.uint8), r"uint8 \[5, 5\]"),
        (np.zeros((5, 5, 3), np.float32), "float32"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_images(data, reason, decoder):
    with pytest.raises(BadRecordError, match=reason) as caught:
        images.decode(data, decoder)
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
    with pytest.raises(BadRecordError, match=reason):
        images.header_size(data)


def test_arrays_pass():
    image = noise(5, 7)
    assert images.decode(image) is image and images.header_size(image) == (5, 7)


def test_lack_of_memory_is_not_a_bad_record(monkeypatch):
    def exhausted(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(images.Image, "open", exhausted)
    with pytest.raises(MemoryError):
        images.decode(b"some bytes")


# OpenCV against Pillow


@pytest.mark.parametrize(
    "options", [{}, {"quality": 90}, {"progressive": True}, {"subsampling": 0}, {"subsampling": "4:2:2"}]
)
def test_opencv_decodes_as_pillow(options):
    for image in (smooth(61, 87), noise(64, 40), noise(33, 20, 0)):
        data = encoded(image, "JPEG", **options)
        assert apart(images.decode(data, "opencv"), images.decode(data)) <= 1


def test_without_opencv_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for call in (lambda: images.decode(encoded(noise(4, 4), "JPEG"), "opencv"), lambda: images.check_choice("opencv")):
        with pytest.raises(LcmError, match=r"pip install 'lcm_jax\[data\]'") as caught:
            call()
        assert not isinstance(caught.value, BadRecordError)
