"""Resizes images to a feature network's size, each way like the library that made the metric's published numbers.

    bilinear          no antialiasing; TensorFlow 1's source positions or torch's
    bicubic_float     Pillow's antialiased bicubic on float planes, clipped to 0..255 (clean-fid)
    Processor         Pillow on 8 bits, centre crop, mean and deviation: transformers' image processors

Images are uint8 [b h w 3], results float32 [b s s 3]. All on the host, with planes and images in parallel threads.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.foreign import read_json
from lcm_jax.typed import Offset, Positive, Range, checked, fits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_Side = Annotated[int, Range(1, 2**14)]
_FILTERS = {2: Image.Resampling.BILINEAR, 3: Image.Resampling.BICUBIC}  # Pillow's numbers, as in the configs


def bilinear(images: np.ndarray, side: int, centres: bool) -> np.ndarray:
    """[b h w 3] -> float32 [b side side 3] in 0..255, between the two nearest rows and columns.

    Neither variant averages when it shrinks.

    Args:
      images: to resize.
      side: of the result.
      centres: output i is at (i + 1/2) in / out - 1/2 (torch, align_corners=False), else at i in / out (TensorFlow 1).
    """
    x = images
    for axis in (1, 2):
        size = x.shape[axis]
        at = (np.arange(side) + 0.5) * (size / side) - 0.5 if centres else np.arange(side) * (size / side)
        at = np.clip(at, 0, size - 1)
        low = np.floor(at).astype(np.intp)
        part = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        below, above = x.take(low, axis), x.take(np.minimum(low + 1, size - 1), axis)
        x = below * (1 - part) + above * part
    return x


def bicubic_float(images: np.ndarray, side: int) -> np.ndarray:
    """[b h w 3] -> float32 [b side side 3] in 0..255: Pillow's bicubic, no rounding to 8 bits between its passes."""

    def plane(values: np.ndarray) -> np.ndarray:
        resized = Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(resized).clip(0, 255)

    planes = images.transpose(0, 3, 1, 2).reshape(-1, *images.shape[1:3])
    return _parallel(plane, planes).reshape(-1, 3, side, side).transpose(0, 2, 3, 1)


@dataclasses.dataclass(frozen=True)
class Processor:
    """What an image processor of transformers does to an image of 8 bits.

    Attributes:
      size: shorter side after the resize (the longer one is rounded down), or (height, width).
      crop: (height, width) of the centre that is kept; None: everything is.
      mean, std: per channel, of values in 0..1.
      square_first: crop to the centre square before the resize (CMMD).
      resample: Pillow's number of the filter.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    square_first: bool = False
    resample: int = 3

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [b h w 3] -> float32 [b h' w' 3], normalised."""
        if self.square_first:
            images = _centre(images, (min(images.shape[1:3]),) * 2)
        height, width = self._resized(*images.shape[1:3])

        def resize(image: np.ndarray) -> np.ndarray:
            return np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[self.resample]))

        resized = _parallel(resize, images)
        cropped = resized if self.crop is None else _centre(resized, self.crop)
        return (cropped.astype(np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (longer, self.size) if height > width else (self.size, longer)


def read_processor(folder: Path) -> Processor:
    """The Processor of a folder's preprocessor_config.json (or processor_config.json, as transformers 5 saves).

    Raises:
      LcmError: the file is missing or unreadable.
      UnsupportedConfig: a setting that is not implemented.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file() and (folder / "processor_config.json").is_file():
        file = folder / "processor_config.json"
        config = checked(f"image_processor of {file}", read_json(file).get("image_processor"), dict)
    else:
        config = read_json(file)

    def entry(key: str, kind: Any, default: Any = None) -> Any:
        return checked(f"{key} of {file}", config.get(key, default), kind)

    for flag in ("do_resize", "do_rescale", "do_normalize"):
        if not entry(flag, bool | None, True):
            raise UnsupportedConfig(flag, config[flag], "true")
    resample, scale = entry("resample", int, 3), entry("rescale_factor", float, 1 / 255)
    if resample not in _FILTERS:
        raise UnsupportedConfig("resample", resample, tuple(_FILTERS))
    if abs(scale * 255 - 1) > 1e-6:
        raise UnsupportedConfig("rescale_factor", scale, "1/255")
    kind = entry("image_processor_type", str | None, entry("feature_extractor_type", str | None, "CLIP"))
    crops = str(kind).startswith(("CLIP", "Bit"))  # the default of these two
    size, crop = _size("size", config, file), None
    if entry("do_center_crop", bool | None, crops):
        crop = _size("crop_size", config, file)
        crop = (crop, crop) if isinstance(crop, int) else crop
        if any(c > s for c, s in zip(crop, (size, size) if isinstance(size, int) else size, strict=True)):
            raise LcmError(f"{file}: crop_size {crop} is larger than size {size}; correct it")
    mean = entry("image_mean", tuple[Offset, Offset, Offset])
    std = entry("image_std", tuple[Positive, Positive, Positive])
    return Processor(size, crop, mean, std, resample=resample)


def _size(key: str, config: Mapping[str, Any], file: Path) -> int | tuple[int, int]:
    """Early configs have one number, later {"shortest_edge": n} or {"height": h, "width": w}."""
    value = found = config.get(key)
    if isinstance(value, dict):
        found = value["shortest_edge"] if "shortest_edge" in value else (value.get("height"), value.get("width"))
    if isinstance(value, list) or not fits(found, _Side | tuple[_Side, _Side]):
        forms = "one side, {'shortest_edge': side} or {'height': side, 'width': side}, of 1 to 16384 pixels"
        raise UnsupportedConfig(f"{key} of {file}", value, forms)
    return found


def _centre(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    (height, width), (h, w) = images.shape[1:3], size
    if h > height or w > width:
        raise LcmError(
            f"a centre of {h} x {w} in images of {height} x {width}: the preprocessor's crop is larger than its "
            "resize; correct its config"
        )
    top, left = (height - h) // 2, (width - w) // 2
    return images[:, top : top + h, left : left + w]


def _parallel(function: Callable[[np.ndarray], np.ndarray], items: np.ndarray) -> np.ndarray:
    """`function` of each item, stacked. Pillow releases the interpreter's lock, so threads help."""
    if len(items) == 1:
        return function(items[0])[None]
    with concurrent.futures.ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        return np.stack(list(pool.map(function, items)))
