"""Does an LCM-LoRA go with a style LoRA it has never seen? Trains both on the embedded teacher and combines them.

    python -m experiments.shapes_lcm_lora.run [--workdir=runs/shapes_lcm_lora] [--count=2000] [--publish]

    WORKDIR/style/style_lora.safetensors      plain denoising on styled renders     (train_style.py)
    WORKDIR/lcm/export/                       LCM-LoRA of the base teacher          (configs/shapes_lcm_lora.py)
    WORKDIR/{table.md,table.json,grid.png,README.md}

A part whose output is there is not made again; a training that was stopped goes on. `--publish` copies the results
beside this file.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors

from experiments.shapes_lcm import table
from experiments.shapes_lcm_lora import styled, train_style
from experiments.shapes_lcm_lora.styled import Row
from experiments.shapes_teacher import teacher_rows
from experiments.stage import trained_and_exported
from experiments.terminal import teller
from lcm_jax import assets, sample
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline
from lcm_jax.sampling.generator import Generator, settings_for

CONFIG = Path("configs/shapes_lcm_lora.py")
STYLE_STEPS, STYLE_RATE = 800, 2e-3
WEIGHTS = (0.8, 1.0)  # of the style LoRA beside the LCM-LoRA at 1.0
NOTE = (
    "{count} pictures of held-out captions in every row, same noise. FD: Frechet distance to {references} held-out "
    'renders, in the style "{style}" and plain, in the scorer\'s features. DDIM has trailing spacing and two passes a '
    "step; the LCM sampler has one."
)
README = """# A style LoRA and an LCM-LoRA, combined without training

    python -m experiments.shapes_lcm_lora.run --count={count} --publish

The universality that the LCM-LoRA report (arXiv 2311.05556) claims, on the embedded teacher, in numbers. A style LoRA
(rank {rank}, {style_steps} steps of denoising on renders in the style "{style}"; captions do not name it) and an
LCM-LoRA (`configs/shapes_lcm_lora.py`, distilled on the base teacher, which never saw the style) are merged into one
UNet with their weights and sampled in 4 steps. {count} held-out captions per row, the same noise in every row.

{table}
What the table says:

- The scorer reads {render_style} of styled renders and {render_plain} of plain ones; {recon_style} of the styled ones'
  VAE reconstructions.
- Style teacher: {style_50} by 50 guided DDIM steps (FD to style {style_50_fd}), {style_4} by 4 (FD {style_4_fd}).
- LCM-LoRA alone, 4 steps: {lcm}, FD to style {lcm_fd}, to plain {lcm_fd_plain}.
- Both, 4 steps: {both_low} with the style at 0.8 (FD to style {both_low_fd}, to plain {both_low_fd_plain}), {both_high}
  with 1.0 ({both_high_fd}, {both_high_fd_plain}).
- The better of the two is {gap:+.1f} points from the style teacher's 50 steps: {within} the 10 points asked for.
- In style: of the LCM-LoRA's way from its FD to the style teacher's 50-step FD, the combination goes {share:.0f} %.

The report shows such sums in pictures, drawn in a few steps, and has no numbers for them that we know of. Its pattern,
the style kept at a few evaluations by two adapters that have never met, is that of the last two rows.

`grid.png`, from the top: {grid}.
`style_metrics.jsonl`, `lcm_metrics.jsonl`: the curves of both trainings.
"""
GRID = (
    "renders in the style",
    "base teacher, 50 steps",
    "style teacher, 50 steps",
    "style teacher, 4 steps",
    "LCM-LoRA, 4 steps",
    "style 0.8 + LCM-LoRA, 4 steps",
    "style 1.0 + LCM-LoRA, 4 steps",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    styled.add_arguments(parser, "runs/shapes_lcm_lora")
    args = parser.parse_args()
    table.check_count(args.count)
    say = teller()
    style_file = args.workdir / "style" / train_style.FILE
    if not style_file.exists():
        say(f"style LoRA: {STYLE_STEPS} steps of {train_style.BATCH}")
        train_style.train(args.workdir / "style", STYLE_STEPS, train_style.RANK, STYLE_RATE)
    lcm_lora = args.workdir / "lcm" / "export"
    if not lcm_lora.exists():
        config = runpy.run_path(str(CONFIG))["get_config"]()
        if not trained_and_exported(config, args.workdir / "lcm", say, "--format=lora-kohya"):
            return 1

    say(f"drawing {args.count} pictures per row")
    rows = measure(style_file, lcm_lora, args.count, args.workdir / "grid.png")
    note = NOTE.format(count=args.count, references=table.REFERENCES, style=train_style.STYLE)
    text = styled.markdown(rows, note)
    (args.workdir / "table.md").write_text(text)
    (args.workdir / "table.json").write_text(styled.to_json(rows, note=note, config=str(CONFIG)))
    (args.workdir / "README.md").write_text(readme(rows, text, style_file))
    print("\n" + text)
    if args.publish:
        curves = {f"{part}_metrics.jsonl": args.workdir / part / "metrics.jsonl" for part in ("style", "lcm")}
        styled.publish(args.workdir, Path(__file__).parent, curves)
    say(f"done: {args.workdir}/table.md, table.json, grid.png, README.md")
    return 0


def combined(loras: Sequence[tuple[Path, float]]) -> tuple[Generator, dict]:
    """The teacher with these LoRA files merged at their weights, and what their records say."""
    pipeline = load_pipeline(assets.path("shapes"))
    pipeline, record = sample.add_loras(pipeline, {}, [(str(path), weight) for path, weight in loras])
    return Generator(pipeline), record


def measure(style: Path, lcm_lora: Path, count: int, picture: Path) -> list[Row]:
    """The table's rows; writes the grid of pictures to `picture`."""
    judge, few = styled.Judge(count, train_style.STYLE), table.Judge(styled.GRID_PROMPTS, train_style.STYLE)
    best = teacher_rows.best_guidance_scale()
    ddim = {steps: teacher_rows.settings("ddim", steps) for steps in (4, 50)}
    rows, lines = judge.real_rows(teacher_rows.teacher()), [few.renders]

    def add(method: str, generator: Generator, settings, scale: float) -> None:
        rows.append(judge.sampled_row(method, generator, settings, scale))
        lines.append(styled.drawn(generator, few, settings, scale))

    add("base teacher", teacher_rows.teacher(), ddim[50], best)
    teacher, _ = combined([(style, 1.0)])
    for steps in (50, 4):
        add("base + style LoRA 1.0", teacher, ddim[steps], best)
    mixes = {"base + LCM-LoRA 1.0": [(lcm_lora, 1.0)]}
    mixes |= {f"base + style LoRA {w} + LCM-LoRA 1.0": [(style, w), (lcm_lora, 1.0)] for w in WEIGHTS}
    for method, loras in mixes.items():
        generator, record = combined(loras)
        add(method, generator, settings_for(generator.pipeline, record, "lcm", 4, "trailing"), 1.0)
    sample.write_png(picture, styled.picture(lines), {"rows": "; ".join(GRID)})
    return rows


def readme(rows: Sequence[Row], text: str, style_file: Path) -> str:
    """README.md: every number in it comes from `rows` and from the header of the style LoRA."""
    with safetensors.safe_open(style_file, "np") as file:
        style = file.metadata()
    real, (_, style_50, style_4, lcm, low, high) = rows[:4], rows[4:]
    percent = {
        name: f"{100 * row.accuracy:.1f} %"
        for name, row in (
            ("render_plain", real[0]),
            ("render_style", real[1]),
            ("recon_style", real[3]),
            ("style_50", style_50),
            ("style_4", style_4),
            ("lcm", lcm),
            ("both_low", low),
            ("both_high", high),
        )
    }
    pairs = (("style_50", style_50), ("style_4", style_4), ("lcm", lcm), ("both_low", low), ("both_high", high))
    distances = {f"{name}_fd": f"{row.to_style:.0f}" for name, row in pairs}
    distances |= {f"{name}_fd_plain": f"{row.to_plain:.0f}" for name, row in pairs}
    better = max(low, high, key=lambda row: row.accuracy)
    gap = 100 * (better.accuracy - style_50.accuracy)
    return README.format(
        **percent,
        **distances,
        table=text,
        count=low.count,
        rank=style["rank"],
        style_steps=style["steps"],
        style=style["style"],
        gap=gap,
        within="within" if gap >= -10 else "outside",
        grid=", ".join(GRID),
        share=100 * (lcm.to_style - better.to_style) / (lcm.to_style - style_50.to_style),
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LcmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
