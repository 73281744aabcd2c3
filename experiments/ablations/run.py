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
import shutil
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments import measuring, stage
from experiments.ablations import figure, studies
from experiments.ablations.studies import STUDIES, Study
from experiments.terminal import teller
from lcm_jax import evaluate, files
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.metrics import table
from lcm_jax.run import config as config_lib

RESULTS = {"study.md": "md", "table.json": "json", "figure.png": "png"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--steps", type=int, help="training steps in place of the config's; the decay in proportion")
    measuring.add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse()
    say = teller()
    study, base = STUDIES[args.study], read_config(args)
    workdir = args.workdir or Path("runs/ablations") / args.config.stem
    out = workdir / args.study
    check(study, base, args)
    row = measuring.row("lcm", study.scales or measuring.scales(base))
    for number, (name, changes) in enumerate(study.variants.items(), 1):
        folder = workdir / studies.folder(base, changes)
        say(f"variant {number} of {len(study.variants)}: {name}")
        if not stage.made(stage.changed(base, changes), folder, say):
            return 1
        options = [f"--model={folder / 'export'}", f"--name={name}", row, "--no-plot", f"--out={out}"]
        if code := evaluate.main([*measuring.options(args), *options]):
            return code
        jax.clear_caches()
    rows = write(out, study, base, args)
    if args.plot:
        figure.write(rows, list(study.variants), out / "figure.png")
    if args.publish:
        publish(out, Path(__file__).parent, args.study)
    say(f"done: {out}/study.md and table.json")
    return 0


def check(study: Study, base: ConfigDict, args: argparse.Namespace) -> None:
    """Raises LcmError, or ends the program, for what would fail after long work."""
    measuring.check(base, args)
    for changes in study.variants.values():
        config_lib.validate(stage.changed(base, changes))


def read_config(args: argparse.Namespace) -> ConfigDict:
    """The config of the command line, before any variant; --steps moves the decay, too, where --set has none."""
    config = runpy.run_path(str(args.config))["get_config"]()
    changes = stage.parse_settings(args.set)
    if args.steps is not None:
        if args.steps < 1 or "train.steps" in changes:
            raise LcmError(f"--steps={args.steps}: give at least 1, and not beside --set=train.steps")
        config = stage.with_steps(config, args.steps)
    return stage.changed(config, changes)


def write(out: Path, study: Study, config: ConfigDict, args: argparse.Namespace) -> list[table.Row]:
    """study.md: the study's question, its table, and the paper's pattern. Returns the rows, in the variants' order."""
    order = list(study.variants)
    scales = study.scales or measuring.scales(config)
    rows = [row for row in measuring.asked_for(out, args, scales) if row.model in order]
    rows.sort(key=lambda row: (order.index(row.model), row.guidance_scale, row.steps))
    about = f"{config.train.steps} training steps each, of `{args.config}`."
    text = f"# {study.title}\n\n{table.markdown(rows, latency=False)}\n{about}\n\n{study.paper}\n"
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
