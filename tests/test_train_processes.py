"""`python -m lcm_jax.train` as two real processes: one workdir, one stop, and going on bit for bit."""

import random
import signal
import time
from pathlib import Path

import data_kit
import numpy as np
import psutil
import pytest
import tiny
import training_processes as runs
from test_runtime_distributed import LIMIT, explicit, slurm
from test_train import arguments, arrays, logged, saved_steps

pytestmark = pytest.mark.slow
STEPS, STOP_FROM = 30, 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("train") / "teacher")


def start(workdir, teacher, *more: str, launcher=explicit):
    options = arguments(workdir, teacher, f"--config.train.steps={STEPS}", "--config.data.workers=0", *more)
    return runs.start(workdir, *options, processes=2, launcher=launcher)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.ended(start(workdir, teacher))
    return workdir


def check_same(workdir, whole, step: int) -> None:
    """The same lines and, bit for bit, the same parameters, target and optimiser."""
    assert logged(workdir) == logged(whole)
    mine, other = arrays(workdir, step), arrays(whole, step)
    assert mine.keys() == other.keys() and any(name.startswith("opt_state") for name in mine)
    for name, value in mine.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_two_processes_stop_together_and_go_on_bit_for_bit(whole, teacher, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, teacher, launcher=slurm)
    while processes[0].poll() is None and not [line for line in logged(workdir) if line[0] >= STOP_FROM]:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    said = runs.ended(processes)
    (step,) = saved_steps(workdir)
    assert STOP_FROM <= step < STEPS and f"saved step {step}; the same command goes on" in said[0]
    runs.ended(start(workdir, teacher))
    check_same(workdir, whole, STEPS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_stops_all_at_one_step(teacher, tmp_path, number):
    """Killed: all say so. Stopped for ever: all hear a SIGTERM. What the worker would have read its process reads."""
    data_kit.imagefolder(tmp_path / "data", data_kit.records(16))
    data = (
        "--config.data.source=folder",
        f"--config.data.path={tmp_path / 'data'}",
        "--config.data.encode=step",
        "--config.data.num_examples=4096",
        "--config.data.workers=1",
        "--config.log.every=1",
    )
    workdir = tmp_path / "run"
    processes = start(workdir, teacher, *data, "--config.train.steps=3000", "--config.checkpoint.every=3000")
    while processes[0].poll() is None and steps_logged(workdir) < STOP_FROM:
        time.sleep(0.1)
    workers = [
        child
        for child in psutil.Process(processes[1].pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].send_signal(number)
    if number == signal.SIGSTOP:
        time.sleep(5)
        processes[0].send_signal(signal.SIGTERM)
    said = runs.ended(processes, code=0 if number == signal.SIGSTOP else 2)
    (step,) = saved_steps(workdir)
    assert step == steps_logged(workdir) >= STOP_FROM and f"saved step {step}" in said[0]
    if number == signal.SIGKILL:
        assert all("worker 0 of 1" in line and "killed by SIGKILL" in line for line in said)


def test_all_processes_refuse_what_one_would(whole, teacher):
    """Another config than the workdir's; and two processes that were given different ones."""
    for line in runs.ended(start(whole, teacher, "--config.train.learning_rate=0.5"), code=2):
        assert "train.learning_rate: 0.001 there, 0.5 now" in line and "Traceback" not in line

    def differing(port: int, index: int, count: int):
        where, environment = explicit(port, index, count)
        return [*where, f"--config.seed={index}"], environment

    for line in runs.ended(start(whole, teacher, launcher=differing), code=2):
        assert "the config differs between processes" in line and "seed" in line and "Traceback" not in line


MOMENTS, LONG = 20, 160
LINES = (f"--config.train.steps={LONG}", "--config.log.every=1")
WRITING = "--config.checkpoint.every=2"
HOW = [(number, count) for number in (signal.SIGTERM, signal.SIGKILL) for count in (1, 2)]  # to one, to both


def partial(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob(".*.partial"))


def steps_logged(workdir: Path) -> int:
    return max((step for step, *_ in logged(workdir)), default=0)


def wait_for_moment(rng: random.Random, kind: str, workdir: Path, processes, wanted: int) -> None:
    """Returns at a random moment of the start, of a checkpoint's writing, or of the steps behind `wanted`."""
    if kind == "start":
        time.sleep(rng.uniform(0, 20))
        return
    begun = steps_logged(workdir)
    while all(process.poll() is None for process in processes):
        step = steps_logged(workdir)
        if step > begun and step >= wanted and (kind == "step" or partial(workdir)):
            time.sleep(rng.uniform(0, 0.1 if kind == "step" else 0.04))
            return
        time.sleep(0.002)


def finished(hit, others, wait: bool) -> list[tuple[int, str]]:
    """How the processes end; where they are not waited for, those that were hit end the others."""
    if not wait:
        for process in hit:
            process.wait(LIMIT)
        for process in others:
            process.kill()
    return runs.finish([*hit, *others])


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
        assert all(process.poll() is None for process in processes), [said for _, said in runs.finish(processes)]
        there, writing, at = saved_steps(workdir), partial(workdir), steps_logged(workdir)
        hit = rng.sample(processes, count)
        for process in hit:
            process.send_signal(number)
        signalled = time.monotonic()
        alone = number == signal.SIGKILL and count == 1 and kind != "start" and not survivor_seen
        orderly = number == signal.SIGTERM and kind != "start"
        ended = finished(hit, [process for process in processes if process not in hit], orderly or alone)
        codes, after = [code for code, _ in ended], saved_steps(workdir)
        print(
            f"{n:2} {kind:5} {number.name} to {count} at step {at}, {'in' if writing else 'out of'} a write: "
            f"codes {codes}, {time.monotonic() - signalled:.1f} s; checkpoints {there} -> {after}"
        )
        if orderly:
            assert codes == [0, 0] and any(f"saved step {after[-1]};" in said for _, said in ended), ended
        if alone:
            survivor_seen = True
            assert codes[0] == -signal.SIGKILL and codes[1] not in (0, -signal.SIGKILL), ended
        assert max(after, default=0) >= max(there, default=0) >= max(before, default=0), "a checkpoint is lost"
    assert survivor_seen
    runs.ended(start(workdir, teacher, *LINES, WRITING))
    assert not list((workdir / "checkpoints").glob("*.damaged"))
    check_same(workdir, whole, LONG)
