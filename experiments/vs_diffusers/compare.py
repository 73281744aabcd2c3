"""Two sides of a comparison: how far their loss curves lie apart, and whether their tables agree."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats  # comes with jax

from experiments import results

FIRST = 10  # steps in which only rounding should separate the sides
FALSE_ALARMS = 0.05  # share of verdicts "no" about equal sides
FORMATS = {"caption accuracy": "{:.1%}", "Frechet distance": "{:.2f}"}


def read_curve(path: Path) -> dict[int, float]:
    """step -> loss of a metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def apart(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, float]:
    """|a - b| / |a| of two loss curves, over the steps that both have.

    Returns:
      "maximum" and "median" over all steps, the maximum over the "first" FIRST steps, and at the "end", of the means
      over the last tenth of the steps.
    """
    steps = sorted(a.keys() & b.keys())
    relative = [abs(a[step] - b[step]) / abs(a[step]) for step in steps]
    last = steps[-max(1, len(steps) // 10) :]
    ends = [statistics.fmean(curve[step] for step in last) for curve in (a, b)]
    return {
        "maximum": max(relative),
        "median": statistics.median(relative),
        "first": max(relative[:FIRST]),
        "end": abs(ends[1] - ends[0]) / abs(ends[0]),
    }


def agreement(metric: str, steps: int, a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Whether a metric of two sides differs by more than seed noise; a and b: its values, in the same order of seeds.

    Returns:
      "means" and "deviations" of each side over seeds; "difference", the mean of b - a within each seed, and "error",
      its standard error; "limit", the standard errors up to which a difference counts as seed noise, by the paired t
      test at FALSE_ALARMS; "agrees". One seed says nothing about noise: all but means and difference are None.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    found = {"metric": metric, "steps": steps, "means": [statistics.fmean(a), statistics.fmean(b)]}
    found |= {"deviations": None, "difference": statistics.fmean(differences)}
    if len(differences) == 1:
        return found | {"error": None, "limit": None, "agrees": None}
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    limit = float(stats.t.ppf(1 - FALSE_ALARMS / 2, len(differences) - 1))
    return found | {
        "deviations": [statistics.stdev(a), statistics.stdev(b)],
        "error": error,
        "limit": limit,
        "agrees": abs(found["difference"]) <= limit * error,
    }


def markdown(found: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> str:
    """The table of agreements."""
    rows = []
    for one in found:
        show = FORMATS[one["metric"]].format
        spread = [f" ± {show(deviation)}" for deviation in one["deviations"] or ()] or ["", ""]
        cells = [show(mean) + text for mean, text in zip(one["means"], spread, strict=True)]
        errors = f"{one['difference'] / one['error']:.1f} (up to {one['limit']:.1f})" if one["error"] else ""
        verdict = {True: "yes", False: "no", None: "one seed"}[one["agrees"]]
        rows.append([one["metric"], str(one["steps"]), *cells, show(one["difference"]), errors, verdict])
    heads = ["metric", "steps", *sides, "difference", "in standard errors", "within seed noise"]
    return results.table(heads, rows)
