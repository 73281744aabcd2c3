"""Encoded pictures -> uint8 RGB [h w 3], resized and cropped to one size, with SDXL's size and crop conditions.

Decoding makes of every file an upright picture of 8 bits per channel: EXIF orientation is applied, transparency lies
over white, grey becomes three equal channels, 16 bits keep their high byte, CMYK and YCCK follow Pillow (Adobe's
inverted convention), and of an animation the first frame is taken. Embedded colour (ICC) profiles are left alone: the
numbers in the file are taken for sRGB.

A picture H x W (upright) is brought to the target h x w in this order:

    flip left to right;  resize to (H', W') = max(target, round(size * max(h / H, w / W)));  crop (h, w) at (top, left)

and SDXL's time_ids are (H, W, top, left, h, w): top and left are pixels of the flipped, resized picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from lcm_jax.data.records import BadRecord
from lcm_jax.errors import LcmError

# Only these are tried: some other readers of Pillow start programs (EPS) or read what is not a picture.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's own mark of a decompression bomb: a quarter of a GiB as RGB
ORIENTATION = 0x0112  # EXIF tag
# A PNG may tell its orientation after the pixels. Where none of these occurs, it tells none.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
END_OF_JPEG, START_OF_SCAN = b"\xff\xd9", 0xDA

FILTERS = {
    "pillow": {
        "lanczos": Image.Resampling.LANCZOS,
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "box": Image.Resampling.BOX,
        "area": Image.Resampling.BOX,
    },
    "opencv": {"area": None},  # the one filter of OpenCV that antialiases
}


def check_choice(decoder: str, resize_filter: str = "area") -> None:
    """Raises LcmError where `decoder` is unknown or not installed, or cannot resize with `resize_filter`."""
    if decoder not in FILTERS:
        raise LcmError(f"--config.data.decoder={decoder!r} is unknown; choose one of {', '.join(FILTERS)}")
    if resize_filter not in FILTERS[decoder]:
        raise LcmError(
            f"--config.data.resize_filter={resize_filter!r} does not go with --config.data.decoder="
            f"{decoder!r}, which has {', '.join(FILTERS[decoder])}"
        )
    if decoder == "opencv":
        _opencv()


def _opencv():
    try:
        import cv2
    except ImportError:
        raise LcmError("--config.data.decoder='opencv' needs opencv: pip install 'lcm_jax[data]'") from None
    return cv2


@contextlib.contextmanager
def _bad_record() -> Iterator[None]:
    """Whatever a decoder says of a file becomes a BadRecord of one line; a broken file may make it raise anything."""
    try:
        yield
    except (LcmError, MemoryError):
        raise
    except Image.UnidentifiedImageError:  # its message holds an address, which differs from run to run
        raise BadRecord("not an image of a known format") from None
    except Exception as error:
        raise BadRecord(f"undecodable image: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _open(data: bytes) -> Image.Image:
    """The picture with its header read, of a size that may be decoded."""
    if not data:
        raise BadRecord("image of 0 bytes")
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(picture.height, picture.width)
    return picture


def _check_size(height: int, width: int) -> None:
    if not (height and width):
        raise BadRecord(f"image of no size: height {height}, width {width}")
    if height * width > MAX_PIXELS:
        raise BadRecord(f"image of {height} x {width} pixels, more than {MAX_PIXELS} are not decoded")


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BadRecord(f"image array is {image.dtype} {list(image.shape)}, not uint8 [h w 3]")
    _check_size(*image.shape[:2])
    return image


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where none is told or, as viewers have it, where the EXIF block is unreadable."""
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, LookupError, TypeError, OverflowError):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: the first row of the file is the top, bottom, left or right of the picture."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Deep grey -> its high byte (Pillow's own conversion clips at 255); a transparent value becomes white."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadRecord(f"grey values from {values.min()} to {values.max()}, not of 16 bits")
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in picture.info:
        grey[values == picture.info["transparency"]] = 255
    return Image.fromarray(grey)


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB, transparency over white."""
    if picture.mode == "F":
        raise BadRecord("image of floats, whose range is not known")
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _has_end(jpeg: bytes) -> bool:
    """Whether a JPEG has its end marker after the pixels' first byte; a thumbnail before them has one of its own."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        if jpeg[at + 1] == START_OF_SCAN:
            return jpeg.rfind(END_OF_JPEG, at) >= 0
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _decode_opencv(data: bytes, picture: Image.Image) -> np.ndarray | None:
    """uint8 RGB [h w 3], not yet upright; None where Pillow must decode or judge."""
    if picture.format != "JPEG" or picture.mode not in ("L", "RGB") or not _has_end(data):
        return None
    cv2 = _opencv()
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode(data: bytes | np.ndarray, decoder: str = "pillow") -> np.ndarray:
    """An upright RGB picture.

    Args:
        data: a file's bytes (`FORMATS`), or uint8 [h w 3], which is checked and returned as it is.
        decoder: "pillow", the reference, or "opencv", which decodes complete grey and RGB JPEGs. It leaves to Pillow
            what it does not do alike (CMYK, palettes, transparency, 16 bits), what it is little faster at (PNG, WebP,
            ...), and everything that it or the test for a JPEG's end refuses, so that both find the same records bad.

    Returns:
        uint8 [h w 3].

    Raises:
        BadRecord: with the reason: truncated, empty, no image, of no size, of more than `MAX_PIXELS`. A JPEG whose
            pixels are damaged but which goes on to its end marker is decoded as libjpeg does, partly grey.
    """
    if isinstance(data, np.ndarray):
        return _check_array(data)
    check_choice(decoder, "area")
    with _bad_record():
        picture = _open(data)
        image = _decode_opencv(data, picture) if decoder == "opencv" else None
        if image is None:
            picture.load()  # first: mode and orientation count as they are after it (Pillow turns a TIFF here)
            image = np.asarray(_rgb(picture))
        return _upright(image, _orientation(picture))


def header_size(data: bytes | np.ndarray) -> tuple[int, int]:
    """(height, width) of what `decode` would return, from the header alone.

    Raises:
        BadRecord: no image, or of a size that is not decoded. A file with a good header may still be truncated.
    """
    if isinstance(data, np.ndarray):
        return _check_array(data).shape[:2]
    with _bad_record():
        picture = _open(data)
        # Pillow states a TIFF's size upright; of a PNG it would decode all to look for an orientation
        told = picture.format != "TIFF" and (picture.format != "PNG" or any(tag in data for tag in PNG_ORIENTATION))
        turned = told and _orientation(picture) >= 5
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


@dataclasses.dataclass(frozen=True)
class Crop:
    """The size of a picture after the resize, and the first row and column of the target in it, in its pixels."""

    resized_height: int
    resized_width: int
    top: int
    left: int


def cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size (H', W') that covers `target` (h, w) with the aspect of `size` (H, W): equal to it on one axis.

    The other axis is rounded to the nearest integer, halves up, and is never below the target. Computed in integers.
    """
    (height, width), (h, w) = size, target
    if h * width >= w * height:
        return h, max(w, (2 * width * h + height) // (2 * height))
    return max(h, (2 * height * w + width) // (2 * width)), w


def place(size: tuple[int, int], target: tuple[int, int], crop: str = "center", draws: Sequence[float] = ()) -> Crop:
    """Where the target lies in a picture of `size`, both (height, width).

    "center" halves the margins, rounded down; "random" takes `draws` = (u_top, u_left) in [0, 1), so that every
    position is as likely as any other.
    """
    height, width = cover(size, target)
    margins = height - target[0], width - target[1]
    if crop == "center":
        return Crop(height, width, margins[0] // 2, margins[1] // 2)
    if crop != "random":
        raise LcmError(f'--config.data.crop={crop!r} is unknown; choose "random" or "center"')
    if len(draws) != 2 or not all(0 <= u < 1 for u in draws):
        raise LcmError(f"a random crop takes two draws in [0, 1), got {list(draws)}")
    top, left = (min(math.floor(u * (margin + 1)), margin) for u, margin in zip(draws, margins, strict=True))
    return Crop(height, width, top, left)


def _resize_pillow(image: np.ndarray, crop: Crop, height: int, width: int, resize_filter: str, flip: bool):
    """Resize and crop. Only the crop's part of the picture is resized, which is the same to 1 level of 255."""
    picture = Image.fromarray(image)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    kernel = FILTERS["pillow"][resize_filter]
    if kernel == Image.Resampling.BOX:  # a pixel is inside or outside the box: the part's rounding would decide
        whole = np.asarray(picture.resize((crop.resized_width, crop.resized_height), kernel))
        return whole[crop.top : crop.top + height, crop.left : crop.left + width]
    across, down = picture.width / crop.resized_width, picture.height / crop.resized_height
    part = (crop.left * across, crop.top * down, (crop.left + width) * across, (crop.top + height) * down)
    return np.asarray(picture.resize((width, height), kernel, box=part))


def _resize_opencv(image: np.ndarray, crop: Crop, height: int, width: int, flip: bool) -> np.ndarray:
    cv2 = _opencv()
    whole = cv2.resize(
        cv2.flip(image, 1) if flip else image, (crop.resized_width, crop.resized_height), interpolation=cv2.INTER_AREA
    )
    return whole[crop.top : crop.top + height, crop.left : crop.left + width]


def _resized(
    image: np.ndarray, crop: Crop, height: int, width: int, resize_filter: str, flip: bool, decoder: str
) -> np.ndarray:
    if image.shape[:2] == (crop.resized_height, crop.resized_width):
        image = image[:, ::-1] if flip else image
        return image[crop.top : crop.top + height, crop.left : crop.left + width]
    enlarged = crop.resized_height > image.shape[0] or crop.resized_width > image.shape[1]
    if enlarged and resize_filter in ("box", "area"):  # which would repeat pixels
        return _resize_pillow(image, crop, height, width, "bilinear", flip)
    if decoder == "opencv":
        return _resize_opencv(image, crop, height, width, flip)
    return _resize_pillow(image, crop, height, width, resize_filter, flip)


def fit(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    resize_filter: str = "lanczos",
    crop: str = "center",
    draws: Sequence[float] = (),
    flip: bool = False,
    original_size: tuple[int, int] | None = None,
    decoder: str = "pillow",
) -> tuple[np.ndarray, np.ndarray]:
    """Flip, resize so that the target is covered, crop.

    Args:
        image: uint8 [h w 3], upright. One smaller than the target is enlarged; its conditions tell the model.
        height, width: of the target in pixels.
        resize_filter: antialiased: "lanczos", "bicubic", "bilinear", "box" ("area" is a name of the same) of Pillow;
            "area" of OpenCV, which counts partly covered pixels by their part, where Pillow's box takes or leaves
            them whole. "box" and "area" enlarge bilinearly, by Pillow.
        crop: "center" or "random", see `place`, whose `draws` are needed for the latter.
        flip: left to right.
        original_size: (height, width) that the conditions tell instead of the image's own.
        decoder: whose resize it is, "pillow" or "opencv".

    Returns:
        uint8 [height width 3], and float32 [6]: original height and width, top and left of the crop in pixels of the
        flipped, resized picture, target height and width: SDXL's time_ids (SDXL, 2.2).

    Raises:
        LcmError: the filter is not the decoder's.
        BadRecord: the image is no uint8 [h w 3] of some size.
    """
    check_choice(decoder, resize_filter)
    size = _check_array(image).shape[:2]
    at = place(size, (height, width), crop, draws)
    pixels = _resized(image, at, height, width, resize_filter, flip, decoder)
    conditions = (*(original_size or size), at.top, at.left, height, width)
    return np.ascontiguousarray(pixels), np.array(conditions, np.float32)


def bucket_sizes(resolution: int, *, step: int = 64, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) of about the area resolution^2, sorted by height.

    Each side is a multiple of `step`; for each shorter side the longer is the largest with which the area is not above
    resolution^2 (so no bucket needs more memory than the square one), if longer / shorter <= max_aspect. Each size is
    there upright and lying, and the square is among them. For 1024 they are a part of SDXL's (SDXL, appendix I).

    Raises:
        LcmError: `resolution` is no multiple of `step`, or max_aspect < 1.
    """
    if step < 1 or resolution < step or resolution % step or not max_aspect >= 1:
        raise LcmError(
            f"no aspect buckets for --config.data.resolution={resolution}, sides in steps of {step} and "
            f"aspects up to {max_aspect}; choose a multiple of {step}, and an aspect of at least 1"
        )
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // (short * step) * step
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket whose log aspect ratio is nearest to each picture's.

    Args:
        sizes: [n 2] (height, width); a side that is 0 or NaN is unknown, and the picture counts as square.
        buckets: (height, width), as `bucket_sizes` gives them.

    Returns:
        int64 [n], indices of `buckets`.
    """
    sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
    known = (sizes > 0).all(axis=1)
    heights, widths = np.where(known[:, None], sizes, 1.0).T
    aspects = np.log(np.divide(*np.array(buckets, np.float64).T))
    order = np.argsort(aspects, kind="stable")
    middles = (aspects[order][1:] + aspects[order][:-1]) / 2
    return order[np.searchsorted(middles, np.log(heights / widths))].astype(np.int64)
