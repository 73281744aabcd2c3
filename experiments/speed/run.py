"""`lcm_jax` and torch on the same work, each in its own process, interleaved: sampling, LCD and LCM-LoRA steps.

    python -m experiments.speed.run --device=cpu|gpu [--only=lcd-sd15] [--budget_s=540] [--profile] [--list]
    python -m experiments.speed.run --device=gpu --profile --config=configs/sdxl_lcm.py
    python -m experiments.speed.run --report

Results go to results/<card>.json as soon as they are measured and are kept (unless --again is given, or the versions of
the packages change), so the same command resumes a run that was cut. `--profile` times and traces our side alone, of
each workload chosen by --only or of the step of a config, into --profiles. `--narrow` rehearses the GPU's workloads.
`--report` makes table.md, the charts and README.md's section of all cards. The other side needs lcm_jax[torch].
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lcm_jax
from experiments import results
from experiments.speed import measure, report, workloads
from experiments.speed.worker import Failed, OutOfTime, Worker
from experiments.speed.workloads import Workload
from experiments.terminal import teller
from lcm_jax import files
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

HERE = Path(__file__).parent
NO_BUDGET_S = 10**6
LEAST_S = 60  # of budget, with which a workload is begun
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "peft")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(workloads.LISTS))
    parser.add_argument("--only", action="append", default=[], help="part of a workload's name; may be repeated")
    parser.add_argument("--budget_s", type=float, default=NO_BUDGET_S, help="seconds until the measurement stops")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--remat", choices=("none", "attention", "block"), help="of all training steps")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results")
    parser.add_argument("--profile", action="store_true", help="time our side alone, and report where the time goes")
    parser.add_argument("--config", type=Path, help="of configs/: with --profile, its training step")
    parser.add_argument("--narrow", action="store_true", help="the GPU's workloads, at a CPU's size")
    parser.add_argument("--profiles", type=Path, default=Path("runs/speed"), help="folder of traces and the log")
    parser.add_argument("--list", action="store_true", help="print the workloads' names and exit")
    parser.add_argument("--report", action="store_true", help="make table and charts of the results and exit")
    args = parser.parse_args(argv)
    if args.device is None and not args.report:
        parser.error("--device=cpu or gpu is needed, or --report")
    if args.config and not args.profile:
        parser.error("--config is for --profile: torch has no such step to compare it with")
    if args.again and args.budget_s < NO_BUDGET_S:
        parser.error("--again starts over with every command, so that a --budget_s never suffices; give one of them")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.report:
        print(report.write(args.results, HERE))
        return 0
    if args.config:
        from experiments.speed import side  # imports jax, which a worker must not do before it has its environment

        chosen = [side.of_config(args.config, args.narrow)]
    else:
        chosen = workloads.chosen(args.device, args.only, args.remat, args.narrow)
    if not chosen:
        raise LcmError(f"--only={' '.join(args.only)}: no such workload; --list names them")
    if args.list:
        print("\n".join(workload.name for workload in chosen))
        return 0
    say = teller()
    args.profiles.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget_s
    try:
        if args.profile:
            for workload in chosen:
                profile(workload, args, deadline, say)
        else:
            run(chosen, args, deadline, say)
    except OutOfTime:
        say("the budget is used up; the same command resumes")
    return 0


def run(chosen: list[Workload], args: argparse.Namespace, deadline: float, say: measure.Say) -> None:
    """Measures what is missing of the workloads, in their order."""
    name = card_name(args.device)
    path = args.results / f"{file_name(name)}.json"
    card = json.loads(path.read_text()) if path.exists() else {"card": name, "device": args.device, "workloads": {}}
    now = versions()
    for workload in chosen:
        found = {} if args.again else measure.current(card["workloads"].get(workload.name, {}), now)
        if measure.complete(found):
            say(f"{workload.name}: measured already")
            continue
        if deadline - time.monotonic() < LEAST_S:
            raise OutOfTime
        say(workload.name)
        found |= {"workload": dataclasses.asdict(workload), "versions": now, "code": code()}
        card["workloads"][workload.name] = found
        measure.measure(
            found,
            workload,
            lambda side, workload=workload: Worker(side, workload, args.device, deadline, log_file(args)),
            lambda: files.write_atomic(path, results.to_json(card, 3)),
            say,
        )
    say(f"finished: {path}")


def profile(workload: Workload, args: argparse.Namespace, deadline: float, say: measure.Say) -> None:
    """Writes PROFILES/<workload>/: summary.json as far as it is known, cost.txt of a training step, and the trace."""
    folder = args.profiles / workload.name
    folder.mkdir(exist_ok=True)
    found = {"workload": dataclasses.asdict(workload), "versions": versions(), "code": code()}

    def keep(more: Mapping[str, Any]) -> None:
        found.update(more)
        files.write_atomic(folder / "summary.json", results.to_json(found, 2))

    say(workload.name)
    keep({})  # what an earlier command has found is no longer there, whatever becomes of this one
    workload = dataclasses.replace(workload, alone=True)
    try:
        with Worker("jax", workload, args.device, deadline, log_file(args)) as jax:
            keep(jax.ready)
            try:
                keep(measure.alone(jax, say))
            finally:  # what does not fit was compiled, and says what it needs
                keep(jax.ask({"do": "facts", "folder": str(folder)}))
            keep(jax.ask({"do": "profile", "folder": str(folder)}))
    except Failed as error:
        keep({"error": str(error)})
        raise LcmError(f"{workload.name} cannot be profiled: {error}") from None
    say(f"  {folder}")
    for name, seconds in found.get("stage_seconds", {}).items():
        print(f"  {1e3 * seconds:10.2f} ms  {name}")
    for kernel in found["kernels"][:20]:
        time_and_share = f"{1e3 * kernel['seconds']:10.3f} ms {100 * kernel['share']:5.1f} %"
        print(f"  {time_and_share}  {kernel['calls']:7.1f} x {kernel['name'][:90]}")


def log_file(args: argparse.Namespace) -> Path:
    """For the workers' standard error."""
    return args.profiles / "workers.log"


def file_name(card: str) -> str:
    """Of the card's results, without an ending."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def card_name(device: str) -> str:
    """The processor's or the first GPU's name. Raises LcmError if there is no GPU."""
    if device == "cpu":
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else os.uname().machine
        return f"{name}, {len(os.sched_getaffinity(0))} cores"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LcmError(f"--device=gpu: nvidia-smi finds no GPU ({error}); use --device=cpu") from error
    return names.splitlines()[0].strip()


def versions() -> dict[str, str]:
    """Of the packages that are compared, as far as they are installed."""
    installed = {package.name for package in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def code() -> str:
    """SHA-256 of the package's sources, which the report names beside the results."""
    digest, package = hashlib.sha256(), Path(lcm_jax.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(exit_code(main))
