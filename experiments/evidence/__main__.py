"""`make evidence`: every experiment whose numbers stand in README, notebooks and docs, in one command that resumes.

    python -m experiments.evidence [--only=demo,table1]     # runs what is not current, each in a process of its own
    python -m experiments.evidence --list                   # all of them: minutes, state, command
    python -m experiments.evidence --stale                  # `make stale`: which of them are not current, and why

An experiment is current if its published files are those of its record in experiments/evidence.json, and its assets,
configs, modules and program are as they were then (see `listed` and `record`). runs/evidence has the runs, a folder for
each state of assets and code, and the logs.

Exit code 0: all are current; 1: some have failed, or are stale.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.evidence import driver, record
from experiments.evidence.listed import LISTED, Experiment
from experiments.terminal import teller
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

ROOT = Path(__file__).parents[2]
NAMED = 5  # files of those that make an experiment stale


def main(argv: Sequence[str] | None = None, listed: Sequence[Experiment] = LISTED, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of experiments, with commas; default: all")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--list", action="store_true", help="print all experiments and exit")
    actions.add_argument("--stale", action="store_true", help="print those that are not current and exit")
    args = parser.parse_args(argv)
    chosen = choose(listed, args.only)
    if args.list or args.stale:
        return show(chosen, root, args.stale)
    failed = driver.run(chosen, root, teller())
    for name, error in failed.items():
        print(f"{name} failed: {error}")
    return int(bool(failed))


def choose(listed: Sequence[Experiment], only: str) -> list[Experiment]:
    """The experiments of --only, in their own order. Raises LcmError: there is no such experiment."""
    names = [name for name in only.split(",") if name] or [one.name for one in listed]
    if unknown := set(names) - {one.name for one in listed}:
        known = ", ".join(one.name for one in listed)
        raise LcmError(f"--only={only}: there is no experiment {', '.join(sorted(unknown))}; give some of {known}")
    return [one for one in listed if one.name in names]


def show(listed: Sequence[Experiment], root: Path, only_stale: bool) -> int:
    """Prints the experiments, or those that are stale and why. Returns the exit code."""
    records, count = record.read(root), 0
    for one in listed:
        found = records.get(one.name)
        why = record.changed(one, found, root)
        count += bool(why)
        text = ", ".join(why[:NAMED]) + f" and {len(why) - NAMED} more" * (len(why) > NAMED)
        if only_stale and why:
            print(f"{one.name}: {text}")
        elif not only_stale:
            minutes = f"{found['minutes']:g} minutes" if found else "unknown time"
            print(f"{one.name} ({minutes}; {f'stale: {text}' if why else 'current'})\n    {one.command}")
    print(f"{count} of {len(listed)} experiments are stale{'; make evidence runs them' * bool(count)}")
    return int(only_stale and count > 0)


if __name__ == "__main__":
    sys.exit(exit_code(main, left="experiments that are finished are recorded, and the same command resumes"))
