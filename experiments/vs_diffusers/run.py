"""The embedded teacher distilled by `lcm_jax` and by torch, side by side: same data, same draws, same hyper-parameters.

    python -m experiments.vs_diffusers.run [--seeds=3] [--steps=500] [--workdir=runs/vs_diffusers] [--count=256]

For each seed both sides train as configs/shapes_lcm.py says, and write a diffusers folder; each folder then draws
held-out captions in 1, 2, 4 and 8 steps, by the code of experiments/shapes_lcm/table.py. Writes table.md, table.json
and curves.png to the workdir, with `--publish` beside this file. What is there is not made again, a training that was
stopped goes on. Needs lcm_jax[torch].
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import runpy
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from experiments import stage
from experiments.shapes_lcm import table
from experiments.shapes_teacher import teacher_rows
from experiments.terminal import teller
from experiments.vs_diffusers import compare
from lcm_jax import files, pretrained
from lcm_jax.errors import LcmError
from lcm_jax.metrics import plot
from lcm_jax.pretrained import load_pipeline
from lcm_jax.run import config as config_lib
from lcm_jax.sampling.generator import Generator, settings_for

CONFIG = "configs/shapes_lcm.py"
TORCH = ("torch", "diffusers", "peft")  # packages that torch_lcd.py imports
SIDES = {"jax": "lcm_jax", "torch": "torch + diffusers"}  # folder -> name
STEPS = (1, 2, 4, 8)
METRICS = {"caption accuracy": "accuracy", "Frechet distance": "frechet"}
SMOOTH = 10  # steps of the running mean in the figure
RESULTS = ("table.md", "table.json", "curves.png")
NOTE = """
{seeds} seed(s), {steps} steps of {batch} pictures each; {count} pictures of held-out captions from the same noise,
guidance scale {scale:g}; mean ± standard deviation over seeds. Both sides of a seed have the same data and draws, so
the difference is taken within each seed: its mean over seeds in standard errors of that mean, which is called seed
noise up to the t quantile that equal sides exceed in 5 % of all cases. Of {verdicts} such verdicts about equal sides
{alarms:.1f} are expected to be "no" by chance; "yes" says that this many seeds show no difference, not that there is
none. One seed decides nothing.

| seed | largest difference of the losses | median | in the first {first} steps | of the last tenth's means |
|---|---|---|---|---|
{curves}
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--workdir", type=Path, default=Path("runs/vs_diffusers"))
    parser.add_argument("--count", type=int, default=256, help="pictures per row")
    parser.add_argument("--publish", action="store_true", help="copy the results beside this file")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps) < 1:
        raise LcmError("--seeds and --steps must be at least 1")
    table.check_count(args.count)
    return args


def make_config(seed: int, steps: int) -> ConfigDict:
    """The demo's config for `steps`, its decay in proportion, with a line for every step and no pictures on the way."""
    config = stage.with_steps(runpy.run_path(CONFIG)["get_config"](), steps)
    config.seed = seed
    config.log.every, config.sample.every = 1, 0
    return config


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    plot.check()  # before long work
    missing = [name for name in TORCH if importlib.util.find_spec(name) is None]
    if missing:
        raise LcmError(f"{', '.join(missing)} is not installed; pip install 'lcm_jax[torch]'")
    say = teller()
    for seed in range(args.seeds):
        for side in SIDES:
            if not made(make_config(seed, args.steps), args.workdir / f"seed{seed}", side, say):
                return 1
    judge = table.Judge(args.count)
    rows = {
        (seed, side): measured(args.workdir / f"seed{seed}" / side, judge, say)
        for seed in range(args.seeds)
        for side in SIDES
    }
    write_results(args, rows)
    print("\n" + (args.workdir / "table.md").read_text())
    if args.publish:
        for name in RESULTS:
            shutil.copyfile(args.workdir / name, Path(__file__).parent / name)
    say(f"done: {', '.join(str(args.workdir / name) for name in RESULTS)}")
    return 0


def made(config: ConfigDict, folder: Path, side: str, say: Callable[[str], None]) -> bool:
    """Trains one side in FOLDER/SIDE unless its export is there, made by as many steps. False where it was stopped.

    Raises:
      LcmError: what is there was trained with another config, or for more steps.
    """
    done, resolved = folder / side / "trained.json", config_lib.resolve(config)
    if done.exists():
        before = json.loads(done.read_text())
        stage.check_same(before["config"], resolved, folder / side)
        stage.check_not_beyond(before["steps"], config, folder / side)
        if before["steps"] == config.train.steps:
            return True
    for stale in (done, folder / side / "rows.json"):
        stale.unlink(missing_ok=True)
    if side == "jax":
        if not stage.trained_and_exported(config, folder / side, say):
            return False
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from experiments.vs_diffusers import torch_run  # torch, which nothing else here needs

        shutil.rmtree(folder / side / "export", ignore_errors=True)
        torch_run.trained_and_exported(config, folder / side, say)
    record = {"steps": config.train.steps, "config": json.loads(config_lib.to_json(resolved))}
    files.write_text(done, json.dumps(record) + "\n")
    return True


def measured(folder: Path, judge: table.Judge, say: Callable[[str], None]) -> list[table.Row]:
    """The rows of FOLDER/export at each number of steps, kept in FOLDER/rows.json."""
    path = folder / "rows.json"
    if path.exists():
        rows = [table.Row(**row) for row in json.loads(path.read_text())["rows"]]
        if [row.count for row in rows] == [judge.count] * len(STEPS):
            return rows
        path.unlink()
    say(f"drawing {judge.count} pictures per row with {folder / 'export'}")
    generator, record = Generator(load_pipeline(folder / "export")), pretrained.read_record(folder / "export")
    rows = []
    for steps in STEPS:
        settings = settings_for(generator.pipeline, record, "lcm", steps, "trailing")
        rows.append(table.sampler_row(generator, judge, settings, teacher_rows.best_guidance_scale()))
    files.write_text(path, table.to_json(rows))
    return rows


def agreements(rows: Mapping[tuple[int, str], list[table.Row]]) -> list[compare.Agreement]:
    """Every metric at every number of steps, over the seeds."""
    seeds = sorted({seed for seed, _ in rows})

    def values(side: str, field: str, place: int) -> list[float]:
        return [getattr(rows[seed, side][place], field) for seed in seeds]

    return [
        compare.agreement(metric, steps, *(values(side, field, place) for side in SIDES))
        for metric, field in METRICS.items()
        for place, steps in enumerate(STEPS)
    ]


def write_results(args: argparse.Namespace, rows: Mapping[tuple[int, str], list[table.Row]]) -> None:
    """RESULTS in the workdir."""
    curves = {
        (seed, side): compare.read_curve(args.workdir / f"seed{seed}" / side / "metrics.jsonl") for seed, side in rows
    }
    apart = {seed: compare.apart(curves[seed, "jax"], curves[seed, "torch"]) for seed in range(args.seeds)}
    found = agreements(rows)
    lines = [
        f"| {seed} | {a.maximum:.1e} | {a.median:.1e} | {a.first:.1e} | {a.end:.1e} |" for seed, a in apart.items()
    ]
    config = make_config(0, args.steps)
    note = NOTE.format(
        seeds=args.seeds,
        steps=args.steps,
        batch=config.data.batch_size,
        count=args.count,
        scale=rows[0, "jax"][0].guidance_scale,
        first=compare.FIRST,
        curves="\n".join(lines),
        verdicts=len(found),
        alarms=compare.FALSE_ALARMS * len(found),
    )
    (args.workdir / "table.md").write_text(compare.markdown(found, tuple(SIDES.values())) + note)
    text = {
        "config": CONFIG,
        "seeds": args.seeds,
        "steps": args.steps,
        "count": args.count,
        "curves": {seed: dataclasses.asdict(a) for seed, a in apart.items()},
        "agreement": [dataclasses.asdict(one) | {"agrees": one.agrees} for one in found],
        "rows": [
            {"seed": seed, "side": side} | dataclasses.asdict(row)
            for (seed, side), both in rows.items()
            for row in both
        ],
    }
    (args.workdir / "table.json").write_text(json.dumps(text, indent=1) + "\n")
    draw(curves, args.workdir / "curves.png")


def draw(curves: Mapping[tuple[int, str], Mapping[int, float]], path: Path) -> None:
    """A PNG of both sides' losses over each other, running means, a colour for each seed; torch's are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    panel = figure.subplots()
    for (seed, side), curve in curves.items():
        steps = sorted(curve)
        window = min(SMOOTH, len(steps))
        ends = range(window, len(steps) + 1)
        means = [statistics.fmean(curve[step] for step in steps[end - window : end]) for end in ends]
        panel.plot(
            [steps[end - 1] for end in ends],
            means,
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
    try:
        sys.exit(main())
    except (LcmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
