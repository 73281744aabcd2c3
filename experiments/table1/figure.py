"""The figure of Table 1: each quality against network evaluations, one line per sampler and guidance scale."""

from collections.abc import Sequence
from pathlib import Path

from lcm_jax import files
from lcm_jax.metrics import plot, table

INCHES = (4.5, 3.6)  # of one panel
KEYS = ("caption_accuracy", "shapes_frechet", "coverage_distance", "fid", "clip_score")


def write(rows: Sequence[table.Row], path: Path) -> None:
    """Writes a PNG; the axis of evaluations is logarithmic."""
    from matplotlib.figure import Figure

    keys = [key for key in KEYS if key in table.columns(rows)]
    figure = Figure(figsize=(INCHES[0] * len(keys), INCHES[1]), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    lines = plot.series(rows)
    styles = plot.styles(lines)
    ticks = sorted({row.evaluations for row in rows})
    for key, panel in zip(keys, panels, strict=True):
        for name, line in lines.items():
            width = 2.5 if line[0].sampler == "lcm" else 1.0
            plot.line(panel, [row.evaluations for row in line], line, key, label=name, linewidth=width, **styles[name])
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set(xlabel="network evaluations", title=table.COLUMNS[key].title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    with files.new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
