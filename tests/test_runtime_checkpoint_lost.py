"""Workdirs whose checkpoints are lost, some or all: refused, reported, or started again silently if that is right."""

import json
import os

import pytest

from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.runtime import lost

EVERY = 10


@pytest.fixture
def workdir(tmp_path):
    config = config_lib.default_config()
    config.model.teacher, config.checkpoint.every = "a/teacher", EVERY
    config_lib.prepare_workdir(tmp_path, config)
    return tmp_path


def write_files(workdir, step, events=()):
    """Writes the files of a run that has reached `step`."""
    lines = [json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, step + 1)]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    listed = [json.dumps({"event": event, "time": 0.0, "step": n}) + "\n" for event, n in events]
    (workdir / "events.jsonl").write_text("".join(listed))


def make(workdir, *names):
    for name in names:
        (workdir / "checkpoints" / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("step", "names", "events"),
    [
        (11, (), ()),
        (25, ("25.damaged",), ()),
        (25, (".20.partial",), ()),  # before it was written, that of step 10 was there
        (21, (".10.partial",), ()),  # the one of step 20 waits for it
        (4, ("4.damaged1",), ()),
        (4, (".4.removed",), ()),
        (4, (), [("start", 0), ("saved", 4), ("stop", 4)]),  # by a signal, long before it was due
        (0, (), [("start", 0), ("steps", 14)]),  # log.every is larger
        (4, (), [("start", 0), ("start", 3)]),
        (4, ("tmp",), [("saved", 4)]),
    ],
)
def test_check_refuses_a_workdir_without_its_checkpoints(workdir, step, names, events):
    make(workdir, *names)
    write_files(workdir, step, events)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    known = max([step, *(n for _, n in events)])
    with pytest.raises(LcmError) as refused:
        lost.check(workdir, 1000)
    ways_out = ("bring the checkpoints back", "delete metrics.jsonl", "another workdir")
    for words in (f"has step {known}", *ways_out, *names):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value) and before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    (workdir / "metrics.jsonl").unlink()
    lost.check(workdir, 1000)


@pytest.mark.parametrize(
    ("step", "names", "events"),
    [
        (0, (), ()),
        (10, (), ()),
        (20, (".10.partial",), ()),  # killed while its first checkpoint was written
        (20, (".10.partial.orbax-checkpoint-tmp",), ()),
        (
            9,
            (),
            [("start", 0), ("saved", 30), ("start", 0), ("steps", 9)],
        ),  # started again after metrics.jsonl was deleted
        (20, ("10",), ()),
        (30, ("10", ".20.partial"), ()),
        (25, ("25", "20.damaged"), [("saved", 25)]),
        (12, ("10", "60.damaged"), [("saved", 60), ("start", 10), ("steps", 12)]),  # of the attempt before
        (0, ("0",), [("start", 0), ("saved", 0)]),  # stopped before its first step
        (0, (), [("start", 0), ("saved", 0)]),
    ],
)
def test_check_accepts_what_a_killed_run_leaves(workdir, capsys, step, names, events):
    make(workdir, *names)
    write_files(workdir, step, events)
    lost.check(workdir, 1000)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("step", "names", "events"),
    [
        (60, ("10",), ()),
        (60, ("10", "60.damaged"), ()),
        (15, ("10",), [("start", 10), ("saved", 15)]),
    ],
)
def test_check_warns_of_an_older_checkpoint(workdir, capsys, step, names, events):
    make(workdir, *names)
    write_files(workdir, step, events)
    lost.check(workdir, 1000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: ") and f"step {step}" in line and f"steps 11 to {step} are trained again" in line


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_check_refuses_a_broken_link(workdir, name):
    os.symlink(workdir / "unmounted", workdir / name)
    with pytest.raises(LcmError, match=f"{name} links to .*/unmounted, which does not exist"):
        lost.check(workdir, 1000)


@pytest.mark.parametrize(
    "content",
    [
        b"5\n",
        b"{}\n",
        b'{"step": "a"}\n',
        b"\xff\xfe\n",
        b'{"st\n{"step": 2}\n',
        b"[" * 10000 + b"\n",
    ],
    ids=range(6),
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_check_names_a_damaged_file(workdir, name, content):
    write_files(workdir, 1)
    (workdir / name).write_bytes(content)
    with pytest.raises(LcmError, match=f"{name} line 1 is not a JSON object with a step"):
        lost.check(workdir, 1000)
