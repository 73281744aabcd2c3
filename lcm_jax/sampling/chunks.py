"""Prompts -> chunks of tokens for the text encoders, of a number that a batch shares.

A chunk is start, 75 tokens at most, end, and padding. Where a long prompt is split:

    plain    not at all: what does not fit is cut off
    a1111    after the last comma if it is one of the last 20 tokens, else after 75; an embedding stays whole
    comfy    before a word that does not fit; words of 8 or more tokens are split

An embedding is where its name stands, a word of its own; in comfy where `embedding:NAME` stands.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.pretrained import text
from lcm_jax.pretrained.embeddings import Embedding
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.pretrained.tokenizer import Tokenizer, tokenize_whole
from lcm_jax.sampling.prompts import Piece, Reading, parse

MOST = 64  # chunks of the prompts of a batch: 4800 tokens
_AFTER_COMMA = 20  # A1111's default of "comma padding backtrack"
_LONG_WORD = 8  # tokens, ComfyUI's `max_word_length`
_COMMA = ",</w>"
_COMFY = re.compile(r"\bembedding:(\S+)")


class Slot(NamedTuple):
    """A token: its id, or the vector [d] that takes its place; and its weight."""

    id: int
    weight: float = 1.0
    vector: np.ndarray | None = None


Unit = list[Slot]  # what is not split, if it can be helped


def chunked(
    pipeline: Pipeline, embeddings: Mapping[str, Embedding], prompts: Sequence[str], reading: Reading
) -> text.Chunks:
    """The chunks of prompts; those of fewer than others are repeated, which changes nothing (`text.same_length`).

    Args:
      embeddings: name in lower case -> embedding.
      reading: with the syntax; in "plain" every prompt is one chunk.

    Raises:
      LcmError: see `prompts.parse`; an embedding that is not there; more than `MOST` chunks.
    """
    split = {
        name: [_chunks(name, tokenizer, embeddings, prompt, reading.syntax) for prompt in prompts]
        for name, tokenizer in pipeline.tokenizers.items()
    }
    # SDXL's two tokenizers differ in "!".
    counts = [max(map(len, of_prompt)) for of_prompt in zip(*split.values(), strict=True)]
    common = math.lcm(*counts)
    if (most := max(counts, default=1)) > MOST:
        raise LcmError(f"a prompt of {most} chunks of 75 tokens is too long; shorten it to {MOST} chunks")
    if common > MOST:
        listed = ", ".join(map(str, sorted(set(counts))))
        raise LcmError(
            f"prompts of {listed} chunks of 75 tokens share no length of at most {MOST} chunks; shorten some, the "
            "negative prompt included, or use batch_size 1"
        )
    ids, weights, spliced = {}, {}, {}
    for name, of_prompts in split.items():
        rows = []
        for chunks, count in zip(of_prompts, counts, strict=True):
            rows += [*chunks, *[[]] * (count - len(chunks))] * (common // count)
        width = getattr(pipeline, name).hidden_size
        ids[name], weights[name], spliced[name] = _arrays(pipeline.tokenizers[name], rows, width)
    return text.Chunks(
        common,
        ids,
        weights if any((w != 1).any() for w in weights.values()) else None,
        spliced if any(here.any() for _, here in spliced.values()) else None,
    )


def _arrays(
    tokenizer: Tokenizer, chunks: Sequence[Unit], width: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(ids, weights, (vectors, where)) [n l ...] of chunks for one text encoder."""
    shape = len(chunks), tokenizer.length
    ids, weights = np.full(shape, tokenizer.clip.pad_token_id, np.int32), np.ones(shape, np.float32)
    vectors, here = np.zeros((*shape, width), np.float32), np.zeros(shape, bool)
    for row, chunk in enumerate(chunks):
        ids[row, 0], ids[row, len(chunk) + 1] = tokenizer.clip.bos_token_id, tokenizer.clip.eos_token_id
        for column, slot in enumerate(chunk, 1):
            ids[row, column], weights[row, column] = slot.id, slot.weight
            if slot.vector is not None:
                vectors[row, column], here[row, column] = slot.vector, True
    return ids, weights, (vectors, here)


def _chunks(
    encoder: str, tokenizer: Tokenizer, embeddings: Mapping[str, Embedding], prompt: str, syntax: str
) -> list[Unit]:
    """The slots of each chunk of one prompt, without start, end and padding."""
    units, room = _units(encoder, tokenizer, embeddings, parse(prompt, syntax), syntax), tokenizer.length - 2
    if syntax == "plain":
        return [[slot for unit in units for slot in unit][:room]]
    if room < max([_LONG_WORD, *(len(one.vectors[encoder]) for one in embeddings.values())]):
        raise LcmError(f"the tokenizer reads {tokenizer.length} tokens at once, too few for chunks; use plain prompts")
    comma = tokenizer.clip.convert_tokens_to_ids(_COMMA)
    filled = _split_a1111(units, room, comma) if syntax == "a1111" else _split_comfy(units, room)
    return filled[:-1] if len(filled) > 1 and not filled[-1] else filled


def _split_a1111(units: Iterator[Unit | None], room: int, comma: int) -> list[Unit]:
    chunks: list[Unit] = [[]]
    after_comma: int | None = None  # in the last chunk
    for unit in units:
        if unit is None:  # BREAK
            chunks.append([])
            after_comma = None
            continue
        is_comma, last = unit[0].id == comma and unit[0].vector is None, chunks[-1]
        if len(last) == room and not is_comma and after_comma is not None and room - after_comma < _AFTER_COMMA:
            chunks.append(last[after_comma:])
            del last[after_comma:]
            after_comma = None
        if len(chunks[-1]) + len(unit) > room:
            chunks.append([])
            after_comma = None
        chunks[-1] += unit
        if is_comma:
            after_comma = len(chunks[-1])
    return chunks


def _split_comfy(units: Iterator[Unit], room: int) -> list[Unit]:
    chunks: list[Unit] = [[]]
    for unit in units:
        free = room - len(chunks[-1])
        if len(unit) > free:
            kept = free if len(unit) >= _LONG_WORD else 0
            chunks[-1] += unit[:kept]
            rest = unit[kept:]
            chunks += [rest[start : start + room] for start in range(0, len(rest), room)]
        else:
            chunks[-1] += unit
    return chunks


def _units(
    encoder: str, tokenizer: Tokenizer, embeddings: Mapping[str, Embedding], pieces: Sequence[Piece], syntax: str
) -> Iterator[Unit | None]:
    """Embeddings whole, tokens one by one, in comfy words; None: a new chunk begins."""
    for words, weight in pieces:
        if words is None:
            yield None
            continue
        for part in _parts(words, embeddings, syntax):
            if isinstance(part, Embedding):
                yield [Slot(0, weight, vector) for vector in part.vectors[encoder]]
                continue
            for ids in tokenize_whole(tokenizer, part.split() if syntax == "comfy" else [part]):
                slots = [Slot(i, weight) for i in ids[1:-1]]
                yield from [slots] if syntax == "comfy" and slots else ([slot] for slot in slots)


def _parts(words: str, embeddings: Mapping[str, Embedding], syntax: str) -> Iterator[str | Embedding]:
    """A text with its embeddings in place of their names."""
    start, names = 0, sorted(embeddings, key=len, reverse=True)  # the longest first
    for match in _pattern(names, syntax).finditer(words):
        end = match.end()
        if syntax != "comfy":
            name = names[match.lastindex - 1]
        else:
            stripped = match[1].rstrip(",")  # commas behind the name are text
            end -= len(match[1]) - len(stripped)
            name = re.sub(r"\.(safetensors|pt|bin)$", "", stripped.lower())
            if name not in embeddings:
                there = ", ".join(one.name for one in embeddings.values()) or "none"
                raise LcmError(f"there is no embedding {stripped!r}; those given: {there}")
        yield words[start : match.start()]
        yield embeddings[name]
        start = end
    yield words[start:]


def _pattern(names: Sequence[str], syntax: str) -> re.Pattern:
    """Matches embeddings in a text, name i as group i + 1, but none inside of a word."""
    if syntax == "comfy":
        return _COMFY
    edge = r"[^\W_]"  # a letter or a digit
    before, after = (rf"(?<!{edge})", rf"(?!{edge})")
    of_names = [
        (before if name[0].isalnum() else "") + f"({re.escape(name)})" + (after if name[-1].isalnum() else "")
        for name in names
    ]
    return re.compile("|".join(of_names) or "(?!)", re.IGNORECASE)


def truncated(
    pipeline: Pipeline, embeddings: Mapping[str, Embedding], texts: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """`text.truncated` of plain prompts, with the vectors of embeddings counted."""
    if not embeddings:
        return text.truncated(pipeline, texts)
    found = {}
    for prompt in texts:
        for name, tokenizer in pipeline.tokenizers.items():
            length = 2 + sum(map(len, _units(name, tokenizer, embeddings, [Piece(prompt)], "plain")))
            if length > max(tokenizer.length, found.get(prompt, (0, 0))[0]):
                found[prompt] = length, tokenizer.length
    return found


def unused(embeddings: Mapping[str, Embedding], prompts: Sequence[str], syntax: str) -> list[str]:
    """Names of embeddings that stand in none of the prompts."""
    pieces = [piece.text or "" for prompt in prompts for piece in parse(prompt, syntax)]
    used = {part for words in pieces for part in _parts(words, embeddings, syntax) if isinstance(part, Embedding)}
    return [one.name for one in embeddings.values() if one not in used]
