"""Fine-tunes the embedded LCM on another style without its teacher (LCF), and mixed with LCD, which keeps guidance.

    python -m experiments.shapes_lcf.run [--workdir=runs/shapes_lcf] [--count=2000] [--publish]

It starts from the demo's LCM in runs/shapes_lcm (another folder by --lcm), which is trained now if it is missing. A
finished part is kept, a stopped training is resumed. Results: WORKDIR/{table.md,table.json,grid.png}; `--publish`
copies them beside this file.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lcm_jax
from experiments import embedded, measuring, results, stage
from experiments.terminal import teller
from lcm_jax.data import shapes
from lcm_jax.ending import exit_code
from lcm_jax.metrics.shapes import REFERENCES, heldout

CONFIG, LCM_CONFIG = "configs/shapes_lcf.py", "configs/shapes_lcm.py"
LCD_WEIGHT = 0.5
RUNS = {"lcf": ("LCF", 0.0), "mix": (f"LCF + {LCD_WEIGHT:g} LCD", LCD_WEIGHT)}  # folder -> (name, lcd_weight)
STEPS = 4
NOTE = (
    "{count} images of held-out captions in every row, same noise, 4 steps. FD: Frechet distance to {references} "
    'held-out renders, in the style "{style}" and plain, in the scorer\'s features. Answer to w: RMS change of the '
    "latents between guidance scales {low:g} and {high:g}, in standard deviations: {answers}."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    embedded.add_arguments(parser, "runs/shapes_lcf")
    parser.add_argument("--lcm", type=Path, default=Path("runs/shapes_lcm"), help=f"run of {LCM_CONFIG} to start from")
    args = parser.parse_args()
    embedded.check_count(args.count)
    say = teller()
    if not stage.made(stage.read_config(LCM_CONFIG), args.lcm, say):
        return 1
    config = stage.read_config(CONFIG)
    config.model.student = str(args.lcm / "export")
    for part, (_, weight) in RUNS.items():
        config.distill.lcd_weight = weight
        config.model.teacher = "shapes" if weight else None
        if not stage.made(config, args.workdir / part, say):
            return 1

    say(f"generating {args.count} images per row")
    style, scales = config.data.style, (embedded.best_guidance_scale(), embedded.HIGH_SCALE)
    folders = {"LCM": Path(config.model.student)}
    folders |= {name: args.workdir / part / "export" for part, (name, _) in RUNS.items()}
    models = [(name, [f"--model={folder}"], "lcm", STEPS, s) for name, folder in folders.items() for s in scales]
    rows, lines = embedded.styled(args.workdir / "evaluate", args.count, style, models)
    answers = {name: answer_to_w(folder, scales) for name, folder in folders.items()}
    listed = ", ".join(f"{name} {value:.2f}" for name, value in answers.items())
    low, high = scales
    note = NOTE.format(count=args.count, references=REFERENCES, style=style, low=low, high=high, answers=listed)
    table = {"note": note, "config": CONFIG, "answers": answers, "verdict": verdict(rows), "rows": rows}
    embedded.write_styled(args.workdir, table, lines)
    if args.publish:
        sources = {name: args.workdir / name for name in embedded.STYLED_RESULTS}
        sources |= {f"{part}_metrics.jsonl": args.workdir / part / "metrics.jsonl" for part in RUNS}
        results.publish(Path(__file__).parent, sources)
    say(f"done: {', '.join(str(args.workdir / name) for name in embedded.STYLED_RESULTS)}")
    return 0


def answer_to_w(folder: Path, scales: tuple[float, float]) -> float:
    """RMS difference of the latents at two guidance scales from the same noise, in their standard deviations.

    Near 0 the model ignores w: its guidance is lost.
    """
    model = lcm_jax.load(folder)
    captions = [shapes.caption(spec) for spec in heldout(measuring.BATCH)]
    noise = model.noise(0, range(len(captions)), STEPS, *model.pipeline.default_size)
    cond, settings = model.encode(captions), lcm_jax.Settings(steps=STEPS)
    low, high = (np.asarray(model.latents(cond, noise, scale, settings)) for scale in scales)
    return float(np.sqrt(np.mean(np.square(high - low))) / np.std(low))


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each fine-tuned row: how much nearer to the style than the LCM it is, and how well its captions are read.

    "nearer" is a share of FD(plain renders, style), of which a half is the goal; "accuracy" is a share of the scorer's
    accuracy on styled renders, of which 85 % are the goal.
    """
    plain, in_style, *_ = rows
    sampled = rows[4:]
    before = {row["guidance_scale"]: row for row in sampled if row["method"] == "LCM"}
    return [
        {
            "method": row["method"],
            "guidance_scale": row["guidance_scale"],
            "nearer": (before[row["guidance_scale"]]["to_style"] - row["to_style"]) / plain["to_style"],
            "accuracy": row["accuracy"] / in_style["accuracy"],
        }
        for row in sampled
        if row["method"] != "LCM"
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
