"""The embedded models: their rows of `lcm_jax.evaluate`, rows of renders, recorded rows of the teacher, and grids.

A row is a dict: accuracy in 0..1, frechet over `count` images, milliseconds per image with decoding and without
compiling, endpoint_error in standard deviations of the latents (one step only). Frechet distances are comparable only
among rows of one count.
"""

import argparse
import functools
import hashlib
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin

from experiments import measuring, results
from lcm_jax import assets, foreign, sample
from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import shapes as shapes_metric
from lcm_jax.metrics import table
from lcm_jax.metrics.networks import shapes as scorer
from lcm_jax.pretrained import load_pipeline
from lcm_jax.runtime import kernels as compiler

PAPER_SCALE = 9.0  # w = 8, of the paper's tables
HIGH_SCALE = 7.5  # as high for the embedded teacher as the paper's is for its own
GRID_IMAGES = 8
RECORD = Path(__file__).parent / "shapes_teacher" / "teacher_rows.json"
NAMES = {"lcm": "LCM", "ddim": "DDIM", "dpm_solver_2m": "DPM-Solver(2M)", "dpm_solver_pp_2m": "DPM-Solver++(2M)"}
# Title in the table -> (key of a row, format).
COLUMNS = {
    "sampler": ("method", "{}"),
    "steps": ("steps", "{}"),
    "guidance scale": ("guidance_scale", "{:g}"),
    "network evaluations": ("evaluations", "{}"),
    "caption accuracy": ("accuracy", "{:.1%}"),
    "Frechet distance": ("frechet", "{:.2f}"),
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
}
STYLED_RESULTS = ("table.md", "table.json", "grid.png")
Sampled = tuple[
    str, list[str], str, int, float
]  # name in the table, flags of the model, sampler, steps, guidance scale


def add_arguments(parser: argparse.ArgumentParser, workdir: str) -> None:
    """The flags of an experiment on the embedded models."""
    parser.add_argument("--workdir", type=Path, default=Path(workdir))
    parser.add_argument("--count", type=int, default=256, help="images per row")
    parser.add_argument("--publish", action="store_true", help="copy the results to the experiment's folder")


def scales(config: ConfigDict) -> tuple[float, ...]:
    """Guidance scales of a table: the paper's, or the one at which the embedded teacher is best."""
    return (best_guidance_scale(),) if measuring.is_embedded(config) else (PAPER_SCALE,)


def check_count(count: int) -> None:
    """Raises LcmError for fewer images than a Frechet distance needs."""
    least = scorer.ShapesScorer.feature_dim + 1
    if count < least:
        raise LcmError(f"--count={count}: a Frechet distance needs more images; give at least {least}")


def evaluated(out: Path, name: str, count: int, *flags: str) -> list[table.Row]:
    """The rows of an embedded model on the first `count` held-out captions, kept in OUT.

    The latency is the median over a row's own batches but the first; none is generated only to be timed.
    """
    shared = [*shlex.split(measuring.SHAPES), f"--count={count}", "--timings=1", "--no-plot"]
    return measuring.evaluated([*shared, f"--name={name}", f"--out={out}", *flags])


def as_dict(row: table.Row) -> dict[str, Any]:
    """The row as these experiments keep it."""
    return {
        "method": NAMES[row.sampler],
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "evaluations": row.evaluations,
        "accuracy": row.values["caption_accuracy"],
        "frechet": row.values["shapes_frechet"],
        "count": row.comparison["pictures"],
        "milliseconds": row.milliseconds,
        "endpoint_error": row.values.get("endpoint_error"),
    }


def judged(images: np.ndarray, style: str = "plain") -> tuple[float, float]:
    """(accuracy, Frechet distance to renders in `style`) of uint8 images of the first held-out captions."""
    labels = shapes.label_arrays(shapes_metric.heldout(len(images)))
    return shapes_metric.judge(*scorer.score(images), labels, shapes_metric.reference(style))


def real_images(count: int, style: str = "plain") -> dict[str, np.ndarray]:
    """Held-out renders uint8 [n 64 64 3], and the same through the embedded VAE, which every sample comes out of."""
    renders = shapes.render_batch(shapes_metric.heldout(count), style)
    pipeline, params = load_pipeline(assets.path("shapes"))

    @functools.partial(jax.jit, compiler_options=compiler.inference())
    def reconstruct(params: Any, images: jax.Array) -> jax.Array:
        z, _ = pipeline.vae.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1.0, method="encode")
        return jnp.clip(pipeline.vae.apply({"params": params}, z, method="decode") / 2.0 + 0.5, 0.0, 1.0)

    batches = (renders[start : start + measuring.BATCH] for start in range(0, count, measuring.BATCH))
    again = np.concatenate([reconstruct(params["vae"], batch) for batch in batches])
    return {"renders": renders, "VAE reconstructions": (255.0 * again).round().astype(np.uint8)}


def generated(flags: Sequence[str], sampler: str, steps: int, guidance_scale: float) -> np.ndarray:
    """Images uint8 [GRID_IMAGES 64 64 3] of the first held-out captions, by `lcm_jax.sample`; flags: of the model."""
    prompts = [f"--prompt={shapes.caption(spec)}" for spec in shapes_metric.heldout(GRID_IMAGES)]
    request = [f"--sampler={sampler}", f"--steps={steps}", f"--guidance_scale={guidance_scale:g}", "--num_images=1"]
    with tempfile.TemporaryDirectory() as folder:
        if code := sample.main([*flags, *prompts, *request, f"--batch_size={GRID_IMAGES}", f"--out={folder}"]):
            raise SystemExit(code)
        return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def write_grid(path: Path, lines: Mapping[str, np.ndarray]) -> None:
    """A PNG with one line of images [n 64 64 3] per entry, twice their size; it carries the names of its lines."""
    words = PngImagePlugin.PngInfo()
    words.add_text("rows", "; ".join(lines))
    cells = np.concatenate([np.concatenate(list(line), axis=1) for line in lines.values()])
    Image.fromarray(cells.repeat(2, axis=0).repeat(2, axis=1)).save(path, pnginfo=words)


def styled(out: Path, count: int, style: str, models: Iterable[Sampled]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows with Frechet distances to renders in `style` and to plain ones (`STYLED_COLUMNS`), and lines of a grid.

    The first four rows are renders and their reconstructions, plain and in the style.
    """
    rows = []
    images = {"plain": real_images(count), "style": real_images(count, style)}
    for kind in images["plain"]:
        for name, found in images.items():
            (accuracy, to_style), (_, to_plain) = judged(found[kind], style), judged(found[kind])
            distances = {"to_style": to_style, "to_plain": to_plain}
            rows.append({"method": f"{kind}, {name}", "accuracy": accuracy, **distances, "count": count})
    lines = {"renders in the style": images["style"]["renders"][:GRID_IMAGES]}
    for name, flags, *request in models:
        sampler, steps, scale = request
        shared = [*flags, f"--row={sampler}:{steps}:{scale:g}"]
        (row,) = evaluated(out / f"{style}_{count}", name, count, *shared, f"--style={style}")
        (plain,) = evaluated(out / f"plain_{count}", name, count, *shared)
        rows.append(
            {
                "method": name,
                "accuracy": row.values["caption_accuracy"],
                "to_style": row.values["shapes_frechet"],
                "to_plain": plain.values["shapes_frechet"],
                "count": count,
                "sampler": f"{NAMES[sampler]} {steps}",
                "guidance_scale": scale,
                "evaluations": row.evaluations,
            }
        )
        lines[f"{name}, {steps} steps, scale {scale:g}"] = generated(flags, *request)
    return rows, lines


def write_styled(workdir: Path, table: Mapping[str, Any], lines: Mapping[str, np.ndarray]) -> None:
    """Writes STYLED_RESULTS to the workdir and prints the table; table: of table.json, with "note" and "rows"."""
    text = f"{results.table_of(STYLED_COLUMNS, table['rows'])}\n{table['note']}\n"
    (workdir / "table.md").write_text(text)
    (workdir / "table.json").write_text(results.to_json(table, 2))
    write_grid(workdir / "grid.png", lines)
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
            "python -m experiments.shapes_teacher.teacher_rows --scan --count=256"
        )
    return record


def best_guidance_scale() -> float:
    """At which the embedded teacher's captions are read best, by 50 DDIM steps."""
    return teacher_record()["best_guidance_scale"]


def recorded_rows(count: int) -> list[dict[str, Any]]:
    """The recorded rows of renders, reconstructions and the teacher over `count` images.

    Raises:
      LcmError: there are none of so many images.
    """
    tables = teacher_record()["tables"]
    if str(count) not in tables:
        raise LcmError(
            f"--count={count}: teacher rows are recorded for {', '.join(tables)} images; give one of them, or --full"
        )
    return [{**row, "recorded": True} for row in tables[str(count)]]
