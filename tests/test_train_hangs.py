"""`python -m lcm_jax.train` whose workers are stopped or killed, and whose TensorBoard blocks, fails or dies."""

import os
import signal
import subprocess
import time
from pathlib import Path

import data_kit
import psutil
import pytest
import tiny
from test_train import PROGRAM, ROOT, arguments, logged, saved_steps

pytestmark = pytest.mark.slow
BOARDS = {
    "blocks": ("tensorboardX", "SummaryWriter.add_scalar", "__import__('time').sleep(1e9)"),
    "fails": ("tensorboardX", "SummaryWriter.add_scalar", "1 / 0"),
    "dies": ("tensorboardX.event_file_writer", "EventsWriter.write_event", "1 / 0"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("train") / "teacher")


def start(workdir: Path, teacher: Path, *more: str, path: Path = ROOT) -> subprocess.Popen:
    options = arguments(
        workdir,
        teacher,
        "--config.train.steps=100000",
        "--config.checkpoint.every=100000",
        "--config.log.every=1",
        *more,
    )
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": str(path)}
    return subprocess.Popen(
        [*PROGRAM, *options], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def reach(process: subprocess.Popen, workdir: Path, step: int) -> None:
    while process.poll() is None and not [line for line in logged(workdir) if line[0] >= step]:
        time.sleep(0.05)


def end(process: subprocess.Popen, workdir: Path, code: int) -> str:
    """What it said; nothing that was trained is lost."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert saved_steps(workdir) == [logged(workdir)[-1][0]], said
    return said


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_workers(teacher, tmp_path, number):
    data_kit.imagefolder(tmp_path / "data", data_kit.records(16))
    workdir = tmp_path / "run"
    process = start(
        workdir,
        teacher,
        "--config.data.source=folder",
        f"--config.data.path={tmp_path / 'data'}",
        "--config.data.encode=step",
        "--config.data.num_examples=4096",
        "--config.data.workers=2",
    )
    reach(process, workdir, 5)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    for worker in workers:
        worker.send_signal(number)
    if number == signal.SIGSTOP:
        before, now = None, logged(workdir)
        while before != now:  # until it waits
            time.sleep(3)
            before, now = now, logged(workdir)
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM: saved step" in end(process, workdir, 0)
    else:
        (line,) = [line for line in end(process, workdir, 2).splitlines() if line.startswith("error: ")]
        assert "of 2 (pid" in line and "killed by SIGKILL; memory" in line
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("kind", BOARDS)
def test_boards(teacher, tmp_path, kind):
    module, method, what = BOARDS[kind]
    (tmp_path / "sitecustomize.py").write_text(
        f"import {module}\n\ndef broken(*_, **__):\n    {what}\n\n{module}.{method} = broken\n"
    )
    workdir = tmp_path / "run"
    process = start(workdir, teacher, path=f"{tmp_path}:{ROOT}")
    reach(process, workdir, 40)  # more than tensorboardX's own queue holds
    process.send_signal(signal.SIGTERM)
    lines = [line for line in end(process, workdir, 0).splitlines() if not line.startswith("step ")]
    (about,) = [line for line in lines if line.startswith("TensorBoard ")]
    assert ("did not end" if kind == "blocks" else "ended (ZeroDivisionError") in about and "Traceback" not in lines
