"""Encode a config's images and captions once, for `data.source = "latents"`.

    python -m lcm_jax.precompute --config=configs/my_run.py --out=DIR [--variants=2] [--dtype=float16]

Of the config it reads `data`, `seed` and the models. Row by row the cache holds what `data.encode = "start"` would have
made of the same config; variant v of example i draws its crop, flip and caption at position v * N + i of N examples.

DIR is whole when it has a manifest.json, see `lcm_jax.data.cache`. Until then DIR/progress tells which shards are
finished: the same command goes on after them, whatever ended the one before, and the files come out the same.
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
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import lcm_jax
from lcm_jax import files
from lcm_jax.data import cache, encoding, loader
from lcm_jax.data import cache as cache_writing
from lcm_jax.data.cache import Shard
from lcm_jax.data.loader import BadRecordFile, BadRecordLog
from lcm_jax.data.records import BadRecord
from lcm_jax.data.rows import Examples, FixedDraws
from lcm_jax.errors import LcmError, flags_named
from lcm_jax.pretrained import ENCODERS, Pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.model import TEXT_ENCODERS, PipelineParams
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data
from lcm_jax.run import models as student_lib
from lcm_jax.runtime import distributed, waiting
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.telemetry import Progress
from lcm_jax.runtime.workdir import StopSignal, locked

WAIT = 30 * 24 * 3600  # seconds for the slowest process after the first is done: its heartbeats say whether it lives
STOPPED = "{}: stopped; the same command goes on from the last whole file"
CAPTION = "caption"  # a row's text, kept for people to read
DATA_KEYS = (  # of config.data, that decide what a row holds; sizes stand in the fingerprint
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
    """A signal came: its name, and what the same command will do."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the cache holds of each picture: flags of the program.

    Attributes:
      text: "ids": token ids; "embeddings": what the text encoders make of them.
      variants: crops, flips and captions of each example, rows one after another.
      dtype: that moments and embeddings are stored in.
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
        for name in ("variants", "shard_size"):
            if getattr(self, name) < 1:
                raise LcmError(f"--{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Captioned:
    """`tokenize`, which keeps the captions beside their ids."""

    tokenize: Callable[[Sequence[str]], Mapping[str, np.ndarray]]

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        return {**self.tokenize(captions), CAPTION: np.array(captions, object)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One cache in the making."""

    out: Path
    plan: Mapping[str, Any]
    shards: tuple[Shard, ...]
    examples: FixedDraws
    batch: int
    encode: Callable[[encoding.Rows], encoding.Rows]
    watch: training_data.Watch
    left_out: tuple[BadRecord, ...]  # by indexing


@flags_named("--")
def latents(config: ConfigDict, out: str | Path, options: Options) -> None:
    """Writes the cache of `config`'s pictures and captions to the folder `out`, or goes on with it.

    Raises:
      LcmError: a bad config, source or model; `out` holds something else; too many records cannot be used.
      Stopped: SIGTERM or SIGINT; what is finished stays.
    """
    config, out = check_config(config), Path(out).expanduser().absolute()
    cache.check_reader()
    with distributed.together():
        cache_writing.check_folder(out)
    with locked(out):
        with distributed.together():
            job = prepared(config, out, options)
            distributed.assert_same("what the cache shall hold", json.dumps(job.plan, indent=2))
            begun = cache_writing.begin(out, job.plan)
        if not begun:
            return say(f"{out} is complete already")
        with distributed.together(timeout=WAIT):
            stopped = write(job)
        if distributed.any_process(stopped is not None):  # one that had written its files already stops like the others
            raise Stopped(stopped or STOPPED.format("SIGTERM"))
        if jax.process_index() == 0:
            total, lost = cache_writing.finish(out, job.plan, job.shards, job.left_out)
            say(f"{out}: {total} rows; {lost} records could not be used")


def prepared(config: ConfigDict, out: Path, options: Options) -> Job:
    """All that writing the cache takes."""
    (part,) = training_data.open_parts(config)
    say(f"{part.name}: {part.report.line()}")
    training_data.check_sizes(config, student_lib.load_teacher(config, weights=False)[0])  # before minutes of reading
    mesh = mesh_of_this_host(config)
    pipeline, params = student_lib.load_teacher(config, mesh_lib.place(mesh), weights=ENCODERS)
    tokenize = Captioned(training_data.Tokenize(pipeline.tokenizers))
    pictures = training_data.pictures(config, part.source, tokenize, time_ids=pipeline.is_xl)
    watch = training_data.Watch(BadRecordLog(config.data.max_bad_fraction, BadRecordFile(out)), say)
    watch.bad_records.indexed(part.source.bad_records, part.report.total, part.report.kept)
    examples = FixedDraws(pictures, config.seed, options.variants)
    batch = encoding.batch_size(config.data.resolution)
    return Job(
        out=out,
        plan=make_plan(config, options, pipeline, params, pictures),
        shards=cache_writing.shards_of(examples.groups, options.shard_size),
        examples=examples,
        batch=batch,
        encode=of_a_batch(encoding.make_encode(pipeline, params, mesh, config.data.encode_chunk), options.text, batch),
        watch=watch,
        left_out=tuple(part.source.bad_records),
    )


def check_config(config: ConfigDict) -> ConfigDict:
    """The config resolved. Raises LcmError: a bad one, or one whose data cannot be one cache."""
    config_lib.validate(config)
    if config.data.source == "mixture":
        raise LcmError(
            "config.data.source = 'mixture': a cache holds one source; precompute each part on its own, "
            'then mix them as parts "WEIGHT latents DIR"'
        )
    if config.data.source == "latents":
        raise LcmError(f"config.data.source = 'latents': {config.data.path} is encoded already; give its pictures")
    return config_lib.resolve(config)


def make_plan(
    config: ConfigDict, options: Options, pipeline: Pipeline, params: PipelineParams, examples: Examples
) -> dict[str, Any]:
    """All that decides what the cache will hold: the manifest but for what comes of it. As it comes back from JSON."""
    plan = {
        "made_by": f"lcm_jax {lcm_jax.__version__}",
        "fingerprint": encoding.fingerprint(
            pipeline, params, config.data.resolution, training_data.picture_sizes(config)
        ),
        **dataclasses.asdict(options),
        "seed": config.seed,
        "compute_dtype": config.model.dtype,
        "data": {key: config.data[key] for key in DATA_KEYS},
        "examples": examples.groups,
        "arrays": layout(pipeline, params, training_data.picture_sizes(config), options),
    }
    return json.loads(json.dumps(plan))


def layout(
    pipeline: Pipeline, params: PipelineParams, sizes: Sequence[tuple[int, int]], options: Options
) -> list[dict[str, Any]]:
    """Name, dtype and shapes (for each group) of the arrays of a row; nothing is computed."""
    encode, struct = encoding.make_encode(pipeline, params), jax.ShapeDtypeStruct
    ids = {name: struct(value.shape, value.dtype) for name, value in conditioning.tokens(pipeline, [""]).items()}
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


def mesh_of_this_host(config: ConfigDict) -> Mesh:
    """A mesh of this process's devices: `mesh.fsdp` of them, as far as that divides their number, hold one copy."""
    devices = jax.local_devices()
    fsdp = len(devices) if config.mesh.fsdp == -1 else math.gcd(config.mesh.fsdp, len(devices))
    return mesh_lib.make_mesh(fsdp=fsdp, devices=devices)


def of_a_batch(encode: Callable, text: str, batch: int) -> Callable[[encoding.Rows], encoding.Rows]:
    """At most `batch` rows -> their arrays; token ids stay where that is the `text` of the cache."""
    as_they_are = TEXT_ENCODERS if text == "ids" else ()

    def call(rows: encoding.Rows) -> encoding.Rows:
        ids = {name: value for name, value in rows.items() if name in as_they_are}
        rows = {name: value for name, value in rows.items() if name not in ids}
        return encoding.encode_rows(encode, rows, batch) | ids

    return call


def write(job: Job) -> str | None:
    """The shards of this process that are not finished. What `Stopped` shall say; None: all are written.

    One of several processes that fails says so at once, as it has to wait for the others, and asks them to stop.

    Raises:
      LcmError: too many records cannot be used, a value is not finite, a full disk.
    """
    try:
        write_shards(job)
    except Stopped as stop:
        return str(stop)
    except Exception as error:
        if jax.process_count() > 1:
            what = f"process {jax.process_index()} of {jax.process_count()} failed: {distributed.error_text(error)}"
            print(f"{what}; the others stop at their next batch", file=sys.stderr, flush=True)
            distributed.ask_to_stop()
        raise
    return None


def write_shards(job: Job) -> None:
    """`write`; raises Stopped where a signal came."""
    mine = job.shards[jax.process_index() :: jax.process_count()]
    before = {shard: cache_writing.read_note(job.out, shard) for shard in mine}
    todo = [shard for shard, state in before.items() if state is None]
    for shard, state in before.items():
        if state is not None:
            job.watch.bad_records.add(state[2], len(shard.ranks))
    files.check_space(job.out, cache_writing.disk_space(job.plan["arrays"], todo))
    total, left = (sum(len(shard.ranks) for shard in shards) for shards in (mine, todo))
    with StopSignal() as stop, Progress(total, total - left, "rows") as progress:
        for group, shards in itertools.groupby(todo, lambda shard: shard.group):
            shards = list(shards)
            ranks = [rank for shard in shards for rank in shard.ranks]
            rows = encoding.in_order(job.examples, group, job.plan["seed"], ranks, stop=lambda: stop)
            with contextlib.closing(rows):
                for shard in shards:
                    try:
                        write_shard(job, shard, rows, progress, stop)
                    except waiting.Stopped:
                        raise Stopped(STOPPED.format(stop.name)) from None


def write_shard(job: Job, shard: Shard, rows: Iterator, progress: Progress, stop: StopSignal) -> None:
    """The next of `rows` as one file."""
    bad_records: list[BadRecord] = []

    def records() -> Iterator[bytes]:
        for first in range(0, len(shard.ranks), job.batch):  # no batch reaches into another shard
            if stop:
                raise Stopped(STOPPED.format(stop.name))
            chunk = list(itertools.islice(rows, min(job.batch, len(shard.ranks) - first)))
            bad = [row for _, row in chunk if isinstance(row, BadRecord)]
            bad_records.extend(bad)
            job.watch.bad_records.add(bad, len(chunk))
            yield from encoded(job, shard.group, [(rank, row) for rank, row in chunk if not isinstance(row, BadRecord)])
            progress.move(len(chunk))

    count = cache_writing.write_shard(job.out / shard.name, records())
    cache_writing.write_note(job.out, shard, count, bad_records)


def encoded(job: Job, group: int, good: Sequence[tuple[int, encoding.Rows]]) -> Iterator[bytes]:
    """Records of the rows of one batch."""
    if not good:
        return
    captions = [str(row.pop(CAPTION)) for _, row in good]
    arrays = job.encode(job.watch.captions(loader.stacked([row for _, row in good])))
    for i, ((rank, _), caption) in enumerate(zip(good, captions, strict=True)):
        shard, key = job.examples.where(group, rank)
        about = {"key": key, "shard": shard, "caption": caption}
        yield cache_writing.pack({name: value[i] for name, value in arrays.items()}, job.plan["arrays"], about)


def say(line: str) -> None:
    """A line for the reader of the terminal, above the bar, from one process of all."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


def run(given: flags.FlagValues) -> int:
    """What the command line asks for: its exit code."""
    options = Options(given.text, given.variants, given.dtype, given.shard_size)
    try:
        latents(given.config, given.out, options)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 1
    return 0


def main(argv: list[str]) -> int:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return distributed.exit_code(lambda: run(flags.FLAGS), **distributed.from_flags())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, config_lib.flag_help("configs/shapes_lcm.py"))
    flags.DEFINE_string("out", None, "new folder, or one in which the same command was stopped")
    flags.DEFINE_string("text", Options.text, f"captions as {' or '.join(cache.TEXTS)}")
    flags.DEFINE_integer("variants", Options.variants, "crops, flips and captions of each picture")
    flags.DEFINE_string("dtype", Options.dtype, f"of moments and embeddings on disk: {', '.join(cache.DTYPES)}")
    flags.DEFINE_integer("shard_size", Options.shard_size, "rows of a file")
    distributed.define_flags()
    flags.mark_flags_as_required(["config", "out"])
    app.run(distributed.end_process_after(main), flags_parser=config_lib.parse_flags)
