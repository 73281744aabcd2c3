"""The figure: for each guidance scale one panel per quality, against the number of steps, with a line per model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.measuring import STEPS
from lcm_jax import files

INCHES = (3.1, 2.6)  # of one panel
PANELS = {
    "accuracy": "caption accuracy",
    "frechet": "Frechet distance",
    "error": "distance to the teacher's end",
    "spread": "spread beside the teacher's",
}


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the PNG; rows: means over seeds. A dot is where a model takes as many steps as it has phases."""
    from matplotlib.figure import Figure

    scales = sorted({row["guidance_scale"] for row in rows})
    names = list(dict.fromkeys(row["model"] for row in rows if row["steps"] in STEPS))
    size = INCHES[0] * len(PANELS), INCHES[1] * len(scales) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    for line, scale in zip(figure.subplots(len(scales), len(PANELS), squeeze=False), scales, strict=True):
        for panel, (key, title) in zip(line, PANELS.items(), strict=True):
            for number, name in enumerate(names):
                own = [row for row in rows if (row["model"], row["guidance_scale"]) == (name, scale)]
                panel.plot(*zip(*[(r["steps"], r[key]) for r in own], strict=True), color=f"C{number}", label=name)
                dots = [(row["steps"], row[key]) for row in own if row["steps"] == row["phases"]]
                panel.plot(*zip(*dots, strict=True), "o", color=f"C{number}") if dots else None
            for row in rows:  # of the teacher
                if row["steps"] not in STEPS and row["guidance_scale"] == scale and row[key] is not None:
                    panel.axhline(row[key], color="0.5", linestyle=":")
            if key in ("frechet", "error"):
                panel.set_yscale("log")
            panel.set_xscale("log", base=2)
            panel.set_xticks(STEPS, [str(n) for n in STEPS])
            panel.set_title(f"{title}, scale {scale:g}", fontsize="small")
            panel.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    with files.new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
