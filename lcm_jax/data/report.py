"""Numbers about training data -> lines of plain text, at most WIDTH columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcm_jax.data.records import Fault

WIDTH = 100
BAR = 40  # columns of the longest bar
SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # edges of the histogram, in pixels
ASPECTS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
KINDS, NAMED = 8, 3  # reasons that are listed, and records that are named for each

Lines = list[str]


def one_line(text: str, width: int = WIDTH) -> str:
    """Printable text without line breaks, cut to `width` characters with an ellipsis."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words)
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def end_of(text: str, width: int) -> str:
    """One line as `one_line` makes it, but cut at its beginning: the end of a path tells more."""
    line = one_line(text, len(text) + 1)
    return line if len(line) <= width else "…" + line[len(line) - width + 1 :]


def indented(lines: Sequence[str]) -> Lines:
    """Two columns to the right, and cut to WIDTH."""
    return [f"  {line}" if len(line) <= WIDTH - 2 else f"  {line[: WIDTH - 3]}…" for line in lines]


def heading(title: str) -> Lines:
    title = one_line(title)
    return [title, "=" * len(title)]


def share(part: int, whole: int) -> str:
    """ "12 of 1,000 (1.2 %)"."""
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"


def bars(labels: Sequence[str], counts: Sequence[int]) -> Lines:
    """A line for each label: it, its count, and a bar; what is there at all has a bar of 1 at least."""
    left, right = max(map(len, labels), default=0), max((len(f"{count:,}") for count in counts), default=0)
    unit = BAR / max(max(counts, default=0), 1)
    lengths = [max(bool(count), round(count * unit)) for count in counts]
    rows = zip(labels, counts, lengths, strict=True)
    return [f"{label:>{left}}  {count:>{right},}  {'#' * length}".rstrip() for label, count, length in rows]


def histogram(values: np.ndarray, edges: Sequence[float], label: Callable[[float, float], str]) -> Lines:
    """Bars of how many values are in [a, b) for neighbours a, b of `edges`, below the first and from the last on.

    Empty ranges at either end are left out. `label` takes a and b, which may be 0 and infinity.
    """
    bounds = [0.0, *sorted(set(edges)), np.inf]
    counts = np.histogram(values, np.array(bounds))[0]
    found = np.flatnonzero(counts)
    used = range(found[0], found[-1] + 1) if len(found) else range(0)
    return bars([label(bounds[i], bounds[i + 1]) for i in used], [int(counts[i]) for i in used])


def _pixels(low: float, high: float) -> str:
    return f"{low:.0f} and more" if np.isinf(high) else f"{low:.0f} to {high - 1:.0f}"


def _ratio(low: float, high: float) -> str:
    return f"{low:.2f} and more" if np.isinf(high) else f"{low:.2f} to {high:.2f}"


def sizes(found: np.ndarray, targets: np.ndarray, resolution: int) -> Lines:
    """Shorter sides, aspect ratios, and how many pictures must be enlarged.

    Args:
      found: int [n 2], (height, width) of pictures in pixels; (0, 0): unknown.
      targets: int [n 2], what each is brought to.
      resolution: an edge of the histogram.
    """
    known = (found > 0).all(axis=1)
    height, width = found[known].T
    small = (found[known] < targets[known]).any(axis=1)
    unknown = [f"unknown: {share(int((~known).sum()), len(found))}"] if not known.all() else []
    return [
        "shorter side, pixels",
        *indented(histogram(np.minimum(height, width), (*SIDES, resolution), _pixels)),
        "width / height",
        *indented(histogram(width / height, ASPECTS, _ratio)),
        f"smaller than the training picture, so enlarged: {share(int(small.sum()), int(known.sum()))}",
        *unknown,
    ]


def buckets(shapes: Sequence[tuple[int, int]], counts: Sequence[int], batch_size: int) -> Lines:
    """Records and batches of an epoch in each aspect bucket; `shapes` are (height, width)."""
    batches = [-(-count // batch_size) for count in counts]
    labels = [f"{height} x {width}" for height, width in shapes]
    notes = [f"{label}, {batch:,} batches" for label, batch in zip(labels, batches, strict=True)]
    return ["aspect buckets, height x width", *indented(bars(notes, counts))]


def _spread(name: str, values: Sequence[int]) -> str:
    low, middle, high, most = np.percentile(values, (0, 50, 95, 100))
    return f"{name:<11} min {low:<6g} median {middle:<6g} 95 % {high:<6g} max {most:g}"


def captions(found: Sequence[tuple[str, ...]], examples: int = 3) -> Lines:
    """Lengths of the captions of records, and the first ones."""
    texts = [text for several in found for text in several]
    if not texts:
        return ["no captions"]
    more, empty = sum(len(several) > 1 for several in found), sum(not text.strip() for text in texts)
    return [
        f"captions: {len(texts):,} of {len(found):,} records; {more:,} records have several, {empty:,} captions are "
        "empty",
        *indented([_spread("characters", [len(text) for text in texts])]),
        *indented([_spread("words", [len(text.split()) for text in texts])]),
        *indented([one_line(several[0], WIDTH - 4).join('""') for several in found[:examples] if several]),
    ]


def kind(reason: str) -> str:
    """The reason without its numbers, by which reasons are counted."""
    return one_line(re.sub(r"\d+", "N", reason), WIDTH - 16)


def faults(found: Sequence[Fault]) -> Lines:
    """Unusable records by reason, the most frequent first, some of them named."""
    by_kind: dict[str, list[Fault]] = {}
    for fault in found:
        by_kind.setdefault(kind(fault.reason), []).append(fault)
    listed = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    lines: Lines = []
    for reason, alike in listed[:KINDS]:
        same = len({fault.reason for fault in alike}) == 1
        reason = one_line(alike[0].reason, WIDTH - 16) if same else reason
        lines.append(f"{len(alike):,} x {reason}")
        lines += indented([end_of(f"{fault.shard}: {fault.key}", WIDTH - 6) for fault in alike[:NAMED]])
    rest = listed[KINDS:]
    return lines + ([f"{sum(len(alike) for _, alike in rest):,} x {len(rest)} other reasons"] if rest else [])


def manifest(facts: Mapping[str, Any]) -> Lines:
    """What a latent cache says of itself."""
    rows = [group["rows"] for group in facts["groups"]]
    shards = [shard for group in facts["groups"] for shard in group["shards"]]
    made = facts["fingerprint"]
    lines = [
        f"made by {facts['made_by']}, seed {facts['seed']}, text as {facts['text']}, moments as {facts['dtype']}",
        f"{sum(facts['examples']):,} records x {facts['variants']} variants: {sum(rows):,} rows, {facts['faults']:,} "
        "unusable records",
        f"{len(shards):,} shards, {sum(shard['bytes'] for shard in shards) / 2**20:,.1f} MiB",
        f"resolution {made['resolution']}, scaling factor {made['scaling_factor']}",
        *(f"{name} {hash_[:12]}" for name, hash_ in [("VAE", made["vae"]), *_hashes(made)]),
        *(f"array {array['name']}: {array['dtype']} {_shapes(array['shapes'])}" for array in facts["arrays"]),
        *(f"data.{key} = {value!r}" for key, value in facts["data"].items() if value not in (None, [])),
    ]
    sizes_of = [f"{height} x {width}" for height, width in made["sizes"]]
    return [*lines, *(["rows by size, height x width", *indented(bars(sizes_of, rows))] if len(rows) > 1 else [])]


def _hashes(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    tables = {"tokenizer": made["tokenizers"], "weights": made["text_encoders"]}
    return [(f"{name}'s {what}", value) for what, table in tables.items() for name, value in table.items()]


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))


def throughput(rows: int, seconds: float, batch_size: int) -> str:
    """What the loader gave in `seconds`."""
    rate = rows / seconds
    return f"{rate:,.1f} rows/s ({rows:,} in {seconds:.1f} s): feeds {rate / batch_size:,.2f} steps/s of {batch_size}"


def paragraph(text: str) -> Lines:
    return textwrap.wrap(one_line(text, 10 * WIDTH), WIDTH, break_long_words=True)
