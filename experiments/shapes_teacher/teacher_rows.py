"""The teacher's rows of the demo's table, and the guidance scale it is best at; recorded with the asset's hash.

    python -m experiments.shapes_teacher.teacher_rows --count=256 [--scan]

--scan first measures DDIM with 50 steps over guidance scales and takes the one of best caption accuracy (ties: the
smaller Frechet distance). Tables of several counts stand side by side in teacher_rows.json.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.shapes_lcm import table
from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline
from lcm_jax.sampling.generator import Generator, Settings, settings_for

FILE = Path(__file__).with_name("teacher_rows.json")
SAMPLERS = ("ddim", "dpm_solver_pp_2m")
STEPS = (1, 2, 4, 8, 50)
SCAN = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
HIGH_SCALE = 7.5
SOLVER_STEPS = 50


@functools.cache
def teacher() -> Generator:
    return Generator(load_pipeline(assets.path("shapes")))


def settings(sampler: str, steps: int) -> Settings:
    """Trailing spacing, the rest from the teacher's scheduler config."""
    return settings_for(teacher().pipeline, {}, sampler, steps, "trailing")


def compute(judge: table.Judge, scales: Sequence[float]) -> list[table.Row]:
    """Rows of both solvers at every number of steps and scale."""
    generator = teacher()
    ends = table.endpoints(generator, judge, scales, SOLVER_STEPS)
    return [
        table.sampler_row(generator, judge, settings(sampler, steps), scale, ends)
        for scale in scales
        for sampler in SAMPLERS
        for steps in STEPS
    ]


def scan(judge: table.Judge) -> list[table.Row]:
    """DDIM with 50 steps over guidance scales."""
    generator = teacher()
    return [table.sampler_row(generator, judge, settings("ddim", 50), scale) for scale in SCAN]


def read() -> dict:
    """teacher_rows.json. Raises LcmError if it belongs to another asset."""
    record = json.loads(FILE.read_text())
    found = table.asset_hash(assets.path("shapes"))
    if record["asset"] != found:
        raise LcmError(
            f"{FILE.name} was measured on asset {record['asset'][:12]}, this one is {found[:12]}; run "
            "python -m experiments.shapes_teacher.teacher_rows --scan --count=256"
        )
    return record


def best_guidance_scale() -> float:
    return read()["best_guidance_scale"]


def recorded(count: int) -> list[table.Row]:
    """The recorded rows of this many pictures, marked as such."""
    tables = read()["tables"]
    if str(count) not in tables:
        raise LcmError(f"no teacher rows are recorded for {count} pictures, only for {', '.join(tables)}; use --full")
    return [dataclasses.replace(table.Row(**row), recorded=True) for row in tables[str(count)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--scan", action="store_true")
    args = parser.parse_args()
    judge = table.Judge(args.count)
    if args.scan:
        rows = scan(judge)
        real = judge.real_rows(teacher())
        best = max(rows, key=lambda row: (row.accuracy, -row.frechet))
        record = {
            "asset": table.asset_hash(assets.path("shapes")),
            "best_guidance_scale": best.guidance_scale,
            "real": [dataclasses.asdict(row) for row in real],
            "scan": [dataclasses.asdict(row) for row in rows],
            "tables": {},
        }
        print(table.markdown([*real, *rows], f"{args.count} pictures per row."))
    else:
        record = read()
    rows = compute(judge, (record["best_guidance_scale"], HIGH_SCALE))
    record["tables"][str(args.count)] = [dataclasses.asdict(row) for row in rows]
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(table.markdown(rows, f"{args.count} pictures per row."))


if __name__ == "__main__":
    main()
