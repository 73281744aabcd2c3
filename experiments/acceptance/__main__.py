"""Published few-step models, one after another: fetched, checked, sampled, compared with diffusers, timed; and trained.

    python -m experiments.acceptance --out=DIR [--only=sdxl,tcd] [--budget_s=7200]     resumes when called again
    python -m experiments.acceptance --out=DIR --train=1h --data=IMAGES                LCM-LoRAs as well
    python -m experiments.acceptance --list

What is asked of each is data: published.json, or another --table. Each row is a process of its own: one that cannot be
fetched, does not fit or is not as expected gives a line in the table, and the rest goes on. DIR gets table.md and
acceptance.json, rows/ and found/ of each row, logs/, images/, and train/ with the workdirs of trainings.

Exit code 0: every row is there (or does not fit this device); 1: some are missing or failed, and the same command
resumes.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from experiments import jobs
from experiments.acceptance import cases
from experiments.gpu_day import driver
from experiments.speed import run as speed
from experiments.terminal import teller
from lcm_jax import files
from lcm_jax.cost.chips import POOL
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError

NO_BUDGET_S = 10**9
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=files.expanded, help="folder of the results")
    parser.add_argument("--only", default="", help="rows with one of these words, separated by commas, in their names")
    parser.add_argument("--budget_s", type=float, default=NO_BUDGET_S, help="seconds until it ends")
    parser.add_argument("--table", type=files.expanded, default=cases.PUBLISHED, help="JSON with the rows")
    parser.add_argument("--train", default="", metavar="TIME", help="train LCM-LoRAs, each for this time: 1h, 1d, 90s")
    data_help = "images to train on: folder, tar shards, or shapes, for speed alone"
    parser.add_argument("--data", type=os.path.expanduser, default="", help=data_help)
    parser.add_argument("--train_flag", action="append", default=[], help="of lcm_jax.train; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the rows and exit")
    args = parser.parse_args(argv)
    train_s = seconds("train", args.train) if args.train else 0.0
    if train_s and not args.data:
        raise BadArgument("train", args.train, "needs images with captions; add --data=FOLDER, or --data=shapes")
    table, words = cases.read(args.table), [word for word in map(str.strip, args.only.split(",")) if word]
    chosen = [case.name for case in table if not words or any(word in case.name for word in words)]
    if not chosen:
        raise BadArgument("only", args.only, "no row has that in its name; --list names them")
    if args.list:
        print(listing([case for case in table if case.name in chosen]))
        return 0
    if args.out is None:
        raise LcmError("no folder for the results; give --out=DIR")
    out = args.out.absolute()
    listed = cases.rows(table, out, train_s, args.data, args.train_flag)
    asked = [row for row in listed if row.name in chosen]
    if not asked:
        raise BadArgument("only", args.only, "names only rows that train; add --train=1h --data=FOLDER")
    day = driver.Day(out, speed.versions() | {"device": device()}, speed.code(), environment())
    complete = False
    try:
        complete = driver.run(asked, day, args.budget_s, teller())
    finally:
        text = f"# {day.settings['device']}\n\n{driver.table(listed, day)}\n{cases.markdown(listed, day)}"
        files.write_atomic(out / "table.md", text)
        files.write_atomic(out / "acceptance.json", cases.summary(listed, day))
        print(f"\n{text}\n{out}")
    return 0 if complete else 1


def seconds(flag: str, text: str) -> float:
    """ "90s", "1h" -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match or not float(match[1]):
        raise BadArgument(flag, text, f"is no time; write a number and one of {', '.join(_UNITS)}, such as 1h")
    return float(match[1]) * _UNITS[match[2]]


def listing(found: list[cases.Case]) -> str:
    """A line for each row, and what all of them download."""
    lines = [f"{case.name:<28} {case.gigabytes:5.1f} GB  {', '.join(case.sources)}" for case in found]
    return "\n".join((*lines, f"{len(found)} rows; what several of them read is downloaded once"))


def device() -> str:
    """jax's name of the first device, of a CPU the processor's. A process of its own asks: this one takes no card."""
    asks = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='|')"
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
    if done.returncode:
        raise LcmError(f"jax finds no device ({jobs.last_error(done.stderr)}); pip install 'lcm_jax[cuda]' or [tpu]")
    backend, _, kind = done.stdout.strip().splitlines()[-1].partition("|")
    return speed.card_name("cpu") if backend == "cpu" else kind


def environment() -> dict[str, str]:
    """Of all rows: modules of this folder, and as much of a GPU as the programs take."""
    share = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    found = {} if share & os.environ.keys() else {"XLA_CLIENT_MEM_FRACTION": str(POOL)}
    return found | {
        "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


if __name__ == "__main__":
    sys.exit(exit_code(main, left="the rows that are finished are kept, and the same command resumes"))
