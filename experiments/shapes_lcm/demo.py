"""`make demo`: distil the embedded teacher, export it, draw with it in 1 to 8 steps, and compare it with the teacher.

    python -m experiments.shapes_lcm.demo [--workdir=runs/shapes_lcm] [--config=configs/shapes_lcm.py]
                                          [--count=256] [--full]

Writes table.md, table.json and grid.png to the workdir, beside the run and its export/. The teacher's rows come from
experiments/shapes_teacher/teacher_rows.json, which names the asset it was measured on; --full computes them anew.
"""

import argparse
import runpy
import sys
from pathlib import Path

import numpy as np

from experiments.shapes_lcm import table
from experiments.shapes_teacher import teacher_rows
from experiments.stage import trained_and_exported
from experiments.terminal import teller
from lcm_jax import pretrained, sample
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline
from lcm_jax.sampling import generator as generate_lib
from lcm_jax.sampling.generator import Generator

STEPS = (1, 2, 4, 8)
GRID_PROMPTS = 8
NOTE = (
    "{count} pictures of held-out captions in every row, same noise; Frechet distance to {references} held-out "
    "renders in the scorer's features. Baselines have trailing spacing (first timestep 999) and cost two evaluations "
    "per guided step. One-step error: RMSE to the teacher's guided DDIM solution on the solver grid, in standard "
    "deviations of the latents. Milliseconds are of this machine{recorded}."
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes_lcm"))
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--count", type=int, default=256, help="pictures per row")
    parser.add_argument("--full", action="store_true", help="measure the teacher, too, instead of reading its rows")
    return parser.parse_args()


def main() -> int:
    args = parse()
    say = teller()
    table.check_count(args.count)
    if not args.full:
        teacher_rows.recorded(args.count)  # raises where there are none
    config = runpy.run_path(str(args.config))["get_config"]()
    if not trained_and_exported(config, args.workdir, say):
        return 1

    folder = args.workdir / "export"
    say(f"drawing {args.count} pictures per row")
    rows, pictures = measure(folder, args.count, args.full)
    recorded = "" if args.full else "; the teacher's are recorded"
    note = NOTE.format(count=args.count, references=table.REFERENCES, recorded=recorded)
    text = table.markdown(rows, note)
    (args.workdir / "table.md").write_text(text)
    (args.workdir / "table.json").write_text(table.to_json(rows, note=note, config=str(args.config)))
    sample.write_png(args.workdir / "grid.png", pictures, {"rows": "teacher 50, 4, 2, 1 steps (DDIM); LCM 4, 2, 1"})
    print("\n" + text)
    say(f"done. Table: {args.workdir}/table.md and table.json; pictures: {args.workdir}/grid.png; model: {folder}")
    return 0


def measure(folder: Path, count: int, full: bool) -> tuple[list[table.Row], np.ndarray]:
    """The table's rows, and a grid of pictures: a column per prompt, a row per sampler."""
    student = Generator(load_pipeline(folder))
    teacher = teacher_rows.teacher()
    judge = table.Judge(count)
    best = teacher_rows.best_guidance_scale()
    scales = (best, teacher_rows.HIGH_SCALE)
    record = pretrained.read_record(folder)
    endpoints = table.endpoints(teacher, judge, scales, record["solver_steps"])

    rows = judge.real_rows(teacher)
    rows += teacher_rows.compute(judge, scales) if full else teacher_rows.recorded(count)
    for scale in scales:
        for steps in STEPS:
            settings = generate_lib.settings_for(student.pipeline, record, "lcm", steps, "trailing")
            rows.append(table.sampler_row(student, judge, settings, scale, endpoints))

    few = table.Judge(GRID_PROMPTS)
    lines = [table.draw(teacher, few, teacher_rows.settings("ddim", n), best)[0] for n in (50, 4, 2, 1)]
    for steps in (4, 2, 1):
        settings = generate_lib.settings_for(student.pipeline, record, "lcm", steps, "trailing")
        lines.append(table.draw(student, few, settings, best)[0])
    pictures = generate_lib.grid(np.concatenate(lines), GRID_PROMPTS)
    return rows, pictures.repeat(2, axis=0).repeat(2, axis=1)  # 64 px is small on today's screens


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LcmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
