"""The embedded teacher's tokenizer in CLIP's format: byte-level BPE over lower-case words ending in "</w>".

The vocabulary follows CLIP's scheme: 256 byte characters, the same with "</w>", one entry per merge, and the two
special tokens at the end. Every word and comma of the captions becomes one token; any other text is split into pieces.
"""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np

from lcm_jax.data import shapes
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.pretrained.tokenizer import load_tokenizer, tokenize

LENGTH = 24  # a caption needs 16 at most
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """The captions' words in order of first use."""
    text = "a an at the on there is background shape " + " ".join(
        " ".join(names) for names in shapes.ATTRIBUTES.values()
    )
    return list(dict.fromkeys(text.split()))


def merges() -> list[tuple[str, str]]:
    """Merges that build each word from the left, without repeats; a merge stands behind those that it needs."""
    pairs: dict[tuple[str, str], None] = {}
    for word in words():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = next(((a, b) for a, b in pairs if (a, b) in zip(pieces, pieces[1:], strict=False)), None)
            pair = pair or (pieces[0], pieces[1])
            pairs.setdefault(pair)
            pieces = _apply(pieces, pair)
    return list(pairs)


def _apply(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def alphabet() -> list[str]:
    """One printable character per byte, as in GPT-2 and CLIP: printable bytes first, the others moved past 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [256 + n for n in range(256 - len(printable))]
    return [chr(code) for code in printable + moved]


VOCAB_SIZE = 2 * 256 + len(merges()) + 2


def write(folder: Path) -> None:
    """vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = alphabet() + [c + "</w>" for c in alphabet()] + ["".join(pair) for pair in merges()] + [START, END]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@functools.cache
def _tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return load_tokenizer(Path(folder), CLIPTextModel(vocab_size=VOCAB_SIZE, max_position_embeddings=LENGTH))


def encode(captions: list[str]) -> np.ndarray:
    """Token ids, int32 [n LENGTH]."""
    return tokenize(_tokenizer(), captions)
