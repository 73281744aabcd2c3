"""The figures of README and docs, from the results that experiments have stored: nothing is measured here.

    python -m experiments.figures [--only=batch,memory,roofline,demo] [--out=docs/figures]

batch      drawn: the way of a batch through the rooms of lcm_jax
memory     experiments/aot/rows, and the shapes of the state: what a training step keeps on a card
roofline   experiments/aot/rows: the training steps under the roofs of their chips
demo       experiments/shapes_lcm/{metrics.jsonl,table.json}: the loss of `make demo`, and the one-step error at its end
"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lcm_jax import files, foreign
from lcm_jax.cost.chips import GIB
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError

HERE = Path(__file__).parent
ROWS = HERE / "aot" / "rows"

# Of training steps as they are compiled now, one card each: row -> what it trains.
MEMORY = {
    "sd15-a100-80": "SD1.5, all weights",
    "sd15_lora-rtx4090": "SD1.5, LoRA",
    "config-sdxl_lcm": "SDXL, all weights",
    "sdxl_lora-rtx4090": "SDXL, LoRA, remat=block",
}
PARTS = {  # of the state, as `memory_parts` names them, and of the report -> its name
    "trained": "trained weights",
    "target": "EMA of them",
    "optimiser": "AdamW's moments",
    "frozen": "frozen weights",
    "encoders": "VAE and text encoders",
    "temporaries": "gradients, activations",
    "outside": "CUDA",
}
ERRORS = {"DDIM, scale 1": "teacher without guidance", "DDIM, scale 2": "teacher", "LCM, scale 2": "LCM"}  # in one step
SUM_OFF = 0.01  # share by which the parts' sum may be off from XLA's own arguments
CHIPS = {  # chip -> rows
    "v5e": ("sd15-v5e-16", "sdxl-v5e-16", "sd15_lora-v5e-16"),
    "v5p": ("sd15-v5p-16", "sdxl-v5p-16", "sd15_lora-v5p-16"),
    "v6e": ("sd15-v6e-16", "sdxl-v6e-16", "sd15_lora-v6e-16"),
    "RTX 4090": ("sd15_lora-rtx4090-20", "sdxl_lora-rtx4090"),
    "A100 80 GB": ("sd15-a100-80", "config-sd21_lcm", "sdxl-a100-80"),
    "H100": ("sd15-h100-8", "sdxl-h100-8"),
}
MODELS = {
    "sd15": "SD1.5",
    "sdxl": "SDXL",
    "sd15_lora": "SD1.5, LoRA",
    "sdxl_lora": "SDXL, LoRA",
    "sd21_lcm": "SD2.1 768",
}

# The way of a batch: columns of boxes, (where, what it does, what it hands on).
WAY = (
    (("data/", "records, crops", "uint8 [b H W 3]"),),
    (("data/encoding", "VAE, text encoders", "latents [b h w c]"),),
    (("distill/objective", "draw i, w, noise", "z at t_start"),),
    (("teacher", "guided, 2b rows", "z at t_end"), ("student", "at w, t_start", "prediction")),
    (("distill/lcm", "target by EMA", "loss [b]"),),
    (("distill/step", "AdamW, EMA", "new weights"),),
)
BOX, GAP, ROW = 170, 26, 104  # pixels


def batch() -> str:
    """An SVG drawing of `WAY`, readable on light and dark pages."""
    height = 2 * ROW + 20
    width = len(WAY) * (BOX + GAP) - GAP + 20
    shapes = [f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>']
    for column, boxes in enumerate(WAY):
        x = 10 + column * (BOX + GAP)
        for row, (room, does, gives) in enumerate(boxes):
            y = 10 + (row * ROW if len(boxes) > 1 else ROW / 2) + 10
            middle = y + (ROW - 20) / 2
            shapes.append(
                f'<rect x="{x}" y="{y}" width="{BOX}" height="{ROW - 20}" rx="6" fill="#eef1fb" stroke="#4051b5"/>'
            )
            for line, (text, style) in enumerate(
                ((room, 'font-weight="bold" fill="#1f2a6b"'), (does, 'fill="#222222"'), (gives, 'fill="#555555"'))
            ):
                shapes.append(
                    f'<text x="{x + BOX / 2}" y="{middle - 18 + 22 * line}" font-size="{16 if line < 2 else 14}" '
                    f'text-anchor="middle" {style}>{escape(text)}</text>'
                )
            if column:
                for start in range(len(WAY[column - 1])):
                    before = 20 + (start * ROW if len(WAY[column - 1]) > 1 else ROW / 2) + (ROW - 20) / 2
                    shapes.append(
                        f'<line x1="{x - GAP}" y1="{before}" x2="{x - 3}" y2="{middle}" stroke="#4051b5" '
                        'stroke-width="1.5" marker-end="url(#arrow)"/>'
                    )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#4051b5"/></marker></defs>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif"><title>The way of a batch</title>'
    )
    return "\n".join([opening, arrow, *shapes, "</svg>"]) + "\n"


def read_row(name: str) -> dict[str, Any] | None:
    """The kept row, with its report; None, and a line that says so, if it is not there."""
    path = ROWS / f"{name}.json"
    found = foreign.read_json(path) if path.is_file() else None
    if found is None or found["report"] is None:
        print(f"{name}: no such row yet; python -m experiments.aot.run --rows={name} compiles it", flush=True)
        return None
    return found


def memory_parts(row: dict[str, Any]) -> dict[str, float]:
    """Bytes on a card by the names of `PARTS`, of a row of one card.

    XLA's report has arguments as a whole: the state's shapes divide them.

    Raises:
      LcmError: the state of this lcm_jax is not that of the row.
    """
    import jax

    from lcm_jax.run import config as config_lib
    from lcm_jax.run import report as run_report
    from lcm_jax.runtime.mesh import make_mesh

    about, memory = row["row"], row["report"]["memory"]
    config = runpy.run_path(str(HERE.parent / about["config"]))["get_config"]()
    with config.unlocked():
        config.data.path = "images"
        for key, value in about["settings"].items():
            section, name = key.split(".")
            config[section][name] = value
    config = config_lib.resolve(config, platform="gpu")
    step, encoders = run_report.build(config, make_mesh(devices=jax.devices()[:1]))
    size = run_report.device_bytes
    parts = {
        "trained": size(step.state.params),
        "target": size(step.state.ema_params),
        "optimiser": size(step.state.opt_state),
        "frozen": size(step.frozen),
    }
    found = sum(parts.values()) + size(step.batch)
    if abs(found - memory["arguments"]) > SUM_OFF * memory["arguments"]:
        raise LcmError(
            f"{about['config']} now keeps {found / GIB:.2f} GiB, its row {memory['arguments'] / GIB:.2f}: "
            "compile it again, python -m experiments.aot.run"
        )
    rest = memory["temporaries"] + memory["results"] + memory["code"] + memory["workspace"]
    return parts | {"encoders": encoders, "temporaries": rest, "outside": memory.get("outside", 0.0)}


def memory() -> Any:
    """A bar for each of `MEMORY`, by part."""
    from matplotlib.figure import Figure

    rows = {}
    for name, title in MEMORY.items():
        if row := read_row(name):
            images, card = row["report"]["images_per_device"], row["report"]["chip"]["name"]
            rows[f"{title}\n{images:g} images, {card}"] = row
    found = {label: memory_parts(row) for label, row in rows.items()}
    figure = Figure(figsize=(8, 0.75 * len(found) + 1.3), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(found)
    for number, (part, title) in enumerate(PARTS.items()):
        sizes = [parts[part] / GIB for parts in found.values()]
        panel.barh(list(found), sizes, left=left, label=title, color=f"C{number}")
        left = [x + size for x, size in zip(left, sizes, strict=True)]
    for y, total in enumerate(left):
        panel.text(total + 0.3, y, f"{total:.1f}", va="center", fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel("GiB on the card, as compiled; nothing was executed")
    panel.set_xlim(0, max(left) * 1.1)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    return figure


def roofline() -> Any:
    """A panel for each of `CHIPS`: attainable FLOP/s against FLOPs a byte, and where the compiled steps are."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 6), layout="constrained")
    colors = {model: f"C{number}" for number, model in enumerate(MODELS)}
    for panel, (chip, names) in zip(figure.subplots(2, 3).flat, CHIPS.items(), strict=True):
        kept = {name: row["report"] for name in names if (row := read_row(name))}
        limits = next(iter(kept.values()))["chip"]
        ridge = limits["peak_flops"] / limits["hbm_bandwidth"]
        x = [40, ridge, 2000]
        panel.plot(x, [min(limits["peak_flops"], one * limits["hbm_bandwidth"]) / 1e12 for one in x], color="0.3")
        for name, report in kept.items():
            intensity = report["flops"]["total"] / report["bytes"]["total"]
            at = {kind: report["flops"]["total"] / report["seconds"][kind] / 1e12 for kind in ("serial", "roofline")}
            model = name.removeprefix("config-").split("-")[0]
            panel.plot([intensity] * 2, [*at.values()], color=colors[model], linewidth=1)
            panel.plot(intensity, at["roofline"], "o", color=colors[model], label=MODELS[model])
            panel.plot(intensity, at["serial"], "o", color=colors[model], markerfacecolor="white")
        panel.axvline(ridge, color="0.7", linestyle=":", linewidth=1)
        panel.set(xscale="log", yscale="log", ylim=(20, 1500))
        panel.set_title(f"{chip}: {limits['peak_flops'] / 1e12:.0f} TFLOP/s, ridge {ridge:.0f}", fontsize="medium")
        for axis, ticks in ((panel.xaxis, (50, 100, 200, 500, 1000)), (panel.yaxis, (50, 100, 200, 500, 1000))):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
            axis.set_ticks(ticks)
        panel.legend(fontsize="x-small", loc="lower right")
        panel.grid(alpha=0.3, which="both")
    figure.supxlabel("FLOPs of a step over its bytes of HBM")
    figure.supylabel("TFLOP/s; filled: the roof, hollow: one operation after another")
    return figure


def demo() -> Any:
    """The loss of `make demo` by timestep, and the error of one step at its end beside the teacher's."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (HERE / "shapes_lcm" / "metrics.jsonl").read_text().splitlines()]
    table = foreign.read_json(HERE / "shapes_lcm" / "table.json")["rows"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, error = figure.subplots(1, 2, width_ratios=(3, 2))
    bins = sorted(key for key in lines[0] if key.startswith("loss_bin_"))
    for number, key in enumerate(bins):
        kept = [(one["step"], one[key]) for one in lines if key in one]
        share = f"t {1000 * number // len(bins)} to {1000 * (number + 1) // len(bins)}"
        loss.plot(*zip(*kept, strict=True), color=f"C{number}", linewidth=1, label=share)
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    figure.legend(fontsize="small", loc="outside upper center", ncols=len(bins))
    loss.grid(alpha=0.3, which="both")
    rows = [row for row in table if row["endpoint_error"] is not None and row["steps"] == 1]
    shown = {f"{row['method']}, scale {row['guidance_scale']:g}": row["endpoint_error"] for row in rows}
    shown = {label: value for label, value in shown.items() if label in ERRORS}
    colors = ["C3" if label.startswith("LCM") else "0.6" for label in shown]
    bars = error.barh([ERRORS[label] for label in shown], [*shown.values()], color=colors)
    error.bar_label(bars, fmt="%.2f", fontsize="small", padding=2)
    error.set(xlabel="error of one step, in std of the latents", xlim=(0, 1))
    error.invert_yaxis()
    return figure


FIGURES: dict[str, tuple[str, Callable[[], Any]]] = {
    "batch": ("batch.svg", batch),
    "memory": ("memory.png", memory),
    "roofline": ("roofline.png", roofline),
    "demo": ("demo.png", demo),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(FIGURES), help="names, with commas")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "figures")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in FIGURES]:
        raise BadArgument("only", ",".join(unknown), f"choose of {', '.join(FIGURES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        file, make = FIGURES[name]
        figure = make()
        if isinstance(figure, str):
            files.write_atomic(args.out / file, figure)
        else:
            with files.new_file(args.out / file) as partial:
                figure.savefig(partial, format="png", dpi=120)
        print(args.out / file)


if __name__ == "__main__":
    sys.exit(exit_code(main))
