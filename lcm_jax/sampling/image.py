"""Images that a user gives -> upright uint8 RGB [h w 3], and resized.

Orientation, transparency (over white), palettes, grey, 16 bits and CMYK are treated as `data.images` says; colour
profiles are ignored.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from lcm_jax import files
from lcm_jax.data import images
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling.png import to_uint8

ImageLike = str | Path | Image.Image | np.ndarray  # a file, a Pillow image, or [h w 3]: uint8, or floats in [0, 1]
MAX_FILE = 2**28  # bytes


def read_image(source: ImageLike, name: str = "image", smallest: int = 64) -> np.ndarray:
    """An image as upright uint8 RGB [h w 3].

    Args:
      source: see `ImageLike`.
      name: of the argument, for errors.
      smallest: pixels that each side has at least.

    Raises:
      BadArgument: no such file, no image, an animation, a size or values that cannot be used.
    """
    is_array = isinstance(source, np.ndarray)
    shown = f"{source.dtype} {list(source.shape)}" if is_array else source
    try:
        image = _checked(source) if is_array else _decoded(source)
    except OSError as error:
        raise BadArgument(name, shown, f"cannot be read ({error.strerror}); give an image file") from None
    except LcmError as error:
        raise BadArgument(name, shown, f"{error}; give one image, such as a PNG or JPEG") from None
    height, width = image.shape[:2]
    if min(height, width) < smallest:
        raise BadArgument(name, shown, f"has {width} x {height} pixels; each side needs at least {smallest}")
    return image


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h w 3] stretched to [height width 3], by Lanczos with antialiasing, as diffusers does it."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _decoded(source: str | Path | Image.Image) -> np.ndarray:
    if isinstance(source, Image.Image):
        return images.upright(source)
    data = files.read_regular(files.expanded(source), MAX_FILE)
    image, opened = images.decode(data), Image.open(io.BytesIO(data), formats=images.FORMATS)
    frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)  # MPO: a camera's image and its preview
    if frames > 1:
        raise LcmError(f"has {frames} frames")
    return image


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
