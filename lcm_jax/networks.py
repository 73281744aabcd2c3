"""How the networks of a pipeline run on a mesh: which attention, where weights are gathered, what is rematerialised.

Models know none of it; they take functions. None of it changes what they compute.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from lcm_jax.models.lora import Adapted
from lcm_jax.pretrained import Pipeline
from lcm_jax.runtime import attention
from lcm_jax.runtime import mesh as mesh_lib

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def on_mesh(pipeline: Pipeline, mesh: Mesh, unet_attention: str = "auto", remat: str = "none") -> Pipeline:
    """The pipeline with networks for `mesh`, on which its weights lie by the rule of `runtime.mesh`.

    Args:
      unet_attention: one of `attention.CHOICES`; the other networks choose by device and shape.
      remat: one of `models.remat.CHOICES`, of the UNet.

    Raises:
      LcmError: the mesh's devices cannot run that attention, or not at the size of a head; the layer is named.
    """
    attention.check(plain_module(pipeline.unet), unet_attention, mesh)

    def equipped(module: Any, implementation: str, **fields: Any) -> Any:
        if isinstance(module, Adapted):
            return dataclasses.replace(module, module=equipped(module.module, implementation, **fields))
        fields["weights_fn"] = mesh_lib.gather_weights(mesh, module.dtype)
        if hasattr(module, "attention_fn"):
            fields["attention_fn"] = attention.choose(implementation, module.dtype, mesh)
        return module.clone(**fields)

    others = {part: getattr(pipeline, part) for part in PARTS[1:]}
    others = {part: equipped(module, "auto") for part, module in others.items() if module is not None}
    return dataclasses.replace(pipeline, unet=equipped(pipeline.unet, unet_attention, remat=remat), **others)


def plain_module(unet: Any) -> Any:
    """The Linen module itself, of a UNet that may carry adapters."""
    return unet.module if isinstance(unet, Adapted) else unet
