"""The teacher's rows of the demo's tables and its best guidance scale, recorded in teacher_rows.json.

    python -m experiments.shapes_teacher.teacher_rows --scan --thorough    # guidance.md and guidance.png, too
    python -m experiments.shapes_teacher.teacher_rows                      # those of `make demo`

--thorough measures 2,000 captions, and 64 images of each of 64 for coverage. --scan first measures DDIM with 50 steps
over guidance scales and takes the one with the smallest Frechet distance of those whose interval of caption accuracy
overlaps that of the best. Tables of several sizes stand side by side; the asset's hash says what they belong to. Rows
are kept in the workdir: the same command resumes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import embedded, results
from experiments.embedded import DEMO, THOROUGH, Size
from lcm_jax import assets, files
from lcm_jax.ending import exit_code
from lcm_jax.metrics import plot

SOLVERS = "ddim,dpm_solver_pp_2m"
STEPS = (1, 2, 4, 8)
MANY = 50
SCAN = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, embedded.HIGH_SCALE)


def measured(out: Path, size: Size, best_scale: float) -> list[dict[str, Any]]:
    """Rows of real images, and of both solvers in few steps without guidance and at two scales, of DDIM in many."""
    scales = f"1,{best_scale:g},{embedded.HIGH_SCALE:g}"
    few, many = f"--row={SOLVERS}:{','.join(map(str, STEPS))}:{scales}", f"--row=ddim:{MANY}:{scales}"
    return embedded.real_rows(size) + sampled(out, size, few, many)


def sampled(out: Path, size: Size, *rows: str) -> list[dict[str, Any]]:
    return embedded.sampled(out, "teacher", size, "--model=shapes", "--endpoint_steps=50", *rows)  # the demo's grid


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG of the guidance curve: accuracy, Frechet distance and coverage over the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.0), layout="constrained")
    columns = {
        "accuracy": "accuracy of named attributes",
        "frechet": "Frechet distance",
        "coverage": "coverage distance",
    }
    for panel, (key, title) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        values = [row[key] for row in rows]
        lengths = plot.error_lengths(values, [row["intervals"].get(key) for row in rows])
        panel.errorbar([row["guidance_scale"] for row in rows], values, lengths, marker="o", markersize=4, elinewidth=1)
        panel.set(xlabel="guidance scale", title=title)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--thorough", action="store_true", help=f"{embedded.name_of(THOROUGH)} images per row")
    parser.add_argument("--scan", action="store_true", help="find the best guidance scale anew; drops all other rows")
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes_teacher_rows"))
    args = parser.parse_args()
    here = embedded.RECORD.parent
    size = THOROUGH if args.thorough else DEMO
    if args.scan:
        rows = sampled(args.workdir, size, f"--row=ddim:{MANY}:{','.join(f'{scale:g}' for scale in SCAN)}")
        intervals = [row["intervals"]["accuracy"] for row in rows]
        low, _ = intervals[max(range(len(rows)), key=lambda i: rows[i]["accuracy"])]
        right = [row for row, (_, high) in zip(rows, intervals, strict=True) if high >= low]
        best = min(right, key=lambda row: row["frechet"])["guidance_scale"]
        asset = embedded.asset_hash(assets.path("shapes"))
        record = {"asset": asset, "best_guidance_scale": best, "scan": rows, "tables": {}}
        text = f"{results.table_of(embedded.COLUMNS, rows)}\n{results.noted('', rows)}".rstrip() + "\n"
        files.write_atomic(here / "guidance.md", text)
        draw(rows, here / "guidance.png")
        print(text)
    else:
        record = embedded.teacher_record()
    rows = record["tables"][embedded.name_of(size)] = measured(args.workdir, size, record["best_guidance_scale"])
    files.write_atomic(embedded.RECORD, results.to_json(record, 3))
    print(results.table_of(embedded.COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
