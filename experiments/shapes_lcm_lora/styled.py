"""What the style experiments share: rows with a Frechet distance to the style's renders and one to plain renders."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.shapes_lcm import table
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.networks import shapes as shapes_scorer
from lcm_jax.sampling.generator import Generator, Settings, grid

GRID_PROMPTS = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line; accuracy in 0..1, distances over `count` pictures, evaluations of the network per picture."""

    method: str
    accuracy: float
    to_style: float
    to_plain: float
    count: int
    sampler: str = ""
    guidance_scale: float | None = None
    evaluations: int | None = None


class Judge:
    """Held-out captions with their renders in a style and plain, and both sets of references."""

    def __init__(self, count: int, style: str):
        self.styled, self.plain = table.Judge(count, style), table.Judge(count)

    def row(self, method: str, images: np.ndarray, **fields) -> Row:
        """The row of uint8 pictures of the held-out captions, in their order."""
        predicted, features = shapes_scorer.score(images)
        drawn = frechet.statistics(features)
        to_style, to_plain = (frechet.frechet_distance(drawn, j.statistics) for j in (self.styled, self.plain))
        accuracy = shapes_scorer.caption_accuracy(predicted, self.plain.labels)
        return Row(method, accuracy, to_style, to_plain, self.plain.count, **fields)

    def real_rows(self, generator: Generator) -> list[Row]:
        """Renders of both styles as the scorer reads them: as drawn, and through the VAE, which samples come out of."""
        return [
            self.row("renders, plain", self.plain.renders),
            self.row("renders, style", self.styled.renders),
            self.row("VAE reconstructions, plain", self.plain.reconstructions(generator)),
            self.row("VAE reconstructions, style", self.styled.reconstructions(generator)),
        ]

    def sampled_row(self, method: str, generator: Generator, settings: Settings, guidance_scale: float) -> Row:
        """The row of what a model draws for the captions."""
        images, _ = table.draw(generator, self.plain, settings, guidance_scale)
        passes = 1 if generator.pipeline.has_w_embedding or guidance_scale == 1.0 else 2
        return self.row(
            method,
            images,
            sampler=f"{table.NAMES[settings.sampler]} {settings.steps}",
            guidance_scale=guidance_scale,
            evaluations=passes * settings.steps,
        )


def picture(lines: Sequence[np.ndarray]) -> np.ndarray:
    """A grid of uint8 [n 64 64 3] pictures, one line of them per entry, at twice their size."""
    cells = grid(np.concatenate([line[:GRID_PROMPTS] for line in lines]), GRID_PROMPTS)
    return cells.repeat(2, axis=0).repeat(2, axis=1)


def drawn(generator: Generator, judge: table.Judge, settings: Settings, guidance_scale: float) -> np.ndarray:
    """Pictures uint8 of a judge's captions."""
    return table.draw(generator, judge, settings, guidance_scale)[0]


def markdown(rows: Sequence[Row], note: str) -> str:
    """The table as Markdown."""
    lines = [
        "| model | sampler, steps | guidance scale | network evaluations | caption accuracy | FD to style "
        "| FD to plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        scale = "" if r.guidance_scale is None else f"{r.guidance_scale:g}"
        lines.append(
            f"| {r.method} | {r.sampler} | {scale} | {r.evaluations or ''} | {100 * r.accuracy:.1f} % "
            f"| {r.to_style:.1f} | {r.to_plain:.1f} |"
        )
    return "\n".join(lines) + f"\n\n{note}\n"


def to_json(rows: Sequence[Row], **about) -> str:
    return json.dumps({**about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"


def add_arguments(parser: argparse.ArgumentParser, workdir: str) -> None:
    """What the command lines of both experiments have in common."""
    parser.add_argument("--workdir", type=Path, default=Path(workdir))
    parser.add_argument("--count", type=int, default=256, help="pictures per row")
    parser.add_argument("--publish", action="store_true", help="copy table, grid, curves and README beside this file")


def publish(workdir: Path, folder: Path, curves: dict[str, Path]) -> None:
    """Copies the results to the experiment's folder; `curves`: name there -> metrics.jsonl of a run."""
    for name in ("table.md", "table.json", "grid.png", "README.md"):
        shutil.copyfile(workdir / name, folder / name)
    for name, path in curves.items():
        shutil.copyfile(path, folder / name)
