"""Maps and samplers beside LCM's on the embedded world: what few steps make of the teacher's guided paths.

    python -m experiments.methods.run [--workdir=runs/methods] [--seeds=3] [--count=2000] [--steps=N]
                                      [--only=teacher,lcm,phased2,phased4,phased8,staged,rival] [--publish]

    WORKDIR/seed<n>/<model>/                  a run, and its export/
    WORKDIR/{evaluate,latents,rival}/         rows and latents, kept
    WORKDIR/costs/                            time of a training step and of an image, kept
    WORKDIR/{table.md,table.json,figure.png}  of the models asked for, written after every seed

The same command resumes what was stopped, and takes what another call with fewer seeds or models has made. With --steps
all of it is in WORKDIR/<steps>-steps/. `--publish` copies the results beside this file.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import embedded, measuring, results, stage
from experiments.methods import cost, figure, latents, report, rival
from experiments.methods.arms import ARMS, Arm, config_of
from experiments.terminal import teller
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.metrics import plot, table

PARTS = ("teacher", *ARMS, "rival")
COVERAGE = 512  # images that coverage is measured with, embedded.EACH of each caption, if --count is not smaller
# The one-step error of lcm_jax.evaluate, which is always measured, is not used here.
UNUSED = "--endpoint_steps=1"
RESULTS = ("table.md", "table.json", "figure.png")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    embedded.add_arguments(parser, "runs/methods")
    parser.set_defaults(count=2000)
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--steps", type=int, help="of every training, instead of the configs'")
    parser.add_argument("--only", default=",".join(PARTS), help="what is trained and measured, with commas")
    args = parser.parse_args(argv)
    args.only = [name for name in args.only.split(",") if name]
    if unknown := set(args.only) - set(PARTS):
        raise LcmError(f"--only: there is no {', '.join(sorted(unknown))}; give some of {', '.join(PARTS)}")
    if args.seeds < 1:
        raise LcmError(f"--seeds={args.seeds} must be at least 1")
    stages = max(len(arm.phases) for arm in ARMS.values())
    if args.steps is not None and args.steps <= stages:
        raise LcmError(f"--steps={args.steps}: {stages} stages need more")
    embedded.check_count(args.count)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    plot.check()
    say, workdir = teller(), args.workdir / (f"{args.steps}-steps" if args.steps else "")
    scales = embedded.best_guidance_scale(), embedded.HIGH_SCALE
    arms = {name: arm for name, arm in ARMS.items() if name in args.only}
    trained = {name: config_of(arm, 0, args.steps).train.steps for name, arm in arms.items()}
    about = {"count": args.count, "coverage_count": min(args.count, COVERAGE), "training_steps": trained}
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "alike": [], "training": [], "sampling": [], "rival": []}
    if "teacher" in args.only:
        found["rows"] = of_teacher(workdir, scales, args.count)
    for seed in range(args.seeds):
        images = {}
        for name, arm in arms.items():
            folder = workdir / f"seed{seed}" / name
            if not stage.made(config_of(arm, seed, args.steps), folder, say):
                return 1
            say(f"rows of {name}, seed {seed}")
            rows, images[name] = of_model(workdir, name, seed, scales, args.count)
            found["rows"] += rows
            jax.clear_caches()
        found["alike"] += alike(images, seed, scales)
        if arms and seed == 0:
            say("cost of training and of images")
            found |= costs(workdir, arms)
        if "rival" in args.only:
            rows = rival.rows_of(workdir / "rival", seed, args.steps, about["coverage_count"], say)
            if rows is None:
                return 1
            found["rival"] += rows
        text = write_results(workdir, found, about | {"seeds": seed + 1})
    print("\n" + text)
    if args.publish:
        results.publish(Path(__file__).parent, {name: workdir / name for name in RESULTS})
    say(f"done: {', '.join(str(workdir / name) for name in RESULTS)}")
    return 0


def sizes(count: int) -> embedded.Size:
    return ((count, 1), (min(count, COVERAGE), embedded.EACH))


def evaluated(workdir: Path, name: str, count: int, *flags: str) -> list[dict[str, Any]]:
    """Rows of `lcm_jax.evaluate`: coverage from the second of `sizes`, the rest from the first."""
    sets = [
        embedded.evaluated(workdir / "evaluate" / f"{n}x{each}", name, n, UNUSED, *flags, each=each)
        for n, each in sizes(count)
    ]
    return [as_dict(*rows) for rows in zip(*sets, strict=True)]


def as_dict(row: table.Row, repeated: table.Row) -> dict[str, Any]:
    return {
        "sampler": row.sampler,
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "evaluations": row.evaluations,
        "accuracy": row.values["caption_accuracy"],
        "frechet": row.values["shapes_frechet"],
        "coverage": repeated.values["coverage_distance"],
    }


def of_teacher(workdir: Path, scales: Sequence[float], count: int) -> list[dict[str, Any]]:
    """Its rows by 50 steps of DDIM: the recorded ones, if these have as many captions."""
    if count == embedded.THOROUGH[0][0]:
        tables = [embedded.recorded_rows(size) for size in (embedded.THOROUGH, embedded.DEMO)]
        sets = [
            [row for row in rows if (row["method"], row["steps"]) == (embedded.NAMES["ddim"], 50)] for rows in tables
        ]
        keys = ("steps", "guidance_scale", "evaluations", "accuracy", "frechet")
        found = [
            {key: row[key] for key in keys} | {"coverage": few["coverage"]} for row, few in zip(*sets, strict=True)
        ]
        found = [row for row in found if row["guidance_scale"] in scales]
    else:
        row = f"--row=ddim:50:{','.join(f'{scale:g}' for scale in scales)}"
        found = evaluated(workdir, "teacher", count, "--model=shapes", row)
    about = {"model": "teacher", "sampler": "ddim", "seed": None, "phases": 0, "error": None, "spread": 1.0}
    return [about | row for row in found]


Images = dict[tuple[str, float, int], Any]  # (name, guidance scale, steps) -> uint8 [n H W 3]


def of_model(
    workdir: Path, name: str, seed: int, scales: Sequence[float], count: int
) -> tuple[list[dict[str, Any]], Images]:
    """(rows of a trained model of `ARMS` by all of its samplers, its images of the same noise)."""
    arm, export, cache = ARMS[name], workdir / f"seed{seed}" / name / "export", workdir / "latents"
    row = measuring.rows_flag(",".join(arm.names), scales)
    rows = evaluated(workdir, f"{name}, seed {seed}", count, f"--model={export}", row)
    few, images, places = latents.few(count), {}, {}
    for scale in scales:
        end = latents.endpoints(cache, scale, few)
        for sampler, shown in arm.names.items():
            z, pictures = latents.kept(export, cache, sampler, measuring.STEPS, scale, few)
            for n, one, of_noise in zip(measuring.STEPS, z, pictures, strict=True):
                images[shown, scale, n] = of_noise
                places[sampler, scale, n] = latents.error(one, end), latents.spread(one, end)
    about = {"seed": seed, "phases": arm.phases[-1] if arm.phases else 0}
    for row in rows:
        row["error"], row["spread"] = places[row["sampler"], row["guidance_scale"], row["steps"]]
    return [{"model": arm.names[row["sampler"]]} | about | row for row in rows], images


def alike(images: Mapping[str, Images], seed: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """RMSE between images of one noise in several steps: of each model, and of the phased ones, each in its own."""
    every = {key: of_noise for found in images.values() for key, of_noise in found.items()}
    several = [n for n in measuring.STEPS if n > 1]
    names = dict.fromkeys(name for name, _, _ in every)
    sets = {name: [(name, n) for n in several] for name in names}
    own = [(ARMS[f"phased{n}"].names["tcd"], n) for n in several]
    if all(name in names for name, _ in own):
        sets["phased, each in M steps"] = own
    return [
        {"model": name, "seed": seed, "guidance_scale": scale}
        | {"rmse": latents.consistency([every[model, scale, n] for model, n in chosen])}
        for name, chosen in sets.items()
        for scale in scales
    ]


def costs(workdir: Path, arms: Mapping[str, Arm]) -> dict[str, list[cost.Cost]]:
    """Of training steps and of images, by the models of the first seed."""
    folder = workdir / "costs" / "-".join(arms)
    models = {
        shown: (workdir / "seed0" / name / "export", sampler)
        for name, arm in arms.items()
        for sampler, shown in arm.names.items()
    }
    found = {
        "training": cost.kept(folder / "training.json", functools.partial(cost.training, arms)),
        "sampling": cost.kept(folder / "sampling.json", functools.partial(cost.sampling, models)),
    }
    jax.clear_caches()
    return found


def write_results(workdir: Path, found: Mapping[str, list], about: Mapping[str, Any]) -> str:
    """Writes RESULTS to the workdir; returns the tables."""
    about = {**about, "asked": report.asked(found["rows"])}
    text = report.markdown(found, about)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "table.md").write_text(text)
    (workdir / "table.json").write_text(results.to_json(about | found, 2))
    if found["rows"]:
        figure.write(report.means(found["rows"], report.KEYS), workdir / "figure.png")
    return text


if __name__ == "__main__":
    sys.exit(exit_code(main))
