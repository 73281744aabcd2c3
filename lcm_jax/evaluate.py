"""A model's table: quality, time and network evaluations of samplers, numbers of steps and guidance scales.

    python -m lcm_jax.evaluate --model=runs/shapes_lcm/export --source=shapes --count=2000 --metric=shapes \\
                               --row=lcm:1,2,4,8:3,7.5 --out=table
    python -m lcm_jax.evaluate --model=DIR --prompts=prompts.txt --metric=clip_score:CLIP --row=lcm:4:8 --out=table
    python -m lcm_jax.evaluate --model=DIR --source=webdataset --path=COCO.tar --count=5000 --row=ddim:50:7.5 \\
                               --metric=fid:pt_inception-2015-12-05-6726825d.pth --out=table

Picture i of every row is of caption i, from noise that depends on (seed, i) alone. OUT/rows/ keeps each row as soon as
it is there: the same command goes on where it was stopped, and measures anew what would come out otherwise now. Other
models' rows may be added to OUT by further commands; seed, prompts, number and size of pictures must be the same.
OUT/table.md, table.json and plot.png are made of all of them. Latency is of sampler and VAE, the compiler's time apart.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcm_jax.data.sources import SOURCES, open_source
from lcm_jax.diffusion.timesteps import SPACINGS
from lcm_jax.errors import BadArgument, LcmError, exit_code, flags_named
from lcm_jax.metrics import inputs, measures, plot, table
from lcm_jax.metrics import rows as rows_lib
from lcm_jax.metrics.measures import Measure, Reference, Spec
from lcm_jax.metrics.rows import EvaluatedModel
from lcm_jax.metrics.shapes import Endpoints
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained.text import truncated
from lcm_jax.runtime.telemetry import Progress
from lcm_jax.runtime.workdir import locked
from lcm_jax.sampling import flags
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.load import load
from lcm_jax.sampling.request import MAX_STEPS, SAMPLERS, Request, make_request, warnings

SOURCE_COUNT = 2000  # pictures per row where captions come from a data source
SOURCE_FLAGS = ("path", "split", "image_key", "caption_key", "style")


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """A row as the command line asks for it; without a guidance scale the model's own default is taken."""

    sampler: str
    steps: int
    guidance_scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.guidance_scale is None else f":{self.guidance_scale:g}"
        return f"--row={self.sampler}:{self.steps}{scale}"


def parser() -> argparse.ArgumentParser:
    p = flags.Parser(prog="python -m lcm_jax.evaluate", description=__doc__.splitlines()[0])
    flags.add_model_flags(p)
    flags.add_image_flags(p)
    p.add_argument("--name", help="of the model in the table; default: what --model, --unet and --lora say")
    p.add_argument(
        "--row",
        action="append",
        required=True,
        metavar="SAMPLER:STEPS[:SCALE]",
        help="rows of the table; of lists with commas every combination; several times",
    )
    p.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME[:WEIGHTS]",
        help=f"{', '.join(measures.KINDS)}; several times; none: latency alone",
    )
    p.add_argument("--prompts", type=Path, help="text file, one prompt per line")
    p.add_argument("--source", choices=tuple(SOURCES), help="data source of captions, and of reference pictures")
    p.add_argument("--path", help="of the data source")
    p.add_argument("--split", help="of the data source; default of shapes: heldout, else train")
    p.add_argument("--image_key", help="of the data source: what holds the picture")
    p.add_argument("--caption_key", help="of the data source: what holds the caption")
    p.add_argument("--style", help="of the source shapes")
    p.add_argument(
        "--count", type=int, help=f"pictures per row; default: one of each prompt, {SOURCE_COUNT} of a source"
    )
    p.add_argument(
        "--reference",
        action="append",
        type=Path,
        default=[],
        metavar="FILE.npz|FOLDER",
        help="statistics, or pictures, to compare with; several times; default: the source's",
    )
    p.add_argument("--references", type=int, help="pictures of the source to compare with; default: --count")
    p.add_argument("--spacing", choices=SPACINGS, default="trailing", help="timesteps of the baselines")
    p.add_argument("--endpoint_steps", type=int, default=50, help="of the teacher's ODE: --metric=shapes, one step")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=16, help="pictures drawn at once")
    p.add_argument("--timings", type=int, default=10, help="batches, at least, that a latency is the median of")
    p.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="plot.png, with matplotlib")
    p.add_argument("--out", type=Path, required=True, help="folder for the table; one that was begun goes on")
    return p


def parse_rows(texts: Sequence[str]) -> list[RowRequest]:
    """ "lcm:1,2:8" -> lcm with 1 and with 2 steps at guidance scale 8; each row once.

    Raises:
      LcmError: an unknown sampler, steps or a scale that are no numbers or out of range.
    """
    rows = []
    for text in texts:
        words = text.split(":")
        try:
            if not 2 <= len(words) <= 3:
                raise ValueError
            steps = [int(word) for word in words[1].split(",")]
            scales = [float(word) for word in words[2].split(",")] if len(words) == 3 else [None]
        except ValueError:
            raise LcmError(f"--row={text}: write SAMPLER:STEPS or SAMPLER:STEPS:SCALE, as lcm:1,2,4:8") from None
        for sampler in words[0].split(","):
            if sampler not in SAMPLERS:
                raise LcmError(f"--row={text}: sampler {sampler!r} is unknown; choose of {', '.join(SAMPLERS)}")
            rows += [RowRequest(sampler, n, scale) for scale in scales for n in steps]
    for row in rows:
        if not 1 <= row.steps <= MAX_STEPS:
            raise LcmError(f"{row}: {row.steps} steps are out of range; choose 1 to {MAX_STEPS}")
        if row.guidance_scale is not None and not 1.0 <= row.guidance_scale < math.inf:
            raise LcmError(f"{row}: guidance scale 1 is no guidance; use 1 or more")
    return list(dict.fromkeys(rows))


def check_flags(args: argparse.Namespace) -> None:
    """Raises LcmError for what is wrong with a command line whatever the model."""
    flags.check_counts(args, "count", "references", "batch_size", "timings", "endpoint_steps")
    flags.check_seed(args.seed)
    if (args.prompts is None) == (args.source is None):
        raise LcmError("captions come from --prompts=FILE or from --source=NAME; give one of them")
    for flag in (*SOURCE_FLAGS, "references"):
        if args.source is None and getattr(args, flag) is not None:
            raise LcmError(f"--{flag} is of a data source; give --source, too, or leave it out")
    for path in args.reference:
        if not path.exists() or not (path.is_dir() or path.suffix == ".npz"):
            raise LcmError(f"--reference={path}: no .npz of statistics and no folder of pictures is there")
    folders = sum(path.is_dir() for path in args.reference)
    if folders > 1:
        raise LcmError("--reference: one folder of pictures at most; put them together")
    if folders and args.references is not None:
        raise LcmError(
            f"--references={args.references} is of --source's pictures, but --reference gives a folder, "
            "all of which are taken; leave one of them out"
        )
    if args.plot:
        plot.check()


def read_inputs(args: argparse.Namespace) -> inputs.Inputs:
    """The captions of the command line. Raises LcmError: none, fewer than --count, or a source that cannot be read."""
    if args.prompts is not None:
        lines = flags.read_lines("prompts", args.prompts)
        return inputs.of_prompts(lines, args.count, f"--prompts={args.prompts}")
    count = args.count or SOURCE_COUNT
    given = {key: getattr(args, key) for key in SOURCE_FLAGS if getattr(args, key) is not None}
    if args.source == "shapes":
        given = {"split": "heldout", "num_examples": max(count, args.references or 0)} | given
    path = given.pop("path", None)
    with flags_named("--"):
        source = open_source(args.source, path and os.path.expanduser(path), **given)
    words = [args.source, path, *(f"{key}={given[key]}" for key in SOURCE_FLAGS if key in given)]
    return inputs.of_source(source, count, " ".join(word for word in words if word))


def read_reference(args: argparse.Namespace, found: inputs.Inputs, specs: Sequence[Spec]) -> Reference:
    """What the command line compares with.

    Raises:
      LcmError: an empty folder, fewer pictures than --references, or no metric of `specs` compares with any.
    """
    if args.reference and not any(spec.name in measures.NEEDS_REFERENCE for spec in specs):
        raise LcmError(
            f"--reference={args.reference[0]}: no --metric compares with pictures; give one of "
            f"{', '.join(measures.NEEDS_REFERENCE)}, or leave it out"
        )
    statistics = tuple(path for path in args.reference if not path.is_dir())
    folder = next((path for path in args.reference if path.is_dir()), None)
    cache = args.out / "references"
    if folder is not None:
        paths = inputs.picture_files(folder)
        about = functools.cache(lambda: inputs.files_about(paths, folder))
        return Reference(statistics, lambda h, w: inputs.file_pictures(paths, h, w), about, cache)
    if found.source is None:
        return Reference(statistics, None, dict, cache)
    count, source = args.references or len(found.captions), found.source
    if count > len(source):
        raise LcmError(f"--references={count}: the source has {len(source)} records; give no more")
    about = functools.cache(lambda: inputs.source_about(source, count, found.origin))
    return Reference(statistics, lambda h, w: inputs.source_pictures(source, count, h, w), about, cache)


def load_model(args: argparse.Namespace) -> EvaluatedModel:
    """The model of the command line."""
    generator = flags.load_model(args)
    name = args.name or " + ".join([args.model, *filter(None, (args.unet, args.vae)), *args.lora])
    return EvaluatedModel(name, generator, generator.whole_batch(args.batch_size))


def make_requests(asked: Sequence[RowRequest], pipeline: Pipeline, args: argparse.Namespace) -> list[Request]:
    """The request of every row, each once; warnings to stderr. Raises LcmError: not for this model."""
    found, requests = {}, {}
    for row in asked:
        try:
            request = make_request(
                pipeline,
                **dataclasses.asdict(row),
                spacing=args.spacing,
                height=args.height,
                width=args.width,
                negative_prompt=args.negative_prompt,
            )
        except BadArgument as error:
            raise LcmError(f"{row}: {error.at('--')}") from None
        found |= dict.fromkeys(warnings(pipeline, request))
        requests[request] = None
    for warning in found:
        say(f"warning: {warning}")
    return list(requests)


def load_teacher(specs: Sequence[Spec], model: Generator, endpoint_steps: int) -> Generator | None:
    """Whose guided ODE one step is compared with, if the shapes are measured. Raises LcmError: it does not fit."""
    path = next((spec.path or "shapes" for spec in specs if spec.name == "shapes"), None)
    if path is None:
        return None
    generator = load(path, mesh=model.mesh)
    teacher, student = generator.pipeline, model.pipeline
    if teacher.has_w_embedding:
        raise LcmError(f"--metric=shapes:{path} is distilled itself (it has a w embedding); give its teacher")
    latents, its = ((one.unet.in_channels, one.vae.factor) for one in (teacher, student))
    if latents != its:
        raise LcmError(
            f"--metric=shapes:{path} has latents of {latents[0]} channels at 1/{latents[1]} size, the "
            f"model's are {its[0]} at 1/{its[1]}; give the model's teacher"
        )
    timesteps = teacher.schedule.num_train_timesteps
    if endpoint_steps > timesteps:
        raise LcmError(f"--endpoint_steps={endpoint_steps}: the teacher has {timesteps} timesteps; give no more")
    return generator


def run(args: argparse.Namespace) -> list[Path]:
    """Measures what the command line asks for and is not there yet; returns the files of the table."""
    args.out = args.out.expanduser()
    check_flags(args)
    asked, specs = parse_rows(args.row), measures.parse(args.metric)
    found = read_inputs(args)
    reference = read_reference(args, found, specs)
    model = load_model(args)
    generator, mesh = model.generator, model.generator.mesh
    requests = make_requests(asked, generator.pipeline, args)
    size = requests[0].height, requests[0].width
    report_lengths(generator.pipeline, found)
    style = args.style or "plain"
    measured = [measures.load(s, found.captions, size, reference, mesh, model.batch_size, style) for s in specs]
    measures.check_used(reference, measured)
    teacher = load_teacher(specs, generator, args.endpoint_steps)
    program = {key: getattr(args, key) for key in ("dtype", "negative_prompt", "tiled", "fsdp", "timings")}
    program |= {"batch_size": model.batch_size, "device": f"{mesh.size} x {jax.devices()[0].device_kind}"}
    shared = rows_lib.comparison(found, args.seed, size, measured, teacher, args.endpoint_steps)
    about = {"model": rows_lib.model_about(generator), "program": program}
    with locked(args.out) as out:
        before = table.kept(out)
        table.check_comparable(out, before, shared)
        todo = [request for request in requests if not rows_lib.is_there(before, model, request, shared, about)]
        if todo:
            measure(out, todo, model, found, measured, teacher, shared, about, args)
        return write(out, model, table.plain(about), args.plot)


def measure(
    out: Path,
    requests: Sequence[Request],
    model: EvaluatedModel,
    found: inputs.Inputs,
    measured: Sequence[Measure],
    teacher: Generator | None,
    shared: Mapping[str, Any],
    about: Mapping[str, Any],
    args: argparse.Namespace,
) -> None:
    """Measures rows, and keeps each."""
    for one in measured:
        say(f"{one.name}: {one.about['network']}")
        one.prepare()
    ends = None
    if teacher is not None and any(request.settings.steps == 1 for request in requests):
        ends = Endpoints(teacher, found.captions, args.endpoint_steps, args.seed, requests[0])
    numbers = [0] * model.batch_size
    nothing = np.zeros_like(model.generator.noise(0, numbers, 1, requests[0].height, requests[0].width)[0])
    model.generator.decode(nothing)  # compiled before any clock runs
    with Progress(len(requests) * len(found.captions), 0, "images") as progress:
        for number, request in enumerate(requests, 1):
            row = rows_lib.measured(
                model,
                found.captions,
                request,
                measured,
                ends,
                seed=args.seed,
                timings=args.timings,
                shared=shared,
                about=about,
                advance=progress.move,
            )
            aside = table.keep(out, row)
            values = ", ".join(
                f"{table.COLUMNS[key].title} {table.COLUMNS[key].form.format(value)}"
                for key, value in row.values.items()
                if value is not None
            )
            of = f"row {number} of {len(requests)}: {row.sampler}, {row.steps} steps, scale {row.guidance_scale:g}: "
            say(of + ", ".join(filter(None, (values, f"{row.milliseconds:.1f} ms per image"))))
            if aside:
                say(f"the previous row was of other images and had more metrics; it was moved to {aside}")


def write(out: Path, model: EvaluatedModel, about: Mapping[str, Any], with_plot: bool) -> list[Path]:
    """table.json, table.md and plot.png of all rows in the folder that belong together."""
    kept = table.kept(out)
    current = table.states(table.read(out)) | {model.name: about}
    rows = [row for row in kept if table.belongs(row, current)]
    for name, number in Counter(row.model for row in kept if not table.belongs(row, current)).items():
        say(
            f"{number} rows of {name} are of another state of it or other flags, and are left out of the table; ask "
            "for them again to measure them anew"
        )
    table.write(out, rows)
    if with_plot:
        plot.write(rows, out / "plot.png")
    return [out / name for name in ("table.md", "table.json", "plot.png")[: 2 + with_plot]]


def report_lengths(pipeline: Pipeline, found: inputs.Inputs) -> None:
    """Warns on stderr of captions that are cut, and of records that could not be read."""
    if found.left_out:
        say(f"warning: {found.left_out} records of {found.origin} cannot be read; others stand in for them")
    cut = truncated(pipeline, found.captions)
    if cut:
        caption, (length, kept) = max(cut.items(), key=lambda item: item[1][0])
        say(
            f"warning: {len(cut)} captions are longer than {kept} tokens and are cut; the longest, of {length}, begins "
            f"{caption[:60]!r}"
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return exit_code(lambda: print("\n".join(str(path) for path in run(args))))


if __name__ == "__main__":
    sys.exit(main())
