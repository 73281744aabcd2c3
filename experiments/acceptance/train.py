"""The process of a row that trains: `lcm_jax.train` for a time, its speed read from metrics.jsonl.

python -m experiments.acceptance.train CASE --out=DIR --seconds=3600 --data=IMAGES [--flag=--config.data.batch_size=4]

The time is that of steps, as metrics.jsonl has it, with what they waited for data; compiling and downloads do not
count. Then the run is stopped as by a user: it saves, and another call resumes it for the rest of the time.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import processes
from experiments.acceptance import cases
from experiments.acceptance.cases import Case
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

ENDLESS = 10**7  # steps
POLL_S = 0.5  # at least, between two looks at metrics.jsonl; that of a day takes a while to read
SHAPES = "shapes"  # as --data: the embedded images, of which nothing is learnt but the speed
TIMES = ("time_step", "time_data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--flag", action="append", default=[])
    args = parser.parse_args()
    case = cases.of_json(json.loads(args.case), "the row")
    workdir = args.out / "train" / case.name
    cases.keep(args.out, case.name, {})
    try:
        return train([*command(case, workdir, args.data), *args.flag], workdir / "metrics.jsonl", args.seconds)
    finally:
        if lines := read(workdir / "metrics.jsonl"):
            cases.keep(args.out, case.name, {"training": measured(lines), "workdir": str(workdir)})


def command(case: Case, workdir: Path, data: str) -> list[str]:
    """Of the run."""
    flags = [f"--config={case.config}", f"--workdir={workdir}", f"--config.model.teacher={case.model}"]
    flags += [f"--config.train.steps={ENDLESS}", *data_flags(data)]
    for key, value in (("vae", case.vae), ("variant", case.variant), ("config", case.model_config)):
        flags += [f"--config.model.{key}={value}"] if value else []
    return [sys.executable, "-m", "lcm_jax.train", *flags, *case.flags]


def data_flags(data: str) -> list[str]:
    """Keys of --data. Filters of the config are for columns that other sets of images may lack."""
    if data == SHAPES:
        return ["--config.data.source=shapes", "--config.data.filters=()"]
    if Path(data).is_dir() and not list(Path(data).glob("*.tar")):
        return ["--config.data.source=folder", f"--config.data.path={data}", "--config.data.filters=()"]
    return ["--config.data.source=webdataset", f"--config.data.path={data}", "--config.data.filters=()"]


def train(words: Sequence[str], metrics: Path, seconds: float) -> int:
    """Runs the training until its steps have taken `seconds`. Returns its exit code, whose line it has printed.

    Raises:
      LcmError: a signal of others ended it.
    """
    if spent(read(metrics)) >= seconds:
        return 0
    # In a session of its own, so that it gets each signal once: a second one would not let it save.
    words = [sys.executable, processes.__file__, str(os.getpid()), *words]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        while process.poll() is None and (left := seconds - spent(read(metrics))) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(POLL_S, left / 20))  # steps take no less
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    except BaseException:  # this process is asked to end: so is the run, which saves
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code < 0:
        raise LcmError(f"signal {-code} ended the training; 9 is usually that of too little host memory")
    return code


def read(metrics: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def spent(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds of steps and of their waiting for data."""
    return sum(one.get(key, 0.0) for one in lines for key in TIMES)


def measured(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run's lines say of its speed; all lines have as many steps, but for the first, whose first step compiles,
    and those after another start."""
    images = [one["images"] for one in lines]
    each = statistics.median(one["images_per_second"] for one in lines)
    batch = images[-1] / lines[-1]["step"]
    found = {
        "steps": lines[-1]["step"],
        "batch_size": round(batch),
        "seconds": spent(lines),
        "seconds_per_step": batch / each,
        "images_per_second": each,
        "data_wait": statistics.median(one["data_wait"] for one in lines),
        "first_loss": lines[0]["loss"],
        "last_loss": statistics.mean(one["loss"] for one in lines[-10:]),
    }
    peaks, shares = ([one[key] for one in lines if key in one] for key in ("memory_peak", "mfu"))
    return (
        found | ({"memory_peak": max(peaks)} if peaks else {}) | ({"mfu": statistics.median(shares)} if shares else {})
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, left="the run saves, and the same command resumes"))
