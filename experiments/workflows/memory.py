"""Peak memory of sampling SD 1.5 and SDXL in 4 steps, by the switches of `lcm_jax.sample` for less of it.

    python -m experiments.workflows.memory [--only=sd15-rtx4090]

Programs are compiled, not run: for an RTX 4090 that is not here (jax's CUDA plugin, bfloat16), and for this CPU
(float32). A row is one call of `lcm_jax.aot --sampling`; those for the card without switches are of experiments/aot.
Rows are kept in memory.json: the same command compiles the missing ones and writes memory.md from all. A row takes
minutes, and up to 7 GB for SDXL.

The peak is that of the program that needs most, with the weights that are on the device beside it: text encoders and
UNet are of one report, the decoder of another, and which weights are there follows from `--offload`.
"""

import runpy
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments import results
from experiments.aot import run as aot_rows
from lcm_jax import aot, files, foreign
from lcm_jax.cost.chips import GIB
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.run.report import device_bytes
from lcm_jax.runtime.mesh import make_mesh
from lcm_jax.sampling.offload import resident

HERE = Path(__file__).parent
MODELS = {"sd15": "sd15_lcm", "sdxl": "sdxl_lcm"}
DTYPES = {"rtx4090:1": "bfloat16", "cpu": "float32"}
BATCHES = (1, 4)
LEAN = ("--weights=int8", "--sliced")  # of the second report of each model, batch and device
# Line of the table -> (whether weights are int8, whether decoding is sliced, offload).
LINES: dict[str, tuple[bool, bool, str | None]] = {
    "none": (False, False, None),
    "`--sliced`": (False, True, None),
    "`--offload=text`": (False, False, "text"),
    "`--offload=all`": (False, False, "all"),
    "`--weights=int8`": (True, False, None),
    "`--weights=int8 --sliced`": (True, True, None),
    "`--weights=int8 --sliced --offload=all`": (True, True, "all"),
}
PROGRAMS = {"text": ("text_encoder", "text_encoder_2"), "sampler": ("unet",), "decoder": ("vae",)}


def rows() -> dict[str, dict[str, Any]]:
    """Row name -> what is compiled."""
    return {
        f"{model}-{topology.partition(':')[0]}-{batch}-{name}": {
            "config": f"configs/{config}.py",
            "topology": topology,
            "settings": {"model.dtype": dtype},
            "flags": ["--sampling", f"--batch_size={batch}", *switches],
        }
        for model, config in MODELS.items()
        for topology, dtype in DTYPES.items()
        for batch in BATCHES
        for name, switches in (("whole", ()), ("lean", LEAN))
    }


def compiled(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the memory, and for chips the times, of its report."""
    earlier = aot_rows.HERE / "rows" / f"sample-{name.removesuffix('-whole')}.json"
    if earlier.is_file():
        report = foreign.read_json(earlier)["report"]
        report["memory"]["of_parts"] = _bytes_of_parts(row["config"])
        return _kept(row, report)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        aot_rows.run_row(path, row)
        report = foreign.read_json(path)["report"]
    if report is None:
        raise LcmError(f"{name} does not fit its card; choose a larger one")
    return _kept(row, report)


def _kept(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    serial = {program: (one.get("seconds") or {}).get("serial") for program, one in report["programs"].items()}
    seconds = sum(one["compile_seconds"] for one in report["programs"].values())
    return {"row": row, "memory": report["memory"], "serial": serial, "compile_seconds": round(seconds, 1)}


def _bytes_of_parts(config: str) -> dict[str, int]:
    """Part -> bytes of its weights in bfloat16."""
    read = runpy.run_path(str(HERE.parents[1] / config))["get_config"]()
    params = aot.generator_of(aot.prepared(read), make_mesh(devices=jax.devices()[:1]))[0].params
    return {part: device_bytes(tree) for part, tree in params.items()}


def peak(whole: dict[str, Any], lean: dict[str, Any], int8: bool, sliced: bool, offload: str | None) -> float:
    """Bytes on the device, from the memory of both reports of a model."""
    weights, decoder = (lean if int8 else whole), (lean if sliced else whole)
    beside = weights["beside"] | {"decoder": decoder["beside"]["decoder"]}
    held = weights["of_parts"]
    return max(
        sum(held[part] for part in resident(offload, held, PROGRAMS[program])) + beside[program] for program in beside
    )


def markdown(kept: dict[str, dict[str, Any]]) -> str:
    """The tables of the rows that exist."""
    parts = []
    for topology, dtype in DTYPES.items():
        device = topology.partition(":")[0]
        columns = [(model, batch) for model in MODELS for batch in BATCHES]
        pairs = {
            (model, batch): [kept.get(f"{model}-{device}-{batch}-{name}") for name in ("whole", "lean")]
            for model, batch in columns
        }
        if not any(map(any, pairs.values())):
            continue

        def cell(pair: list[dict[str, Any] | None], line: tuple[bool, bool, str | None]) -> str:
            whole, lean = (one and one["memory"] for one in pair)
            known = lean if line[:2] == (True, True) else whole if line[:2] == (False, False) else whole and lean
            return f"{peak(whole, lean, *line) / GIB:.2f}" if known else "not compiled"

        heads = ["switches", *(f"{model}, batch {batch}" for model, batch in columns)]
        lines = {name: line for name, line in LINES.items() if device != "cpu" or line[2] is None}
        cells = [[name, *(cell(pairs[column], line) for column in columns)] for name, line in lines.items()]
        beside = "" if device != "cpu" else " (`--offload` saves nothing there: its memory is the host's)"
        parts.append(f"Peak memory in GiB, {topology}, {dtype}{beside}:\n\n{results.table(heads, cells)}")
        times = [
            f"{model}, batch {batch}: {1e3 * pair[0]['serial']['sampler']:.0f} ms -> "
            f"{1e3 * pair[1]['serial']['sampler']:.0f} ms"
            for (model, batch), pair in pairs.items()
            if all(pair) and pair[0]["serial"]["sampler"]
        ]
        if times:
            parts.append(f"Sampler, one operation after another at best, whole -> int8: {'; '.join(times)}.\n")
    return "\n".join(parts)


_ONLY = flags.DEFINE_string("only", "", "only rows whose name starts like this")


def main() -> None:
    path = HERE / "memory.json"

    def kept() -> dict[str, dict[str, Any]]:
        return foreign.read_json(path) if path.is_file() else {}

    for name, row in rows().items():
        if name.startswith(_ONLY.value) and kept().get(name, {}).get("row") != row:
            found = compiled(name, row)
            files.write_atomic(path, results.to_json(kept() | {name: found}, 2))  # other calls write rows, too
    files.write_atomic(HERE / "memory.md", markdown(kept()))


if __name__ == "__main__":
    app.run(lambda argv: exit_code(main))
