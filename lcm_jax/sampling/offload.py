"""Weights that wait in the host's memory and are on the devices only while they are used.

    text    the text encoders'; UNet and VAE stay on the devices
    all     those of every network, one at a time

Host memory is jax's `pinned_host`, from which devices read directly and each holds its own shards; where a platform has
none, numpy arrays. Nothing here changes what is computed.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from lcm_jax.errors import BadArgument
from lcm_jax.pretrained.model import PARTS, TEXT_ENCODERS, PipelineParams
from lcm_jax.pretrained.names import Params
from lcm_jax.runtime.mesh import default_device, param_sharding, place

AWAY: Mapping[str | None, tuple[str, ...]] = {None: (), "text": TEXT_ENCODERS, "all": PARTS}
MODES = tuple(filter(None, AWAY))
AHEAD = 16  # batches whose prompts are encoded in one visit of the text encoders
_PINNED = "pinned_host"


def check(mode: str | None) -> None:
    """Raises BadArgument for an unknown mode."""
    if mode not in AWAY:
        raise BadArgument("offload", mode, f"choose one of {', '.join(MODES)}, or leave it out")


def to_host(mesh: Mesh | None, value: Any) -> Any:
    """An array in host memory, in its sharding on the devices; a ShapeDtypeStruct keeps that of the devices."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value if mesh is None else place(mesh)(value)
    device = default_device() if mesh is None else mesh.local_devices[0]
    if _PINNED not in {memory.kind for memory in device.addressable_memories()}:
        return np.asarray(value)
    sharding = SingleDeviceSharding(device) if mesh is None else param_sharding(mesh, value.shape)
    return jax.device_put(value, sharding.with_memory_kind(_PINNED))


class Weights:
    """Part -> parameter tree, some of them in host memory.

    Attributes:
      mode: one of `AWAY`.
      home: the trees where they are kept.
    """

    def __init__(self, params: PipelineParams, mesh: Mesh | None, mode: str | None):
        """Puts the weights where they are kept; of the devices of a mesh, or the default device."""
        check(mode)
        self.mode, self._visiting = mode, {}
        self._put = jax.device_put if mesh is None else place(mesh)
        self.home: dict[str, Params] = {
            part: jax.tree.map(lambda x: to_host(mesh, x), tree) if part in AWAY[mode] else self._to_device(tree)
            for part, tree in params.items()
        }

    def _to_device(self, tree: Params) -> Params:
        def put(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == _PINNED:
                (kind,) = {device.default_memory().kind for device in leaf.sharding.addressable_devices}
                return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
            return self._put(leaf)

        return jax.tree.map(put, tree)

    @contextlib.contextmanager
    def using(self, *parts: str) -> Iterator[PipelineParams]:
        """Part -> its weights on the devices. Copies of those kept on the host are freed after the outermost block."""
        coming = [part for part in parts if part in AWAY[self.mode] and part not in self._visiting]
        for part in coming:
            self._visiting[part] = self._to_device(self.home[part])
        try:
            yield {part: self._visiting.get(part, self.home[part]) for part in parts}
        finally:
            for part in coming:
                del self._visiting[part]

    def done(self, result: Any) -> Any:
        """The result, computed before what comes next needs the memory of the weights."""
        return result if self.mode is None else jax.block_until_ready(result)


def resident(mode: str | None, parts: Collection[str], used: Collection[str]) -> set[str]:
    """Those of a model's parts that are on the devices while some of them are used."""
    return {part for part in parts if part in used or part not in AWAY[mode]}
