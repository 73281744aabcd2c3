"""Which process of a run this is: from flags, the environment of a launcher, or jax's detection.

Each flag overrides the environment by itself: --coordinator alone moves the coordinator of a SLURM job. An environment
that speaks of several processes but does not say enough is an error: several processes never become several runs.
docs/clusters.md has the table of what is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from lcm_jax.errors import LcmError
from lcm_jax.runtime import jax_private

_ALONE = "or --num_processes=1 if this is a run of one process"
_LAUNCHERS = (  # count, index, name of jax's detection that finds process 0; the first match wins
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", None),
    ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX", None),
    ("NNODES", "NODE_RANK", None),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "ompi"),  # before SLURM: mpirun in a SLURM job sets both
    ("SLURM_NTASKS", "SLURM_PROCID", "slurm"),
    ("PMI_SIZE", "PMI_RANK", None),
)


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """One process of several.

    Attributes:
      coordinator: HOST:PORT of process 0.
      count: number of processes, at least 2.
      index: of this process.
      local_devices: indices of this machine's devices that it uses; None: all that it sees.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def detect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
) -> ProcessInfo | None:
    """This process's part in a run of several, from flags and environment; None if it is alone.

    `timeout`: seconds that a TPU pod has to resolve the name of its first host.

    Raises:
      LcmError: contradictory or incomplete flags; an environment of several processes that does not say enough.
    """
    cluster = None
    if num_processes == 1 and process_id in (None, 0):
        return None
    if (num_processes is None) != (process_id is None):
        raise LcmError("--num_processes and --process_id go together; give both, and --coordinator=HOST:PORT")
    if num_processes is not None:
        source, count, index, detection = "--num_processes", num_processes, process_id, None
    elif (launched := _from_launcher()) is not None:
        source, count, index, detection = launched
    else:
        cluster = _detected_by_jax()
        if cluster is None:
            if coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"):
                raise LcmError(
                    f"{'--coordinator' if coordinator else 'JAX_COORDINATOR_ADDRESS'} is given, but neither flags nor "
                    "environment give the number of processes and the index of this one; give --num_processes and "
                    f"--process_id, {_ALONE}"
                )
            return None
        source, detection = cluster.name, cluster.name
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
            f"{source}={count} means several processes, but the index of this one is not set; start them "
            f"with srun (SLURM) or give --coordinator, --num_processes and --process_id, {_ALONE}"
        )
    address = coordinator or _coordinator_in_environment()
    if address is None and detection is not None:
        named = (kind for kind in jax_private.cluster_types() if kind.name == detection and kind.is_env_present())
        cluster = cluster or next(named, None)
        if cluster is not None:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = _ask(cluster, lambda: cluster.get_coordinator_address(timeout, port))
    if address is None:
        raise LcmError(
            f"{source}: this is one of {count} processes, but the address of process 0 is not set; start them "
            f"with srun (SLURM), or give --coordinator=HOST:PORT to all of them, {_ALONE}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise LcmError(
            f"coordinator {address!r} is not HOST:PORT; give the host of process 0 and a free port there, "
            "as --coordinator=10.0.0.1:1234"
        )
    return ProcessInfo(address, count, index, _local_devices())


def _from_launcher() -> tuple[str, int, int | None, str | None] | None:
    """(name of the count's variable, count, index, jax's detection) that a launcher has set; None: no launcher."""
    without_index = None
    for count, index, detection in _LAUNCHERS:
        # torchrun sets NNODES, too; only with the coordinator's address does it concern jax
        if count not in os.environ or (count == "NNODES" and _coordinator_in_environment() is None):
            continue
        if index in os.environ:
            return count, _number(count), _number(index), detection
        without_index = without_index or (count, _number(count), None, detection)
    return without_index


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise LcmError(f"the environment has {name}={os.environ[name]!r}, which is not a number; correct it") from None


def _coordinator_in_environment() -> str | None:
    address, port = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("JAX_COORDINATOR_PORT")
    if address and port and ":" not in address.rpartition("]")[2]:
        return f"{address}:{port}"
    return address


def _detected_by_jax() -> Any:
    """The class that detects a TPU pod or an indexed Kubernetes job; None: neither."""
    indexed = "JOB_COMPLETION_INDEX" in os.environ
    for cluster in jax_private.cluster_types():
        # SLURM and Open MPI are in _LAUNCHERS; to jax any Kubernetes pod is a cluster, even that of a single process.
        if cluster.name in ("ompi", "slurm") or (cluster.__name__ == "K8sCluster" and not indexed):
            continue
        if _ask(cluster, cluster.is_env_present):
            return cluster
    if indexed:
        raise LcmError(
            f"JOB_COMPLETION_INDEX={os.environ['JOB_COMPLETION_INDEX']}: an indexed Kubernetes job; set "
            f"JAX_COORDINATOR_ADDRESS=HOST:PORT and JAX_NUM_PROCESSES in its environment (docs/clusters.md), {_ALONE}"
        )
    return None


def _ask(cluster: Any, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # metadata servers, Kubernetes' API and name resolution each raise their own
        raise LcmError(
            f"jax found an environment of kind {cluster.name or cluster.__name__}, but not its processes "
            f"({type(error).__name__}: {' '.join(str(error).split())}); give --coordinator, --num_processes "
            f"and --process_id, {_ALONE}"
        ) from error


def _local_devices() -> tuple[int, ...] | None:
    """Indices of the visible devices that this process uses; None: all, or those in JAX_LOCAL_DEVICE_IDS.

    As in jax's detection, each of several processes on one machine that see the same devices uses one. jax does so for
    a single process per machine, too, which would leave all devices but the first idle; here it uses them all.
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
