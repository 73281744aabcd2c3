"""How prompts are read: weights in brackets, as A1111 and ComfyUI read them.

    parse("a (red:1.3) hat", "a1111") == [("a ", 1.0), ("red", 1.3), (" hat", 1.0)]

    plain    all is text
    a1111    (x) times 1.1, [x] by 1.1, (x:w) times w, products if nested; backslash before a bracket: it is text;
             BREAK begins a chunk; <lora:NAME:WEIGHT> is no text, but asks for a LoRA
    comfy    (x) times 1.1, (x:w) is w whatever is around it; backslash before a round bracket: it is text

What changes the text from step to step ([a:b:0.5], [a|b]) and AND, which joins whole prompts, are refused in a1111.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.pretrained.text import EMPHASES

SYNTAXES = ("plain", "a1111", "comfy")
_EMPHASIS = {"plain": "original", "a1111": "original", "comfy": "interpolate"}  # each program's own
_FACTOR = 1.1
_DEEPEST = 100  # brackets in brackets; more is no prompt

# A number before ")" is a weight, and before "]" the step at which a text changes.
_A1111 = re.compile(
    r":\s*(?P<weight>[+-]?[.\d]+)\s*\)|:\s*(?P<step>[+-]?[.\d]+)\s*(?=\])|\\[()\[\]\\]?|[()\[\]:|]|[^\\()\[\]:|]+"
)
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_TAG = re.compile(r"<(\w+):([^<>]+)>")
_BRACKETS = {"a1111": re.compile(r"\\.|[()\[\]]", re.S), "comfy": re.compile(r"\\[()]|[()]")}
_PAIR = {")": "(", "]": "["}


class Piece(NamedTuple):
    """Text with one weight; text None: a new chunk begins (BREAK)."""

    text: str | None
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the prompts of a request are read and encoded.

    Attributes:
      syntax: one of `SYNTAXES`.
      emphasis: what weights do, one of `text.EMPHASES`.
      clip_skip: layer of the text encoders whose states are used, counted from the last, which is 1; None: the model's.
    """

    syntax: str = "plain"
    emphasis: str = "original"
    clip_skip: int | None = None


PLAIN = Reading()


def make_reading(pipeline: Pipeline, syntax: str, emphasis: str | None, clip_skip: int | None) -> Reading:
    """A reading with the syntax's own emphasis if it is None. Raises BadArgument for what cannot be."""
    check_syntax(syntax, emphasis)
    layers = min(encoder.num_hidden_layers for encoder in pipeline.text_encoders if encoder is not None)
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        raise BadArgument("clip_skip", clip_skip, f"out of range; choose 1, the last layer, to {layers}")
    return Reading(syntax, emphasis or _EMPHASIS[syntax], clip_skip)


def check_syntax(syntax: str, emphasis: str | None) -> None:
    """Raises BadArgument for an unknown syntax or emphasis, or one that has no effect."""
    if syntax not in SYNTAXES:
        raise BadArgument("prompt_syntax", syntax, f"choose one of {', '.join(SYNTAXES)}")
    if emphasis is not None and emphasis not in EMPHASES:
        raise BadArgument("emphasis", emphasis, f"choose one of {', '.join(EMPHASES)}")
    if emphasis is not None and syntax == "plain":
        raise BadArgument(
            "emphasis",
            emphasis,
            "is what weights do, which plain prompts do not have; use prompt_syntax a1111 or comfy",
        )


def check_readable(syntax: str, **texts: str | Sequence[str] | None) -> None:
    """Raises BadArgument, which names the argument, for a text that the syntax does not allow; see `parse`."""
    for name, given in texts.items():
        for text in [given] if isinstance(given, str) else given or ():
            try:
                parse(text, syntax)
                position = None if syntax == "plain" else _brackets(text, syntax)[0]
            except LcmError as error:
                raise BadArgument(name, _short(text), str(error)) from None
            if position is not None:
                raise BadArgument(
                    name,
                    _short(text),
                    f"the bracket {text[position]} (character {position + 1}) has no partner; add it, write "
                    f"\\{text[position]} if it is text, or use prompt_syntax plain",
                )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def parse(text: str, syntax: str) -> list[Piece]:
    """A prompt as pieces of one weight each, neighbours of equal weight joined; brackets without partner as the
    programs take them: an open one acts to the end in a1111 and is text in comfy, a closing one is text.

    Raises:
      LcmError: a weight that is no number or not finite, brackets nested too deeply; a1111: text that changes from step
        to step, AND, a tag other than <lora:NAME:WEIGHT>.
    """
    if syntax == "plain":
        return [Piece(text)]
    if _brackets(text, syntax)[1] > _DEEPEST:
        raise LcmError(f"brackets are nested more than {_DEEPEST} deep; remove some")
    pieces = _a1111(text) if syntax == "a1111" else _comfy(text, 1.0)
    joined: list[Piece] = []
    for piece in pieces:
        if not math.isfinite(piece.weight):
            raise LcmError(f"the weight of {_short(piece.text or '')!r} is not finite; use smaller ones")
        if joined and None not in (piece.text, joined[-1].text) and piece.weight == joined[-1].weight:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.weight)
        elif piece.text != "":
            joined.append(piece)
    return joined or [Piece("")]


def _a1111(text: str) -> list[Piece]:
    loras(text)
    text = _TAG.sub("", text)
    if _AND.search(text):
        raise LcmError("AND joins prompts in a1111, which is not supported; write a comma, or and in lower case")
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []  # bracket, number of pieces before it

    def close(bracket: str, factor: float) -> bool:
        """Ends the innermost such bracket, if there is one."""
        last = next((i for i in reversed(range(len(opened))) if opened[i][0] == bracket), None)
        if last is not None:
            start = opened.pop(last)[1]
            pieces[start:] = [Piece(piece.text, piece.weight * factor) for piece in pieces[start:]]
        return last is not None

    for match in _A1111.finditer(text):
        token, in_square = match[0], bool(opened) and opened[-1][0] == "["
        if in_square and (match["step"] or token == "|"):
            raise LcmError(
                f"[...{token}...] changes the text from step to step, which is not supported; a weight is written "
                f"(...:0.9), and \\[ is a bracket that is text"
            )
        if token in ("(", "["):
            opened.append((token, len(pieces)))
        elif match["weight"] and any(bracket == "(" for bracket, _ in opened):
            close("(", _number(match["weight"]))
        elif token == ")" and close("(", _FACTOR) or token == "]" and close("[", 1 / _FACTOR):
            pass
        elif token.startswith("\\"):
            pieces.append(Piece(token[1:]))
        else:
            first, *others = _BREAK.split(token)
            pieces.append(Piece(first.rstrip() if others else first))
            for n, other in enumerate(others, 1):
                pieces += [Piece(None), Piece(other.strip() if n < len(others) else other.lstrip())]
    while opened:
        close(opened[-1][0], _FACTOR if opened[-1][0] == "(" else 1 / _FACTOR)
    return pieces


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LcmError(f"{text!r} is no number; write a weight as in (word:1.2)") from None


def _comfy(text: str, weight: float) -> list[Piece]:
    """Pieces of a text in brackets of this weight."""
    pieces, depth, start = [], 0, 0

    def literal(part: str) -> Piece:
        return Piece(part.replace("\\(", "(").replace("\\)", ")"), weight)

    for match in _BRACKETS["comfy"].finditer(text):
        if match[0] == "(":
            if depth == 0:
                pieces.append(literal(text[start : match.start()]))
                start = match.start()
            depth += 1
        elif match[0] == ")" and depth:
            depth -= 1
            if depth == 0:
                inner, own = text[start + 1 : match.start()], weight * _FACTOR
                before, _, after = inner.rpartition(":")
                try:
                    inner, own = (before, float(after)) if before else (inner, own)
                except ValueError:  # the colon is text
                    pass
                pieces += _comfy(inner, own)
                start = match.end()
    return [*pieces, literal(text[start:])]


def _brackets(text: str, syntax: str) -> tuple[int | None, int]:
    """(position of a bracket without a partner, how many are open at once at most)."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    lone, deepest = None, 0
    for match in _BRACKETS[syntax].finditer(text):
        if match[0] in opened:
            opened[match[0]].append(match.start())
            deepest = max(deepest, sum(map(len, opened.values())))
        elif match[0] in _PAIR and opened[_PAIR[match[0]]]:
            opened[_PAIR[match[0]]].pop()
        elif match[0] in _PAIR and lone is None:
            lone = match.start()
    return next((positions[0] for positions in opened.values() if positions), lone), deepest


def is_marked(text: str) -> bool:
    """Whether a1111 would read this text as more than its words: brackets, BREAK, tags."""
    try:
        return bool(_TAG.search(text)) or parse(text, "a1111") != parse(text, "plain")
    except LcmError:  # such as AND alone, which is a word
        return bool(re.search(r"[(\[<]", text))


def loras(text: str) -> dict[str, float]:
    """Name -> weight of the LoRAs that an a1111 prompt asks for.

    Raises:
      LcmError: another tag, a LoRA with more than one weight, or one that is named twice.
    """
    found: dict[str, float] = {}
    for kind, rest in _TAG.findall(text):
        name, *weights = rest.split(":")
        tag = f"<{kind}:{rest}>"
        if kind != "lora":
            raise LcmError(f"{tag} is not supported; only <lora:NAME:WEIGHT> is")
        if len(weights) > 1 or name in found:
            problem = "is there twice" if name in found else "has more than one weight"
            raise LcmError(f"{tag} {problem}; write it once, with one weight for text encoder and UNet")
        found[name] = _number(weights[0].strip()) if weights else 1.0
        if not math.isfinite(found[name]):
            raise LcmError(f"the weight of {tag} is not finite; 1 is the LoRA as it was trained")
    return found


def check_loras(name: str, texts: Iterable[str], merged: Mapping[str, float]) -> None:
    """Raises BadArgument, which names the argument, for a1111 prompts that ask for LoRAs other than those `merged`."""
    there = ", ".join(f"<lora:{lora}:{weight:g}>" for lora, weight in merged.items()) or "none"
    for text in texts:
        for lora, weight in loras(text).items():
            if merged.get(lora) != weight:
                problem = (
                    f"asks for <lora:{lora}:{weight:g}>, and the model is loaded with {there}; load it with that LoRA"
                )
                raise BadArgument(name, _short(text), problem)
