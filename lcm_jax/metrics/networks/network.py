"""What every feature network is to the extractor that runs it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Network:
    """What a kind of extractor consists of, before it is put onto devices.

    Attributes:
      name: network and resize variant, e.g. "inception-2015/tf1-bilinear-299".
      dim: features per picture.
      prepare: uint8 [b h w 3] -> what `apply` takes, float32 [b s s 3]; on the host.
      apply: (params, prepared) -> features [b dim]; pure, will be jitted.
      params: tree of float32 arrays.
      preprocessing: all that `prepare` does, in words and numbers; enters the hash.
    """

    name: str
    dim: int
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Mapping[str, Any]
    preprocessing: str
