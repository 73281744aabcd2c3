"""Which of several processes this one is, where the first one is, and which devices it takes: flags or environment.

    what the launcher says               how many, which one                        where process 0 is
    flags                                --num_processes --process_id               --coordinator
    JAXJob, own scripts, JobSet          JAX_NUM_PROCESSES, JAX_PROCESS_ID          JAX_COORDINATOR_ADDRESS
                                         (or JOB_COMPLETION_INDEX, of an indexed job)
    XPK on GPUs                          NNODES, NODE_RANK                          JAX_COORDINATOR_ADDRESS, ..._PORT
    Open MPI                             OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK jax
    SLURM                                SLURM_NTASKS, SLURM_PROCID                 jax
    PMI (MPICH, Intel MPI)               PMI_SIZE, PMI_RANK                         --coordinator
    TPU pod slices, indexed jobs         jax                                        jax

A flag goes before the environment, each by itself: --coordinator alone moves the coordinator of a SLURM job. "jax" is
the detection of jax.distributed itself.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from lcm_jax.errors import LcmError
from lcm_jax.runtime.jax_private import cluster_types

ALONE = "or --num_processes=1 where this is a run of one process"
_LAUNCHERS = (  # count, index, whose detection by jax finds process 0; mpirun in a SLURM job shows both and is right
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", None),
    ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX", None),
    ("NNODES", "NODE_RANK", None),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "ompi"),
    ("SLURM_NTASKS", "SLURM_PROCID", "slurm"),
    ("PMI_SIZE", "PMI_RANK", None),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """One of several processes.

    Attributes:
      coordinator: HOST:PORT of process 0.
      count: number of processes, at least 2.
      index: of this one.
      local_devices: those that it takes of its machine's; None: all that it sees.
      run: a name that two runs on one machine do not share, where there is one.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    run: str = ""


def find(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
) -> Place | None:
    """The place of this process among several; None where it is alone.

    `timeout` in seconds is what a TPU pod gets to know its first host by name.

    Raises:
      LcmError: contradictory or incomplete flags; an environment of several processes that does not say enough.
    """
    launched, cluster = _launched(), None
    if num_processes == 1 and process_id in (None, 0):
        return None
    if (num_processes is None) != (process_id is None):
        raise LcmError("--num_processes and --process_id go together; give both, and --coordinator=HOST:PORT")
    if num_processes is not None:
        said, count, index, kind = "--num_processes", num_processes, process_id, None
    elif launched is not None:
        said, count, index, kind = launched
    else:
        cluster = _detected()
        if cluster is None:
            _refuse_coordinator_alone(coordinator)
            return None
        said, kind = cluster.name, cluster.name
        count, index = (_ask(cluster, call) for call in (cluster.get_process_count, cluster.get_process_id))
    if index is not None and not 0 <= index < count:
        raise LcmError(
            f"process {index} of {count}: processes are numbered from 0 to {count - 1}; "
            "correct --process_id or the environment"
        )
    if count == 1:
        return None
    if index is None:
        raise LcmError(
            f"{said}={count} says that there are several processes, but not which one this is; start them "
            f"with srun (SLURM) or give --coordinator, --num_processes and --process_id, {ALONE}"
        )
    address = coordinator or _coordinator()
    if cluster is None:
        cluster = next((known for known in cluster_types() if known.name == kind and known.is_env_present()), None)
    if address is None and cluster is not None:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = _ask(cluster, lambda: cluster.get_coordinator_address(timeout, port))
    if address is None:
        raise LcmError(
            f"{said}: this is one of {count} processes, but nothing says where process 0 is; start them "
            f"with srun (SLURM), or give --coordinator=HOST:PORT to all of them, {ALONE}"
        )
    run = os.environ.get("SLURM_JOB_ID", "") if num_processes is None else ""
    return Place(checked(address), count, index, local_devices(), run)


def checked(address: str) -> str:
    """The address. Raises LcmError unless it is HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise LcmError(
            f"coordinator {address!r} is not HOST:PORT; give the host of process 0 and a free port there, "
            "as --coordinator=10.0.0.1:1234"
        )
    return address


def local_devices() -> tuple[int, ...] | None:
    """Devices that this process takes of those it sees; None: all, or what JAX_LOCAL_DEVICE_IDS says.

    Of several processes on one machine that see the same devices each takes one, as jax does it. jax does so with one
    process per machine, too, which would leave all but its first device idle; that process takes them all.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        rank, alone = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"], os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    elif "SLURM_LOCALID" in os.environ:
        machines = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES"))
        rank, alone = os.environ["SLURM_LOCALID"], machines == os.environ.get("SLURM_NTASKS")
    else:
        return None
    narrowed = len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1  # by srun
    return None if alone or narrowed else (int(rank),)


def _launched() -> tuple[str, int, int | None, str | None] | None:
    """Name of the variable that says how many, how many, which one, kind of cluster; None: nothing says so."""
    half = None
    for count, index, kind in _LAUNCHERS:
        if count not in os.environ or (count == "NNODES" and _coordinator() is None):  # torchrun's name, too
            continue
        number = _number(count)
        if index in os.environ:
            return count, number, _number(index), kind
        half = half or (count, number, None, kind)
    return half


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise LcmError(f"the environment says {name}={os.environ[name]!r}, which is not a number; correct it") from None


def _coordinator() -> str | None:
    address, port = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("JAX_COORDINATOR_PORT")
    if address and port and ":" not in address.rpartition("]")[2]:
        return f"{address}:{port}"
    return address


def _refuse_coordinator_alone(coordinator: str | None) -> None:
    name = "--coordinator" if coordinator else "JAX_COORDINATOR_ADDRESS"
    if coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"):
        raise LcmError(
            f"{name} is given, but neither flags nor environment say how many processes there are and which "
            f"one this is; give --num_processes and --process_id, {ALONE}"
        )


def _detected() -> Any:
    """What jax detects beside the launchers above: TPU pods, and indexed Kubernetes jobs."""
    indexed = "JOB_COMPLETION_INDEX" in os.environ
    for known in cluster_types():
        if known.name in ("ompi", "slurm") or (known.__name__ == "K8sCluster" and not indexed):  # as any pod does
            continue
        if _ask(known, known.is_env_present):
            return known
    if indexed:
        raise LcmError(
            f"JOB_COMPLETION_INDEX={os.environ['JOB_COMPLETION_INDEX']}: an indexed Kubernetes job; set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT and JAX_NUM_PROCESSES in its environment (docs/clusters.md), " + ALONE
        )
    return None


def _ask(cluster: Any, call: Any) -> Any:
    try:
        return call()
    except Exception as error:  # metadata servers, Kubernetes' API, names that do not resolve: all have their own
        raise LcmError(
            f"jax found an environment of kind {cluster.name or cluster.__name__}, but not its processes "
            f"({type(error).__name__}: {' '.join(str(error).split())}); give --coordinator, --num_processes "
            f"and --process_id, {ALONE}"
        ) from error
