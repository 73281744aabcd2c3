"""The table of what TPU slices would make of the published models' training: `lcm_jax.aot` for each row below.

    python -m experiments.aot.run [--rows=sdxl] [--list]

Every row is compiled in a process of its own and kept in rows/NAME.json; the same command goes on with the rows that
are missing or whose settings have changed, and writes table.md from those that are there. A row takes 5 (SD1.5) to 25
minutes (SDXL) and 8 to 24 GB of memory; libtpu, no TPU. What does not fit is kept, too, with what it would have needed.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from lcm_jax import files

HERE = Path(__file__).parent
SIXTEEN = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}

# model -> (config, chip -> (images per chip, settings)). Adapters alone are trained in the "lora" ones: their base is
# held once, so that more of the chip is left for pictures.
LEAN = {"model.teacher_dtype": "bfloat16"}
MODELS: dict[str, tuple[str, dict[str, tuple[int, dict[str, Any]]]]] = {
    "sdxl": (
        "sdxl_lcm",
        {
            "v5e": (6, {"mesh.fsdp": 16, "train.remat": "block"}),
            "v5p": (8, {"mesh.fsdp": 16}),
            "v6e": (6, {"mesh.fsdp": 16, "train.remat": "block"}),
        },
    ),
    "sd15": (
        "sd15_lcm",
        {
            "v5e": (8, {"mesh.fsdp": 16}),
            "v5p": (32, {"mesh.fsdp": 16}),
            "v6e": (16, {"mesh.fsdp": 16}),
        },
    ),
    "sdxl_lora": (
        "sdxl_lcm_lora",
        {
            "v5e": (4, {"mesh.fsdp": 16, "train.remat": "block"} | LEAN),
            "v5p": (8, {"mesh.fsdp": 16} | LEAN),
            "v6e": (16, {"mesh.fsdp": 16, "train.remat": "block"} | LEAN),
        },
    ),
    "sd15_lora": (
        "sd15_lcm_lora",
        {
            "v5e": (8, {"mesh.fsdp": 16} | LEAN),
            "v5p": (32, {"mesh.fsdp": 16} | LEAN),
            "v6e": (16, {"mesh.fsdp": 16} | LEAN),
        },
    ),
    "sd21": (
        "sd21_lcm",
        {
            "v5e": (4, {"mesh.fsdp": 16}),
            "v5p": (16, {"mesh.fsdp": 16}),
            "v6e": (8, {"mesh.fsdp": 16}),
        },
    ),
}
# For weak scaling: the row of 16 v5e chips on more of them, fsdp as there.
LARGER = {64: "v5e:8x8", 256: "v5e:16x16"}
SCALED = ("sd15", "sdxl")

TITLES = {
    "sd15": "SD1.5 512 LCD",
    "sd15_lora": "SD1.5 512 LoRA",
    "sd21": "SD2.1 768 LCD",
    "sdxl": "SDXL 1024 LCD",
    "sdxl_lora": "SDXL 1024 LoRA",
}
COLUMNS = (
    "model",
    "slice",
    "images/chip",
    "settings",
    "HBM GiB",
    "of",
    "roofline ms",
    "bound by",
    "images/s/chip",
    "modelled utilisation",
    "one by one",
    "collectives of time",
    "compiled in s",
)


def rows() -> dict[str, dict[str, Any]]:
    """Row name -> its config, topology and overrides; in the order in which they are worth having."""

    def on_sixteen(models: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {
            f"{model}-{chip}-16": _row(model, chip, topology, 16)
            for chip, topology in SIXTEEN.items()
            for model in models
        }

    larger = {f"{model}-v5e-{n}": _row(model, "v5e", LARGER[n], n) for n in LARGER for model in SCALED}
    return on_sixteen(SCALED) | larger | on_sixteen([model for model in MODELS if model not in SCALED])


def _row(model: str, chip: str, topology: str, chips: int) -> dict[str, Any]:
    config, by_chip = MODELS[model]
    images, settings = by_chip[chip]
    return {
        "model": model,
        "config": f"configs/{config}.py",
        "topology": topology,
        "settings": {"data.batch_size": images * chips} | settings,
    }


def is_done(path: Path, row: dict[str, Any]) -> bool:
    return path.is_file() and files.read_json(path)["row"] == row


def run_row(path: Path, row: dict[str, Any]) -> None:
    """Compiles one row in a process of its own, so that its memory returns, and keeps what came of it."""
    out = path.with_suffix(".part")
    command = [
        sys.executable,
        "-m",
        "lcm_jax.aot",
        f"--config={row['config']}",
        f"--topology={row['topology']}",
        f"--out={out}",
        *(f"--config.{key}={value}" for key, value in row["settings"].items()),
    ]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=HERE.parents[1], stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        found = {"row": row, "report": files.read_json(out)}
        out.unlink()
    elif "does not fit" in done.stderr:
        found = {"row": row, "report": None, "error": done.stderr.strip().splitlines()[-1]}
    else:
        raise SystemExit(f"{path.stem} failed:\n{done.stderr[-3000:]}")
    print(found.get("error", ""), flush=True)
    with files.new_file(path) as partial:
        partial.write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the kept rows, and weak scaling of those that are there on more chips."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(one)) + " |" for one in found.values()]
    scaling = []
    for model in SCALED:
        speeds = {n: _speed(found.get(f"{model}-v5e-{n}")) for n in (16, *LARGER)}
        if all(speeds.values()):
            parts = ", ".join(f"{n} chips {speeds[n] / speeds[16]:.1%}" for n in LARGER)
            scaling.append(f"Weak scaling of {TITLES[model]}, images/s/chip against 16 v5e chips: {parts}.")
    return "\n".join([*lines, "", *scaling]).rstrip() + "\n"


def _cells(one: dict[str, Any]) -> list[str]:
    row, report = one["row"], one["report"]
    options = ", ".join(f"{k.split('.')[1]}={v}" for k, v in row["settings"].items() if k != "data.batch_size")
    if report is None:
        return [TITLES[row["model"]], row["topology"], "", options, one["error"], *[""] * (len(COLUMNS) - 5)]
    seconds, gib = report["seconds"], 2.0**30
    return [
        TITLES[row["model"]],
        row["topology"],
        f"{report['images_per_device']:g}",
        options,
        f"{report['memory']['needed'] / gib:.1f}",
        f"{report['chip']['hbm_bytes'] / gib:.1f}",
        f"{1e3 * seconds['roofline']:.0f}",
        seconds["bound"],
        f"{report['images_per_second_per_device']:.2f}",
        f"{report['utilisation']:.1%}",
        f"{report['serial_utilisation']:.1%}",
        f"{report['collective_share']:.1%}",
        f"{report['compile_seconds']:.0f}",
    ]


def _speed(one: dict[str, Any] | None) -> float | None:
    return one["report"]["images_per_second_per_device"] if one and one["report"] else None


_ROWS = flags.DEFINE_string("rows", "", "only rows whose name begins so, as sdxl-v5e")
_LIST = flags.DEFINE_bool("list", False, "print the rows, compile nothing")


def main(argv: list[str]) -> None:
    del argv
    asked = {name: row for name, row in rows().items() if name.startswith(_ROWS.value)}
    for name, row in asked.items():
        path = HERE / "rows" / f"{name}.json"
        if _LIST.value or is_done(path, row):
            print(f"{name}: {'there' if is_done(path, row) else 'missing'}")
            continue
        run_row(path, row)
        _write_table()
    if not _LIST.value:
        _write_table()


def _write_table() -> None:
    paths = {name: HERE / "rows" / f"{name}.json" for name in rows()}
    kept = {name: files.read_json(path) for name, path in paths.items() if path.is_file()}
    with files.new_file(HERE / "table.md") as partial:
        partial.write_text(table(kept))


if __name__ == "__main__":
    app.run(main)
