"""Image to image: the sampler starts from a noised image, at the timestep of a strength in (0, 1].

    z = scaling_factor (mean + exp(logvar / 2) xi)      of the VAE's posterior; its mode, without the noise, by default
    x = alpha_t z + sigma_t eps                         t: first timestep

All steps are run, over the part of the timesteps that the strength names. `Source` is what a request has of it.

    sampler    timesteps of N steps at strength s
    lcm, tcd   N of the first floor(O s) entries of the grid of O solver steps, evenly spaced from its end
    others     trailing over T_s = round(T s): round(T_s - j T_s / N) - 1

The first is that of diffusers' LatentConsistencyModelImg2ImgPipeline. Its other pipelines instead cut the table of N
steps: s and N here are s and N / s there.

With a mask only a part of the image is painted: `sampling.inpaint`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from lcm_jax.data import images
from lcm_jax.data.encoding import LEVELS
from lcm_jax.data.sources import tree
from lcm_jax.diffusion.timesteps import kept
from lcm_jax.errors import BadArgument
from lcm_jax.models import tiling
from lcm_jax.models.taesd import AutoencoderTiny
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import batch_sharding, replicated
from lcm_jax.sampling.image import FITS, ImageLike, fitted, parse_colour, read_image
from lcm_jax.sampling.inpaint import Canvas, Mask, Painting, Start, canvas, cells, make_mask, mask_of
from lcm_jax.sampling.offload import Weights

STRENGTH = 0.5  # if none is given
POSTERIORS = ("mode", "sample")
SMALLEST = 8  # latents on a side of an image
LARGEST = 2  # times the longer side that the model was trained for: larger images are reduced to it
_ENCODED = 32  # images whose latents are kept

Moments = tuple[np.ndarray, np.ndarray]  # mean and standard deviation of a posterior, [h w c] each


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The images that a request starts from.

    Attributes:
      images: one for all prompts, or one for each; see `image.ImageLike`. Files are read when they are needed.
      fit: how they are brought to the size, one of `image.FITS`.
      background: colour under transparency.
      posterior: what of the VAE's is used, "mode" or "sample".
      mask: the parts to be painted, of inpainting; None: all.
      of_size: of the results, (height, width) of the image if they are pasted into it; None: the request's.
    """

    images: tuple[ImageLike, ...]
    fit: str = "crop"
    background: images.Background = "white"
    posterior: str = "mode"
    mask: Mask | None = None
    of_size: tuple[int, int] | None = None

    def of(self, prompts: Sequence[int]) -> "Source":
        """With the images and the masks of these prompts."""

        def chosen(given: tuple[ImageLike, ...]) -> tuple[ImageLike, ...]:
            return given if len(given) == 1 else tuple(given[prompt] for prompt in prompts)

        mask = self.mask and dataclasses.replace(self.mask, images=chosen(self.mask.images))
        return dataclasses.replace(self, images=chosen(self.images), mask=mask)

    def canvases(self, height: int, width: int, factor: int, rows: int) -> list[Canvas]:
        """One for each of the rows; what is given twice is read once."""
        made: dict[tuple[int, int], Canvas] = {}
        masks = self.mask.images if self.mask else (None,)
        found = []
        for row in range(rows):
            image, mask = (given[0] if len(given) == 1 else given[row] for given in (self.images, masks))
            key = id(image), id(mask)
            if key not in made:
                pixels = read_image(image, "image", 1, self.background)
                if mask is None:
                    pixels = fitted(pixels, height, width, self.fit, factor - 1)
                    made[key] = Canvas(pixels)
                else:
                    hole = mask_of(mask, pixels.shape[:2])
                    made[key] = canvas(pixels, hole, self.mask, height, width, self.fit, factor - 1)
            found.append(made[key])
        return found


def make_source(
    pipeline: Pipeline,
    image: ImageLike | Sequence[ImageLike],
    noise: str = "jax",
    *,
    fit: str | None = None,
    background: str | tuple[int, int, int] | None = None,
    posterior: str | None = None,
    mask: ImageLike | Sequence[ImageLike] | None = None,
    **of_mask: Any,
) -> tuple[Source, tuple[int, int]]:
    """(source, height and width of its first image), checked; None: the default.

    Args:
      noise: of the request; with "torch" and "torch-batch" `posterior` is "sample" by default, as diffusers has it.
      mask, of_mask: see `inpaint.make_mask`.

    Raises:
      BadArgument: a value is wrong, or an image cannot be used.
    """
    fit, background = fit or "crop", parse_colour("background", background or "white")
    if fit not in FITS:
        raise BadArgument("fit", fit, f"choose one of {', '.join(FITS)}")
    if posterior not in (None, *POSTERIORS):
        raise BadArgument("posterior", posterior, f"choose one of {', '.join(POSTERIORS)}")
    posterior = posterior or ("sample" if noise.startswith("torch") else "mode")
    if isinstance(pipeline.vae, AutoencoderTiny):
        posterior = "mode"  # it has no other, and diffusers draws nothing for it
    given = tuple(image) if isinstance(image, (list, tuple)) else (image,)
    if not given:
        raise BadArgument("image", [], "has no image; give one, or one for each prompt")
    sizes = [read_image(one, "image", SMALLEST * pipeline.vae.factor, background).shape[:2] for one in given]
    masks = make_mask(mask, sizes, **of_mask)
    pasted = masks is not None and masks.padding is not None and masks.paste
    if pasted and len(set(sizes)) > 1:
        raise BadArgument(
            "crop_padding", masks.padding, "results have the sizes of the images; give images of one size"
        )
    return Source(given, fit, background, posterior, masks, sizes[0] if pasted else None), sizes[0]


def check_strength(strength: float | None) -> None:
    """Raises BadArgument unless it is None or in (0, 1]."""
    if strength is not None and not 0 < strength <= 1:
        raise BadArgument("strength", f"{strength:g}", "out of range; choose more than 0, the image as it is, up to 1")


def check_count(source: Source | None, prompts: Sequence[str]) -> None:
    """Raises BadArgument unless there is one image, or one for each prompt; masks likewise."""
    for name, given in (("image", source and source.images), ("mask", source and source.mask and source.mask.images)):
        if given and len(given) not in (1, len(prompts)):
            problem = f"for {len(prompts)} prompts; give one {name}, or one for each prompt"
            raise BadArgument(name, f"{len(given)} {name}s", problem)


def check_steps_left(pipeline: Pipeline, sampler: str, steps: int, strength: float) -> None:
    """Raises BadArgument if the part of the timesteps that a strength leaves is shorter than the steps."""
    on_grid = sampler in ("lcm", "tcd")
    whole = pipeline.constants.solver_steps if on_grid else pipeline.schedule.num_train_timesteps
    left = kept(whole, strength) if on_grid else round(whole * strength)
    if left >= steps:
        return
    which = "solver steps" if on_grid else "timesteps"
    fewer = f"{left} steps or fewer, or " if left else ""
    smallest = math.ceil(steps / whole * 1e4) / 1e4
    problem = f"leaves {left} of the {whole} {which} for {steps} steps; use {fewer}a strength of {smallest:g} or more"
    raise BadArgument("strength", f"{strength:g}", problem)


def size_of(
    pipeline: Pipeline, image: tuple[int, int], height: int | None, width: int | None, max_side: int | None
) -> tuple[int, int]:
    """(height, width) of images that start from one of this size, in whole latents.

    With neither given it is the image's, reduced to `max_side` (None: `LARGEST` times the model's own); with one given
    the other follows from the image's aspect.
    """
    factor, (h, w) = pipeline.vae.factor, image
    if max_side is None:
        max_side = LARGEST * max(pipeline.default_size)
    if max_side < SMALLEST * factor:
        raise BadArgument("max_side", max_side, f"choose {SMALLEST * factor} or more")
    if height is None and width is None:
        scale = min(1.0, max_side / max(h, w))
        height, width = h * scale, w * scale
    elif height is None:
        height = h * width / w
    elif width is None:
        width = w * height / h
    else:
        return height, width
    return tuple(
        side if isinstance(side, int) else max(1, int(side / factor + 1e-6)) * factor for side in (height, width)
    )


def listed(path: Path) -> list[Path]:
    """The image, or the images of a folder by name; logs what else is in it. Raises BadArgument for what is neither."""
    if not path.is_dir():
        return [path]
    files = [one for one in sorted(path.iterdir()) if not one.name.startswith(".") and not one.is_dir()]
    found = [one for one in files if tree.is_image(one.name)]
    notes = ", ".join(tree.unknown(one.name for one in files if one not in found))
    if not found:
        problem = f"has no images; give a file, or a folder of {', '.join(images.FORMATS)} files"
        raise BadArgument("image", path, f"{problem} (it has {notes})" if notes else problem)
    if notes:
        logging.warning("%s: %d images; not used: %s", path, len(found), notes)
    return found


class Encoder:
    """A VAE's encoder; remembers the posteriors of the last images."""

    def __init__(self, vae: Any, weights: Weights, mesh: Mesh | None, tiled: bool):
        self._vae, self._weights, self._tiled, self._known = vae, weights, tiled, {}
        self._program = _program(mesh)

    def _run(self, image: np.ndarray) -> Any:
        with self._weights.using("vae") as params:
            return self._weights.done(self._program(self._vae, params["vae"], image))

    def moments(self, image: np.ndarray, hole: np.ndarray | None = None) -> Moments:
        """Mean and standard deviation [h w c] of uint8 [H W 3], unscaled; with mid-grey in the hole, bool [H W]."""
        read = hashlib.sha256(np.ascontiguousarray(image))
        read.update(b"" if hole is None else np.ascontiguousarray(hole))
        key = image.shape, read.digest()
        if key not in self._known:
            vae, pixels = self._vae, LEVELS[image][None]
            pixels = pixels if hole is None else np.where(hole[:, :, None], np.float32(0), pixels)
            tile = dict(tile=tiling.tile_size(vae), factor=vae.factor)
            mean, logvar = tiling.encode(self._run, pixels, **tile) if self._tiled else self._run(pixels)
            self._known[key] = np.asarray(mean[0]), np.exp(0.5 * np.asarray(logvar[0]))
            if len(self._known) > _ENCODED:
                self._known.pop(next(iter(self._known)))
        return self._known[key]

    def latents(self, canvases: Sequence[Canvas], xi: np.ndarray | None = None, masked: bool = False) -> np.ndarray:
        """Scaled latents [b h w c] of the canvases' pixels, or of those outside of their holes alone.

        They are the mode's, or with noise xi [b h w c] a sample's.
        """
        moments = [self.moments(one.pixels, one.hole if masked else None) for one in canvases]
        mean, std = (np.stack(parts) for parts in zip(*moments, strict=True))
        z = mean if xi is None else mean + std * xi
        return np.float32(self._vae.scaling_factor) * z


@functools.lru_cache
def _program(mesh: Mesh | None) -> Callable:
    """(vae, params, image [1 H W 3]) -> mean, log-variance [1 h w c], jitted for a mesh."""
    options = kernels.inference(mesh and mesh.devices.flat[0].platform)

    @functools.partial(
        jax.jit, static_argnames="vae", out_shardings=mesh and replicated(mesh), compiler_options=options
    )
    def encode(vae, params, image):
        if mesh is not None:  # attention there wants a row for each device
            rows = jnp.repeat(image, mesh.size, axis=0)
            image = jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))
        return jax.tree.map(lambda x: x[:1], vae.apply({"params": params}, image, method="encode"))

    return encode


def posteriors(pipeline: Pipeline, source: Source | None, strength: float | None) -> tuple[int, int]:
    """How many entries for posteriors diffusers draws before the start and behind it."""
    if source is None or source.posterior == "mode":
        return 0, 0
    if source.mask is None:
        return 1, 0
    return int(pipeline.purpose != "inpainting" or strength < 1), 1  # the masked image's: also where it is not used


def begin(
    pipeline: Pipeline,
    encoder: Encoder,
    source: Source,
    size: tuple[int, int],
    t: np.ndarray,
    drawn: np.ndarray,
    strength: float,
) -> Start:
    """The start at timesteps t from noise `drawn` for the posteriors and the steps, images of this height and width."""
    before, behind = posteriors(pipeline, source, strength)
    early, late, noise = drawn[:before], drawn[before : before + behind], drawn[before + behind :]
    schedule, eps, canvases = pipeline.schedule, noise[0], source.canvases(*size, pipeline.vae.factor, noise.shape[1])
    nine = pipeline.purpose == "inpainting"
    z = None if nine and strength == 1 else encoder.latents(canvases, early[0] if before else None)
    x = eps if z is None else schedule.alphas[t[0]] * z + schedule.sigmas[t[0]] * eps
    painting = None
    if source.mask is not None:
        m = np.stack([cells(one.hole, pipeline.vae.factor) for one in canvases])
        if nine:
            known = encoder.latents(canvases, late[0] if behind else None, masked=True)
            rows = {"inputs": np.concatenate([m, known], axis=-1)}
        else:
            rows = {"m": m, "z": z, "eps": eps}
            if strength == 1:
                x = eps if source.mask.start == "noise" else m * eps + (1 - m) * x
        levels = [
            np.append(table[t[1:]], np.float32(end)) for table, end in ((schedule.alphas, 1), (schedule.sigmas, 0))
        ]
        painting = Painting(rows, np.stack(levels).astype(np.float32))
    return Start(np.concatenate([x[None], noise[1:]]), painting, canvases)
