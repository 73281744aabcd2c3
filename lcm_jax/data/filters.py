"""Rules about numbers of records, as "side >= 512" or "pwatermark <= 0.5 or missing": which records stay, and why not.

    rule = FIELD OP NUMBER [or missing]        OP: <=  >=  <  >  ==

FIELD is a number that the source knows about its records, or one made from their size in pixels: `side`, the shorter
side, or `aspect`, the longer side over the shorter. The size is that of the width and height fields or, of a record
that lacks one, that in the image's header. A record without the number is dropped unless the rule ends in "or missing".
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from lcm_jax.data import images
from lcm_jax.data.records import BadRecord, BadRecordError, Record, Source, digest_of
from lcm_jax.errors import BadArgument, LcmError

SIZE_FIELDS = ("side", "aspect")
GRAMMAR = 'FIELD OP NUMBER [or missing], OP one of <= >= < > ==, as "side >= 512" or "pwatermark <= 0.5 or missing"'

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_RULE = re.compile(r"\s*([^\s<>=!]+)\s*(<=|>=|==|<|>)\s*(\S+?)\s*(\s+or\s+missing\s*)?")


@dataclasses.dataclass(frozen=True)
class Rule:
    """`field` `op` `value`; records without the number stay if `or_missing`."""

    field: str
    op: str
    value: float
    or_missing: bool = False

    def __str__(self) -> str:
        return f"{self.field} {self.op} {_shown(self.value)}" + " or missing" * self.or_missing


@dataclasses.dataclass(frozen=True)
class Report:
    """What rules did to a source.

    Attributes:
      total: records before.
      kept: records after.
      rules: (rule, records it dropped, how many of those lack the number), in the rules' order; a record counts at the
        first rule that drops it.
      unusable: records that indexing had left out before.
      notes: of the source: what else it does not use.
    """

    total: int
    kept: int
    rules: tuple[tuple[Rule, int, int], ...]
    unusable: int
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line, without the rules that dropped nothing."""
        parts = [f"{self.kept} of {self.total} records" if self.kept < self.total else f"{self.total} records"]
        parts += [f'"{rule}" dropped {dropped}' for rule, dropped, _ in self.rules if dropped]
        parts += [f"{self.unusable} more are unusable"] if self.unusable else []
        return ", ".join(parts) + ("; not used: " + ", ".join(self.notes) if self.notes else "")


@dataclasses.dataclass(frozen=True)
class Selection:
    """A `Source` of some records of another: record i is record `numbers[i]` of `source`."""

    source: Source
    numbers: np.ndarray  # int64 [n]

    @property
    def bad_records(self) -> Sequence[BadRecord]:
        return self.source.bad_records

    @property
    def notes(self) -> Sequence[str]:
        return self.source.notes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Record:
        return self.source[int(self.numbers[number])]

    def field(self, name: str) -> np.ndarray | None:
        values = self.source.field(name)
        values = None if values is None else values[self.numbers]
        return None if values is None or np.isnan(values).all() else values

    def where(self, number: int) -> tuple[str, str]:
        return self.source.where(int(self.numbers[number]))

    def digest(self) -> str:
        return digest_of(self.source.digest(), self.numbers)


def _shown(value: float) -> str:
    """All digits of a number, so that a rule in a message is the same rule."""
    return repr(float(value)).removesuffix(".0")


def parse(text: str) -> Rule:
    """Raises BadArgument if `text` is not a rule."""
    match = _RULE.fullmatch(text)
    try:
        name, op, number, or_missing = match.groups()
        value = float(number)
    except (AttributeError, ValueError):
        raise BadArgument("filters", text, f"not a rule; write {GRAMMAR}") from None
    if np.isnan(value):
        raise BadArgument("filters", text, f"compares with NaN; write {GRAMMAR}")
    return Rule(name, op, value, or_missing is not None)


def apply(
    source: Source, rules: Sequence[str], *, width_key: str = "width", height_key: str = "height"
) -> tuple[Source, Report]:
    """The records that satisfy all rules, in their order, and what each rule dropped.

    Raises:
      BadArgument: a text that is not a rule, a field that no record has (unless "or missing"), no record left.
      LcmError: the source has no records.
    """
    parsed = [parse(text) for text in rules]
    unusable, notes = len(source.bad_records), tuple(source.notes)
    if not len(source):
        first = f"; the first of {unusable} unusable ones: {source.bad_records[0]}" if unusable else ""
        first += f"; not used: {', '.join(notes)}" if notes else ""
        raise LcmError(f"the source has no records{first}; check its path")
    if not parsed:
        return source, Report(len(source), len(source), (), unusable, notes)
    found: dict[str, np.ndarray] = {}
    dropper = np.full(len(source), -1)  # the rule that dropped each record; -1: none
    counts = []
    for i, rule in enumerate(parsed):
        if rule.field not in found:
            found |= _numbers(source, rule, width_key, height_key)
        values = found[rule.field]
        missing = np.isnan(values)
        passed = np.where(missing, rule.or_missing, _OPERATORS[rule.op](values, rule.value))
        dropped = (dropper < 0) & ~passed
        dropper[dropped] = i
        counts.append((rule, int(dropped.sum()), int((dropped & missing).sum())))
    kept = np.flatnonzero(dropper < 0)
    if not len(kept):
        rule = parsed[dropper[0]]
        (shard, key), value = source.where(0), found[rule.field][0]
        has = f"has no {rule.field}" if np.isnan(value) else f"{rule.field} is {value:.10g}"
        drops = ", ".join(f'"{rule}" dropped {dropped}' for rule, dropped, _ in counts)
        raise BadArgument(
            "filters",
            ", ".join(rules),
            f'of {len(source)} records none is left: {drops}; for example, in {shard}: {key}: {has}, which "{rule}" '
            "drops; relax the rules",
        )
    return Selection(source, kept), Report(len(source), len(kept), tuple(counts), unusable, notes)


def field_sizes(source: Source, width_key: str = "width", height_key: str = "height") -> np.ndarray | None:
    """int32 [n 2], each record's (height, width) by its fields, (0, 0) of one that lacks a usable one; None if there
    are no such fields."""
    fields = [source.field(key) for key in (height_key, width_key)]
    if any(values is None for values in fields):
        return None
    both = np.stack(fields, -1)
    given = ((both >= 1) & (both < 2**31)).all(-1, keepdims=True)  # NaN >= 1 is False
    return np.where(given, both, 0).astype(np.int32)


def sizes(source: Source, width_key: str = "width", height_key: str = "height") -> np.ndarray:
    """int32 [n 2], each record's (height, width) in pixels, upright; (0, 0) if it is unknown.

    Read from the fields; of records that lack one, from their images' headers, with a progress bar.
    """
    by_fields = field_sizes(source, width_key, height_key)
    both = np.zeros((len(source), 2), np.int32) if by_fields is None else by_fields
    unknown = np.flatnonzero(both[:, 0] == 0).tolist()
    for number in tqdm(unknown, "image sizes", unit=" images", disable=None if unknown else True):
        try:
            both[number] = images.header_size(source[number].image)
        except BadRecordError:
            continue  # stays unknown
    return both


def _numbers(source: Source, rule: Rule, width_key: str, height_key: str) -> dict[str, np.ndarray]:
    """field -> float64 [n] of the rule's field; for a size field both, since they cost one look at the images."""
    if rule.field in SIZE_FIELDS:
        known = sizes(source, width_key, height_key).astype(np.float64)
        known[(known == 0).any(-1)] = np.nan
        return {"side": known.min(-1), "aspect": known.max(-1) / known.min(-1)}
    values = source.field(rule.field)
    if values is None and not rule.or_missing:
        raise BadArgument(
            "filters",
            rule,
            f'no record has a number {rule.field!r}; correct its name, or write "{rule} or missing" to keep all',
        )
    return {rule.field: np.full(len(source), np.nan) if values is None else values}
