"""Which process this is: flags and the environments of launchers; and who is missing at the roll call."""

import contextlib
import json
import os
import socket
import threading

import pytest
from test_runtime_distributed import LAUNCHER, free_port

from lcm_jax.errors import LcmError
from lcm_jax.runtime import distributed as cluster
from lcm_jax.runtime.distributed import roll_call

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-009],gpu1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
PER_NODE = {"SLURM_STEP_NUM_NODES": "4"}
OMPI5 = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
OMPI = OMPI5 | {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://10.96.0.1,10.148.0.1:34911"}
NO_PROCESS_0 = "one of 8 .* nothing says where process 0 is|ompi.* mpi4py .* --coordinator"  # jax 0.12 asks mpi4py


@pytest.fixture
def environment(monkeypatch):
    """A clean one, to which variables are added."""
    for name in os.environ:
        if name.startswith(LAUNCHER):
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize(
    ("variables", "flags", "place"),
    [
        ({}, {}, None),
        ({}, dict(num_processes=1), None),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (SLURM, dict(num_processes=1), None),
        (SLURM, {}, cluster.Place("node007:61441", 4, 3, (1,), "4097")),
        (SLURM, dict(coordinator="gpu1:99"), cluster.Place("gpu1:99", 4, 3, (1,), "4097")),
        (SLURM | PER_NODE, {}, cluster.Place("node007:61441", 4, 3, None, "4097")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, {}, cluster.Place("node007:61441", 4, 3, None, "4097")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}, cluster.Place("node007:61441", 4, 3, (1,), "4097")),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, {}, cluster.Place("node007:61441", 4, 3, None, "4097")),
        ({}, dict(coordinator="[::1]:99", num_processes=2, process_id=1), cluster.Place("[::1]:99", 2, 1)),
        (SLURM, dict(coordinator="h:99", num_processes=2, process_id=1), cluster.Place("h:99", 2, 1, (1,))),
        (OMPI5 | SLURM, dict(coordinator="h:99"), cluster.Place("h:99", 8, 2, (2,), "4097")),
        (
            OMPI5 | {"JAX_COORDINATOR_ADDRESS": "[fe80::1]", "JAX_COORDINATOR_PORT": "7"},
            {},
            cluster.Place("[fe80::1]:7", 8, 2, (2,)),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "w-0-0.w:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            {},
            cluster.Place("w-0-0.w:1", 2, 1),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "w", "JAX_COORDINATOR_PORT": "1", "NNODES": "2", "NODE_RANK": "1"},
            {},
            cluster.Place("w:1", 2, 1),
        ),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, {}, cluster.Place("10.96.0.1:61440", 8, 2, (2,))),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}, cluster.Place("10.96.0.1:61440", 8, 2)),
        ({"NNODES": "4", "NODE_RANK": "1"}, {}, None),  # of torchrun: says nothing about jax
    ],
)
def test_places(environment, variables, flags, place):
    environment(variables)
    assert cluster.find(**flags) == place


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({}, dict(process_id=1), "--num_processes and --process_id go together"),
        ({}, dict(num_processes=2), "--num_processes and --process_id go together"),
        ({}, dict(num_processes=2, process_id=0), "nothing says where process 0 is"),
        ({}, dict(coordinator="h:1"), "--coordinator is given, but"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, "JAX_COORDINATOR_ADDRESS is given, but"),
        ({}, dict(num_processes=2, process_id=2, coordinator="h:1"), "process 2 of 2: .* 0 to 1"),
        ({}, dict(num_processes=1, process_id=1, coordinator="h:1"), "process 1 of 1|go together"),
        ({}, dict(num_processes=2, process_id=1, coordinator="h"), "'h' is not HOST:PORT"),
        ({}, dict(num_processes=2, process_id=1, coordinator="h:99999"), "'h:99999' is not HOST:PORT"),
        ({"SLURM_NTASKS": "4"}, {}, "SLURM_NTASKS=4 .* not which one"),  # salloc
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, {}, "one of 4 .* with srun"),  # sbatch
        ({"SLURM_NTASKS": "four", "SLURM_PROCID": "0"}, {}, "SLURM_NTASKS='four'"),
        (OMPI5, {}, NO_PROCESS_0),
        (OMPI5 | SLURM, {}, NO_PROCESS_0),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, {}, "one of 2 .* nothing says where process 0 is"),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, "JAX_NUM_PROCESSES"),
    ],
)
def test_several_processes_never_become_several_runs(environment, variables, flags, message):
    environment(variables)
    with pytest.raises(LcmError, match=message) as info:
        cluster.find(**flags)
    assert "\n" not in str(info.value)


def call(*places: cluster.Place, timeout: float = 60) -> list[str]:
    """What each of the processes, here threads, hears."""
    heard = [""] * len(places)

    def one(i: int) -> None:
        try:
            roll_call(places[i], timeout, places[i].coordinator)
        except LcmError as error:
            heard[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@contextlib.contextmanager
def waiting(*others: cluster.Place):
    """What these hear, when the block has ended."""
    heard: list[str] = []
    thread = threading.Thread(target=lambda: heard.extend(call(*others)))
    thread.start()
    yield heard
    thread.join()


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def places(address: str, count: int, *indices: int, run: str = "") -> list[cluster.Place]:
    return [cluster.Place(address, count, index, run=run) for index in indices]


def test_all_have_come(address):
    assert call(*places(address, 5, 3, 4, 1, 0, 2)) == [""] * 5


def test_all_hear_who_is_missing(address):
    heard = call(*places(address, 5, 0, 1, 3), timeout=5)
    assert heard[0].startswith(f"processes 2, 4 of 5 did not appear at {address} within 5 s")
    assert heard[1:] == [f"process {i} of 5: {heard[0]}" for i in (1, 3)]


def test_no_process_0(address):
    (heard,) = call(*places(address, 2, 1), timeout=3)
    assert f"process 1 of 2 did not find process 0 at {address} within 3 s (Connection refused)" in heard


def test_two_of_a_number(address):
    heard = call(*places(address, 3, 0, 1, 1))
    assert all("two processes call themselves process 1 of 3" in line for line in heard)


def test_another_run_at_the_port(address):
    """The process of the other run hears of it; the run begins without it."""
    with waiting(*places(address, 2, 0, run="77")) as heard:
        (stranger,) = call(*places(address, 2, 1, run="78"))
        assert "a run of 2 processes begins that is not its own" in stranger
        assert call(*places(address, 2, 1, run="77")) == [""]
    assert heard == [""]


def test_taken_port(address):
    host, _, port = address.partition(":")
    with socket.create_server((host, int(port))):
        (heard,) = call(*places(address, 2, 0))
    assert f"cannot listen at {address} (Address already in use" in heard and "--coordinator" in heard


def test_strangers_and_restarted_processes_do_no_harm(address):
    """Port scanners, health checks; and a process that began to wait, died and came again."""
    host, _, port = address.partition(":")
    hello = json.dumps({"lcm_jax": 1, "run": "", "count": 3, "index": 2}).encode() + b"\n"

    def disturb() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"index": 1}\n', hello):
            while True:
                try:
                    with socket.create_connection((host, int(port))) as connection:
                        connection.sendall(words)
                    break
                except ConnectionRefusedError:
                    pass

    with waiting(*places(address, 3, 0)) as heard:
        disturb()
        assert call(*places(address, 3, 1, 2)) == ["", ""]
    assert heard == [""]


def test_another_program_at_the_coordinator(address):
    host, _, port = address.partition(":")
    with socket.create_server((host, int(port))) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(b"\x00\x00\x12\x04\n")

        threading.Thread(target=serve, daemon=True).start()
        (heard,) = call(*places(address, 2, 1), timeout=3)
        server.shutdown(socket.SHUT_RDWR)
    assert "what answers there is another program" in heard
