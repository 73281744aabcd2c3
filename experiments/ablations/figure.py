"""The figure of a study: one panel per quality, against what varies, with one line per number of steps."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from lcm_jax import files
from lcm_jax.metrics import plot
from lcm_jax.metrics.table import COLUMNS, Row, columns

INCHES = (4.0, 3.2)  # of one panel


def write(rows: Sequence[Row], variants: Sequence[str], path: Path) -> None:
    """Writes the PNG; variants, and the guidance scales of each, from left to right.

    Variants named "A, k = 1", "A, k = 5", ... are joined by a line, those of A and B are not.
    """
    from matplotlib.figure import Figure

    keys = columns(rows)
    ticks = sorted({(variants.index(row.model), row.guidance_scale) for row in rows})
    several = len({scale for _, scale in ticks}) > 1
    labels = [f"w = {scale - 1:g}" if several else variants[index] for index, scale in ticks]
    width = max(INCHES[0], 0.35 * len(ticks))
    figure = Figure(figsize=(width * len(keys), INCHES[1]), layout="constrained")
    for key, panel in zip(keys, figure.subplots(1, len(keys), squeeze=False)[0], strict=True):
        for number, steps in enumerate(sorted({row.steps for row in rows})):
            those = [row for row in rows if row.steps == steps and row.values.get(key) is not None]
            found = {(variants.index(row.model), row.guidance_scale): row for row in those}
            shown = [(i, found[tick]) for i, tick in enumerate(ticks) if tick in found]
            for first, line in enumerate(_lines(shown, labels)):
                name = None if first else f"{steps} steps" if steps > 1 else "1 step"
                plot.line(panel, [i for i, _ in line], [row for _, row in line], key, color=f"C{number}", label=name)
        better = "higher" if COLUMNS[key].higher_is_better else "lower"
        panel.set_title(f"{COLUMNS[key].title} ({better} is better)", fontsize="small")
        panel.set_xticks(range(len(ticks)), labels, rotation=90 if len(ticks) > 7 else 30, fontsize="small")
        panel.grid(alpha=0.3)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize="small")
    with files.new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _lines(points: Sequence[tuple[int, Row]], labels: Sequence[str]) -> list[list[tuple[int, Row]]]:
    """Groups the points whose labels are equal up to their last comma."""
    return [list(line) for _, line in itertools.groupby(points, lambda point: labels[point[0]].rpartition(",")[0])]
