"""Fine-tunes the embedded LCM on another style without its teacher (LCF), and mixed with LCD, which keeps guidance.

    python -m experiments.shapes_lcf.run [--workdir=runs/shapes_lcf] [--count=2000] [--publish]

It starts from the demo's LCM, runs/shapes_lcm/export (`make demo`; another by --student). A part whose output is there
is not made again; a training that was stopped goes on. Results: WORKDIR/{table.md,table.json,grid.png,README.md}, with
`--publish` copied beside this file.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.shapes_lcm import table
from experiments.shapes_lcm_lora import styled
from experiments.shapes_teacher import teacher_rows
from experiments.stage import trained_and_exported
from experiments.terminal import teller
from lcm_jax import pretrained, sample
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline
from lcm_jax.sampling.generator import Generator, Settings, draw_noise, settings_for

CONFIG = Path("configs/shapes_lcf.py")
LCD_WEIGHT = 0.5
RUNS = {"lcf": ("LCF", 0.0), "mix": (f"LCF + {LCD_WEIGHT:g} LCD", LCD_WEIGHT)}  # folder -> (name, lcd_weight)
SCALES = (3.0, 7.5)
STEPS = 4
NOTE = (
    "{count} pictures of held-out captions in every row, same noise, 4 steps. FD: Frechet distance to {references} "
    'held-out renders, in the style "{style}" and plain, in the scorer\'s features. Answer to w: RMS change of the '
    "latents between guidance scales 3 and 7.5, in standard deviations: {answers}."
)
README = """# The embedded LCM fine-tuned on another style

    python -m experiments.shapes_lcf.run --count={count} --publish

Latent Consistency Fine-tuning (LCM paper, arXiv 2310.04378, section 4.4) of the demo's LCM on {examples} renders in the
style "{style}", which their captions do not name: `configs/shapes_lcf.py`, {steps} steps. No teacher takes part; in the
mix, LCF + {weight:g} LCD, the embedded teacher does. {count} held-out captions per row, the same noise, 4 steps.

{table}
What the table says:

{lines}

The paper fine-tunes on Pokemon and Simpsons sets for 30,000 iterations, as secondary sources tell it, and shows
pictures; we know of no numbers. Its pattern, the new style in few steps without a teacher, is that of the rows of LCF
alone.

`grid.png`, from the top: {grid}. `lcf_metrics.jsonl`, `mix_metrics.jsonl`: the curves.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    styled.add_arguments(parser, "runs/shapes_lcf")
    parser.add_argument("--student", help="LCM to fine-tune; default: that of the config, runs/shapes_lcm/export")
    return parser.parse_args()


def main() -> int:
    args = parse()
    table.check_count(args.count)
    say = teller()
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.model.student = args.student or config.model.student
    for part, (_, weight) in RUNS.items():
        workdir = args.workdir / part
        if (workdir / "export").exists():
            continue
        config.distill.lcd_weight = weight
        config.model.teacher = "shapes" if weight else None
        if not trained_and_exported(config, workdir, say):
            return 1

    say(f"drawing {args.count} pictures per row")
    folders = {"LCM": Path(config.model.student)}
    folders |= {name: args.workdir / part / "export" for part, (name, _) in RUNS.items()}
    rows, answers = measure(folders, config.data.style, args.count, args.workdir / "grid.png")
    answered = ", ".join(f"{name} {value:.2f}" for name, value in answers.items())
    note = NOTE.format(count=args.count, references=table.REFERENCES, style=config.data.style, answers=answered)
    text = styled.markdown(rows, note)
    (args.workdir / "table.md").write_text(text)
    (args.workdir / "table.json").write_text(
        styled.to_json(rows, note=note, config=str(CONFIG), answers=answers, verdict=verdict(rows))
    )
    (args.workdir / "README.md").write_text(readme(rows, answers, text, config))
    print("\n" + text)
    if args.publish:
        curves = {f"{part}_metrics.jsonl": args.workdir / part / "metrics.jsonl" for part in RUNS}
        styled.publish(args.workdir, Path(__file__).parent, curves)
    say(f"done: {args.workdir}/table.md, table.json, grid.png, README.md")
    return 0


def settings(generator: Generator, folder: Path, steps: int = STEPS) -> Settings:
    return settings_for(generator.pipeline, pretrained.read_record(folder), "lcm", steps, "trailing")


def measure(
    folders: dict[str, Path], style: str, count: int, picture: Path
) -> tuple[list[styled.Row], dict[str, float]]:
    """The table's rows and each model's answer to w; writes the grid of pictures to `picture`."""
    judge, few = styled.Judge(count, style), table.Judge(styled.GRID_PROMPTS, style)
    rows, lines, answers = judge.real_rows(teacher_rows.teacher()), [few.renders], {}
    for name, folder in folders.items():
        generator = Generator(load_pipeline(folder))
        for scale in SCALES:
            rows.append(judge.sampled_row(name, generator, settings(generator, folder), scale))
            lines.append(styled.drawn(generator, few, settings(generator, folder), scale))
        answers[name] = answer_to_w(generator, folder, judge.plain.captions[: table.BATCH])
    words = "; ".join(grid_lines(folders))
    sample.write_png(picture, styled.picture(lines), {"rows": words})
    return rows, answers


def answer_to_w(generator: Generator, folder: Path, captions: Sequence[str]) -> float:
    """RMS difference of the latents at both of SCALES from the same noise, in their standard deviations.

    Near 0 the model no longer listens to w: guidance is worn away.
    """
    unet = generator.pipeline.unet
    noise = draw_noise(table.SEED, range(len(captions)), STEPS, (unet.sample_size, unet.sample_size, unet.in_channels))
    cond = generator.encode(captions)
    low, high = (np.asarray(generator.latents(cond, noise, s, settings(generator, folder))) for s in SCALES)
    return float(np.sqrt(np.mean(np.square(high - low))) / np.std(low))


def grid_lines(names: Sequence[str]) -> list[str]:
    return ["renders in the style", *(f"{name} at scale {scale:g}" for name in names for scale in SCALES)]


def verdict(rows: Sequence[styled.Row]) -> list[dict]:
    """For each fine-tuned row: how much nearer to the style than the LCM it is, and how well its captions are read.

    The first is a share of FD(plain renders, style), of which a half is asked; the second a share of the scorer's
    accuracy on styled renders, of which 85 % are asked.
    """
    plain, in_style, *_ = rows
    sampled = rows[4:]
    before = {row.guidance_scale: row for row in sampled if row.method == "LCM"}
    return [
        {
            "method": row.method,
            "guidance_scale": row.guidance_scale,
            "nearer": (before[row.guidance_scale].to_style - row.to_style) / plain.to_style,
            "accuracy": row.accuracy / in_style.accuracy,
        }
        for row in sampled
        if row.method != "LCM"
    ]


def readme(rows: Sequence[styled.Row], answers: dict[str, float], text: str, config) -> str:
    """README.md: every number in it comes from the arguments."""
    plain, in_style, *_ = rows
    lines = [
        f"- The scorer reads {100 * in_style.accuracy:.1f} % of styled renders and {100 * plain.accuracy:.1f} % of "
        f"plain ones; plain renders lie at FD {plain.to_style:.0f} from the style."
    ]
    for row in rows[4:]:
        lines.append(
            f"- {row.method} at scale {row.guidance_scale:g}: {100 * row.accuracy:.1f} %, FD to style "
            f"{row.to_style:.0f}, to plain {row.to_plain:.0f}."
        )
    for found in verdict(rows):
        met = found["nearer"] >= 0.5 and found["accuracy"] > 0.85
        lines.append(
            f"- {found['method']} at scale {found['guidance_scale']:g} is nearer to the style than the LCM by "
            f"{100 * found['nearer']:.0f} % of FD(plain renders, style) (asked: 50), at "
            f"{100 * found['accuracy']:.0f} % of the accuracy on styled renders (asked: 85): "
            f"{'met' if met else 'not met'}."
        )
    told = ", ".join(f"{name} {value:.2f}" for name, value in answers.items())
    lines.append(f"- Guidance kept, as the answer to w between scales 3 and 7.5: {told}.")
    names = list(dict.fromkeys(row.method for row in rows[4:]))
    return README.format(
        count=rows[4].count,
        examples=config.data.num_examples,
        style=config.data.style,
        steps=config.train.steps,
        weight=LCD_WEIGHT,
        table=text,
        lines="\n".join(lines),
        grid=", ".join(grid_lines(names)),
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LcmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
