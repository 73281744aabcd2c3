"""What the extractor needs of a feature network: a module, its weights beside it, and the preprocessing before it."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from lcm_jax.errors import LcmError


def whole_output(output: jax.Array) -> jax.Array:
    return output


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network that turns batches of images (or of token ids) into features.

    Attributes:
      name: network and resize variant, e.g. "inception-2015/tf1-bilinear-299".
      dim: features per image.
      module: equal by content, so that two networks of one architecture share their compiled program.
      params: the module's parameters, float32.
      prepare: uint8 [b h w 3] -> what the module takes, float32 [b s s 3]; on the host.
      preprocessing: everything that `prepare` does, in words and numbers, and what a config says of the module, as an
        activation that the weights do not show; part of the hash.
      select: output of the module -> features [b dim]. A function of a file and no closure: it is static under jit.
    """

    name: str
    dim: int
    module: nn.Module
    params: Mapping[str, Any]
    prepare: Callable[[np.ndarray], np.ndarray]
    preprocessing: str
    select: Callable[[Any], jax.Array] = whole_output


def resize_variant(kind: str, resize: str | None, known: Collection[str]) -> str:
    """`resize`, or the first that is known if it is None. Raises LcmError for an unknown one."""
    found = resize or next(iter(known))
    if found not in known:
        raise LcmError(f"resize={resize!r} of {kind} features is unknown; choose one of {', '.join(known)}")
    return found


def filled(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Rows [n ...] in batches of `batch_size`; the last one is padded with copies of its last row."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
