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
from lcm_jax.errors import exit_code
from lcm_jax.metrics.shapes import REFERENCES

CONFIG = "configs/shapes_lcm_lora.py"
NOTE = (
    "{count} images of held-out captions in every row, same noise. FD: Frechet distance to {references} held-out "
    'renders, in the style "{style}" and plain, in the scorer\'s features. DDIM has trailing spacing and two passes a '
    "step; the LCM sampler has one."
)


def models(style: Path, lcm: Path) -> list[tuple[str, list[str], str, int]]:
    """(name in the table, LoRA flags, sampler, steps) of every row."""
    lcm_lora, styled = f"--lora={lcm}:1.0", f"--lora={style}:1.0"
    return [
        ("base teacher", [], "ddim", 50),
        ("base + style LoRA 1.0", [styled], "ddim", 50),
        ("base + style LoRA 1.0", [styled], "ddim", 4),
        ("base + LCM-LoRA 1.0", [lcm_lora], "lcm", 4),
        ("base + style LoRA 0.8 + LCM-LoRA 1.0", [f"--lora={style}:0.8", lcm_lora], "lcm", 4),
        ("base + style LoRA 1.0 + LCM-LoRA 1.0", [styled, lcm_lora], "lcm", 4),
    ]


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
    style = train_style.STYLE
    rows = embedded.styled_real_rows(args.count, style)
    lines = {"renders in the style": embedded.real_images(embedded.GRID_IMAGES, style)["renders"]}
    for name, loras, sampler, steps in models(style_file, args.workdir / "lcm" / "export"):
        scale = embedded.best_guidance_scale() if sampler == "ddim" else 1.0
        flags = ["--model=shapes", *loras]
        row = f"--row={sampler}:{steps}:{scale:g}"
        rows += embedded.styled_rows(args.workdir / "evaluate", name, args.count, style, *flags, row)
        request = f"--sampler={sampler}", f"--steps={steps}", f"--guidance_scale={scale:g}"
        lines[f"{name}, {steps} steps"] = embedded.drawn(*flags, *request)
    note = NOTE.format(count=args.count, references=REFERENCES, style=style)
    embedded.write_styled(args.workdir, rows, lines, note, CONFIG)
    if args.publish:
        sources = {name: args.workdir / name for name in embedded.STYLED_RESULTS}
        sources |= {f"{part}_metrics.jsonl": args.workdir / part / "metrics.jsonl" for part in ("style", "lcm")}
        results.publish(Path(__file__).parent, sources)
    say(f"done: {', '.join(str(args.workdir / name) for name in embedded.STYLED_RESULTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
