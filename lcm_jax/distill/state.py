"""The state of a run, one frozen pytree; and how a student begins: from its teacher, or as adapters on it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct

from lcm_jax.errors import LcmError
from lcm_jax.models import lora


class TrainState(struct.PyTreeNode):
    """step: optimiser updates made, int32; params: theta, all that is trained; ema_params: theta^-, the target."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State at step 0. Student and target are copies of `params`: the step donates both.

    Pure: jitted with `out_shardings` it makes the state where it shall lie.
    """
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return TrainState(jnp.int32(0), copy, optimizer.init(copy), jax.tree.map(jnp.copy, copy))


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """theta^- <- decay theta^- + (1 - decay) theta, in float32."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def student_of(
    unet: nn.Module, params: Any, w_embedding_dim: int, place: Callable[[Any], Any] | None = None
) -> tuple[nn.Module, Any]:
    """A student that starts from `unet`, with a w embedding of `w_embedding_dim` (0: none, it averages over w).

    The projection of w is zero (LCM paper, after ControlNet), so student(z, t, c, w) = unet(z, t, c) for every w. A
    UNet that has a w embedding already (a distilled LCM) is returned as it is. What is new goes through `place`, and is
    a ShapeDtypeStruct where `params` are.

    Raises:
      LcmError: the UNet's own w embedding has another dimension.
    """
    if unet.time_cond_proj_dim is not None:
        if unet.time_cond_proj_dim != w_embedding_dim:
            raise LcmError(
                f"model.student has a w embedding of dimension {unet.time_cond_proj_dim}, "
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

    It begins as `unet` itself. A w embedding cannot be an adapter's: `unet` must have one already, or none is used.
    What is new goes through `place`, and is a ShapeDtypeStruct where `params` are.
    """
    adapters = _like(params, lambda: lora.init(key, params, rank, targets), place)
    return lora.Adapted(unet, alpha / rank), {"base": params, "lora": adapters}


def _like(params: Any, make: Callable[[], Any], place: Callable[[Any], Any] | None) -> Any:
    """What `make` makes, arrays or shapes as `params` are, placed."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    new = jax.eval_shape(make) if abstract else make()
    return new if place is None else jax.tree.map(place, new)
