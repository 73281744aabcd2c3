"""results/*.json -> table.md, a chart per card, and both in README.md between its markers."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import results
from experiments.speed.measure import JAX, complete
from experiments.speed.workloads import HEADLINE, HEADLINE_PAPER_HOURS, HEADLINE_STEPS, LISTS, Workload

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
GIB = 2**30
HEADS = (
    "work",
    "lcm_jax",
    "torch eager, and ours in its turns",
    "torch, its best",
    "our gain over eager",
    "over the best, pair by pair",
    "goal",
    "of the product ceiling: lcm_jax / torch",
    "peak GiB: lcm_jax / torch",
    "first run: lcm_jax / torch",
)
# Device -> kind -> (least gain, over which way of torch: "eager", or "" for the best).
GOALS = {
    "cpu": {"sample": (1.2, "eager"), "lcd": (1.2, "eager"), "unet": (1.0, "")},
    "gpu": {"sample": (1.3, ""), "lcd": (1.5, "")},
}
UTILISATION_GOAL = 0.5  # of LCD steps on a GPU


@dataclasses.dataclass(frozen=True)
class Line:
    """A workload with at least one way of torch measured; best: the way with the least ratio, pair by pair.

    The ratio decides, not torch's seconds: those of two ways were taken in different minutes, at different speeds of
    the machine.
    """

    workload: Workload
    jax: Mapping[str, Any]
    ways: Mapping[str, Mapping[str, Any]]
    best: str
    flops: float | None

    def torch(self, way: str = "") -> float:
        return statistics.median(self.ways[way or self.best]["seconds"])

    def ours(self, way: str = "") -> float:
        """Our seconds in the turns beside a way of torch."""
        return statistics.median(self.ways[way or self.best]["jax_seconds"])

    def ratio(self, way: str = "") -> float:
        return self.ways[way or self.best]["ratio"]


def lines(card: Mapping[str, Any]) -> list[Line]:
    """The lines of a card's record, in the order of its device's list; what failed on either side has none."""
    found = []
    for record in card["workloads"].values():
        ways = {way: one for way, one in record.get("torch", {}).items() if "ratio" in one}
        if ways:
            best = min(ways, key=lambda way: ways[way]["ratio"])
            found.append(Line(Workload(**record["workload"]), record["jax"], ways, best, record.get("flops")))
    order = {workload.name: number for number, workload in enumerate(LISTS[card["device"]]())}
    return sorted(found, key=lambda line: order.get(line.workload.name, len(order)))


def ceiling(found: list[Line], dtype: str) -> float | None:
    """FLOPs per second of the square product in this dtype, on the better side; None: not measured."""
    products = [line for line in found if line.workload.kind == "matmul" and line.workload.dtype == dtype]
    return max((line.flops / min(line.ours(), line.torch()) for line in products), default=None)


def utilisation(line: Line, top: float | None) -> tuple[float, float] | None:
    """Shares of the ceiling that the model's FLOPs reach, of ours and of torch's best way; recomputation counts not."""
    if not top or not line.flops:
        return None
    return line.flops / line.ours() / top, line.flops / line.torch() / top


def goal(line: Line, device: str, top: float | None) -> str:
    """ "1.3: met" or "1.3: missed", and the same for the utilisation; empty without a goal."""
    least, way = GOALS[device].get(line.workload.kind, (None, ""))
    goals = {}
    if least is not None and (not way or way in line.ways):
        goals[f"{least:g}{f' over {way}' if way else ''}"] = line.ratio(way) >= least
    shares = utilisation(line, top)
    if shares and (device, line.workload.kind) == ("gpu", "lcd"):
        goals[f"{100 * UTILISATION_GOAL:.0f} % of the ceiling"] = shares[0] >= UTILISATION_GOAL
    return ", ".join(f"{name}: {'met' if reached else 'missed'}" for name, reached in goals.items())


def row(line: Line, device: str, top: float | None) -> list[str]:
    """The cells of HEADS."""
    shares, best, has_eager = utilisation(line, top), line.ways[line.best], "eager" in line.ways
    return [
        line.workload.name + (" (alone)" if line.workload.alone else ""),
        f"{_ms(line.ours())} ± {100 * spread(best['jax_seconds']):.0f} %",
        f"{_ms(line.torch('eager'))}, ours {_ms(line.ours('eager'))}" if has_eager else "",
        f"{_ms(line.torch())} ± {100 * spread(best['seconds']):.0f} %, {line.best}",
        f"{line.ratio('eager'):.2f}" if has_eager else "",
        f"{line.ratio():.2f} ({min(best['ratios']):.2f} to {max(best['ratios']):.2f})",
        goal(line, device, top),
        f"{100 * shares[0]:.0f} % / {100 * shares[1]:.0f} %" if shares else "",
        f"{line.jax['peak_bytes'] / GIB:.1f} / {best['peak_bytes'] / GIB:.1f}",
        f"{line.jax['setup_s']:.0f} s / {best['setup_s']:.0f} s",
    ]


def spread(seconds: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2 / statistics.median(seconds)


def markdown(card: Mapping[str, Any]) -> str:
    """A card's section: its table, the ceilings, the headline run, what failed, and the versions."""
    found, device = lines(card), card["device"]
    tops = {dtype: ceiling(found, dtype) for dtype in sorted({line.workload.dtype for line in found})}
    table = results.table(HEADS, [row(line, device, tops[line.workload.dtype]) for line in found])
    notes = [f"Ceiling of {dtype} products: {top / 1e12:.3g} TFLOP/s." for dtype, top in tops.items() if top]
    notes += headline(found)
    versions, codes = {}, {}
    for name, record in card["workloads"].items():
        if not complete(record):
            notes.append(f"{name} is not finished; the same command resumes.")
        sides = {"": record, JAX: record.get("jax", {}), **record.get("torch", {})}
        notes += [f"{name} {side} failed: {one['error']}" for side, one in sides.items() if "error" in one]
        del sides[""]
        seen = [one["versions"] for one in sides.values() if "versions" in one]
        versions |= {", ".join(f"{n} {v}" for n, v in one.items()): None for one in seen}
        codes.setdefault(record.get("jax", {}).get("code", "not recorded")[:12], []).append(name)
    notes += [f"Measured with {text}." for text in versions]
    by_code = "; ".join(f"{code} ({', '.join(names)})" for code, names in codes.items())
    notes.append(f"lcm_jax by the hash of its sources: {by_code}.")
    return "\n\n".join([f"### {card['card']}", table.rstrip(), *notes]) + "\n"


def headline(found: list[Line]) -> list[str]:
    """What the paper's run costs at the measured step time, if that was measured."""
    name = dataclasses.replace(HEADLINE, remat="none").name
    seconds = [line.ours() for line in found if line.workload.name.startswith(name)]
    if not seconds:
        return []
    return [
        f"The paper's run, {HEADLINE_STEPS} steps of {HEADLINE.batch} images at {HEADLINE.size} pixels: "
        f"{HEADLINE_STEPS * min(seconds) / 3600:.2f} hours of steps on this card (the paper: {HEADLINE_PAPER_HOURS} "
        "A100 hours; goal: 1)."
    ]


def chart(card: Mapping[str, Any], path: Path) -> None:
    """A PNG of torch's time over ours, one bar per way of torch."""
    from matplotlib.figure import Figure

    found = [line for line in lines(card) if line.workload.kind != "matmul"]
    names = list(dict.fromkeys(way for line in found for way in line.ways))
    figure = Figure(figsize=(max(6.0, 0.7 * len(found)), 4.0), layout="constrained")
    panel, width = figure.subplots(), 0.8 / len(names)
    for number, name in enumerate(names):
        bars = {i: line.ways[name]["ratio"] for i, line in enumerate(found) if name in line.ways}
        left = [i + (number - (len(names) - 1) / 2) * width for i in bars]
        panel.bar(left, bars.values(), width, label=f"torch, {name}")
    panel.axhline(1.0, color="black", linestyle="--", linewidth=1.0)
    panel.set_xticks(range(len(found)), [line.workload.name for line in found], rotation=30, ha="right")
    panel.set(title=f"{card['card']}: torch's time over lcm_jax's", ylabel="times")
    panel.legend()
    figure.savefig(path, dpi=120)


def write(folder: Path, beside: Path) -> str:
    """Writes BESIDE/table.md, FOLDER/*.png and BESIDE/README.md's part between the markers; returns the table.

    folder: of the cards' JSON files.
    """
    sections = []
    for path in sorted(folder.glob("*.json")):
        card = json.loads(path.read_text())
        if any(line.workload.kind != "matmul" for line in lines(card)):
            chart(card, path.with_suffix(".png"))
            sections.append(markdown(card) + f"\n![gain]({folder.name}/{path.stem}.png)\n")
    text = "\n".join(sections)
    (beside / "table.md").write_text(text)
    readme = beside / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if end:
            readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"
