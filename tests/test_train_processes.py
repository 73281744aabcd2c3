"""`python -m lcm_jax.train` as two real processes: one workdir, one stop, and bitwise resume."""

import random
import signal
import time
from pathlib import Path

import pytest
import tiny
import training_processes as runs
from test_runtime_distributed import LIMIT, explicit, slurm
from test_train import arguments
from training_processes import logged, saved_steps

pytestmark = pytest.mark.slow
STEPS, STOP_FROM = 30, 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("train") / "teacher")


def start(workdir, teacher, *more: str, launcher=explicit):
    options = arguments(workdir, teacher, f"--config.train.steps={STEPS}", "--config.data.workers=0", *more)
    return runs.start(*options, processes=2, launcher=launcher)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.ended(start(workdir, teacher))
    return workdir


def steps_logged(workdir: Path) -> int:
    return max((step for step, *_ in logged(workdir)), default=0)


def test_two_processes_stop_together_and_resume_bit_for_bit(whole, teacher, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, teacher, launcher=slurm)
    while processes[0].poll() is None and steps_logged(workdir) < STOP_FROM:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    outputs = runs.ended(processes)
    (step,) = saved_steps(workdir)
    assert STOP_FROM <= step < STEPS and f"saved step {step}; the same command resumes" in outputs[0]
    runs.ended(start(workdir, teacher))
    runs.check_same(workdir, whole, STEPS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_stops_all_at_one_step(teacher, tmp_path, number):
    """Killed: all report it. Stopped for ever: a SIGTERM still ends all; its process reads what the worker should."""
    workdir, data = tmp_path / "run", runs.folder_data(tmp_path / "data", workers=1)
    more = ("--config.log.every=1", "--config.train.steps=3000", "--config.checkpoint.every=3000")
    processes = start(workdir, teacher, *data, *more)
    while processes[0].poll() is None and steps_logged(workdir) < STOP_FROM:
        time.sleep(0.1)
    runs.workers_of(processes[1])[0].send_signal(number)
    if number == signal.SIGSTOP:
        time.sleep(5)
        processes[0].send_signal(signal.SIGTERM)
    outputs = runs.ended(processes, code=0 if number == signal.SIGSTOP else 2)
    (step,) = saved_steps(workdir)
    assert step == steps_logged(workdir) >= STOP_FROM and f"saved step {step}" in outputs[0]
    if number == signal.SIGKILL:
        assert all("worker 0 of 1" in output and "killed by SIGKILL" in output for output in outputs)


def test_all_processes_refuse_what_one_would(whole, teacher):
    """A config other than the workdir's; and two processes with different ones."""
    for output in runs.ended(start(whole, teacher, "--config.train.learning_rate=0.5"), code=2):
        assert "train.learning_rate: 0.001 there, 0.5 now" in output and "Traceback" not in output

    def differing(port: int, index: int, count: int):
        options, environment = explicit(port, index, count)
        return [*options, f"--config.seed={index}"], environment

    for output in runs.ended(start(whole, teacher, launcher=differing), code=2):
        assert "the config differs between processes" in output and "seed" in output and "Traceback" not in output


MOMENTS, LONG = 20, 160
LINES = (f"--config.train.steps={LONG}", "--config.log.every=1")
WRITING = "--config.checkpoint.every=2"
HOW = [(number, count) for number in (signal.SIGTERM, signal.SIGKILL) for count in (1, 2)]  # to one, to both


def is_writing(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob(".*.partial"))


def wait_for_moment(rng: random.Random, kind: str, workdir: Path, processes, wanted: int) -> None:
    """Returns at a random moment of the start, of the writing of a checkpoint, or of the steps after `wanted`."""
    if kind == "start":
        time.sleep(rng.uniform(0, 20))
        return
    begun = steps_logged(workdir)
    while all(process.poll() is None for process in processes):
        step = steps_logged(workdir)
        if step > begun and step >= wanted and (kind == "step" or is_writing(workdir)):
            time.sleep(rng.uniform(0, 0.1 if kind == "step" else 0.04))
            return
        time.sleep(0.002)


def test_stopped_at_any_moment_it_ends_as_never_stopped(teacher, tmp_path):
    """SIGTERM and SIGKILL, to one process and to both, in the start, in steps and in checkpoint writes."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    runs.ended(start(whole, teacher, *LINES))
    rng = random.Random(0)
    kinds = ["start"] * 3 + ["write"] * 8 + ["step"] * 9
    how = (HOW * MOMENTS)[:MOMENTS]
    rng.shuffle(kinds)
    rng.shuffle(how)
    survivor_seen = False
    for n, (kind, (number, count)) in enumerate(zip(kinds, how, strict=True)):
        before = saved_steps(workdir) if workdir.exists() else []
        processes = start(workdir, teacher, *LINES, WRITING)
        wait_for_moment(rng, kind, workdir, processes, n * (LONG - 60) // MOMENTS)
        assert all(process.poll() is None for process in processes), runs.finish(processes)
        there, writing, at = saved_steps(workdir), is_writing(workdir), steps_logged(workdir)
        hit = rng.sample(processes, count)
        for process in hit:
            process.send_signal(number)
        signalled = time.monotonic()
        alone = number == signal.SIGKILL and count == 1 and kind != "start" and not survivor_seen
        orderly = number == signal.SIGTERM and kind != "start"
        others = [process for process in processes if process not in hit]
        if not (orderly or alone):  # the others are not waited for
            for process in hit:
                process.wait(LIMIT)
            for process in others:
                process.kill()
        ended = runs.finish([*hit, *others])
        codes, after = [code for code, _ in ended], saved_steps(workdir)
        print(
            f"{n:2} {kind:5} {number.name} to {count} at step {at}, {'in' if writing else 'out of'} a write: "
            f"codes {codes}, {time.monotonic() - signalled:.1f} s; checkpoints {there} -> {after}"
        )
        if orderly:
            assert codes == [0, 0] and any(f"saved step {after[-1]};" in output for _, output in ended), ended
        if alone:
            survivor_seen = True
            assert codes[0] == -signal.SIGKILL and codes[1] not in (0, -signal.SIGKILL), ended
        assert max(after, default=0) >= max(there, default=0) >= max(before, default=0), "a checkpoint is lost"
    assert survivor_seen
    runs.ended(start(workdir, teacher, *LINES, WRITING))
    assert not list((workdir / "checkpoints").glob("*.damaged"))
    runs.check_same(workdir, whole, LONG)
