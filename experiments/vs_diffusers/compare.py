"""Two sides of a comparison -> numbers: how far their loss curves lie apart, and whether their tables agree."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy import stats  # comes with jax

FIRST = 10  # steps over which rounding alone may tell the sides apart
FALSE_ALARMS = 0.05  # share of verdicts "no" about sides that are equal


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
    """One metric over seeds, of both sides, and their difference b - a, taken within each seed.

    Attributes:
      deviations: of each side over seeds; None of one seed.
      difference: its mean over seeds.
      error: the standard error of that mean; None of one seed.
      limit: standard errors up to which the difference is seed noise; None of one seed.
    """

    metric: str
    steps: int
    means: tuple[float, float]
    deviations: tuple[float, float] | None
    difference: float
    error: float | None
    limit: float | None

    @property
    def agrees(self) -> bool | None:
        """Within seed noise, by the paired t test at FALSE_ALARMS; None of one seed, which tells of no noise."""
        return None if self.error is None else abs(self.difference) <= self.limit * self.error


def agreement(metric: str, steps: int, a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Of the values that each side's seeds have, in the same order of seeds."""
    means = statistics.fmean(a), statistics.fmean(b)
    differences = [y - x for x, y in zip(a, b, strict=True)]
    difference, seeds = statistics.fmean(differences), len(differences)
    if seeds == 1:
        return Agreement(metric, steps, means, None, difference, None, None)
    deviations = statistics.stdev(a), statistics.stdev(b)
    error = statistics.stdev(differences) / math.sqrt(seeds)
    return Agreement(metric, steps, means, deviations, difference, error, t_quantile(seeds - 1))


def t_quantile(freedom: int) -> float:
    """|t| that FALSE_ALARMS of all draws exceed."""
    return float(stats.t.ppf(1 - FALSE_ALARMS / 2, freedom))


def markdown(found: Sequence[Agreement], sides: tuple[str, str]) -> str:
    """The table of agreements."""
    form = {"caption accuracy": lambda x: f"{100 * x:.1f} %", "Frechet distance": lambda x: f"{x:.2f}"}
    lines = [
        f"| metric | steps | {sides[0]} | {sides[1]} | difference | in standard errors | within seed noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        show = form[one.metric]
        spread = [f" ± {show(d)}" for d in one.deviations] if one.deviations else ["", ""]
        cells = [show(mean) + text for mean, text in zip(one.means, spread, strict=True)]
        errors = f"{one.difference / one.error:.1f} (up to {one.limit:.1f})" if one.error else ""
        verdict = {True: "yes", False: "no", None: "one seed"}[one.agrees]
        lines.append(
            f"| {one.metric} | {one.steps} | {' | '.join(cells)} | {show(one.difference)} | {errors} | {verdict} |"
        )
    return "\n".join(lines) + "\n"
