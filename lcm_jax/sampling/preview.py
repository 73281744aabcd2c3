"""Images of what the sampler expects, x0, after each of its steps: decoded by a TAESD inside of the compiled loop.

model.preview = load_preview("taesd_decoder.safetensors", model.pipeline, show)     show(images uint8 [b H W 3], step)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcm_jax.diffusion.samplers import Hook
from lcm_jax.errors import BadArgument
from lcm_jax.models.taesd import AutoencoderTiny
from lcm_jax.pretrained import load_vae
from lcm_jax.pretrained.diffusers_folder import warn_of_scale
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.pretrained.names import Params
from lcm_jax.runtime.mesh import replicated

Show = Callable[[np.ndarray, int], None]


@dataclasses.dataclass(frozen=True)
class Preview:
    """A static argument of the sampler's program; the weights are another one.

    show: is called on the host with images uint8 [b H W 3] and the number of the step, 1, 2, ...
    """

    vae: AutoencoderTiny
    show: Show

    def hook(self, params: Params, mesh: Mesh | None) -> Hook:
        """For `diffusion.samplers`, in a program on a mesh or on one device: shows x0 and leaves x as it is."""

        def after_step(x0: jax.Array, x: jax.Array, t: jax.Array, i: jax.Array) -> jax.Array:
            images = self.vae.apply({"params": params}, x0 / self.vae.scaling_factor, method="decode")
            pixels = jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
            if mesh is not None:  # a callback has one device
                pixels = jax.lax.with_sharding_constraint(pixels, replicated(mesh))
            jax.debug.callback(self._shown, pixels, i)
            return x

        return after_step

    def _shown(self, pixels: Any, i: Any) -> None:
        self.show(np.asarray(pixels), int(i) + 1)


def load_preview(source: str, pipeline: Pipeline, show: Show) -> tuple[Preview, Params]:
    """(preview, weights) for `Generator.preview`, with the TAESD of a folder, file or hub id.

    Raises:
      BadArgument: it is another kind of VAE, or for other latents.
    """
    vae, params = load_vae(source, dtype=pipeline.unet.dtype, put=jax.device_put)
    wanted = pipeline.vae.latent_channels
    if not isinstance(vae, AutoencoderTiny) or vae.latent_channels != wanted:
        problem = f"is no TAESD for latents of {wanted} channels; give the folder or a file of taesd or taesdxl"
        raise BadArgument("preview", source, problem)
    warn_of_scale(vae, pipeline.configs["vae"], "the model", source)
    return Preview(vae, show), params
