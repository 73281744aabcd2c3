"""Images that a user gives -> upright uint8 RGB [h w 3], and brought to a size.

Orientation, transparency (over a background), palettes, grey, 16 bits and CMYK are treated as `data.images` says;
colour profiles are ignored.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from lcm_jax import files
from lcm_jax.data import images
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling.png import to_uint8

ImageLike = str | Path | Image.Image | np.ndarray  # a file, a Pillow image, or [h w 3]: uint8, or floats in [0, 1]
MAX_FILE = 2**28  # bytes
FITS = ("crop", "stretch", "fill")


def read_image(
    source: ImageLike, name: str = "image", smallest: int = 64, background: images.Background = "white"
) -> np.ndarray:
    """An image as upright uint8 RGB [h w 3].

    Args:
      source: see `ImageLike`.
      name: of the argument, for errors.
      smallest: pixels that each side has at least.
      background: colour under transparency.

    Raises:
      BadArgument: no such file, no image, an animation, a size or values that cannot be used.
    """
    decode, upright = (functools.partial(one, background=background) for one in (images.decode, images.upright))
    with _named(name, source):
        if isinstance(source, np.ndarray):
            image = _checked(source)
        else:
            image = _decoded(source, decode, upright)
    height, width = image.shape[:2]
    if min(height, width) < smallest:
        raise BadArgument(name, shown(source), f"has {width} x {height} pixels; each side needs at least {smallest}")
    return image


def read_mask(source: ImageLike, name: str = "mask") -> np.ndarray:
    """A mask as upright uint8 [h w]: its alpha channel if that varies, else its grey values.

    source: as of an image, an array also [h w], of bool, too. Raises BadArgument as `read_image` does.
    """
    with _named(name, source):
        if not isinstance(source, np.ndarray):
            return _decoded(source, images.decode_mask, images.decode_mask)
        array = source.astype(np.uint8) * np.uint8(255) if source.dtype == bool else source
        array = _checked(np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array)
        return np.asarray(Image.fromarray(array).convert("L"))


def shown(image: ImageLike) -> Any:
    """What an error calls an image."""
    return f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else image


@contextlib.contextmanager
def _named(name: str, source: ImageLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadArgument(name, shown(source), f"cannot be read ({error.strerror}); give an image file") from None
    except LcmError as error:
        raise BadArgument(name, shown(source), f"{error}; give one image, such as a PNG or JPEG") from None


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h w 3] or [h w] stretched to [height width ...], by Lanczos with antialiasing, as diffusers does it."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def fitted(image: np.ndarray, height: int, width: int, fit: str, spare: int = 0) -> np.ndarray:
    """uint8 [h w 3] or [h w] -> [height width ...], resized as `resized` does it, in diffusers' geometry.

    fit: "crop": covers the size, and what is outside is cut off evenly; "fill": fits into it, and its border pixels
      are repeated around it; "stretch": in both directions by what is needed.
    spare: pixels in each direction that "crop" may cut off to save resizing.
    """
    h, w = image.shape[:2]
    if fit == "crop" and 0 <= h - height <= spare and 0 <= w - width <= spare:
        top, left = (h - height) // 2, (w - width) // 2
        return image[top : top + height, left : left + width]
    if fit == "stretch" or h * width == w * height:
        return resized(image, height, width)
    to_height = (w * height > h * width) == (fit == "crop")  # whether it gets its height, and the width follows
    rows, columns = (height, max(1, w * height // h)) if to_height else (max(1, h * width // w), width)
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    if fit == "crop" and rows * columns > images.MAX_PIXELS:  # a strip, as of 1 x 4096: what is cut off takes no memory
        across, down = w / columns, h / rows
        box = -left * across, -top * down, (width - left) * across, (height - top) * down
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box))
    image = resized(image, rows, columns)
    if fit == "crop":
        return image[-top : height - top, -left : width - left]
    around = ((top, height - rows - top), (left, width - columns - left), *[(0, 0)] * (image.ndim - 2))
    return np.pad(image, around, mode="edge")


def parse_colour(name: str, colour: str | tuple[int, int, int]) -> images.Background:
    """A colour for Pillow. Raises BadArgument, which names the argument, for one that is none."""
    try:
        found = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
        Image.new("RGB", (1, 1), found)
    except (ValueError, TypeError):
        raise BadArgument(name, colour, "is no colour; give a name or #rrggbb, such as white or #80a0ff") from None
    return found[:3]


def _decoded(source: str | Path | Image.Image, decode: Callable, upright: Callable) -> np.ndarray:
    if isinstance(source, Image.Image):
        _check_frames(source)
        return upright(source)
    data = files.read_regular(files.expanded(source), MAX_FILE)
    image = decode(data)
    _check_frames(Image.open(io.BytesIO(data), formats=images.FORMATS))
    return image


def _check_frames(opened: Image.Image) -> None:
    frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)  # MPO: a camera's image and its preview
    if frames > 1:
        raise LcmError(f"has {frames} frames")


def _checked(array: np.ndarray) -> np.ndarray:
    if array.ndim != 3 or array.shape[2] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise LcmError("is no image: arrays are [h w 3], of uint8, or of floats in [0, 1]")
    if array.dtype == np.uint8:
        return array
    if not np.isfinite(array).all():
        raise LcmError("has values that are not finite")
    if array.min() < 0 or array.max() > 1:
        raise LcmError(f"has floats from {array.min():g} to {array.max():g}, not in [0, 1]")
    return to_uint8(array)
