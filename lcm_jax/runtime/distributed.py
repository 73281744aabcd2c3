"""Several processes as one run: how they find each other, agree, stop together and end.

A program defines the flags once (`define_flags()`, where it defines its others) and does its work inside

    distributed.exit_code(program, **distributed.from_flags())

which joins the processes (`initialize`), runs, and lets them part: together at a good end; one that fails alone does
not wait for the others, whom jax ends when its heartbeats have been missing for HEARTBEAT seconds. In a run of one
process all this does nothing.

What may fail in one process alone before the first step goes through `everywhere`: it fails in all, or in none.

Which of several processes this one is, where the first one is, and which devices it takes: flags or environment.

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

All processes of a run meet at the coordinator's port before jax.distributed does: who is missing gets a name.

    process i -> process 0    {"lcm_jax": 1, "run": ..., "count": n, "index": i}
    process 0 -> process i    {"error": ""}, or a line that all processes end with

A line of JSON each way, over TCP. jax's own start ends by abort, with a stack trace and without the missing process's
number, where a process does not come, and by a segmentation fault where the port is taken.

What all processes of a run must decide alike, the first one decides for them; and that they see the same folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.experimental import multihost_utils

from lcm_jax import errors
from lcm_jax.errors import LcmError
from lcm_jax.runtime import jax_private
from lcm_jax.runtime.jax_private import cluster_types

T = TypeVar("T")

INIT_TIMEOUT = 300  # seconds
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead; the others then end, too
_LEAVE = 5  # seconds that a failing process gives the others to fail at the same
_LAST = 5  # seconds that a process has to end in order when its work is done
_WAIT = 1800  # seconds to wait for processes that live: the heartbeats tell of those that do not
_LOOPBACK = ("localhost", "127.", "[::1]", "::1")
_FLAGS = ("coordinator", "num_processes", "process_id", "init_timeout")
_meetings, _steps = itertools.count(), itertools.count(1)


def define_flags() -> None:
    """--coordinator, --num_processes, --process_id, --init_timeout; again: nothing."""
    if "coordinator" in flags.FLAGS:
        return
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes are one run")
    flags.DEFINE_integer("num_processes", None, "how many they are", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which one this is, from 0", lower_bound=0)
    flags.DEFINE_integer("init_timeout", INIT_TIMEOUT, "seconds to wait for each other at the start", lower_bound=1)


def from_flags() -> dict[str, Any]:
    """Arguments of `initialize` and `exit_code` from the command line."""
    return {name: flags.FLAGS[name].value for name in _FLAGS}


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    init_timeout: float = INIT_TIMEOUT,
) -> None:
    """Joins the processes of a run, before anything else is done with jax. One process: nothing happens.

    Args:
      coordinator, num_processes, process_id: explicitly; what is None is found in the environment (`cluster.find`).
      init_timeout: seconds to wait for the other processes.

    Raises:
      LcmError: incomplete flags or environment; a process is missing; jax does not see all processes as one.
    """
    place = find(coordinator, num_processes, process_id, init_timeout)
    if place is None:
        return
    bind = _bind_address(place.coordinator)
    roll_call(place, init_timeout, bind)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(30, round(init_timeout)),  # all are there
            heartbeat_timeout_seconds=HEARTBEAT,
            coordinator_bind_address=bind,
        )
    except RuntimeError as error:
        raise LcmError(
            f"process {place.index} of {place.count} cannot join at {place.coordinator} "
            f"({str(error).strip().splitlines()[0]}); see what process 0 says"
        ) from error
    everywhere(lambda: _check_joined(place))
    same("the number of devices", jax.device_count())


def shutdown() -> None:
    """Parts from the other processes at the end, when all have come to it. One process: nothing happens."""
    jax.distributed.shutdown()


def exit_code(program: Callable[[], int | None], **where: Any) -> int:
    """`errors.exit_code` of a program that may be one of several processes; `where`: arguments of `initialize`.

    Returns only where no other process has to be told of a failure: else this process ends here.
    """

    def joined() -> int | None:
        initialize(**where)
        return program()

    try:
        code = errors.exit_code(joined)
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        code = 1
        with contextlib.suppress(OSError):  # nobody reads stderr any more; the others must not wait for that
            traceback.print_exc()
    if code and jax.distributed.is_initialized():
        _leave(code)
    shutdown()
    return code


def last(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`main` as the last thing that its process does: LAST seconds after it the process ends, whatever hangs.

    Threads that hang in a call, and what libraries do at exit with theirs, would keep it for ever else.
    """

    def end(code: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def call(argv: list[str]) -> int:
        code = 1
        try:
            code = main(argv)
            return code
        finally:
            timer = threading.Timer(_LAST, end, [code])
            timer.daemon = True
            timer.start()

    return call


def everywhere(call: Callable[[], T], timeout: float = _WAIT) -> T:
    """`call()`, on every process. Returns its value; if it raised anywhere, raises everywhere.

    All processes come here in the same order, from their main thread, the last at most `timeout` seconds after the
    first is done. `call` itself must wait for no other process (no collective): that one may have failed.

    Raises:
      LcmError: the message of the first process that failed. A process that failed itself raises its own error.
    """
    if not jax.distributed.is_initialized():
        return call()
    client, meeting = jax_private.client(), f"lcm_jax/everywhere/{next(_meetings)}"
    value, failure = None, None
    try:
        value = call()
    except Exception as error:
        failure = error
        client.key_value_set(f"{meeting}/{jax.process_index():09d}", said(error))
    try:
        client.wait_at_barrier(meeting, round(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise failure or LcmError(
            f"not all processes came to the same place within {timeout:g} s; see what the others "
            f"say ({' '.join(str(error).split())})"
        ) from error
    failed = first_failure(meeting)
    if failure is not None:
        raise failure
    if failed:
        raise LcmError(failed)
    return value


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process. All come here as to `everywhere`, within its default time."""
    if not jax.distributed.is_initialized():
        return flag
    client, key = jax_private.client(), f"lcm_jax/anywhere/{next(_meetings)}"
    if flag:
        client.key_value_set(f"{key}/{jax.process_index():09d}", "yes")
    everywhere(lambda: None)
    return bool(client.key_value_dir_get(f"{key}/"))


def said(error: BaseException) -> str:
    """An error in words: those of bad input as they are, others with their class."""
    return str(error) if isinstance(error, LcmError | OSError) else f"{type(error).__name__}: {error}"


def tell_failure(key: str, what: str) -> None:
    """Leaves word for the others under `key` that this process failed, from whichever thread; see `first_failure`."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone; jax ends this one as well
        jax_private.client().key_value_set(f"{key}/{jax.process_index():09d}", what)


def first_failure(key: str) -> str:
    """What the first process said that failed, "process 1 of 2: ..."; "" where none did. Waits for nobody."""
    failed = sorted(jax_private.client().key_value_dir_get(f"{key}/"))
    return f"process {int(failed[0][0].rsplit('/', 1)[1])} of {jax.process_count()}: {failed[0][1]}" if failed else ""


def same(what: str, value: Any) -> None:
    """Raises LcmError on every process unless all have the same `value` (its str) of what is named `what`."""
    if not jax.distributed.is_initialized():
        return
    client, key = jax_private.client(), f"lcm_jax/same/{next(_meetings)}"
    if jax.process_index() == 0:
        client.key_value_set(key, str(value))
    first = client.blocking_key_value_get(key, 1000 * _WAIT)

    def check() -> None:
        if str(value) != first:
            raise LcmError(
                f"{what} differs between processes: {_difference(first, str(value))}; start all of them "
                "with the same command"
            )

    everywhere(check)


def stop_asked() -> bool:
    """Whether any of several processes got a SIGTERM, or asks to stop; at which step they hear of it differs."""
    try:
        return bool(jax_private.client().key_value_try_get(jax_private.PREEMPTION_NOTICE))
    except jax.errors.JaxRuntimeError:  # no such key
        return False


def ask_to_stop() -> None:
    """Stops all of several processes as a SIGTERM to this one would, from whichever thread: where each asks next."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a signal was before it
        now = datetime.datetime.now(datetime.UTC).isoformat()
        jax_private.client().key_value_set(jax_private.PREEMPTION_NOTICE, now)


def stop_agreed() -> bool:
    """Whether all processes stop here, as one of them got a SIGTERM, or asks for it. Each asks once after every step.

    jax's preemption service sets the stop after the last step that any process has reached. It counts the calls, not
    the steps: a run that goes on at step 500 and is told to stop before its first step would else wait for step 1.
    """
    return multihost_utils.reached_preemption_sync_point(next(_steps))


def _bind_address(coordinator: str) -> str | None:
    """Where process 0 listens; None: jax's default, all its addresses. A local run is nobody else's business."""
    return coordinator if coordinator.startswith(_LOOPBACK) else os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")


def _check_joined(place: Place) -> None:
    found = (jax.process_index(), jax.process_count())
    if found != (place.index, place.count):
        raise LcmError(
            f"jax says that this is process {found[0]} of {found[1]}, it was started as process "
            f"{place.index} of {place.count}; check JAX_PLATFORMS, and that all have the same devices"
        )


def _difference(first: str, here: str) -> str:
    """The first lines in which two texts differ."""
    pairs = itertools.zip_longest(first.splitlines(), here.splitlines(), fillvalue="nothing")
    there, mine = next((a.strip(), b.strip()) for a, b in pairs if a != b)
    return f"{there} on process 0, {mine} on process {jax.process_index()}"


def _leave(code: int) -> None:
    """Ends a process that failed: with the others where they fail, too, else alone, past jax's wait at exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax_private.client().wait_at_barrier("lcm_jax/leave", 1000 * _LEAVE)
        shutdown()
    os._exit(code)  # threads may wait for another process still, as for its part of a checkpoint


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


PROTOCOL = 1
_PAUSE = 0.2  # seconds between two attempts to reach process 0
_HELLO = 5.0  # seconds that a connection gets to say who it is; port scanners say nothing
_LINE = 2**16  # bytes


def roll_call(place: Place, timeout: float, bind: str | None = None) -> None:
    """Returns when all processes have come, at most `timeout` seconds after process 0 began to wait.

    Args:
      bind: HOST:PORT at which process 0 listens; None: the coordinator's port on all its addresses.

    Raises:
      LcmError: processes are missing, there are two of a number, process 0 does not answer, its port is taken.
    """
    if place.index == 0:
        _call(place, timeout, bind)
    else:
        _answer(place, timeout)


def _call(place: Place, timeout: float, bind: str | None) -> None:
    deadline = time.monotonic() + timeout
    here: dict[int, socket.socket] = {}
    error = ""
    with _listen(place, bind) as server:
        try:
            while not error and len(_alive(here)) < place.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    error = _missing(place, sorted(set(range(1, place.count)) - _alive(here).keys()), timeout)
                else:
                    error = _admit(place, connection, here)
        finally:
            for connection in here.values():
                _send(connection, {"error": error})
                connection.close()
    if error:
        raise LcmError(error)


def _admit(place: Place, connection: socket.socket, here: dict[int, socket.socket]) -> str:
    """Notes who comes. An error that ends the run for all, or ""."""
    connection.settimeout(_HELLO)
    try:
        hello = _receive(connection)
    except (OSError, ValueError):
        connection.close()
        return ""
    if hello.get("lcm_jax") != PROTOCOL:
        connection.close()
        return ""
    index = hello["index"]
    if (hello["run"], hello["count"]) != (place.run, place.count):
        _send(
            connection,
            {
                "error": f"process {index} of {hello['count']} came to {place.coordinator}, where a run of "
                f"{place.count} processes begins that is not its own; choose another port with "
                "--coordinator or JAX_COORDINATOR_PORT"
            },
        )
        connection.close()
        return ""
    if index == 0 or index in _alive(here):
        error = f"two processes call themselves process {index} of {place.count}; give each its own --process_id"
        _send(connection, {"error": error})
        connection.close()
        return error
    connection.setblocking(False)
    here[index] = connection
    return ""


def _alive(here: dict[int, socket.socket]) -> dict[int, socket.socket]:
    """`here` without those who came and went away, as a process that its launcher starts again does."""
    for index in [index for index, connection in here.items() if not _is_open(connection)]:
        here.pop(index).close()
    return here


def _answer(place: Place, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    host, _, port = place.coordinator.rpartition(":")
    found = "nothing answers there"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                _send(connection, {"lcm_jax": PROTOCOL, "run": place.run, "count": place.count, "index": place.index})
                connection.settimeout(timeout + 2 * _HELLO)  # process 0 began to wait before now
                reply = _receive(connection)
        except (OSError, ValueError) as error:
            found = "what answers there is another program" if isinstance(error, ValueError) else _reason(error)
            time.sleep(_PAUSE)
            continue
        if reply.get("error"):
            raise LcmError(f"process {place.index} of {place.count}: {reply['error']}")
        return
    raise LcmError(
        f"process {place.index} of {place.count} did not find process 0 at {place.coordinator} within "
        f"{timeout:g} s ({found}); start process 0 there, check the address and the firewall, or raise "
        "--init_timeout"
    )


def _listen(place: Place, bind: str | None) -> socket.socket:
    host, _, port = (bind or place.coordinator).rpartition(":")
    host = host.strip("[]") if bind else ""
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=place.count, dualstack_ipv6=both)
    except OSError as error:
        raise LcmError(
            f"process 0 of {place.count} cannot listen at {bind or place.coordinator} ({_reason(error)}); "
            "another run may have this port: choose one with --coordinator or JAX_COORDINATOR_PORT"
        ) from error


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # it went away; the one who waits for it says so
        pass


def _receive(connection: socket.socket) -> dict[str, Any]:
    """One line. Raises OSError: nobody there; ValueError: not ours."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _LINE:
        more = connection.recv(_LINE)
        if not more:
            raise ConnectionError("the connection was closed") if not data else ValueError(data)
        data += more
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError(message)
    return message


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _missing(place: Place, indices: list[int], timeout: float) -> str:
    listed = ", ".join(map(str, indices[:16])) + (f" and {len(indices) - 16} more" if len(indices) > 16 else "")
    them = ("process", "it") if len(indices) == 1 else ("processes", "them")
    return (
        f"{them[0]} {listed} of {place.count} did not appear at {place.coordinator} within {timeout:g} s; see what "
        f"became of {them[1]}, or raise --init_timeout"
    )


# Seconds that processes wait for the slowest: hundreds of GB read from, or written to, a slow shared file system.
TIMEOUT = 4 * 3600
SEEN = 90  # seconds until a file of one machine is seen by the others
_COUNT = itertools.count()


def decided_by_first(decide: Callable[[], Any]) -> Any:
    """What `decide()` returns on process 0 (JSON), on every process. All call it, at the same place of the program.

    Raises:
      LcmError: on every process, where `decide` raised anything on process 0, which raises that itself.
    """
    if jax.process_count() == 1:
        return decide()
    first = jax.process_index() == 0
    mine = everywhere(lambda: json.dumps(decide()).encode() if first else b"", timeout=TIMEOUT)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    mine = np.frombuffer(mine, np.uint8) if mine else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(mine).astype(np.uint8).tobytes())


def barrier(name: str) -> str:
    """A key for `wait_for_all`, never given before; all processes ask for theirs in the same order."""
    return f"lcm_jax/{name}/{next(_COUNT)}"


def wait_for_all(key: str) -> None:
    """Returns when every process has come here, from whichever thread. One that cannot come says so by `give_up`."""
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * TIMEOUT)


def give_up(key: str, error: BaseException) -> None:
    """This process does not come to `wait_for_all(key)`: all are asked to stop, and `given_up(key)` says why."""
    if jax.process_count() > 1:
        tell_failure(f"{key}/failed", said(error))
        ask_to_stop()


def given_up(key: str) -> str:
    """Which process has given up `key`, and why; "" where none has."""
    return first_failure(f"{key}/failed") if jax.process_count() > 1 else ""


def check_shared(folder: Path) -> None:
    """Makes `folder` on process 0. Raises LcmError on every process unless all of them see it."""
    sign = folder / decided_by_first(lambda: _leave_sign(folder))
    try:
        everywhere(lambda: _look_for(sign))
    finally:
        if jax.process_index() == 0:
            sign.unlink()


def _leave_sign(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".seen-{uuid.uuid4().hex[:8]}"
    (folder / name).touch()
    return name


def _look_for(sign: Path) -> None:
    deadline = time.monotonic() + SEEN
    while not sign.exists():
        if time.monotonic() < deadline:
            time.sleep(1)
            os.listdir(sign.parent.parent)  # network file systems remember for a while what was not there
            continue
        raise LcmError(f"{sign.parent} is not where process 0 writes; choose a folder on a file system that all share")
