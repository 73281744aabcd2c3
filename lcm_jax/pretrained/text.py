"""Captions -> what a UNet is conditioned on, by the rules of the model's family.

    SD 1.x, 2.x   encoder_hidden_states = last hidden state (after the final LayerNorm)
    SDXL          encoder_hidden_states = concat of both encoders' penultimate hidden states (before it),
                  text_embeds = second encoder's pooled output, time_ids = sizes and crop, height first

The null text is "" encoded, or zeros for SDXL models with `force_zeros_for_empty_prompt` in model_index.json. A
negative prompt, even "", is encoded and used instead. Encoders read 77 tokens; those that are cut off are counted.

Prompts with a syntax come as chunks of 77 tokens with a weight w for each. Chunks are encoded one by one and joined
along the tokens; the pooled output is the first chunk's, without weights. Of a chunk's states z, for each encoder:

    no_norm       z w
    original      z w mean(z) / mean(z w)      A1111's default; means over all tokens and features of the chunk
    interpolate   e + w (z - e)                ComfyUI's; e: the empty prompt's state at the same position
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lcm_jax.models.clip import Spliced
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline
from lcm_jax.pretrained.tokenizer import tokenize, tokenize_counted

Tokens = Mapping[str, Any]  # text encoder's name in the pipeline -> ids [b l]
TextParams = Mapping[str, Any]  # text encoder's name -> its parameter tree; other parts are not used

SCORE, NULL_SCORE = 6.0, 2.5  # aesthetic, that a refiner is asked for in its two passes (diffusers' defaults)
EMPHASES = ("original", "no_norm", "interpolate")
_LEAST_MEAN = 1e-6  # the mean of z w that "original" still divides by: CLIP's states cancel in it


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tokens of prompts that are all of `count` chunks, row by row: chunk j of prompt i is row i * count + j.

    Attributes:
      count: chunks of a prompt.
      ids: text encoder's name -> int32 [b * count l].
      weights: the same for float32 [b * count l]; None: all are 1.
      spliced: text encoder's name -> vectors to take in place of tokens (`models.clip`); None: there are none.
    """

    count: int
    ids: Tokens
    weights: Mapping[str, np.ndarray] | None = None
    spliced: Mapping[str, Spliced] | None = None


def tokens(pipeline: Pipeline, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids int32 [b l] for each text encoder of the pipeline."""
    return {name: tokenize(tokenizer, captions) for name, tokenizer in pipeline.tokenizers.items()}


def encode_tokens(
    encoders: tuple[Any, Any],
    params: TextParams,
    ids: Tokens,
    weights: Mapping[str, jax.Array] | None = None,
    spliced: Mapping[str, Spliced] | None = None,
    empty: Tokens | None = None,
    *,
    count: int = 1,
    emphasis: str = "original",
    clip_skip: int | None = None,
) -> dict[str, jax.Array]:
    """Conditioning of captions, without SDXL's time_ids; pure, to be jitted with all but `encoders` as arguments.

    Args:
      encoders: `Pipeline.text_encoders`.
      params: their weights.
      ids, weights, spliced, count: see `Chunks`.
      empty: ids [1 l] of the empty prompt, for the emphasis "interpolate".
      emphasis: one of `EMPHASES`.
      clip_skip: layer whose states are taken, counted from the last, which is 1; None: 1, of SDXL 2.
    """
    modules = dict(zip(TEXT_ENCODERS, encoders, strict=True))
    is_xl = modules["text_encoder_2"] is not None
    skip = clip_skip or (2 if is_xl else 1)

    def states(name: str, i: jax.Array, vectors: Spliced | None = None) -> tuple[jax.Array, jax.Array]:
        out = modules[name].apply({"params": params[name]}, i, vectors, skip)
        return out.hidden_states[-skip] if is_xl else out.last_hidden_state, out.pooled

    hidden = []
    for name, i in ids.items():
        z, pooled = states(name, i, spliced and spliced[name])
        if weights is not None:
            z = weighted(z, weights[name], emphasis, states(name, empty[name])[0] if empty else None)
        hidden.append(z.reshape(-1, count * z.shape[1], z.shape[2]))
    if not is_xl:
        return {"encoder_hidden_states": hidden[0]}
    return {"encoder_hidden_states": jnp.concatenate(hidden, axis=-1), "text_embeds": pooled[::count]}


def weighted(z: jax.Array, weights: jax.Array, emphasis: str, empty: jax.Array | None = None) -> jax.Array:
    """States z [b l d] of one chunk a row with the weights [b l] of its tokens, by a formula of the module.

    Rows (of "interpolate": tokens) whose weights are 1 stay as they are, bit for bit. If |mean(z w)| is below 1e-6,
    "original" leaves the mean as "no_norm" does.

    empty: e [1 l d], for "interpolate".
    """
    x, w = z.astype(jnp.float32), weights[..., None]
    if emphasis == "interpolate":
        e = empty.astype(jnp.float32)
        return jnp.where(w == 1, z, (e + w * (x - e)).astype(z.dtype))
    y = x * w
    if emphasis == "original":
        before, after = x.mean((1, 2), keepdims=True), y.mean((1, 2), keepdims=True)
        usable = jnp.abs(after) > _LEAST_MEAN
        y = y * jnp.where(usable, before / jnp.where(usable, after, 1), 1)
    return jnp.where((w == 1).all((1, 2), keepdims=True), z, y.astype(z.dtype))


_encode_tokens = jax.jit(encode_tokens, static_argnums=0, static_argnames=("count", "emphasis", "clip_skip"))


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


def encode_chunks(
    pipeline: Pipeline, params: TextParams, chunks: Chunks, emphasis: str, clip_skip: int | None
) -> dict[str, jax.Array]:
    """Conditioning [b ...] of prompts in chunks, jitted; see `encode_tokens`."""
    return _encode_tokens(
        pipeline.text_encoders,
        {name: params[name] for name in pipeline.tokenizers},
        chunks.ids,
        chunks.weights,
        chunks.spliced,
        tokens(pipeline, [""]) if chunks.weights is not None and emphasis == "interpolate" else None,
        count=chunks.count,
        emphasis=emphasis,
        clip_skip=clip_skip,
    )


def same_length(
    cond: Mapping[str, jax.Array], null: Mapping[str, jax.Array]
) -> tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]]:
    """Both, repeated along the tokens until they are equally long.

    It changes nothing: softmax over copies of all keys gives the same average.
    """
    key = "encoder_hidden_states"
    lengths = cond[key].shape[1], null[key].shape[1]
    both = math.lcm(*lengths)
    return tuple(
        one if length == both else {**one, key: jnp.tile(one[key], (1, both // length, 1))}
        for one, length in zip((cond, null), lengths, strict=True)
    )


def null(pipeline: Pipeline, params: TextParams, negative_prompt: str | None = None) -> dict[str, jax.Array]:
    """Conditioning [1 ...], without time_ids, of the pass that guidance leads away from; None: the null text."""
    return null_of(pipeline, encode(pipeline, params, [negative_prompt or ""], report=False), negative_prompt)


def null_of(pipeline: Pipeline, encoded: dict[str, jax.Array], negative_prompt: str | None) -> dict[str, jax.Array]:
    """`null`, of the negative prompt, or of "" if it is None, `encoded`."""
    zeros = negative_prompt is None and pipeline.constants.zero_null
    return jax.tree.map(jnp.zeros_like, encoded) if pipeline.is_xl and zeros else encoded


def time_ids(height: int, width: int, batch: int, score: float | None = None) -> np.ndarray:
    """SDXL's condition of uncropped images of this size in pixels: original h w, crop 0 0, target h w; [b 6].

    score: of a refiner, which takes an aesthetic score in place of the target; [b 5].
    """
    last = [height, width] if score is None else [score]
    return np.tile(np.array([height, width, 0, 0, *last], np.float32), (batch, 1))
