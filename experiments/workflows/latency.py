"""Latency of each workflow beside diffusers, eager, on this CPU: the same LCM, 4 steps, float32, interleaved.

    python -m experiments.workflows.latency [--workdir=runs/shapes_lcm] [--only=inpainting] [--publish]

    WORKDIR/                                   a run of configs/shapes_lcm.py, and its export/; trained now if missing
    WORKDIR/workflows/latency.{md,json}        the table; what is measured is kept, the same command resumes

A process of each side is alive; turns, and the ratio of each turn, are those of `experiments.speed.measure`. Measured
is a call from the prompt to Pillow images, with as many threads on both sides as there are cores. It needs
lcm_jax[torch], and a machine that does nothing else.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from experiments import results
from experiments.speed import measure
from experiments.speed import run as speed
from experiments.speed.worker import Worker
from experiments.terminal import teller
from experiments.workflows.workloads import BATCHES, KINDS, STEPS, STRENGTH, Workflow
from lcm_jax import files, foreign
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

CONFIG = "configs/shapes_lcm.py"
GOAL = 1.2  # times eager
COLUMNS = {
    "workflow": ("kind", "{}"),
    "images": ("batch", "{}"),
    "lcm_jax, ms": ("ours", "{:.1f}"),
    "diffusers eager, ms": ("theirs", "{:.1f}"),
    "ratio": ("ratio", "{:.2f}"),
    "of the turns": ("turns", "{}"),
    f"goal {GOAL}": ("goal", "{}"),
}
NOTE = (
    "{card}; {turns} interleaved turns of about {seconds:g} s, medians. From the prompt to Pillow images, float32, "
    "{steps} evaluations of the UNet on both sides, image to image at strength {strength:g}, inpainting at strength 1. "
    "{versions}."
)


def row(kind: str, batch: int, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the table, of a record of `measure`; only "error" beside the names if a side failed."""
    eager = found.get("torch", {}).get("eager", {})
    if error := next((one["error"] for one in (found, found["jax"], eager) if "error" in one), None):
        return {"kind": kind, "batch": batch, "goal": error}
    middle = {"ours": eager["jax_seconds"], "theirs": eager["seconds"]}
    return {
        "kind": kind,
        "batch": batch,
        **{name: 1e3 * sorted(seconds)[len(seconds) // 2] for name, seconds in middle.items()},
        "ratio": eager["ratio"],
        "turns": f"{min(eager['ratios']):.2f} to {max(eager['ratios']):.2f}",
        "goal": "met" if eager["ratio"] >= GOAL else "missed",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes_lcm"))
    parser.add_argument("--only", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--publish", action="store_true", help="copy the results to the experiment's folder")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if args.only in (None, kind)]
    if not kinds:
        raise LcmError(f"--only={args.only}: no such workflow; choose one of {', '.join(KINDS)}")
    from experiments import stage  # imports jax, which a worker must not do before it has its environment

    say = teller()
    if not stage.made(stage.read_config(CONFIG), args.workdir, say):
        return 1
    out = args.workdir / "workflows"
    out.mkdir(exist_ok=True)
    path, card, now = out / "latency.json", speed.card_name("cpu"), speed.versions()
    kept = foreign.read_json(path) if path.exists() else {}
    record = kept if kept.get("card") == card else {"card": card, "workflows": {}}
    for kind, batch in [(kind, batch) for kind in kinds for batch in BATCHES]:
        name = f"{kind}, {batch}"
        found = measure.current(record["workflows"].get(name, {}), now)
        if measure.complete(found):
            say(f"{name}: measured already")
            continue
        say(name)
        record["workflows"][name] = found = found | {"versions": now, "code": speed.code()}
        workflow = Workflow(kind, str(args.workdir / "export"), batch)

        def start(side: str, workflow: Workflow = workflow) -> Worker:
            deadline = time.monotonic() + speed.NO_BUDGET_S
            return Worker(side, workflow, "cpu", deadline, out / "workers.log", __package__)

        def keep() -> None:
            files.write_atomic(path, results.to_json(record, 3))

        measure.measure(found, workflow, start, keep, say)
    table = []
    for name, found in record["workflows"].items():
        kind, _, batch = name.rpartition(", ")
        table.append(row(kind, int(batch), found))
    note = NOTE.format(
        card=card,
        turns=measure.TURNS,
        seconds=measure.TURN_SECONDS,
        steps=STEPS,
        strength=STRENGTH,
        versions=", ".join(f"{package} {version}" for package, version in now.items()),
    )
    text = f"{results.table_of(COLUMNS, table)}\n{note}\n"
    files.write_atomic(out / "latency.md", text)
    if args.publish:
        results.publish(Path(__file__).parent, {name: out / name for name in ("latency.md", "latency.json")})
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
