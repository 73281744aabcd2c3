"""What TPUs and GPUs would make of the published models: `lcm_jax.aot` for each row below.

    python -m experiments.aot.run [--rows=sdxl] [--list]

Every row is compiled in a process of its own and kept in rows/NAME.json; the same command compiles the rows that are
missing or whose settings have changed, and writes table.md from those that exist. A row takes 5 (SD1.5) to 25 minutes
(SDXL) and 4 to 24 GB of memory; it needs libtpu or jax's CUDA plugin, but no TPU or GPU. A row that does not fit is
kept, too, with the memory it would need.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import results
from lcm_jax import files, foreign
from lcm_jax.cost.chips import GIB
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

HERE = Path(__file__).parent
SIXTEEN = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}

FSDP = {"mesh.fsdp": 16}
REMAT = FSDP | {"train.remat": "block"}
LEAN = {"model.teacher_dtype": "bfloat16"}
# Model -> (config, chip -> (images per chip, settings)). LoRA runs hold their base once, so more of the chip is left
# for images.
MODELS: dict[str, tuple[str, dict[str, tuple[int, dict[str, Any]]]]] = {
    "sdxl": ("sdxl_lcm", {"v5e": (6, REMAT), "v5p": (8, FSDP), "v6e": (6, REMAT)}),
    "sd15": ("sd15_lcm", {"v5e": (8, FSDP), "v5p": (32, FSDP), "v6e": (16, FSDP)}),
    "sdxl_lora": ("sdxl_lcm_lora", {"v5e": (4, REMAT | LEAN), "v5p": (8, FSDP | LEAN), "v6e": (16, REMAT | LEAN)}),
    "sd15_lora": ("sd15_lcm_lora", {"v5e": (8, FSDP | LEAN), "v5p": (32, FSDP | LEAN), "v6e": (16, FSDP | LEAN)}),
    "sd21": ("sd21_lcm", {"v5e": (4, FSDP), "v5p": (16, FSDP), "v6e": (8, FSDP)}),
}
# For weak scaling: the row of 16 v5e chips on more of them, with the same fsdp.
LARGER = {64: "v5e:8x8", 256: "v5e:16x16"}
SCALED = ("sd15", "sdxl")

# GPUs. LCM-LoRA on cards of 24 GB, full distillation on 80 GB and on eight such cards: (config, topology, settings).
GPUS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd15_lora-rtx4090": ("sd15_lcm_lora", "rtx4090:1", {"data.batch_size": 4}),
    "sd15_lora-rtx4090-15": ("sd15_lcm_lora", "rtx4090:1", {"data.batch_size": 15}),
    "sd15_lora-rtx4090-20": ("sd15_lcm_lora", "rtx4090:1", {"data.batch_size": 20}),
    "sdxl_lora-rtx4090": ("sdxl_lcm_lora", "rtx4090:1", {"train.remat": "block"}),
    "sd15-a100-80": ("sd15_lcm", "a100-80:1", {}),
    "sd15-h100-8": ("sd15_lcm", "h100:8", {"data.batch_size": 96}),
    "sdxl-a100-80": ("sdxl_lcm", "a100-80:1", {"train.remat": "block", "data.batch_size": 1}),
    "sdxl-h100-8": ("sdxl_lcm", "h100:8", {"train.remat": "block", "mesh.fsdp": 8, "data.batch_size": 32}),
}
SAMPLED = {"sd15": "sd15_lcm", "sdxl": "sdxl_lcm"}  # model -> config, for one RTX 4090
BATCHES = (1, 4, 8)
# Each config as it stands, on a card that it should fit; tests/test_configs.py holds their docstrings to it.
CARDS = {
    "shapes_lcm": "rtx3060:1",
    "shapes_lcm_lora": "rtx3060:1",
    "sd15_lcm_lora": "l4:1",
    "collage_lcm_lora": "rtx3060:1",
    "my_sd15_24gb": "rtx4090:1",
    "my_sdxl_24gb": "rtx4090:1",
    "sd15_lcm": "a100-40:1",
    "dreamshaper_v7_lcm": "a100-80:1",
    "pokemon_lcf": "a100-80:1",
    "sd21_base_lcm": "h200:1",
    "sd21_lcm": "a100-80:1",
    "ssd1b_lcm_lora": "a100-80:1",
    "ssd1b_lcm": "h200:1",
    "lcm_xl_lora_pokemon_blip": "rtx5090:1",
    "lcm_xl_pokemon_blip": "h200:1",
    "sdxl_lcm_lora": "h200:1",
    "sdxl_lcm": "h200:1",
}

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
    """Row name -> its config, topology and overrides, the most interesting first."""

    def row(model: str, chip: str, topology: str, chips: int) -> dict[str, Any]:
        config, by_chip = MODELS[model]
        images, settings = by_chip[chip]
        settings = {"data.batch_size": images * chips} | settings
        return {"model": model, "config": f"configs/{config}.py", "topology": topology, "settings": settings}

    def on_sixteen(models: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {f"{model}-{chip}-16": row(model, chip, SIXTEEN[chip], 16) for chip in SIXTEEN for model in models}

    larger = {f"{model}-v5e-{n}": row(model, "v5e", LARGER[n], n) for n in LARGER for model in SCALED}
    tpus = on_sixteen(SCALED) | larger | on_sixteen([model for model in MODELS if model not in SCALED])
    return tpus | gpu_rows()


def gpu_rows() -> dict[str, dict[str, Any]]:
    """As `rows`; "flags" of `lcm_jax.aot`, and "table", where a row is listed."""

    def row(
        table: str, model: str, config: str, topology: str, settings: dict[str, Any], *asked: str
    ) -> dict[str, Any]:
        place = {"config": f"configs/{config}.py", "topology": topology, "settings": settings}
        return {"table": table, "model": model, **place, "flags": list(asked)}

    found = {
        name: row("training", name.split("-")[0], config, topology, settings)
        for name, (config, topology, settings) in GPUS.items()
    }
    for model, config in SAMPLED.items():
        for n in BATCHES:
            asked = "--sampling", f"--batch_size={n}"
            found[f"sample-{model}-rtx4090-{n}"] = row("sampling", model, config, "rtx4090:1", {}, *asked)
    return found | {f"config-{name}": row("configs", name, name, card, {}) for name, card in CARDS.items()}


def is_done(path: Path, row: dict[str, Any]) -> bool:
    return path.is_file() and foreign.read_json(path)["row"] == row


def run_row(path: Path, row: dict[str, Any]) -> None:
    """Compiles one row in a process of its own, which gives its memory back, and keeps the report."""
    out = path.with_suffix(".part")
    command = [sys.executable, "-m", "lcm_jax.aot", f"--config={row['config']}", f"--topology={row['topology']}"]
    command += [f"--out={out}", *(f"--config.{key}={value}" for key, value in row["settings"].items())]
    command += row.get("flags", [])
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=HERE.parents[1], stderr=subprocess.PIPE, text=True)
    errors = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode == 0:
        found = {"row": row, "report": foreign.read_json(out)}
    elif done.returncode == 1 and errors:  # an exception, such as the compiler's own, also ends with 1
        found = {"row": row, "report": None, "error": errors[-1]}
    else:
        raise LcmError(f"{path.stem} failed:\n{done.stderr[-3000:]}")
    out.unlink(missing_ok=True)
    print(found.get("error", ""), flush=True)
    files.write_atomic(path, results.to_json(found, 2))


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Markdown tables of the kept rows."""
    of = {name: {n: one for n, one in found.items() if one["row"].get("table") == name} for name in (None, *GPU_TABLES)}
    parts = [f"## Training on TPUs\n\n{tpu_table(of[None])}"]
    for name, (title, columns) in GPU_TABLES.items():
        cells = [_gpu_cells(one, columns) for one in of[name].values()]
        parts.append(f"## {title}\n\n{results.table((*FIRST, *columns), cells)}")
    return "\n".join(parts)


def tpu_table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the rows of TPUs, and the weak scaling of models that have rows on more chips."""
    lines = [results.table(COLUMNS, map(_cells, found.values()))]
    for model in SCALED:
        kept = {n: found.get(f"{model}-v5e-{n}") for n in (16, *LARGER)}
        if all(one and one["report"] for one in kept.values()):
            speeds = {n: one["report"]["images_per_second_per_device"] for n, one in kept.items()}
            parts = ", ".join(f"{n} chips {speeds[n] / speeds[16]:.1%}" for n in LARGER)
            lines.append(f"Weak scaling of {TITLES[model]}, images/s/chip against 16 v5e chips: {parts}.\n")
    return lines[0] + "\n" + "".join(lines[1:])


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


def _gib(path: str) -> Callable[[dict[str, Any]], str]:
    return lambda report: f"{functools.reduce(lambda value, key: value.get(key, 0), path.split('.'), report) / GIB:.2f}"


def _kernels(report: dict[str, Any]) -> int:
    programs = report.get("programs", {"step": report})
    return sum(kind["count"] for one in programs.values() for kind in one["kinds"])


def _gigabytes(report: dict[str, Any]) -> str:
    programs = report.get("programs", {"step": report})
    return f"{sum(one['bytes']['total'] for one in programs.values()) / 1e9:.1f}"


_TIMES = {
    "kernels": _kernels,
    "GB moved": _gigabytes,
    "roofline ms": lambda report: f"{1e3 * report['seconds']['roofline']:.0f}",
    "one by one ms": lambda report: f"{1e3 * report['seconds']['serial']:.0f}",
}
_FIT = {"needed GiB": _gib("memory.needed"), "of": _gib("memory.available")}
# Table -> (title, column -> its cell from a report).
GPU_TABLES: dict[str, tuple[str, dict[str, Callable[[dict[str, Any]], Any]]]] = {
    "training": (
        "Training on GPUs",
        {
            "images a card": lambda report: f"{report['images_per_device']:g}",
            "arguments GiB": _gib("memory.arguments"),
            "temporaries": _gib("memory.temporaries"),
            "encoders": _gib("memory.encoders"),
            "workspace": _gib("memory.workspace"),
            **_FIT,
            **_TIMES,
            "images/s/card": lambda report: f"{report['images_per_second_per_device']:.1f}",
        },
    ),
    "sampling": (
        "Sampling in 4 steps on a GPU",
        {
            "images": lambda report: report["images"],
            "weights GiB": _gib("memory.weights"),
            "sampler beside them": _gib("memory.beside.sampler"),
            "decoder": _gib("memory.beside.decoder"),
            **_FIT,
            **_TIMES,
        },
    ),
    "configs": (
        "Configs as they stand, on a card that they fit",
        {"images a step": lambda report: report["images_per_step"], **_FIT, **_TIMES},
    ),
}


FIRST = ("model", "card", "settings")


def _gpu_cells(one: dict[str, Any], columns: Mapping[str, Callable[[dict[str, Any]], Any]]) -> list[str]:
    row, report = one["row"], one["report"]
    settings = ", ".join(
        f"{key.split('.')[1]}={value}" for key, value in row["settings"].items() if key != "data.batch_size"
    )
    cells = [TITLES.get(row["model"], row["model"]), row["topology"], settings]
    return cells + ([str(cell(report)) for cell in columns.values()] if report else [one["error"]])


_ROWS = flags.DEFINE_string("rows", "", "only rows whose name starts like this, as sdxl-v5e")
_LIST = flags.DEFINE_bool("list", False, "print the rows, compile nothing")


def main() -> None:
    paths = {name: HERE / "rows" / f"{name}.json" for name in rows()}
    for name, row in rows().items():
        if not name.startswith(_ROWS.value):
            continue
        if _LIST.value or is_done(paths[name], row):
            print(f"{name}: {'done' if is_done(paths[name], row) else 'missing'}")
            continue
        run_row(paths[name], row)
        write_table(paths)
    if not _LIST.value:
        write_table(paths)


def write_table(paths: dict[str, Path]) -> None:
    kept = {name: foreign.read_json(path) for name, path in paths.items() if path.is_file()}
    files.write_atomic(HERE / "table.md", tables(kept))


if __name__ == "__main__":
    app.run(lambda argv: exit_code(main))
