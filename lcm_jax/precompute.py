"""Encode a config's images and captions once, or let its teacher make images of prompts, for `data.source = "latents"`.

    python -m lcm_jax.precompute --config=configs/my_run.py --out=DIR [--variants=2] [--dtype=float16]
    python -m lcm_jax.precompute --config=configs/my_run.py --out=DIR --what=teacher --prompts=FILE [--variants=4]

It reads `data`, `seed` and the models of the config. The cache holds the rows that `data.encode = "start"` would make
of the same config. Variant v of example i has the random crop, flip and caption of position v * N + i, of N examples.

With --what=teacher the cache holds a latent for each prompt and variant, see `lcm_jax.sampling.teacher`.

DIR is complete when it has a manifest.json, see `lcm_jax.data.cache`. Until then DIR/progress lists the finished
shards and the records that cannot be used, and the same command resumes after those shards, however the one before
ended. The files are the same in the end.
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

import lcm_jax
from lcm_jax import files
from lcm_jax.data import cache, encoding, loader
from lcm_jax.data.cache import Shard
from lcm_jax.data.loader import BadRecordFile, BadRecordLog
from lcm_jax.data.records import BadRecord, digest_of
from lcm_jax.data.rows import Examples, FixedDraws
from lcm_jax.errors import BadArgument, LcmError, flags_named
from lcm_jax.pretrained import ENCODERS
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline, PipelineParams
from lcm_jax.pretrained.text import tokens
from lcm_jax.run.config import default_config, flag_help, needs_teacher, parse_flags, resolve, validate
from lcm_jax.run.data import DataLog, image_rows, image_sizes, open_parts, tokenize_captions
from lcm_jax.run.models import check_teacher, load_teacher
from lcm_jax.runtime import distributed, waiting
from lcm_jax.runtime.mesh import make_mesh, place
from lcm_jax.runtime.telemetry import Progress
from lcm_jax.runtime.workdir import StopSignal, locked
from lcm_jax.sampling import teacher as teacher_lib
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.request import check_memory

WAIT = 30 * 24 * 3600  # seconds for the slowest process after the first has finished; heartbeats detect dead ones
STOPPED = "{}: stopped; the same command resumes after the last complete file"
SMALLER = (
    "use --config.data.encode_chunk=1 (--what=teacher: a smaller --batch_size), a smaller --config.data.resolution, "
    "--config.model.dtype=bfloat16, or more devices with --config.mesh.fsdp=-1 --config.mesh.data=1"
)
WHAT = ("images", "teacher")
SHARD_SIZE = {"images": 4096, "teacher": 128}  # rows of a file; what a teacher makes takes seconds a row
OF_TEACHER = {  # flag -> its kind and meaning
    "prompts": (flags.DEFINE_string, "text file, one prompt per line"),
    "sampler": (flags.DEFINE_string, f"one of {', '.join(teacher_lib.SAMPLERS)}; the first by default"),
    "steps": (flags.DEFINE_integer, f"of the sampler; {teacher_lib.Recipe.steps} by default"),
    "guidance_scale": (flags.DEFINE_float, "w + 1; by default of the middle of the config's w_min and w_max"),
    "negative_prompt": (flags.DEFINE_string, "text that guidance moves away from; by default the model's null text"),
    "batch_size": (flags.DEFINE_integer, "images at once; by default by the resolution"),
}
OF_IMAGES = ("path", "mixture", "filters", "flip", "aspect_buckets")  # of config.data: no image of a teacher has them
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
      variants: crops, flips and captions of each example, or images of each prompt, in rows one after another.
      dtype: in which moments and embeddings are stored.
      shard_size: rows of a file.
    """

    text: str = "ids"
    variants: int = 1
    dtype: str = "float32"
    shard_size: int = SHARD_SIZE["images"]

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
    examples: Examples
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
def latents(config: ConfigDict, out: str | Path, options: Options, teacher: teacher_lib.Recipe | None = None) -> None:
    """Writes the cache of `config`'s images and captions to the folder `out`, or resumes writing it.

    teacher: of images that it makes; None: the config's own are encoded.

    Raises:
      LcmError: a bad config, source or model; `out` holds something else; too many records cannot be used.
      Stopped: SIGTERM or SIGINT; finished shards stay.
    """
    out = files.expanded(out).absolute()
    config = check_config(config) if teacher is None else check_teachers_config(config, out)
    cache.check_reader(out, "out")
    with distributed.together():
        cache.check_folder(out)
    with locked(out):
        if jax.process_count() > 1:
            distributed.check_shared(out)  # process 0 finishes the cache, hours later, with the files of all
        with distributed.together():
            writer = prepare(config, out, options) if teacher is None else from_teacher(config, out, options, teacher)
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


def check_teachers_config(config: ConfigDict, out: Path) -> ConfigDict:
    """The config resolved, its data being what will be in `out`. Raises LcmError: a bad one, or one without teacher."""
    config, defaults = ConfigDict(config.to_dict()), default_config().data
    for key in OF_IMAGES:
        if config.data[key] != defaults[key]:
            remedy = f"set {defaults[key]!r}, here and when you train on them"
            if key in ("path", "mixture"):
                remedy = f"leave it out; to train on them, set data.source = 'latents' and data.path = {str(out)!r}"
            problem = "the images of --what=teacher come from its prompts"
            raise LcmError(f"config.data.{key} = {config.data[key]!r}: {problem}; {remedy}")
    config.data.source, config.data.path = "latents", str(out)
    validate(config)
    if not needs_teacher(config):
        raise LcmError(
            f"config.objective = {config.objective!r} trains without a teacher, so --what=teacher has none; give "
            "images in --config.data.path"
        )
    return resolve(config)


def local_mesh(config: ConfigDict) -> Mesh:
    """This process's devices, on which it encodes alone."""
    devices = jax.local_devices()
    fsdp = len(devices) if config.mesh.fsdp == -1 else math.gcd(config.mesh.fsdp, len(devices))
    return make_mesh(fsdp=fsdp, devices=devices)


def from_teacher(config: ConfigDict, out: Path, options: Options, teacher: teacher_lib.Recipe) -> CacheWriter:
    """Reads prompts and models, and plans the cache of what the teacher makes of them."""
    prompts = teacher_lib.read_prompts(teacher.prompts)
    mesh, side = local_mesh(config), config.data.resolution
    shapes = load_teacher(config, weights=False)[0]
    check_teacher(config, shapes)
    request = teacher.request(shapes, side, (config.distill.w_min, config.distill.w_max))
    batch = math.ceil((teacher.batch_size or encoding.batch_size(side)) / mesh.size) * mesh.size
    check_memory(shapes, request, batch, mesh, tiled=True)  # nothing is decoded
    pipeline, params = load_teacher(config, place(mesh), weights=ENCODERS)
    unet = teacher_lib.load_unet(config, pipeline, place(mesh))
    generator = Generator(pipeline, {**params, "unet": unet}, mesh)
    rows = teacher_lib.Prompts(teacher.prompts.name, prompts, options.variants, tokenizing(pipeline))
    encode = encoding.make_encode(pipeline, params, mesh)
    make = teacher_lib.maker(generator, encode, request, config.seed, options.text == "ids")
    plan = make_plan(config, options, pipeline, params, [len(prompts)])
    plan["data"] |= {"source": "teacher", "path": str(teacher.prompts)}
    plan |= {"records": digest_of(*prompts), "teacher": teacher_lib.record(request, pipeline, unet)}
    return CacheWriter(
        out=out,
        plan=plan,
        shards=cache.shards_of(rows.groups, options.shard_size),
        examples=rows,
        batch=batch,
        encode=lambda rows: encoding.encode_rows(make, rows, batch),
        log=DataLog(BadRecordLog(config.data.max_bad_fraction, BadRecordFile(out / cache.PROGRESS)), say),
        left_out=(),
    )


def prepare(config: ConfigDict, out: Path, options: Options) -> CacheWriter:
    """Opens source and models, and plans the cache."""
    (part,) = open_parts(config)
    say(f"{part.name}: {part.report.line()}")
    check_teacher(config, load_teacher(config, weights=False)[0])  # before minutes of reading
    mesh = local_mesh(config)
    pipeline, params = load_teacher(config, place(mesh), weights=ENCODERS)
    rows = image_rows(config, part.source, tokenizing(pipeline), time_ids=pipeline.is_xl)
    log = DataLog(BadRecordLog(config.data.max_bad_fraction, BadRecordFile(out / cache.PROGRESS)), say)
    # If there are too many, or the program is stopped before `cache.begin`, the folder is still one that was begun.
    (out / cache.PROGRESS).mkdir(exist_ok=True)
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


def tokenizing(pipeline: Pipeline) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """captions -> what `tokenize_captions` makes of them, and the captions [b]."""
    return lambda texts: tokenize_captions(pipeline.tokenizers, texts) | {CAPTION: np.array(texts, object)}


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
    size = SHARD_SIZE[values.what] if values.shard_size is None else values.shard_size
    options = Options(values.text, values.variants, values.dtype, size)
    try:
        latents(values.config, values.out, options, settings_of(values))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 1
    return 0


@flags_named("--")
def settings_of(values: flags.FlagValues) -> teacher_lib.Recipe | None:
    """The teacher's settings, of --what=teacher. Raises LcmError for its flags without it, or without prompts."""
    given = {name: values[name].value for name in OF_TEACHER if values[name].value is not None}
    if values.what == "images":
        for name, value in given.items():
            raise BadArgument(name, value, "is of --what=teacher; add that, or leave it out")
        return None
    if "prompts" not in given:
        raise LcmError("--what=teacher needs --prompts=FILE, with one prompt per line")
    return teacher_lib.Recipe(**given | {"prompts": files.expanded(given["prompts"])})


def main(argv: list[str]) -> int:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    left = "the same command resumes after the last complete file"
    return distributed.exit_code(run, left, SMALLER, **distributed.from_flags())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, flag_help("configs/shapes_lcm.py"))
    flags.DEFINE_string("out", None, "new folder, or one in which the same command was stopped")
    flags.DEFINE_string("text", Options.text, f"captions as {' or '.join(cache.TEXTS)}")
    flags.DEFINE_integer("variants", Options.variants, "crops, flips and captions of each image; images of each prompt")
    flags.DEFINE_string("dtype", Options.dtype, f"of moments and embeddings on disk: {', '.join(cache.DTYPES)}")
    flags.DEFINE_integer("shard_size", None, f"rows of a file; default: {SHARD_SIZE}")
    flags.DEFINE_enum(
        "what", WHAT[0], WHAT, "what is cached: the config's images, or what its teacher makes of --prompts"
    )
    for name, (define, meaning) in OF_TEACHER.items():
        define(name, None, f"with --what=teacher: {meaning}")
    distributed.define_flags()
    flags.mark_flags_as_required(["config", "out"])
    app.run(distributed.end_process_after(main), flags_parser=parse_flags)
