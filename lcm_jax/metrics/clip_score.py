"""CLIP score: how well pictures fit their captions (Hessel et al. 2021, arXiv:2104.08718).

    score_i = 100 max(0, cos(picture embedding_i, caption embedding_i));    CLIP score = mean over i

100 is the scale of the papers' tables (the first paper has 2.5). The value depends on the CLIP that is taken, more
than on most models that it compares: name it. Captions longer than the tokenizer's length are cut.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcm_jax.errors import LcmError
from lcm_jax.metrics import features
from lcm_jax.metrics.networks import clip
from lcm_jax.pretrained.tokenizer import tokenize
from lcm_jax.runtime import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, eq=False)
class ClipPair:
    """Both towers of one CLIP on devices.

    Attributes:
      hash: sha256 (hex) over both towers and their preprocessing; its name is `pictures.name`.
      pictures: the extractor of picture embeddings.
      texts: captions -> embeddings float32 [n dim], not normalised.
    """

    hash: str
    pictures: features.Extractor
    texts: Callable[[Sequence[str]], np.ndarray]


def load_clip(path: str | Path | None, *, mesh: Mesh | None = None, batch_size: int = 32) -> ClipPair:
    """Both towers from a CLIPModel's folder in transformers' format; arguments as `features.load_extractor`'s.

    Raises:
      LcmError: as `features.load_extractor`; also where the folder has no text tower.
    """
    text = clip.load_text(path)
    pictures = features.load_extractor("clip", path, mesh=mesh, batch_size=batch_size)
    mesh = features.one_device() if mesh is None else mesh
    params = jax.device_put(text.params, mesh_lib.replicated(mesh))

    def apply(params, ids: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return text.module.apply({"params": params}, ids).pooled.astype(jnp.float32)

    compiled = jax.jit(apply, out_shardings=mesh_lib.replicated(mesh))

    def embed(captions: Sequence[str]) -> np.ndarray:
        if not len(captions):
            raise LcmError("no captions to embed: give at least one")
        ids = tokenize(text.tokenizer, captions)
        parts = features.filled(ids, pictures.batch_size)
        pending = [compiled(params, mesh_lib.spread(mesh, part)) for part in parts]
        return np.concatenate([np.asarray(part) for part in pending])[: len(ids)]

    # The tokenizer's table counts as preprocessing.
    words = json.dumps(text.tokenizer.vocabulary(), sort_keys=True)
    whole = features.Network(pictures.name, pictures.dim, None, None, text.params, pictures.hash + words)
    return ClipPair(features.weights_hash(whole), pictures, embed)


def clip_scores(pair: ClipPair, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Score float32 [n], 0..100, of each picture [n h w 3] (as `Extractor` takes them) and its caption.

    Raises:
      LcmError: not as many captions as pictures; what the towers refuse.
    """
    if len(images) != len(captions):
        raise LcmError(f"{len(images)} pictures and {len(captions)} captions: a CLIP score needs one for each")
    return cosine_scores(pair.pictures(images), pair.texts(captions))


def cosine_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 max(0, cos) of embeddings [n d] and [n d], row by row: float32 [n]."""
    if pictures.shape != texts.shape or pictures.ndim != 2:
        raise LcmError(f"embeddings of shapes {list(pictures.shape)} and {list(texts.shape)}: give [n d] of one CLIP")
    a, b = normalised(pictures), normalised(texts)
    return np.maximum(100 * (a * b).sum(1), 0).astype(np.float32)


def normalised(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings [n d] at length 1, float64. Raises LcmError where one has no direction."""
    x = np.asarray(embeddings, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise LcmError("embeddings hold zeros, NaN or infinity only: check the pictures and weights they come from")
    return x / length
