"""Report on the data of a config before training: counts, sizes, captions, bad records, speed, and a contact sheet.

    python -m lcm_jax.inspect --config=configs/my_run.py [--out=contact.png] [--count=64] [--seconds=5]

Of the config it reads `data` and `seed`; no model is loaded. Of each part of the data it reads the index and a sample
of records, the first that a run would read. The contact sheet shows the first rows of the run: their images pixel by
pixel, after crop and flip, and the captions that were chosen for them.

With data.encode = "start" a run leaves out unusable records before it makes its order. If there are any, its order
differs from the sheet's.

The report is plain text of WIDTH columns; on a terminal it takes the terminal's width, and headings are bold.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import dataclasses
import itertools
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import app, flags, logging
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from tqdm import tqdm

from lcm_jax import files
from lcm_jax.data import cache, filters, images, loader
from lcm_jax.data.order import STREAM_KEY, ExampleIndex, Order
from lcm_jax.data.records import BadRecord, BadRecordError
from lcm_jax.data.rows import CaptionDropout, Examples, FixedDraws, ImageRows
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as run_data
from lcm_jax.runtime.waiting import say

WIDTH = 100
BAR = 40  # columns of the longest bar
SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # edges of the histogram, in pixels
ASPECTS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
REASONS, NAMED, QUOTED = 8, 3, 3  # kinds of bad records that are listed, records named for each, captions quoted

CAPTION = "caption"  # a row's text, in place of its token ids
MEASURED_ROWS = 16  # of each batch, so that a few seconds cover several batches
WARM_UP = 1.0  # seconds after the first batch

MIN_WIDTH = 160  # of a cell of the sheet in pixels, so that a caption has room below a small image
LINES, LINE_HEIGHT, FONT_SIZE = 3, 14, 11  # of a caption, in pixels
GAP = 6  # between cells
LONGEST = 1000  # characters of a caption that are measured at all

Report = Iterator[RenderableType]  # a string is one line


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the program."""

    sample: int = 512  # records of each part that are read
    seconds: float = 5.0  # how long the loader is measured, about
    count: int = 64  # images on the contact sheet
    out: Path | None = None  # file of the contact sheet; None: no sheet


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was read of a part: captions of each record, (height, width) [n 2] of its image, and what was unusable."""

    captions: list[tuple[str, ...]]
    sizes: np.ndarray
    bad_records: list[BadRecord]

    @property
    def read(self) -> int:
        return len(self.captions) + len(self.bad_records)


def inspect(config: ConfigDict, options: Options) -> Report:
    """Yields the report as it is made, and writes the contact sheet if `options.out` is given.

    Raises:
      LcmError: a bad config or source, a wrong `out`; none of a group's records can be used.
    """
    config_lib.validate(config, models=False)
    run_data.image_sizes(config)
    if options.out and options.out.suffix.lower() != ".png":
        raise LcmError(f"--out={options.out}: the contact sheet is a PNG; choose a name that ends in .png")
    if options.out and options.out.is_dir():
        raise LcmError(f"--out={options.out} is a folder; name a file in it")
    parts = run_data.open_parts(config)
    cached = run_data.is_cached(parts[0])  # if one is, all are
    rows = [rows_of(config, part) for part in parts]
    total, bad, read = sum(part.weight for part in parts), 0.0, 0
    for stream, (part, examples) in enumerate(zip(parts, rows, strict=True)):
        say(f"reading a sample of {part.name}")
        order = Order(config.seed + stream * STREAM_KEY, config.data.batch_size, (tuple(examples.groups),))
        sample = read_sample(examples, first_indices(order, options.sample), config.data.decoder)
        yield from of_part(config, part, examples, sample, part.weight / total)
        indexed = 0 if cached else len(part.source.bad_records)
        bad += indexed + part.report.total * len(sample.bad_records) / max(sample.read, 1)
        read += indexed + part.report.total
    if bad > config.data.max_bad_fraction * read:  # if all data are as the samples are
        limit = f"--config.data.max_bad_fraction={config.data.max_bad_fraction}"
        yield from (f"A run would stop: about {bad:,.0f} of {read:,} records are unusable, more than {limit}", "")
    examples, order = as_training(config, parts, rows)
    yield from of_speed(config, cached, examples, order, options.seconds)
    if cached:
        yield "contact sheet: none, a latent cache holds no images"
    elif options.out is None:
        yield "contact sheet: none; --out=contact.png writes one"
    else:
        say(f"writing {options.out}")
        yield from write_sheet(options.out, *first_rows(examples, order, options.count))


def rows_of(config: ConfigDict, part: run_data.Part) -> Examples:
    """The part's rows, with captions instead of token ids."""
    if run_data.is_cached(part):
        return part.source
    return run_data.image_rows(config, part.source, keep_caption)


def keep_caption(captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Stands for the tokenizers."""
    return {CAPTION: np.array(captions, object)}


def as_training(
    config: ConfigDict, parts: Sequence[run_data.Part], rows: Sequence[Examples]
) -> tuple[tuple[Examples, ...], Order]:
    """The rows with a run's draws, and their order: see `run_data.open_examples`."""
    examples = [FixedDraws(row, config.seed) if config.data.encode == "start" else row for row in rows]
    if config.data.caption_dropout:
        null = {CAPTION: np.array("")}
        examples = [CaptionDropout(row, null, config.data.caption_dropout) for row in examples]
    return tuple(examples), run_data.order_of(config, parts, examples)


def first_indices(order: Order, count: int) -> list[ExampleIndex]:
    """The first `count` different examples of the order's one stream, or all of them."""
    found: dict[ExampleIndex, None] = {}
    wanted, step = min(count, sum(order.streams[0])), itertools.count()
    while len(found) < wanted:
        found |= dict.fromkeys(order.batch(next(step)))
    return list(found)[:wanted]


def read_sample(examples: ImageRows | cache.Cached, indices: Sequence[ExampleIndex], decoder: str) -> Sample:
    """Reads and decodes records in threads; of a cache it reads what the rows were made from."""

    def read(index: ExampleIndex) -> tuple[tuple[str, ...], tuple[int, int]] | BadRecord:
        try:
            if isinstance(examples, cache.Cached):
                caption = examples.about(index.group, index.rank).get("caption")
                return () if caption is None else (caption,), (0, 0)
            record = examples.record(index.group, index.rank)
            return record.captions, images.decode(record.image, decoder).shape[:2]
        except BadRecordError as error:
            return BadRecord(*examples.where(index.group, index.rank), str(error))

    with concurrent.futures.ThreadPoolExecutor(loader.THREADS) as pool:
        bar = tqdm(pool.map(read, indices), "sample", len(indices), unit=" records", file=sys.stderr, disable=None)
        results = list(bar)
    good = [result for result in results if not isinstance(result, BadRecord)]
    sizes = np.array([size for _, size in good], np.int32).reshape(-1, 2)
    return Sample([texts for texts, _ in good], sizes, [result for result in results if isinstance(result, BadRecord)])


def first_rows(
    examples: Sequence[Examples], order: Order, count: int
) -> tuple[list[dict[str, np.ndarray]], list[BadRecord]]:
    """The first `count` rows of a run one by one, and the records that were replaced."""
    rows: list[dict[str, np.ndarray]] = []
    bad: list[BadRecord] = []
    for step in range(-(-count // order.batch_size)):
        end = min(order.batch_size, count - len(rows))
        batch, found = loader.Batches(tuple(examples), order, step, range(end))[0]
        rows += [{name: value[number] for name, value in batch.items()} for number in range(end)]
        bad += found
    return rows, bad


def of_part(config: ConfigDict, part: run_data.Part, examples: Examples, sample: Sample, weight: float) -> Report:
    """The report on one part of the data; `weight`: its share of the mixture."""
    cached, report, size = run_data.is_cached(part), part.report, config.data.batch_size
    yield heading(part.name + (f", {100 * weight:.3g} % of the mixture" if weight < 1 else ""))
    counts = [("records", f"{report.total:,}", "")]
    counts += [(str(rule), f"{-n:,}", f"({missing:,} missing)" * bool(missing)) for rule, n, missing in report.rules]
    counts += [("kept", f"{report.kept:,}", "")]
    counts += [("unusable, not counted above", f"{report.unusable:,}", "")] * bool(report.unusable)
    yield from (table(counts, "lrl"), "")
    if report.notes:
        yield from ("not used: " + ", ".join(report.notes), "")
    bad = part.source.bad_records() if cached else part.source.bad_records
    yield f"unusable, {'when the cache was made' if cached else 'found by indexing'}: {len(bad):,}"
    yield from of_bad_records(bad)
    yield ""
    yield from of_manifest(part.source.manifest) if cached else of_sizes(config, part, examples, sample)
    batches, total = sum(-(-count // size) for count in examples.groups), sum(examples.groups)
    if len(examples.groups) == 1:
        yield f"one epoch of it: {total / size / weight:,.1f} steps of {size}"
    else:  # every batch of an aspect bucket is full
        again = batches * size - total
        yield f"one epoch of it: {batches / weight:,.1f} steps of {size}; {again:,} rows come again in it"
        if few := run_data.small_buckets(examples.groups, size):
            yield few
    yield from ("", f"sample: {sample.read:,} records, the first of a run")
    yield from of_captions(sample.captions)
    yield f"unusable: {share(len(sample.bad_records), sample.read)}"
    yield from of_bad_records(sample.bad_records)
    yield ""


def of_sizes(config: ConfigDict, part: run_data.Part, rows: ImageRows, sample: Sample) -> Report:
    """Sizes of all records if they have the fields, otherwise of the sample's images."""
    data, source, targets = config.data, part.source, np.array(rows.sizes)

    def enlarged(sizes: np.ndarray) -> str:
        small = (sizes < targets[images.nearest_bucket(sizes, targets)]).any(axis=1)
        return share(int(small.sum()), len(sizes))

    by_fields = filters.field_sizes(source, data.width_key, data.height_key)
    if by_fields is not None:
        found = filters.sizes(source, data.width_key, data.height_key)
        lacking = int((by_fields[:, 0] == 0).sum())
        yield (
            f"sizes of all {len(source):,} records, by the fields {data.height_key!r} and {data.width_key!r}"
            + f"; without usable values, by the image: {lacking:,}" * (lacking > 0)
        )
    else:
        found = sample.sizes
        yield f"sizes of {len(found):,} images of the sample"
    known = found[(found > 0).all(axis=1)]
    height, width = known.T
    yield from ("shorter side, pixels", histogram(np.minimum(height, width), (*SIDES, data.resolution), ".0f", 1))
    yield from ("width / height", histogram(width / height, ASPECTS, ".2f"))
    yield f"smaller than the training image, so enlarged: {enlarged(known)}"
    if len(known) < len(found):
        yield f"unknown: {share(len(found) - len(known), len(found))}"
    if by_fields is not None:  # they may be the sizes of originals that were made smaller
        yield f"images of the sample themselves that are enlarged: {enlarged(sample.sizes)}"
    if rows.members is not None:
        batches = [-(-count // data.batch_size) for count in rows.groups]
        labels = [f"{h} x {w}, {batch:,} batches" for (h, w), batch in zip(rows.sizes, batches, strict=True)]
        yield from ("", "aspect buckets, height x width", bars(labels, rows.groups))


def of_captions(found: Sequence[tuple[str, ...]]) -> Report:
    """Lengths of the captions of records, and the first ones."""
    texts = [text for several in found for text in several]
    if not texts:
        yield "no captions"
        return
    more, empty = sum(len(several) > 1 for several in found), sum(not text.strip() for text in texts)
    counts = f"{len(texts):,} of {len(found):,} records"
    yield f"captions: {counts}; {more:,} records have several, {empty:,} captions are empty"
    lengths = {"characters": [len(text) for text in texts], "words": [len(text.split()) for text in texts]}
    quantiles = {name: [f"{x:g}" for x in np.percentile(n, (0, 50, 95, 100))] for name, n in lengths.items()}
    rows = [(name, *values) for name, values in quantiles.items()]
    yield table(rows, "lrrrr", ("", "min", "median", "95 %", "max"))
    yield from (f'  "{one_line(several[0], WIDTH - 4)}"' for several in found[:QUOTED] if several)


def of_bad_records(found: Sequence[BadRecord]) -> Report:
    """Bad records by reason without its numbers, the most frequent first, some of them named."""
    by_kind: dict[str, list[BadRecord]] = {}
    for record in found:
        by_kind.setdefault(re.sub(r"\d+", "N", record.reason), []).append(record)
    kinds = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    for kind, alike in kinds[:REASONS]:
        same = len({record.reason for record in alike}) == 1
        yield f"  {len(alike):,} x {one_line(alike[0].reason if same else kind, WIDTH - 16)}"
        for name in [one_line(f"{record.shard}: {record.key}") for record in alike[:NAMED]]:
            yield "    " + (name if len(name) <= WIDTH - 4 else "…" + name[5 - WIDTH :])  # the end of a path matters
    if rest := kinds[REASONS:]:
        yield f"  {sum(len(alike) for _, alike in rest):,} x {len(rest)} other reasons"


def of_manifest(manifest: Mapping[str, Any]) -> Report:
    """What a latent cache records of itself."""
    groups = [group["rows"] for group in manifest["groups"]]
    sizes = [shard["bytes"] for group in manifest["groups"] for shard in group["shards"]]
    counts = f"{sum(manifest['examples']):,} records x {manifest['variants']} variants: {sum(groups):,} rows"
    yield f"{counts} in {len(sizes):,} shards, {sum(sizes) / 2**20:,.1f} MiB"
    facts = flatten_dict({key: value for key, value in manifest.items() if key not in ("groups", "arrays")}, sep=".")
    hashes = [key for key, value in facts.items() if key.startswith("fingerprint.") and isinstance(value, str)]
    facts |= {key: facts[key][:12] for key in hashes}
    for array in manifest["arrays"]:
        shapes = " or ".join(dict.fromkeys(map(str, array["shapes"])))
        facts[f"array {array['name']}"] = f"{array['dtype']} {shapes}"
    yield table([(key, one_line(str(value))) for key, value in facts.items() if value not in (None, [])], "ll")
    if len(groups) > 1:
        labels = [f"{height} x {width}" for height, width in manifest["fingerprint"]["sizes"]]
        yield from ("rows by size, height x width", bars(labels, groups))


def of_speed(config: ConfigDict, cached: bool, examples: Sequence[Examples], order: Order, seconds: float) -> Report:
    """How fast the loader is, without the models."""
    data = config.data
    rows = data.batch_size if cached else min(data.batch_size, MEASURED_ROWS)
    say(f"measuring the loader for {seconds:g} s")
    count, took = measure(loader.Batches(tuple(examples), order, 0, range(rows)), data.workers, seconds)
    how = f"worker processes: {data.workers}" if data.workers else f"threads: {loader.THREADS}"
    what = "read" if cached else f"read, decode ({data.decoder}), resize ({data.resize_filter}), crop"
    yield from (heading("throughput"), f"{what}; {how}")
    steps = f"{count / took / data.batch_size:,.2f} steps/s of {data.batch_size}"
    yield f"{count / took:,.1f} rows/s ({count:,} in {took:.1f} s): feeds {steps}"
    if data.encode == "start":
        yield f'data.encode = "start": it is done once, before training, {sum(map(sum, order.streams)):,} rows'
    yield ""


def measure(batches: loader.Batches, workers: int, seconds: float) -> tuple[int, float]:
    """(rows, seconds) of reading ahead after a warm-up: at least one batch, and about `seconds`."""
    with contextlib.closing(loader.read_ahead(batches, workers)) as read:
        next(read)
        settled = time.monotonic() + min(WARM_UP, seconds)
        for _ in read:
            if (begun := time.monotonic()) >= settled:
                break
        for count, _ in enumerate(read, start=1):
            if (now := time.monotonic()) - begun >= seconds:
                return count * len(batches.rows), now - begun
    raise AssertionError("the order is endless")


def heading(title: str) -> Rule:
    return Rule(one_line(title), characters="=", align="left", style="bold")


def table(rows: Iterable[Sequence[str]], justify: str, header: Sequence[str] = ()) -> Padding:
    """Indented columns; `justify` has an "l" or "r" for each."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(header))
    for side, title in zip(justify, header or justify, strict=True):
        grid.add_column(title, justify="left" if side == "l" else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        grid.add_row(*row)
    return Padding(grid, (0, 0, 0, 2), expand=False)


def bars(labels: Sequence[str], counts: Sequence[int]) -> Padding:
    """A row for each label: it, its count, and a bar, which no count but 0 lacks."""
    unit = BAR / max(max(counts, default=0), 1)
    lengths = [max(bool(count), round(count * unit)) for count in counts]
    return table([(label, f"{n:,}", "#" * k) for label, n, k in zip(labels, counts, lengths, strict=True)], "lrl")


def histogram(values: np.ndarray, edges: Sequence[float], form: str, step: float = 0) -> Padding:
    """Bars of how many values are in [a, b) for neighbours a, b of `edges`, below the first and from the last on.

    Empty ranges at either end are left out. Labels name a and b - step.
    """
    bounds = [0.0, *sorted(set(edges)), np.inf]
    counts = np.histogram(values, np.array(bounds))[0]
    found = np.flatnonzero(counts)
    used = range(found[0], found[-1] + 1) if len(found) else range(0)
    ends = [f"to {high - step:{form}}" for high in bounds[1:-1]] + ["and more"]
    return bars([f"{bounds[i]:{form}} {ends[i]}" for i in used], [int(counts[i]) for i in used])


def share(part: int, whole: int) -> str:
    """ "12 of 1,000 (1.2 %)"."""
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"


def one_line(text: str, width: int | None = None) -> str:
    """Printable text with all white space single blanks, cut to `width` characters with an ellipsis."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if width is None or len(line) <= width else line[: width - 1].rstrip() + "…"


def write_sheet(out: Path, rows: Sequence[Mapping[str, np.ndarray]], bad: Sequence[BadRecord]) -> Report:
    """Writes the contact sheet of these rows, in which `bad` records were replaced."""
    sheet = contact_sheet([row["pixels"] for row in rows], [str(row[CAPTION]) or "(no text)" for row in rows])
    with files.new_file(out) as partial:
        sheet.save(partial, format="PNG")
    yield f"contact sheet: {out}, the first {len(rows):,} images of a run, row by row"
    if bad:
        yield f"replaced on it: {len(bad)}"
        yield from of_bad_records(bad)


def contact_sheet(pixels: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Images, uint8 [h w 3] of any sizes, in rows and columns, each at its cell's top left with its caption below."""
    corners, (height, width) = cells([image.shape[:2] for image in pixels])
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    room = max(MIN_WIDTH, *(image.shape[1] for image in pixels))
    for image, caption, (top, left) in zip(pixels, captions, corners, strict=True):
        for number, line in enumerate(wrapped(caption, font, room)):
            pen.text((left, top + len(image) + number * LINE_HEIGHT), line, "black", font)
        sheet.paste(Image.fromarray(image), (left, top))
    return sheet


def cells(shapes: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(top, left) of each image of `shapes` (height, width), and the sheet's (height, width); in pixels."""
    high = max(height for height, _ in shapes) + LINES * LINE_HEIGHT + GAP
    wide = max(MIN_WIDTH, *(width for _, width in shapes)) + GAP
    columns = int(np.ceil(np.sqrt(len(shapes))))
    corners = [(GAP + number // columns * high, GAP + number % columns * wide) for number in range(len(shapes))]
    return corners, (corners[-1][0] + high, GAP + columns * wide)


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most LINES lines of at most `width` pixels, broken between words if possible; an ellipsis ends a cut text."""
    rest, lines = one_line(text)[:LONGEST], []
    while rest and len(lines) < LINES:
        lengths = range(1, len(rest) + 1)
        end = max(1, bisect.bisect_right(lengths, width, key=lambda n, rest=rest: font.getlength(rest[:n])))
        if end < len(rest) and not rest[end].isspace() and " " in rest[:end]:
            end = rest.rindex(" ", 0, end)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1].rstrip()
        lines[-1] = last + "…"
    return lines


class Output(Console):
    """Where the report goes."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # rich would end the program itself, with code 1


def show(report: Report, console: Console) -> None:
    """Prints a report as it is made. A string is one line even if it is wider than the console, for `grep`."""
    for item in report:
        console.print(item, soft_wrap=isinstance(item, str))


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    out = files.expanded(given.out) if given.out else None
    options = Options(given.sample, given.seconds, given.count, out)
    sys.stdout.reconfigure(errors="replace")  # captions may contain characters that the terminal lacks
    width = None if sys.stdout.isatty() else WIDTH
    console = Output(width=width, markup=False, emoji=False, highlight=False)  # captions are not markup
    smaller = "use a smaller --count, --sample, --config.data.resolution or --config.data.batch_size"
    return exit_code(lambda: show(inspect(given.config, options), console), smaller=smaller)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, config_lib.flag_help("configs/shapes_lcm.py"))
    flags.DEFINE_string("out", None, "PNG file of the contact sheet; without it there is none")
    flags.DEFINE_integer("count", Options.count, "images on the contact sheet", 1, 10_000)
    flags.DEFINE_integer("sample", Options.sample, "records of each part that are read", lower_bound=1)
    flags.DEFINE_float("seconds", Options.seconds, "how long the loader is measured, about", 0.1, 86_400)
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=config_lib.parse_flags)
