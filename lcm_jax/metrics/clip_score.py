"""CLIP score, how well images fit their captions, and PickScore, which of two images people would rather have.

    CLIP score_i = 100 max(0, cos_i)                  cos_i = cos(image embedding_i, caption embedding_i)           (1)
    PickScore_i  = exp(logit_scale) cos_i                                                                           (2)

(1): Hessel et al. 2021, arXiv:2104.08718. 100 is the scale in the tables of papers (the first paper has 2.5). (2):
Kirstain et al. 2023, arXiv:2305.01569, equation 1, by a CLIP ViT-H/14 that was fine-tuned on people's choices. Values
are means over images. They depend on the CLIP more than on most models that it compares: always name it. Captions
longer than the tokenizer's length are cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from lcm_jax.errors import LcmError
from lcm_jax.metrics.distances import normalised
from lcm_jax.metrics.features import Extractor, load_extractor, make_extractor
from lcm_jax.metrics.networks import clip
from lcm_jax.pretrained.tokenizer import Tokenizer, tokenize


@dataclasses.dataclass(frozen=True, eq=False)
class ClipPair:
    """Both towers of one CLIP on devices.

    Attributes:
      images: the extractor of image embeddings.
      tokens: the extractor of text embeddings, from token ids. Its hash covers both towers and their preprocessing.
      logit_scale: exp(logit_scale) of (2), None if the weights have none.
    """

    images: Extractor
    tokens: Extractor
    tokenizer: Tokenizer
    logit_scale: float | None = None

    @property
    def hash(self) -> str:
        return self.tokens.hash

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings float32 [n dim] of captions, not normalised."""
        if not len(captions):
            raise LcmError("no captions to embed: give at least one")
        return self.tokens.features(tokenize(self.tokenizer, captions))


def load_clip(path: str | Path | None, *, mesh: Mesh | None = None, batch_size: int = 32) -> ClipPair:
    """Both towers from a CLIPModel's folder in transformers' format; arguments as for `load_extractor`.

    Raises:
      LcmError: as `load_extractor`; also if the folder has no text tower.
    """
    text, tokenizer = clip.load_text(path)
    images = load_extractor("clip", path, mesh=mesh, batch_size=batch_size)
    text = dataclasses.replace(text, name=images.name, preprocessing=images.hash + text.preprocessing)
    return ClipPair(images, make_extractor(text, mesh, batch_size), tokenizer, clip.load_logit_scale(path))


def clip_scores(pair: ClipPair, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Score float32 [n], 0..100, of each image [n h w 3] (as `Extractor` takes them) and its caption.

    Raises:
      LcmError: not one caption for each image, or images that the extractor refuses.
    """
    return cosine_scores(*_embeddings(pair, images, captions))


def pick_scores(pair: ClipPair, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """PickScore (2), float32 [n], of each image [n h w 3] (as `Extractor` takes them) and its caption.

    Raises:
      LcmError: as `clip_scores`; also if the weights have no logit_scale.
    """
    check_logit_scale(pair)
    return (pair.logit_scale * _cosines(*_embeddings(pair, images, captions))).astype(np.float32)


def check_logit_scale(pair: ClipPair) -> None:
    """Raises LcmError if the weights have none, which PickScore needs."""
    if pair.logit_scale is None:
        raise LcmError(
            f"the weights of {pair.images.name} have no logit_scale, which PickScore multiplies cosines by; give the "
            "folder of a whole CLIPModel, as yuvalkirstain/PickScore_v1 of the Hugging Face hub"
        )


def _embeddings(pair: ClipPair, images: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if len(images) != len(captions):
        raise LcmError(f"{len(images)} images and {len(captions)} captions: a score needs one for each")
    return pair.images(images), pair.texts(captions)


def cosine_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 max(0, cos) of embeddings [n d] and [n d], row by row: float32 [n]."""
    return np.maximum(100 * _cosines(images, texts), 0).astype(np.float32)


def _cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    if images.shape != texts.shape or images.ndim != 2:
        raise LcmError(f"embeddings of shapes {list(images.shape)} and {list(texts.shape)}: give [n d] of one CLIP")
    return (normalised(images) * normalised(texts)).sum(1)
