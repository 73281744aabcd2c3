"""The teacher's rows of the demo's table and its best guidance scale, recorded in teacher_rows.json.

    python -m experiments.shapes_teacher.teacher_rows --count=256 [--scan]

--scan first measures DDIM with 50 steps over guidance scales and keeps the one with the best caption accuracy (ties:
the smaller Frechet distance). Tables of several counts stand side by side; the asset's hash says what they belong to.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import embedded, results
from lcm_jax import assets, files
from lcm_jax.ending import exit_code

SOLVERS = "ddim,dpm_solver_pp_2m"
STEPS = (1, 2, 4, 8, 50)
SCAN = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def measured(count: int, best_scale: float) -> list[dict[str, Any]]:
    """Rows of renders, of their reconstructions, and of both solvers at every number of steps and both scales."""
    rows = []
    for method, images in embedded.real_images(count).items():
        accuracy, frechet = embedded.judged(images)
        row = {"method": method, "accuracy": accuracy, "frechet": frechet, "count": count}
        rows.append(dict.fromkeys(key for key, _ in embedded.COLUMNS.values()) | row)
    steps, scales = ",".join(map(str, STEPS)), (best_scale, embedded.HIGH_SCALE)
    return rows + sampled(count, *(f"--row={SOLVERS}:{steps}:{scale:g}" for scale in scales))


def sampled(count: int, *rows: str) -> list[dict[str, Any]]:
    flags = "--model=shapes", "--endpoint_steps=50"  # the demo's solver grid
    with tempfile.TemporaryDirectory() as out:
        found = embedded.evaluated(Path(out), "teacher", count, *flags, *rows)
    return [embedded.as_dict(row) for row in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=256, help="images per row")
    parser.add_argument("--scan", action="store_true", help="find the best guidance scale anew; drops all other rows")
    args = parser.parse_args()
    if args.scan:
        rows = sampled(args.count, f"--row=ddim:50:{','.join(map(str, SCAN))}")
        best = max(rows, key=lambda row: (row["accuracy"], -row["frechet"]))["guidance_scale"]
        asset = embedded.asset_hash(assets.path("shapes"))
        record = {"asset": asset, "best_guidance_scale": best, "scan": rows, "tables": {}}
        print(results.table_of(embedded.COLUMNS, rows))
    else:
        record = embedded.teacher_record()
    rows = record["tables"][str(args.count)] = measured(args.count, record["best_guidance_scale"])
    files.write_atomic(embedded.RECORD, results.to_json(record, 3))
    print(results.table_of(embedded.COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
