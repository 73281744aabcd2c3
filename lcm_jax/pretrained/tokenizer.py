"""CLIP's tokenizer: the files of a `tokenizer/` folder, read by transformers (which does not need torch for it).

Every file matters. SD 2.x pads with "!" (id 0) only because special_tokens_map.json says so, and padding is attended,
so a lost file changes every image; tokenizer_config.json carries the length of 77.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.foreign import read_json, reading
from lcm_jax.models.clip import LEGACY_EOS, CLIPTextModel
from lcm_jax.typed import Range, checked, fits

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
OPTIONAL_FILES = ("tokenizer.json", "added_tokens.json")
# With these keys, tokenizer_config.json makes transformers (not every version, nor all of them) read files of other
# names, from anywhere.
_OTHER_FILES = ("vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "vocab", "merges", "init_inputs")
_AGAIN = "copy the tokenizer's files from the original model"
START, END = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_NO_LIMIT = 1_000_000  # transformers' 1e30 if tokenizer_config.json gives no length
_LONGEST_TEXT = 2**20  # characters: a second of work, of which 75 tokens are used


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Captions -> token ids. Equal to another tokenizer if their files and lengths are.

    Attributes:
      digest: SHA-256 (hex) of the files.
      length: tokens of a caption, 77 for CLIP; longer ones are cut, shorter ones padded.
      files: name -> content of the files that a saved tokenizer consists of.
      clip: transformers' CLIPTokenizer.
    """

    digest: str
    length: int
    files: Mapping[str, bytes] = dataclasses.field(compare=False, repr=False)
    clip: Any = dataclasses.field(compare=False, repr=False)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self.clip.get_vocab()

    def vocabulary_hash(self) -> str:
        """SHA-256 (hex) of vocabulary, length and padding: what latent caches and tables record of a tokenizer."""
        words = [sorted(self.vocabulary().items()), self.length, self.clip.pad_token_id]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def load_tokenizer(folder: Path, encoder: CLIPTextModel) -> Tokenizer:
    """The tokenizer of a folder, for a text encoder; its length is the encoder's if its config gives none.

    Raises:
      LcmError: files missing, unreadable or contradicting each other; the config names other files; not CLIP's
        tokenizer; ids or a length that the encoder does not have.
    """
    pair = [(folder / name).is_file() for name in ("vocab.json", "merges.txt")]
    if not (all(pair) or (folder / "tokenizer.json").is_file()) or not (folder / "tokenizer_config.json").is_file():
        missing = [name for name in FILES[:3] if not (folder / name).is_file()]
        raise LcmError(f"{folder} lacks {', '.join(missing)}; {_AGAIN}")
    length = _length(folder, encoder.max_position_embeddings)
    files = _saved_files(folder)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about torch, which is not needed
    from transformers import CLIPTokenizer  # here, because it is slow to import

    with reading(folder, "a CLIP tokenizer", _AGAIN):
        clip = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        vocabulary = clip.get_vocab()
        problem = _problem(files, clip, vocabulary)
    if problem:
        raise LcmError(f"{folder} is not a CLIP tokenizer: {problem}; {_AGAIN}")
    if len(vocabulary) > encoder.vocab_size:
        raise LcmError(
            f"{folder} has {len(vocabulary)} tokens, its text encoder's vocab_size is {encoder.vocab_size}; take both "
            "from the same model"
        )
    if encoder.with_projection and encoder.eos_token_id not in (LEGACY_EOS, clip.eos_token_id):
        raise LcmError(
            f"{folder} ends texts with the id {clip.eos_token_id}, its text encoder's eos_token_id is "
            f"{encoder.eos_token_id}; take both from the same model"
        )
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return Tokenizer(digest.hexdigest(), length, files, clip)


def _length(folder: Path, most: int) -> int:
    """The length in tokenizer_config.json, else `most`. Raises LcmError for entries that cannot be used."""
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    if others := [key for key in _OTHER_FILES if config.get(key)]:
        raise LcmError(f"{file} names other files as {others[0]!r} than those beside it; remove that entry")
    for path in (file, folder / "special_tokens_map.json"):
        for key, token in read_json(path).items() if path.is_file() else ():
            text = token.get("content") if isinstance(token, dict) else token
            if key in _SPECIAL and token is not None and not (isinstance(text, str) and text):
                raise UnsupportedConfig(f"{key} of {path}", token, supported="a token")
    length = config.get("model_max_length")
    if length is None or fits(length, float) and length > _NO_LIMIT or length == math.inf:
        return most
    return checked(f"model_max_length of {file}", length, Annotated[int, Range(2, most)])


def _problem(files: Mapping[str, bytes], clip: Any, vocabulary: Mapping[str, int]) -> str | None:
    """Why transformers' `clip` does not tokenize as CLIP does and as its `files` say, else None.

    CLIP's tokens are bytes, alone and at the end of a word, what `merges.txt` makes of them, start and end. If some are
    missing, nothing else complains: words just become other tokens.
    """
    own = json.loads(files["vocab.json"].decode("utf-8-sig"))
    made = {"".join(line.split()) for line in files["merges.txt"].decode().split("\n")}
    made |= {START, END, *clip.get_added_vocab()}
    if lost := [token for token in own if len(token.removesuffix("</w>")) > 1 and token not in made]:
        return f"{len(lost)} tokens of vocab.json, such as {ascii(lost[0])}, are made by no line of merges.txt"
    if lost := {START, END} - own.keys():
        return f"vocab.json lacks {' and '.join(sorted(lost))}"
    if wrong := [token for token in own if vocabulary.get(token) != own[token]]:
        return f"its files give {ascii(wrong[0])} the ids {own[wrong[0]]!r} and {vocabulary.get(wrong[0])!r}"
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return "its ids are not 0, 1, ... without gaps and repetitions"
    if (clip.bos_token, clip.eos_token) != (START, END):
        return f"texts begin with {clip.bos_token!r} and end with {clip.eos_token!r}, not with {START!r} and {END!r}"
    return None if clip.pad_token_id in vocabulary.values() else "it has no pad_token"


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Captions -> ids, int32 [b l]: start, words, end, padded or cut to the tokenizer's length (77)."""
    return tokenize_counted(tokenizer, captions)[0]


def tokenize_whole(tokenizer: Tokenizer, captions: Sequence[str]) -> list[list[int]]:
    """Captions -> ids from start to end, neither padded nor cut. Raises as `check_text`."""
    if isinstance(captions, str):
        raise TypeError(f"tokenize takes a sequence of captions, not one string: {captions!r}")
    for caption in captions:
        check_text(caption)
    encode = tokenizer.clip  # transformers takes no empty batch
    return encode(list(captions), truncation=False, padding=False, verbose=False).input_ids if len(captions) else []


def tokenize_counted(tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(`tokenize`, number of tokens of each caption that were cut off: int32 [b]). Raises as `check_text`."""
    # Cut and padded here, because transformers keeps how it does that as a state of the tokenizer, which threads would
    # change under each other.
    ids = np.full((len(captions), tokenizer.length), tokenizer.clip.pad_token_id, np.int32)
    lost = np.zeros(len(captions), np.int32)
    for row, found in enumerate(tokenize_whole(tokenizer, captions)):
        lost[row] = max(0, len(found) - tokenizer.length)
        kept = [*found[: tokenizer.length - 1], found[-1]] if lost[row] else found
        ids[row, : len(kept)] = kept
    return ids, lost


def check_text(text: str) -> None:
    """Raises LcmError for what no tokenizer can take, although Python holds it: see the messages."""
    if not isinstance(text, str):
        raise LcmError(f"{ascii(text)[:60]} is a {type(text).__name__}, not a text; give a caption or a prompt")
    if len(text) > _LONGEST_TEXT:
        raise LcmError(f"a text of {len(text)} characters, which begins {ascii(text[:60])}, is no caption; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # by a JSON's "\ud800", or by bytes of a command line that are not UTF-8
        raise LcmError(
            f"the text {ascii(text)[:60]} is not valid Unicode: character {error.start + 1} is half a character (a "
            "lone surrogate); correct it"
        ) from None


def _saved_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files that a saved tokenizer consists of, as the source has them.

    If the source holds only tokenizer.json and tokenizer_config.json (transformers 5 writes no more), the files that
    transformers 4 reads are derived from them.
    """
    names = [name for name in FILES + OPTIONAL_FILES if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in names}
    if "vocab.json" not in files or "merges.txt" not in files:
        with reading(folder / "tokenizer.json", "a CLIP tokenizer", _AGAIN):
            model = read_json(folder / "tokenizer.json")["model"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            files["vocab.json"] = json.dumps(dict(model["vocab"]), ensure_ascii=False).encode()
            files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode()
    if "special_tokens_map.json" not in files:
        config = read_json(folder / "tokenizer_config.json")
        special = {key: config[key] for key in _SPECIAL if key in config}
        files["special_tokens_map.json"] = json.dumps(special, indent=2).encode()
    return files
