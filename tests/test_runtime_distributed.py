"""Several real processes on loopback as one run: start, agreement, stopping together, ending."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime import distributed
from lcm_jax.runtime.workdir import locked

ROOT = Path(__file__).parents[1]
LAUNCHER = ("JAX_", "SLURM_", "OMPI_", "PMI_", "JOB_", "NNODES", "NODE_RANK", "KUBERNETES_", "CUDA_VISIBLE")
LIMIT = 240  # seconds, for a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def explicit(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
    return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"], {}


def slurm(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
    return [], {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


def slurm_elsewhere(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
    """Two jobs on one node would use the same port: --coordinator moves one of them."""
    environment = slurm(port, index, count)[1]
    del environment["JAX_COORDINATOR_PORT"]
    return [f"--coordinator=127.0.0.1:{port}"], environment


def open_mpi(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
    return [], {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",  # of the job in which mpirun runs
    }


def job_set(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
    return [], {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": str(index),
        "JAX_NUM_PROCESSES": str(count),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }


def xpk_gpu(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
    return [], {
        "NNODES": str(count),
        "NODE_RANK": str(index),
        "JAX_COORDINATOR_ADDRESS": "localhost",
        "JAX_COORDINATOR_PORT": str(port),
        "JOB_COMPLETION_INDEX": str(index),
    }


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    return subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "tests" / "distributed_process.py"), *arguments],
        env={**clean, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def run(launcher, *arguments: str, count: int = 2):
    port = free_port()
    processes = []
    try:
        for index in range(count):
            where, environment = launcher(port, index, count)
            processes.append(start([*arguments, *where, f"--init_timeout={LIMIT}"], environment))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen) -> None:
    """Waits for the line in which the process reports that it is ready."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("{") and "ready" in json.loads(line):
            return
    pytest.fail(f"it ended before: {''.join(lines)}{process.stderr.read()}")


def ends(process: subprocess.Popen, code: int | None = 0) -> list[dict]:
    """What the process reports from here to its end."""
    out, err = process.communicate(timeout=LIMIT)
    assert code is None or process.returncode == code, f"{out}{err}"
    process.error = err
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [explicit, slurm_elsewhere, open_mpi, job_set, xpk_gpu])
def test_processes_become_one_run(launcher):
    with run(launcher) as processes:
        reported = [ends(process) for process in processes]
    assert reported == [[{"index": index, "count": 2, "devices": 2, "total": 3}] for index in range(2)]


@pytest.mark.parametrize(
    ("launcher", "number", "count"),
    [
        (explicit, signal.SIGTERM, 2),
        (slurm, signal.SIGINT, 2),
        pytest.param(explicit, signal.SIGTERM, 4, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_stops_all_at_the_same_step(launcher, number, count):
    with run(launcher, "--do=train", count=count) as processes:
        for process in processes:
            wait_until_ready(process)
        processes[1].send_signal(number)
        reported = [ends(process) for process in processes]
    steps = {lines[-1]["stopped"] for lines in reported}
    assert len(steps) == 1 and min(steps) >= 503, reported
    assert reported[1][-1]["name"] == signal.Signals(number).name and reported[0][-1]["name"] == "SIGTERM"


@pytest.mark.slow
def test_signals_to_all_stop_all_once():
    """As a launcher sends them: to each process, at slightly different times."""
    with run(explicit, "--do=train") as processes:
        for process in processes:
            wait_until_ready(process)
        for process in (*processes, *processes):
            process.send_signal(signal.SIGTERM)
        reported = [ends(process) for process in processes]
    assert reported[0][-1]["stopped"] == reported[1][-1]["stopped"] is not None


@pytest.mark.slow
def test_processes_with_their_own_loops_stop_one_by_one():
    with run(explicit, "--do=alone") as processes:
        for process in processes:
            wait_until_ready(process)
        processes[0].send_signal(signal.SIGINT)
        reported = [ends(process) for process in processes]
    assert reported == [[{"stopped": True, "name": "SIGINT"}], [{"stopped": True, "name": "SIGTERM"}]]


def test_together_fails_in_all_if_it_fails_in_one(tmp_path):
    with locked(tmp_path), run(explicit, "--do=setup", f"--workdir={tmp_path}") as processes:
        reported = [ends(process, code=2) for process in processes]
    assert [lines.pop(0) for lines in reported] == [{"value": [0], "any": True}] * 2
    first, second = ([line["error"] for line in lines] for lines in reported)
    assert (first[0], second[0]) == ("process 1 of 2: no such file", "no such file")
    assert (first[1], second[1]) == ("a bug", "process 0 of 2: TypeError: a bug")
    assert (first[2], second[2]) == ("disk full", "process 0 of 2: disk full")
    assert "the seed differs between processes: b = 3 on process 0, b = 2 on process 1" in first[3]
    assert (first[4], second[4]) == ("process 1 of 2: too early", "too early")
    assert (first[5], second[5]) == ("too early", "process 0 of 2: too early")
    assert "in use by another process" in first[6] and second[6] == f"process 0 of 2: {first[6]}"
    assert [process.error.splitlines()[-1] for process in processes] == [
        "error: process 1 of 2: the end",
        "error: the end",
    ]


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_others():
    with run(explicit, "--do=crash") as processes:
        reported = [ends(process, code=None) for process in processes]
        assert reported == [[{"ready": 0}]] * 2
        assert processes[1].returncode == 1 and "a bug in one process" in processes[1].error
        assert processes[0].returncode != 0


@pytest.mark.slow
def test_processes_end_even_if_nobody_reads_their_output():
    with run(explicit, "--do=crash") as processes:
        for process in processes:
            wait_until_ready(process)
            process.stdout.close()
            process.stderr.close()
        assert all(process.wait(timeout=120) for process in processes), "jax would wait for five minutes"


@pytest.mark.slow
def test_a_killed_process_ends_the_others():
    """If no collective reveals it, jax's heartbeats do."""
    with run(explicit, "--do=alone") as processes:
        for process in processes:
            wait_until_ready(process)
        processes[1].kill()
        ends(processes[0], code=None)
        assert processes[0].returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_jax_aborts_if_a_process_is_missing(index):
    """docs/clusters.md quotes what is shown then."""
    address, _ = explicit(free_port(), index, 2)
    process = start([*address, "--init_timeout=1"], {})
    assert ends(process, code=-signal.SIGABRT) == []
    assert f"process {index} of 2 waits for the others at 127.0.0.1:" in process.error
    assert "Terminating process because the JAX distributed service detected fatal errors" in process.error
    assert "DEADLINE_EXCEEDED" in process.error


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_initialize_refuses_a_taken_port(host):
    with socket.create_server((host, 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        with pytest.raises(LcmError, match=f"process 0 cannot listen at {address} .*already in use.*--coordinator"):
            distributed.initialize(address, 2, 0)


@pytest.mark.slow
def test_one_process_needs_nothing():
    with run(lambda *_: ([], {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}), count=1) as (process,):
        assert ends(process) == [{"index": 0, "count": 1, "devices": 1, "total": 1}]
