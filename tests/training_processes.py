"""Runs of `python -m lcm_jax.train` on fake devices and in several processes, and what their workdirs hold."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from test_runtime_distributed import LAUNCHER, LIMIT, explicit, free_port

from lcm_jax.runtime import checkpoints as checkpoint
from lcm_jax.runtime import telemetry

ROOT = Path(__file__).parents[1]


def start(
    workdir: Path, *options: str, devices: int = 1, processes: int = 1, launcher: Callable = explicit
) -> list[subprocess.Popen]:
    """The run's processes, each on `devices` fake devices; their output, compilations included, goes to files.

    launcher: (port, index, count) -> (options, environment) of one of several.
    """
    kept = {
        name: value for name, value in os.environ.items() if name.startswith("JAX_") or not name.startswith(LAUNCHER)
    }  # the tests' own settings of jax stay
    kept |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_LOG_COMPILES": "1"}
    command = [sys.executable, "-m", "lcm_jax.train", f"--workdir={workdir}", f"--init_timeout={LIMIT}", *options]
    port, started = free_port(), []
    for index in range(processes):
        where, environment = launcher(port, index, processes) if processes > 1 else ([], {})
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        started.append(
            subprocess.Popen(
                [*command, *where], cwd=ROOT, env=kept | environment, stdout=said, stderr=subprocess.STDOUT
            )
        )
        started[-1].said = said
    return started


def finish(processes: Sequence[subprocess.Popen], limit: float = 4 * LIMIT) -> list[tuple[int, str]]:
    """(exit code, output) of each; one that takes longer than `limit` seconds ends the test."""
    try:
        for process in processes:
            process.wait(limit)
    finally:
        for process in processes:
            process.kill()
    return [(process.wait(), said_by(process)) for process in processes]


def said_by(process: subprocess.Popen) -> str:
    with process.said:
        process.said.seek(0)
        return process.said.read()


def ended(processes: Sequence[subprocess.Popen], code: int = 0) -> list[str]:
    """The output of each; all ended with `code`."""
    codes, said = zip(*finish(processes), strict=True)
    assert set(codes) == {code}, "\n-----\n".join(said)
    return list(said)


def run(workdir: Path, *options: str, devices: int = 1, processes: int = 1) -> str:
    """The run to its end, without an error: the output of its first process."""
    return ended(start(workdir, *options, devices=devices, processes=processes))[0]


def saved(workdir: Path, step: int, *parts: str) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint by name."""
    trees = {part: checkpoint.load_subtree(workdir / "checkpoints", step, part) for part in parts}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in telemetry.read_metrics(workdir)]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """L2 distance over the norm of `b`."""
    return float(np.linalg.norm((a - b).ravel().astype(np.float64)) / max(np.linalg.norm(b.ravel()), 1e-30))
