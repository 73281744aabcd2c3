"""Line and bar charts as SVG text, for the experiments' READMEs.

    y
    |  .---- series
    |_/______ x          ticks at powers of ten, or at 1, 2, 5 times one
"""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48  # margins
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
TICKS = 6  # at most, of a linear axis


@dataclasses.dataclass(frozen=True)
class Line:
    """A named series; its colour is that of number `colour`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    in_legend: bool = True


def lines(title: str, x_label: str, y_label: str, series: Sequence[Line], log_y: bool = False) -> str:
    """A chart of lines. log_y: a logarithmic axis, for values above 0."""
    xs, ys = ([value for line in series for value in getattr(line, axis)] for axis in "xy")
    down = _scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log_y)
    right = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, False)
    parts = _axes(title, x_label, y_label, _ticks(min(ys), max(ys), log_y), down)
    parts += [_text(right(tick), HEIGHT - BOTTOM + 18, _number(tick)) for tick in _ticks(min(xs), max(xs), False)]
    for line in series:
        points = " ".join(f"{right(x):.1f},{down(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(line.colour)}"{dash}/>')
    return _svg(parts + _legend([(line.name, line.colour, line.dashed) for line in series if line.in_legend]))


def bars(title: str, y_label: str, groups: Sequence[tuple[str, Sequence[float | None]]], names: Sequence[str],
         mark: float | None = None) -> str:  # fmt: skip
    """A chart of groups of bars, one bar for each of `names`, from 0 on; None leaves a place empty.

    mark: a value at which a line goes across.
    """
    known = [value for _, values in groups for value in values if value is not None]
    top = max([*known, mark or 0.0])
    down = _scale(0.0, top, HEIGHT - BOTTOM, TOP, False)
    parts = _axes(title, "", y_label, _ticks(0.0, top, False), down)
    width = (WIDTH - LEFT - RIGHT) / len(groups)
    one = 0.8 * width / len(names)
    for i, (name, values) in enumerate(groups):
        start = LEFT + i * width + 0.1 * width
        for j, value in enumerate(values):
            if value is not None:
                parts.append(f'<rect x="{start + j * one:.1f}" y="{down(value):.1f}" width="{one:.1f}" '
                             f'height="{HEIGHT - BOTTOM - down(value):.1f}" fill="{_colour(j)}"/>')
        middle = f"{start + 0.4 * width:.1f} {HEIGHT - BOTTOM + 14}"
        tilt = f' transform="rotate(-25 {middle})" text-anchor="end"' if len(groups) > 4 else ' text-anchor="middle"'
        x, y = middle.split()
        parts.append(f'<text x="{x}" y="{y}" font-size="10"{tilt}>{html.escape(name)}</text>')
    if mark is not None:
        parts.append(_stroke(LEFT, down(mark), WIDTH - RIGHT, down(mark), "#000", ' stroke-dasharray="4 4"'))
    return _svg(parts + _legend([(name, j, False) for j, name in enumerate(names)]))


def _scale(low: float, high: float, start: float, end: float, log: bool):
    """value -> place between start and end."""
    if log:
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0
    return lambda value: start + ((math.log(value) if log else value) - low) / span * (end - start)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * m for m in (0.1, 0.2, 0.5, 1, 2, 5) if span / (unit * m) <= TICKS)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(title: str, x_label: str, y_label: str, ticks: Sequence[float], down) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = [_text(WIDTH / 2, 18, title, 14), _text(WIDTH / 2, HEIGHT - 10, x_label)]
    parts.append(f'<text x="14" y="{HEIGHT / 2}" font-size="12" text-anchor="middle" '
                 f'transform="rotate(-90 14 {HEIGHT / 2})">{html.escape(y_label)}</text>')  # fmt: skip
    for tick in ticks:
        parts.append(_stroke(LEFT, down(tick), WIDTH - RIGHT, down(tick), "#ddd"))
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" font-size="11" '
                     f'text-anchor="end">{_number(tick)}</text>')  # fmt: skip
    return [*parts, _stroke(LEFT, TOP, LEFT, bottom), _stroke(LEFT, bottom, WIDTH - RIGHT, bottom)]


def _legend(entries: Sequence[tuple[str, int, bool]]) -> list[str]:
    parts = []
    for row, (name, colour, dashed) in enumerate(entries):
        y, dash = TOP + 10 + 16 * row, ' stroke-dasharray="5 3"' if dashed else ""
        parts.append(_stroke(WIDTH - 190, y, WIDTH - 165, y, _colour(colour), f' stroke-width="3"{dash}'))
        parts.append(f'<text x="{WIDTH - 160}" y="{y + 4}" font-size="11">{html.escape(name)}</text>')
    return parts


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str = "#000", more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="middle">{html.escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.4g}"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _svg(parts: Sequence[str]) -> str:
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="sans-serif">')  # fmt: skip
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>", ""])
