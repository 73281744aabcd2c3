"""What of a student is trained: all of its UNet, or the adapters of an `Adapted` one."""

from typing import Any

from lcm_jax.models import lora


def trainable(unet: Any, params: Any) -> Any:
    """What training changes and checkpoints hold: the UNet's weights, or its adapters alone."""
    return params["lora"] if isinstance(unet, lora.Adapted) else params


def with_trainable(unet: Any, params: Any, trained: Any) -> Any:
    """`params` with other values of `trainable`."""
    return {"base": params["base"], "lora": trained} if isinstance(unet, lora.Adapted) else trained


def merged(unet: Any, params: Any) -> tuple[Any, Any]:
    """An ordinary (module, params): adapters, if there are any, merged into their base."""
    if not isinstance(unet, lora.Adapted):
        return unet, params
    return unet.module, lora.merge(params["base"], [(params["lora"], unet.scale)])
