"""Trees of arrays by names: `params/conv_in/kernel`; and how two of them differ, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Differences that are listed; a wrong model differs everywhere.
MOST_LISTED = 8


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"params/conv_in/kernel": leaf}: key paths joined by "/"; works on any pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def difference(saved: Any, expected: Any) -> str:
    """Names, shapes and dtypes (of anything that has them) wherein two trees differ, on one line; "" if they do not."""
    there, here = named_leaves(saved), named_leaves(expected)
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name not in there:
            lines.append(f"{name}: not in the checkpoint, expected {_describe(here[name])}")
        elif name not in here:
            lines.append(f"{name}: {_describe(there[name])} in the checkpoint, not expected")
        elif _describe(there[name]) != _describe(here[name]):
            lines.append(f"{name}: {_describe(there[name])} in the checkpoint, expected {_describe(here[name])}")
    more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return "; ".join(lines[:MOST_LISTED] + more)


def _describe(leaf: Any) -> str:
    """float32[3,4]"""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
