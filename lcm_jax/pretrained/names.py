"""Torch key <-> path in the parameter tree, and the layouts of both; one rule for every model.

    down_blocks.0.resnets.1.conv1.weight   <->  down_blocks_0/resnets_1/conv1/kernel

The Linen modules are named after torch's, so the table follows from the module's own tree (`jax.eval_shape` of its
init): a list index is joined by an underscore, and

    convolution  weight [o i kh kw]  <->  kernel [kh kw i o]      norm       weight  <->  scale
    linear       weight [o i]        <->  kernel [i o]            embedding  weight  <->  embedding, not transposed

Read, but never written: a text encoder's keys without `text_model.`, the VAE's old attention names, 1x1 convolutions in
place of linear layers and the reverse, and buffers without meaning here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.unet import UNet2DConditionModel

Params = dict[str, Any]
Path = tuple[str, ...]
Shape = tuple[int, ...]
Place = Callable[[np.ndarray], Any]  # what becomes of a tensor as soon as it is read and converted

# Torch module names that end in a number of their own, where every other one is an index into a module list.
_NUMBERED = frozenset({"linear_1", "linear_2"})

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# VAEs saved before diffusers 0.14.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")

# Buffers and leftovers of training that carry nothing: positions 0..76, batch counts, an EMA's counters.
_IGNORED = re.compile(r"(.*\.)?(position_ids|num_batches_tracked)|model_ema\..*")

_LISTED = 10  # names of each kind in an error


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor on both sides: `path` and `shape` in the tree, `torch_shape` in a file."""

    path: Path
    shape: Shape

    @property
    def torch_shape(self) -> Shape:
        return tuple(self.shape[axis] for axis in _to_torch_axes(self.path[-1], len(self.shape)))


def torch_name(path: Path) -> str:
    """The torch key of a leaf: ("ff", "net_0", "proj", "kernel") -> "ff.net.0.proj.weight"."""
    *modules, leaf = path
    names = [name if name in _NUMBERED else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*names, _LEAVES[leaf]])


@functools.lru_cache(maxsize=16)
def abstract_params(module: nn.Module) -> Params:
    """The module's parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed. Do not change the tree.

    module: UNet2DConditionModel, CLIPTextModel or a VAE.
    """
    inputs = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), _inputs(module))
    return jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))["params"]


def _inputs(module: nn.Module) -> tuple:
    """Arguments with which `module` touches every parameter, as small as may be."""
    if isinstance(module, CLIPTextModel):
        return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if not isinstance(module, UNet2DConditionModel):
        return (array((1, 64, 64, 3)),)  # a VAE; 64 is a multiple of what any of them shrinks by
    widths = set(module.per_level("cross_attention_dim"))
    if len(widths) > 1:
        raise UnsupportedConfig("cross_attention_dim", module.cross_attention_dim, "one width for all levels")
    side = 2 ** (module.num_levels - 1)
    arguments = (array((1, side, side, module.in_channels)), array((1,)), array((1, 1, widths.pop())), None)
    if module.addition_embed_type is None:
        return arguments
    total, one = module.projection_class_embeddings_input_dim, module.addition_time_embed_dim
    if total is None or one is None or total <= one:
        raise UnsupportedConfig("projection_class_embeddings_input_dim", total, f"more than {one} features of sizes")
    return *arguments, {"text_embeds": array((1, total - one)), "time_ids": array((1, 1))}


@functools.lru_cache(maxsize=16)
def torch_table(module: nn.Module) -> Mapping[str, Parameter]:
    """Torch key -> Parameter for every parameter of `module`, with `text_model.` in a text encoder's keys."""
    table = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params(module)).items():
        key = torch_name(path)
        if isinstance(module, CLIPTextModel) and not key.startswith("text_projection."):
            key = "text_model." + key
        table[key] = Parameter(path, leaf.shape)
    return table


def num_params(module: nn.Module) -> int:
    """How many numbers the module's parameters hold."""
    return sum(math.prod(p.shape) for p in torch_table(module).values())


def read_params(
    module: nn.Module,
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    dtype: Any = np.float32,
    what: str = "state dict",
    place: Place | None = None,
) -> Params:
    """The parameter tree of `module` from torch tensors, converted one at a time.

    Args:
      shapes: torch key -> shape of every tensor there is.
      read: torch key -> tensor, called once for each that is needed.
      dtype: of the result.
      what: the tensors' origin, for the error.
      place: takes each tensor before the next is read, as `runtime.mesh.place` to the devices, so that no full copy
        of the model exists on the host; None: they stay there, numpy arrays.

    Raises:
      LcmError: tensors missing, left over or of a wrong shape, all listed in one error; or not of floating point.
    """
    table = torch_table(module)
    keys = _matched(table, shapes, what)
    flat = {}
    for key, parameter in table.items():
        tensor = read(keys[key])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise LcmError(f"{what}: {keys[key]} is {tensor.dtype}; only floating-point weights can be loaded")
        flat[parameter.path] = placed(to_jax(tensor, parameter, dtype), place)
    return traverse_util.unflatten_dict(flat)


def placed(value: np.ndarray, place: Place | None) -> Any:
    return value if place is None else place(value)


def from_torch(module: nn.Module, state_dict: Mapping[str, Any], dtype: Any = np.float32) -> Params:
    """`read_params` of a state dict in memory: values are whatever `np.asarray` takes (torch tensors on the CPU)."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    return read_params(module, shapes, lambda key: np.asarray(state_dict[key]), dtype)


def to_torch(module: nn.Module, params: Params) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree, in the parameters' dtype: the way back of `from_torch`."""
    leaves = torch_leaves(module, params)
    return {key: to_torch_layout(leaf, parameter) for key, (parameter, leaf) in leaves.items()}


def torch_leaves(module: nn.Module, params: Params) -> dict[str, tuple[Parameter, Any]]:
    """Torch key -> (Parameter, leaf of `params`), nothing converted yet.

    Raises:
      LcmError: `params` is not the tree of `module`.
    """
    table = torch_table(module)
    flat = traverse_util.flatten_dict(params)
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in flat.items()}
    wanted = {"/".join(p.path): p.shape for p in table.values()}
    problems = _differences(wanted, found, lambda a, b: a == b)
    if problems:
        raise LcmError(f"parameters do not fit {type(module).__name__}: {problems}")
    return {key: (parameter, flat[parameter.path]) for key, parameter in table.items()}


def to_jax(tensor: np.ndarray, parameter: Parameter, dtype: Any) -> np.ndarray:
    """A torch tensor in the tree's layout and `dtype`, contiguous."""
    axes = np.argsort(_to_torch_axes(parameter.path[-1], len(parameter.shape)))
    return np.array(tensor.reshape(parameter.torch_shape).transpose(axes), dtype=dtype, order="C")


def to_torch_layout(leaf: Any, parameter: Parameter, dtype: Any = None) -> np.ndarray:
    """A leaf of the tree in torch's layout and `dtype` (its own where None), contiguous."""
    value = np.asarray(leaf)
    axes = _to_torch_axes(parameter.path[-1], value.ndim)
    with np.errstate(over="ignore"):  # the writer refuses what became infinite
        return np.ascontiguousarray(value.transpose(axes), dtype=dtype or value.dtype)


def _to_torch_axes(leaf: str, ndim: int) -> tuple[int, ...]:
    if leaf != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def _matched(table: Mapping[str, Parameter], shapes: Mapping[str, Shape], what: str) -> dict[str, str]:
    """Key of the table -> key in the file, where both agree on names and shapes."""
    keys, found = {}, {}
    for key, shape in shapes.items():
        if key not in table and _IGNORED.fullmatch(key):
            continue
        name = _modern(key, table)
        if name in keys:  # the same tensor under an old and a new name
            name = key + " (a second time)"
        keys[name], found[name] = key, tuple(shape)
    problems = _differences({key: p.torch_shape for key, p in table.items()}, found, _same_but_for_1x1)
    if problems:
        raise LcmError(f"{what} does not fit its config: {problems}; take both from the same model")
    return keys


def _modern(key: str, table: Mapping[str, Parameter]) -> str:
    """`key` as the table spells it, or as it is where the table has no such thing."""
    if key in table:
        return key
    if "text_model." + key in table:
        return "text_model." + key
    old = _OLD_ATTENTION_KEY.fullmatch(key)
    return old[1] + _OLD_ATTENTION[old[2]] + old[3] if old else key


def _same_but_for_1x1(wanted: Shape, found: Shape) -> bool:
    def matrix(shape: Shape) -> Shape:
        return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape

    return matrix(wanted) == matrix(found)


def _differences(wanted: Mapping[str, Shape], found: Mapping[str, Shape], same: Callable[[Shape, Shape], bool]) -> str:
    """What is wrong, in one line; "" where nothing is."""
    both = wanted.keys() & found.keys()
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "mis-shaped": [
            f"{key} {list(found[key])} instead of {list(wanted[key])}"
            for key in sorted(both)
            if not same(wanted[key], found[key])
        ],
    }
    return ", ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {more} more" if more > 0 else "")
