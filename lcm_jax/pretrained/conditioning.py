"""Captions -> what a UNet is conditioned on, by the rules of the model's family.

    SD 1.x, 2.x   encoder_hidden_states = last hidden state (after the final LayerNorm)
    SDXL          encoder_hidden_states = concat of both encoders' penultimate hidden states (before it),
                  text_embeds = second encoder's pooled output, time_ids = sizes and crop, height first

The null text is "" encoded, but for SDXL models whose model_index says `force_zeros_for_empty_prompt`: zeros. A
negative prompt, "" too, takes its place encoded. Encoders read 77 tokens; what is cut off is counted and logged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline
from lcm_jax.pretrained.tokenizer import tokenize, tokenize_counted

Tokens = Mapping[str, Any]  # text encoder's name in the pipeline -> ids [b l]


def tokenizers(pipeline: Pipeline) -> dict[str, Any]:
    """The tokenizer of each text encoder that the pipeline has."""
    pairs = zip(TEXT_ENCODERS, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True)
    return {name: tokenizer for name, tokenizer in pairs if getattr(pipeline, name) is not None}


def tokens(pipeline: Pipeline, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids int32 [b l] for each text encoder that the pipeline has."""
    return {name: tokenize(tokenizer, captions) for name, tokenizer in tokenizers(pipeline).items()}


def encode_tokens(pipeline: Pipeline, params: Mapping[str, Any], ids: Tokens) -> dict[str, jax.Array]:
    """Conditioning of the captions, without SDXL's time_ids; pure, to be jitted with `params` and `ids` as arguments.

    params: the pipeline's `.params`, or the part of it that holds the text encoders.
    """
    outputs = {name: getattr(pipeline, name).apply({"params": params[name]}, i) for name, i in ids.items()}
    if not pipeline.is_xl:
        return {"encoder_hidden_states": outputs["text_encoder"].last_hidden_state}
    hidden = [out.hidden_states[-2] for out in outputs.values()]
    pooled = list(outputs.values())[-1].pooled
    return {"encoder_hidden_states": jnp.concatenate(hidden, axis=-1), "text_embeds": pooled}


_encode_tokens = jax.jit(encode_tokens, static_argnums=0)


def encode(pipeline: Pipeline, captions: Sequence[str], report: bool = True) -> dict[str, jax.Array]:
    """Conditioning [b ...] of captions with the pipeline's own weights, jitted; see `encode_tokens`.

    report: log how many captions were too long, and by how much; for who does not say it otherwise.
    """
    cut = truncated(pipeline, captions) if report else {}
    if cut:
        caption, (length, kept) = max(cut.items(), key=lambda item: item[1][0])
        logging.warning(
            "%d of %d captions are longer than %d tokens and were cut; the longest, of %d, begins %r",
            len(cut),
            len(captions),
            kept,
            length,
            caption[:60],
        )
    params = {name: tree for name, tree in pipeline.params.items() if name.startswith("text_encoder")}
    return _encode_tokens(pipeline, params, tokens(pipeline, captions))


def truncated(pipeline: Pipeline, captions: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Captions that are longer than a text encoder reads -> (its tokens, tokens kept), start and end included."""
    found: dict[str, tuple[int, int]] = {}
    given = list(dict.fromkeys(captions))
    for tokenizer in tokenizers(pipeline).values():
        kept = tokenizer.model_max_length
        for caption, lost in zip(given, tokenize_counted(tokenizer, given)[1].tolist(), strict=True):
            if lost:
                found[caption] = max(found.get(caption, (0, kept)), (kept + lost, kept))
    return found


def null(pipeline: Pipeline, negative_prompt: str | None = None) -> dict[str, jax.Array]:
    """Conditioning [1 ...], without time_ids, of the pass that guidance leads away from; None: the null text."""
    encoded = encode(pipeline, [negative_prompt or ""], report=False)
    zeros = negative_prompt is None and pipeline.configs["model_index"].get("force_zeros_for_empty_prompt", True)
    return jax.tree.map(jnp.zeros_like, encoded) if pipeline.is_xl and zeros else encoded


def time_ids(height: int, width: int, batch: int) -> np.ndarray:
    """SDXL's condition of uncropped pictures of this size in pixels: original h w, crop 0 0, target h w; [b 6]."""
    return np.tile(np.array([height, width, 0, 0, height, width], np.float32), (batch, 1))
