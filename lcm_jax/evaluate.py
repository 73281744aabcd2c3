"""A model's table: quality, time and network evaluations of samplers, numbers of steps and guidance scales.

    python -m lcm_jax.evaluate --model=runs/shapes_lcm/export --source=shapes --count=2000 --metric=shapes \\
                               --row=lcm:1,2,4,8:3,7.5 --out=table
    python -m lcm_jax.evaluate --model=DIR --prompts=prompts.txt --metric=clip_score:CLIP --row=lcm:4:8 --out=table
    python -m lcm_jax.evaluate --model=DIR --source=webdataset --path=COCO.tar --count=5000 --row=ddim:50:7.5 \\
                               --metric=fid:pt_inception-2015-12-05-6726825d.pth --out=table

Image i of every row is of caption i, from noise that depends on (seed, i) alone; --images_per_caption=N takes N images
of each caption. Each row is written to OUT/rows/ as soon as it is measured: the same command resumes where it was
stopped, and measures only rows whose numbers would differ now. Further commands may add rows of other models to OUT,
with the same seed, prompts, number and size of images. OUT/table.md, table.json and plot.png are made of all rows.
Values stand with 95 % intervals over captions (metrics/intervals.py), except the one-step error, which is of at most
64 captions. Latency is of sampler and VAE, without compiling.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from lcm_jax import files
from lcm_jax.data.sources import SOURCES, open_source
from lcm_jax.diffusion.timesteps import SPACINGS
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError, flags_named
from lcm_jax.metrics import inputs, measures, plot, table
from lcm_jax.metrics.inputs import FolderImages, Inputs, SourceImages
from lcm_jax.metrics.measures import Measure, Reference, Spec
from lcm_jax.metrics.rows import Evaluation, comparison, model_about
from lcm_jax.metrics.shapes import Endpoints
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained.text import truncated
from lcm_jax.runtime.telemetry import Progress
from lcm_jax.runtime.waiting import say
from lcm_jax.runtime.workdir import locked
from lcm_jax.sampling import flags, nag
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.load import load
from lcm_jax.sampling.plan import EULER, ON_GRID, SAMPLERS, check_steps
from lcm_jax.sampling.request import Request, check_guidance_scale, check_numbers, check_texts, make_request, warnings

MOST = {"count": 10_000_000, "images_per_caption": 100_000, "references": 10_000_000, "timings": 100_000}
SOURCE_COUNT = 2000  # images per row if captions are from a data source
SOURCE_FLAGS = ("path", "split", "image_key", "caption_key", "index_dir", "style")


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """A row of the command line; guidance_scale: None is the model's default."""

    sampler: str
    steps: int
    guidance_scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.guidance_scale is None else f":{self.guidance_scale:g}"
        return f"--row={self.sampler}:{self.steps}{scale}"


def parser() -> argparse.ArgumentParser:
    p = flags.Parser(prog="python -m lcm_jax.evaluate", description=__doc__.splitlines()[0])
    add = p.add_argument
    flags.add_model_flags(p)
    flags.add_image_flags(p)
    add("--name", help="of the model in the table; default: the values of --model, --unet, --vae and --lora")
    rows_help = "rows of the table; lists with commas give every combination; may be given several times"
    add("--row", action="append", required=True, metavar="SAMPLER:STEPS[:SCALE]", help=rows_help)
    metrics_help = f"{', '.join(measures.KINDS)}; may be given several times; default: latency alone"
    add("--metric", action="append", default=[], metavar="NAME[:WEIGHTS]", help=metrics_help)
    add("--prompts", type=files.expanded, help="text file, one prompt per line")
    add("--source", choices=tuple(SOURCES), help="data source of captions, and of reference images")
    add("--path", help="of the data source")
    add("--split", help="of the data source; default: heldout for shapes, else train")
    add("--image_key", help="of the data source: what holds the image")
    add("--caption_key", help="of the data source: what holds the caption")
    add("--index_dir", help="of the source webdataset: folder for its indices; default: beside each shard")
    add("--style", help="of the source shapes")
    add("--count", type=int, help=f"images per row; default: one of each prompt, {SOURCE_COUNT} of a source")
    each_help = "so many of --count in a row; with 8 or more, --metric=shapes measures coverage"
    add("--images_per_caption", type=int, default=1, help=each_help)
    reference_help = "statistics or images to compare with; may be given several times; default: the source's images"
    add("--reference", action="append", type=files.expanded, default=[], metavar="FILE.npz|FOLDER", help=reference_help)
    add("--references", type=int, help="number of the source's images to compare with; default: --count")
    add("--spacing", choices=SPACINGS, default="trailing", help="of the timesteps of ddim and dpm")
    add("--gamma", type=float, help="of tcd, 0 to 1: share of fresh noise in a step; default 0, none")
    add("--endpoint_steps", type=int, default=50, help="steps of the teacher's ODE for the one-step error of shapes")
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=16, help="images generated at once")
    add("--timings", type=int, default=10, help="the least number of batches that a latency is the median of")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="plot.png, with matplotlib")
    add("--out", type=files.expanded, required=True, help="folder of the table; may have rows already")
    return p


def parse_rows(texts: Sequence[str]) -> list[RowRequest]:
    """SAMPLERS:STEPS[:SCALES] of each, lists with commas -> every combination, each row once.

    Raises:
      LcmError: an unknown sampler; steps or a scale that are not numbers or out of range.
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
                raise LcmError(f"--row={text}: sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
            rows += [RowRequest(sampler, n, scale) for scale in scales for n in steps]
    for row in rows:
        with _errors_of(row):
            check_steps(row.steps)
            check_guidance_scale(row.guidance_scale)
    return list(dict.fromkeys(rows))


@contextlib.contextmanager
def _errors_of(row: RowRequest) -> Iterator[None]:
    try:
        yield
    except BadArgument as error:
        raise LcmError(f"{row}: {error.at('--')}") from None


def check_flags(args: argparse.Namespace) -> None:
    """Raises LcmError for what is wrong with a command line for any model."""
    counted = ("count", "images_per_caption", "references", "batch_size", "timings", "endpoint_steps")
    check_numbers(args.seed, **{flag: getattr(args, flag) for flag in counted})
    for flag, most in MOST.items():
        if (getattr(args, flag) or 0) > most:
            raise BadArgument(flag, getattr(args, flag), f"give {most} at most")
    check_texts(negative_prompt=args.negative_prompt)
    nag.check_scale(args.nag_scale)
    if (args.prompts is None) == (args.source is None):
        raise LcmError("captions come from --prompts=FILE or from --source=NAME; give one of them")
    for flag in (*SOURCE_FLAGS, "references"):
        if args.source is None and getattr(args, flag) is not None:
            raise LcmError(f"--{flag} is of a data source; give --source, too, or leave it out")
    for path in args.reference:
        if not path.exists() or not (path.is_dir() or path.suffix == ".npz"):
            raise LcmError(f"--reference={path} is neither a .npz of statistics nor a folder of images; give one")
    folders = sum(path.is_dir() for path in args.reference)
    if folders > 1:
        raise LcmError(f"--reference: {folders} folders of images are given, one at most; put the images together")
    if folders and args.references is not None:
        raise LcmError(
            f"--references={args.references} is of --source's images, but --reference gives a folder, all images of "
            "which are used; leave one of them out"
        )
    if args.plot:
        plot.check()


def check_samplers(args: argparse.Namespace, rows: Sequence[RowRequest]) -> None:
    """Raises LcmError for a flag of samplers that no row has."""
    samplers = {row.sampler for row in rows}
    if args.gamma is not None and "tcd" not in samplers:
        raise LcmError(f"--gamma={args.gamma:g} is of the sampler tcd, which no --row has; leave it out")
    if args.spacing != "trailing" and samplers <= {*ON_GRID, *EULER}:
        raise LcmError(f"--spacing={args.spacing}: no --row has a sampler that uses it; leave it out")


def read_inputs(args: argparse.Namespace) -> Inputs:
    """The captions. Raises LcmError: none, fewer than --count, or a source that cannot be read."""
    each = args.images_per_caption
    if args.prompts is not None:
        prompts = flags.read_lines("prompts", args.prompts)
        return inputs.of_prompts(prompts, args.count, f"--prompts={args.prompts}", each)
    count = args.count or SOURCE_COUNT
    given = {key: getattr(args, key) for key in SOURCE_FLAGS if getattr(args, key) is not None}
    if args.source == "shapes":
        given = {"split": "heldout", "num_examples": max(count, args.references or 0)} | given
    path = given.pop("path", None)
    with flags_named("--"):
        source = open_source(args.source, path and os.path.expanduser(path), **given)
    words = [args.source, path, *(f"{key}={given[key]}" for key in SOURCE_FLAGS if key in given and key != "index_dir")]
    return inputs.of_source(source, count, " ".join(word for word in words if word), each)


def read_reference(args: argparse.Namespace, found: Inputs, specs: Sequence[Spec]) -> Reference:
    """What to compare with: files of statistics, and images of a folder, else of the source of the captions.

    Raises:
      LcmError: an empty folder, fewer images than --references, or no metric of `specs` needs a reference.
    """
    given = [f"--reference={path}" for path in args.reference]
    given += [] if args.references is None else [f"--references={args.references}"]
    if given and not any(spec.name in measures.NEEDS_REFERENCE for spec in specs):
        raise LcmError(
            f"{given[0]}: no --metric compares with images; give one of "
            f"{', '.join(measures.NEEDS_REFERENCE)}, or leave it out"
        )
    images = next((FolderImages(path) for path in args.reference if path.is_dir()), None)
    if images is None and found.source is not None:
        count = args.references or min(len(found.captions), len(found.source))
        if count > len(found.source):
            raise LcmError(f"--references={count}: the source has {len(found.source)} records; give no more")
        images = SourceImages(found.source, count, found.name)
    return Reference(tuple(path for path in args.reference if not path.is_dir()), images, args.out / "references")


def check_images_used(args: argparse.Namespace, measured: Sequence[Measure]) -> None:
    """Raises LcmError if images to compare with are asked for, but all metrics have statistics in a .npz."""
    folder = next((path for path in args.reference if path.is_dir()), None)
    if folder is None and args.references is None:
        return
    files = {path.name for path in args.reference if path != folder}
    if all(one.about["reference"]["from"] in files for one in measured if one.name in measures.NEEDS_REFERENCE):
        flag = f"--references={args.references}" if folder is None else f"--reference={folder}"
        raise LcmError(f"{flag}: all metrics compare with the statistics in {', '.join(sorted(files))}; leave one out")


def make_requests(rows: Sequence[RowRequest], pipeline: Pipeline, args: argparse.Namespace) -> list[Request]:
    """The request of every row, each once; warnings go to stderr. Raises LcmError: the model cannot do it."""
    found, requests = {}, {}
    for row in rows:
        with _errors_of(row):
            request = make_request(
                pipeline,
                **dataclasses.asdict(row),
                spacing="trailing" if row.sampler in (*ON_GRID, *EULER) else args.spacing,
                gamma=args.gamma if row.sampler == "tcd" else None,
                height=args.height,
                width=args.width,
                negative_prompt=args.negative_prompt,
                nag_scale=args.nag_scale,
            )
        found |= dict.fromkeys(warnings(pipeline, request))
        requests[request] = None
    for warning in found:
        say(f"warning: {warning}")
    return list(requests)


def load_endpoints(
    args: argparse.Namespace, specs: Sequence[Spec], generator: Generator, captions: Sequence[str], request: Request
) -> Endpoints | None:
    """The endpoints of the teacher's ODE, if shapes are measured. Raises LcmError: it does not fit the model."""
    path = next((spec.path or "shapes" for spec in specs if spec.name == "shapes"), None)
    if path is None:
        return None
    teacher = load(path, dtype="float32", mesh=generator.mesh)
    if teacher.pipeline.has_w_embedding:
        raise LcmError(f"--metric=shapes:{path} is distilled itself (it has a w embedding); give its teacher")
    (channels, factor), own = ((p.unet.in_channels, p.vae.factor) for p in (teacher.pipeline, generator.pipeline))
    if (channels, factor) != own:
        raise LcmError(
            f"--metric=shapes:{path} has latents of {channels} channels at 1/{factor} size, the model's are {own[0]} "
            f"at 1/{own[1]}; give the model's teacher"
        )
    timesteps = teacher.pipeline.schedule.num_train_timesteps
    if args.endpoint_steps > timesteps:
        raise LcmError(f"--endpoint_steps={args.endpoint_steps}: the teacher has {timesteps} timesteps; give no more")
    return Endpoints(teacher, captions, args.endpoint_steps, args.seed, request)


def run(args: argparse.Namespace) -> list[Path]:
    """Measures the rows that are missing; returns the files of the table."""
    check_flags(args)
    rows, specs = parse_rows(args.row), measures.parse(args.metric)
    check_samplers(args, rows)
    found = read_inputs(args)
    reference = read_reference(args, found, specs)
    generator = flags.load_model(args)
    requests = make_requests(rows, generator.pipeline, args)
    report_captions(generator.pipeline, found)

    mesh, batch_size = generator.mesh, generator.whole_batch(args.batch_size)
    generator.check_memory(requests[0], batch_size)
    size, style = (requests[0].height, requests[0].width), args.style or "plain"
    measured = [measures.load(s, found.captions, size, reference, mesh, batch_size, style) for s in specs]
    measures.check_used(reference, measured)
    check_images_used(args, measured)
    endpoints = load_endpoints(args, specs, generator, found.captions, requests[0])
    program = {key: getattr(args, key) for key in ("negative_prompt", "tiled", "fsdp", "timings")}
    program |= {key: value for key in ("sliced", "weights", "offload") if (value := getattr(args, key))}
    program |= {"dtype": generator.dtype, "batch_size": batch_size}
    if args.nag_scale != 1.0:
        program["negative_prompt"] = f"{args.negative_prompt or ''} (nag_scale {args.nag_scale:g})"
    program |= {"device": f"{mesh.size} x {jax.devices()[0].device_kind}"}
    evaluation = Evaluation(
        model=args.name or " + ".join([args.model, *filter(None, (args.unet, args.vae)), *args.lora]),
        generator=generator,
        batch_size=batch_size,
        captions=found.captions,
        seed=args.seed,
        measures=measured,
        endpoints=endpoints,
        timings=args.timings,
        comparison=comparison(found, args.seed, size, measured, endpoints),
        state={"model": model_about(generator), "program": program},
    )
    with locked(args.out) as out:
        for folder in (out, out / "rows", out / "references"):
            files.tidy(folder)
        kept = table.read_rows(out)
        table.check_comparable(out, kept, evaluation.comparison)
        missing = [request for request in requests if not evaluation.is_measured(kept, request)]
        if missing:
            measure(out, evaluation, missing)
        return write(out, evaluation, args.plot)


def measure(out: Path, evaluation: Evaluation, requests: Sequence[Request]) -> None:
    """Measures rows, and writes each to the folder."""
    for one in evaluation.measures:
        say(f"{one.name}: {one.about['network']}")
    evaluation.prepare(requests[0])
    with Progress(len(requests) * len(evaluation.captions), 0, "images") as progress:
        for number, request in enumerate(requests, 1):
            row = evaluation.measure(request, progress.move)
            aside = table.save_row(out, row)
            values = [
                f"{table.COLUMNS[key].title} {table.shown(table.COLUMNS[key].form, value, row.intervals.get(key))}"
                for key, value in row.values.items()
                if value is not None
            ]
            say(
                f"row {number} of {len(requests)}: {row.sampler}, {row.steps} steps, scale {row.guidance_scale:g}: "
                + ", ".join([*values, f"{row.milliseconds:.1f} ms per image"])
            )
            if aside:
                say(f"the previous row was of other images; it was moved to {aside}")


def write(out: Path, evaluation: Evaluation, with_plot: bool) -> list[Path]:
    """Writes table.json, table.md and plot.png of the rows in the folder that go together."""
    rows, others = table.newest(out, evaluation.model, table.plain(evaluation.state))
    for model, count in others.items():
        say(
            f"{count} rows of {model} are of other weights or flags and are left out of the table; evaluate them again "
            "to include them"
        )
    table.write(out, rows)
    if with_plot:
        plot.write(rows, out / "plot.png")
    return [out / name for name in ("table.md", "table.json", "plot.png")[: 2 + with_plot]]


def report_captions(pipeline: Pipeline, found: Inputs) -> None:
    """Warns on stderr about captions that are cut, and about unusable records."""
    if found.skipped:
        say(f"warning: {found.skipped} records of {found.name} are unusable; the next ones replace them")
    cut = truncated(pipeline, found.captions)
    if cut:
        caption, (length, kept) = max(cut.items(), key=lambda item: item[1][0])
        say(
            f"warning: {len(cut)} captions are longer than {kept} tokens and are cut; the longest, of {length}, begins "
            f"with {caption[:60]!r}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def left() -> str:
        rows = args.out / "rows"
        return f"the rows in {rows} are kept, the same command resumes" if rows.is_dir() else "nothing was written"

    return exit_code(lambda: print("\n".join(str(path) for path in run(args))), left, flags.SMALLER)


if __name__ == "__main__":
    sys.exit(main())
