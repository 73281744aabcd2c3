"""Runs the experiments whose published files are not current, each in a process of its own."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import jobs
from experiments.evidence import record
from experiments.evidence.listed import Experiment
from experiments.evidence.record import Digests

RUNS = "runs/evidence"


def run(listed: Sequence[Experiment], root: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Runs and records the experiments that are not current, in their order. Returns the errors of those that failed.

    Raises:
      LcmError: another call is at work.
    """
    failed = {}
    with jobs.held(root / RUNS):
        for number, one in enumerate(listed):
            records = record.read(root)
            left = [other for other in listed[number:] if record.changed(other, records.get(other.name), root)]
            if one not in left:
                say(f"{one.name}: current")
                continue
            last = {other.name: records[other.name]["minutes"] for other in left if other.name in records}
            own = f"{last[one.name]:g} minutes last time" if one.name in last else "unknown time"
            unknown = f" and {len(left) - len(last)} of unknown time" * (len(last) < len(left))
            say(f"{one.name}: {own}; left with it: {sum(last.values()):.0f} minutes{unknown}")
            if error := attempt(one, root):
                failed[one.name] = error
                say(f"  failed: {error}")
    return failed


def attempt(one: Experiment, root: Path) -> str:
    """Runs an experiment and records it. Returns its error, "" if there is none."""
    found = record.depends(one, root)
    begun = time.time()
    log = root / RUNS / "logs" / f"{log_name(one, found, root)}.{begun:.3f}.log"
    command = [sys.executable, "-m", one.module, *one.flags, *places(one, found, root)]
    try:
        code = jobs.run(command, log, {"PYTHONUNBUFFERED": "1"}, cwd=root)
    finally:
        log.touch()  # its end, see `minutes`
    if code:
        return f"{jobs.last_error(log.read_text(errors='replace')) or f'exit code {code}'} ({log})"
    for name in one.published:
        if not (root / name).exists() or (root / name).stat().st_mtime < begun:
            return f"it ended well, but did not write {name} ({log})"
    new = record.make(one, found, minutes(one, found, root), root)
    record.write(record.read(root) | {one.name: new}, root)
    return ""


def places(one: Experiment, found: Digests, root: Path) -> list[str]:
    """The flags `one.places`: what has begun on other assets, code or values of a config is not resumed."""
    state = {name: value for name, value in record.trained_by(one, found, root).items() if name not in one.configs}
    runs = f"{RUNS}/{record.digest(repr(sorted(state.items())))}"
    folders = {Path(name).stem: f"{Path(name).stem}-{found[name]}" for name in one.configs}
    return [place.format(runs=runs, **folders) for place in one.places]


def minutes(one: Experiment, found: Digests, root: Path) -> float:
    """Of all attempts: a log has the time of its beginning in its name, and of its end as that of its last change."""
    name = log_name(one, found, root)
    logs = (root / RUNS / "logs").glob(f"{name}.*.log")
    return sum(log.stat().st_mtime - float(log.stem.removeprefix(f"{name}.")) for log in logs) / 60


def log_name(one: Experiment, found: Digests, root: Path) -> str:
    """The same for all attempts that resume each other."""
    return f"{one.name}-{record.digest(repr(sorted(record.trained_by(one, found, root).items())))}"
