"""SIGINT, SIGTERM and SIGKILL at any moment of a program: nothing is lost, half or left over, and one line says it.

Each program is killed KILLS times (LCM_JAX_KILLS of the environment), in series on one folder, as by somebody who
starts the same command again; after each series the command completes and must have the results of an undisturbed run.
Moments are anywhere in the program's time, or shortly after something in its folder changes, which is when it writes.
"""

import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import safetensors
from PIL import Image

from lcm_jax.runtime import checkpoints

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("LCM_JAX_KILLS", "20"))  # of each program: 100 in all
SERIES = 4  # kills in one folder before the command completes
LIMIT = 600  # seconds for one program on a machine that does other things, too
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
LOCKS = re.compile(r"\.(lock(-\d+)?|owner)")

RUN = ("--config=configs/shapes_lcm.py", "--config.data.num_examples=32")
TRAIN = (*RUN, "--config.data.batch_size=4", "--config.log.every=1", "--config.checkpoint.every=2",
         "--config.sample.every=3", "--config.train.steps=6")  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A program whose result is the folder, or the file, `out`.

    Attributes:
      command: (out, folder of a finished training, if it needs one) -> its arguments.
      contents: out -> what two runs must have in common, bit for bit.
      of_run: whether it needs a finished training; it then refuses an `out` that exists.
      paused: exit code of a loop that a signal has ended at a point from which the same command resumes.
    """

    command: Callable[[Path, Path], list[str]]
    contents: Callable[[Path], dict[str, object]]
    name: str = "out"
    of_run: bool = False
    paused: int = 0


def bytes_of(out: Path) -> dict[str, bytes]:
    """Name -> content of all files but locks and reports of time."""
    paths = [out] if out.is_file() else sorted(out.rglob("*"))
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.is_file() and path.name[0] != "."}


def trained(out: Path) -> dict[str, object]:
    """Arrays of the last checkpoint, and each step's loss."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {f"loss {line['step']}": line["loss"] for line in lines}
    step = max(checkpoints.list_steps(out / "checkpoints"))
    for part in ("params", "ema_params", "opt_state"):
        import jax

        tree = checkpoints.load_subtree(out / "checkpoints", step, part)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {f"{part} {jax.tree_util.keystr(path)}": np.asarray(leaf).tobytes() for path, leaf in leaves}
    return found | {"step": step, "samples": sorted(path.name for path in (out / "samples").glob("*.png"))}


def evaluated(out: Path) -> dict[str, object]:
    """The rows of the table without what depends on the machine's speed."""
    rows = json.loads((out / "table.json").read_text())["rows"]
    return {f"{row['sampler']} {row['steps']}": row["values"] for row in rows}


PROGRAMS = {
    "train": Program(lambda out, run: ["train", *TRAIN, f"--workdir={out}"], trained),
    "precompute": Program(lambda out, run: ["precompute", *RUN, "--shard_size=4", f"--out={out}"], bytes_of, paused=1),
    "export": Program(lambda out, run: ["export", f"--workdir={run}", f"--out={out}"], bytes_of, of_run=True),
    "sample": Program(
        lambda out, run: [
            *("sample", "--model=shapes", "--sampler=ddim", "--steps=2", "--num_images=8", "--batch_size=2"),
            *("--prompt=a red star", f"--out={out}"),
        ],
        bytes_of,
    ),
    "evaluate": Program(
        lambda out, run: [
            *("evaluate", "--model=shapes", "--row=ddim:1,2", "--source=shapes", "--count=8", "--batch_size=4"),
            *("--timings=1", "--no-plot", f"--out={out}"),
        ],
        evaluated,
    ),
}


@dataclass
class Ended:
    """How a process ended: its exit code, the lines on stderr, and the seconds that it took."""

    code: int
    lines: list[str]
    seconds: float
    what: str = field(default="")


def start(arguments: list[str], stderr: IO | int, before: Callable[[], None] | None = None) -> subprocess.Popen:
    """The program. before: called in its process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # every program compiles once, in the first run
    return subprocess.Popen(
        [sys.executable, "-m", f"lcm_jax.{arguments[0]}", *arguments[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        preexec_fn=before,
    )


def undisturbed(arguments: list[str], before: Callable[[], None] | None = None) -> Ended:
    began = time.monotonic()
    process = start(arguments, subprocess.PIPE, before)
    try:
        _, output = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return Ended(process.returncode, output.decode(errors="replace").splitlines(), time.monotonic() - began)


def killed(arguments: list[str], log: Path, out: Path, number: int, seconds: float, chance: random.Random) -> Ended:
    """The program, which gets a signal once: after a part of `seconds`, or as it writes."""
    began = time.monotonic()
    with open(log, "wb") as stream:
        process = start(arguments, stream)
    try:
        _package_begun(process)
        if chance.random() < 0.5:
            changes = chance.randrange(1, 12)
            _wait_for_changes(process, out, changes)
            time.sleep(chance.uniform(0, 0.02))
            what = f"after change {changes} of its folder"
        else:
            moment = chance.uniform(0, 1.1 * seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, moment - (time.monotonic() - began)))
            what = f"{moment:.1f} s after its start"
        process.send_signal(number)
        code = process.wait(LIMIT)
    finally:
        process.kill()
    lines = log.read_text(errors="replace").splitlines()
    return Ended(code, lines, time.monotonic() - began, f"{signal.Signals(number).name} {what}")


def _package_begun(process: subprocess.Popen) -> None:
    """Waits until the package has taken over the signals: before, they are the interpreter's."""
    late = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < late:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            caught = int(next(line for line in status if line.startswith("SigCgt")).split()[1], 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                return
        time.sleep(0.005)


def _wait_for_changes(process: subprocess.Popen, out: Path, count: int) -> None:
    """Waits until the names or sizes beside and in `out` have changed `count` times."""
    before = _names(out)
    late = time.monotonic() + LIMIT
    while count and process.poll() is None and time.monotonic() < late:
        if (now := _names(out)) != before:
            count, before = count - 1, now
        time.sleep(0.001)


def _names(out: Path) -> set[tuple[str, int]]:
    found = set()
    for folder, _, files in os.walk(out.parent):
        for name in files:
            with contextlib.suppress(OSError):
                found.add((os.path.join(folder, name), os.stat(os.path.join(folder, name)).st_size))
        found.add((folder, 0))
    return found


def check_whole(out: Path) -> None:
    """Every file under a final name is whole; checkpoints are those that were written."""
    for folder in out.parent.glob("*/checkpoints"):
        for step in checkpoints.list_steps(folder):
            assert checkpoints.find_damage(folder, step) is None, (folder, step)
    for path in sorted(out.parent.rglob("*")):
        inside = path.relative_to(out.parent).parts
        if not path.is_file() or any(part.startswith(".") or "tensorboard" in part for part in inside):
            continue
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="np") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    tensors.get_tensor(key)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":  # appended to: the last line may be half
            for line in path.read_text().splitlines()[:-1]:
                json.loads(line)


def left_over(out: Path) -> list[str]:
    """Names that a completed command must not leave in or beside `out`."""
    names = out.parent.rglob("*")
    odd = re.compile(r"\..*|.*\.(partial|removed|tmp)(\..*)?|tmp.*")
    return [str(path) for path in names if odd.fullmatch(path.name) and not LOCKS.fullmatch(path.name)]


def shape(line: str) -> str:
    """A line without its numbers: lines of progress differ in them alone."""
    return re.sub(r"[\d.:]+", "#", line)


def check_end(end: Ended, number: int, usual: set[str], paused: int) -> None:
    """A signal is answered by an exit code and at most one line."""
    about = f"{end.what}: exit code {end.code}\n" + "\n".join(end.lines)
    assert not any("Traceback" in line for line in end.lines), about
    if number == signal.SIGKILL:
        assert end.code in (0, -signal.SIGKILL), about
        return
    assert end.code in (0, paused, 128 + number), about
    more = [line for line in end.lines if shape(line) not in usual and "WARNING" not in line]
    assert len(more) <= 1, about
    assert end.code == 0 or more, f"it says nothing; {about}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished training, from which exports are made."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    end = undisturbed(["train", *TRAIN, f"--workdir={folder}"])
    assert end.code == 0, end.lines
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_at_any_moment(tmp_path, request, name):
    finished = request.getfixturevalue("finished") if PROGRAMS[name].of_run else tmp_path
    program, chance = PROGRAMS[name], random.Random(f"{name} {os.environ.get('LCM_JAX_KILLS_SEED', '')}")
    log = tmp_path / "log"
    reference = tmp_path / "reference" / program.name
    usual = undisturbed(program.command(reference, finished))  # compiles
    assert usual.code == 0, usual.lines
    shutil.rmtree(reference.parent)
    usual = undisturbed(program.command(reference, finished))
    assert usual.code == 0, usual.lines
    expected, shapes = program.contents(reference), {shape(line) for line in usual.lines}
    codes = collections.Counter()
    for series in range(-(-KILLS // SERIES)):
        out = tmp_path / f"series{series}" / program.name
        command = program.command(out, finished)
        for index in range(series * SERIES, min(KILLS, (series + 1) * SERIES)):
            number = SIGNALS[index % len(SIGNALS)]
            end = killed(command, log, out, number, usual.seconds, chance)
            codes[f"{signal.Signals(number).name} {end.code}"] += 1
            check_end(end, number, shapes, program.paused)
            check_whole(out)
            if program.of_run and out.exists():  # complete, and such a command writes to new names alone
                assert_same(program.contents(out), expected)
                shutil.rmtree(out)
        end = undisturbed(command)
        assert end.code == 0, "\n".join(end.lines)
        assert left_over(out) == []
        check_whole(out)
        assert_same(program.contents(out), expected)
        shutil.rmtree(out.parent)
    print(name, codes)


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if found[name] != value] == []
