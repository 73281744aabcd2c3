"""`make demo`: distil the embedded teacher, export it, sample it in 1 to 8 steps, and compare it with the teacher.

    python -m experiments.shapes_lcm.demo [--workdir=runs/shapes_lcm] [--config=configs/shapes_lcm.py]
                                          [--steps=500] [--count=256] [--full]

Writes table.md, table.json and grid.png to the workdir, beside the run and its export/. The rows of the teacher, of
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
    "{count} images of held-out captions in every row, same noise; Frechet distance to {references} held-out "
    "renders in the scorer's features. Baselines have trailing spacing (first timestep 999) and cost two evaluations "
    "per guided step. One-step error: RMSE to the teacher's guided DDIM solution on the solver grid, in standard "
    "deviations of the latents. Milliseconds were measured on this machine{recorded}."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes_lcm"))
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--steps", type=int, help="of training, instead of the config's")
    parser.add_argument("--count", type=int, default=256, help="images per row")
    parser.add_argument("--full", action="store_true", help="measure the teacher instead of reading its rows")
    args = parser.parse_args()
    say = teller()
    embedded.check_count(args.count)
    rows = [] if args.full else embedded.recorded_rows(args.count)  # fails before the training
    config = stage.read_config(args.config)
    config = stage.with_steps(config, args.steps) if args.steps else config
    if not stage.trained_and_exported(config, args.workdir, say):
        return 1

    folder = args.workdir / "export"
    say(f"generating {args.count} images per row")
    best = embedded.best_guidance_scale()
    if args.full:
        rows = teacher_rows.measured(args.count, best)
    error_grid = f"--endpoint_steps={pretrained.read_record(folder)['solver_steps']}"
    row = measuring.rows_flag("lcm", (best, embedded.HIGH_SCALE))
    out = args.workdir / f"table_{args.count}"
    found = embedded.evaluated(out, "LCM", args.count, f"--model={folder}", error_grid, row)
    rows += map(embedded.as_dict, found)
    shown = [row | {"method": row["method"] + " (recorded)" * row.get("recorded", False)} for row in rows]
    recorded = "" if args.full else ", those of recorded rows on another"
    note = NOTE.format(count=args.count, references=REFERENCES, recorded=recorded)
    text = f"{results.table_of(embedded.COLUMNS, shown)}\n{note}\n"
    (args.workdir / "table.md").write_text(text)
    table = {"note": note, "config": str(args.config), "rows": rows}
    (args.workdir / "table.json").write_text(results.to_json(table, 2))

    teacher, student = ["--model=shapes"], [f"--model={folder}"]
    lines = {f"teacher, DDIM, {n} steps": embedded.generated(teacher, "ddim", n, best) for n in (50, 4, 2, 1)}
    lines |= {f"LCM, {n} steps": embedded.generated(student, "lcm", n, best) for n in (4, 2, 1)}
    embedded.write_grid(args.workdir / "grid.png", lines)
    print("\n" + text)
    say(f"done. Table: {args.workdir}/table.md and table.json; images: {args.workdir}/grid.png; model: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
