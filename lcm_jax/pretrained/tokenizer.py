"""CLIP's tokenizer: the files of a `tokenizer/` folder, read by transformers (which needs no torch for it).

Every file counts. SD 2.x pads with "!" (id 0) only because special_tokens_map.json says so, and padding is attended,
so a lost file changes every picture; tokenizer_config.json carries the length of 77.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.files import read_json

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
