"""One mesh over all devices, and one rule for how arrays are split over it.

    axis     size     what is split over it                              network between its devices
    slice    slices   the batch                                          between the slices of a multi-slice pod
    data     data     the batch                                          within a slice
    fsdp     fsdp     the batch, and one copy of everything trained      within a slice, neighbours

A batch [b ...] is split along b over all three. A parameter is split along its largest dimension that `fsdp` divides;
if there is none, or the parameter is small, it is replicated. The same rule serves optimiser moments, EMA and teacher,
which have the parameters' shapes. `gather_weights` makes a split weight whole where it is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.errors import LcmError

AXES = ("slice", "data", "fsdp")

# Below this many elements an all-gather costs more than the memory it saves.
MIN_SHARD_ELEMENTS = 2**16

_LISTED = 5  # arrays that `report_unsharded` lists by name


def make_mesh(data: int = -1, fsdp: int = 1, slices: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh ("slice", "data", "fsdp") over `devices`, in which neighbours along `fsdp` are neighbours in the network.

    Args:
      data, fsdp: sizes of their axes; one of them may be -1, which is all devices that the others leave.
      slices: slices of a multi-slice pod. Devices that do not belong to a slice form this many equal blocks, in order.
      devices: default: the devices of all processes; may be those of an ahead-of-time topology.

    Raises:
      LcmError: the sizes do not multiply to the number of devices, or the devices have another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _mesh_shape(data, fsdp, slices, len(devices))
    own = {getattr(device, "slice_index", 0) for device in devices} if devices[0].platform == "tpu" else set()
    if own and len(own) != slices:
        raise LcmError(
            f"mesh.slices = {slices}, but the {len(devices)} chips form {len(own)} slices; set mesh.slices = {len(own)}"
        )
    split = {"allow_split_physical_axes": True}
    try:
        if slices > 1 and own:
            laid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1), devices, **split)
        else:
            laid = mesh_utils.create_device_mesh(shape, devices, **split)
    except (ValueError, NotImplementedError, AssertionError) as error:  # mesh_utils raises any of them if none fits
        raise LcmError(
            f"a mesh of {_sizes(*shape)} does not fit these {len(devices)} {devices[0].device_kind} ({error}); choose "
            "other sizes"
        ) from error
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * 3)


def default_device() -> jax.Device:
    """Where jax puts what has no sharding, as `jax.default_device` and its option, which may be a platform, say."""
    return next(iter(jnp.zeros(()).devices()))


def _mesh_shape(data: int, fsdp: int, slices: int, devices: int) -> tuple[int, int, int]:
    sizes = _sizes(slices, data, fsdp)
    if slices < 1 or any(size != -1 and size < 1 for size in (data, fsdp)) or (data, fsdp) == (-1, -1):
        raise LcmError(f"{sizes}: sizes must be at least 1; one of mesh.data and mesh.fsdp may be -1, the rest")
    known = math.prod(size for size in (slices, data, fsdp) if size != -1)
    rest = devices // known
    shape = slices, rest if data == -1 else data, rest if fsdp == -1 else fsdp
    if math.prod(shape) != devices:
        problem = "do not divide" if -1 in (data, fsdp) else f"multiply to {known}, not to"
        fits = data > 0 < fsdp and devices % (slices * fsdp) == 0
        remedy = "change one of them" + (", or set mesh.data = -1" if fits else "")
        raise LcmError(f"{sizes} {problem} the {devices} devices; {remedy}")
    return shape


def _sizes(slices: int, data: int, fsdp: int) -> str:
    return f"mesh.slices = {slices}, mesh.data = {data}, mesh.fsdp = {fsdp}"


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis split over all devices."""
    return NamedSharding(mesh, P(AXES))


def param_sharding(mesh: Mesh, shape: Sequence[int], min_elements: int = MIN_SHARD_ELEMENTS) -> NamedSharding:
    """The largest dimension that `fsdp` divides (the last of equals) over `fsdp`; small arrays are replicated."""
    ways = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not axes or math.prod(shape) < min_elements:
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


def place(mesh: Mesh) -> Callable[[Any], Any]:
    """A function that splits one host array, the same on every process, by the rule, and keeps only the shards.

    It gives a ShapeDtypeStruct its sharding, and returns an array unchanged that already has the right one.
    """

    def put(value: Any) -> Any:
        sharding = param_sharding(mesh, value.shape)
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        if isinstance(value, jax.Array) and value.sharding.is_equivalent_to(sharding, value.ndim):
            return value
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return jax.device_put(value, sharding)
        host = np.asarray(value)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            part = host[index]
            return part if part.size == host.size else part.copy()  # a view would keep the whole array alive

        return jax.make_array_from_callback(host.shape, sharding, shard)

    return put


@dataclasses.dataclass(frozen=True)
class GatherWeights:
    """(tree of weights, after=None) -> the tree, its split weights cast to `dtype` and whole on every device.

    Equal by content, so that modules made for one mesh are equal. See `gather_weights`.
    """

    mesh: Mesh
    dtype: Any

    def __call__(self, tree: Any, after: jax.Array | None = None) -> Any:
        after = jax.lax.stop_gradient(after)  # `jax.jvp` by a block's input must not reach a custom_vjp
        return jax.tree.map(lambda weight: self._gather(weight, after), tree)

    def _gather(self, weight: jax.Array, after: jax.Array | None) -> jax.Array:
        shards, whole = param_sharding(self.mesh, weight.shape), replicated(self.mesh)
        if shards.is_fully_replicated:
            return weight
        stored = weight.dtype
        dtype = self.dtype if jnp.issubdtype(stored, jnp.floating) else stored  # 8 bits are gathered as they are

        @jax.custom_vjp
        def gather(w: jax.Array, after: jax.Array | None) -> jax.Array:
            w, _ = jax.lax.optimization_barrier((w, after))
            # The constraint before the gather makes XLA cast the shards; it could cast after the gather otherwise.
            cast = jax.lax.with_sharding_constraint(w.astype(dtype), shards)
            return jax.lax.with_sharding_constraint(cast, whole)

        def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array, None]:
            # Without the barrier, XLA lets every reader (clipping, Adam) cut its shards out of the whole sum, and so
            # keeps all gradients whole until the last of them is computed.
            mine = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(cotangent, shards))
            return mine.astype(stored), None

        gather.defvjp(lambda w, after: (gather(w, after), None), backward)
        return gather(weight, after)


def gather_weights(mesh: Mesh, dtype: Any) -> GatherWeights | None:
    """The function that makes split weights whole on every device, or None if `mesh` splits nothing.

    A layer calls it on its weights inside a jitted function, where it uses them:

        forward     shards --cast to dtype--> --all-gather--> whole weight       after `after` is computed
        backward    shards <--cast to the stored dtype-- <--reduce-scatter-- whole cotangent

    So XLA moves weights and gradients, and activations stay where they are. `after` is an array, the input of the
    layer's block, before which no gather begins: XLA could otherwise gather whole networks long before they are needed.
    """
    return None if mesh.shape["fsdp"] == 1 else GatherWeights(mesh, jnp.dtype(dtype))


def check_batch(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
    """Raises LcmError unless each of the `accumulation` parts of a batch splits evenly over all devices."""
    if batch_size % (mesh.size * accumulation):
        parts = f" in {accumulation} parts (train.accumulation_steps)" if accumulation > 1 else ""
        raise LcmError(
            f"data.batch_size = {batch_size}{parts} does not split over {mesh.size} devices; use a multiple of "
            f"{mesh.size * accumulation}"
        )


def process_rows(mesh: Mesh, batch_size: int, process_index: int) -> tuple[int, ...]:
    """Positions in a global batch of the rows that are on a process's devices.

    They need not be contiguous: the order of devices in a TPU pod's mesh follows its wiring, not its processes.
    """
    owners = np.repeat([device.process_index for device in mesh.devices.flat], batch_size // mesh.size)
    return tuple(np.flatnonzero(owners == process_index).tolist())


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays split over all devices.

    The rows go to the process's own devices in the order of the mesh: they are rows `process_rows` of the global batch.

    Raises:
      LcmError: the global batch does not split over the devices.
    """
    sharding = batch_sharding(mesh)
    processes = len({device.process_index for device in mesh.devices.flat})
    for name, rows in batch.items():
        if rows.shape[0] * processes % mesh.size:
            raise LcmError(
                f"batch of {rows.shape[0] * processes} ({name}) does not split over {mesh.size} "
                "devices; set --config.data.batch_size to a multiple"
            )
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def spread(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Rows [b ...], the same on every process -> split over all devices; padded with the last row to a multiple."""
    count = len(rows)
    padded = -(-count // mesh.size) * mesh.size

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return rows[np.minimum(np.arange(padded)[index[0]], count - 1)]

    return jax.make_array_from_callback((padded, *rows.shape[1:]), batch_sharding(mesh), shard)


def one_by_one(fn: Callable[[jax.Array], jax.Array], rows: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`fn` of rows [b ...], of one at a time; on a mesh, over whose devices b splits, of one on each device."""
    devices = 1 if mesh is None else mesh.size
    turns = rows.reshape(devices, -1, *rows.shape[1:]).swapaxes(0, 1)  # a device's rows stay its own

    def one(x: jax.Array) -> jax.Array:
        return fn(x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh)))

    found = jax.lax.map(one, turns).swapaxes(0, 1)
    return found.reshape(-1, *found.shape[2:])


def report_unsharded(mesh: Mesh, tree: Any) -> str:
    """One line for the log on the arrays that are not split over `fsdp`, or "" if all are.

    It lists arrays without a dimension that `fsdp` divides by name and bytes, the largest first, and the sum of the
    small ones, which the rule leaves whole. tree: arrays or ShapeDtypeStructs.
    """
    if mesh.shape["fsdp"] == 1:
        return ""
    whole = [
        (
            math.prod(leaf.shape) * leaf.dtype.itemsize,
            math.prod(leaf.shape),
            jax.tree_util.keystr(path, simple=True, separator="/"),
            leaf.shape,
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if param_sharding(mesh, leaf.shape).is_fully_replicated
    ]
    if not whole:
        return ""
    large = sorted((entry for entry in whole if entry[1] >= MIN_SHARD_ELEMENTS), reverse=True)
    small = sum(size for size, count, *_ in whole if count < MIN_SHARD_ELEMENTS)
    named = [f"{name} {list(shape)} {size} bytes" for size, _, name, shape in large[:_LISTED]]
    if len(large) > _LISTED:
        named.append(f"{len(large) - _LISTED} more of {sum(size for size, *_ in large[_LISTED:])} bytes")
    if small:
        named.append(f"{len(whole) - len(large)} small ones of {small} bytes")
    total = sum(size for size, *_ in whole)
    return f"not split over fsdp = {mesh.shape['fsdp']}, whole on every device: {total} bytes: {', '.join(named)}"
