"""Published torch weights -> parameter trees of the feature networks, and where to get the files.

Names and layouts follow the rule of pretrained/names.py.
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

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.pretrained.names import Parameter, differences, read_leaf, torch_name

# The usual files: kind -> (how to get it, sha256 of the file; "": not known here).
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
    "pickscore": (
        "the folder yuvalkirstain/PickScore_v1 of the Hugging Face hub: config.json, model.safetensors; tokenizer and "
        "preprocessor_config.json are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "",
    ),
    "dinov2": (
        "the folder facebook/dinov2-large of the Hugging Face hub: config.json, preprocessor_config.json, "
        "model.safetensors",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
}

_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+")  # torch hub's way: NAME-<first digits of its sha256>.pth


def existing(kind: str, path: str | Path | None) -> Path:
    """`path`, expanded. Raises LcmError, which names the source of the weights and their sha256, if it is missing."""
    found = None if path is None else files.expanded(path)
    if found is None or not found.exists():
        what = "no weights are given" if found is None else f"{found} does not exist"
        source, digest = SOURCES[kind]
        named = f" (sha256 {digest})" if digest else ""
        raise LcmError(f"features of {kind!r}: {what}; fetch {source}{named}, and give its path")
    return found


def check_named_hash(kind: str, path: Path) -> None:
    """Raises LcmError if a file's name contains the beginning of a sha256 that its content does not have."""
    named = _NAMED_HASH.search(path.name)
    if named is None:
        return
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(named[1]):
        source, published = SOURCES[kind]
        raise LcmError(
            f"{path} ({path.stat().st_size} bytes) has sha256 {digest}, its name says {named[1]}...: damaged or "
            f"truncated; fetch {source} (sha256 {published}) again"
        )


@functools.lru_cache(maxsize=8)
def torch_table(module: nn.Module, input_shape: tuple[int, ...]) -> Mapping[str, Parameter]:
    """Torch key -> Parameter of a network that takes one float32 array of `input_shape`."""
    tree = jax.eval_shape(lambda key: module.init(key, jnp.zeros(input_shape)), jax.random.key(0))["params"]
    flat = traverse_util.flatten_dict(tree)
    return {torch_name(path): Parameter(path, leaf.shape) for path, leaf in flat.items()}


def read_params(
    table: Mapping[str, Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    what: str,
) -> dict[str, Any]:
    """The float32 tree of `table`; every tensor in `shapes` must belong to it.

    Raises:
      LcmError: tensors missing, left over, of a wrong shape or not of floating point.
    """
    wanted = {key: parameter.torch_shape for key, parameter in table.items()}
    if problems := differences(wanted, {key: tuple(shape) for key, shape in shapes.items()}):
        raise LcmError(f"{what} holds another network: {problems}; take weights and config from the same model")
    flat = {p.path: read_leaf(read(key), p, np.float32, f"{what}: {key}") for key, p in table.items()}
    return traverse_util.unflatten_dict(flat)
