"""The figure of a study: every quality against what varies, a line for each number of steps."""

from collections.abc import Sequence
from pathlib import Path

from lcm_jax import files
from lcm_jax.metrics.table import COLUMNS, Row, columns

INCHES = (4.0, 3.2)  # of one panel


def write(rows: Sequence[Row], variants: Sequence[str], path: Path) -> None:
    """A PNG with a panel for each quality; variants, and the guidance scales of each, from left to right.

    Variants named "A, k = 1", "A, k = 5", ... are one line, which ends where A does.
    """
    from matplotlib.figure import Figure

    keys = columns(rows)
    places = sorted({(variants.index(row.model), row.guidance_scale) for row in rows})
    several = len({scale for _, scale in places}) > 1
    labels = [f"w = {scale - 1:g}" if several else variants[index] for index, scale in places]
    width = max(INCHES[0], 0.35 * len(places))
    drawn = Figure(figsize=(width * len(keys), INCHES[1]), layout="constrained")
    for key, panel in zip(keys, drawn.subplots(1, len(keys), squeeze=False)[0], strict=True):
        for number, steps in enumerate(sorted({row.steps for row in rows})):
            found = {(variants.index(r.model), r.guidance_scale): r.values.get(key) for r in rows if r.steps == steps}
            shown = [(i, found[place]) for i, place in enumerate(places) if found.get(place) is not None]
            for first, line in enumerate(_lines(shown, labels)):
                panel.plot(
                    *zip(*line, strict=True),
                    marker="o",
                    markersize=4,
                    color=f"C{number}",
                    label=None if first else f"{steps} steps" if steps > 1 else "1 step",
                )
        better = "higher" if COLUMNS[key].higher_is_better else "lower"
        panel.set_title(f"{COLUMNS[key].title} ({better} is better)", fontsize="small")
        panel.set_xticks(range(len(places)), labels, rotation=90 if len(places) > 7 else 30, fontsize="small")
        panel.grid(alpha=0.3)
    lines, names = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize="small")
    with files.new_file(path) as partial:
        drawn.savefig(partial, format="png", dpi=120)


def _lines(points: Sequence[tuple[int, float]], labels: Sequence[str]) -> list[list[tuple[int, float]]]:
    """Points cut where what stands before the last comma of their labels changes."""
    lines: list[list[tuple[int, float]]] = []
    before = None
    for point in points:
        head = labels[point[0]].rpartition(",")[0]
        if head != before:
            lines.append([])
        lines[-1].append(point)
        before = head
    return lines
