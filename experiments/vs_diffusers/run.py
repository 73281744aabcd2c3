"""The embedded teacher distilled by `lcm_jax` and by torch, side by side: same data, same draws, same hyper-parameters.

    python -m experiments.vs_diffusers.run [--seeds=3] [--steps=500] [--workdir=runs/vs_diffusers] [--count=256]

For each seed both sides train as configs/shapes_lcm.py says and write a diffusers folder, whose images of held-out
captions in 1, 2, 4 and 8 steps `lcm_jax.evaluate` measures. Writes table.md, table.json and curves.png to the workdir,
with `--publish` beside this file. Finished parts are kept, a stopped training is resumed. Needs lcm_jax[torch].
"""

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import embedded, measuring, results, stage
from experiments.terminal import teller
from experiments.vs_diffusers import compare
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.metrics import plot

CONFIG = "configs/shapes_lcm.py"
TORCH = ("torch", "diffusers", "peft")  # packages that torch_lcd.py imports
SIDES = {"jax": "lcm_jax", "torch": "torch + diffusers"}  # folder -> name
METRICS = {"caption accuracy": "accuracy", "Frechet distance": "frechet"}
SMOOTH = 10  # steps of the running mean in the figure
RESULTS = ("table.md", "table.json", "curves.png")
NOTE = """
{seeds} seed(s), {steps} steps of {batch} images each; {count} images of held-out captions from the same noise,
guidance scale {scale:g}; mean ± standard deviation over seeds. Both sides of a seed have the same data and draws, so
the difference is taken within each seed: its mean over seeds, in standard errors of that mean. It is called seed noise
up to the t quantile that equal sides exceed in 5 % of all cases. Of {verdicts} such verdicts about equal sides
{alarms:.1f} are expected to be "no" by chance; "yes" means that this many seeds show no difference, not that there is
none. One seed decides nothing.

"""
Rows = Mapping[tuple[int, str], list[dict[str, Any]]]  # (seed, side) -> a row for each number of steps


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    embedded.add_arguments(parser, "runs/vs_diffusers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of the training")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps) < 1:
        raise LcmError(f"--seeds={args.seeds} and --steps={args.steps} must be at least 1")
    embedded.check_count(args.count)
    return args


def make_config(seed: int, steps: int) -> ConfigDict:
    """The demo's config for `steps`, its decay in proportion, which logs every step and generates no images."""
    config = stage.with_steps(stage.read_config(CONFIG), steps)
    config.seed = seed
    config.log.every, config.sample.every = 1, 0
    return config


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    plot.check()
    missing = [name for name in TORCH if importlib.util.find_spec(name) is None]
    if missing:
        raise LcmError(f"{', '.join(missing)} is not installed; pip install 'lcm_jax[torch]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from experiments.vs_diffusers import torch_run  # only now it is known that torch is installed

    say = teller()
    makers = {"jax": stage.made, "torch": torch_run.made}
    folders = {(seed, side): args.workdir / f"seed{seed}" / side for seed in range(args.seeds) for side in SIDES}
    for (seed, side), folder in folders.items():
        if not makers[side](make_config(seed, args.steps), folder, say):
            return 1
    row, rows = measuring.rows_flag("lcm", (embedded.best_guidance_scale(),)), {}
    for key, folder in folders.items():
        say(f"generating {args.count} images per row with {folder / 'export'}")
        flags = args.count, f"--model={folder / 'export'}", row
        rows[key] = [embedded.as_dict(one) for one in embedded.evaluated(folder / f"table_{args.count}", "LCM", *flags)]
    print("\n" + write_results(args, rows))
    if args.publish:
        results.publish(Path(__file__).parent, {name: args.workdir / name for name in RESULTS})
    say(f"done: {', '.join(str(args.workdir / name) for name in RESULTS)}")
    return 0


def write_results(args: argparse.Namespace, rows: Rows) -> str:
    """Writes RESULTS to the workdir; returns the table."""
    curves = {key: compare.read_curve(args.workdir / f"seed{key[0]}" / key[1] / "metrics.jsonl") for key in rows}
    apart = {seed: compare.apart(curves[seed, "jax"], curves[seed, "torch"]) for seed in range(args.seeds)}
    found = [
        compare.agreement(metric, steps, *([rows[seed, side][i][key] for seed in range(args.seeds)] for side in SIDES))
        for metric, key in METRICS.items()
        for i, steps in enumerate(measuring.STEPS)
    ]
    note = NOTE.format(
        seeds=args.seeds,
        steps=args.steps,
        batch=make_config(0, args.steps).data.batch_size,
        count=args.count,
        scale=rows[0, "jax"][0]["guidance_scale"],
        verdicts=len(found),
        alarms=compare.FALSE_ALARMS * len(found),
    )
    heads = ["seed", "largest difference of the losses", "median", f"in the first {compare.FIRST} steps"]
    lines = [[str(seed), *(f"{value:.1e}" for value in one.values())] for seed, one in apart.items()]
    text = compare.markdown(found, list(SIDES.values())) + note
    text += results.table([*heads, "of the last tenth's means"], lines)
    (args.workdir / "table.md").write_text(text)
    table = {"config": CONFIG, "seeds": args.seeds, "steps": args.steps, "count": args.count, "curves": apart}
    every = [{"seed": seed, "side": side} | row for (seed, side), both in rows.items() for row in both]
    table |= {"agreement": found, "rows": every}
    (args.workdir / "table.json").write_text(results.to_json(table, 2))
    draw(curves, args.workdir / "curves.png")
    return text


def draw(curves: Mapping[tuple[int, str], Mapping[int, float]], path: Path) -> None:
    """A PNG of both sides' losses, as running means: one colour per seed, torch dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    panel = figure.subplots()
    for (seed, side), curve in curves.items():
        steps = sorted(curve)
        window = min(SMOOTH, len(steps))
        ends = range(window, len(steps) + 1)
        panel.plot(
            [steps[end - 1] for end in ends],
            [statistics.fmean(curve[step] for step in steps[end - window : end]) for end in ends],
            color=f"C{seed}",
            linewidth=1.0,
            linestyle="--" if side == "torch" else "-",
            label=f"seed {seed}, {SIDES[side]}",
        )
    panel.set(xlabel="step", ylabel=f"loss, running mean of {SMOOTH} steps", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(exit_code(main))
