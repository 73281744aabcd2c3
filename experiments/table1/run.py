"""Table 1 of the LCM paper on a teacher and its LCM: DDIM, DPM-Solver, DPM-Solver++ and LCM in 1, 2, 4 and 8 steps.

    python -m experiments.table1.run [--count=N] [--publish]

    WORKDIR/                               a run of the config, and its export/; trained now if it is not there
    WORKDIR/table1/                        table.md, table.json, plot.png and rows/ of `lcm_jax.evaluate`, and result.md

result.md is laid out as the paper's table, with the paper's numbers below. The same command goes on where it was
stopped; `--publish` copies the results beside this file. The paper's own table is

    python -m experiments.table1.run --config=configs/sd21_base_lcm.py --set=data.path='SHARDS/{00000..00999}.tar' \\
        --count=30000 --evaluate='--source=webdataset --path=HELDOUT.tar --metric=fid:FILE --metric=clip_score:CLIP'
"""

import argparse
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments import measuring, stage
from experiments.shapes_teacher import teacher_rows
from experiments.table1 import paper
from experiments.terminal import teller
from lcm_jax import evaluate, files
from lcm_jax.errors import exit_code
from lcm_jax.metrics import table
from lcm_jax.run import config as config_lib

BASELINES = {"ddim": "DDIM", "dpm_solver_2m": "DPM-Solver", "dpm_solver_pp_2m": "DPM-Solver++"}
METHODS = {**BASELINES, "lcm": "LCM"}
UNGUIDED = 1.0  # a scale at which the teacher, too, is asked once a step
RESULTS = ("result.md", "table.json", "plot.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measuring.add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse()
    say = teller()
    config = stage.changed(runpy.run_path(str(args.config))["get_config"](), stage.parse_settings(args.set))
    measuring.check(config, args)
    config_lib.validate(config)
    workdir = args.workdir or Path("runs") / args.config.stem
    out = workdir / "table1"
    if not stage.made(config, workdir, say):
        return 1
    scales = guidance_scales(config)
    unguided = (UNGUIDED,) if measuring.embedded(config) else ()
    for model, name, rows in (
        (config.model.teacher, "teacher", measuring.row(",".join(BASELINES), (*scales, *unguided))),
        (str(workdir / "export"), "student", measuring.row("lcm", scales)),
    ):
        say(f"drawing with the {name}")
        asked = [f"--model={model}", f"--name={name}", rows, f"--out={out}"]
        if code := evaluate.main([*measuring.options(args), *asked, *([] if args.plot else ["--no-plot"])]):
            return code
    text = result(measuring.asked_for(out, args, (*scales, *unguided)))
    with files.new_file(out / "result.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print("\n" + text)
    if args.publish:
        for name in RESULTS:
            if (out / name).exists():
                shutil.copyfile(out / name, Path(__file__).with_name(name))
    say(f"done: {out}/result.md and table.json")
    return 0


def guidance_scales(config: ConfigDict) -> tuple[float, ...]:
    """The scale that fits the model; of the embedded one, a high scale, too, as the paper's is for its teacher."""
    high = (teacher_rows.HIGH_SCALE,) if measuring.embedded(config) else ()
    return (*measuring.scales(config), *high)


def result(rows: Sequence[table.Row]) -> str:
    """The rows as the paper lays them out, a table for each guidance scale, and the paper's; bold: best."""
    keys = [key for key in table.columns(rows) if all(row.values.get(key) is not None for row in rows)]
    texts = []
    for scale in sorted({row.guidance_scale for row in rows}):
        values = {
            METHODS[sampler]: [[by_steps[n].values[key] for n in measuring.STEPS] for key in keys]
            for sampler in METHODS
            for by_steps in [{r.steps: r for r in rows if (r.sampler, r.guidance_scale) == (sampler, scale)}]
            if by_steps
        }
        unguided = ", no guidance: one evaluation of the teacher a step, too" if scale == UNGUIDED else ""
        texts += [f"Guidance scale {scale:g}{unguided}:", laid_out(values, [table.COLUMNS[key] for key in keys])]
    notes = "\n".join(table.notes(rows))
    own = [table.COLUMNS["fid"], table.COLUMNS["clip_score"]]
    texts += [notes, "The paper's, on its models (FID, CLIP score):", laid_out(paper.ROWS, own), paper.NOTE]
    return "\n\n".join(texts) + "\n"


def laid_out(values: dict[str, Sequence[Sequence[float]]], columns: Sequence[table.Column]) -> str:
    """A Markdown table: a row for each method, a group of 1, 2, 4, 8 steps for each column."""
    heads = [f"{column.title}, {n} step{'s' * (n > 1)}" for column in columns for n in measuring.STEPS]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    best = [
        [(max if column.higher_is_better else min)(groups[c][s] for groups in values.values()) for s in range(4)]
        for c, column in enumerate(columns)
    ]
    for name, groups in values.items():
        cells = [
            f"**{column.form.format(value)}**" if value == best[c][s] else column.form.format(value)
            for c, column in enumerate(columns)
            for s, value in enumerate(groups[c])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
