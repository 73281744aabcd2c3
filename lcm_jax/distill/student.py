"""A student: how it begins from a UNet, and what of it is trained (all of it, or LoRA adapters on it)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from lcm_jax.errors import LcmError
from lcm_jax.models import lora


def student_of(
    unet: nn.Module, params: Any, w_embedding_dim: int, place: Callable[[Any], Any] | None = None
) -> tuple[nn.Module, Any]:
    """A student that starts from `unet`, with a w embedding of `w_embedding_dim` (0: none, it learns the average).

    The projection of w is zero (LCM paper, after ControlNet), so student(z, t, c, w) = unet(z, t, c) for every w. A
    UNet that already has a w embedding (a distilled LCM) is returned as it is. New parameters go through `place`; they
    are ShapeDtypeStructs if `params` are.

    Raises:
      LcmError: the UNet's own w embedding has another dimension.
    """
    if unet.time_cond_proj_dim is not None:
        if unet.time_cond_proj_dim != w_embedding_dim:
            raise LcmError(
                f"model.student has a w embedding of dimension {unet.time_cond_proj_dim}, but "
                f"config.distill.w_embedding_dim is {w_embedding_dim}; make them equal"
            )
        return unet, params
    if not w_embedding_dim:
        return unet, params
    shape = w_embedding_dim, unet.block_out_channels[0]
    projection = _like(params, lambda: {"kernel": np.zeros(shape, np.float32)}, place)
    embedding = {**params["time_embedding"], "cond_proj": projection}
    return unet.clone(time_cond_proj_dim=w_embedding_dim), {**params, "time_embedding": embedding}


def adapt(
    unet: nn.Module,
    params: Any,
    key: jax.Array,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    place: Callable[[Any], Any] | None = None,
) -> tuple[lora.Adapted, dict[str, Any]]:
    """A student of fresh adapters, scaled by alpha / rank, on `unet`: (module, {"base": params, "lora": adapters}).

    It begins as `unet` itself. Adapters cannot add a w embedding: the student has one only if `unet` does. New
    parameters go through `place`; they are ShapeDtypeStructs if `params` are.
    """
    adapters = _like(params, lambda: lora.init(key, params, rank, targets), place)
    return lora.Adapted(unet, alpha / rank), {"base": params, "lora": adapters}


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


def _like(params: Any, make: Callable[[], Any], place: Callable[[Any], Any] | None) -> Any:
    """The result of `make`, as arrays or as shapes like `params`, passed through `place`."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    new = jax.eval_shape(make) if abstract else make()
    return new if place is None else jax.tree.map(place, new)
