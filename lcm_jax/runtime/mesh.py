"""One mesh over all devices, and one rule that says how arrays lie on it.

The mesh has two axes: `data` (copies of the model) and `fsdp` (one copy, spread over its devices). A batch [b ...] is
split along b over both. A parameter is split along its largest dimension that `fsdp` divides; if there is none, or the
parameter is small, it is replicated. Optimiser moments and the EMA have the parameters' shapes, so the same rule serves
the whole state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.errors import LcmError

# Below this many elements an all-gather costs more than the memory it saves.
MIN_SHARD_ELEMENTS = 2**16


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh ("data", "fsdp") over all devices, `fsdp` of them holding one copy of the model together."""
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise LcmError(f"fsdp = {fsdp} does not divide the {len(devices)} devices; choose a divisor")
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def param_sharding(mesh: Mesh, shape: Sequence[int], min_elements: int = MIN_SHARD_ELEMENTS) -> NamedSharding:
    """Largest dimension that `fsdp` divides (the last of equals) over `fsdp`; small arrays are replicated."""
    ways = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not axes or np.prod(shape) < min_elements:
        return replicated(mesh)
    chosen = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, P(*("fsdp" if axis == chosen else None for axis in range(len(shape)))))


def state_shardings(mesh: Mesh, state: Any, min_elements: int = MIN_SHARD_ELEMENTS) -> Any:
    """Tree of shardings for a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: param_sharding(mesh, leaf.shape, min_elements), state)


def abstract_state(mesh: Mesh, state: Any, min_elements: int = MIN_SHARD_ELEMENTS) -> Any:
    """Tree of ShapeDtypeStructs with shardings, as `Checkpoints.restore` takes it."""
    shardings = state_shardings(mesh, state, min_elements)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays split over all devices."""
    sharding = batch_sharding(mesh)
    for name, rows in batch.items():
        if rows.shape[0] * jax.process_count() % mesh.size:
            raise LcmError(f"batch of {rows.shape[0] * jax.process_count()} ({name}) does not split over {mesh.size} "
                           "devices; set --config.data.batch_size to a multiple")
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
