"""The embedded models: their rows of `lcm_jax.evaluate`, rows of renders, recorded rows of the teacher, and grids.

A row is a dict: accuracy in 0..1, frechet, coverage, collapsed and diversity (metrics/shapes.py), milliseconds per
image with decoding and without compiling, endpoint_error in standard deviations of the latents (one step only), and
intervals, {key: (low, high)}. Frechet distances are comparable only among rows of one size.
"""

import argparse
import functools
import hashlib
import math
import shlex
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from experiments import measuring, results
from lcm_jax import assets, foreign, sample
from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import measures, table
from lcm_jax.metrics import shapes as shapes_metric
from lcm_jax.metrics.networks import shapes as scorer
from lcm_jax.pretrained import load_pipeline
from lcm_jax.runtime import kernels as compiler

PAPER_SCALE = 9.0  # w = 8, of the paper's tables
HIGH_SCALE = 7.5  # as high for the embedded teacher as the paper's is for its own
MEASURES = {"accuracy": "caption_accuracy", "frechet": "shapes_frechet", "coverage": "coverage_distance"}
OF_LAW = ("coverage", "collapsed", "diversity")  # of what captions leave open
GRID_IMAGES = 7
GRID_SCALE = 3  # pixels of a grid for one of an image
RECORD = Path(__file__).parent / "shapes_teacher" / "teacher_rows.json"
Size = tuple[tuple[int, int], ...]  # of a row: sets of (images, images of each caption)
EACH = 8  # images of each caption where one set has to serve all measures
DEMO: Size = ((512, EACH),)
THOROUGH: Size = ((2000, 1), (4096, 64))  # many captions for accuracy, many images of each for coverage
NAMES = {"lcm": "LCM", "ddim": "DDIM", "dpm_solver_2m": "DPM-Solver(2M)", "dpm_solver_pp_2m": "DPM-Solver++(2M)"}
# Title in the table -> (key of a row, format).
COLUMNS = {
    "sampler": ("method", "{}"),
    "steps": ("steps", "{}"),
    "guidance scale": ("guidance_scale", "{:g}"),
    "network evaluations": ("evaluations", "{}"),
    "caption accuracy": ("accuracy", "{:.1%}"),
    "Frechet distance": ("frechet", "{:.2f}"),
    "coverage distance": ("coverage", "{:.3f}"),
    "collapsed": ("collapsed", "{:.1%}"),
    "diversity": ("diversity", "{:.1%}"),
    "ms per image": ("milliseconds", "{:.1f}"),
    "one-step error": ("endpoint_error", "{:.3f}"),
}
STYLED_COLUMNS = {
    "model": ("method", "{}"),
    "sampler, steps": ("sampler", "{}"),
    "guidance scale": ("guidance_scale", "{:g}"),
    "network evaluations": ("evaluations", "{}"),
    "caption accuracy": ("accuracy", "{:.1%}"),
    "FD to style": ("to_style", "{:.1f}"),
    "FD to plain": ("to_plain", "{:.1f}"),
    "coverage distance": ("coverage", "{:.3f}"),
}
STYLED_RESULTS = ("table.md", "table.json", "grid.png")
Sampled = tuple[
    str, list[str], str, int, float
]  # name in the table, flags of the model, sampler, steps, guidance scale


def add_arguments(parser: argparse.ArgumentParser, workdir: str) -> None:
    """The flags of an experiment on the embedded models."""
    parser.add_argument("--workdir", type=Path, default=Path(workdir))
    parser.add_argument("--count", type=int, default=512, help=f"images per row, {EACH} of each caption")
    parser.add_argument("--publish", action="store_true", help="copy the results to the experiment's folder")


def scales(config: ConfigDict) -> tuple[float, ...]:
    """Guidance scales of a table: the paper's, or the one at which the embedded teacher is best."""
    return (best_guidance_scale(),) if measuring.is_embedded(config) else (PAPER_SCALE,)


def check_count(count: int) -> None:
    """Raises LcmError for fewer images than a Frechet distance needs."""
    least = scorer.ShapesScorer.feature_dim + 1
    if count < least:
        raise LcmError(f"--count={count}: a Frechet distance needs more images; give at least {least}")


def evaluated(out: Path, name: str, count: int, *flags: str, each: int = EACH) -> list[table.Row]:
    """The rows of an embedded model: `count` images of held-out captions, `each` of every caption; kept in OUT.

    The latency is the median over a row's own batches but the first; none is generated only to be timed.
    """
    shared = [*shlex.split(measuring.SHAPES), f"--count={count}", f"--images_per_caption={each}"]
    return measuring.evaluated([*shared, "--timings=1", "--no-plot", f"--name={name}", f"--out={out}", *flags])


def sampled(out: Path, name: str, size: Size, *flags: str) -> list[dict[str, Any]]:
    """Rows of an embedded model; each set of `size` is kept in a folder of OUT of its own."""
    sets = [evaluated(out / f"{n}x{each}", name, n, *flags, each=each) for n, each in size]
    return [_merged([as_dict(row) for row in rows]) for rows in zip(*sets, strict=True)]


def as_dict(row: table.Row) -> dict[str, Any]:
    """The row as these experiments keep it."""
    return {
        "method": NAMES[row.sampler],
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "evaluations": row.evaluations,
        **_measures(row.values, row.intervals),
        "milliseconds": row.milliseconds,
        "endpoint_error": row.values.get("endpoint_error"),
    }


def _measures(values: Mapping[str, float | None], intervals: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    names = {key: MEASURES.get(key, key) for key in (*MEASURES, "collapsed", "diversity")}
    ends = {key: intervals[name] for key, name in names.items() if name in intervals}
    return {key: values.get(name) for key, name in names.items()} | {"intervals": ends}


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of its sets: coverage from the last, in which captions repeat most; the rest from the first."""
    first, last = rows[0]["intervals"], rows[-1]["intervals"]
    ends = {key: pair for key, pair in first.items() if key not in OF_LAW}
    ends |= {key: pair for key, pair in last.items() if key in OF_LAW}
    return rows[0] | {key: rows[-1][key] for key in OF_LAW} | {"intervals": ends}


def judged(images: np.ndarray, captions: Sequence[str], style: str = "plain") -> dict[str, Any]:
    """The measures of uint8 images of these captions; the Frechet distance is to renders in `style`."""
    measure = measures.Shapes(captions, images.shape[1:3], style, measuring.BATCH)
    found = results.of_estimates(measure.estimates(measure.add(None, images, captions)))
    return _measures(found, found["intervals"])


def captions_of(count: int, each: int) -> list[str]:
    """Those of a row's images, as `lcm_jax.evaluate` takes them."""
    texts = [shapes.caption(spec) for spec in shapes_metric.heldout(math.ceil(count / each))]
    return [text for text in texts for _ in range(each)][:count]


def real_images(captions: Sequence[str], style: str = "plain") -> dict[str, np.ndarray]:
    """Renders uint8 [n 64 64 3] drawn from the captions' law, and the same through the embedded VAE, which every
    sample comes out of."""
    renders = shapes.render_batch([shapes.drawn(caption, i) for i, caption in enumerate(captions)], style)
    pipeline, params = load_pipeline(assets.path("shapes"))

    @functools.partial(jax.jit, compiler_options=compiler.inference())
    def reconstruct(params: Any, images: jax.Array) -> jax.Array:
        z, _ = pipeline.vae.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1.0, method="encode")
        return jnp.clip(pipeline.vae.apply({"params": params}, z, method="decode") / 2.0 + 0.5, 0.0, 1.0)

    batches = (renders[start : start + measuring.BATCH] for start in range(0, len(captions), measuring.BATCH))
    again = np.concatenate([reconstruct(params["vae"], batch) for batch in batches])
    return {"renders": renders, "VAE reconstructions": (255.0 * again).round().astype(np.uint8)}


def real_rows(size: Size) -> list[dict[str, Any]]:
    """Rows of renders, of their reconstructions, and of a sampler without any diversity: one render per caption."""
    sets = []
    for count, each in size:
        captions = captions_of(count, each)
        found = real_images(captions)
        first = [shapes.drawn(caption, i - i % each) for i, caption in enumerate(captions)]
        found["one render of each caption"] = shapes.render_batch(first)
        sets.append([{"method": name} | judged(images, captions) for name, images in found.items()])
    blank = dict.fromkeys(key for key, _ in COLUMNS.values())
    return [blank | _merged(rows) for rows in zip(*sets, strict=True)]


def grid_captions() -> list[str]:
    return captions_of(GRID_IMAGES, 1)


def generated(flags: Sequence[str], sampler: str, steps: int, guidance_scale: float) -> np.ndarray:
    """Images uint8 [GRID_IMAGES 64 64 3] of the first held-out captions, by `lcm_jax.sample`; flags: of the model."""
    prompts = [f"--prompt={caption}" for caption in grid_captions()]
    request = [f"--sampler={sampler}", f"--steps={steps}", f"--guidance_scale={guidance_scale:g}", "--num_images=1"]
    with tempfile.TemporaryDirectory() as folder:
        if code := sample.main([*flags, *prompts, *request, f"--batch_size={GRID_IMAGES}", f"--out={folder}"]):
            raise SystemExit(code)
        return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def write_grid(path: Path, lines: Mapping[str, np.ndarray], captions: Sequence[str]) -> None:
    """A PNG with a line of images [n 64 64 3] per entry, captions above; it carries the names of its lines, too."""
    side, gap, left, top = GRID_SCALE * shapes.RESOLUTION, 4, 130, 78
    width = left + len(captions) * (side + gap)
    sheet = Image.new("RGB", (width, top + len(lines) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, 24))
        draw.multiline_text((left + column * (side + gap), top - 8), text, "black", font, anchor="ld")
    for line, (name, images) in enumerate(lines.items()):
        y = top + line * (side + gap)
        draw.multiline_text((4, y + side // 2), "\n".join(textwrap.wrap(name, 16)), "black", font, anchor="lm")
        for column, image in enumerate(images):
            large = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (left + column * (side + gap), y))
    words = PngImagePlugin.PngInfo()
    words.add_text("rows", "; ".join(lines))
    sheet.save(path, pnginfo=words)


def styled(out: Path, count: int, style: str, models: Iterable[Sampled]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows with Frechet distances to renders in `style` and to plain ones (`STYLED_COLUMNS`), and lines of a grid.

    The first four rows are renders and their reconstructions, plain and in the style.
    """
    rows, captions = [], captions_of(count, EACH)
    images = {"plain": real_images(captions), "style": real_images(captions, style)}
    for kind in images["plain"]:
        for name, found in images.items():
            row = _of_both(judged(found[kind], captions, style), judged(found[kind], captions))
            rows.append({"method": f"{kind}, {name}"} | row)
    lines = {"renders in the style": images["style"]["renders"][: GRID_IMAGES * EACH : EACH]}
    for name, flags, *request in models:
        sampler, steps, scale = request
        shared = [*flags, f"--row={sampler}:{steps}:{scale:g}"]
        (row,) = evaluated(out / f"{style}_{count}", name, count, *shared, f"--style={style}")
        (plain,) = evaluated(out / f"plain_{count}", name, count, *shared)
        found = _of_both(as_dict(row), as_dict(plain))
        rows.append(found | {"method": name, "sampler": f"{NAMES[sampler]} {steps}"})
        lines[f"{name}, {steps} steps, scale {scale:g}"] = generated(flags, *request)
    return rows, lines


def _of_both(in_style: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """A row of images that were measured against renders in a style, and against plain ones."""
    both = {"to_style": in_style, "to_plain": plain}
    ends = {key: row["intervals"]["frechet"] for key, row in both.items() if "frechet" in row["intervals"]}
    distances = {key: row["frechet"] for key, row in both.items()}
    return in_style | distances | {"intervals": in_style["intervals"] | ends}


def write_styled(workdir: Path, table: Mapping[str, Any], lines: Mapping[str, np.ndarray]) -> None:
    """Writes STYLED_RESULTS to the workdir and prints the table; table: of table.json, with "note" and "rows"."""
    table = {**table, "note": results.noted(table["note"], table["rows"])}
    text = f"{results.table_of(STYLED_COLUMNS, table['rows'])}\n{table['note']}\n"
    (workdir / "table.md").write_text(text)
    (workdir / "table.json").write_text(results.to_json(table, 2))
    write_grid(workdir / "grid.png", lines, grid_captions())
    print("\n" + text)


def asset_hash(folder: str | Path) -> str:
    """SHA-256 over the weight files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def teacher_record() -> dict[str, Any]:
    """shapes_teacher/teacher_rows.json. Raises LcmError if it was measured on another teacher."""
    record, found = foreign.read_json(RECORD), asset_hash(assets.path("shapes"))
    if record["asset"] != found:
        raise LcmError(
            f"{RECORD.name} was measured on asset {record['asset'][:12]}, this one is {found[:12]}; run "
            "python -m experiments.shapes_teacher.teacher_rows --scan"
        )
    return record


def best_guidance_scale() -> float:
    """At which the embedded teacher's captions are read best, by 50 DDIM steps."""
    return teacher_record()["best_guidance_scale"]


def name_of(size: Size) -> str:
    """As tables of recorded rows are called: "2000x1+4096x64"."""
    return "+".join(f"{count}x{each}" for count, each in size)


def recorded_rows(size: Size) -> list[dict[str, Any]]:
    """The recorded rows of renders, reconstructions and the teacher.

    Raises:
      LcmError: there are none of this size.
    """
    tables = teacher_record()["tables"]
    if name_of(size) not in tables:
        raise LcmError(
            f"teacher rows are recorded for {', '.join(tables)} (images x images of each caption), not for "
            f"{name_of(size)}; give --full, which measures them now"
        )
    return [{**row, "recorded": True} for row in tables[name_of(size)]]
