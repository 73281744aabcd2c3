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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcm_jax import sample
from lcm_jax.data.sources import SOURCES, open_source
from lcm_jax.diffusion import samplers
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.metrics import inputs, measures, plot, table
from lcm_jax.metrics import rows as rows_lib
from lcm_jax.metrics.measures import Measure, Reference, Spec
from lcm_jax.metrics.rows import Subject
from lcm_jax.metrics.shapes import Endpoints
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.telemetry import Progress
from lcm_jax.runtime.workdir import locked
from lcm_jax.sampling import generator as generate_lib
from lcm_jax.sampling.generator import Generator, Settings

SOURCE_COUNT = 2000  # pictures per row where captions come from a data source
SOURCE_FLAGS = ("path", "split", "image_key", "caption_key", "style")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row as the command line asks for it; without a guidance scale the model's own default is taken."""

    sampler: str
    steps: int
    guidance_scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.guidance_scale is None else f":{self.guidance_scale:g}"
        return f"--row={self.sampler}:{self.steps}{scale}"


def parser() -> argparse.ArgumentParser:
    p = sample.Parser(prog="python -m lcm_jax.evaluate", description=__doc__.splitlines()[0])
    sample.add_model_arguments(p)
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
    p.add_argument("--spacing", choices=samplers.SPACINGS, default="trailing", help="timesteps of the baselines")
    p.add_argument("--endpoint_steps", type=int, default=50, help="of the teacher's ODE: --metric=shapes, one step")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=16, help="pictures drawn at once")
    p.add_argument("--timings", type=int, default=10, help="batches, at least, that a latency is the median of")
    sample.add_drawing_arguments(p)
    p.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="plot.png, with matplotlib")
    p.add_argument("--out", type=Path, required=True, help="folder for the table; one that was begun goes on")
    return p


def parse_rows(texts: Sequence[str]) -> list[Asked]:
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
            if sampler not in sample.SAMPLERS:
                raise LcmError(f"--row={text}: sampler {sampler!r} is unknown; choose of {', '.join(sample.SAMPLERS)}")
            rows += [Asked(sampler, n, scale) for scale in scales for n in steps]
    for row in rows:
        if not 1 <= row.steps <= sample.MAX_STEPS:
            raise LcmError(f"{row}: {row.steps} steps are out of range; choose 1 to {sample.MAX_STEPS}")
        if row.guidance_scale is not None and not 1.0 <= row.guidance_scale < math.inf:
            raise LcmError(f"{row}: guidance scale 1 is no guidance; use 1 or more")
    return list(dict.fromkeys(rows))


def check_flags(args: argparse.Namespace) -> None:
    """Raises LcmError for what is wrong with a command line whatever the model."""
    for flag in ("count", "references", "batch_size", "timings", "endpoint_steps"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise LcmError(f"--{flag}={getattr(args, flag)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise LcmError(f"--seed={args.seed} is out of range; choose 0 to {2**32 - 1}")
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
        lines = (line.strip() for line in sample.read_text("prompts", args.prompts).splitlines())
        return inputs.of_prompts([line for line in lines if line], args.count, f"--prompts={args.prompts}")
    count = args.count or SOURCE_COUNT
    given = {key: getattr(args, key) for key in SOURCE_FLAGS if getattr(args, key) is not None}
    if args.source == "shapes":
        given = {"split": "heldout", "num_examples": max(count, args.references or 0)} | given
    path = given.pop("path", None)
    try:
        source = open_source(args.source, path and os.path.expanduser(path), **given)
    except LcmError as error:  # speaks to those who write a config
        raise LcmError(str(error).replace("--config.data.", "--").replace("config.data.", "--")) from None
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


def load_subject(args: argparse.Namespace, mesh: Mesh) -> Subject:
    """The model of the command line, its weights on the mesh."""
    loras = [sample.parse_lora(text) for text in args.lora]
    if args.model_config is not None and not sample.is_single_file(args.model):
        raise LcmError(f"--model_config={args.model_config} is for a single .safetensors, not for --model={args.model}")
    dtype = jnp.dtype(args.dtype)
    pipeline, record = sample.load(
        args.model, args.unet, args.vae, args.variant, dtype, args.model_config, mesh_lib.place(mesh)
    )
    if loras:
        pipeline, record = sample.add_loras(pipeline, record, loras, args.ignore_unused)
    height, width = sample.size_of(args, pipeline)
    factor = pipeline.vae.factor
    shape = (height // factor, width // factor, pipeline.unet.in_channels)
    name = args.name or " + ".join([args.model, *filter(None, (args.unet, args.vae)), *args.lora])
    batch_size = math.ceil(args.batch_size / mesh.size) * mesh.size  # no device draws for nothing
    return Subject(name, pipeline, record, (height, width), shape, batch_size)


def settle(asked: Sequence[Asked], subject: Subject, args: argparse.Namespace) -> list[tuple[Settings, float]]:
    """Settings and guidance scale of every row, each once; warnings to stderr. Raises LcmError: not for this model."""
    pipeline, record, found, rows = subject.pipeline, subject.record, {}, {}
    for row in asked:
        settings = generate_lib.settings_for(pipeline, record, row.sampler, row.steps, args.spacing)
        try:
            sample.check_request(pipeline, settings, *subject.size, args.negative_prompt)
        except LcmError as error:
            raise LcmError(f"{row}: {error}") from None
        default = generate_lib.default_guidance_scale(pipeline.has_w_embedding, record, row.sampler)
        scale = default if row.guidance_scale is None else row.guidance_scale
        may_be_lcm = bool(args.lora or args.unet)
        found |= dict.fromkeys(sample.warnings(pipeline, record, settings, scale, args.negative_prompt, may_be_lcm))
        rows[settings, scale] = None
    for warning in found:
        say(f"warning: {warning}")
    return list(rows)


def load_teacher(specs: Sequence[Spec], subject: Subject, mesh: Mesh, endpoint_steps: int) -> Pipeline | None:
    """Whose guided ODE one step is compared with, where the shapes are measured. Raises LcmError: it does not fit."""
    path = next((spec.path or "shapes" for spec in specs if spec.name == "shapes"), None)
    if path is None:
        return None
    teacher, _ = sample.load(path, place=mesh_lib.place(mesh))
    if teacher.has_w_embedding:
        raise LcmError(f"--metric=shapes:{path} is distilled itself (it has a w embedding); give its teacher")
    latents = (teacher.unet.in_channels, teacher.vae.factor)
    if latents != (subject.shape[2], subject.pipeline.vae.factor):
        raise LcmError(
            f"--metric=shapes:{path} has latents of {latents[0]} channels at 1/{latents[1]} size, the "
            f"model's are {subject.shape[2]} at 1/{subject.pipeline.vae.factor}; give the model's teacher"
        )
    timesteps = len(teacher.schedule.alphas_cumprod)
    if endpoint_steps > timesteps:
        raise LcmError(f"--endpoint_steps={endpoint_steps}: the teacher has {timesteps} timesteps; give no more")
    return teacher


def run(args: argparse.Namespace) -> list[Path]:
    """Measures what the command line asks for and is not there yet; returns the files of the table."""
    args.out = args.out.expanduser()
    check_flags(args)
    asked, specs = parse_rows(args.row), measures.parse(args.metric)
    found = read_inputs(args)
    reference = read_reference(args, found, specs)
    mesh = sample.make_mesh(args.fsdp)
    subject = load_subject(args, mesh)
    rows = settle(asked, subject, args)
    tell_lengths(subject.pipeline, found)
    style = args.style or "plain"
    taken = [measures.load(s, found.captions, subject.size, reference, mesh, subject.batch_size, style) for s in specs]
    measures.check_used(reference, taken)
    teacher = load_teacher(specs, subject, mesh, args.endpoint_steps)
    program = {key: getattr(args, key) for key in ("dtype", "negative_prompt", "tiled", "fsdp", "timings")}
    program |= {"batch_size": subject.batch_size, "device": f"{mesh.size} x {jax.devices()[0].device_kind}"}
    shared = rows_lib.comparison(found, args.seed, subject.size, taken, teacher, args.endpoint_steps)
    about = {"model": rows_lib.model_about(subject), "program": program}
    with locked(args.out) as out:
        before = table.kept(out)
        table.check_comparable(out, before, shared)
        todo = [row for row in rows if not rows_lib.is_there(before, subject, row, shared, about)]
        if todo:
            measure(out, todo, subject, found, taken, teacher, shared, about, args, mesh)
        return write(out, subject, table.plain(about), args.plot)


def measure(
    out: Path,
    rows: Sequence[tuple[Settings, float]],
    subject: Subject,
    found: inputs.Inputs,
    taken: Sequence[Measure],
    teacher: Pipeline | None,
    shared: Mapping[str, Any],
    about: Mapping[str, Any],
    args: argparse.Namespace,
    mesh: Mesh,
) -> None:
    """Draws and measures rows, and keeps each."""
    for one in taken:
        say(f"{one.name}: {one.about['network']}")
        one.prepare()
    generator = Generator(subject.pipeline, args.tiled, args.negative_prompt, mesh)
    ends = None
    if teacher is not None and any(settings.steps == 1 for settings, _ in rows):
        guide = Generator(teacher, mesh=mesh)
        ends = Endpoints(guide, found.captions, args.endpoint_steps, args.seed, subject.shape)
    generator.decode(np.zeros((subject.batch_size, *subject.shape), np.float32))  # compiled before any clock runs
    with Progress(len(rows) * len(found.captions), 0, "pictures") as progress:
        for number, (settings, scale) in enumerate(rows, 1):
            row = rows_lib.measured(
                subject,
                generator,
                found.captions,
                settings,
                scale,
                taken,
                ends,
                seed=args.seed,
                timings=args.timings,
                shared=shared,
                about=about,
                move=progress.move,
            )
            aside = table.keep(out, row)
            values = ", ".join(
                f"{table.COLUMNS[key].title} {table.COLUMNS[key].form.format(value)}"
                for key, value in row.values.items()
                if value is not None
            )
            say(
                f"row {number} of {len(rows)}: {row.sampler}, {row.steps} steps, scale {scale:g}: "
                + ", ".join(filter(None, (values, f"{row.milliseconds:.1f} ms per image")))
            )
            if aside:
                say(f"the row before it was of other pictures and had more metrics: {aside}")


def write(out: Path, subject: Subject, about: Mapping[str, Any], with_plot: bool) -> list[Path]:
    """table.json, table.md and plot.png of all rows in the folder that belong together."""
    kept = table.kept(out)
    current = table.states(table.read(out)) | {subject.name: about}
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


def tell_lengths(pipeline: Pipeline, found: inputs.Inputs) -> None:
    """Says on stderr which captions are cut, and which records could not be read."""
    if found.left_out:
        say(f"warning: {found.left_out} records of {found.origin} cannot be read; others stand in for them")
    cut = conditioning.truncated(pipeline, found.captions)
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
