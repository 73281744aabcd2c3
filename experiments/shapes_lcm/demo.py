"""`make demo`: distil the embedded teacher, export it, sample it in 1 to 8 steps, and compare it with the teacher.

    python -m experiments.shapes_lcm.demo [--workdir=runs/shapes_lcm] [--config=configs/shapes_lcm.py]
                                          [--steps=800] [--thorough] [--full] [--publish]

Writes table.md, table.json and grid.png to the workdir, beside the run and its export/; --publish copies them beside
this file. --thorough measures 2,000 captions, and 64 images of each of 64 for coverage. The rows of the teacher, of
renders and of their reconstructions come from experiments/shapes_teacher/teacher_rows.json; --full measures them anew.
"""

import argparse
import sys
from pathlib import Path

from experiments import embedded, measuring, results, stage
from experiments.shapes_teacher import teacher_rows
from experiments.terminal import teller
from lcm_jax import pretrained
from lcm_jax.ending import exit_code
from lcm_jax.metrics.shapes import REFERENCES

NOTE = (
    "Every row: {size}; held-out captions, the same noise. Accuracy: of the attributes that a caption "
    "names. Frechet distance to {references} held-out renders in the scorer's features. Coverage distance: from the "
    "law of what captions leave open, 0 for images drawn from it; collapsed: share of captions whose images all agree "
    "in something left open; diversity: number of different combinations, relative to that law. Baselines have "
    "trailing spacing (first timestep 999) and cost two evaluations per guided step. One-step error: RMSE to the "
    "teacher's guided DDIM solution on the solver grid, in standard deviations of the latents. Milliseconds were "
    "measured on this machine{recorded}."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes_lcm"))
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--steps", type=int, help="of training, instead of the config's")
    parser.add_argument("--thorough", action="store_true", help="more images per row")
    parser.add_argument("--full", action="store_true", help="measure the teacher instead of reading its rows")
    parser.add_argument("--publish", action="store_true", help="copy the results to the experiment's folder")
    args = parser.parse_args()
    say = teller()
    size = embedded.THOROUGH if args.thorough else embedded.DEMO
    rows = [] if args.full else embedded.recorded_rows(size)  # fails before the training
    config = stage.read_config(args.config)
    config = stage.with_steps(config, args.steps) if args.steps else config
    if not stage.trained_and_exported(config, args.workdir, say):
        return 1

    folder = args.workdir / "export"
    say("generating the images of each row")
    best, out = embedded.best_guidance_scale(), args.workdir / "tables"
    if args.full:
        rows = teacher_rows.measured(out / "teacher", size, best)
    error_grid = f"--endpoint_steps={pretrained.read_record(folder)['solver_steps']}"
    row = measuring.rows_flag("lcm", (best, embedded.HIGH_SCALE))
    rows += embedded.sampled(out, "LCM", size, f"--model={folder}", error_grid, row)
    shown = [row | {"method": row["method"] + " (recorded)" * row.get("recorded", False)} for row in rows]
    recorded = "" if args.full else ", those of recorded rows on another"
    sets = ", and ".join(f"{count:,} images, {each} of each caption" for count, each in size)
    note = results.noted(NOTE.format(size=sets, references=f"{REFERENCES:,}", recorded=recorded), rows)
    text = f"{results.table_of(embedded.COLUMNS, shown)}\n{note}\n"
    (args.workdir / "table.md").write_text(text)
    table = {"note": note, "config": str(args.config), "rows": rows}
    (args.workdir / "table.json").write_text(results.to_json(table, 2))

    teacher, student = ["--model=shapes"], [f"--model={folder}"]
    lines = {
        "teacher, 50 steps": embedded.generated(teacher, "ddim", 50, best),
        "teacher, 4 steps": embedded.generated(teacher, "ddim", 4, best),
        "teacher, 1 step": embedded.generated(teacher, "ddim", 1, best),
        "unguided, 1 step": embedded.generated(teacher, "ddim", 1, 1.0),
    }
    lines |= {f"LCM, {n} step{'s' * (n > 1)}": embedded.generated(student, "lcm", n, best) for n in (4, 2, 1)}
    embedded.write_grid(args.workdir / "grid.png", lines, embedded.grid_captions())
    if args.publish:
        suffix = args.config.stem.removeprefix("shapes_lcm")
        files = [args.workdir / name for name in ("table.md", "table.json", "grid.png", "metrics.jsonl")]
        results.publish(Path(__file__).parent, {f"{p.stem}{suffix}{p.suffix}": p for p in files})
    print("\n" + text)
    say(f"done. Table: {args.workdir}/table.md and table.json; images: {args.workdir}/grid.png; model: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
