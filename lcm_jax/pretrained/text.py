"""CLIP's tokenizer: the files of a `tokenizer/` folder, read by transformers (which needs no torch for it).

Every file counts. SD 2.x pads with "!" (id 0) only because special_tokens_map.json says so, and padding is attended,
so a lost file changes every picture; tokenizer_config.json carries the length of 77.

Captions -> what a UNet is conditioned on, by the rules of the model's family.

    SD 1.x, 2.x   encoder_hidden_states = last hidden state (after the final LayerNorm)
    SDXL          encoder_hidden_states = concat of both encoders' penultimate hidden states (before it),
                  text_embeds = second encoder's pooled output, time_ids = sizes and crop, height first

The null text is "" encoded, but for SDXL models whose model_index says `force_zeros_for_empty_prompt`: zeros. A
negative prompt, "" too, takes its place encoded. Encoders read 77 tokens; what is cut off is counted and logged.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lcm_jax.errors import LcmError
from lcm_jax.files import read_json
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
OPTIONAL_FILES = ("tokenizer.json", "added_tokens.json")
# By these, tokenizer_config.json makes transformers (not every version, nor all of them) read files of other names, and
# from anywhere.
_OTHER_FILES = ("vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "vocab", "merges", "init_inputs")
_NO_LIMIT = 1_000_000  # transformers says 1e30 where tokenizer_config.json gives no length


def load_tokenizer(folder: Path, max_length: int) -> Any:
    """transformers' CLIPTokenizer of a folder; `max_length` is its length where its config gives none.

    Raises:
      LcmError: files missing or unreadable; the config names others.
    """
    pair = [(folder / name).is_file() for name in ("vocab.json", "merges.txt")]
    if not (all(pair) or (folder / "tokenizer.json").is_file()) or not (folder / "tokenizer_config.json").is_file():
        missing = [name for name in FILES[:3] if not (folder / name).is_file()]
        raise LcmError(f"{folder} lacks {', '.join(missing)}; copy the tokenizer's files from the original model")
    if others := [key for key in _OTHER_FILES if read_json(folder / "tokenizer_config.json").get(key)]:
        raise LcmError(
            f"{folder / 'tokenizer_config.json'} names other files as {others[0]!r} than those beside it; "
            "remove that entry"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no word about torch, which is not needed
    from transformers import CLIPTokenizer  # slow to import, and only whoever has text needs it

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the parsers of five files raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LcmError(f"{folder} is no CLIP tokenizer ({reason}); copy its files from the original model") from error
    if tokenizer.model_max_length > _NO_LIMIT:
        tokenizer.model_max_length = max_length
    return tokenizer


def tokenize(tokenizer: Any, captions: Sequence[str]) -> np.ndarray:
    """Captions -> ids, int32 [b l]: start, words, end, padded or cut to the tokenizer's length (77)."""
    return tokenize_counted(tokenizer, captions)[0]


def tokenize_counted(tokenizer: Any, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(`tokenize`, number of tokens of each caption that were cut off: int32 [b]).

    Cutting and padding are done here: transformers keeps how it does them as a state of the tokenizer, which threads
    would change under each other.
    """
    if isinstance(captions, str):
        raise TypeError(f"tokenize takes a sequence of captions, not one string: {captions!r}")
    length = tokenizer.model_max_length
    ids = np.full((len(captions), length), tokenizer.pad_token_id, np.int32)
    lost = np.zeros(len(captions), np.int32)
    whole = tokenizer(list(captions), truncation=False, padding=False, verbose=False).input_ids if len(captions) else []
    for row, found in enumerate(whole):  # transformers takes no empty batch
        lost[row] = max(0, len(found) - length)
        kept = found if len(found) <= length else [*found[: length - 1], found[-1]]
        ids[row, : len(kept)] = kept
    return ids, lost


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files that a saved tokenizer consists of, name -> content, as the source has them.

    Where the source holds only tokenizer.json and tokenizer_config.json (transformers 5 writes no more), the files that
    transformers 4 reads are derived from them.

    Raises:
      LcmError: `folder` holds no tokenizer (anymore).
    """
    names = [name for name in FILES + OPTIONAL_FILES if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in names}
    if "tokenizer_config.json" not in files or ("tokenizer.json" not in files and "vocab.json" not in files):
        raise LcmError(f"{folder} holds no tokenizer to copy; it must stay in place until the model is saved")
    if "vocab.json" not in files or "merges.txt" not in files:
        model = read_json(folder / "tokenizer.json")["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False).encode()
        files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode()
    if "special_tokens_map.json" not in files:
        config = read_json(folder / "tokenizer_config.json")
        special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if key in config}
        files["special_tokens_map.json"] = json.dumps(special, indent=2).encode()
    return files


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
