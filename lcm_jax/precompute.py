"""Encode a config's images and captions once, for `data.source = "latents"`.

    python -m lcm_jax.precompute --config=configs/my_run.py --out=DIR [--variants=2] [--dtype=float16]

It reads `data`, `seed` and the models of the config. The cache holds the rows that `data.encode = "start"` would make
of the same config. Variant v of example i has the random crop, flip and caption of position v * N + i, of N examples.

DIR is complete when it has a manifest.json, see `lcm_jax.data.cache`. Until then DIR/progress lists the finished
shards, and the same command resumes after them, however the one before ended. The files are the same in the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import lcm_jax
from lcm_jax import files
from lcm_jax.data import cache, encoding, loader
from lcm_jax.data.cache import Shard
from lcm_jax.data.loader import BadRecordFile, BadRecordLog
from lcm_jax.data.records import BadRecord
from lcm_jax.data.rows import FixedDraws
from lcm_jax.errors import LcmError, flags_named
from lcm_jax.pretrained import ENCODERS
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline, PipelineParams
from lcm_jax.pretrained.text import tokens
from lcm_jax.run.config import flag_help, parse_flags, resolve, validate
from lcm_jax.run.data import DataLog, image_rows, image_sizes, open_parts, tokenize_captions
from lcm_jax.run.models import check_teacher, load_teacher
from lcm_jax.runtime import distributed, waiting
from lcm_jax.runtime.mesh import make_mesh, place
from lcm_jax.runtime.telemetry import Progress
from lcm_jax.runtime.workdir import StopSignal, locked

WAIT = 30 * 24 * 3600  # seconds for the slowest process after the first has finished; heartbeats detect dead ones
STOPPED = "{}: stopped; the same command resumes after the last complete file"
SMALLER = (
    "use a smaller --config.data.resolution or --config.data.encode_chunk, --config.model.dtype=bfloat16, or more "
    "devices with --config.mesh.fsdp=-1"
)
CAPTION = "caption"  # a row's text, kept for people to read
DATA_KEYS = (  # of config.data, that decide what a row holds; sizes are part of the fingerprint
    "source",
    "path",
    "split",
    "image_key",
    "caption_key",
    "style",
    "num_examples",
    "filters",
    "width_key",
    "height_key",
    "crop",
    "flip",
    "resize_filter",
    "decoder",
)


class Stopped(Exception):
    """A signal came; the message names it and says how to resume."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the cache holds of each image; flags of the program.

    Attributes:
      text: "ids": token ids; "embeddings": the outputs of the text encoders.
      variants: crops, flips and captions of each example, in rows one after another.
      dtype: in which moments and embeddings are stored.
      shard_size: rows of a file.
    """

    text: str = "ids"
    variants: int = 1
    dtype: str = "float32"
    shard_size: int = 4096

    def __post_init__(self) -> None:
        for name, choices in {"text": cache.TEXTS, "dtype": cache.DTYPES}.items():
            if getattr(self, name) not in choices:
                raise LcmError(f"--{name}={getattr(self, name)}: must be one of {', '.join(choices)}")
        for name, most in {"variants": 10_000, "shard_size": 2**24}.items():
            if not 1 <= getattr(self, name) <= most:
                raise LcmError(f"--{name}={getattr(self, name)}: out of range; choose 1 to {most}")


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """A cache that is being written, with what this process needs for its shards.

    Attributes:
      out: the folder.
      plan: the manifest without the results.
      shards: all files of the cache.
      examples: its rows, before they are encoded.
      batch: rows that are encoded at once.
      encode: at most `batch` rows -> the arrays of the cache.
      log: counts and reports what cannot be used.
      left_out: records that were found unusable by indexing.
    """

    out: Path
    plan: Mapping[str, Any]
    shards: tuple[Shard, ...]
    examples: FixedDraws
    batch: int
    encode: Callable[[encoding.Rows], encoding.Rows]
    log: DataLog
    left_out: tuple[BadRecord, ...]

    def write(self) -> str | None:
        """Writes the unfinished shards of this process; the message of `Stopped` if a signal came.

        One of several processes that fails reports that at once, because it must wait for the others, and asks them to
        stop.

        Raises:
          LcmError: too many records cannot be used, a value is not finite, the disk is full.
        """
        try:
            self.write_shards()
        except Stopped as stop:
            return str(stop)
        except Exception as error:
            if jax.process_count() > 1:
                failed = f"process {jax.process_index()} of {jax.process_count()} failed"
                waiting.say(f"{failed}: {distributed.error_text(error)}; the others stop at their next batch")
                distributed.ask_to_stop()
            raise
        return None

    def write_shards(self) -> None:
        """`write`; raises Stopped if a signal came."""
        mine = self.shards[jax.process_index() :: jax.process_count()]
        notes = {shard: cache.read_note(self.out, shard) for shard in mine}
        todo = [shard for shard, note in notes.items() if note is None]
        for shard, note in notes.items():
            if note is not None:
                self.log.bad_records.add(note[2], len(shard.ranks))
        files.check_space(self.out, cache.disk_space(self.plan["arrays"], todo))
        total, left = (sum(len(shard.ranks) for shard in shards) for shards in (mine, todo))
        with StopSignal() as stop, Progress(total, total - left, "rows") as progress:
            for group, shards in itertools.groupby(todo, lambda shard: shard.group):
                shards = list(shards)
                ranks = [rank for shard in shards for rank in shard.ranks]
                rows = encoding.in_order(self.examples, group, self.plan["seed"], ranks, stop=lambda: stop)
                with contextlib.closing(rows):
                    for shard in shards:
                        try:
                            self._write_shard(shard, rows, progress, stop)
                        except waiting.Stopped:
                            raise Stopped(STOPPED.format(stop.name)) from None

    def _write_shard(self, shard: Shard, rows: Iterator, progress: Progress, stop: StopSignal) -> None:
        """Writes the next of `rows` as one file."""
        bad_records: list[BadRecord] = []

        def records() -> Iterator[bytes]:
            for first in range(0, len(shard.ranks), self.batch):  # no batch extends into another shard
                if stop:
                    raise waiting.Stopped
                read = list(itertools.islice(rows, min(self.batch, len(shard.ranks) - first)))
                good, bad = self.log.split(read)
                bad_records.extend(bad)
                if good:
                    yield from self._encoded(shard.group, good)
                progress.move(len(read))

        count = cache.write_shard(self.out / shard.name, records())
        cache.write_note(self.out, shard, count, bad_records)

    def _encoded(self, group: int, good: Sequence[tuple[int, encoding.Rows]]) -> Iterator[bytes]:
        """Records of the rows of one batch, given with their ranks."""
        captions = [str(row.pop(CAPTION)) for _, row in good]
        arrays = self.encode(self.log.count_cut_tokens(loader.stacked([row for _, row in good])))
        for i, ((rank, _), caption) in enumerate(zip(good, captions, strict=True)):
            shard, key = self.examples.where(group, rank)
            about = {"key": key, "shard": shard, "caption": caption}
            yield cache.pack({name: value[i] for name, value in arrays.items()}, self.plan["arrays"], about)


@flags_named("--")
def latents(config: ConfigDict, out: str | Path, options: Options) -> None:
    """Writes the cache of `config`'s images and captions to the folder `out`, or resumes writing it.

    Raises:
      LcmError: a bad config, source or model; `out` holds something else; too many records cannot be used.
      Stopped: SIGTERM or SIGINT; finished shards stay.
    """
    config, out = check_config(config), files.expanded(out).absolute()
    cache.check_reader(out, "out")
    with distributed.together():
        cache.check_folder(out)
    with locked(out):
        with distributed.together():
            writer = prepare(config, out, options)
            distributed.assert_same("the plan of the cache", json.dumps(writer.plan, indent=2))
            unfinished = cache.begin(out, writer.plan)
        if not unfinished:
            return say(f"{out} is complete already")
        with distributed.together(timeout=WAIT):
            stopped = writer.write()
        if distributed.any_process(stopped is not None):  # also if this one had written its files already
            raise Stopped(stopped or STOPPED.format("SIGTERM"))
        if jax.process_index() == 0:
            total, lost = cache.finish(out, writer.plan, writer.shards, writer.left_out)
            say(f"{out}: {total} rows; {lost} records could not be used")


def check_config(config: ConfigDict) -> ConfigDict:
    """The config resolved. Raises LcmError: a bad one, or one whose data cannot be one cache."""
    validate(config)
    if config.data.source == "mixture":
        raise LcmError(
            "config.data.source = 'mixture': a cache holds one source; precompute each part on its own, "
            'then mix them as parts "WEIGHT latents DIR"'
        )
    if config.data.source == "latents":
        raise LcmError(f"config.data.source = 'latents': {config.data.path} is encoded already; give its images")
    return resolve(config)


def prepare(config: ConfigDict, out: Path, options: Options) -> CacheWriter:
    """Opens source and models, and plans the cache."""
    (part,) = open_parts(config)
    say(f"{part.name}: {part.report.line()}")
    check_teacher(config, load_teacher(config, weights=False)[0])  # before minutes of reading
    devices = jax.local_devices()
    fsdp = len(devices) if config.mesh.fsdp == -1 else math.gcd(config.mesh.fsdp, len(devices))
    mesh = make_mesh(fsdp=fsdp, devices=devices)  # each process encodes on its own devices
    pipeline, params = load_teacher(config, place(mesh), weights=ENCODERS)

    def tokenize(captions: Sequence[str]) -> dict[str, np.ndarray]:
        return tokenize_captions(pipeline.tokenizers, captions) | {CAPTION: np.array(captions, object)}

    rows = image_rows(config, part.source, tokenize, time_ids=pipeline.is_xl)
    log = DataLog(BadRecordLog(config.data.max_bad_fraction, BadRecordFile(out)), say)
    log.bad_records.indexed(part.source.bad_records, part.report.total, part.report.kept)
    examples = FixedDraws(rows, config.seed, options.variants)
    batch = encoding.batch_size(config.data.resolution)
    encode = encoding.make_encode(pipeline, params, mesh, config.data.encode_chunk)

    def encode_batch(rows: encoding.Rows) -> encoding.Rows:
        ids = {name: value for name, value in rows.items() if options.text == "ids" and name in TEXT_ENCODERS}
        rows = {name: value for name, value in rows.items() if name not in ids}
        return encoding.encode_rows(encode, rows, batch) | ids

    return CacheWriter(
        out=out,
        plan=make_plan(config, options, pipeline, params, rows.groups) | {"records": part.source.digest()},
        shards=cache.shards_of(examples.groups, options.shard_size),
        examples=examples,
        batch=batch,
        encode=encode_batch,
        log=log,
        left_out=tuple(part.source.bad_records),
    )


def make_plan(
    config: ConfigDict, options: Options, pipeline: Pipeline, params: PipelineParams, examples: Sequence[int]
) -> dict[str, Any]:
    """What determines the content of the cache: the manifest without the results, as JSON returns it.

    examples: records in each group.
    """
    sizes = image_sizes(config)
    plan = {
        "made_by": f"lcm_jax {lcm_jax.__version__}",
        "fingerprint": cache.fingerprint(pipeline, params, config.data.resolution, sizes),
        **dataclasses.asdict(options),
        "seed": config.seed,
        "compute_dtype": config.model.dtype,
        "data": {key: config.data[key] for key in DATA_KEYS},
        "examples": examples,
        "arrays": array_layout(pipeline, params, sizes, options),
    }
    return json.loads(json.dumps(plan))


def array_layout(
    pipeline: Pipeline, params: PipelineParams, sizes: Sequence[tuple[int, int]], options: Options
) -> list[dict[str, Any]]:
    """Name, dtype and shapes (for each group) of the arrays of a row; nothing is computed."""
    encode, struct = encoding.make_encode(pipeline, params), jax.ShapeDtypeStruct
    ids = {name: struct(value.shape, value.dtype) for name, value in tokens(pipeline, [""]).items()}
    more = {"time_ids": struct((1, 6), np.float32)} if pipeline.is_xl else {}
    more |= ids if options.text == "embeddings" else {}
    rows = [jax.eval_shape(encode, {"pixels": struct((1, *size, 3), np.uint8), **more}) for size in sizes]
    rows = [row | (ids if options.text == "ids" else {}) for row in rows]
    return [
        {
            "name": name,
            # SDXL's sizes and crops are small integers, but too large for half precision
            "dtype": str(value.dtype) if name in ids or name == "time_ids" else options.dtype,
            "shapes": [row[name].shape[1:] for row in rows],
        }
        for name, value in sorted(rows[0].items())
    ]


def say(line: str) -> None:
    """Prints a line on the terminal, above the progress bar, from the first process only."""
    if jax.process_index() == 0:
        waiting.say(line)


def run() -> int:
    """What the command line asks for; returns the exit code."""
    values = flags.FLAGS
    try:
        latents(values.config, values.out, Options(values.text, values.variants, values.dtype, values.shard_size))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 1
    return 0


def main(argv: list[str]) -> int:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    left = "the same command goes on after the last complete file"
    return distributed.exit_code(run, left, SMALLER, **distributed.from_flags())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, flag_help("configs/shapes_lcm.py"))
    flags.DEFINE_string("out", None, "new folder, or one in which the same command was stopped")
    flags.DEFINE_string("text", Options.text, f"captions as {' or '.join(cache.TEXTS)}")
    flags.DEFINE_integer("variants", Options.variants, "crops, flips and captions of each image")
    flags.DEFINE_string("dtype", Options.dtype, f"of moments and embeddings on disk: {', '.join(cache.DTYPES)}")
    flags.DEFINE_integer("shard_size", Options.shard_size, "rows of a file")
    distributed.define_flags()
    flags.mark_flags_as_required(["config", "out"])
    app.run(distributed.end_process_after(main), flags_parser=parse_flags)
