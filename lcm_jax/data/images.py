"""Encoded images -> uint8 RGB [h w 3], resized and cropped to one size, with SDXL's size and crop conditions.

Decoding turns every file into an upright image of 8 bits per channel: EXIF orientation is applied, transparency is laid
over white, grey becomes three equal channels, 16 bits keep their high byte, CMYK and YCCK follow Pillow (Adobe's
inverted convention), and an animation gives its first frame. Embedded colour (ICC) profiles are ignored: the numbers in
the file are taken for sRGB.

An image H x W (upright) is brought to the target h x w in this order:

    flip left to right;  resize to (H', W') = max(target, round(size * max(h / H, w / W)));  crop (h, w) at (top, left)

and SDXL's time_ids are (H, W, top, left, h, w): top and left are pixels of the flipped, resized image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from lcm_jax.data.records import BadRecordError
from lcm_jax.errors import BadArgument, LcmError

Background = str | tuple[int, int, int]

# Only these are tried: other readers of Pillow start programs (EPS) or read files that are not images.
_SUFFIXES = {  # format of Pillow -> suffixes of its files, the usual ones first
    "JPEG": "jpg jpeg jpe jfif jif mpo",  # MPO: several JPEGs, of which the first is read
    "PNG": "png apng",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp dib",
    "TIFF": "tif tiff",
    "PPM": "ppm pgm pbm pnm pfm",
    "JPEG2000": "jp2 j2k j2c jpc jpf jpx",
    "AVIF": "avif avifs",
}
FORMATS = tuple(_SUFFIXES)
SUFFIXES = tuple(suffix for of_format in _SUFFIXES.values() for suffix in of_format.split())
MAX_PIXELS = 89_478_485  # Pillow's own limit for decompression bombs: a quarter of a GiB as RGB
ORIENTATION = 0x0112  # EXIF tag
# A PNG may state its orientation after the pixels. If none of these occurs in it, it states none.
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
    """Raises BadArgument if `decoder` is unknown or cannot resize with `resize_filter`, LcmError without OpenCV."""
    if decoder not in FILTERS:
        raise BadArgument("decoder", decoder, f"unknown; choose one of {', '.join(FILTERS)}")
    if resize_filter not in FILTERS[decoder]:
        problem = f"the decoder {decoder} has only {', '.join(FILTERS[decoder])}"
        raise BadArgument("resize_filter", resize_filter, problem)
    if decoder == "opencv":
        opencv()


def opencv(user: str = "the decoder 'opencv'"):
    """The module cv2. Raises LcmError, which names its `user`, if it is not installed."""
    try:
        import cv2
    except ImportError:
        raise LcmError(f"{user} needs OpenCV: pip install 'lcm_jax[data]'") from None
    return cv2


@contextlib.contextmanager
def _bad_record() -> Iterator[None]:
    """Any error of a decoder becomes a one-line BadRecordError; a broken file may make it raise anything."""
    try:
        yield
    except (LcmError, MemoryError):
        raise
    except Image.UnidentifiedImageError:  # its message contains an address, which differs from run to run
        raise BadRecordError("not an image of a known format") from None
    except Exception as error:
        raise BadRecordError(f"undecodable image: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _open(data: bytes) -> Image.Image:
    """The image with its header read, of a size that may be decoded."""
    if not data:
        raise BadRecordError("image of 0 bytes")
    opened = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(opened.height, opened.width)
    return opened


def _check_size(height: int, width: int) -> None:
    if not (height and width):
        raise BadRecordError(f"image of no size: height {height}, width {width}")
    if height * width > MAX_PIXELS:
        raise BadRecordError(f"image of {height} x {width} pixels, more than {MAX_PIXELS} are not decoded")


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BadRecordError(f"image array is {image.dtype} {list(image.shape)}, not uint8 [h w 3]")
    _check_size(*image.shape[:2])
    return image


def _orientation(opened: Image.Image) -> int:
    """EXIF orientation 1..8; 1 if it is not stated or, as viewers do, if the EXIF block is unreadable."""
    try:
        orientation = opened.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, LookupError, TypeError, OverflowError):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: row 0 of the file is the top, bottom, left or right of the image."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _eight_bits(opened: Image.Image) -> Image.Image:
    """Deep grey -> its high byte (Pillow's own conversion clips at 255); a transparent value stays transparent."""
    values = np.asarray(opened)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadRecordError(f"grey values from {values.min()} to {values.max()}, not of 16 bits")
    grey = (values >> 8).astype(np.uint8)
    if "transparency" not in opened.info:
        return Image.fromarray(grey)
    opaque = np.where(values == opened.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opaque)])


def _rgb(opened: Image.Image, background: Background) -> Image.Image:
    """RGB from any mode of Pillow, transparency over the background."""
    if opened.mode == "F":
        raise BadRecordError("image of floats, whose range is not known")
    if opened.mode.startswith("I"):
        opened = _eight_bits(opened)
    if opened.has_transparency_data:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, background), opened)
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def _has_end(jpeg: bytes) -> bool:
    """Whether a JPEG has its end marker after the pixels' first byte; a thumbnail before them has its own marker."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        if jpeg[at + 1] == START_OF_SCAN:
            return jpeg.rfind(END_OF_JPEG, at) >= 0
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _decode_opencv(data: bytes, opened: Image.Image) -> np.ndarray | None:
    """uint8 RGB [h w 3], not yet upright; None if Pillow must decode or judge the image."""
    if opened.format != "JPEG" or opened.mode not in ("L", "RGB") or not _has_end(data):
        return None
    cv2 = opencv()
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode(data: bytes | np.ndarray, decoder: str = "pillow", background: Background = "white") -> np.ndarray:
    """An upright RGB image.

    Args:
        data: a file's bytes (`FORMATS`), or uint8 [h w 3], which is checked and returned as it is.
        decoder: "pillow", the reference, or "opencv", which decodes complete grey and RGB JPEGs. It leaves to Pillow
            what it decodes differently (CMYK, palettes, transparency, 16 bits), what it decodes hardly faster (PNG,
            WebP, ...), and everything that it or the check of a JPEG's end refuses, so that with both decoders the
            same records are unusable.
        background: see `upright`.

    Returns:
        uint8 [h w 3].

    Raises:
        BadRecordError: with the reason: truncated, empty, not an image, without a size, more than `MAX_PIXELS`. A
            JPEG with damaged pixels and an intact end marker is decoded as libjpeg does it, partly grey.
    """
    if isinstance(data, np.ndarray):
        return _check_array(data)
    check_choice(decoder, "area")
    with _bad_record():
        opened = _open(data)
        image = _decode_opencv(data, opened) if decoder == "opencv" else None
        if image is None:
            return upright(opened, background)
        return _upright(image, _orientation(opened))


def upright(opened: Image.Image, background: Background = "white") -> np.ndarray:
    """uint8 [h w 3] of an image of any mode, see the module. Raises BadRecordError with the reason.

    background: colour under transparency, as Pillow names it or (red, green, blue).
    """
    with _bad_record():
        opened.load()  # first, since it may change mode and orientation (Pillow turns a TIFF here)
        return _upright(np.asarray(_rgb(opened, background)), _orientation(opened))


def decode_mask(opened: Image.Image | bytes) -> np.ndarray:
    """uint8 [h w] of an image or a file's bytes, upright: its alpha channel if that varies, else its grey values.

    Raises:
        BadRecordError: see `decode`.
    """
    with _bad_record():
        opened = _open(opened) if isinstance(opened, bytes) else opened
        opened.load()
        orientation, image = _orientation(opened), opened
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if alpha is not None and len(set(alpha.getextrema())) == 2:
            return _upright(np.asarray(alpha), orientation)
        if image.mode == "F":
            raise BadRecordError("image of floats, whose range is not known")
        return _upright(np.asarray(image.convert("RGB").convert("L")), orientation)


def header_size(data: bytes | np.ndarray) -> tuple[int, int]:
    """(height, width) of what `decode` would return, from the header alone.

    Raises:
        BadRecordError: not an image, or of a size that is not decoded. With a good header it may still be truncated.
    """
    if isinstance(data, np.ndarray):
        return _check_array(data).shape[:2]
    with _bad_record():
        opened = _open(data)
        # Pillow gives a TIFF's size upright, and would decode all of a PNG to look for an orientation.
        stated = opened.format != "TIFF" and (opened.format != "PNG" or any(tag in data for tag in PNG_ORIENTATION))
        turned = stated and _orientation(opened) >= 5
        return (opened.width, opened.height) if turned else (opened.height, opened.width)


@dataclasses.dataclass(frozen=True)
class Crop:
    """The size of an image after the resize, and the first row and column of the target in it, in its pixels."""

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


def find_crop(
    size: tuple[int, int], target: tuple[int, int], crop: str = "center", draws: Sequence[float] = ()
) -> Crop:
    """The resize and crop that bring an image of `size` to `target`, both (height, width).

    "center" halves the margins, rounded down; "random" uses `draws` = (u_top, u_left) in [0, 1) so that all positions
    are equally likely.
    """
    height, width = cover(size, target)
    margins = height - target[0], width - target[1]
    if crop == "center":
        return Crop(height, width, margins[0] // 2, margins[1] // 2)
    if crop != "random":
        raise BadArgument("crop", crop, 'unknown; choose "random" or "center"')
    if len(draws) != 2 or not all(0 <= u < 1 for u in draws):
        raise LcmError(f"a random crop takes two draws in [0, 1), got {list(draws)}")
    top, left = (min(math.floor(u * (margin + 1)), margin) for u, margin in zip(draws, margins, strict=True))
    return Crop(height, width, top, left)


def _resize_pillow(image: np.ndarray, crop: Crop, height: int, width: int, resize_filter: str, flip: bool):
    """Resize and crop. Only the crop's part of the image is resized, which changes at most 1 level of 255."""
    original = Image.fromarray(image)
    if flip:
        original = original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    kernel = FILTERS["pillow"][resize_filter]
    if kernel == Image.Resampling.BOX:  # a pixel is inside or outside the box: rounding the part would decide which
        whole = np.asarray(original.resize((crop.resized_width, crop.resized_height), kernel))
        return whole[crop.top : crop.top + height, crop.left : crop.left + width]
    across, down = original.width / crop.resized_width, original.height / crop.resized_height
    part = (crop.left * across, crop.top * down, (crop.left + width) * across, (crop.top + height) * down)
    return np.asarray(original.resize((width, height), kernel, box=part))


def _resize_opencv(image: np.ndarray, crop: Crop, height: int, width: int, flip: bool) -> np.ndarray:
    cv2 = opencv()
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
        image: uint8 [h w 3], upright. One smaller than the target is enlarged, which its conditions reveal to SDXL.
        height, width: of the target in pixels.
        resize_filter: antialiased: "lanczos", "bicubic", "bilinear" or "box" (also called "area") of Pillow; "area" of
            OpenCV, which weights a partly covered pixel by its covered part, while Pillow's box takes all of it or
            nothing. "box" and "area" enlarge bilinearly, with Pillow.
        crop: "center" or "random", see `find_crop`, which needs `draws` for the latter.
        flip: left to right.
        original_size: (height, width) for the conditions, instead of the image's own.
        decoder: whose resize is used, "pillow" or "opencv".

    Returns:
        uint8 [height width 3], and SDXL's time_ids (SDXL, 2.2), float32 [6]: original height and width, top and left of
        the crop in pixels of the flipped, resized image, target height and width.

    Raises:
        BadArgument: the decoder does not have the filter, or an unknown crop.
        BadRecordError: the image is not uint8 [h w 3], or has no pixels.
    """
    check_choice(decoder, resize_filter)
    size = _check_array(image).shape[:2]
    at = find_crop(size, (height, width), crop, draws)
    pixels = _resized(image, at, height, width, resize_filter, flip, decoder)
    conditions = (*(original_size or size), at.top, at.left, height, width)
    return np.ascontiguousarray(pixels), np.array(conditions, np.float32)


def bucket_sizes(resolution: int, *, step: int = 64, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) of about the area resolution^2, sorted by height.

    Each side is a multiple of `step`; for each shorter side the longer one is the largest that keeps the area within
    resolution^2 (so no bucket needs more memory than the square one), if longer / shorter <= max_aspect. Each size is
    in portrait and in landscape, and the square is among them. For 1024 they are a subset of SDXL's (SDXL, appendix I).

    Raises:
        BadArgument: `resolution` is not a multiple of `step`, or max_aspect < 1.
    """
    if step < 1 or resolution < step or resolution % step or not max_aspect >= 1:
        raise BadArgument(
            "resolution",
            resolution,
            f"no aspect buckets with sides in steps of {step} and aspects up to {max_aspect}; choose a multiple of the "
            "step, and an aspect of at least 1",
        )
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // (short * step) * step
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket whose log aspect ratio is nearest to each image's.

    Args:
        sizes: [n 2] (height, width); a side that is 0 or NaN is unknown, and the image counts as square.
        buckets: (height, width), from `bucket_sizes`.

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
