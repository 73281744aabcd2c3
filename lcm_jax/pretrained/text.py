"""Captions -> what a UNet is conditioned on, by the rules of the model's family.

    SD 1.x, 2.x   encoder_hidden_states = last hidden state (after the final LayerNorm)
    SDXL          encoder_hidden_states = concat of both encoders' penultimate hidden states (before it),
                  text_embeds = second encoder's pooled output, time_ids = sizes and crop, height first

The null text is "" encoded, or zeros for SDXL models with `force_zeros_for_empty_prompt` in model_index.json. A
negative prompt, even "", is encoded and used instead. Encoders read 77 tokens; those that are cut off are counted.
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
TextParams = Mapping[str, Any]  # text encoder's name -> its parameter tree; other parts are not used


def tokens(pipeline: Pipeline, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids int32 [b l] for each text encoder of the pipeline."""
    return {name: tokenize(tokenizer, captions) for name, tokenizer in pipeline.tokenizers.items()}


def encode_tokens(encoders: tuple[Any, Any], params: TextParams, ids: Tokens) -> dict[str, jax.Array]:
    """Conditioning of captions, without SDXL's time_ids; pure, to be jitted with `params` and `ids` as arguments.

    encoders: `Pipeline.text_encoders`.
    """
    modules = dict(zip(TEXT_ENCODERS, encoders, strict=True))
    outputs = {name: modules[name].apply({"params": params[name]}, i) for name, i in ids.items()}
    if modules["text_encoder_2"] is None:
        return {"encoder_hidden_states": outputs["text_encoder"].last_hidden_state}
    hidden = [out.hidden_states[-2] for out in outputs.values()]
    pooled = list(outputs.values())[-1].pooled
    return {"encoder_hidden_states": jnp.concatenate(hidden, axis=-1), "text_embeds": pooled}


_encode_tokens = jax.jit(encode_tokens, static_argnums=0)


def encode(
    pipeline: Pipeline, params: TextParams, captions: Sequence[str], report: bool = True
) -> dict[str, jax.Array]:
    """Conditioning [b ...] of captions, jitted; see `encode_tokens`.

    report: log how many captions were too long, and by how much, for callers that do not report it themselves.
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
    of_text = {name: params[name] for name in pipeline.tokenizers}
    return _encode_tokens(pipeline.text_encoders, of_text, tokens(pipeline, captions))


def truncated(pipeline: Pipeline, captions: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Captions that are longer than a text encoder reads -> (its tokens, tokens kept), start and end included."""
    found: dict[str, tuple[int, int]] = {}
    given = list(dict.fromkeys(captions))
    for tokenizer in pipeline.tokenizers.values():
        kept = tokenizer.length
        for caption, lost in zip(given, tokenize_counted(tokenizer, given)[1].tolist(), strict=True):
            if lost:
                found[caption] = max(found.get(caption, (0, kept)), (kept + lost, kept))
    return found


def null(pipeline: Pipeline, params: TextParams, negative_prompt: str | None = None) -> dict[str, jax.Array]:
    """Conditioning [1 ...], without time_ids, of the pass that guidance leads away from; None: the null text."""
    encoded = encode(pipeline, params, [negative_prompt or ""], report=False)
    zeros = negative_prompt is None and pipeline.constants.zero_null
    return jax.tree.map(jnp.zeros_like, encoded) if pipeline.is_xl and zeros else encoded


def time_ids(height: int, width: int, batch: int) -> np.ndarray:
    """SDXL's condition of uncropped images of this size in pixels: original h w, crop 0 0, target h w; [b 6]."""
    return np.tile(np.array([height, width, 0, 0, height, width], np.float32), (batch, 1))
