"""experiments/evidence: what is current is not run again, and what has changed since is named."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.evidence import __main__ as program
from experiments.evidence import driver, record
from experiments.evidence.listed import LISTED, Experiment
from lcm_jax.errors import LcmError

REPOSITORY = Path(__file__).parents[1]
FILES = {
    "experiments/__init__.py": "",
    "experiments/shared.py": "ROWS = 3\n",
    "experiments/mini/__init__.py": "",
    "experiments/mini/run.py": """
import pathlib, sys, time
name, workdir = (flag.partition("=")[2] for flag in sys.argv[1:])
print(name, workdir, file=open("began", "a"))
if pathlib.Path(f"wait-{name}").exists():
    print("waiting", flush=True)
    time.sleep(60)
if pathlib.Path(f"fail-{name}").exists():
    raise ValueError("no good")
if not pathlib.Path(f"mute-{name}").exists():
    pathlib.Path(__file__).with_name(f"{name}.json").write_text(name)
""",
    "configs/a.py": """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({"rate": 0.1, "steps": 3})
""",
    "lcm_jax/maths.py": 'def twice(x):\n    """Doubles."""\n    return 2 * x  # exact\n',
    "lcm_jax/assets/mini/unet/model.safetensors": "weights",
}


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository in small, whose experiments note in `began` that they have begun, and in which folder."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def one(name: str, flag: str = "--name", **changes) -> Experiment:
    about = {
        "module": "experiments.mini.run",
        "flags": (f"{flag}={name}",),
        "publishes": (f"{name}.json",),
        "places": ("--workdir={runs}/{a}",),
        "configs": ("configs/a.py",),
        "assets": ("lcm_jax/assets/mini",),
        "code": ("lcm_jax/*.py",),
        "program": ("experiments/shared.py",),
    }
    return Experiment(name, **about | changes)


def run(root: Path, *listed: Experiment, said: list | None = None) -> tuple[dict[str, str], list[str]]:
    """The errors, and "NAME FOLDER" of each experiment that this call has begun."""
    began = root / "began"
    began.unlink(missing_ok=True)
    failed = driver.run(listed, root, (said if said is not None else []).append)
    return failed, began.read_text().splitlines() if began.exists() else []


def names(began: list[str]) -> list[str]:
    return [line.split()[0] for line in began]


def stale(root: Path, capsys, *listed: Experiment) -> tuple[int, list[str]]:
    """The exit code of --stale, and its lines."""
    code = program.main(["--stale"], listed, root)
    return code, capsys.readouterr().out.splitlines()


def test_what_is_current_is_not_run_again(root, capsys):
    listed = one("a"), one("b")
    missing = ["a: no record", "b: no record", "2 of 2 experiments are stale; make evidence runs them"]
    assert stale(root, capsys, *listed) == (1, missing)
    failed, began = run(root, *listed)
    assert (failed, names(began)) == ({}, ["a", "b"])
    assert stale(root, capsys, *listed) == (0, ["0 of 2 experiments are stale"])
    assert run(root, *listed) == ({}, [])
    found = record.read(root)["a"]
    assert found["command"] == "python -m experiments.mini.run --name=a"
    assert re.fullmatch(r".+, \d+ cores", found["machine"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert names(run(root, *listed, one("c"))[1]) == ["c"] and set(record.read(root)) == {"a", "b", "c"}


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "resumes"),
    [
        ("lcm_jax/assets/mini/unet/model.safetensors", "weights", "others", False),
        ("configs/a.py", "0.1", "0.2", False),
        ("lcm_jax/maths.py", "2 * x", "3 * x", False),
        ("experiments/shared.py", "3", "4", True),
        ("experiments/mini/run.py", "waiting", "sleeping", True),
        ("experiments/mini/a.json", "a", "b", True),
    ],
)
def test_what_has_changed_is_named_and_run_again(root, capsys, name, old, new, resumes):
    """From its start, in another folder, where another model or another row could come of it."""
    _, first = run(root, one("a"))
    reason = f"a: {name.removesuffix('/unet/model.safetensors')}"
    edit(root, name, old, new)
    assert stale(root, capsys, one("a"))[1][0] == reason
    _, again = run(root, one("a"))
    assert names(again) == ["a"] and (again == first) == resumes
    assert stale(root, capsys, one("a"))[0] == 0
    if name not in one("a").published:
        edit(root, name, new, old)
        assert run(root, one("a"))[1] == first


def test_a_file_that_comes_or_goes_and_a_command(root, capsys):
    """All that has changed is named, five of it; a file that an experiment does not depend on is not."""
    run(root, one("a"), one("b", code=()))
    (root / "lcm_jax" / "new.py").write_text("x = 1")
    (root / "lcm_jax" / "maths.py").unlink()
    (root / "experiments" / "mini" / "a.json").unlink()
    expected = "a: lcm_jax/new.py, lcm_jax/maths.py, experiments/mini/a.json"
    assert stale(root, capsys, one("a"), one("b", code=()))[1][:-1] == [expected]
    for number in range(4):
        (root / "lcm_jax" / f"{number}.py").write_text("x = 1")
    assert stale(root, capsys, one("a"))[1][0].endswith("lcm_jax/new.py and 2 more")
    run(root, one("a"))
    assert stale(root, capsys, one("a", flag="--other"))[1][0] == "a: its command"


def test_comments_docstrings_and_layout_do_not_count(root, capsys):
    run(root, one("a"))
    (root / "lcm_jax" / "maths.py").write_text('"""New."""\n\n\ndef twice(\n    x,\n):\n    return (2\n * x)\n')
    edit(root, "configs/a.py", '"steps": 3', '"steps": 1 + 2  # as before\n    ')
    edit(root, "experiments/shared.py", "ROWS = 3", '"""New."""\nROWS = 3  # of them')
    assert stale(root, capsys, one("a"))[0] == 0


def test_other_code_has_another_digest(tmp_path):
    """Also where values differ only in their types, or are empty, and where a text is used."""
    texts = ("def f(x):\n    'a'\n    return %s", "x = %s")
    for text in texts:
        found = [text % value for value in ("'a'", "'b'", "None", "...", "1", "1.0", "True", "y", "y.real", "-1", "[]")]
        digests = []
        for source in found:
            (tmp_path / "a.py").write_text(source)
            digests.append(record.of_file(tmp_path / "a.py"))
        assert len(set(digests)) == len(found)


def test_one_that_fails_does_not_stop_the_others(root, capsys):
    """It has no record, or its old one; the last lines say what failed and where its log is."""
    listed = one("a"), one("b"), one("c")
    (root / "fail-a").touch()
    (root / "mute-b").touch()
    assert program.main([], listed, root) == 1
    assert set(record.read(root)) == {"c"}
    last = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"a failed: ValueError: no good \(.*/a-\w+\.[\d.]+\.log\)", last[0])
    assert last[1].startswith("b failed: it ended well, but did not write experiments/mini/b.json (")
    assert "no good" in Path(re.search(r"\((.*)\)", last[0])[1]).read_text()
    (root / "fail-a").unlink()
    (root / "mute-b").unlink()
    assert names(run(root, *listed)[1]) == ["a", "b"]
    before = record.read(root)
    edit(root, "lcm_jax/maths.py", "2", "3")
    (root / "mute-b").touch()  # what it once published is there, and is not what it publishes now
    assert list(run(root, *listed)[0]) == ["b"] and record.read(root)["b"] == before["b"]


def test_the_time_that_is_left(root):
    """Told before each experiment from what it took last time."""
    listed = one("a"), one("b"), one("c")
    run(root, *listed[:2])
    records = record.read(root)
    records["a"]["minutes"], records["b"]["minutes"] = 20.0, 4.2
    record.write(records, root)
    edit(root, "lcm_jax/maths.py", "2", "3")
    said: list[str] = []
    run(root, *listed, said=said)
    assert said == [
        "a: 20 minutes last time; left with it: 24 minutes and 1 of unknown time",
        "b: 4.2 minutes last time; left with it: 4 minutes and 1 of unknown time",
        "c: unknown time; left with it: 0 minutes and 1 of unknown time",
    ]


def test_minutes_are_those_of_all_attempts(root):
    """Of the same state; attempts on others are not of this experiment's numbers."""
    found = record.depends(one("a"), root)
    logs = root / driver.RUNS / "logs"
    logs.mkdir(parents=True)
    for begun, end in ((1000.5, 1060.5), (2000.0, 2120.0)):
        log = logs / f"{driver.log_name(one('a'), found, root)}.{begun:.3f}.log"
        log.touch()
        os.utime(log, (end, end))
    assert driver.minutes(one("a"), found, root) == pytest.approx(3.0)
    edit(root, "configs/a.py", "0.1", "0.2")
    assert driver.minutes(one("a"), record.depends(one("a"), root), root) == 0


EVIDENCE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_evidence
from experiments.evidence import __main__ as program
from lcm_jax.ending import exit_code
listed = test_evidence.one("a"), test_evidence.one("b")
sys.exit(exit_code(lambda: program.main([], listed, Path(sys.argv[1])), "records are kept"))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_records_survive_a_stop(root, number):
    """What was running when it came is run again, in the same folder. Two calls at once are refused."""
    (root / "wait-b").touch()
    command = [sys.executable, "-c", EVIDENCE, str(root), str(Path(__file__).parent)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any("waiting" in log.read_text() for log in (root / driver.RUNS).glob("logs/b-*.log")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(LcmError, match="another call"):
        driver.run([one("a")], root, print)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert errors == {signal.SIGKILL: "", signal.SIGTERM: "stopped; records are kept\n"}[number]
    assert set(record.read(root)) == {"a"}
    _, first = (root / "began").read_text().splitlines()
    (root / "wait-b").unlink()
    assert run(root, one("a"), one("b")) == ({}, [first])
    assert len(list((root / driver.RUNS).glob("logs/b-*.log"))) == 2


def test_list_and_only(root, capsys):
    listed = one("a"), one("b"), one("c")
    assert program.main(["--only=c,a"], listed, root) == 0 and set(record.read(root)) == {"a", "c"}
    capsys.readouterr()
    assert program.main(["--list"], listed, root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"a \([\d.]+ minutes; current\)", lines[0]) and lines[2] == "b (unknown time; stale: no record)"
    assert lines[3].strip() == one("b").command
    with pytest.raises(LcmError, match="--only=c,d,e: there is no experiment d, e; give some of a, b, c"):
        program.main(["--only=c,d,e"], listed, root)


def test_experiments_share_runs_of_the_same_models():
    """Table 1, LCF and workflows take the demo's LCM, studies share models; a LoRA's own trainer runs apart."""
    found = {one.name: driver.places(one, record.depends(one, REPOSITORY), REPOSITORY) for one in LISTED}
    (demo,), (table1,), (lcf, lcm) = found["demo"], found["table1"], found["lcf"]
    workflows = {found[name][0] for name in found if name.startswith("workflows")}
    assert workflows == {demo} == {table1, lcm.replace("--lcm", "--workdir")}
    assert demo.startswith("--workdir=runs/evidence/")
    studies = {found[name][0] for name in found if name.startswith("ablation-")}
    places = {demo, lcf, found["demo-long"][0], found["lcm-lora"][0], found["torch"][0], *studies}
    assert len(studies) == 1 and len(places) == 6


class Parsed(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize("listed", LISTED, ids=lambda one: one.name)
def test_an_experiment_is_what_the_list_says(listed, monkeypatch):
    """Its program takes its command line, and all files that it depends on are there."""
    for pattern in (*listed.code, *listed.asking, *listed.configs, *listed.assets):
        assert list(REPOSITORY.glob(pattern)), pattern
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    places = driver.places(listed, record.depends(listed, REPOSITORY), REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["program", *listed.flags, *places])
    with pytest.raises(Parsed):
        importlib.import_module(listed.module).main()


def test_all_published_numbers_are_listed():
    """But for those with rows of their own, and the curves of the embedded models, which come with the assets."""
    of_assets = (
        r"experiments/shapes_teacher/\w+_metrics\.jsonl|experiments/shapes_controlnet/(metrics\.jsonl|made\.json)"
    )
    others = re.compile(rf"experiments/(acceptance|aot|page|speed)/|experiments/workflows/(memory|int8)\.|{of_assets}")
    files = [path for path in (REPOSITORY / "experiments").glob("*/*") if path.is_file()]
    found = {str(path.relative_to(REPOSITORY)) for path in files if path.suffix != ".py" and path.name != "README.md"}
    results = {name for name in found if not others.match(name)}
    assert results and results <= {name for one in LISTED for name in one.published}
    assert set(record.read(REPOSITORY)) <= {one.name for one in LISTED}
    assert len({one.name for one in LISTED}) == len(LISTED)
