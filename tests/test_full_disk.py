"""Each program when a file cannot grow beyond some size, as on a full disk or by a quota: one line, and nothing half.

The limit (RLIMIT_FSIZE) is chosen so that one kind of file is the first that does not fit.
"""

import io
import resource
import signal
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from test_kills import PROGRAMS, RUN, TRAIN, Ended, check_whole, left_over, shape, undisturbed
from test_kills import finished as finished  # a fixture

CAPTIONED = ("--config=configs/shapes_lcm.py", "--config.data.source=webdataset", "--config.data.batch_size=4")


@dataclass(frozen=True)
class Case:
    """A command whose file `names` has more than `limit` bytes.

    Attributes:
      command: (out, finished run) -> arguments.
      limit: bytes.
      name: of `out`.
      of_run: whether it needs a finished training.
    """

    command: Callable[[Path, Path], list[str]]
    limit: int
    name: str = "out"
    of_run: bool = False


def shards(out: Path, run: Path) -> list[str]:
    """A precomputation of a tar, whose index has some KB."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG")
    path = out.parent / "data" / "0.tar"
    if not path.exists():
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w") as tar:
            for number in range(32):
                for suffix, content in (("jpg", stream.getvalue()), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return ["precompute", *CAPTIONED, f"--config.data.path={path}", f"--out={out}"]


def exported(form: str, name: str) -> Case:
    return Case(
        lambda out, run: ["export", f"--workdir={run}", f"--out={out}", f"--format={form}"], 100_000, name, True
    )


CASES = {
    "checkpoint": Case(lambda out, run: ["train", *TRAIN, "--config.sample.every=0", f"--workdir={out}"], 100_000),
    "samples": Case(lambda out, run: ["train", *TRAIN, "--config.sample.every=1", f"--workdir={out}"], 10_000),
    "config.json": Case(lambda out, run: ["train", *TRAIN, f"--workdir={out}"], 500),
    "pipeline": exported("pipeline", "out"),
    "unet": exported("unet", "out"),
    "single file": exported("single-file", "out.safetensors"),
    "picture": Case(PROGRAMS["sample"].command, 1000),
    "shard": Case(PROGRAMS["precompute"].command, 50_000),
    "index of a tar": Case(shards, 1000),
    "row": Case(PROGRAMS["evaluate"].command, 500),
}


def limited(arguments: list[str], limit: int) -> Ended:
    """The program, none of whose files may have more than `limit` bytes."""

    def lower() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # programs that are cut off would stay in it
        return undisturbed(arguments, lower)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_file_that_does_not_fit(tmp_path, request, name):
    case = CASES[name]
    finished = request.getfixturevalue("finished") if case.of_run else tmp_path
    out = tmp_path / "place" / case.name
    command = case.command(out, finished)
    end = limited(command, case.limit)
    about = f"exit code {end.code}\n" + "\n".join(end.lines)
    assert end.code == 2, about
    assert not any("Traceback" in line for line in end.lines), about
    (error,) = [line for line in end.lines if line.startswith("error: ")] or [about]
    assert str(tmp_path) in error and "error: " in error, about
    check_whole(out)
    assert command[0] == "train" or left_over(out) == []  # a checkpoint that failed is removed by the next run

    end = undisturbed(command)  # there is room again
    assert end.code == 0, "\n".join(end.lines)
    check_whole(out)
    assert left_over(out) == []


@pytest.mark.slow
def test_metrics_that_do_not_fit(tmp_path):
    """A run whose metrics.jsonl grows beyond what its config.json needed."""
    out = tmp_path / "place" / "out"
    command = ["train", *TRAIN, "--config.sample.every=0", "--config.checkpoint.every=100", f"--workdir={out}"]
    assert undisturbed([*command, "--config.train.steps=2"]).code == 0
    command.append("--config.train.steps=30")
    limit = (out / "config.json").stat().st_size + 100
    end = limited(command, limit)
    about = f"exit code {end.code}\n" + "\n".join(end.lines)
    assert end.code == 2 and not any("Traceback" in line for line in end.lines), about
    (error,) = [line for line in end.lines if line.startswith("error: ")] or [about]
    assert str(out) in error, about
    assert limit - 1000 < (out / "metrics.jsonl").stat().st_size <= limit, about
    check_whole(out)
    assert undisturbed(command).code == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 30
    check_whole(out)
    assert left_over(out) == []


def test_the_shape_of_a_line():
    assert shape("step 1/6: loss 0.02, 8.1 images/s") == shape("step 12/16: loss 0.2, 18.1 images/s") != shape("x")
    assert RUN[0] in TRAIN
