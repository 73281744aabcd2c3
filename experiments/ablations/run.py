"""The ablations of the LCM paper: trains each variant of a study, draws with it in 1, 2, 4 and 8 steps, and compares.

    python -m experiments.ablations.run --study=solver|skip|guidance|ema|loss [--steps=N] [--count=N] [--publish]

    WORKDIR/<variant>/                     a run, and its export/
    WORKDIR/<study>/                       table.md, table.json and rows/ of `lcm_jax.evaluate`, figure.png, study.md

The same command goes on where it was stopped; a model that several studies have is trained once. `--publish` copies the
results to experiments/ablations/<study>.{md,json,png}. Models are measured by `lcm_jax.evaluate`, with the options that
--evaluate gives; those of the embedded models are known. The paper's own runs are

    python -m experiments.ablations.run --study=solver --config=configs/sd21_base_lcm.py \\
        --set=data.path='SHARDS/{00000..00999}.tar' --count=30000 \\
        --evaluate='--source=webdataset --path=HELDOUT.tar --metric=fid:FILE --metric=clip_score:CLIP'
"""

import argparse
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments.ablations import figure, studies
from experiments.ablations.studies import STUDIES, Study
from experiments.shapes_teacher import teacher_rows
from experiments.stage import trained_and_exported, with_steps
from lcm_jax import config as config_lib
from lcm_jax import evaluate, files, pretrained
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.metrics import measures, plot, table
from lcm_jax.runtime.workdir import prepare_workdir

STEPS = (1, 2, 4, 8)
PAPER_SCALE = 9.0  # w = 8, of the paper's tables
# Of the embedded models. The ODE that one step is compared with is the same for every skip and solver.
EMBEDDED = "--source=shapes --metric=shapes --endpoint_steps=100 --batch_size=64"
RESULTS = {"study.md": "md", "table.json": "json", "figure.png": "png"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config; several times")
    parser.add_argument("--steps", type=int, help="training steps in place of the config's; the decay in proportion")
    parser.add_argument("--workdir", type=Path, help="default: runs/ablations/<name of the config>")
    parser.add_argument("--count", type=int, help="pictures per row; default: as lcm_jax.evaluate")
    parser.add_argument("--evaluate", help="options of lcm_jax.evaluate; the embedded models need none")
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
    for number, (name, changes) in enumerate(study.variants.items(), 1):
        folder = workdir / studies.folder(base, changes)
        say(f"variant {number} of {len(study.variants)}: {name}")
        if not made(studies.changed(base, changes), folder, say):
            return 1
        if code := evaluate.main(evaluation(study, folder, name, out, base, args)):
            return code
        jax.clear_caches()
    rows = write(out, study, base, args)
    if args.plot:
        figure.write(rows, list(study.variants), out / "figure.png")
    if args.publish:
        publish(out, Path(__file__).parent, args.study)
    say(f"done: {out}/study.md and table.json")
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
    if args.evaluate is None and not embedded(base):
        raise LcmError(f"--config={args.config} needs --evaluate='--source=... --metric=...': how its models are "
                       "measured")  # fmt: skip
    asked = evaluate.parser().parse_args(evaluation(study, out, "name", out, base, args))
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


def evaluation(
    study: Study, folder: Path, name: str, out: Path, config: ConfigDict, args: argparse.Namespace
) -> list[str]:
    """The command line of `lcm_jax.evaluate` for a variant."""
    own = teacher_rows.best_guidance_scale() if embedded(config) else PAPER_SCALE
    scales = ",".join(f"{scale:g}" for scale in study.scales or (own,))
    row = f"--row=lcm:{','.join(map(str, STEPS))}:{scales}"
    count = [] if args.count is None else [f"--count={args.count}"]
    options = shlex.split(EMBEDDED if args.evaluate is None else args.evaluate)
    return [*options, *count, f"--model={folder / 'export'}", f"--name={name}", row, "--no-plot", f"--out={out}"]


def write(out: Path, study: Study, config: ConfigDict, args: argparse.Namespace) -> list[table.Row]:
    """study.md: the study's question, its table, and the paper's pattern. Returns the rows, in the variants' order."""
    order = list(study.variants)
    rows = [row for row in table.kept(out) if row.model in order]
    rows.sort(key=lambda row: (order.index(row.model), row.guidance_scale, row.steps))
    about = f"{config.train.steps} training steps each, of `{args.config}`."
    text = f"# {study.title}\n\n{table.markdown(rows)}\n{about}\n\n{study.paper}\n"
    with files.new_file(out / "study.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print("\n" + text)
    return rows


def publish(out: Path, folder: Path, study: str) -> None:
    """Copies the results of a study, as <study>.md, .json and .png."""
    for name, ending in RESULTS.items():
        if (out / name).exists():
            shutil.copyfile(out / name, folder / f"{study}.{ending}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
