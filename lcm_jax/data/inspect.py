"""Look at the data of a config before training on it: counts, sizes, captions, faults, speed, and a contact sheet.

    python -m lcm_jax.data.inspect --config=configs/my_run.py [--out=contact.png] [--count=64] [--seconds=5]

Of the config it reads `data` and `seed`; no model is loaded. Of each part of the data it reads the index, and a sample
of records, the first that a run would read. Pictures of the contact sheet are pixel by pixel those of the run's first
rows, after crop and flip, and captions those that were drawn for them.

With data.encode = "start" records that cannot be used are left out before the order is made; where there are such, a
run's order is another than the sheet's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lcm_jax import config as config_lib
from lcm_jax import files, training_data
from lcm_jax.data import cache, contact_sheet, excerpt, filters, images, loader, report
from lcm_jax.data.examples import CaptionDropout, Pictures
from lcm_jax.data.excerpt import CAPTION, Once, Sample
from lcm_jax.data.order import STREAM_KEY, Order
from lcm_jax.data.records import Fault
from lcm_jax.errors import LcmError, exit_code

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
        sample = excerpt.read_sample(examples, excerpt.first_places(order, options.sample), config.data.decoder)
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
    return report.paragraph(
        f"A run would stop: about {bad:,.0f} of {read:,.0f} records cannot be used, more than "
        f"--config.data.max_bad_fraction={share}"
    )


def rows_of(config: ConfigDict, part: training_data.Part) -> loader.Examples:
    """The part's rows, with captions where a run has token ids."""
    if training_data.is_cached(part):
        return part.source
    return training_data.pictures(config, part.source, excerpt.keep_caption)


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
    lines = report.heading(part.name + (f", {100 * weight:.3g} % of the mixture" if weight < 1 else ""))
    lines += str(part.report).splitlines()
    lines += ["", *index_faults(part), ""]
    if training_data.is_cached(part):
        lines += report.manifest(part.source.manifest)
    else:
        lines += size_lines(config, part, examples, sample)
    lines += [epoch_line(config, examples, weight), "", f"sample: {sample.read:,} records, the first of a run"]
    lines += report.captions(sample.captions)
    lines += [f"unusable: {report.share(len(sample.faults), sample.read)}"]
    return lines + report.indented(report.faults(sample.faults))


def index_faults(part: training_data.Part) -> list[str]:
    """What could not be used when the index, or the cache, was made."""
    found = part.source.faults if not training_data.is_cached(part) else cache_faults(part.source)
    title = "when the cache was made" if training_data.is_cached(part) else "found by indexing"
    return [f"unusable, {title}: {len(found):,}", *report.indented(report.faults(found))]


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
    buckets = np.array(rows.sizes)
    lines = [f"sizes {title}", *report.sizes(found, buckets[images.nearest_bucket(found, buckets)], data.resolution)]
    if found is not sample.sizes:
        lines += pictures_themselves(sample, buckets)
    if rows.members is not None:
        lines += ["", *report.buckets(rows.sizes, rows.groups, data.batch_size)]
    return lines


def pictures_themselves(sample: Sample, buckets: np.ndarray) -> list[str]:
    """The fields may tell the sizes of originals, of which the pictures were made smaller."""
    targets = buckets[images.nearest_bucket(sample.sizes, buckets)]
    small = int((sample.sizes < targets).any(axis=1).sum())
    return [f"pictures of the sample themselves that are enlarged: {report.share(small, len(sample.sizes))}"]


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
    cached = all(excerpt.is_cached(row) for row in examples)
    rows = data.batch_size if cached else min(data.batch_size, MEASURED_ROWS)
    how = f"worker processes: {data.workers}" if data.workers else f"threads: {loader.THREADS}"
    what = "read" if cached else f"read, decode ({data.decoder}), resize ({data.resize_filter}), crop"
    say(f"measuring the loader for {seconds:g} s")
    count, took = excerpt.measure(loader.Batches(tuple(examples), order, 0, range(rows)), data.workers, seconds)
    lines = [*report.heading("throughput"), f"{what}; {how}", report.throughput(count, took, data.batch_size)]
    if data.encode == "start":
        lines.append(f'data.encode = "start": it is done once, before training, {total_rows(order):,} rows')
    return lines


def total_rows(order: Order) -> int:
    return sum(sum(groups) for groups in order.streams)


def sheet_lines(examples: Sequence[loader.Examples], order: Order, options: Options) -> list[str]:
    """Writes the contact sheet, if it is asked for and there are pictures; says what was done."""
    if any(excerpt.is_cached(row) for row in examples):
        return ["contact sheet: none, a latent cache holds no pictures"]
    if options.out is None:
        return ["contact sheet: none; --out=contact.png writes one"]
    say(f"writing {options.out}")
    rows, faults = excerpt.first_rows(examples, order, options.count)
    sheet = contact_sheet.draw([row["pixels"] for row in rows], [str(row[CAPTION]) or "(no text)" for row in rows])
    with files.new_file(options.out) as partial:
        sheet.save(partial, format="PNG")
    lines = [f"contact sheet: {options.out}, the first {len(rows):,} pictures of a run, row by row"]
    return lines + [f"replaced on it: {len(faults)}"] * bool(faults) + report.indented(report.faults(faults))


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


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "the run's config file, as configs/shapes_lcm.py")
    flags.DEFINE_string("out", None, "PNG file of the contact sheet; without it there is none")
    flags.DEFINE_integer("count", Options.count, "pictures on the contact sheet", lower_bound=1)
    flags.DEFINE_integer("sample", Options.sample, "records of each part that are read", lower_bound=1)
    flags.DEFINE_float("seconds", Options.seconds, "for which the loader is measured, about", lower_bound=0.1)
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=config_lib.parse_flags)
