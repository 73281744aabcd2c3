"""Image to image: the sampler starts from a noised image, at the timestep of a strength in (0, 1].

    z = scaling_factor (mean + exp(logvar / 2) xi)      of the VAE's posterior; its mode, without the noise, by default
    x = alpha_t z + sigma_t eps                         t: first timestep

All steps are run, over the part of the timesteps that the strength names. `Source` is what a request has of it.

    sampler    timesteps of N steps at strength s
    lcm        N of the first floor(O s) entries of the grid of O solver steps, evenly spaced from its end
    others     trailing over T_s = round(T s): round(T_s - j T_s / N) - 1

The first is that of diffusers' LatentConsistencyModelImg2ImgPipeline. Its other pipelines instead cut the table of N
steps: s and N here are s and N / s there.
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
from jax.sharding import Mesh

from lcm_jax.data import images
from lcm_jax.data.encoding import LEVELS
from lcm_jax.diffusion.timesteps import kept
from lcm_jax.errors import BadArgument
from lcm_jax.models import tiling
from lcm_jax.models.taesd import AutoencoderTiny
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import batch_sharding, replicated
from lcm_jax.sampling.image import FITS, ImageLike, fitted, parse_colour, read_image

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
    """

    images: tuple[ImageLike, ...]
    fit: str = "crop"
    background: images.Background = "white"
    posterior: str = "mode"

    def of(self, prompts: Sequence[int]) -> "Source":
        """With the images of these prompts."""
        return (
            self
            if len(self.images) == 1
            else dataclasses.replace(self, images=tuple(map(self.images.__getitem__, prompts)))
        )

    def pixels(self, height: int, width: int) -> list[np.ndarray]:
        """uint8 [height width 3] for each image; what is given twice is read once."""
        found: dict[int, np.ndarray] = {}
        for one in self.images:
            if id(one) not in found:
                found[id(one)] = fitted(read_image(one, "image", 1, self.background), height, width, self.fit)
        return [found[id(one)] for one in self.images]


def make_source(
    pipeline: Pipeline,
    image: ImageLike | Sequence[ImageLike],
    fit: str | None = None,
    background: str | tuple[int, int, int] | None = None,
    posterior: str | None = None,
    noise: str = "jax",
) -> tuple[Source, tuple[int, int]]:
    """(source, height and width of its first image), checked; None: the default.

    posterior: by default "sample" for noise "torch" and "torch-batch", as diffusers has it, else "mode".

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
    return Source(given, fit, background, posterior), sizes[0]


def check_strength(strength: float | None) -> None:
    """Raises BadArgument unless it is None or in (0, 1]."""
    if strength is not None and not 0 < strength <= 1:
        raise BadArgument("strength", f"{strength:g}", "out of range; choose more than 0, the image as it is, up to 1")


def check_count(source: Source | None, prompts: Sequence[str]) -> None:
    """Raises BadArgument unless there is one image, or one for each prompt."""
    if source is not None and len(source.images) not in (1, len(prompts)):
        problem = f"for {len(prompts)} prompts; give one image, or one for each prompt"
        raise BadArgument("image", f"{len(source.images)} images", problem)


def check_steps_left(pipeline: Pipeline, sampler: str, steps: int, strength: float) -> None:
    """Raises BadArgument if the part of the timesteps that a strength leaves is shorter than the steps."""
    whole = pipeline.constants.solver_steps if sampler == "lcm" else pipeline.schedule.num_train_timesteps
    left = kept(whole, strength) if sampler == "lcm" else round(whole * strength)
    if left >= steps:
        return
    which = "solver steps" if sampler == "lcm" else "timesteps"
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
    """The image, or the images of a folder by name. Raises BadArgument for what is neither."""
    if not path.is_dir():
        return [path]
    found = [one for one in sorted(path.iterdir()) if one.suffix.lower().removeprefix(".") in images.SUFFIXES]
    if not found:
        raise BadArgument(
            "image", path, f"has no images; give a file, or a folder of {', '.join(images.FORMATS)} files"
        )
    return found


class Encoder:
    """A VAE's encoder with its weights on the devices; remembers the posteriors of the last images."""

    def __init__(self, vae: Any, params: Any, mesh: Mesh | None, tiled: bool):
        self._vae, self._tiled, self._known = vae, tiled, {}
        self._run = functools.partial(_program(mesh), vae, params)

    def moments(self, image: np.ndarray) -> Moments:
        """Mean and standard deviation [h w c] of uint8 [H W 3], unscaled."""
        key = image.shape, hashlib.sha256(np.ascontiguousarray(image)).digest()
        if key not in self._known:
            vae, pixels = self._vae, LEVELS[image][None]
            tile = dict(tile=tiling.tile_size(vae), factor=vae.factor)
            mean, logvar = tiling.encode(self._run, pixels, **tile) if self._tiled else self._run(pixels)
            self._known[key] = np.asarray(mean[0]), np.exp(0.5 * np.asarray(logvar[0]))
            if len(self._known) > _ENCODED:
                self._known.pop(next(iter(self._known)))
        return self._known[key]

    def latents(self, pixels: Sequence[np.ndarray], xi: np.ndarray | None = None) -> np.ndarray:
        """Scaled latents [b h w c] of images uint8 [H W 3]; of the mode, or with noise xi [b h w c] a sample."""
        mean, std = (np.stack(parts) for parts in zip(*map(self.moments, pixels), strict=True))
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
