"""Rematerialisation: which activations a network keeps for its backward pass, and which it computes anew.

"none"       everything is kept that the backward pass reads
"block"      of each resnet, transformer block, projection in or out and upsampler only the input
"attention"  as "block", and what the attention kernels return, so that they do not run twice
"""

from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

CHOICES = ("none", "block", "attention")

# The tag that attention functions put on what "attention" keeps.
ATTENTION_OUTPUT = "attention_output"


def remat(target: Any, choice: str, static_argnums: tuple[int, ...] = ()) -> Any:
    """`target`, a module class or a function of a module and arrays, to be computed anew in the backward pass.

    static_argnums: positions of Python values among the arguments, the module's own being 0.
    """
    if choice not in CHOICES:
        raise ValueError(f"rematerialisation {choice!r}; known: {CHOICES}")
    if choice == "none":
        return target
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT) if choice == "attention" else None
    return nn.remat(target, policy=keep, static_argnums=static_argnums)


def tag_attention(output: jax.Array) -> jax.Array:
    """`output` of an attention function, marked as what "attention" keeps."""
    return checkpoint_name(output, ATTENTION_OUTPUT)
