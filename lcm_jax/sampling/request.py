"""A request for images, completed from the model's constants and checked before anything is compiled.

request = make_request(pipeline, steps=4, guidance_scale=8)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lcm_jax.diffusion import timesteps as timesteps_lib
from lcm_jax.errors import BadArgument
from lcm_jax.pretrained.model import MAX_TWO_PASS_SCALE, Pipeline, check_generates, check_text_to_image
from lcm_jax.runtime import memory
from lcm_jax.sampling import control as control_lib
from lcm_jax.sampling import image_to_image, inpaint, nag
from lcm_jax.sampling import noise as noise_lib
from lcm_jax.sampling.control import Control
from lcm_jax.sampling.image import ImageLike, shown
from lcm_jax.sampling.image_to_image import Source
from lcm_jax.sampling.plan import (
    EULER,
    MAX_STEPS,
    ON_GRID,
    SAMPLERS,
    Settings,
    check_steps,
    check_timesteps,
    noise_entries,
)
from lcm_jax.sampling.prompts import PLAIN, Reading, make_reading

MAX_PROMPT = 100_000  # characters; a text encoder reads the first 77 tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for images, complete and checked.

    Attributes:
      settings: sampler and steps.
      guidance_scale: the user's, w + 1.
      height, width: of the images, in pixels.
      negative_prompt: text that guidance moves away from; None: the model's null text.
      nag_scale: of guidance in attention (`sampling.nag`); 1 is none.
      noise: where it comes from, one of `noise.SOURCES`.
      num_images: of a prompt, which noise "torch-batch" draws together; None: as many as are generated at once.
      reading: how the prompts, the negative one too, are read and encoded.
      control: with images of this size, uint8 [height width 3].
      control_guess: whether their nets are in guess mode (`sampling.control`).
      source: the images of image to image; None: text alone.
      second: a `chain.Second`: the pass behind this one; None: there is none.
    """

    settings: Settings
    guidance_scale: float
    height: int
    width: int
    negative_prompt: str | None = None
    nag_scale: float = 1.0
    noise: str = "jax"
    num_images: int | None = None
    reading: Reading = PLAIN
    control: tuple[Control, ...] = ()
    control_guess: bool = False
    source: Source | None = None
    second: Any = None

    def of(self, prompts: Sequence[int]) -> "Request":
        """The request for these prompts of its own."""
        return self if self.source is None else dataclasses.replace(self, source=self.source.of(prompts))

    @property
    def of_size(self) -> tuple[int, int, int, int]:
        """Height and width of the images as they are sampled, and as they are in the end."""
        size = self.height, self.width
        return *size, *((self.source and self.source.of_size) or size)


def make_request(
    pipeline: Pipeline,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    gamma: float | None = None,
    timesteps: Sequence[int] = (),
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    nag_scale: float = 1.0,
    noise: str = "jax",
    prompt_syntax: str = "plain",
    emphasis: str | None = None,
    clip_skip: int | None = None,
    control: Sequence[Control] = (),
    control_guess: bool = False,
    image: ImageLike | Sequence[ImageLike] | None = None,
    mask: ImageLike | Sequence[ImageLike] | None = None,
    strength: float | None = None,
    max_side: int | None = None,
    **of_image: Any,
) -> Request:
    """A request with the model's default sampler, steps, guidance scale and size for those that are None.

    The default size is that of `image`, see `image_to_image.size_of`, or of the first image of `control`, rounded down
    to whole latents. `of_image`: see `image_to_image.make_source`.

    Raises:
      BadArgument: a value is wrong, or the model cannot do it.
      LcmError: it is no text-to-image model.
    """
    if mask is None:
        check_text_to_image(pipeline, "the model", "an image and a mask, or ")
    check_generates(pipeline, "the model")
    sampler = pipeline.default_sampler if sampler is None else sampler
    if sampler not in SAMPLERS:
        raise BadArgument("sampler", sampler, f"choose one of {', '.join(SAMPLERS)}")
    if spacing not in timesteps_lib.SPACINGS:
        raise BadArgument("spacing", spacing, f"choose one of {', '.join(timesteps_lib.SPACINGS)}")
    if spacing != "trailing" and (sampler in (*EULER, *ON_GRID) or timesteps):
        problem = "timesteps are given" if timesteps else f"{sampler} has timesteps of its own"
        raise BadArgument("spacing", spacing, f"{problem}; leave it out")
    if gamma is not None and (sampler != "tcd" or not 0.0 <= gamma <= 1.0):
        raise BadArgument("gamma", f"{gamma:g}", "is of the sampler tcd, from 0, no fresh noise, to 1")
    timesteps = tuple(timesteps)
    steps = check_timesteps(pipeline, sampler, timesteps, steps, image is not None)
    if noise not in noise_lib.SOURCES:
        raise BadArgument("noise", noise, f"choose one of {', '.join(noise_lib.SOURCES)}")
    on_grid = sampler in ON_GRID and not timesteps
    check_steps(steps, min(MAX_STEPS, pipeline.constants.solver_steps) if on_grid else MAX_STEPS)
    check_guidance_scale(guidance_scale)
    nag.check_scale(nag_scale)
    scale = pipeline.default_guidance_scale(sampler) if guidance_scale is None else guidance_scale
    size, factor, defaults = [], pipeline.vae.factor, pipeline.default_size
    control = control_lib.read(control, pipeline)
    source = None
    for name, value in {"mask": mask, "strength": strength, "max_side": max_side, **of_image}.items():
        if image is None and value is not None:
            raise BadArgument(name, shown(value), "is for image to image; give an image, or leave it out")
    if image is not None:
        if strength is None:
            strength = image_to_image.STRENGTH if mask is None else inpaint.STRENGTH
        image_to_image.check_strength(strength)
        image_to_image.check_steps_left(pipeline, sampler, steps, strength)
        if spacing != "trailing":
            raise BadArgument("spacing", spacing, "image to image starts within trailing timesteps; leave it out")
        source, shape = image_to_image.make_source(pipeline, image, noise, mask=mask, **of_image)
        if source.mask is None or source.mask.padding is None:
            height, width = image_to_image.size_of(pipeline, shape, height, width, max_side)
    elif control and height is None and width is None:
        defaults = tuple(side // factor * factor for side in control[0].image.shape[:2])
    for name, side, default in zip(("height", "width"), (height, width), defaults, strict=True):
        side = default if side is None else side
        if side < factor or side % factor:
            raise BadArgument(name, side, f"not a multiple of the VAE's factor {factor}; use one")
        size.append(side)
    if negative_prompt is not None and pipeline.has_w_embedding and nag_scale == 1.0:
        raise BadArgument(
            "negative_prompt",
            negative_prompt,
            "this UNet has a w embedding: guidance against the null text was distilled in, so there is no second pass "
            f"for another text; add nag_scale={nag.SCALE:g} (guidance in attention), leave it out, or use an "
            "LCM-LoRA on the base model",
        )
    reading = make_reading(pipeline, prompt_syntax, emphasis, clip_skip)
    control = control_lib.fitted(control, *size, factor)
    return Request(
        Settings(sampler, steps, spacing, gamma or 0.0, timesteps, strength),
        float(scale),
        *size,
        negative_prompt=negative_prompt,
        nag_scale=float(nag_scale),
        noise=noise,
        reading=reading,
        control=control,
        control_guess=control_guess,
        source=source,
    )


def joined(requests: Sequence[Request]) -> Request:
    """One request for the prompts of several of one size, which differ in their images and masks alone."""
    if requests[0].source is None:
        return requests[0]
    sources = [request.source for request in requests]
    images, mask = tuple(image for source in sources for image in source.images), sources[0].mask
    if mask is not None:
        mask = dataclasses.replace(mask, images=tuple(one for source in sources for one in source.mask.images))
    return dataclasses.replace(requests[0], source=dataclasses.replace(sources[0], images=images, mask=mask))


def check_guidance_scale(scale: float | None) -> None:
    """Raises BadArgument unless it is None, or finite and at least 1."""
    if scale is not None and not 1.0 <= scale < float("inf"):
        raise BadArgument("guidance_scale", f"{scale:g}", "1 is no guidance; use 1 or more")


def check_memory(
    pipeline: Pipeline, request: Request, batch: int, mesh: Mesh | None, tiled: bool, sliced: bool = False
) -> None:
    """Raises BadArgument if a batch of images certainly needs more memory than there is: sizes that nobody means.

    Counted are noise, text, one layer of the UNet, of the decoder and of the encoder, and the images; a batch that
    passes may still be too large.
    """
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    on_cpu, here, host = devices[0].platform == "cpu", memory.of_devices(devices), memory.of_host()

    if request.noise == "torch-batch":
        pixels = request.height * request.width * (request.num_images or batch)
        drawn = 8 * noise_entries(request.settings) * pixels // pipeline.vae.factor**2 * pipeline.vae.latent_channels
        if drawn > host:
            found = f"{drawn / memory.GIB:.1f} GiB of memory or more, {host / memory.GIB:.1f} GiB are free"
            problem = f"noise torch-batch draws all images of a prompt together, which needs {found}; ask for fewer"
            raise BadArgument("num_images", request.num_images, problem)

    def lacking(images: int) -> tuple[int, int] | None:
        """(bytes that this many need, bytes that are there), if they do not fit."""
        device, machine = _bytes_needed(pipeline, request, images, len(devices), tiled, sliced)
        pairs = [(device + machine, host)] if on_cpu else [(device, here), (machine, host)]
        return next((pair for pair in pairs if pair[0] > pair[1]), None)

    if found := lacking(batch):
        name, value = ("height", request.height) if lacking(1) else ("batch_size", batch)
        needed, there = (f"{count / memory.GIB:.1f} GiB" for count in found)
        raise BadArgument(
            name,
            value,
            f"{batch} images of {request.width} x {request.height} at once need {needed} of memory or more, {there} "
            "are free; choose a smaller batch_size, height or width",
        )


def _bytes_needed(
    pipeline: Pipeline, request: Request, batch: int, devices: int, tiled: bool, sliced: bool
) -> tuple[int, int]:
    """(bytes on each device, bytes on the host) that a batch needs at least."""
    unet, vae = pipeline.unet, pipeline.vae
    rows, pixels = -(-batch // devices), request.height * request.width
    places = pixels // vae.factor**2
    noise = 4 * noise_entries(request.settings) * batch * places * vae.latent_channels
    text = 4 * batch * 77 * int(np.max(unet.cross_attention_dim))
    images = 4 * batch * pixels * 3
    widths = getattr(vae, "block_out_channels", (64,))[:2]  # its last block's output and input
    decoder = 0 if tiled else (1 if sliced else rows) * pixels * sum(widths) * np.dtype(vae.dtype).itemsize
    encoder = 0 if tiled or request.source is None else 2 * pixels * widths[0] * np.dtype(vae.dtype).itemsize
    layers = 2 * rows * places * unet.block_out_channels[0] * np.dtype(unet.dtype).itemsize
    return noise + text + (0 if tiled else images) + max(decoder, encoder, layers), noise + 2 * images


def check_texts(**texts: str | Sequence[str] | None) -> None:
    """Raises BadArgument, which names the argument, for a text that is too long or not UTF-8, as shells can give it."""
    for name, given in texts.items():
        for text in [given] if isinstance(given, str) else given or ():
            if len(text) > MAX_PROMPT:
                raise BadArgument(name, f"{text[:40]}...", f"has {len(text)} characters; give at most {MAX_PROMPT}")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadArgument(name, ascii(text)[1:-1], "is not UTF-8; write it in UTF-8") from None


def check_numbers(seed: int, **counts: int | None) -> None:
    """Raises BadArgument for a seed outside 0 .. 2^32 - 1, or a count below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise BadArgument(name, count, "must be at least 1")
    if not 0 <= seed < 2**32:
        raise BadArgument("seed", seed, f"out of range; choose 0 to {2**32 - 1}")


def warnings(pipeline: Pipeline, request: Request) -> list[str]:
    """Reasons why the images will probably disappoint, one line each."""
    scale, sampler, constants = request.guidance_scale, request.settings.sampler, pipeline.constants
    low, high = constants.w_min + 1.0, constants.w_max + 1.0
    found = []
    if pipeline.has_w_embedding and not low <= scale <= high:
        found.append(f"guidance scale {scale:g} is outside {low:g} to {high:g}, the range this model was distilled on")
    if not pipeline.has_w_embedding and sampler == "lcm" and scale > MAX_TWO_PASS_SCALE:
        found.append(
            f"guidance scale {scale:g} on an LCM without w embedding: guidance is distilled in already, and above "
            f"{MAX_TWO_PASS_SCALE:g} images come out oversaturated, with burnt contrast and broken shapes; use 1 (one "
            f"pass) to {MAX_TWO_PASS_SCALE:g}"
        )
    if request.negative_prompt is not None and scale == request.nag_scale == 1.0 and request.settings.stop is None:
        found.append(
            "a negative prompt has no effect at guidance scale 1, which is one pass; use a scale above 1, or "
            f"nag_scale {nag.SCALE:g}"
        )
    if sampler == "lcm" and not (pipeline.is_lcm or pipeline.may_be_lcm):
        found.append(
            "this may not be a Latent Consistency Model (no w embedding, lcm_config.json, LCMScheduler or LoRA); if it "
            "is not, few steps give blurred images: use the sampler ddim, or add an LCM-LoRA"
        )
    if request.source is not None and request.source.mask is not None and request.source.mask.whole:
        found.append("the mask is all white: the whole image is painted, as from text alone; paint black what is kept")
    steps = request.settings.steps
    if sampler == "lcm" and constants.phases:
        found.append(
            "sampler lcm on a phased map: it jumps to the data, and this model was trained to jump to the edge of a "
            f"phase; use tcd in {constants.phases} steps"
        )
    if sampler == "tcd" and constants.phases not in (0, steps):
        found.append(
            f"{steps} steps of a phased map with {constants.phases} phases: its jumps end elsewhere; use "
            f"{constants.phases}"
        )
    if sampler == "tcd" and request.settings.gamma < 1.0 and pipeline.is_lcm and not constants.phases:
        found.append(
            "sampler tcd on a map to the data: between its steps it goes on by noise that the model was not trained to "
            "predict, which can raise contrast; compare with lcm"
        )
    for control in request.control:
        if not control.on(steps).any():
            found.append(
                f"{control.net.source} has no effect: none of {steps} steps lies within {control.start:g}-"
                f"{control.end:g}; use more steps, or a wider window"
            )
    return found


def evaluations(pipeline: Pipeline, request: Request) -> int:
    """Passes of the UNet for one image: two a step if guidance takes a second one."""
    return request.settings.steps * (2 if is_guided(pipeline, request.guidance_scale) else 1)


def is_guided(pipeline: Pipeline, guidance_scale: float) -> bool:
    """Whether a step takes a second pass, with the null text or the negative prompt."""
    return guidance_scale != 1.0 and not pipeline.has_w_embedding
