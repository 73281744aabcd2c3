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
    either, nag_scale > 1     the same passes, with the negative prompt in attention (`sampling.nag`)

Weights are arguments of the compiled programs, so models of one architecture share the programs.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.models import int8, tiling
from lcm_jax.pretrained import text
from lcm_jax.pretrained.controlnets import load_controlnet
from lcm_jax.pretrained.embeddings import Embedding
from lcm_jax.pretrained.load import load_pipeline
from lcm_jax.pretrained.model import Pipeline, PipelineParams
from lcm_jax.pretrained.names import Params
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import place, replicated
from lcm_jax.sampling import chain
from lcm_jax.sampling.chunks import chunked
from lcm_jax.sampling.control import Conditions, Control, Net, conditions
from lcm_jax.sampling.image import ImageLike
from lcm_jax.sampling.image_to_image import Encoder, begin, check_count, posteriors
from lcm_jax.sampling.inpaint import Painting, Start
from lcm_jax.sampling.nag import Negative
from lcm_jax.sampling.noise import draw_noise
from lcm_jax.sampling.offload import AHEAD, Weights
from lcm_jax.sampling.plan import Settings, make_plan, noise_entries
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.preview import Preview
from lcm_jax.sampling.programs import Conditioning, programs
from lcm_jax.sampling.prompts import PLAIN, Reading, check_loras, check_readable
from lcm_jax.sampling.request import (
    Request,
    check_memory,
    check_numbers,
    check_texts,
    is_guided,
    make_request,
    warnings,
)

NULLS = 32  # null texts that are kept: on a page each letter of a negative prompt makes one


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
        offload: str | None = None,
        sliced: bool = False,
    ):
        """Puts the weights where they are kept.

        Args:
          pipeline, params: from `load_pipeline`, kernels perhaps in 8 bits (`models.int8`); the UNet's weights may be
            given to `latents` instead. Shapes are enough for `trace`.
          mesh: of the devices that share the work, weights sharded by its rule; None: the default device.
          tiled: decode large images in overlapping tiles, for less memory (`models.tiling`).
          embeddings: textual inversions, name in lower case -> embedding.
          loras: file's name without suffix -> weight of the LoRAs merged, which prompts may name.
          offload: weights that wait on the host, see `sampling.offload`; None: none do.
          sliced: decode images one at a time, on a mesh one on each device, for less memory.
        """
        pipeline = pipeline if mesh is None else kernels.on_mesh(pipeline, mesh)
        quantised = {part for part, tree in params.items() if int8.has_quantised(tree)}
        self._dequantising = functools.partial(
            kernels.dequantising, platform=None if mesh is None else mesh.devices.flat[0].platform
        )
        parts = {part: self._dequantising(getattr(pipeline, part)) for part in quantised}
        self.pipeline = dataclasses.replace(pipeline, **parts)
        self.mesh, self.tiled, self.sliced = mesh, tiled, sliced
        self._put = jax.device_put if mesh is None else place(mesh)
        self.weights = Weights(params, mesh, offload)
        self._ahead: dict[tuple[tuple[str, ...], Reading], Conditioning] = {}
        self.embeddings, self.loras = dict(embeddings or {}), dict(loras or {})
        self.preview: tuple[Preview, Params] | None = None
        self._sample, self._decode = programs(mesh)
        self.encoder = Encoder(self.pipeline.vae, self.weights, mesh, tiled)
        self._null: dict[tuple[str | None, Reading], Conditioning] = {}

    @property
    def params(self) -> PipelineParams:
        """Part -> its weights where they are kept."""
        return self.weights.home

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
        change = int8.change if int8.has_quantised(self.params["unet"]) else None
        place = assets.resolve(str(source))
        net, params = load_controlnet(place, self.pipeline, variant, put=self._put, change=change)
        net = net if self.mesh is None else kernels.equipped(net, self.mesh)
        return Net(str(source), net if change is None else self._dequantising(net), params)

    def refiner(self, source: str | Path, variant: str | None = None) -> "Generator":
        """SDXL's refiner, to start from this model's latents (`chain.Refine`); it has no decoder of its own.

        Args:
          source: folder or hub id in diffusers format, or a single .safetensors file.
          variant: weight files to read, such as "fp16".

        Raises:
          LcmError: it cannot be loaded, is no refiner, or this model's latents are not SDXL's.
        """
        options = {"variant": variant, "dtype": self.dtype, "param_dtype": None}
        chain.check_refiner(self.pipeline, load_pipeline(source, **options, weights=False)[0], source)
        read = {"unet", "text_encoder_2"}
        pipeline, params = load_pipeline(source, **options, put=self._put, weights=read)
        params = {part: params[part] for part in read}
        return Generator(pipeline, params, self.mesh, embeddings=self.embeddings, loras=self.loras)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        nag_scale: float = 1.0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        spacing: str = "trailing",
        gamma: float | None = None,
        timesteps: Sequence[int] = (),
        noise: str = "jax",
        control: Control | Sequence[Control] = (),
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
        then: chain.Hires | chain.Refine | None = None,
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
          steps: of the sampler: 1 to 8 for an LCM, 50 for its teacher; None: 4, of a phased map its phases.
          guidance_scale: w + 1; 1 is no guidance. None: the model's own.
          seed: 0 .. 2^32 - 1; image i of a prompt depends on (seed, i) alone.
          negative_prompt: text that guidance moves away from; a UNet with w embedding, or guidance scale 1, needs
            nag_scale for it.
          nag_scale: of guidance in attention (`sampling.nag`); 1 is none, 3 usual.
          num_images: of each prompt.
          height, width: pixels; None: the model's own.
          sampler: one of `request.SAMPLERS`; None: the model's own. spacing, gamma, timesteps: see `Settings`.
          noise: one of `noise.SOURCES`; with "torch-batch" an image depends on num_images, too.
          control: one or several images that steer through ControlNets. control_guess: guess mode (`sampling.control`).
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
          then: a second pass behind the first, see `sampling.chain`.
          mask: white where the image is painted, black where it is kept; an image, or [h w] of bool, too.
          mask_blur, mask_grow, crop_padding, paste, start: see `inpaint.Mask`.

        Raises:
          BadArgument: a value is wrong, or the model cannot do it.
          LcmError: images that are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        control = (control,) if isinstance(control, Control) else control
        check_texts(prompts=prompts, negative_prompt=negative_prompt)
        check_numbers(seed, num_images=num_images, batch_size=batch_size)
        request = make_request(
            self.pipeline,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            gamma=gamma,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            nag_scale=nag_scale,
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
        request = chain.followed(self.pipeline, request, then, control)
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
                if self.weights.mode and start % (AHEAD * size) == 0:
                    starts = range(start, total, size)[:AHEAD]
                    self._encode_ahead(request, [[prompts[prompt] for prompt, _ in jobs_from(one)] for one in starts])
                count, jobs = min(size, total - start), jobs_from(start)
                texts, numbers = [prompts[prompt] for prompt, _ in jobs], [first + number for _, number in jobs]
                asked = request.of([prompt for prompt, _ in jobs])
                yield self.generate(asked, texts, numbers, seed)[:count]
            self._ahead = {}

        return generated()

    def _encode_ahead(self, request: Request, batches: Sequence[Sequence[str]]) -> None:
        """Encodes the prompts of batches in one visit of the text encoders."""
        self._ahead = {}
        with self.weights.using(*self.pipeline.tokenizers):
            for captions in batches:
                self._ahead[tuple(captions), request.reading] = self.encode(captions, reading=request.reading)
            if is_guided(self.pipeline, request.guidance_scale):
                self.null(request.negative_prompt, request.reading)
            if request.nag_scale != 1.0:
                self.null(request.negative_prompt or "", request.reading)

    def check_memory(self, request: Request, batch: int) -> None:
        """Raises BadArgument for a batch that needs more memory than there is, see `request.check_memory`."""
        for one in [request, *([request.second.request] if request.second else [])]:
            check_memory(self.pipeline, one, batch, self.mesh, self.tiled, self.sliced)

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
        z = self.sampled(request, prompts, noise, painting)
        if request.second is not None:
            z = chain.second_pass(self, request, z, prompts, numbers, seed)
        images = self.decode(z)
        if painting is None or not request.source.mask.paste:
            return images
        return np.stack([canvas.pasted(image) for canvas, image in zip(canvases, images, strict=True)])

    def sampled(
        self, request: Request, prompts: Sequence[str], noise: np.ndarray, painting: Painting | None = None
    ) -> jax.Array:
        """Scaled latents [b h w c] of the first pass of a request, from what `start` gives."""
        cond = self.encode(prompts, reading=request.reading)
        guided = is_guided(self.pipeline, request.guidance_scale)
        control = conditions(request.control, request.settings.steps, request.control_guess, guided)
        return self.latents(
            cond,
            noise,
            request.guidance_scale,
            request.settings,
            request.negative_prompt,
            reading=request.reading,
            control=control,
            nag_scale=request.nag_scale,
            painting=painting,
        )

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
        again: bool = False,
    ) -> np.ndarray:
        """`draw_noise` for images of height x width pixels: [before + behind + steps b h w c]."""
        factor = self.pipeline.vae.factor
        shape = (height // factor, width // factor, self.pipeline.vae.latent_channels)
        return draw_noise(seed, numbers, steps, shape, source, num_images, before, behind, again)

    def encode(self, captions: Sequence[str], report: bool = False, reading: Reading = PLAIN) -> dict[str, jax.Array]:
        """Conditioning [b ...] of captions; report: log plain ones that are too long."""
        if not report and (found := self._ahead.get((tuple(captions), reading))):
            return found
        with self.weights.using(*self.pipeline.tokenizers) as params:
            if reading == PLAIN and not self.embeddings:
                return self.weights.done(text.encode(self.pipeline, params, captions, report))
            chunks = chunked(self.pipeline, self.embeddings, captions, reading)
            found = text.encode_chunks(self.pipeline, params, chunks, reading.emphasis, reading.clip_skip)
            return self.weights.done(found)

    def null(self, negative_prompt: str | None = None, reading: Reading = PLAIN) -> Conditioning:
        """Conditioning [1 ...] of the second pass; None: the model's own null (`text.null`)."""
        key = negative_prompt, reading
        if key not in self._null:
            encoded = self.encode([negative_prompt or ""], reading=reading)
            self._null[key] = text.null_of(self.pipeline, encoded, negative_prompt)
            if len(self._null) > NULLS:
                self._null.pop(next(iter(self._null)))
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
        nag_scale: float = 1.0,
        painting: Painting | None = None,
    ) -> jax.Array:
        """Scaled latents [b h w c].

        Args:
          cond: `encode`d captions [b ...].
          noise: [steps b h w c], see `noise`; for samplers other than "lcm" one entry is enough. With a strength its
            entry 0 is the noised image, see `start`.
          guidance_scale: w + 1.
          negative_prompt: of the second pass, see `null`, and of `nag_scale`.
          unet_params: used instead of the model's own UNet weights.
          reading: how the negative prompt is read.
          control: of ControlNets, for these steps and passes.
          nag_scale: of guidance in attention (`sampling.nag`), of "" if there is no negative prompt; 1 is none.
          painting: of inpainting, see `start`.
        """
        pipeline = self.pipeline
        null = self.null(negative_prompt, reading) if is_guided(pipeline, guidance_scale) else None
        if null is not None:
            cond, null = text.same_length(cond, null)
        if pipeline.is_xl:
            refines, size = pipeline.purpose == "refining", [side * pipeline.vae.factor for side in noise.shape[2:4]]
            cond = {**cond, "time_ids": text.time_ids(*size, noise.shape[1], text.SCORE if refines else None)}
            if refines and null is not None:
                null = {**null, "time_ids": text.time_ids(*size, 1, text.NULL_SCORE)}
        nag, plan = None, make_plan(pipeline, settings)
        if nag_scale != 1.0:
            nag = Negative(self.null(negative_prompt or "", reading)["encoder_hidden_states"], jnp.float32(nag_scale))
        with self.weights.using(*(["unet"] if unet_params is None else [])) as held:
            z = self._sample(
                pipeline.unet,
                pipeline.schedule,
                plan,
                held["unet"] if unet_params is None else unet_params,
                cond,
                null,
                noise,
                guidance_scale,
                control,
                nag,
                painting,
                *(self.preview or ()),
            )
            return self.weights.done(z)

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
            "decoder": self._decode.trace(vae, params["vae"], shaped(z), self.sliced),
        }

    def decode(self, z: jax.Array) -> np.ndarray:
        """Scaled latents [b h w c] -> images float32 in [0, 1], [b H W 3]; NaN for values that are not finite."""
        vae = self.pipeline.vae
        z = z / vae.scaling_factor
        with self.weights.using("vae") as params:
            decode = functools.partial(self._decode, vae, params["vae"], **({"sliced": True} if self.sliced else {}))
            tiles = {"tile": tiling.tile_size(vae), "factor": vae.factor} if self.tiled else {}
            images = self.weights.done(tiling.decode(decode, z, **tiles) if self.tiled else decode(z))
        images = np.asarray(images, np.float32) / 2.0 + 0.5
        # Clipping would turn infinity into white or black before anyone could see it.
        return np.where(np.isfinite(images), np.clip(images, 0.0, 1.0), np.nan)
