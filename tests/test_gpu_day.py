"""experiments/gpu_day: rows in processes of their own, kept at once; what is cut resumes."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import jobs
from experiments.gpu_day import __main__ as program
from experiments.gpu_day import driver
from experiments.gpu_day import rows as rows_lib
from experiments.gpu_day.driver import Day, Row
from experiments.speed import run as speed
from experiments.speed import side, workloads
from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.run import models as run_models

REPOSITORY = Path(__file__).parents[1]


def row(name: str, code: str = "pass", limit_s: float = 30.0) -> Row:
    """A row that notes in `began` that it has begun, and then runs `code`."""
    code = f"import os, pathlib, sys, time; print({name!r}, file=open(os.environ['BEGAN'], 'a')); {code}"
    return Row(name, (sys.executable, "-S", "-c", code), lambda folder, log: {"result": log.strip()}, limit_s)


def made(folder: Path, code: str = "a", **settings: str) -> Day:
    return Day(folder, settings, code, {"BEGAN": str(folder / "began")})


def run(rows: list[Row], day: Day, budget_s: float = 60.0) -> tuple[bool, list[str]]:
    """Whether all rows are answered, and the names of those that this call has begun."""
    began = Path(day.environment["BEGAN"])
    began.unlink(missing_ok=True)
    complete = driver.run(rows, day, budget_s, lambda line: None)
    return complete, began.read_text().split() if began.exists() else []


def test_rows_are_kept_and_not_run_again(tmp_path):
    """Unless they were asked something else. The table marks those measured with other sources of the package."""
    rows = [row("b", "print(3)"), row("a")]
    assert run(rows, made(tmp_path)) == (True, ["b", "a"])
    assert driver.Day.kept(made(tmp_path), rows[0])["result"] == "3"
    assert run(rows, made(tmp_path)) == (True, [])
    assert run([row("b", "print(4)"), rows[1]], made(tmp_path)) == (True, ["b"])
    assert run(rows[1:], made(tmp_path, "b")) == (True, [])
    assert "| a | done* | 0 |" in (tmp_path / "table.md").read_text()
    assert run(rows[1:], made(tmp_path, jax="2")) == (True, ["a"])


@pytest.mark.slow
def test_a_row_that_fails_does_not_end_the_day(tmp_path):
    """Its error is kept. It is tried again after all that is missing, or in its place when the sources have changed."""
    rows = [
        row("dies", "os.kill(os.getpid(), 9)"),
        row("wrong", "raise ValueError('no | good')"),
        row("large", "sys.exit('XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory')"),
        row("alien", "import nothing_of_this_name"),
        row("well"),
    ]
    day = made(tmp_path)
    assert run(rows, day) == (False, [one.name for one in rows])
    found = {one.name: day.kept(one) for one in rows}
    statuses = [driver.FAILED, driver.FAILED, driver.UNFIT, driver.ABSENT, driver.DONE]
    assert [one["status"] for one in found.values()] == statuses
    assert found["wrong"]["error"] == "ValueError: no | good" and found["dies"]["error"] == "exit code -9"
    assert "ValueError: no / good |" in (tmp_path / "table.md").read_text()

    assert run([*rows, row("new")], day)[1] == ["new", "dies", "wrong", "alien"]
    assert run([*rows, row("newer")], made(tmp_path, "b"))[1] == ["dies", "wrong", "alien", "newer"]


def test_a_row_that_says_nothing_of_its_result_has_failed(tmp_path):
    def read(folder: Path, log: str) -> dict:
        return json.loads((folder / "result.json").read_text())

    day, one = made(tmp_path), dataclasses.replace(row("a"), read=read)
    assert run([one], day) == (False, ["a"]) and "is not there" in day.kept(one)["error"]


def test_time(tmp_path, monkeypatch):
    """A row ends at its limit with all its processes; twice in its place, then after the others. So does the budget."""
    limit, day = 29.0, made(tmp_path)

    class Impatient(subprocess.Popen):
        """That limit is over as soon as the row has a child."""

        def wait(self, timeout=None):
            if timeout != limit:
                return super().wait(timeout)
            wait_for(lambda: day.log(long).read_text().strip())
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(jobs.subprocess, "Popen", Impatient)
    child = f"import subprocess; p = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)']); "
    long = row("long", f"{child} print(p.pid, flush=True); time.sleep(60)", limit)
    assert run([long, row("a")], day) == (False, ["long", "a"])
    assert day.kept(long)["status"] == driver.CUT and day.kept(long)["error"] == "not finished in 29 s"
    pid = int(day.kept(long)["result"])
    wait_for(lambda: not alive(pid))
    assert run([long, row("b")], day)[1] == ["long", "b"]
    assert run([long, row("c")], day)[1] == ["c", "long"]
    assert run([row("d")], day, jobs.GRACE_S + 1) == (False, [])


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 60.0):
    """What `condition` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


DAY = """
import json, sys
from pathlib import Path
from experiments.gpu_day import driver
from lcm_jax.ending import exit_code
folder, environment = Path(sys.argv[1]), json.loads(sys.argv[2])
rows = [driver.Row(*one, lambda folder, log: {"result": log.strip()}) for one in json.loads(sys.argv[3])]
day = driver.Day(folder, {}, "a", environment)
sys.exit(exit_code(lambda: driver.run(rows, day, 60.0, lambda line: None), "rows are kept"))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_day_leaves_its_rows_and_no_process(tmp_path, number):
    """A second call in the folder is refused while the first one lives."""
    rows = [row("first"), row("second", "print(os.getpid(), flush=True); time.sleep(60)")]
    described = json.dumps(made(tmp_path).environment), json.dumps([(one.name, one.command) for one in rows])
    command = [sys.executable, "-c", DAY, str(tmp_path), *described]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "second.log"
    pid = int(wait_for(lambda: log.exists() and log.read_text().strip()))
    with pytest.raises(LcmError, match="another call"):
        run([row("first")], made(tmp_path))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert errors == {signal.SIGKILL: "", signal.SIGTERM: "stopped; rows are kept\n"}[number]
    wait_for(lambda: not alive(pid))
    assert run([row("first"), row("second")], made(tmp_path)) == (True, ["second"])


def test_the_rows_of_a_day(tmp_path):
    """Each command names one workload of experiments.speed, also narrowed; a config's step is the config's own."""
    days = {narrow: rows_lib.rows(tmp_path, "NVIDIA H200", narrow) for narrow in (False, True)}
    for narrow, found in days.items():
        assert len({one.name for one in found}) == len(found)
        only = [part.removeprefix("--only=") for one in found for part in one.command if part.startswith("--only=")]
        assert len(only) == (5 + 8 if not narrow else 5 + 4)  # sampling, alone and beside diffusers, has fewer sizes
        for name in only:
            assert [work.name for work in workloads.chosen("gpu", [name], narrow=narrow)] == [name]
    names = [one.name for one in days[False]]
    assert names[:4] == ["tests", "demo", "beside-matmul-none-8192-b1-bfloat16", "lora-sd15-512-b8-bfloat16"]
    steps = {name.split("-")[1] for name in names if name.startswith("step-")}
    assert steps == {path.stem for path in (REPOSITORY / "configs").glob("*.py")}

    work = side.of_config(Path("configs/collage_lcm_lora.py"), False)
    config = side.training_config(work)
    assert (work.name, config.train.accumulation_steps) == ("step-collage_lcm_lora-512-b12-auto", 3)
    assert config.model.teacher.endswith("stable-diffusion-v1-5")


def test_a_narrow_model_is_one_that_training_takes():
    """Less than that of the config in width and depth; kinds of blocks, heads and conditioning are the same."""
    narrow = run_models.shapes(side.training_config(side.of_config(Path("configs/ssd1b_lcm.py"), True))).teacher.unet
    wide = json.loads((assets.architecture("segmind/SSD-1B") / "unet" / "config.json").read_text())
    assert list(narrow.block_out_channels) == [wide["block_out_channels"][i] // side.NARROWING for i in (0, -1)]
    assert list(narrow.down_block_types) == [wide["down_block_types"][i] for i in (0, -1)]
    for field in ("mid_block_type", "use_linear_projection", "addition_embed_type"):
        assert getattr(narrow, field) == wide[field]


def test_a_step_starts_from_an_lcm_where_its_config_does():
    """The embedded one is made by the demo, so its shapes stand in for it."""
    for name in ("pokemon_lcf", "shapes_lcf"):
        model = side.training_config(side.of_config(Path(f"configs/{name}.py"), True)).model
        unet = json.loads((Path(model.student) / "unet" / "config.json").read_text())
        assert model.teacher is None and unet["time_cond_proj_dim"] == side.W_EMBEDDING


def test_what_is_read_of_a_row(tmp_path):
    """pytest's summary, and our side's numbers, also those that a failure has left."""
    log = "FAILED tests/test_a.py::test_b - assert\n=== 1 failed, 2 passed, 9 deselected in 3.21s ===\n"
    tests, step = (rows_lib.rows(tmp_path, "NVIDIA H200", False)[i] for i in (0, 3))
    assert tests.read(tmp_path, log) == {
        "result": "1 failed, 2 passed, 9 deselected in 3.21s",
        "tests": ["tests/test_a.py::test_b"],
        "error": "failed: tests/test_a.py::test_b",
    }
    with pytest.raises(ValueError):
        tests.read(tmp_path, "Fatal Python error: Segmentation fault")
    cost = {"memory": {"needed": 3 * 2**30, "available": 100 * 2**30}}
    summary = {"seconds": [0.5] * 7, "flops": 0.5 * 0.4 * 989e12, "peak_bytes": 2**30, "cost": cost}
    path = tmp_path / "profiles" / step.name / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(summary))
    model = "lcm_jax.aot's model 3.00 GiB of 100.00"
    assert step.read(tmp_path, "") == {
        "result": f"500 ms ± 0 %, 16 images/s, peak 1.00 GiB, utilisation 40.0%, {model}"
    }
    path.write_text(json.dumps({"cost": cost, "error": "RESOURCE_EXHAUSTED: Out of memory"}))
    found = step.read(tmp_path, "")
    assert found["result"] == model and driver.kind_of(found["error"]) == driver.UNFIT


def test_a_day_without_a_gpu_is_refused(tmp_path, monkeypatch):
    """In one line, before anything is written; also where there is one that jax does not find."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(LcmError, match="nvidia-smi finds no GPU"):
        speed.card_name("gpu")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["gpu_day", f"--out={tmp_path / 'out'}"])
    with pytest.raises(LcmError, match="^--device=gpu: jax does not find it [^\n]*$"):
        program.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_day_rehearsed(tmp_path):
    """Every row, by the day's own code, on narrow models; the day is killed in a training step, and resumes."""
    command = [sys.executable, "-m", "experiments.gpu_day", "--device=cpu", "--budget_s=7200", f"--out={tmp_path}"]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    wait_for(lambda: any(tmp_path.glob("*/logs/lora-sd15*")), 3600)
    time.sleep(random.uniform(0, 30))
    process.kill()
    process.wait()
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.endswith("-rehearsal"))
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")}
    failed = {name: one["error"] for name, one in found.items() if one["status"] != driver.DONE}
    assert done.returncode == 0 and not failed
    assert len(found) == len(rows_lib.rows(folder, "", True)) and sum(one["tries"] > 1 for one in found.values()) == 1
    assert all(one["code"] for one in found.values()) and "lcm_jax |" in (folder / "table.md").read_text()
