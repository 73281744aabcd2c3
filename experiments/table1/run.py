"""Table 1 of the LCM paper on a teacher and its LCM: DDIM, DPM-Solver, DPM-Solver++ and LCM in 1, 2, 4 and 8 steps.

    python -m experiments.table1.run [--count=N] [--publish]

    WORKDIR/                               a run of the config, and its export/; trained now if it is missing
    WORKDIR/table1/                        table.md, table.json, plot.png and rows/ of `lcm_jax.evaluate`; result.md;
                                           evaluations.png: quality against network evaluations

result.md has the layout of the paper's table, with the paper's numbers below. The same command resumes what was
stopped; `--publish` copies the results beside this file. The paper's own table is

    python -m experiments.table1.run --config=configs/sd21_base_lcm.py --set=data.path='SHARDS/{00000..00999}.tar' \\
        --count=30000 --evaluate='--source=webdataset --path=HELDOUT.tar --metric=fid:FILE --metric=clip_score:CLIP'
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import embedded, measuring, results, stage
from experiments.table1 import figure, paper
from experiments.terminal import teller
from lcm_jax import files
from lcm_jax.ending import exit_code
from lcm_jax.metrics import table
from lcm_jax.run import config as config_lib

BASELINES = {"ddim": "DDIM", "dpm_solver_2m": "DPM-Solver", "dpm_solver_pp_2m": "DPM-Solver++"}
METHODS = {**BASELINES, "lcm": "LCM"}
Measured = tuple[float, tuple[float, float] | None]  # a value and its interval
UNGUIDED = 1.0  # at this scale the teacher, too, takes one network evaluation a step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measuring.add_arguments(parser)
    args = parser.parse_args()
    say = teller()
    config = stage.changed(stage.read_config(args.config), stage.parse_settings(args.set))
    measuring.check(config, args)
    config_lib.validate(config)
    workdir = args.workdir or Path("runs") / args.config.stem
    out = workdir / "table1"
    if not stage.made(config, workdir, say):
        return 1
    scales, unguided = embedded.scales(config), ()
    if measuring.is_embedded(config):
        scales, unguided = (*scales, embedded.HIGH_SCALE), (UNGUIDED,)
    rows = []
    for model, name, row in (
        (config.model.teacher, "teacher", measuring.rows_flag(",".join(BASELINES), (*scales, *unguided))),
        (str(workdir / "export"), "student", measuring.rows_flag("lcm", scales)),
    ):
        say(f"generating with the {name}")
        flags = [*measuring.options(args), f"--model={model}", f"--name={name}", row, f"--out={out}"]
        rows += measuring.evaluated([*flags, *([] if args.plot else ["--no-plot"])])
    text = result(rows)
    files.write_atomic(out / "result.md", text)
    print("\n" + text)
    if args.plot:
        figure.write(rows, out / "evaluations.png")
    if args.publish:
        names = ("result.md", "plot.png", "evaluations.png", "table.json")
        results.publish(Path(__file__).parent, {name: out / name for name in names})
    say(f"done: {out}/result.md and table.json")
    return 0


def result(rows: Sequence[table.Row]) -> str:
    """The rows in the paper's layout, one table per guidance scale, and the paper's own table; the best is bold."""
    keys = [key for key in figure.KEYS if all(row.values.get(key) is not None for row in rows)]
    texts = []
    for scale in sorted({row.guidance_scale for row in rows}):
        values = {
            METHODS[sampler]: [
                [(by_steps[n].values[key], by_steps[n].intervals.get(key)) for n in measuring.STEPS] for key in keys
            ]
            for sampler in METHODS
            for by_steps in [{r.steps: r for r in rows if (r.sampler, r.guidance_scale) == (sampler, scale)}]
            if by_steps
        }
        unguided = ", no guidance: one evaluation of the teacher a step" if scale == UNGUIDED else ""
        texts += [f"Guidance scale {scale:g}{unguided}:", laid_out(values, [table.COLUMNS[key] for key in keys])]
    notes = "\n".join(table.notes(rows))
    own = [table.COLUMNS["fid"], table.COLUMNS["clip_score"]]
    papers = {name: [[(value, None) for value in group] for group in groups] for name, groups in paper.ROWS.items()}
    texts += [notes, "The paper's, on its models (FID, CLIP score):", laid_out(papers, own), paper.NOTE]
    return "\n\n".join(text.rstrip() for text in texts) + "\n"


def laid_out(values: dict[str, Sequence[Sequence[Measured]]], columns: Sequence[table.Column]) -> str:
    """A Markdown table: one row per method, one group of 1, 2, 4, 8 steps per column."""
    heads = [f"{column.title}, {n} step{'s' * (n > 1)}" for column in columns for n in measuring.STEPS]
    best = [
        [(max if column.higher_is_better else min)(groups[c][s][0] for groups in values.values()) for s in range(4)]
        for c, column in enumerate(columns)
    ]
    lines = [
        [name]
        + [
            f"**{table.shown(column.form, value, ends)}**"
            if value == best[c][s]
            else table.shown(column.form, value, ends)
            for c, column in enumerate(columns)
            for s, (value, ends) in enumerate(groups[c])
        ]
        for name, groups in values.items()
    ]
    return results.table(["method", *heads], lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
