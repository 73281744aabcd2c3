"""Images as arrays -> pixels, grids and PNG files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from lcm_jax import files


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0..255, rounded as diffusers rounds; NaN becomes black, see `not_finite`."""
    return (np.nan_to_num(images) * 255.0).round().astype(np.uint8)


def not_finite(images: np.ndarray) -> list[int]:
    """Indices of images [b H W 3] with values that are not finite, which would look black."""
    return np.flatnonzero(~np.isfinite(images).all((1, 2, 3))).tolist()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [n H W 3] as one, row by row: [ceil(n / columns) * H, columns * W, 3]; empty cells are white."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, images.dtype)
    cells[:n] = images
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)


def write_png(path: Path, image: np.ndarray, about: Mapping[str, Any]) -> None:
    """Writes uint8 [H W 3] as a PNG, with `about` in its text chunks. Raises `files.CannotWrite`."""
    info = PngImagePlugin.PngInfo()
    for key, value in about.items():
        info.add_itxt(key, text_of(value))
    with files.new_file(path) as partial:
        Image.fromarray(image).save(partial, "PNG", pnginfo=info)


def read_about(path: Path) -> dict[str, str]:
    """The text chunks of a PNG before its pixels; {} if it cannot be read."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
    except Exception:  # whatever Pillow raises: this program did not write it
        return {}


def text_of(value: Any) -> str:
    """`value` as the text of a chunk: UTF-8, also if it names a file whose name is not."""
    return str(value).encode(errors="backslashreplace").decode()
