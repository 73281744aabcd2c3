"""results/*.json -> table.md, a chart for each card, and both in README.md between its markers."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.speed.measure import JAX, complete
from experiments.speed.workloads import HEADLINE, HEADLINE_PAPER_HOURS, HEADLINE_STEPS, LISTS, Workload

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
GIB = 2**30
HEAD = (
    "| work | lcm_jax | torch eager, and ours in its turns | torch, its best | our gain over eager "
    "| over the best, pair by pair | goal | of the product ceiling: lcm_jax / torch | peak GiB: lcm_jax / torch "
    "| first run: lcm_jax / torch |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)
# Of each device: kind -> (least gain, over which way of torch: "eager", or "" for the best).
GOALS = {
    "cpu": {"sample": (1.2, "eager"), "lcd": (1.2, "eager"), "unet": (1.0, "")},
    "gpu": {"sample": (1.3, ""), "lcd": (1.5, "")},
}
UTILISATION_GOAL = 0.5  # of LCD steps on a GPU


@dataclasses.dataclass(frozen=True)
class Line:
    """A workload whose pairs are measured, or some of them."""

    workload: Workload
    ways: Mapping[str, Mapping[str, Any]]
    best: str
    flops: float | None
    peak: tuple[float, float]
    setup: tuple[float, float]

    def torch(self, way: str = "") -> float:
        return statistics.median(self.ways[way or self.best]["seconds"])

    def ours(self, way: str = "") -> float:
        """Our seconds in the turns beside a way of torch."""
        return statistics.median(self.ways[way or self.best]["jax_seconds"])

    def ratio(self, way: str = "") -> float:
        return self.ways[way or self.best]["ratio"]


def lines(card: Mapping[str, Any]) -> list[Line]:
    """The lines of a card's record, in the order of its device's list; what failed on either side has none."""
    found = {}
    for name, record in card["workloads"].items():
        ways = {way: one for way, one in record.get("torch", {}).items() if "ratio" in one}
        if not ways:
            continue
        best = min(ways, key=lambda way: ways[way]["ratio"])  # pair by pair: the machine's speed may move between ways
        found[name] = Line(
            Workload(**record["workload"]),
            ways,
            best,
            record.get("flops"),
            (record["jax"]["peak_bytes"], ways[best]["peak_bytes"]),
            (record["jax"]["setup_s"], ways[best]["setup_s"]),
        )
    order = [workload.name for workload in LISTS[card["device"]]()]
    return sorted(
        found.values(), key=lambda line: order.index(line.workload.name) if line.workload.name in order else len(order)
    )


def ceiling(found: list[Line], dtype: str) -> float | None:
    """FLOPs per second of the square product in this dtype, the better side's; None: not measured."""
    products = [line for line in found if line.workload.kind == "matmul" and line.workload.dtype == dtype]
    return max((line.flops / min(line.ours(), line.torch()) for line in products), default=None)


def utilisation(line: Line, top: float | None) -> tuple[float, float] | None:
    """Shares of the ceiling that the model's FLOPs reach, ours and torch's best; what is computed twice counts once."""
    if not top or not line.flops:
        return None
    return line.flops / line.ours() / top, line.flops / line.torch() / top


def goal(line: Line, device: str, top: float | None) -> str:
    """ "1.3: met", "1.3: missed", and the same of the utilisation; or nothing where there is no goal."""
    least, way = GOALS[device].get(line.workload.kind, (None, ""))
    told = []
    if least is not None and (not way or way in line.ways):
        told.append(f"{least:g}{f' over {way}' if way else ''}: {'met' if line.ratio(way) >= least else 'missed'}")
    shares = utilisation(line, top)
    if shares and (device, line.workload.kind) == ("gpu", "lcd"):
        reached = "met" if shares[0] >= UTILISATION_GOAL else "missed"
        told.append(f"{100 * UTILISATION_GOAL:.0f} % of the ceiling: {reached}")
    return ", ".join(told)


def row(line: Line, device: str, top: float | None) -> str:
    """The line as one of the table."""
    shares, best, has_eager = utilisation(line, top), line.ways[line.best], "eager" in line.ways
    cells = [
        line.workload.name + (" (by itself)" if line.workload.alone else ""),
        f"{_ms(line.ours())} ± {100 * spread(best['jax_seconds']):.0f} %",
        f"{_ms(line.torch('eager'))}, ours {_ms(line.ours('eager'))}" if has_eager else "",
        f"{_ms(line.torch())} ± {100 * spread(best['seconds']):.0f} %, {line.best}",
        f"{line.ratio('eager'):.2f}" if has_eager else "",
        f"{line.ratio():.2f} ({min(best['ratios']):.2f} to {max(best['ratios']):.2f})",
        goal(line, device, top),
        f"{100 * shares[0]:.0f} % / {100 * shares[1]:.0f} %" if shares else "",
        " / ".join(f"{size / GIB:.1f}" for size in line.peak),
        " / ".join(f"{seconds:.0f} s" for seconds in line.setup),
    ]
    return f"| {' | '.join(cells)} |"


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
    table = HEAD + "\n".join(row(line, device, tops[line.workload.dtype]) for line in found)
    notes = [f"Ceiling of {dtype} products: {top / 1e12:.3g} TFLOP/s." for dtype, top in tops.items() if top]
    notes += headline(found)
    for name, record in card["workloads"].items():
        if not complete(record):
            notes.append(f"{name} is not finished; the same command goes on.")
        parts = {"": record, JAX: record.get("jax", {}), **record.get("torch", {})}
        notes += [f"{name} {way} failed: {one['error']}" for way, one in parts.items() if "error" in one]
    sides = [one for r in card["workloads"].values() for one in (r.get("jax", {}), *r.get("torch", {}).values())]
    versions = (one["versions"] for one in sides if "versions" in one)
    seen = dict.fromkeys(", ".join(f"{n} {v}" for n, v in one.items()) for one in versions)
    notes += [f"Measured with {text}." for text in seen]
    codes: dict[str, list[str]] = {}
    for name, record in card["workloads"].items():
        codes.setdefault(record.get("jax", {}).get("code", "not recorded")[:12], []).append(name)
    told = "; ".join(f"{code} ({', '.join(names)})" for code, names in codes.items())
    notes.append(f"lcm_jax by the hash of its sources: {told}.")
    return "\n\n".join([f"### {card['card']}", table, *notes]) + "\n"


def headline(found: list[Line]) -> list[str]:
    """What the paper's run costs at the measured step time, where that was measured."""
    name = dataclasses.replace(HEADLINE, remat="none").name
    of_it = [line for line in found if line.workload.name.startswith(name)]
    if not of_it:
        return []
    hours = HEADLINE_STEPS * min(line.ours() for line in of_it) / 3600
    return [
        f"The paper's run, {HEADLINE_STEPS} steps of {HEADLINE.batch} pictures at {HEADLINE.size} pixels: "
        f"{hours:.2f} hours of steps on this card (the paper: {HEADLINE_PAPER_HOURS} A100 hours; goal: 1)."
    ]


def chart(card: Mapping[str, Any], path: Path) -> None:
    """A PNG of torch's time over ours, a bar for each of its ways."""
    from matplotlib.figure import Figure

    found = [line for line in lines(card) if line.workload.kind != "matmul"]
    names = list(dict.fromkeys(way for line in found for way in line.ways))
    figure = Figure(figsize=(max(6.0, 0.7 * len(found)), 4.0), layout="constrained")
    panel, width = figure.subplots(), 0.8 / len(names)
    for number, name in enumerate(names):
        places = [i for i, line in enumerate(found) if name in line.ways]
        left = [i + (number - (len(names) - 1) / 2) * width for i in places]
        panel.bar(left, [found[i].ways[name]["ratio"] for i in places], width, label=f"torch, {name}")
    panel.axhline(1.0, color="black", linestyle="--", linewidth=1.0)
    panel.set_xticks(range(len(found)), [line.workload.name for line in found], rotation=30, ha="right")
    panel.set(title=f"{card['card']}: torch's time over lcm_jax's", ylabel="times")
    panel.legend()
    figure.savefig(path, dpi=120)


def write(results: Path, folder: Path) -> str:
    """Makes FOLDER/table.md, RESULTS/*.png, and README.md's part between the markers; returns the table."""
    cards = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    sections = []
    for path, card in cards.items():
        if any(line.workload.kind != "matmul" for line in lines(card)):
            chart(card, path.with_suffix(".png"))
            sections.append(markdown(card) + f"\n![gain]({results.name}/{path.stem}.png)\n")
    text = "\n".join(sections)
    (folder / "table.md").write_text(text)
    readme = folder / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if end:
            readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"
