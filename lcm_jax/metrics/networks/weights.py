"""Published torch weights -> parameter trees of the feature networks, and where to get the files.

    encoder.layer.0.norm1.weight   ->  encoder/layer_0/norm1/scale          list index joined by an underscore
    Mixed_5b.branch1x1.bn.weight   ->  Mixed_5b/branch1x1/bn/scale          running_mean, running_var: mean, var
    embeddings.cls_token           ->  embeddings/cls_token                 parameters without a module of their own

The layouts are those of pretrained/names.py; its table of names serves the models that are trained and exported.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lcm_jax.errors import LcmError
from lcm_jax.pretrained.names import Parameter, to_jax

# Where the usual files are, and what they must be: kind -> (how to get it, sha256 of the file).
SOURCES = {
    "inception": (
        "the file https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "clip": (
        "a CLIP folder such as openai/clip-vit-large-patch14 of the Hugging Face hub (published CMMD numbers are of "
        "openai/clip-vit-large-patch14-336): config.json, preprocessor_config.json, the tokenizer's files, "
        "model.safetensors",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    ),
    "dinov2": (
        "the folder facebook/dinov2-large of the Hugging Face hub: config.json, preprocessor_config.json, "
        "model.safetensors",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
}

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
_IN_LIST = re.compile(r"(layers?)_(\d+)")
_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+")  # torch hub's way: NAME-<first digits of its sha256>.pth
_LISTED = 5


def existing(kind: str, path: str | Path | None) -> Path:
    """`path` where it is. Raises LcmError, which tells where to get the weights of `kind` and their sha256."""
    found = None if path is None else Path(path).expanduser()
    if found is None or not found.exists():
        what = "no weights are given" if found is None else f"{found} does not exist"
        where, digest = SOURCES[kind]
        raise LcmError(f"features of {kind!r}: {what}; fetch {where} (sha256 {digest}), and give its path")
    return found


def check_named_hash(kind: str, path: Path) -> None:
    """Raises LcmError where a file's name tells the beginning of its sha256 and the content has another."""
    told = _NAMED_HASH.search(path.name)
    if told is None:
        return
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(told[1]):
        where, published = SOURCES[kind]
        raise LcmError(
            f"{path} ({path.stat().st_size} bytes) has sha256 {digest}, its name says {told[1]}...: damaged "
            f"or truncated; fetch {where} (sha256 {published}) again"
        )


def torch_key(path: tuple[str, ...]) -> str:
    """The key of a leaf: ("encoder", "layer_0", "norm1", "scale") -> "encoder.layer.0.norm1.weight"."""
    *modules, leaf = path
    return ".".join(
        [
            *(_IN_LIST.sub(r"\1.\2", name) if _IN_LIST.fullmatch(name) else name for name in modules),
            _LEAVES.get(leaf, leaf),
        ]
    )


@functools.lru_cache(maxsize=8)
def torch_table(module: nn.Module, input_shape: tuple[int, ...]) -> Mapping[str, Parameter]:
    """Torch key -> Parameter of a network that takes one float32 array of `input_shape`."""
    tree = jax.eval_shape(lambda key: module.init(key, jnp.zeros(input_shape)), jax.random.key(0))["params"]
    flat = traverse_util.flatten_dict(tree)
    return {torch_key(path): Parameter(path, leaf.shape) for path, leaf in flat.items()}


def read_params(
    table: Mapping[str, Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    what: str,
) -> dict[str, Any]:
    """The float32 tree of `table` from tensors with the keys of `shapes`, all of which must belong to it.

    Raises:
      LcmError: tensors missing, left over, of a wrong shape or not of floating point.
    """
    wanted = {key: parameter.torch_shape for key, parameter in table.items()}
    problems = {
        "missing": sorted(wanted.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - wanted.keys()),
        "mis-shaped": sorted(
            f"{key} {list(shapes[key])} instead of {list(wanted[key])}"
            for key in wanted.keys() & shapes.keys()
            if tuple(shapes[key]) != wanted[key]
        ),
    }
    if any(problems.values()):
        told = ", ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in problems.items() if keys)
        raise LcmError(f"{what} holds another network: {told}; take weights and config from the same model")
    flat = {}
    for key, parameter in table.items():
        tensor = read(key)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise LcmError(f"{what}: {key} is {tensor.dtype}; only floating-point weights can be loaded")
        flat[parameter.path] = to_jax(tensor, parameter, np.float32)
    return traverse_util.unflatten_dict(flat)


def _some(keys: list[str]) -> str:
    more = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f", and {more} more" if more > 0 else "")
