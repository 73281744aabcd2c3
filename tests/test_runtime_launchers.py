"""Which process of a run this is: flags and the environments of launchers."""

import os

import pytest
from test_runtime_distributed import LAUNCHER

from lcm_jax.errors import LcmError
from lcm_jax.runtime.launchers import ProcessInfo, detect

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
NO_PROCESS_0 = "one of 8 .* the address of process 0 is not set|ompi.* mpi4py .* --coordinator"  # jax 0.12 asks mpi4py


@pytest.fixture
def environment(monkeypatch):
    """A clean one, to which variables are added."""
    for name in os.environ:
        if name.startswith(LAUNCHER):
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize(
    ("variables", "flags", "process"),
    [
        ({}, {}, None),
        ({}, dict(num_processes=1), None),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (SLURM, dict(num_processes=1), None),
        (SLURM, {}, ProcessInfo("node007:61441", 4, 3, (1,))),
        (SLURM, dict(coordinator="gpu1:99"), ProcessInfo("gpu1:99", 4, 3, (1,))),
        (SLURM | PER_NODE, {}, ProcessInfo("node007:61441", 4, 3, None)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, {}, ProcessInfo("node007:61441", 4, 3, None)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}, ProcessInfo("node007:61441", 4, 3, (1,))),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, {}, ProcessInfo("node007:61441", 4, 3, None)),
        ({}, dict(coordinator="[::1]:99", num_processes=2, process_id=1), ProcessInfo("[::1]:99", 2, 1)),
        (SLURM, dict(coordinator="h:99", num_processes=2, process_id=1), ProcessInfo("h:99", 2, 1, (1,))),
        (OMPI5 | SLURM, dict(coordinator="h:99"), ProcessInfo("h:99", 8, 2, (2,))),
        (
            OMPI5 | {"JAX_COORDINATOR_ADDRESS": "[fe80::1]", "JAX_COORDINATOR_PORT": "7"},
            {},
            ProcessInfo("[fe80::1]:7", 8, 2, (2,)),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "w-0-0.w:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            {},
            ProcessInfo("w-0-0.w:1", 2, 1),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "w", "JAX_COORDINATOR_PORT": "1", "NNODES": "2", "NODE_RANK": "1"},
            {},
            ProcessInfo("w:1", 2, 1),
        ),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, {}, ProcessInfo("10.96.0.1:61440", 8, 2, (2,))),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}, ProcessInfo("10.96.0.1:61440", 8, 2)),
        ({"NNODES": "4", "NODE_RANK": "1"}, {}, None),  # of torchrun: not meant for jax
    ],
)
def test_detect(environment, variables, flags, process):
    environment(variables)
    assert detect(**flags) == process


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({}, dict(process_id=1), "--num_processes and --process_id go together"),
        ({}, dict(num_processes=2), "--num_processes and --process_id go together"),
        ({}, dict(num_processes=2, process_id=0), "the address of process 0 is not set"),
        ({}, dict(coordinator="h:1"), "--coordinator is given, but"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, "JAX_COORDINATOR_ADDRESS is given, but"),
        ({}, dict(num_processes=2, process_id=2, coordinator="h:1"), "process 2 of 2: .* 0 to 1"),
        ({}, dict(num_processes=1, process_id=1, coordinator="h:1"), "process 1 of 1|go together"),
        ({}, dict(num_processes=2, process_id=1, coordinator="h"), "'h' is not HOST:PORT"),
        ({}, dict(num_processes=2, process_id=1, coordinator="h:99999"), "'h:99999' is not HOST:PORT"),
        ({"SLURM_NTASKS": "4"}, {}, "SLURM_NTASKS=4 .* index of this one is not set"),  # salloc
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, {}, "one of 4 .* with srun"),  # sbatch
        ({"SLURM_NTASKS": "four", "SLURM_PROCID": "0"}, {}, "SLURM_NTASKS='four'"),
        (OMPI5, {}, NO_PROCESS_0),
        (OMPI5 | SLURM, {}, NO_PROCESS_0),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, {}, "one of 2 .* the address of process 0 is not set"),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, "JAX_NUM_PROCESSES"),
    ],
)
def test_detect_refuses_what_could_become_several_runs(environment, variables, flags, message):
    environment(variables)
    with pytest.raises(LcmError, match=message) as info:
        detect(**flags)
    assert "\n" not in str(info.value)
