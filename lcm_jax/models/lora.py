"""Low-rank adapters, kept outside the Linen model and added to its layers by interception.

    y = layer(x) + scale * B(A(x))        linear   lora_A [i r],        lora_B [r o]
                                          conv     lora_A [kh kw i r],  lora_B [1 1 r o]; A has its strides and padding

An adapter tree mirrors the parameter tree down to the layers, each of which is {"lora_A", "lora_B"}, float32. Only
`merge` forms the dense product B A; training differentiates the two small products.

Sources: Hu et al. 2021 (LoRA); Luo et al. 2023, "LCM-LoRA" (arXiv 2311.05556), for what it adapts.
"""

import dataclasses
import functools
import operator
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lcm_jax.errors import LcmError
from lcm_jax.models import int8

Params = Any
Path = tuple[str, ...]
Scale = float | Mapping[Path, float]
Changes = Mapping[Path, Callable[[], Any]]  # path of a leaf -> a function that computes what is added to it, float32

# The layers that the LCM-LoRA report adapts, as endings of torch's module names: attention, feed-forward, projections
# of the transformers, resnets with their time projections, down- and upsamplers.
DEFAULT_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


def target_paths(params: Params, targets: Sequence[str] = DEFAULT_TARGETS) -> list[Path]:
    """Sorted paths of the linear and convolutional layers whose torch name ends in one of `targets`.

    Args:
      params: the model's tree, of arrays or of shapes.
      targets: endings that consist of whole parts of a dotted name: "conv1" does not match "myconv1".

    Raises:
      LcmError: a target matches no layer.
    """
    layers = [
        path[:-1]
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and len(leaf.shape) in (2, 4)
    ]
    found: set[Path] = set()
    for target in targets:
        end = tuple(re.sub(r"\.(\d+)(?=\.|$)", r"_\1", target).split("."))
        matched = {path for path in layers if path[-len(end) :] == end}
        if not matched:
            raise LcmError(f"LoRA target {target!r} matches no layer of the model; correct it or leave it out")
        found |= matched
    return sorted(found)


def init(key: jax.Array, params: Params, rank: int, targets: Sequence[str] = DEFAULT_TARGETS) -> dict[str, Any]:
    """Adapters that change nothing yet: A uniform in +-1/sqrt(fan_in), as in peft, and B zero.

    Args:
      key: each layer's A depends only on this and the layer's path.
      params: the model's tree, of arrays or of shapes.
      rank: r, at least 1.
      targets: see `target_paths`.

    Raises:
      LcmError: rank below 1, or a target that matches no layer.
    """
    if rank < 1:
        raise LcmError(f"LoRA rank {rank} is out of range; it must be at least 1")
    flat = traverse_util.flatten_dict(params)
    adapters = {}
    for path in target_paths(params, targets):
        *window, fan, out = flat[(*path, "kernel")].shape
        bound = (fan * int(np.prod(window))) ** -0.5
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        adapters[(*path, "lora_A")] = jax.random.uniform(own, (*window, fan, rank), jnp.float32, -bound, bound)
        adapters[(*path, "lora_B")] = jnp.zeros((*(1 for _ in window), rank, out), jnp.float32)
    return traverse_util.unflatten_dict(adapters)


def by_layer(tree: Params) -> dict[Path, dict[str, Any]]:
    """An adapter tree by layer: path -> {"lora_A", "lora_B"}."""
    layers: dict[Path, dict[str, Any]] = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        layers.setdefault(path[:-1], {})[path[-1]] = leaf
    return layers


@dataclasses.dataclass(frozen=True)
class Adapted:
    """`module` with adapters: its `apply` takes {"params": {"base": weights, "lora": adapters}}.

    The module's own fields and properties (time_cond_proj_dim, dtype, ...) can be read here. The methods of every
    Linen module (init, clone, ...) cannot be called here, as they would drop the adapters.
    """

    module: nn.Module
    scale: float

    def __getattr__(self, name: str) -> Any:
        if name == "module" or hasattr(nn.Module, name):
            raise AttributeError(f"an adapted model has no {name!r}; use that of its .module")
        return getattr(self.module, name)

    def apply(self, variables: Mapping[str, Any], *args, **kwargs) -> Any:
        """The module's output, with the adapters' part added to each adapted layer in the layer's compute dtype.

        The module's `weights_fn`, if it has one, is applied to the factors of each layer as to its weights.

        Raises:
          LcmError: adapters for layers that this call does not use.
        """
        params = variables["params"]
        layers, reached = by_layer(params["lora"]), set()
        weights_fn = getattr(self.module, "weights_fn", None)

        def add(call, call_args, call_kwargs, context):
            y = call(*call_args, **call_kwargs)
            path = context.module.path
            if context.method_name != "__call__" or path not in layers:
                return y
            reached.add(path)
            factors = layers[path] if weights_fn is None else weights_fn(layers[path], after=call_args[0])
            return y + _low_rank(context.module, factors, self.scale, call_args[0]).astype(y.dtype)

        with nn.intercept_methods(add):
            output = self.module.apply({**variables, "params": params["base"]}, *args, **kwargs)
        _check_unknown(layers.keys() - reached, f"layers of {type(self.module).__name__}")
        return output


def _low_rank(layer: nn.Module, factors: Mapping[str, jax.Array], scale: float, x: jax.Array) -> jax.Array:
    """scale * B(A(x)) of a Dense or Conv."""
    dtype = layer.dtype or x.dtype
    x, a, b = (value.astype(dtype) for value in (x, factors["lora_A"], factors["lora_B"]))
    if isinstance(layer, nn.Dense):
        hidden = x @ a
    elif layer.kernel_size == (1, 1) and layer.strides in (1, None, (1, 1)):
        hidden = x @ a[0, 0]
    else:
        hidden = jax.lax.conv_general_dilated(
            x, a, _pair(layer.strides), layer.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return (hidden * jnp.asarray(scale, dtype)) @ b.reshape(b.shape[-2:])


def _pair(strides: int | Sequence[int] | None) -> tuple[int, ...]:
    return (strides or 1,) * 2 if strides is None or isinstance(strides, int) else tuple(strides)


def merge(
    params: Params,
    adapters: Sequence[tuple[Params, Scale]],
    deltas: Sequence[tuple[Mapping[Path, Any], float]] = (),
) -> Params:
    """W + sum_i scale_i A_i B_i for every adapted kernel, summed in float32; other leaves are shared with `params`.

    Arguments and errors are those of `changes`. `params` are not changed: one base serves any number of combinations.
    """
    return add_changes(params, changes(params, adapters, deltas))


def add_changes(params: Params, found: Changes) -> Params:
    """`params` with `changes` added."""
    flat = dict(traverse_util.flatten_dict(params))
    for path, change in found.items():
        flat[path] = (flat[path].astype(np.float32) + change()).astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat)


def changes(
    params: Params,
    adapters: Sequence[tuple[Params, Scale]],
    deltas: Sequence[tuple[Mapping[Path, Any], float]] = (),
) -> Changes:
    """What adapters add to the leaves that they change; nothing of it is computed yet.

    Args:
      params: the model's tree, of arrays or of shapes.
      adapters: (adapter tree, scale) pairs; the scale is one number, or a number for each layer's path.
      deltas: (path of a leaf -> what is added to it, scale) pairs, beside the adapters.

    Raises:
      LcmError: adapters for layers, or deltas for leaves, that `params` does not have, or of other shapes; or weights
        in 8 bits.
    """
    int8.check_whole(params, "merging LoRAs")
    flat = traverse_util.flatten_dict(params)
    terms: dict[Path, list[Callable[[], Any]]] = {}

    def product(factors: Mapping[str, Any], scale: float) -> Any:
        a, b = (factors[name].astype(np.float32) for name in ("lora_A", "lora_B"))
        return scale * (a @ b.reshape(b.shape[-2:]))

    for tree, scale in adapters:
        layers = by_layer(tree)
        _check_unknown({path for path in layers if (*path, "kernel") not in flat}, "the model's layers")
        _check_shapes(layers, flat)
        for path, factors in layers.items():
            own = scale[path] if isinstance(scale, Mapping) else scale
            terms.setdefault((*path, "kernel"), []).append(functools.partial(product, factors, own))
    for delta, scale in deltas:
        wrong = {path for path, change in delta.items() if path not in flat or flat[path].shape != change.shape}
        _check_unknown(wrong, "the model's parameters")
        for path, change in delta.items():
            terms.setdefault(path, []).append(functools.partial(operator.mul, scale, change))
    return {path: functools.partial(_sum, added) for path, added in terms.items()}


def _sum(terms: Sequence[Callable[[], Any]]) -> Any:
    return functools.reduce(operator.add, (term() for term in terms))


def _check_unknown(unknown: set[Path], what: str) -> None:
    if unknown:
        some = ", ".join("/".join(path) for path in sorted(unknown)[:5])
        raise LcmError(f"{len(unknown)} LoRA adapters match none of {what} ({some}); is it another model's LoRA?")


def _check_shapes(layers: Mapping[Path, Mapping[str, Any]], flat: Mapping[Path, Any]) -> None:
    wrong = []
    for path, factors in layers.items():
        a, b, kernel = factors["lora_A"].shape, factors["lora_B"].shape, flat[(*path, "kernel")].shape
        if (*a[:-1], b[-1]) != tuple(kernel) or b != (*(1 for _ in kernel[2:]), a[-1], b[-1]):
            wrong.append(f"{'/'.join(path)}: lora_A {list(a)} and lora_B {list(b)} on a kernel {list(kernel)}")
    if wrong:
        raise LcmError(f"{len(wrong)} LoRA adapters do not fit ({'; '.join(wrong[:5])}); is it another model's LoRA?")
