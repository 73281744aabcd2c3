"""`python -m lcm_jax.train` whose workers are stopped or killed, and whose TensorBoard blocks, fails or dies."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import training_processes as runs
from test_train import ROOT, arguments
from training_processes import logged

pytestmark = pytest.mark.slow
ENDLESS = ("--config.train.steps=100000", "--config.checkpoint.every=100000", "--config.log.every=1")
BOARDS = {
    "blocks": ("tensorboardX", "SummaryWriter.add_scalar", "__import__('time').sleep(1e9)"),
    "fails": ("tensorboardX", "SummaryWriter.add_scalar", "1 / 0"),
    "dies": ("tensorboardX.event_file_writer", "EventsWriter.write_event", "1 / 0"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("train") / "teacher")


def reach(process: subprocess.Popen, workdir: Path, step: int) -> None:
    while process.poll() is None and not [line for line in logged(workdir) if line[0] >= step]:
        time.sleep(0.05)


def end(process: subprocess.Popen, workdir: Path, code: int) -> str:
    """Its output; no trained step is lost."""
    (output,) = runs.ended([process], code)
    assert runs.saved_steps(workdir) == [logged(workdir)[-1][0]], output
    return output


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_workers(teacher, tmp_path, number):
    workdir, options = tmp_path / "run", runs.folder_data(tmp_path / "data", workers=2)
    (process,) = runs.start(*arguments(workdir, teacher, *ENDLESS, *options))
    reach(process, workdir, 5)
    workers = runs.workers_of(process)
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
    module, method, code = BOARDS[kind]
    (tmp_path / "sitecustomize.py").write_text(
        f"import {module}\n\ndef broken(*_, **__):\n    {code}\n\n{module}.{method} = broken\n"
    )
    workdir = tmp_path / "run"
    (process,) = runs.start(*arguments(workdir, teacher, *ENDLESS), path=f"{tmp_path}:{ROOT}")
    reach(process, workdir, 40)  # more than tensorboardX's own queue holds
    process.send_signal(signal.SIGTERM)
    output = end(process, workdir, 0)
    (line,) = [line for line in output.splitlines() if line.startswith("TensorBoard ")]
    assert ("did not end" if kind == "blocks" else "ended (ZeroDivisionError") in line and "Traceback" not in output
