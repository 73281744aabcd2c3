"""Torch key <-> path in the parameter tree, and the layouts of both; one rule for every network.

    down_blocks.0.resnets.1.conv1.weight   <->  down_blocks_0/resnets_1/conv1/kernel

Linen modules are named after torch's, so the table follows from a module's own tree (`jax.eval_shape` of its init): an
underscore joins a list index to its list, and

    convolution  weight [o i kh kw]  <->  kernel [kh kw i o]      norm         weight  <->  scale
    linear       weight [o i]        <->  kernel [i o]            embedding    weight  <->  embedding, not transposed
    batch norm   running_mean, running_var  <->  mean, var        other leaves keep their name

Read, but never written: a text encoder's keys without `text_model.`, the VAE's old attention names, 1x1 convolutions
instead of linear layers and the reverse, and buffers that carry nothing.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import int8
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.controlnet import ControlNetModel
from lcm_jax.models.layers import dtypes_in_use
from lcm_jax.models.unet import Encoder

Params = dict[str, Any]
Path = tuple[str, ...]
Shape = tuple[int, ...]
PutFn = Callable[[np.ndarray], Any]  # puts a tensor where it belongs, as `runtime.mesh.place` does on its shards
# (path, float32 tensor) -> what is loaded instead: a tensor, or a tree of them, which keep their dtypes (`models.int8`)
ChangeFn = Callable[[Path, np.ndarray], Any]
PartChangeFn = Callable[[str, Path, np.ndarray], Any]  # the same of (part, path, float32 tensor)

# Module names that end in a number of their own; every other number is an index into a module list.
_NUMBERED = re.compile(r"linear_\d+|branch.*")

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}

# VAEs saved before diffusers 0.14.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")

# Buffers and leftovers of training: positions 0..76, batch counts, the counters of an EMA; the rest of a whole CLIP.
_IGNORED = re.compile(
    r"(.*\.)?(position_ids|num_batches_tracked)|model_ema\..*|logit_scale|(text|visual)_projection\.weight|vision_model\..*"
)

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
    names = [name if _NUMBERED.fullmatch(name) else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*names, _LEAVES.get(leaf, leaf)])


@functools.lru_cache(maxsize=64)
def abstract_params(module: nn.Module) -> Params:
    """The module's parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed. Do not change the tree.

    module: UNet2DConditionModel, ControlNetModel, CLIPTextModel or a VAE.
    """
    return jax.eval_shape(module.init, jax.random.key(0), *_inputs(module))["params"]


def _inputs(module: nn.Module) -> tuple[Any, ...]:
    """The smallest arguments with which `module` uses all its parameters."""
    if isinstance(module, CLIPTextModel):
        return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if not isinstance(module, Encoder):
        return (array((1, 64, 64, 3)),)  # a VAE; all of their factors divide 64
    side, width = 2 ** (module.num_levels - 1), module.per_level("cross_attention_dim")[0]  # the same at all levels
    arguments = (array((1, side, side, module.in_channels)), array((1,)), array((1, 1, width)), None)
    if isinstance(module, ControlNetModel):
        arguments = (*arguments[:-1], array((1, side * module.factor, side * module.factor, 3)))
    if module.addition_embed_type is None:
        return arguments
    total, one = module.projection_class_embeddings_input_dim, module.addition_time_embed_dim
    if total <= one:
        raise UnsupportedConfig("projection_class_embeddings_input_dim", total, f"more than {one} features of sizes")
    return *arguments, {"text_embeds": array((1, total - one)), "time_ids": array((1, 1))}


@functools.lru_cache(maxsize=64)
def torch_table(module: nn.Module) -> Mapping[str, Parameter]:
    """Torch key -> Parameter for every parameter of `module`.

    A text encoder's keys have the prefix `text_model.`, without which transformers 4 does not read them.
    """
    table = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params(module)).items():
        key = torch_name(path)
        if isinstance(module, CLIPTextModel) and not key.startswith("text_projection."):
            key = "text_model." + key
        table[key] = Parameter(path, leaf.shape)
    return table


def param_shapes(module: nn.Module, dtype: DTypeLike | None) -> Params:
    """The module's parameter tree as `jax.ShapeDtypeStruct`s of `dtype`; None: as the module uses them."""
    shapes = abstract_params(module)
    dtypes = dtypes_in_use(shapes, module.dtype) if dtype is None else jax.tree.map(lambda _: jnp.dtype(dtype), shapes)
    return jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), shapes, dtypes)


def num_params(module: nn.Module) -> int:
    """How many numbers the module's parameters hold."""
    return sum(math.prod(p.shape) for p in torch_table(module).values())


def read_params(
    module: nn.Module,
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike | None = np.float32,
    what: str = "state dict",
    put: PutFn | None = None,
    change: ChangeFn | None = None,
) -> Params:
    """The parameter tree of `module` from torch tensors, converted one at a time.

    Args:
      shapes: torch key -> shape of every tensor in the file.
      read: torch key -> tensor; called once for each tensor that is needed.
      dtype: of the result; None: as the module uses them (`layers.dtypes_in_use`).
      what: origin of the tensors, for errors.
      put: takes each tensor before the next is read, so that the host never holds a full copy of the model; None: the
        tensors stay on the host as numpy arrays.
      change: is applied to each tensor in float32, before it is rounded and put.

    Raises:
      LcmError: tensors missing, left over or of a wrong shape, all listed in one error; or not of floating point.
    """
    table = torch_table(module)
    keys = _keys_in_file(table, shapes, what)
    shapes = traverse_util.flatten_dict(param_shapes(module, dtype))

    def leaf(key: str, parameter: Parameter) -> Any:
        wanted, name = shapes[parameter.path].dtype, keys[key]
        return read_leaf(read(name), parameter, wanted, f"{what}: {name}", put, change)

    return traverse_util.unflatten_dict({p.path: leaf(key, p) for key, p in table.items()})


def read_leaf(
    tensor: np.ndarray,
    parameter: Parameter,
    dtype: DTypeLike,
    what: str,
    put: PutFn | None = None,
    change: ChangeFn | None = None,
) -> Any:
    """A torch tensor in the tree's layout and `dtype`, put where it belongs. Raises LcmError for integers."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise LcmError(f"{what} is {tensor.dtype}; only floating-point weights can be loaded")
    if change is None:
        value = to_jax(tensor, parameter, dtype)
    else:
        value = change(parameter.path, to_jax(tensor, parameter, np.float32))
        value = value if isinstance(value, Mapping) else value.astype(dtype)
    return value if put is None else jax.tree.map(put, value)


def from_torch(module: nn.Module, state_dict: Mapping[str, Any], dtype: DTypeLike = np.float32) -> Params:
    """`read_params` of a state dict in memory, whose values are whatever `np.asarray` takes (torch tensors on CPU)."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    return read_params(module, shapes, lambda key: np.asarray(state_dict[key]), dtype)


def to_torch(module: nn.Module, params: Params) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree, in the parameters' dtype: the inverse of `from_torch`."""
    leaves = torch_leaves(module, params)
    return {key: to_torch_layout(leaf, parameter) for key, (parameter, leaf) in leaves.items()}


def torch_leaves(module: nn.Module, params: Params) -> dict[str, tuple[Parameter, Any]]:
    """Torch key -> (Parameter, leaf of `params`), nothing converted yet.

    Raises:
      LcmError: `params` is not the tree of `module`, or has weights in 8 bits.
    """
    int8.check_whole(params, "saving")
    table = torch_table(module)
    flat = traverse_util.flatten_dict(params)
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in flat.items()}
    if problems := differences({"/".join(p.path): p.shape for p in table.values()}, found):
        raise LcmError(f"parameters do not fit {type(module).__name__}: {problems}")
    return {key: (parameter, flat[parameter.path]) for key, parameter in table.items()}


def to_jax(tensor: np.ndarray, parameter: Parameter, dtype: DTypeLike) -> np.ndarray:
    """A torch tensor in the tree's layout and `dtype`, contiguous."""
    axes = np.argsort(_to_torch_axes(parameter.path[-1], len(parameter.shape)))
    return np.array(tensor.reshape(parameter.torch_shape).transpose(axes), dtype=dtype, order="C")


def to_torch_layout(leaf: Any, parameter: Parameter, dtype: DTypeLike | None = None) -> np.ndarray:
    """A leaf of the tree in torch's layout, contiguous; dtype: None keeps the leaf's own."""
    value = np.asarray(leaf)
    axes = _to_torch_axes(parameter.path[-1], value.ndim)
    with np.errstate(over="ignore"):  # the writer refuses what became infinite
        return np.ascontiguousarray(value.transpose(axes), dtype=dtype or value.dtype)


def differences(
    wanted: Mapping[str, Shape], found: Mapping[str, Shape], same: Callable[[Shape, Shape], bool] = operator.eq
) -> str:
    """How the shapes by name that were found differ from the wanted ones, in one line; "" if they do not."""
    kinds = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "mis-shaped": [
            f"{key} {list(found[key])} instead of {list(wanted[key])}"
            for key in wanted.keys() & found.keys()
            if not same(wanted[key], found[key])
        ],
    }
    return ", ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names)


def same_but_for_1x1(a: Shape, b: Shape) -> bool:
    """Equal shapes, whether or not a 1x1 window is written out: [o i] is [o i 1 1]."""
    return _without_1x1(a) == _without_1x1(b)


def some(names: Collection[str]) -> str:
    """The first of many names in order, and how many more there are, for an error."""
    listed: Sequence[str] = sorted(names)[:_LISTED]
    more = len(names) - len(listed)
    return ", ".join(listed) + (f", and {more} more" if more else "")


def _to_torch_axes(leaf: str, ndim: int) -> tuple[int, ...]:
    if leaf != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def _keys_in_file(table: Mapping[str, Parameter], shapes: Mapping[str, Shape], what: str) -> dict[str, str]:
    """Key of the table -> key in the file. Raises LcmError unless both agree on names and shapes."""
    keys, found = {}, {}
    for key, shape in shapes.items():
        if key not in table and _IGNORED.fullmatch(key):
            continue
        name = _current_name(key, table)
        if name in keys:  # the same tensor under an old and a new name
            name = key + " (a second time)"
        keys[name], found[name] = key, tuple(shape)
    if problems := differences({key: p.torch_shape for key, p in table.items()}, found, same_but_for_1x1):
        raise LcmError(f"{what} does not fit its config: {problems}; take both from the same model")
    return keys


def _current_name(key: str, table: Mapping[str, Parameter]) -> str:
    """`key` as the table spells it; unchanged if the table does not have it."""
    if key in table:
        return key
    if "text_model." + key in table:
        return "text_model." + key
    old = _OLD_ATTENTION_KEY.fullmatch(key)
    return old[1] + _OLD_ATTENTION[old[2]] + old[3] if old else key


def _without_1x1(shape: Shape) -> Shape:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
