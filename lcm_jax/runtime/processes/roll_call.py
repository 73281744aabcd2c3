"""All processes of a run meet at the coordinator's port before jax.distributed does: who is missing gets a name.

    process i -> process 0    {"lcm_jax": 1, "run": ..., "count": n, "index": i}
    process 0 -> process i    {"error": ""}, or a line that all processes end with

A line of JSON each way, over TCP. jax's own start ends by abort, with a stack trace and without the missing process's
number, where a process does not come, and by a segmentation fault where the port is taken.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from lcm_jax.errors import LcmError
from lcm_jax.runtime.processes.cluster import Place

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
