"""The plot of a table: each quality against steps and against time per image; without any, time against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.metrics.table import COLUMNS, Row, columns, sampler_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (4.5, 3.0)  # of one panel
LINE_STYLES = ("-", "--", ":", "-.")


def check() -> None:
    """Raises LcmError if matplotlib is not installed; to be called before long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LcmError(
            "the plot needs matplotlib: pip install 'lcm_jax[plot]', or leave the plot out with --no-plot"
        ) from None


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label of a line -> its rows, by steps: those of one model, sampler and guidance scale."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.steps):
        found.setdefault(f"{row.model}, {sampler_of(row)}, scale {row.guidance_scale:g}", []).append(row)
    return dict(sorted(found.items()))


def styles(lines: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, str]]:
    """Label of a line -> what matplotlib draws it by: a colour for each model and sampler, dashes for each scale."""
    drawers, scales = [], sorted({rows[0].guidance_scale for rows in lines.values()})
    found = {}
    for name, rows in lines.items():
        drawer = rows[0].model, sampler_of(rows[0])
        if drawer not in drawers:
            drawers.append(drawer)
        dashes = LINE_STYLES[scales.index(rows[0].guidance_scale) % len(LINE_STYLES)]
        found[name] = {"color": f"C{drawers.index(drawer) % 10}", "linestyle": dashes}
    return found


def panels(rows: Sequence[Row]) -> list[str]:
    """Keys of the values to plot: those with several numbers of steps, or all if there are none."""
    steps = {key: {row.steps for row in rows if row.values.get(key) is not None} for key in columns(rows)}
    several = [key for key, seen in steps.items() if len(seen) > 1]
    return several or list(steps)


def error_lengths(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]]:
    """What matplotlib's `yerr` takes: lengths below and above the values; 0 for a value without interval."""
    pairs = [(value, (value, value) if ends is None else ends) for value, ends in zip(values, intervals, strict=True)]
    return [[max(0.0, v - low) for v, (low, _) in pairs], [max(0.0, high - v) for v, (_, high) in pairs]]


def line(panel: Axes, x: Sequence[float], rows: Sequence[Row], key: str, **style: Any) -> None:
    """Draws a value of rows with its intervals over `x`."""
    values = [row.values[key] for row in rows]
    lengths = error_lengths(values, [row.intervals.get(key) for row in rows])
    panel.errorbar(x, values, lengths, **{"marker": "o", "markersize": 4, "elinewidth": 1.0, **style})


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG with two panels side by side for each quality; axes of steps and time are logarithmic."""
    from matplotlib.figure import Figure

    keys, lines = panels(rows), series(rows)
    size = (2 * INCHES[0], INCHES[1] * max(1, len(keys)) + 0.3 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(max(1, len(keys)), 2 if keys else 1, sharey="row", squeeze=False)
    if not keys:
        _latency(axes[0][0], rows, lines)
    for key, pair in zip(keys, axes, strict=False):
        _quality(key, *pair, rows, lines)
    if keys:
        axes[-1][1].set_xlabel("ms per image")
    axes[-1][0].set_xlabel("steps")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small")
    with files.new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _quality(key: str, left: Axes, right: Axes, rows: Sequence[Row], lines: Mapping[str, Sequence[Row]]) -> None:
    style = styles(lines)
    for name, members in lines.items():
        shown = [row for row in members if row.values.get(key) is not None]
        line(left, [row.steps for row in shown], shown, key, label=name, **style[name])
        line(right, [row.milliseconds for row in shown], shown, key, **style[name])
    better = "higher" if COLUMNS[key].higher_is_better else "lower"
    left.set_ylabel(f"{COLUMNS[key].title} ({better} is better)")
    _scale_of_steps(left, rows)
    right.set_xscale("log")
    right.grid(alpha=0.3)


def _latency(panel: Axes, rows: Sequence[Row], lines: Mapping[str, Sequence[Row]]) -> None:
    style = styles(lines)
    for name, members in lines.items():
        steps, times = [row.steps for row in members], [row.milliseconds for row in members]
        panel.plot(steps, times, marker="o", markersize=4, label=name, **style[name])
    panel.set_ylabel("ms per image")
    panel.set_yscale("log")
    _scale_of_steps(panel, rows)


def _scale_of_steps(panel: Axes, rows: Sequence[Row]) -> None:
    panel.set_xscale("log", base=2)
    steps = sorted({row.steps for row in rows})
    panel.set_xticks(steps, [str(n) for n in steps])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
