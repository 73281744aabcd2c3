"""Weights in 8 bits with one scale for each output channel, which a layer makes whole where it uses them.

    q = round(W / s),  s = max |W| / 127 over all but the last axis,  W' = q s        symmetric; error <= s / 2

What is stored so: the kernels of linear layers and of 1x1 and 3x3 convolutions of UNets, ControlNets and text encoders.
Norms, biases, embeddings, time embeddings, and the layers at which a network begins and ends stay as they are: they are
few, and all the rest depends on them.

A kernel in the parameter tree becomes {"int8": q, "scale": s}, which `Dequantise`, a network's `weights_fn`, turns into
W' in the compute dtype. Nothing but what a layer is about to use is ever whole on the device.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.errors import LcmError
from lcm_jax.models.layers import WeightsFn

Path = tuple[str, ...]

# Modules whose kernels stay whole.
WHOLE = frozenset(
    ("conv_in", "conv_out", "time_embedding", "add_embedding", "text_projection", "controlnet_cond_embedding")
)
_LARGEST = 127


def is_quantised(path: Path) -> bool:
    """Whether the leaf of a UNet's, ControlNet's or text encoder's parameter tree is stored in 8 bits."""
    return path[-1] == "kernel" and WHOLE.isdisjoint(path)


def quantise(kernel: np.ndarray) -> dict[str, np.ndarray]:
    """{"int8": q [... o], "scale": s float32 [o]} of a kernel [... o], on the host."""
    kernel = np.asarray(kernel, np.float32)
    scale = np.abs(kernel).max(tuple(range(kernel.ndim - 1))) / np.float32(_LARGEST)
    q = np.rint(kernel / np.where(scale, scale, 1))  # a channel of zeros has scale 0
    return {"int8": q.astype(np.int8), "scale": scale}


def change(path: Path, tensor: np.ndarray) -> Any:
    """`quantise`d, if it is stored in 8 bits; for readers of weights (`names.ChangeFn`)."""
    return quantise(tensor) if is_quantised(path) else tensor


def shapes(tree: Any) -> Any:
    """What `quantise` makes of the shapes of a network's parameter tree."""

    def one(path: Path, leaf: Any) -> Any:
        if not is_quantised(path):
            return leaf
        return {
            "int8": jax.ShapeDtypeStruct(leaf.shape, np.int8),
            "scale": jax.ShapeDtypeStruct(leaf.shape[-1:], np.float32),
        }

    return traverse_util.path_aware_map(one, tree)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and "int8" in leaf


@dataclasses.dataclass(frozen=True)
class Dequantise:
    """(tree of one layer's weights, after=None) -> the tree with whole kernels, in `dtype`.

    Attributes:
      dtype: compute dtype.
      gather: the network's `weights_fn` on a mesh, which also gathers the 8 bits of split kernels.
      barriers: whether XLA keeps its barriers until it has moved out of loops what does not change in them; on CPUs it
        does not.
    """

    dtype: Any
    gather: WeightsFn | None = None
    barriers: bool = True

    def __call__(self, tree: Any, after: jax.Array | None = None) -> Any:
        tree = tree if self.gather is None else self.gather(tree, after=after)

        def whole(leaf: Any) -> Any:
            if not _is_stored(leaf):
                return leaf
            q, scale = leaf["int8"], leaf["scale"]
            # Otherwise XLA would make all kernels whole before the sampler's loop, or once for its unrolled steps.
            if self.barriers:
                q, scale, _ = jax.lax.optimization_barrier((q, scale, after))
            elif after is not None:
                never = jax.lax.bitcast_convert_type(after.ravel()[0].astype(jnp.float32), jnp.int32) | 1 == 0
                q, scale = jnp.where(never, jnp.int8(0), q), jnp.where(never, 0, scale)
            return (q.astype(jnp.float32) * scale).astype(self.dtype)

        return jax.tree.map(whole, tree, is_leaf=_is_stored)


def has_quantised(params: Any) -> bool:
    """Whether a parameter tree has weights in 8 bits."""
    return any(path[-1] == "int8" for path in traverse_util.flatten_dict(params))


def check_whole(params: Any, doing: str) -> None:
    """Raises LcmError, which says what cannot be done, if a tree has weights in 8 bits."""
    if has_quantised(params):
        raise LcmError(f"{doing} needs whole weights, these are int8, for sampling alone; load the model without int8")
