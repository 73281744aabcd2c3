"""Runs of programs on fake devices and in several processes, and what the workdirs of trainings hold."""

import contextlib
import functools
import os
import re
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from absl import app, flags
from test_runtime_distributed import LAUNCHER, LIMIT, explicit, free_port

from lcm_jax.run import step as run_step
from lcm_jax.runtime import checkpoints, telemetry

ROOT = Path(__file__).parents[1]
TRAIN = ("-m", "lcm_jax.train")


def start(
    *options: object,
    program: Sequence[str] = TRAIN,
    devices: int = 1,
    processes: int = 1,
    launcher: Callable = explicit,
    path: object = ROOT,
) -> list[subprocess.Popen]:
    """The program's processes, each on `devices` fake devices; their output, compilations included, goes to files.

    launcher: (port, index, count) -> (options, environment) of one of several. path: PYTHONPATH.
    """
    environment = {
        name: value for name, value in os.environ.items() if name.startswith("JAX_") or not name.startswith(LAUNCHER)
    }  # the tests' own settings of jax stay
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_LOG_COMPILES": "1", "PYTHONPATH": str(path)}
    environment["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # as conftest.py: the same cached programs
    command = [sys.executable, *program, f"--init_timeout={LIMIT}", *map(str, options)]
    port, started = free_port(), []
    for index in range(processes):
        more, variables = launcher(port, index, processes) if processes > 1 else ([], {})
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        started.append(
            subprocess.Popen(
                [*command, *more], cwd=ROOT, env=environment | variables, stdout=output, stderr=subprocess.STDOUT
            )
        )
        started[-1].output = output
    return started


@contextlib.contextmanager
def flags_of_one_program() -> Iterator[None]:
    """Flags that the block defines go with it; those of programs that tests have imported are away meanwhile."""
    modules = {name: flags.FLAGS.find_module_defining_flag(name) or "" for name in flags.FLAGS}
    theirs = re.compile(r"lcm_jax|experiments")
    away = {n: flags.FLAGS[n] for n, module in modules.items() if theirs.match(module) or n.startswith("config.")}
    for name in away:
        delattr(flags.FLAGS, name)
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        for name, flag in away.items():
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(modules[name], flag)


def run_here(module: str, *arguments: str) -> int:
    """The exit code of `python -m MODULE`, a program with absl's flags, in this process: no second import of jax."""

    def run(main, flags_parser):
        sys.exit(main(flags_parser(sys.argv)))

    with flags_of_one_program(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # by tests
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(app, "run", run)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    return ended.value.code


def finish(processes: Sequence[subprocess.Popen], limit: float = 4 * LIMIT) -> list[tuple[int, str]]:
    """(exit code, output) of each; one that takes longer than `limit` seconds ends the test."""
    try:
        for process in processes:
            process.wait(limit)
    finally:
        for process in processes:
            process.kill()
    return [(process.wait(), output_of(process)) for process in processes]


def output_of(process: subprocess.Popen) -> str:
    with process.output:
        process.output.seek(0)
        return process.output.read()


def ended(processes: Sequence[subprocess.Popen], code: int = 0) -> list[str]:
    """The output of each; all ended with `code`."""
    codes, outputs = zip(*finish(processes), strict=True)
    assert set(codes) == {code}, "\n-----\n".join(outputs)
    return list(outputs)


def folder_data(folder: Path, workers: int) -> tuple[str, ...]:
    """Options of a run whose `workers` processes read image files, which are written to `folder`."""
    import data_kit  # takes seconds

    data = {"source": "folder", "path": data_kit.imagefolder(folder, data_kit.records(16)), "encode": "step"}
    data |= {"num_examples": 4096, "workers": workers}
    return tuple(f"--config.data.{key}={value}" for key, value in data.items())


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that read data for it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


def snapshot(folder: Path) -> dict[str, bytes]:
    """The files below a folder and what they hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def saved(workdir: Path, step: int, *parts: str) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint by name; parts: by default all that changes."""
    parts = parts or ("params", "ema_params", "opt_state")
    trees = {part: checkpoints.load_subtree(workdir / "checkpoints", step, part) for part in parts}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def saved_steps(workdir: Path) -> list[int]:
    return checkpoints.list_steps(workdir / "checkpoints")


def logged(workdir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each line of metrics.jsonl."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in telemetry.read_metrics(workdir)]


def check_same(workdir: Path, other: Path, step: int) -> dict[str, np.ndarray]:
    """Both runs logged the same and, bit for bit, saved the same state, which is returned."""
    assert logged(workdir) == logged(other)
    mine, theirs = saved(workdir, step), saved(other, step)
    assert mine.keys() == theirs.keys() and any(name.startswith("opt_state") for name in mine)
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    return mine


@contextlib.contextmanager
def traces() -> Iterator[list]:
    """A list that receives, each time a training step is traced, the shapes and dtypes of its batch."""
    found, make_step = [], run_step.make_step

    def counting(*args):
        step = make_step(*args)

        @functools.wraps(step)  # a program of the same name, so the cached one
        def traced(state, frozen, batch, key):
            found.append(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), batch))
            return step(state, frozen, batch, key)

        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_step, "make_step", counting)
        yield found
