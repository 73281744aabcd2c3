"""Does an LCM-LoRA work with a style LoRA it has never seen? Trains both on the embedded teacher and combines them.

    python -m experiments.shapes_lcm_lora.run [--workdir=runs/shapes_lcm_lora] [--count=2000] [--publish]

    WORKDIR/style/style_lora.safetensors      plain denoising on styled renders     (train_style.py)
    WORKDIR/lcm/export/                       LCM-LoRA of the base teacher          (configs/shapes_lcm_lora.py)
    WORKDIR/{table.md,table.json,grid.png}

A finished part is kept, a stopped training is resumed. `--publish` copies the results beside this file.
"""

import argparse
import sys
from pathlib import Path

from experiments import embedded, results, stage
from experiments.shapes_lcm_lora import train_style
from experiments.terminal import teller
from lcm_jax.ending import exit_code
from lcm_jax.metrics.shapes import REFERENCES

CONFIG = "configs/shapes_lcm_lora.py"
NOTE = (
    "{count} images of held-out captions in every row, same noise. FD: Frechet distance to {references} held-out "
    'renders, in the style "{style}" and plain, in the scorer\'s features. DDIM has trailing spacing and two passes a '
    "step; the LCM sampler has one."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    embedded.add_arguments(parser, "runs/shapes_lcm_lora")
    args = parser.parse_args()
    embedded.check_count(args.count)
    say = teller()
    style_file = args.workdir / "style" / train_style.FILE
    if not style_file.exists():
        say("training the style LoRA")
        train_style.train(args.workdir / "style")
    if not stage.made(stage.read_config(CONFIG), args.workdir / "lcm", say):
        return 1

    say(f"generating {args.count} images per row")
    base, lcm, best = "--model=shapes", f"--lora={args.workdir}/lcm/export:1.0", embedded.best_guidance_scale()
    weak, full = (f"--lora={style_file}:{weight}" for weight in (0.8, 1.0))
    models = [
        ("base teacher", [base], "ddim", 50, best),
        ("base + style LoRA 1.0", [base, full], "ddim", 50, best),
        ("base + style LoRA 1.0", [base, full], "ddim", 4, best),
        ("base + LCM-LoRA 1.0", [base, lcm], "lcm", 4, 1.0),
        ("base + style LoRA 0.8 + LCM-LoRA 1.0", [base, weak, lcm], "lcm", 4, 1.0),
        ("base + style LoRA 1.0 + LCM-LoRA 1.0", [base, full, lcm], "lcm", 4, 1.0),
    ]
    rows, lines = embedded.styled(args.workdir / "evaluate", args.count, train_style.STYLE, models)
    note = NOTE.format(count=args.count, references=REFERENCES, style=train_style.STYLE)
    embedded.write_styled(args.workdir, {"note": note, "config": CONFIG, "rows": rows}, lines)
    if args.publish:
        sources = {name: args.workdir / name for name in embedded.STYLED_RESULTS}
        sources |= {f"{part}_metrics.jsonl": args.workdir / part / "metrics.jsonl" for part in ("style", "lcm")}
        results.publish(Path(__file__).parent, sources)
    say(f"done: {', '.join(str(args.workdir / name) for name in embedded.STYLED_RESULTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
