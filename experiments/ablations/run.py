"""The ablations of the LCM paper: trains each variant of a study, draws with it in 1, 2, 4 and 8 steps, and compares.

    python -m experiments.ablations.run --study=solver|skip|guidance|ema|loss [--count=256] [--steps=N] [--publish]

    WORKDIR/<variant>/                            a run, its export/, and rows/ with what was measured of it
    WORKDIR/<study>/{table.md,table.json,plot.png}

The same command goes on where it was stopped; a model that several studies have is trained once. `--publish` copies the
results to experiments/ablations/<study>.{md,json,png}. Models of other teachers are measured by `lcm_jax.evaluate`,
with the options that it is given by --evaluate; the paper's own runs are

    python -m experiments.ablations.run --study=solver --config=configs/sd21_base_lcm.py \\
        --set=data.path='SHARDS/{00000..00999}.tar' \\
        --evaluate='--source=webdataset --path=HELDOUT.tar --count=30000 --metric=fid:FILE --metric=clip_score:CLIP'
"""

import argparse
import dataclasses
import functools
import json
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.ablations import studies
from experiments.ablations.studies import STUDIES, Study
from experiments.shapes_lcm import table
from experiments.shapes_teacher import teacher_rows
from experiments.stage import trained_and_exported, with_steps
from lcm_jax import config as config_lib
from lcm_jax import evaluate, files, pretrained
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.generate import Generator, settings_for
from lcm_jax.metrics import measures, plot
from lcm_jax.metrics import table as metrics_table
from lcm_jax.pretrained import load_pipeline
from lcm_jax.runtime.workdir import prepare_workdir

STEPS = (1, 2, 4, 8)
COUNT = 256  # pictures per row
PAPER_SCALE = 9.0  # w = 8, of the paper's tables
ENDPOINT_STEPS = 200  # DDIM steps of the ODE that one step is compared with, the same for every skip and solver
RESULTS = {"table.md": "md", "table.json": "json", "plot.png": "png"}
NOTE = (
    "{count} pictures of held-out captions in every row, same noise; Frechet distance to {references} held-out renders "
    "in the scorer's features. One-step error: RMSE to the teacher's guided ODE, solved by {endpoint} DDIM steps "
    "whatever the student's own grid is, in standard deviations of the latents. {steps} training steps each, of "
    "`{config}`."
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config; several times")
    parser.add_argument("--steps", type=int, help="training steps in place of the config's; the decay in proportion")
    parser.add_argument("--workdir", type=Path, help="default: runs/ablations/<name of the config>")
    parser.add_argument("--count", type=int, help=f"pictures per row, of the embedded model; default: {COUNT}")
    parser.add_argument("--evaluate", default="", help="options of lcm_jax.evaluate, for models of other teachers")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="needs matplotlib")
    parser.add_argument("--publish", action="store_true", help="copy the results beside this file")
    return parser.parse_args()


def main() -> int:
    args = parse()
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)

    study, base = STUDIES[args.study], read_config(args)
    workdir = args.workdir or Path("runs/ablations") / args.config.stem
    out = workdir / args.study
    check(study, base, out, args)
    args.count = COUNT if args.count is None else args.count
    rows = []
    for number, (name, changes) in enumerate(study.variants.items(), 1):
        folder = workdir / studies.folder(base, changes)
        say(f"variant {number} of {len(study.variants)}: {name}")
        if not made(studies.changed(base, changes), folder, say):
            return 1
        if embedded(base):
            scales = study.scales or (teacher_rows.best_guidance_scale(),)
            rows += measured(name, folder, scales, args.count, say)
        elif code := evaluate.main(evaluation(study, folder, name, out, args)):
            return code
        jax.clear_caches()
    if embedded(base):
        write(out, study, rows, base, args)
    if args.publish:
        publish(out, Path(__file__).parent, args.study)
    say(f"done: {out}/table.md and table.json")
    return 0


def embedded(config: ConfigDict) -> bool:
    """The teacher is the package's own, whose pictures have a scorer."""
    return config.model.teacher == "shapes"


def check(study: Study, base: ConfigDict, out: Path, args: argparse.Namespace) -> None:
    """Raises LcmError, or ends the program, for what would fail after long work."""
    if not base.distill.w_embedding_dim:
        raise LcmError(f"--config={args.config} trains a student that is not told w; take one with a w embedding")
    if args.plot:
        plot.check()
    if not embedded(base):
        if args.count is not None:
            raise LcmError(f"--count={args.count} is of the embedded model; write it into --evaluate='--count=...'")
        asked = evaluate.parser().parse_args(evaluation(study, out, "name", out, args))
        evaluate.check_flags(asked)
        measures.parse(asked.metric)
        evaluate.read_inputs(asked)
    for changes in study.variants.values():
        config_lib.validate(studies.changed(base, changes))


def read_config(args: argparse.Namespace) -> ConfigDict:
    """The config of the command line, before any variant; --steps moves the decay, too, where --set has none."""
    config = runpy.run_path(str(args.config))["get_config"]()
    changes = studies.parse_settings(args.set)
    if args.steps is not None:
        if args.steps < 1 or "train.steps" in changes:
            raise LcmError(f"--steps={args.steps}: give at least 1, and not beside --set=train.steps")
        config = with_steps(config, args.steps)
    return studies.changed(config, changes)


def made(config: ConfigDict, folder: Path, say: Callable[[str], None]) -> bool:
    """FOLDER/export is the model that `config` trains; False where its training was stopped.

    Raises:
      LcmError: the folder holds a run of another config.
    """
    export = folder / "export"
    if export.exists() and pretrained.read_record(export).get("step") == config.train.steps:
        prepare_workdir(folder, config_lib.resolve(config))  # raises where the run is of another config
        return True
    return trained_and_exported(config, folder, say)


@functools.cache
def judge(count: int) -> table.Judge:
    return table.Judge(count)


@functools.cache
def endpoints(count: int) -> Any:
    return table.endpoints(teacher_rows.teacher(), judge(count), (), ENDPOINT_STEPS)


def measured(
    name: str, folder: Path, scales: Sequence[float], count: int, say: Callable[[str], None]
) -> list[table.Row]:
    """The rows of a variant of the embedded model, each kept in FOLDER/rows as soon as it is there."""
    export = folder / "export"
    record, rows = pretrained.read_record(export), []

    @functools.cache
    def generator() -> Generator:
        return Generator(load_pipeline(export))

    for scale in scales:
        for steps in STEPS:
            path = folder / "rows" / f"{record['step']}_{count}_{scale:g}_{steps}.json"
            if not path.exists():
                settings = settings_for(generator().pipeline, record, "lcm", steps, "trailing")
                row = table.sampler_row(generator(), judge(count), settings, scale, endpoints(count))
                with files.new_file(path) as partial:
                    partial.write_text(json.dumps(dataclasses.asdict(row)) + "\n")
                say(f"scale {scale:g}, {steps} steps: {100 * row.accuracy:.1f} %, FD {row.frechet:.2f}")
            rows.append(dataclasses.replace(table.Row(**files.read_json(path)), method=name))
    return rows


def evaluation(study: Study, folder: Path, name: str, out: Path, args: argparse.Namespace) -> list[str]:
    """The command line of `lcm_jax.evaluate` for a variant."""
    scales = ",".join(f"{scale:g}" for scale in study.scales or (PAPER_SCALE,))
    row = f"--row=lcm:{','.join(map(str, STEPS))}:{scales}"
    options = [*shlex.split(args.evaluate), *([] if args.plot else ["--no-plot"])]
    return [f"--model={folder / 'export'}", f"--name={name}", row, f"--out={out}", *options]


def write(out: Path, study: Study, rows: Sequence[table.Row], config: ConfigDict, args: argparse.Namespace) -> None:
    """table.md, table.json and plot.png of the embedded model's rows."""
    note = NOTE.format(count=args.count, references=table.REFERENCES, endpoint=ENDPOINT_STEPS,
                       steps=config.train.steps, config=args.config)  # fmt: skip
    text = table.markdown(rows, f"{note}\n\n{study.paper}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    about: Mapping[str, Any] = {"study": study.title, "note": note, "paper": study.paper, "config": str(args.config)}
    (out / "table.json").write_text(table.to_json(rows, **about, train_steps=config.train.steps))
    if args.plot:
        plot.write([plotted(row) for row in rows], out / "plot.png")
    print("\n" + text)


def plotted(row: table.Row) -> metrics_table.Row:
    """A row as `lcm_jax.metrics.plot` draws it: a line for each variant and scale."""
    values = {"caption_accuracy": row.accuracy, "shapes_frechet": row.frechet}
    return metrics_table.Row(
        model=row.method, sampler="LCM", steps=row.steps, guidance_scale=row.guidance_scale,
        evaluations=row.evaluations, values=values, milliseconds=row.milliseconds,
        quartiles=(row.milliseconds, row.milliseconds), timings=1, compile_seconds=0.0, comparison={}, settings={},
    )  # fmt: skip


def publish(out: Path, folder: Path, study: str) -> None:
    """Copies the results of a study, as <study>.md, .json and .png."""
    for name, ending in RESULTS.items():
        if (out / name).exists():
            shutil.copyfile(out / name, folder / f"{study}.{ending}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
