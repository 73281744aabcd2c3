"""Look at the data of a config before training on it: counts, sizes, captions, faults, speed, and a contact sheet.

    python -m lcm_jax.inspect --config=configs/my_run.py [--out=contact.png] [--count=64] [--seconds=5]

Of the config it reads `data` and `seed`; no model is loaded. Of each part of the data it reads the index, and a sample
of records, the first that a run would read. Pictures of the contact sheet are pixel by pixel those of the run's first
rows, after crop and flip, and captions those that were drawn for them.

With data.encode = "start" records that cannot be used are left out before the order is made; where there are such, a
run's order is another than the sheet's.

Numbers about training data -> lines of plain text, at most WIDTH columns wide.

The first records and rows of a run, and how fast its rows come: what there is to look at before training.

Pictures in rows and columns, each with its caption below it.

A cell is as wide as the widest picture, or MIN_WIDTH, and as high as the highest picture with LINES of text; a picture
is at its cell's top left corner, pixel by pixel as it was given.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from lcm_jax import files
from lcm_jax.data import cache, filters, images, loader
from lcm_jax.data.order import STREAM_KEY, Order, Place, draws_at
from lcm_jax.data.records import BadRecord, Fault
from lcm_jax.data.rows import CaptionDropout, Pictures
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data

MEASURED_ROWS = 16  # of each batch, so that a few seconds see several of them


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the program.

    Attributes:
      sample: records of each part that are read.
      seconds: for which the loader is measured, about.
      count: pictures on the contact sheet.
      out: of the contact sheet; None: none.
    """

    sample: int = 512
    seconds: float = 5.0
    count: int = 64
    out: Path | None = None


def inspect(config: ConfigDict, options: Options, write: Callable[[str], None] = print) -> None:
    """Writes the report, and the contact sheet if `options.out` is given.

    Raises:
      LcmError: a bad config or source, a wrong `out`; none of a group's records can be used.
    """
    config_lib.validate(config, models=False)
    check(config, options)
    parts = training_data.open_parts(config)
    rows = [rows_of(config, part) for part in parts]
    total, samples = sum(part.weight for part in parts), []
    for stream, (part, examples) in enumerate(zip(parts, rows, strict=True)):
        say(f"reading a sample of {part.name}")
        order = Order(config.seed + stream * STREAM_KEY, config.data.batch_size, (tuple(examples.groups),))
        sample = read_sample(examples, first_places(order, options.sample), config.data.decoder)
        write("\n".join([*part_lines(config, part, examples, sample, part.weight / total), ""]))
        samples.append(sample)
    if warning := too_many(config, parts, samples):
        write("\n".join([*warning, ""]))
    examples, order = as_training(config, parts, rows)
    write("\n".join(speed_lines(config, examples, order, options.seconds)))
    write("\n".join(["", *sheet_lines(examples, order, options)]))


def check(config: ConfigDict, options: Options) -> None:
    """Raises LcmError where the sheet cannot be written, or pictures cannot be made as the config says."""
    images.check_choice(config.data.decoder, config.data.resize_filter)
    training_data.picture_sizes(config)
    out = options.out
    if out and out.suffix.lower() != ".png":
        raise LcmError(f"--out={out}: the contact sheet is a PNG; choose a name that ends in .png")
    if out and out.is_dir():
        raise LcmError(f"--out={out} is a folder; name a file in it")


def too_many(config: ConfigDict, parts: Sequence[training_data.Part], samples: Sequence[Sample]) -> list[str]:
    """A warning where a run would stop for its unusable records, if all data are as the samples are; else nothing."""
    bad = read = 0.0
    for part, sample in zip(parts, samples, strict=True):
        indexed = 0 if training_data.is_cached(part) else len(part.source.faults)
        bad += indexed + part.report.total * len(sample.faults) / max(sample.read, 1)
        read += indexed + part.report.total
    share = config.data.max_bad_fraction
    if bad <= share * read:
        return []
    return paragraph(
        f"A run would stop: about {bad:,.0f} of {read:,.0f} records cannot be used, more than "
        f"--config.data.max_bad_fraction={share}"
    )


def rows_of(config: ConfigDict, part: training_data.Part) -> loader.Examples:
    """The part's rows, with captions where a run has token ids."""
    if training_data.is_cached(part):
        return part.source
    return training_data.pictures(config, part.source, keep_caption)


def as_training(
    config: ConfigDict, parts: Sequence[training_data.Part], rows: Sequence[loader.Examples]
) -> tuple[tuple[loader.Examples, ...], Order]:
    """The rows with a run's draws, and their order: see `training_data.open_examples`."""
    examples = [Once(row, config.seed) if config.data.encode == "start" else row for row in rows]
    if config.data.caption_dropout:
        null = {CAPTION: np.array("")}
        examples = [CaptionDropout(row, null, config.data.caption_dropout) for row in examples]
    return tuple(examples), training_data.order_of(config, parts, examples)


def part_lines(
    config: ConfigDict, part: training_data.Part, examples: loader.Examples, sample: Sample, weight: float
) -> list[str]:
    """The report on one part of the data; `weight`: its share of the mixture."""
    lines = heading(part.name + (f", {100 * weight:.3g} % of the mixture" if weight < 1 else ""))
    lines += str(part.report).splitlines()
    lines += ["", *index_faults(part), ""]
    if training_data.is_cached(part):
        lines += manifest(part.source.manifest)
    else:
        lines += size_lines(config, part, examples, sample)
    lines += [epoch_line(config, examples, weight), "", f"sample: {sample.read:,} records, the first of a run"]
    lines += captions(sample.captions)
    lines += [f"unusable: {share(len(sample.faults), sample.read)}"]
    return lines + indented(faults(sample.faults))


def index_faults(part: training_data.Part) -> list[str]:
    """What could not be used when the index, or the cache, was made."""
    found = part.source.faults if not training_data.is_cached(part) else cache_faults(part.source)
    title = "when the cache was made" if training_data.is_cached(part) else "found by indexing"
    return [f"unusable, {title}: {len(found):,}", *indented(faults(found))]


def cache_faults(cached: cache.Cached) -> list[Fault]:
    path = cached.path / "bad_records.jsonl"
    return [Fault(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def size_lines(config: ConfigDict, part: training_data.Part, rows: Pictures, sample: Sample) -> list[str]:
    """Sizes as the index knows them, of all records; or else those of the sample's pictures."""
    data, source = config.data, part.source
    fields = [source.field(key) for key in (data.height_key, data.width_key)]
    if all(field is not None for field in fields):
        found, title = filters.sizes(source, data.width_key, data.height_key), f"of all {len(source):,} records"
        title += f", by the fields {data.height_key!r} and {data.width_key!r}"
    else:
        found, title = sample.sizes, f"of {len(sample.sizes):,} pictures of the sample"
    sides = np.array(rows.sizes)
    lines = [f"sizes {title}", *sizes(found, sides[images.nearest_bucket(found, sides)], data.resolution)]
    if found is not sample.sizes:
        lines += pictures_themselves(sample, sides)
    if rows.members is not None:
        lines += ["", *buckets(rows.sizes, rows.groups, data.batch_size)]
    return lines


def pictures_themselves(sample: Sample, buckets: np.ndarray) -> list[str]:
    """The fields may tell the sizes of originals, of which the pictures were made smaller."""
    targets = buckets[images.nearest_bucket(sample.sizes, buckets)]
    small = int((sample.sizes < targets).any(axis=1).sum())
    return [f"pictures of the sample themselves that are enlarged: {share(small, len(sample.sizes))}"]


def epoch_line(config: ConfigDict, examples: loader.Examples, weight: float) -> str:
    """How long an epoch is; every batch of an aspect bucket is full."""
    size, total = config.data.batch_size, sum(examples.groups)
    if len(examples.groups) == 1:
        return f"one epoch of it: {total / size / weight:,.1f} steps of {size}"
    batches = sum(-(-count // size) for count in examples.groups)
    return f"one epoch of it: {batches / weight:,.1f} steps of {size}; {batches * size - total:,} rows come again in it"


def speed_lines(config: ConfigDict, examples: Sequence[loader.Examples], order: Order, seconds: float) -> list[str]:
    """What the loader gives, without the models."""
    data = config.data
    cached = all(is_cached(row) for row in examples)
    rows = data.batch_size if cached else min(data.batch_size, MEASURED_ROWS)
    how = f"worker processes: {data.workers}" if data.workers else f"threads: {loader.THREADS}"
    what = "read" if cached else f"read, decode ({data.decoder}), resize ({data.resize_filter}), crop"
    say(f"measuring the loader for {seconds:g} s")
    count, took = measure(loader.Batches(tuple(examples), order, 0, range(rows)), data.workers, seconds)
    lines = [*heading("throughput"), f"{what}; {how}", throughput(count, took, data.batch_size)]
    if data.encode == "start":
        lines.append(f'data.encode = "start": it is done once, before training, {total_rows(order):,} rows')
    return lines


def total_rows(order: Order) -> int:
    return sum(sum(groups) for groups in order.streams)


def sheet_lines(examples: Sequence[loader.Examples], order: Order, options: Options) -> list[str]:
    """Writes the contact sheet, if it is asked for and there are pictures; says what was done."""
    if any(is_cached(row) for row in examples):
        return ["contact sheet: none, a latent cache holds no pictures"]
    if options.out is None:
        return ["contact sheet: none; --out=contact.png writes one"]
    say(f"writing {options.out}")
    rows, bad = first_rows(examples, order, options.count)
    sheet = draw([row["pixels"] for row in rows], [str(row[CAPTION]) or "(no text)" for row in rows])
    with files.new_file(options.out) as partial:
        sheet.save(partial, format="PNG")
    lines = [f"contact sheet: {options.out}, the first {len(rows):,} pictures of a run, row by row"]
    return lines + [f"replaced on it: {len(bad)}"] * bool(bad) + indented(faults(bad))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_out(lines: str) -> None:
    """To stdout as soon as it is known, whatever characters the terminal has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(lines.encode(encoding, "replace").decode(encoding), flush=True)


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    out = Path(given.out).expanduser() if given.out else None
    options = Options(given.sample, given.seconds, given.count, out)
    return exit_code(lambda: inspect(given.config, options, write_out))


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


CAPTION = "caption"  # a row's text, in the place of its token ids
WARM_UP = 1.0  # seconds after the first batch


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was read of a part: captions of each record, (height, width) [n 2] of its picture, and what was unusable."""

    captions: list[tuple[str, ...]]
    sizes: np.ndarray
    faults: list[Fault]

    @property
    def read(self) -> int:
        return len(self.captions) + len(self.faults)


@dataclasses.dataclass(frozen=True)
class Once:
    """`examples` as they are encoded before training: what is random about a row is that of its place in the data."""

    examples: loader.Examples
    seed: int

    @property
    def groups(self) -> tuple[int, ...]:
        return self.examples.groups

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        del draws
        position = sum(self.examples.groups[:group]) + rank
        return self.examples.row(group, rank, draws_at(self.seed, position))

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.examples.where(group, rank)


def keep_caption(captions: Sequence[str]) -> dict[str, np.ndarray]:
    """In the place of the tokenizers: captions -> themselves."""
    return {CAPTION: np.array(captions, object)}


def is_cached(rows: loader.Examples) -> bool:
    """Whether they come from a latent cache, as they are or with captions dropped."""
    while isinstance(rows, Once | CaptionDropout):
        rows = rows.examples
    return isinstance(rows, cache.Cached)


def first_places(order: Order, count: int) -> list[Place]:
    """The first `count` different examples of the order's one stream, or all there are."""
    found: dict[Place, None] = {}
    wanted = min(count, sum(order.streams[0]))
    for step in itertools.count():
        if len(found) >= wanted:
            return list(found)[:wanted]
        found |= dict.fromkeys(order.places(step))
    raise AssertionError("unreachable")


def read_sample(examples: Pictures | cache.Cached, places: Sequence[Place], decoder: str) -> Sample:
    """Reads and decodes the records of `places`, in threads; of a cache, what its rows were made of."""

    def read(place: Place) -> tuple[tuple[str, ...], tuple[int, int]] | Fault:
        try:
            if isinstance(examples, cache.Cached):
                caption = examples.about(place.group, place.rank).get("caption")
                return () if caption is None else (caption,), (0, 0)
            members = examples.members
            record = examples.source[place.rank if members is None else int(members[place.group][place.rank])]
            return record.captions, images.decode(record.image, decoder).shape[:2]
        except BadRecord as error:
            return Fault(*examples.where(place.group, place.rank), str(error))

    with concurrent.futures.ThreadPoolExecutor(loader.THREADS) as pool:
        bar = tqdm(pool.map(read, places), "sample", len(places), unit=" records", file=sys.stderr, disable=None)
        results = list(bar)
    good = [result for result in results if not isinstance(result, Fault)]
    sizes = np.array([size for _, size in good], np.int32).reshape(-1, 2)
    return Sample([texts for texts, _ in good], sizes, [result for result in results if isinstance(result, Fault)])


def first_rows(
    examples: Sequence[loader.Examples], order: Order, count: int
) -> tuple[list[dict[str, np.ndarray]], list[Fault]]:
    """The first `count` rows of a run one by one, and what was replaced."""
    rows: list[dict[str, np.ndarray]] = []
    faults: list[Fault] = []
    for step in itertools.count():
        end = min(order.batch_size, count - len(rows))
        if not end:
            return rows, faults
        batch, found = loader.Batches(tuple(examples), order, step, range(end))[0]
        rows += [{name: value[number] for name, value in batch.items()} for number in range(end)]
        faults += found
    raise AssertionError("unreachable")


def measure(batches: loader.Batches, workers: int, seconds: float) -> tuple[int, float]:
    """(rows, seconds) of reading ahead, without the warm-up: at least one batch, and about `seconds`."""
    rows = len(batches.rows)
    with contextlib.closing(loader.read_ahead(batches, workers)) as read:
        next(read)
        settled = time.monotonic() + min(WARM_UP, seconds)
        for _ in read:
            if (begun := time.monotonic()) >= settled:
                break
        for count, _ in enumerate(read, start=1):
            if (now := time.monotonic()) - begun >= seconds:
                return count * rows, now - begun
    raise AssertionError("the order has no end")


MIN_WIDTH = 160  # of a cell, so that a caption has room under a small picture
LINES, LINE_HEIGHT, FONT_SIZE = 3, 14, 11  # of a caption, in pixels
GAP = 6  # between cells
LONGEST = 1000  # characters of a caption that are measured at all
_ELLIPSIS = "…"


def columns_for(count: int) -> int:
    """Of a sheet about as many cells wide as high."""
    return int(np.ceil(np.sqrt(count)))


def corners(shapes: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(top, left) of each picture of `shapes` (height, width), and the sheet's (height, width); in pixels."""
    high = max(height for height, _ in shapes) + LINES * LINE_HEIGHT + GAP
    wide = max(MIN_WIDTH, *(width for _, width in shapes)) + GAP
    columns = columns_for(len(shapes))
    rows = -(-len(shapes) // columns)
    places = [(GAP + number // columns * high, GAP + number % columns * wide) for number in range(len(shapes))]
    return places, (GAP + rows * high, GAP + columns * wide)


def draw(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """The sheet of uint8 [h w 3] pictures, which may differ in size, and their captions."""
    shapes = [picture.shape[:2] for picture in pictures]
    places, (height, width) = corners(shapes)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    room = max(MIN_WIDTH, *(shape[1] for shape in shapes))
    for picture, caption, shape, (top, left) in zip(pictures, captions, shapes, places, strict=True):
        for number, line in enumerate(wrapped(caption, font, room)):
            pen.text((left, top + shape[0] + number * LINE_HEIGHT), line, "black", font)
        sheet.paste(Image.fromarray(picture), (left, top))
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most LINES lines, none wider than `width` pixels; the last one ends in an ellipsis if the text goes on."""
    rest, lines = one_line(text, LONGEST), []
    while rest and len(lines) < LINES:
        end = _fitting(rest, font, width)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + _ELLIPSIS) > width:
            last = last[:-1].rstrip()
        lines[-1] = last + _ELLIPSIS
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many characters fit, at least 1: to the end of a word, or within a word that is too long for a line."""
    end = len(text)
    if font.getlength(text) > width:
        low, end = 1, len(text)  # low fits, end does not
        while end - low > 1:
            middle = (low + end) // 2
            low, end = (middle, end) if font.getlength(text[:middle]) <= width else (low, middle)
        end = low
        if not text[end].isspace() and " " in text[:end]:
            end = text[:end].rindex(" ")
    return end


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, config_lib.flag_help("configs/shapes_lcm.py"))
    flags.DEFINE_string("out", None, "PNG file of the contact sheet; without it there is none")
    flags.DEFINE_integer("count", Options.count, "pictures on the contact sheet", lower_bound=1)
    flags.DEFINE_integer("sample", Options.sample, "records of each part that are read", lower_bound=1)
    flags.DEFINE_float("seconds", Options.seconds, "for which the loader is measured, about", lower_bound=0.1)
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=config_lib.parse_flags)
