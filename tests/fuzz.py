"""Fuzzes the readers of files: `make fuzz` (SECONDS=600 over all targets, TARGET=name for one of them).

Each target runs in a process of its own, under a limit of memory, and is started again if it crashes. Atheris sees
which branches of the package an input reaches and varies those further; mutations keep the structure of the files. What
is found is in .cache/fuzz/TARGET, one input for each kind, and a traceback beside it; the exit code is then 1. Once the
faults are fixed, `python tests/fuzz.py --keep` adds the inputs to tests/fuzz_seeds, which `tests/test_fuzz.py` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = Path(__file__).parent / "fuzz_seeds"
MOST = 1 << 20  # bytes of an input
HANGS = 90.0  # seconds without an execution, after which a process counts as hanging
STARTS = 600.0  # seconds to the first one: the package is instrumented, beside whatever else the machine does


def kept(name: str) -> dict[str, bytes]:
    """Kind of fault -> input of a target, as `keep` has stored them."""
    path = SEEDS / f"{name}.zip"
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as archive:
        return {kind: archive.read(kind) for kind in archive.namelist()}


def keep(found: Path) -> None:
    """Adds inputs to SEEDS. One that is known under another name is left out."""
    for folder in sorted(path for path in found.iterdir() if path.is_dir()):
        known = kept(folder.name)
        for path in sorted(path for path in folder.iterdir() if path.suffix != ".txt"):
            if (content := path.read_bytes()) not in known.values():
                known[path.name] = content
        SEEDS.mkdir(exist_ok=True)
        with zipfile.ZipFile(SEEDS / f"{folder.name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for kind in sorted(known):
                archive.writestr(zipfile.ZipInfo(kind), known[kind], zipfile.ZIP_DEFLATED)  # without today's time


class Report:
    """What a process has done; its parent reads it whenever the process ends."""

    def __init__(self, path: Path, found: Path):
        self.path, self.found, self.began = path, found, time.monotonic()
        self.values = json.loads(path.read_text()) if path.exists() else {"executions": 0, "seconds": 0.0, "faults": {}}
        self.before, self.written = self.values["seconds"], 0.0

    def executed(self) -> None:
        self.values["executions"] += 1
        if time.monotonic() - self.written > 1:
            self.write()

    def add(self, kind: str, text: str, content: bytes) -> None:
        """Keeps the smallest input of each kind of fault."""
        known = self.values["faults"].setdefault(
            kind, {"times": 0, "size": MOST + 1, "after": self.before + time.monotonic() - self.began}
        )
        known["times"] += 1
        if len(content) < known["size"]:
            known["size"] = len(content)
            self.found.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", kind)[:80].strip("_")
            (self.found / name).write_bytes(content)
            (self.found / f"{name}.txt").write_text(f"{kind}\n\n{text}", "utf-8", "backslashreplace")
        self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        self.values["seconds"] = self.before + self.written - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.values["peak"] = max(self.values.get("peak", 0), peak)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values))
        partial.replace(self.path)


def limit_memory(more: int) -> None:
    """This process may take `more` MiB of addresses beside those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def child(name: str, seconds: int, seed: int, work: Path, found: Path) -> None:
    """Fuzzes one target in this process."""
    import atheris

    with atheris.instrument_imports(include=["lcm_jax"]):
        import fuzz_targets
    import logging

    import fuzz_mutations
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.disable(logging.CRITICAL)

    target, report = fuzz_targets.TARGETS[name], Report(work / "report.json", found)
    folder = work / "folder"
    folder.mkdir(exist_ok=True)
    seeds = target.seeds(folder)
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    for content in [*seeds, *kept(name).values()]:
        (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)
    for content in seeds:
        target.read(content, folder)  # whatever is imported or compiled once
    limit_memory(target.memory)

    def one(content: bytes) -> None:
        (work / "input").write_bytes(content)  # what a crash leaves
        if (what := fuzz_targets.fault(target, content, folder)) is not None:
            report.add(*what, content)
        report.executed()

    def mutate(content: bytes, most: int, number: int) -> bytes:
        chance = random.Random(number)
        if chance.random() < 0.1:
            return atheris.Mutate(content, most)
        if chance.random() < 0.3:  # of seeds that reach the same branches, only one is among the inputs that are kept
            content = chance.choice(seeds)
        try:
            return target.mutate(content, chance)[:most]
        except Exception:  # what earlier mutations have left has no structure
            return fuzz_mutations.in_bytes(content, chance)[:most]

    options = [f"-max_total_time={seconds}", f"-max_len={MOST}", f"-seed={seed}", "-timeout=60", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={work}/", str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(name: str, seconds: float, seed: int, found: Path) -> dict:
    """The report of `seconds` of one target, whose processes are started again after a crash."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f"lcm_jax_fuzz_{name}_", dir=memory) as work:
        report, crashes, end = Path(work, "report.json"), 0, time.monotonic() + seconds
        while (left := end - time.monotonic()) > 1:
            arguments = [
                name,
                f"--seconds={int(left)}",
                f"--seed={seed + crashes}",
                f"--child={work}",
                f"--out={found}",
            ]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HOME": f"{work}/hub", "HF_HUB_OFFLINE": "1"}
            environment["MALLOC_ARENA_MAX"] = "1"  # else each thread reserves 64 MiB of addresses
            with open(Path(work, "log"), "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, *arguments], stdout=log, stderr=log, env=environment, cwd=ROOT
                )
                hangs = _wait(process, report, left)
            if process.returncode == 0:
                break
            crashes += 1
            text = Path(work, "log").read_text(errors="replace")[-4000:]
            if not Path(work, "input").exists():
                raise RuntimeError(f"target {name} does not start: {text}")
            what = "hangs" if hangs else f"crash, exit code {process.returncode}"
            Report(report, found / name).add(what, text, Path(work, "input").read_bytes())
        return json.loads(report.read_text()) | {"crashes": crashes}


def _wait(process: subprocess.Popen, report: Path, seconds: float) -> bool:
    """Waits for a process of `seconds`; ends one that makes no progress, and returns whether it had to."""

    def state() -> int | None:
        return report.stat().st_mtime_ns if report.exists() else None

    began = moved = time.monotonic()
    seen, started = state(), False
    while process.poll() is None:
        time.sleep(0.2)
        now, found = time.monotonic(), state()
        if found != seen:
            began, moved, seen, started = began if started else now, now, found, True
        if now - moved > (HANGS if started else STARTS) or started and now - began > seconds + HANGS:
            process.kill()
            process.wait()
            return True
    return False


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("targets", nargs="*", help="default: all")
    p.add_argument("--seconds", type=int, default=600, help="spread over the targets")
    p.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    p.add_argument("--out", type=Path, default=ROOT / ".cache" / "fuzz", help="folder of what is found")
    p.add_argument("--keep", action="store_true", help="add what was found to tests/fuzz_seeds")
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = p.parse_args()
    if arguments.child:
        (name,) = arguments.targets
        child(name, arguments.seconds, arguments.seed, arguments.child, arguments.out / name)
        return 0
    if arguments.keep:
        keep(arguments.out)
        return 0
    import fuzz_targets

    names = arguments.targets or list(fuzz_targets.TARGETS)
    if unknown := set(names) - fuzz_targets.TARGETS.keys():
        p.error(f"no target {', '.join(unknown)}; choose of {', '.join(fuzz_targets.TARGETS)}")
    faulty = False
    heads = f"{'executions':>10s} {'faults':>6s} {'crashes':>7s} {'peak MiB':>8s} {'seconds':>7s}"
    print(f"{'target':12s} {heads}  (seed {arguments.seed})")
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(arguments.out / name)
        got = fuzz(name, arguments.seconds / len(names), arguments.seed, arguments.out)
        faults = got["faults"]
        numbers = f"{got['executions']:10d} {len(faults):6d} {got['crashes']:7d} {got['peak']:8d} {got['seconds']:7.0f}"
        print(f"{name:12s} {numbers}", flush=True)
        for kind, known in faults.items():
            faulty, size = True, known["size"]
            print(f"    after {known['after']:.0f} s, {known['times']} times, {size} bytes: {kind}", flush=True)
    if faulty:
        print(f"the inputs are in {arguments.out}")
    return int(faulty)


if __name__ == "__main__":
    sys.exit(main())
