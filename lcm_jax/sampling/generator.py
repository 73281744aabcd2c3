"""Drawing pictures with a pipeline: noise, settings, and the sampler's scan, compiled once for each setting.

Picture i depends on (seed, i) alone, not on how many are drawn. `guidance_scale` is the user's; w = guidance_scale - 1.

    UNet with w embedding     one pass a step, w is told to it
    without                   guidance scale 1: one pass; else two, cond + w (cond - null), null of the negative prompt
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcm_jax.diffusion import consistency, samplers
from lcm_jax.diffusion.denoiser import call, guided_output, student_output
from lcm_jax.models import tiling
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.kernels import on_mesh

GUIDANCE_SCALE = 8.0  # where nothing speaks for another


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample; static under jit.

    `spacing` is that of the baselines, and `set_alpha_to_one` says where DDIM ends (see `samplers.ddim`);
    `original_steps`, `timestep_scaling` and `sigma_data` must be those that the LCM was distilled with.
    """

    sampler: str = "lcm"
    steps: int = 4
    spacing: str = "trailing"
    original_steps: int = 50
    timestep_scaling: float = consistency.TIMESTEP_SCALING
    sigma_data: float = consistency.SIGMA_DATA
    set_alpha_to_one: bool = True


def draw_noise(seed: int, images: Sequence[int], steps: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise [steps b h w c]: entry 0 starts the sampler, the others come between an LCM's steps.

    Picture i's noise is keyed by (seed, i), and its first entries are the same for every number of steps.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(images, jnp.uint32))

    def of_step(step):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), tuple(shape)))(keys)

    return np.asarray(jax.vmap(of_step)(jnp.arange(steps)))


def latents(
    pipeline: Pipeline,
    params: Any,
    cond: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    noise: jax.Array,
    guidance_scale: jax.Array,
    settings: Settings,
    guided: bool = True,
) -> jax.Array:
    """Diffusion latents [b h w c], scaled; pure, one scan over the steps.

    Args:
      pipeline: for its UNet and noise table (static).
      params: the UNet's weights.
      cond: of the captions [b ...]. null: of the null text [1 ...].
      noise: [steps b h w c] from `draw_noise`.
      guidance_scale: scalar; w = guidance_scale - 1 is told to a UNet with w embedding, which runs once a step.
      settings: sampler and steps.
      guided: for a UNet without w embedding: two passes per step (classifier-free guidance) instead of one.
    """
    batch = noise.shape[1]
    w = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32) - 1.0, (batch,))
    unet = pipeline.unet

    def model(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, (batch,))
        if pipeline.has_w_embedding:
            return student_output(unet, params, x, t, cond, w)
        return guided_output(unet, params, x, t, cond, null, w) if guided else call(unet, params, x, t, cond)

    if settings.sampler == "lcm":
        return samplers.lcm(
            model,
            noise[0],
            noise[1:],
            pipeline.schedule,
            settings.steps,
            settings.original_steps,
            settings.timestep_scaling,
            settings.sigma_data,
        )
    # Stable Diffusion's schedulers shift leading timesteps by one; the other spacings ignore the offset.
    common = (model, noise[0], pipeline.schedule, settings.steps, settings.spacing, 1)
    if settings.sampler == "ddim":
        return samplers.ddim(*common, set_alpha_to_one=settings.set_alpha_to_one)
    return samplers.SAMPLERS[settings.sampler][0](*common)


def to_uint8(images: jax.Array) -> np.ndarray:
    """[0, 1] -> 0..255, rounded as diffusers rounds; NaN is black, see `not_finite`."""
    return (np.nan_to_num(images) * 255.0).round().astype(np.uint8)


def not_finite(images: np.ndarray) -> list[int]:
    """Which of pictures [b H W 3] hold values that are not finite: they would be seen as black ones."""
    return np.flatnonzero(~np.isfinite(images).all((1, 2, 3))).tolist()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [n H W 3] as one, row by row: [ceil(n / columns) * H, columns * W, 3]; empty places are white."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, images.dtype)
    cells[:n] = images
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)


class Generator:
    """Draws batches of pictures with one pipeline: the weights lie on the devices, each setting is compiled once.

    On a mesh the pictures of a batch are split over all devices, filled up where their number does not divide; what
    comes back is whole on every process.
    """

    def __init__(
        self, pipeline: Pipeline, tiled: bool = False, negative_prompt: str | None = None, mesh: Mesh | None = None
    ):
        """Puts the weights on the devices and encodes the null text.

        Args:
          pipeline: whose parts draw.
          tiled: decode large pictures in overlapping tiles, for less memory (`models.tiling`).
          negative_prompt: of the second pass, where there is one; None: the model's own null (`conditioning.null`).
          mesh: of the devices that draw, weights by its rule; None: the default device.
        """
        self.tiled, self.mesh = tiled, mesh
        if mesh is not None:
            pipeline = on_mesh(pipeline, mesh)
        put = jax.device_put if mesh is None else mesh_lib.place(mesh)
        self.pipeline = dataclasses.replace(pipeline, params=jax.tree.map(put, pipeline.params))
        self.params = self.pipeline.params
        self.null = conditioning.null(self.pipeline, negative_prompt)

        def draw(params, cond, null, noise, scale, settings, guided):
            rows = noise.shape[1]
            cond, noise = self._fill(cond), self._fill(noise.swapaxes(0, 1)).swapaxes(0, 1)
            return latents(pipeline, params, cond, null, noise, scale, settings, guided)[:rows]

        def decode(params, z):
            return pipeline.vae.apply({"params": params}, self._fill(z), method="decode")[: z.shape[0]]

        jit = functools.partial(
            jax.jit, out_shardings=mesh and mesh_lib.replicated(mesh), compiler_options=compiler.inference()
        )
        self._latents = jit(draw, static_argnames=("settings", "guided"))
        self._decode = jit(decode)

    def _fill(self, tree: Any) -> Any:
        """Rows [b ...] -> [a multiple of the mesh's devices ...], split over them; the last row is repeated."""
        if self.mesh is None:
            return tree
        sharding, devices = mesh_lib.batch_sharding(self.mesh), self.mesh.size

        def fill(rows: jax.Array) -> jax.Array:
            last = np.minimum(np.arange(-(-rows.shape[0] // devices) * devices), rows.shape[0] - 1)
            return jax.lax.with_sharding_constraint(rows[last], sharding)

        return jax.tree.map(fill, tree)

    def __call__(
        self,
        cond: Mapping[str, jax.Array],
        noise: np.ndarray,
        guidance_scale: float,
        settings: Settings,
        unet_params: Any = None,
    ) -> np.ndarray:
        """Pictures float32 in [0, 1], [b H W 3]. cond: `encode`d captions; noise: [steps b h w c]; see `latents`."""
        return self.decode(self.latents(cond, noise, guidance_scale, settings, unet_params))

    def decode(self, z: jax.Array) -> np.ndarray:
        """Scaled latents [b h w c] -> pictures float32 in [0, 1], [b H W 3]; NaN where they are not finite."""
        vae = self.pipeline.vae
        decode = functools.partial(self._decode, self.params["vae"])
        z = z / vae.scaling_factor
        images = tiling.decode(decode, z, tile=tiling.tile_size(vae), factor=vae.factor) if self.tiled else decode(z)
        images = np.asarray(images, np.float32) / 2.0 + 0.5
        return np.where(np.isfinite(images), np.clip(images, 0.0, 1.0), np.nan)  # clipped, infinity were white or black

    def encode(self, captions: Sequence[str], report: bool = True) -> dict[str, jax.Array]:
        """Conditioning [b ...] of captions; report: log those that are too long."""
        return conditioning.encode(self.pipeline, captions, report)

    def latents(
        self,
        cond: Mapping[str, jax.Array],
        noise: np.ndarray,
        guidance_scale: float,
        settings: Settings,
        unet_params: Any = None,
    ) -> jax.Array:
        """Scaled latents [b h w c]; `unet_params` stand in for the pipeline's own UNet weights."""
        params = self.params["unet"] if unet_params is None else unet_params
        if self.pipeline.is_xl:
            height, width = (side * self.pipeline.vae.factor for side in noise.shape[2:4])
            cond = {**cond, "time_ids": conditioning.time_ids(height, width, noise.shape[1])}
        guided = guidance_scale != 1.0 and not self.pipeline.has_w_embedding
        return self._latents(params, cond, self.null, noise, guidance_scale, settings, guided)


def settings_for(pipeline: Pipeline, record: Mapping[str, Any], sampler: str, steps: int, spacing: str) -> Settings:
    """Settings with the constants that the model was distilled with: our record's, else its scheduler config's."""
    scheduler = pipeline.configs["scheduler"]
    return Settings(
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        original_steps=record.get("solver_steps", scheduler.get("original_inference_steps", 50)),
        timestep_scaling=record.get("timestep_scaling", scheduler.get("timestep_scaling", 10.0)),
        sigma_data=record.get("sigma_data", consistency.SIGMA_DATA),
        set_alpha_to_one=scheduler.get("set_alpha_to_one", True),
    )


def default_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width in pixels that the model was made for."""
    size = pipeline.unet.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae.factor, width * pipeline.vae.factor


def is_lcm(pipeline: Pipeline, record: Mapping[str, Any]) -> bool:
    """Whether anything says that the model was distilled: w embedding, our record, or its scheduler."""
    is_lcm_scheduler = pipeline.configs["scheduler"].get("_class_name") == "LCMScheduler"
    return pipeline.has_w_embedding or bool(record) or is_lcm_scheduler


def default_guidance_scale(told_w: bool, record: Mapping[str, Any], sampler: str = "lcm") -> float:
    """The guidance scale to take where the user gives none.

    1 for an LCM that is not told w: its guidance is distilled in. Else 8, or the middle of the record's range where 8
    was not trained.
    """
    if not told_w:
        return 1.0 if sampler == "lcm" else GUIDANCE_SCALE
    low, high = record.get("w_min", 0.0) + 1.0, record.get("w_max", float("inf")) + 1.0
    return GUIDANCE_SCALE if low <= GUIDANCE_SCALE <= high else (low + high) / 2.0
