"""Two sides of a comparison -> numbers: how far their loss curves lie apart, and whether their tables agree."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

FIRST = 10  # steps over which rounding alone may tell the sides apart


@dataclasses.dataclass(frozen=True)
class Apart:
    """|a - b| / |a| of two loss curves: over all steps, over the first FIRST of them, and of their ends' means."""

    maximum: float
    median: float
    first: float
    end: float


def read_curve(path: Path) -> dict[int, float]:
    """step -> loss of a metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def apart(a: Mapping[int, float], b: Mapping[int, float]) -> Apart:
    """How far curve b lies from curve a, over the steps that both have. `end`: of the means of the last tenth."""
    steps = sorted(a.keys() & b.keys())
    relative = [abs(a[step] - b[step]) / abs(a[step]) for step in steps]
    last = steps[-max(1, len(steps) // 10) :]
    ends = [statistics.fmean(curve[step] for step in last) for curve in (a, b)]
    return Apart(
        max(relative), statistics.median(relative), max(relative[:FIRST]), abs(ends[1] - ends[0]) / abs(ends[0])
    )


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One metric over seeds, of both sides: means, standard deviations, and the difference in standard errors."""

    metric: str
    steps: int
    means: tuple[float, float]
    deviations: tuple[float, float]
    standard_errors: float

    @property
    def agrees(self) -> bool:
        """Within seed noise: the means lie no more than two standard errors of their difference apart."""
        return self.standard_errors <= 2.0


def agreement(metric: str, steps: int, a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Of the values that each side's seeds have. The error is that of the unpaired difference of the means."""
    means = statistics.fmean(a), statistics.fmean(b)
    deviations = tuple(statistics.stdev(values) if len(values) > 1 else math.nan for values in (a, b))
    error = math.sqrt(sum(d**2 / len(values) for d, values in zip(deviations, (a, b), strict=True)))
    difference = abs(means[0] - means[1])
    errors = 0.0 if difference == 0 else difference / error if error else math.inf
    return Agreement(metric, steps, means, deviations, errors)


def markdown(found: Sequence[Agreement], sides: tuple[str, str]) -> str:
    """The table of agreements."""
    form = {"caption accuracy": lambda x: f"{100 * x:.1f} %", "Frechet distance": lambda x: f"{x:.2f}"}
    lines = [f"| metric | steps | {sides[0]} | {sides[1]} | difference in standard errors | within seed noise |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for one in found:
        show = form[one.metric]
        cells = [f"{show(m)} ± {show(d)}" for m, d in zip(one.means, one.deviations, strict=True)]
        verdict = "yes" if one.agrees else "no"
        lines.append(f"| {one.metric} | {one.steps} | {' | '.join(cells)} | {one.standard_errors:.1f} | {verdict} |")
    return "\n".join(lines) + "\n"
