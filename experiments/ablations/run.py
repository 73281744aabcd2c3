"""The ablations of the LCM paper: trains each variant of a study, samples it in 1, 2, 4 and 8 steps, and compares.

    python -m experiments.ablations.run --study=solver|skip|guidance|ema|loss [--steps=N] [--count=N] [--publish]

    WORKDIR/<variant>/                     a run, and its export/
    WORKDIR/<study>/                       table.md, table.json and rows/ of `lcm_jax.evaluate`, figure.png, study.md

The same command resumes what was stopped; a model that several studies share is trained once. `--publish` copies the
results to experiments/ablations/<study>.{md,json,png}. Models are measured by `lcm_jax.evaluate` with the options that
--evaluate gives; those of the embedded models are known. The paper's own runs are

    python -m experiments.ablations.run --study=solver --config=configs/sd21_base_lcm.py \\
        --set=data.path='SHARDS/{00000..00999}.tar' --count=30000 \\
        --evaluate='--source=webdataset --path=HELDOUT.tar --metric=fid:FILE --metric=clip_score:CLIP'
"""

import argparse
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments import embedded, measuring, results, stage
from experiments.ablations import figure, studies
from experiments.ablations.studies import STUDIES, Study
from experiments.terminal import teller
from lcm_jax import files
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.metrics import table
from lcm_jax.run import config as config_lib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--steps", type=int, help="training steps in place of the config's; scales the decay with them")
    measuring.add_arguments(parser)
    args = parser.parse_args()
    say = teller()
    study, base = STUDIES[args.study], read_config(args)
    workdir = args.workdir or Path("runs/ablations") / args.config.stem
    out = workdir / args.study
    check(study, base, args)
    row = measuring.rows_flag("lcm", study.scales or embedded.scales(base))
    rows = []
    for number, (name, variant) in enumerate(study.variants.items(), 1):
        changes = studies.changes(base, variant)
        folder = workdir / studies.folder(base, changes)
        say(f"variant {number} of {len(study.variants)}: {name}")
        if not stage.made(stage.changed(base, changes), folder, say):
            return 1
        flags = [f"--model={folder / 'export'}", f"--name={name}", row, "--no-plot", f"--out={out}"]
        rows += measuring.evaluated([*measuring.options(args), *flags])
        jax.clear_caches()
    about = f"{base.train.steps} training steps each, of `{args.config}`."
    text = f"# {study.title}\n\n{table.markdown(rows, latency=False)}\n{about}\n\n{study.paper}\n"
    files.write_atomic(out / "study.md", text)
    print("\n" + text)
    if args.plot:
        figure.write(rows, list(study.variants), out / "figure.png")
    if args.publish:
        here = Path(__file__).parent
        sources = {"md": out / "study.md", "png": out / "figure.png", "json": out / "table.json"}
        results.publish(here, {f"{args.study}.{suffix}": source for suffix, source in sources.items()})
    say(f"done: {out}/study.md and table.json")
    return 0


def check(study: Study, base: ConfigDict, args: argparse.Namespace) -> None:
    """Raises LcmError, or ends the program, for what would otherwise fail after the training."""
    measuring.check(base, args)
    for variant in study.variants.values():
        config_lib.validate(stage.changed(base, studies.changes(base, variant)))


def read_config(args: argparse.Namespace) -> ConfigDict:
    """The config of the command line, before any variant; --steps scales the decay, unless --set gives it."""
    config, changes = stage.read_config(args.config), stage.parse_settings(args.set)
    if args.steps is not None:
        if args.steps < 1 or "train.steps" in changes:
            raise LcmError(f"--steps={args.steps}: give at least 1, and not together with --set=train.steps")
        config = stage.with_steps(config, args.steps)
    return stage.changed(config, changes)


if __name__ == "__main__":
    sys.exit(exit_code(main))
