"""Inpainting: the part of an image that a mask shows in white is painted, the rest stays as it is, bit for bit.

    hole h   mask >= 128, grown                  pixels to be painted
    soft s   max(h, blurred h) in [0, 1]         of painted and original pixels: s painted + (1 - s) original
    m        maximum of h over a latent's cell   latents to be painted: 1, kept: 0

A UNet of 9 channels reads [x, m, z_masked]: z_masked are the latents of the image with grey in the hole. Any other
knows nothing of the hole; its latents outside are replaced after each step, before the next timestep t', with the noise
eps of the start (after the last step by z itself):

    x <- (1 - m) (alpha_t' z + sigma_t' eps) + m x

At strength 1 such a UNet starts from m eps + (1 - m) (alpha_t z + sigma_t eps), so that the first step has seen the
surroundings; `start="noise"` is diffusers' eps. One of 9 channels starts from eps.

With `padding` pixels around the hole that part of the image alone, in the aspect of the request, is brought to the
request's size, painted, and brought back.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFilter

from lcm_jax.data.sources import tree
from lcm_jax.diffusion.samplers import Hook
from lcm_jax.errors import BadArgument
from lcm_jax.sampling.image import ImageLike, fitted, read_mask, resized, shown
from lcm_jax.sampling.png import to_uint8

STARTS = ("image", "noise")
ASPECT = 0.01  # that a mask's may differ from its image's
STRENGTH = 1.0  # if none is given
MOST = 1024  # pixels of a blur, of growth and of padding
Box = tuple[int, int, int, int]  # top, left, bottom, right


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """What a request has of its masks.

    Attributes:
      images: one for all images, or one for each; white is painted.
      blur: radius of the Gaussian that softens the edge of the hole outwards, in pixels.
      grow: pixels that the hole grows by in each direction.
      padding: of the part that is painted alone; None: the whole image is.
      paste: whether what is kept comes from the original, else from the VAE.
      start: one of `STARTS`.
      whole: whether the first mask is white all over.
    """

    images: tuple[ImageLike, ...]
    blur: float = 0.0
    grow: int = 0
    padding: int | None = None
    paste: bool = True
    start: str = "image"
    whole: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """An image to be painted on; without a mask it has pixels alone.

    Attributes:
      pixels: that the VAE reads, uint8 [H W 3]. hole: bool [H W].
      original: uint8 [h w 3] that the result is pasted into, at `box`. soft: uint8 [h w], 255: painted.
    """

    pixels: np.ndarray
    hole: np.ndarray | None = None
    original: np.ndarray | None = None
    soft: np.ndarray | None = None
    box: Box | None = None

    def pasted(self, painted: np.ndarray) -> np.ndarray:
        """Painted float32 [H W 3] in [0, 1] -> [h w 3]; what is not finite stays so."""
        if not np.isfinite(painted).all():
            return np.full(self.original.shape, np.nan, np.float32)
        top, left, bottom, right = self.box
        whole = self.original.copy()
        whole[top:bottom, left:right] = fitted(to_uint8(painted), bottom - top, right - left, "crop")
        share = np.float32(self.soft[:, :, None]) / np.float32(255)
        mixed = share * whole + (np.float32(1) - share) * self.original
        return mixed.round() / np.float32(255)


def mask_for(mask: Path | None, image: Path) -> Path | None:
    """The mask of an image: the file, or of a folder the image with its name but for the suffix."""
    if mask is None or not mask.is_dir():
        return mask
    found = [one for one in sorted(mask.iterdir()) if one.stem == image.stem and tree.is_image(one.name)]
    if not found:
        raise BadArgument("mask", mask, f"has no {image.stem}, the mask of {image}; add it, or give one for all images")
    return found[0]


def check_values(blur: float, grow: int, padding: int | None, start: str) -> None:
    """Raises BadArgument for numbers of a `Mask` that mean nothing."""
    if not 0 <= blur <= MOST:
        raise BadArgument("mask_blur", f"{blur:g}", f"out of range; choose 0 to {MOST} pixels")
    for name, value in (("mask_grow", grow), ("crop_padding", padding)):
        if value is not None and not 0 <= value <= MOST:
            raise BadArgument(name, value, f"out of range; choose 0 to {MOST} pixels")
    if start not in STARTS:
        raise BadArgument("start", start, f"choose one of {', '.join(STARTS)}")


def make_mask(
    mask: ImageLike | Sequence[ImageLike] | None,
    sizes: Sequence[tuple[int, int]],
    *,
    mask_blur: float | None = None,
    mask_grow: int | None = None,
    crop_padding: int | None = None,
    paste: bool | None = None,
    start: str | None = None,
) -> Mask | None:
    """The masks of images of these sizes, checked; None without a mask.

    mask_blur, mask_grow, crop_padding, paste, start: see `Mask`; None: its default.

    Raises:
      BadArgument: a value is wrong, or a mask cannot be used.
    """
    if mask is None:
        given = dict(mask_blur=mask_blur, mask_grow=mask_grow, crop_padding=crop_padding, paste=paste, start=start)
        for name, value in given.items():
            if value is not None:
                raise BadArgument(name, value, "is for inpainting; give a mask, or leave it out")
        return None
    blur, grow, paste, start = mask_blur or 0.0, mask_grow or 0, paste is not False, start or "image"
    check_values(blur, grow, crop_padding, start)
    masks = tuple(mask) if isinstance(mask, (list, tuple)) else (mask,)
    if not masks:
        raise BadArgument("mask", [], "has no mask; give one, or one for each image")
    count = max(len(masks), len(sizes))
    for one, size in zip(
        *(given * count if len(given) == 1 else given for given in (masks, list(sizes))), strict=False
    ):
        mask_of(one, size)
    return Mask(masks, blur, grow, crop_padding, paste, start, bool((mask_of(masks[0], sizes[0]) >= 128).all()))


def mask_of(mask: ImageLike, image: tuple[int, int]) -> np.ndarray:
    """uint8 [h w] of an image's size.

    Raises:
      BadArgument: no image, of another aspect, or with nothing to be painted.
    """
    found, (h, w) = read_mask(mask, "mask"), image
    height, width = found.shape
    if abs(height * w / (width * h) - 1) > ASPECT:
        raise BadArgument(
            "mask", shown(mask), f"has {width} x {height} pixels, another aspect than its image's {w} x {h}"
        )
    found = resized(found, h, w)
    if (found < 128).all():
        raise BadArgument("mask", shown(mask), "has no white, which is what is painted; invert or replace it")
    return found


def canvas(
    image: np.ndarray, mask: np.ndarray, options: Mask, height: int, width: int, fit: str, spare: int = 0
) -> Canvas:
    """Of an image uint8 [h w 3] and its mask uint8 [h w], to be painted at this size; fit, spare: see `fitted`.

    Raises:
      BadArgument: at this size nothing of the mask is white.
    """
    given = mask.shape
    if options.padding is None:
        image, mask = (fitted(one, height, width, fit, spare) for one in (image, mask))
    hole = Image.fromarray(np.where(mask >= 128, np.uint8(255), np.uint8(0)))
    for _ in range(options.grow):
        hole = hole.filter(ImageFilter.MaxFilter(3))
    soft = np.maximum(hole, hole.filter(ImageFilter.GaussianBlur(options.blur))) if options.blur else np.asarray(hole)
    box = (0, 0, *image.shape[:2])
    if options.padding is None:
        pixels, hole = image, np.asarray(hole) >= 128
    else:
        box = crop_box(soft, options.padding, height, width)
        part = slice(box[0], box[2]), slice(box[1], box[3])
        pixels = fitted(image[part], height, width, "fill")
        hole = fitted(np.asarray(hole)[part], height, width, "fill") >= 128
    if not hole.any():  # the image would come out as it went in
        problem = f"nothing of its white is left in {width} x {height} pixels: it is cut off, or too small there"
        raise BadArgument(
            "mask", f"{given[1]} x {given[0]}", f"{problem}; use another fit, more white, or a larger size"
        )
    return Canvas(pixels, hole, image, soft, box)


def crop_box(mask: np.ndarray, padding: int, height: int, width: int) -> Box:
    """The part of a mask [h w] that has all that is not 0, and `padding` around it, in the aspect of height x width.

    Its shorter side grows to that aspect, evenly as far as the image reaches; the image may end before it.
    """
    spans = []
    for axis in (1, 0):
        found = np.flatnonzero(mask.any(axis=axis))
        spans.append((max(found[0] - padding, 0), min(found[-1] + 1 + padding, mask.shape[1 - axis])))
    (top, bottom), (left, right) = spans
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _grown(top, bottom, (right - left) / (width / height), mask.shape[0])
    else:
        left, right = _grown(left, right, (bottom - top) * (width / height), mask.shape[1])
    return int(top), int(left), int(bottom), int(right)


def _grown(first: int, last: int, length: float, limit: int) -> tuple[int, int]:
    missing = int(length - (last - first))
    first, last = first - missing // 2, last + missing - missing // 2
    over = max(last - limit, 0)
    first, last = first - over, last - over
    under = max(-first, 0)
    return first + under, min(last + under, limit)


def cells(hole: np.ndarray, factor: int) -> np.ndarray:
    """Bool [H W] -> float32 [h w 1]: 1 for a latent with any pixel to be painted."""
    h, w = (side // factor for side in hole.shape)
    return hole.reshape(h, factor, w, factor).any(axis=(1, 3)).astype(np.float32)[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Painting:
    """What the sampler reads of a batch.

    Attributes:
      rows: "inputs" [b h w 5], m and z_masked, that a UNet of 9 channels reads; for another "m" [b h w 1], "z" and
        "eps" [b h w c].
      levels: alpha and sigma of the timestep after each step, float32 [2 steps].
    """

    rows: Mapping[str, jax.Array]
    levels: jax.Array

    def hook(self) -> Hook | None:
        """Replaces what is known after a step; None for a UNet that reads it."""
        if "inputs" in self.rows:
            return None
        m, z, eps = (self.rows[name] for name in ("m", "z", "eps"))

        def after_step(x0: jax.Array, x: jax.Array, t: jax.Array, i: jax.Array) -> jax.Array:
            alpha, sigma = jnp.asarray(self.levels)[:, i]
            return (1 - m) * (alpha * z + sigma * eps) + m * x

        return after_step

    def on(self, unet: Any) -> Any:
        """The UNet, with inputs for those of 9 channels."""
        return Inpainter(unet, self.rows["inputs"]) if "inputs" in self.rows else unet


@dataclasses.dataclass(frozen=True, eq=False)
class Inpainter:
    """A UNet of 9 channels, for `diffusion.denoiser`, which gives it the latents alone.

    inputs: [b h w 5]; of two passes the rows are interleaved.
    """

    unet: Any
    inputs: jax.Array

    @property
    def time_cond_proj_dim(self) -> int | None:
        return self.unet.time_cond_proj_dim

    def apply(self, variables: Mapping[str, Any], z_t: jax.Array, *args: Any) -> jax.Array:
        more = jnp.repeat(self.inputs, z_t.shape[0] // self.inputs.shape[0], axis=0)
        return self.unet.apply(variables, jnp.concatenate([z_t, more.astype(z_t.dtype)], axis=-1), *args)


def together(*hooks: Hook | None) -> Hook | None:
    """One hook for several, in order; None for none."""
    found = [hook for hook in hooks if hook is not None]
    if not found:
        return None
    return lambda x0, x, t, i: functools.reduce(lambda x, hook: hook(x0, x, t, i), found, x)


class Start(NamedTuple):
    """What the sampler starts from, noise [steps b h w c] with the start as its entry 0, and what it needs to paint."""

    noise: np.ndarray
    painting: Painting | None = None
    canvases: Sequence[Canvas] = ()
