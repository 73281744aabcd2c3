"""A model on its devices that generates images: text, noise, the sampler's loop, the decoder.

    images = model("a red star", steps=4, guidance_scale=8, seed=0)      Pillow images

    cond = model.encode(["a red star"])                                  the same as arrays
    noise = model.noise(seed=0, numbers=[0], steps=4, height=64, width=64)
    z = model.latents(cond, noise, 8.0, Settings(steps=4))
    images = model.decode(z)

Image i depends on (seed, i) alone, not on how many are generated together; `noise` of other sources repeats the images
of other programs (`sampling.noise`). `guidance_scale` is the user's, w + 1:

    UNet with w embedding     one pass a step, conditioned on w
    without                   guidance scale 1: one pass; else two, cond + w (cond - null), null of the negative prompt

Weights are arguments of the compiled programs, so models of one architecture share the programs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from lcm_jax import assets
from lcm_jax.diffusion import samplers
from lcm_jax.diffusion.denoiser import call, guided_output, student_output
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError
from lcm_jax.models import tiling
from lcm_jax.pretrained import text
from lcm_jax.pretrained.controlnets import load_controlnet
from lcm_jax.pretrained.embeddings import Embedding
from lcm_jax.pretrained.model import Pipeline, PipelineParams
from lcm_jax.pretrained.names import Params
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import batch_sharding, place, replicated
from lcm_jax.sampling.chunks import chunked
from lcm_jax.sampling.control import Conditions, Control, Controlled, Net, conditions
from lcm_jax.sampling.image import ImageLike
from lcm_jax.sampling.image_to_image import Encoder, begin, check_count, posteriors
from lcm_jax.sampling.inpaint import Painting, Start, together
from lcm_jax.sampling.noise import draw_noise
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.preview import Preview
from lcm_jax.sampling.prompts import PLAIN, Reading, check_loras, check_readable
from lcm_jax.sampling.request import (
    Plan,
    Request,
    Settings,
    check_memory,
    check_numbers,
    check_texts,
    is_guided,
    make_plan,
    make_request,
    noise_entries,
    warnings,
)

Conditioning = Mapping[str, jax.Array]
UNROLLED = 4  # steps at most that are no loop on a GPU, see `loop_on`


def latents(
    unet: Any,
    schedule: NoiseSchedule,
    plan: Plan,
    params: Any,
    cond: Conditioning,
    null: Conditioning | None,
    noise: jax.Array,
    guidance_scale: jax.Array,
    hook: samplers.Hook | None = None,
    loop: Callable = samplers.scan,
    control: Conditions | None = None,
    painting: Painting | None = None,
) -> Any:
    """Scaled latents [b h w c]; pure, one scan over the steps.

    Args:
      unet, schedule: static: the network and its noise table. plan: the sampler bound to its timesteps.
      params: the UNet's weights.
      cond: of the captions [b ...]. null: of the null text [1 ...], for classifier-free guidance, two passes a step;
        None: one pass.
      noise: [steps b h w c] from `draw_noise`.
      guidance_scale: scalar; a UNet with w embedding is conditioned on w = guidance_scale - 1.
      hook, loop: see `diffusion.samplers`.
      control: of ControlNets, for these steps and passes.
      painting: of inpainting.
    """
    unet, hook = (unet, hook) if painting is None else (painting.on(unet), together(painting.hook(), hook))
    unet = unet if control is None else Controlled(unet, control, plan.t)
    batch = noise.shape[1]
    w = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32) - 1.0, (batch,))

    def model(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, (batch,))
        if unet.time_cond_proj_dim is not None:
            return student_output(unet, params, x, t, cond, w)
        return guided_output(unet, params, x, t, cond, null, w) if null else call(unet, params, x, t, cond)

    return plan(model, noise, schedule, hook, loop)


def _fill(tree: Any, mesh: Mesh | None) -> Any:
    """Rows [b ...] -> split over the mesh, the last row repeated up to a multiple of the devices."""
    if mesh is None:
        return tree
    sharding, devices = batch_sharding(mesh), mesh.size

    def fill(rows: jax.Array) -> jax.Array:
        last = np.minimum(np.arange(-(-rows.shape[0] // devices) * devices), rows.shape[0] - 1)
        return jax.lax.with_sharding_constraint(rows[last], sharding)

    return jax.tree.map(fill, tree)


def loop_on(platform: str) -> Callable:
    """How the steps become one program on devices of a platform: a loop; on GPUs few steps follow each other.

    Then XLA computes once what all steps share (keys and values of the text), and the steps can be one CUDA graph,
    which a loop cannot. 4 steps of one image on an H100 are, of Stable Diffusion 1.5, 3,142 kernels instead of 3,349
    and move 4 % fewer bytes; of SDXL 6,292 instead of 6,826, and 17 % fewer. Compiling takes 2 to 2.5 times as long,
    and longer with each step more.
    """
    return functools.partial(samplers.scan, unrolled=UNROLLED if platform == "gpu" else 0)


@functools.lru_cache
def _programs(mesh: Mesh | None) -> tuple[Callable, Callable]:
    """(latents, decode), jitted for a mesh; their static arguments are equal for models of one architecture."""
    platform = mesh and mesh.devices.flat[0].platform
    loop = loop_on(platform or jax.default_backend())
    options = {"out_shardings": mesh and replicated(mesh), "compiler_options": kernels.inference(platform)}

    @functools.partial(jax.jit, static_argnames=("unet", "schedule", "preview"), **options)
    def sample(
        unet,
        schedule,
        plan,
        params,
        cond,
        null,
        noise,
        scale,
        control=None,
        preview=None,
        preview_params=None,
        painting=None,
    ):
        rows = noise.shape[1]
        cond, noise = _fill(cond, mesh), _fill(noise.swapaxes(0, 1), mesh).swapaxes(0, 1)
        painting = painting and dataclasses.replace(painting, rows=_fill(painting.rows, mesh))
        hook = preview and preview.hook(preview_params, mesh)
        return latents(unet, schedule, plan, params, cond, null, noise, scale, hook, loop, control, painting)[:rows]

    @functools.partial(jax.jit, static_argnames="vae", **options)
    def decode(vae, params, z):
        return vae.apply({"params": params}, _fill(z, mesh), method="decode")[: z.shape[0]]

    return sample, decode


class Generator:
    """A pipeline with its weights on the devices.

    On a mesh the images of a batch are split over all devices, padded to a multiple of them; results are whole on every
    process.

    preview: shows what comes of each step, see `sampling.preview`; None: nothing does.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        params: PipelineParams,
        mesh: Mesh | None = None,
        tiled: bool = False,
        embeddings: Mapping[str, Embedding] | None = None,
        loras: Mapping[str, float] | None = None,
    ):
        """Puts the weights on the devices.

        Args:
          pipeline, params: from `load_pipeline`; the UNet's weights may be given to `latents` instead. Shapes are
            enough for `trace`.
          mesh: of the devices that share the work, weights sharded by its rule; None: the default device.
          tiled: decode large images in overlapping tiles, for less memory (`models.tiling`).
          embeddings: textual inversions, name in lower case -> embedding.
          loras: file's name without suffix -> weight of the LoRAs merged, which prompts may name.
        """
        self.pipeline = pipeline if mesh is None else kernels.on_mesh(pipeline, mesh)
        self.mesh, self.tiled, self._put = mesh, tiled, jax.device_put if mesh is None else place(mesh)
        self.params = jax.tree.map(self._put, dict(params))
        self.embeddings, self.loras = dict(embeddings or {}), dict(loras or {})
        self.preview: tuple[Preview, Params] | None = None
        self._sample, self._decode = _programs(mesh)
        self.encoder = Encoder(self.pipeline.vae, self.params.get("vae"), mesh, tiled)
        self._null: dict[tuple[str | None, Reading], Conditioning] = {}

    @property
    def dtype(self) -> str:
        """What the networks compute in."""
        return self.pipeline.unet.dtype.name

    def control_net(self, source: str | Path, variant: str | None = None) -> Net:
        """A ControlNet for this model, to be used with any number of images.

        Args:
          source: folder or hub id of a ControlNet in diffusers format, a single .safetensors file, or
            "shapes_controlnet", the embedded teacher's, which reads outlines (`data.shapes.outline`).
          variant: weight files to read, such as "fp16".

        Raises:
          LcmError: it cannot be loaded, or is for another family.
        """
        net, params = load_controlnet(assets.resolve(str(source)), self.pipeline, variant, put=self._put)
        return Net(str(source), net if self.mesh is None else kernels.equipped(net, self.mesh), params)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 4,
        guidance_scale: float | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "lcm",
        spacing: str = "trailing",
        noise: str = "jax",
        control: Sequence[Control] = (),
        control_guess: bool = False,
        batch_size: int = 4,
        prompt_syntax: str = "plain",
        emphasis: str | None = None,
        clip_skip: int | None = None,
        image: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None,
        fit: str | None = None,
        background: str | tuple[int, int, int] | None = None,
        max_side: int | None = None,
        posterior: str | None = None,
        mask: ImageLike | Sequence[ImageLike] | None = None,
        mask_blur: float | None = None,
        mask_grow: int | None = None,
        crop_padding: int | None = None,
        paste: bool | None = None,
        start: str | None = None,
    ) -> list[Image.Image]:
        """`num_images` images of each prompt, in order; logs `request.warnings`.

        Args:
          prompts: one prompt, or several.
          steps: of the sampler: 1 to 8 for an LCM, 50 for its teacher.
          guidance_scale: w + 1; 1 is no guidance. None: the model's own.
          seed: 0 .. 2^32 - 1; image i of a prompt depends on (seed, i) alone.
          negative_prompt: text that guidance moves away from; only for a UNet without w embedding.
          num_images: of each prompt.
          height, width: pixels; None: the model's own.
          sampler: one of `request.SAMPLERS`. spacing: of the timesteps of those other than "lcm".
          noise: one of `noise.SOURCES`; with "torch-batch" an image depends on num_images, too.
          control: images that steer through ControlNets. control_guess: guess mode (`sampling.control`).
          batch_size: images generated at once.
          prompt_syntax: "plain"; or "a1111" or "comfy", with weights in brackets and prompts of any length.
          emphasis: what weights do, one of `text.EMPHASES`; None: what the syntax's program does.
          clip_skip: layer of the text encoders whose states are used, counted from the last, which is 1; None: the
            model's own, 1, of SDXL 2.
          image: to start from, one for all prompts or one for each: a file, a Pillow image, or [h w 3], uint8 or floats
            in [0, 1]. Without height and width images have its size, in whole latents.
          strength: how far from the image, more than 0 to 1; None: 0.5, with a mask 1. All steps are run.
          fit: of an image of another aspect, one of `image.FITS`; None: "crop". background: colour under transparency.
          max_side: pixels that larger images are reduced to; None: twice the model's own size.
          posterior: of the VAE, "mode" or "sample"; None: "sample" with noise "torch" and "torch-batch", else "mode".
          mask: white where the image is painted, black where it is kept; an image, or [h w] of bool, too.
          mask_blur, mask_grow, crop_padding, paste, start: see `inpaint.Mask`.

        Raises:
          BadArgument: a value is wrong, or the model cannot do it.
          LcmError: images that are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_texts(prompts=prompts, negative_prompt=negative_prompt)
        check_numbers(seed, num_images=num_images, batch_size=batch_size)
        request = make_request(
            self.pipeline,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            noise=noise,
            prompt_syntax=prompt_syntax,
            emphasis=emphasis,
            clip_skip=clip_skip,
            control=control,
            control_guess=control_guess,
            image=image,
            strength=strength,
            fit=fit,
            background=background,
            max_side=max_side,
            posterior=posterior,
            mask=mask,
            mask_blur=mask_blur,
            mask_grow=mask_grow,
            crop_padding=crop_padding,
            paste=paste,
            start=start,
        )
        check_count(request.source, prompts)
        check_readable(prompt_syntax, prompts=prompts, negative_prompt=negative_prompt)
        for warning in warnings(self.pipeline, request):
            logging.warning(warning)
        found = []
        for images in self.batches(request, prompts, num_images, seed, batch_size):
            if bad := not_finite(images):
                raise LcmError(
                    f"image {len(found) + bad[0]} is not finite, and would be black; try dtype float32, and check "
                    "whether the weights are finite"
                )
            found += [Image.fromarray(image) for image in to_uint8(images)]
        return found

    def batches(
        self, request: Request, prompts: Sequence[str], num_images: int, seed: int, batch_size: int, first: int = 0
    ) -> Iterator[np.ndarray]:
        """`num_images` images of each prompt, in order, float32 in [0, 1], [b H W 3]; b is `whole_batch(batch_size)`.

        Those of a prompt have the numbers first, first + 1, ...

        The last batch is generated padded to the same size, so that it compiles nothing, and yielded cut. Fewer images
        than `batch_size` are one batch of their own size.

        Raises:
          BadArgument: at once, for a batch that needs more memory than there is.
          LcmError: at once, for prompts that cannot be read, see `check_prompts`.
        """
        total = len(prompts) * num_images
        size = self.whole_batch(min(batch_size, max(total, 1)))
        request = dataclasses.replace(request, num_images=first + num_images)
        self.check_memory(request, size)

        def jobs_from(start: int) -> list[tuple[int, int]]:
            """(prompt, number) of each image of a batch."""
            return [divmod(min(start + i, total - 1), num_images) for i in range(size)]

        for batch in {frozenset(prompt for prompt, _ in jobs_from(start)) for start in range(0, total, size)}:
            self.check_prompts(request, [prompts[prompt] for prompt in sorted(batch)])

        def generated() -> Iterator[np.ndarray]:
            for start in range(0, total, size):
                count, jobs = min(size, total - start), jobs_from(start)
                texts, numbers = [prompts[prompt] for prompt, _ in jobs], [first + number for _, number in jobs]
                asked = request.of([prompt for prompt, _ in jobs])
                yield self.generate(asked, texts, numbers, seed)[:count]

        return generated()

    def check_memory(self, request: Request, batch: int) -> None:
        """Raises BadArgument for a batch that needs more memory than there is, see `request.check_memory`."""
        check_memory(self.pipeline, request, batch, self.mesh, self.tiled)

    def check_prompts(self, request: Request, prompts: Sequence[str]) -> None:
        """Raises LcmError for the prompts of a batch that cannot be read together, see `chunks.chunked`."""
        reading = request.reading
        if reading.syntax == "plain":
            return
        texts = [*prompts, *([] if request.negative_prompt is None else [request.negative_prompt])]
        if reading.syntax == "a1111":
            check_loras("prompt", texts, self.loras)
        chunked(self.pipeline, self.embeddings, texts, reading)

    def whole_batch(self, batch_size: int) -> int:
        """`batch_size`, rounded up to a multiple of the devices."""
        devices = 1 if self.mesh is None else self.mesh.size
        return math.ceil(batch_size / devices) * devices

    def generate(self, request: Request, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> np.ndarray:
        """One batch of images, float32 in [0, 1], [b H W 3], for prompts and image numbers, [b] each."""
        noise, painting, canvases = self.start(request, numbers, seed)
        cond = self.encode(prompts, reading=request.reading)
        guided = is_guided(self.pipeline, request.guidance_scale)
        control = conditions(request.control, request.settings.steps, request.control_guess, guided)
        scale, settings, negative_prompt = request.guidance_scale, request.settings, request.negative_prompt
        more = dict(reading=request.reading, control=control, painting=painting)
        images = self.decode(self.latents(cond, noise, scale, settings, negative_prompt, **more))
        if painting is None or not request.source.mask.paste:
            return images
        return np.stack([canvas.pasted(image) for canvas, image in zip(canvases, images, strict=True)])

    def start(self, request: Request, numbers: Sequence[int], seed: int) -> Start:
        """What `latents` reads: noise [steps b h w c], of image to image with the noised images as its entry 0."""
        settings, size, source = request.settings, (request.height, request.width), request.source
        extra = posteriors(self.pipeline, source, settings.strength)
        drawn = self.noise(seed, numbers, noise_entries(settings), *size, request.noise, request.num_images, *extra)
        if source is None:
            return Start(drawn)
        t = make_plan(self.pipeline, settings).t
        return begin(self.pipeline, self.encoder, source, size, t, drawn, settings.strength)

    def noise(
        self,
        seed: int,
        numbers: Sequence[int],
        steps: int,
        height: int,
        width: int,
        source: str = "jax",
        num_images: int | None = None,
        before: int = 0,
        behind: int = 0,
    ) -> np.ndarray:
        """`draw_noise` for images of height x width pixels: [before + behind + steps b h w c]."""
        factor = self.pipeline.vae.factor
        shape = (height // factor, width // factor, self.pipeline.vae.latent_channels)
        return draw_noise(seed, numbers, steps, shape, source, num_images, before, behind)

    def encode(self, captions: Sequence[str], report: bool = False, reading: Reading = PLAIN) -> dict[str, jax.Array]:
        """Conditioning [b ...] of captions; report: log plain ones that are too long."""
        if reading == PLAIN and not self.embeddings:
            return text.encode(self.pipeline, self.params, captions, report)
        chunks = chunked(self.pipeline, self.embeddings, captions, reading)
        return text.encode_chunks(self.pipeline, self.params, chunks, reading.emphasis, reading.clip_skip)

    def null(self, negative_prompt: str | None = None, reading: Reading = PLAIN) -> Conditioning:
        """Conditioning [1 ...] of the second pass; None: the model's own null (`text.null`)."""
        key = negative_prompt, reading
        if key not in self._null:
            encoded = self.encode([negative_prompt or ""], reading=reading)
            self._null[key] = text.null_of(self.pipeline, encoded, negative_prompt)
        return self._null[key]

    def latents(
        self,
        cond: Conditioning,
        noise: np.ndarray,
        guidance_scale: float,
        settings: Settings,
        negative_prompt: str | None = None,
        unet_params: Any = None,
        reading: Reading = PLAIN,
        control: Conditions | None = None,
        painting: Painting | None = None,
    ) -> jax.Array:
        """Scaled latents [b h w c].

        Args:
          cond: `encode`d captions [b ...].
          noise: [steps b h w c], see `noise`; for samplers other than "lcm" one entry is enough. With a strength its
            entry 0 is the noised image, see `start`.
          guidance_scale: w + 1.
          negative_prompt: of the second pass, see `null`.
          unet_params: used instead of the model's own UNet weights.
          reading: how the negative prompt is read.
          control: of ControlNets, for these steps and passes.
          painting: of inpainting, see `start`.
        """
        pipeline = self.pipeline
        if pipeline.is_xl:
            height, width = (side * pipeline.vae.factor for side in noise.shape[2:4])
            cond = {**cond, "time_ids": text.time_ids(height, width, noise.shape[1])}
        null = self.null(negative_prompt, reading) if is_guided(pipeline, guidance_scale) else None
        if null is not None:
            cond, null = text.same_length(cond, null)
        return self._sample(
            pipeline.unet,
            pipeline.schedule,
            make_plan(pipeline, settings),
            self.params["unet"] if unet_params is None else unet_params,
            cond,
            null,
            noise,
            guidance_scale,
            control,
            *(self.preview or (None, None)),
            painting,
        )

    def trace(self, request: Request, batch: int) -> dict[str, jax.stages.Traced]:
        """The programs that make a batch of images, from shapes: "text", "sampler", "decoder". It needs a mesh."""
        pipeline, params, whole = self.pipeline, self.params, replicated(self.mesh)

        def shaped(tree: Any, dtype: Any = None) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=whole), tree)

        encoders = {name: getattr(pipeline, name) for name in pipeline.tokenizers}
        ids = {name: np.zeros((batch, one.max_position_embeddings), np.int32) for name, one in encoders.items()}
        encode = jax.jit(text.encode_tokens, static_argnums=0)
        args = pipeline.text_encoders, {name: params[name] for name in ids}, shaped(ids)
        cond = shaped(jax.eval_shape(functools.partial(text.encode_tokens, args[0]), *args[1:]))
        null = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=whole), cond)
        if pipeline.is_xl:
            cond["time_ids"] = shaped(text.time_ids(request.height, request.width, batch))
        plan, vae = make_plan(pipeline, request.settings), pipeline.vae
        z = np.zeros(
            (batch, request.height // vae.factor, request.width // vae.factor, vae.latent_channels), np.float32
        )
        noise = np.zeros((noise_entries(request.settings), *z.shape), np.float32)
        return {
            "text": encode.trace(*args),
            "sampler": self._sample.trace(
                pipeline.unet,
                pipeline.schedule,
                plan,
                params["unet"],
                cond,
                null if is_guided(pipeline, request.guidance_scale) else None,
                shaped(noise),
                request.guidance_scale,
            ),
            "decoder": self._decode.trace(vae, params["vae"], shaped(z)),
        }

    def decode(self, z: jax.Array) -> np.ndarray:
        """Scaled latents [b h w c] -> images float32 in [0, 1], [b H W 3]; NaN for values that are not finite."""
        vae = self.pipeline.vae
        decode = functools.partial(self._decode, vae, self.params["vae"])
        z = z / vae.scaling_factor
        images = tiling.decode(decode, z, tile=tiling.tile_size(vae), factor=vae.factor) if self.tiled else decode(z)
        images = np.asarray(images, np.float32) / 2.0 + 0.5
        # Clipping would turn infinity into white or black before anyone could see it.
        return np.where(np.isfinite(images), np.clip(images, 0.0, 1.0), np.nan)
