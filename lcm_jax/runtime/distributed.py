"""Several processes as one run: how they find each other, agree, stop at the same step, and end.

A program defines the flags (`define_flags`) and does its work inside

    distributed.exit_code(program, **distributed.from_flags())

which joins the processes (`initialize`), runs the program, and shuts down. In a run of one process all of this does
nothing.

Agreement: a block `with together():` fails on every process if it fails on one. `assert_same`, `any_process` and
`broadcast_from_first` are built on it. Its messages go through the key-value store of jax's service, not through
devices, so that a process that failed can still take part.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from lcm_jax import ending
from lcm_jax.errors import LcmError
from lcm_jax.runtime import jax_private
from lcm_jax.runtime.launchers import detect

# Seconds:
INIT_TIMEOUT = 300  # to wait for the other processes at the start
HEARTBEAT = 60  # without a sign of life until a process counts as dead; jax then ends the others
TIMEOUT = 4 * 3600  # to wait for the slowest process that reads or writes hundreds of GB on a slow shared file system
_SETUP_TIMEOUT = 1800  # to wait for processes that are alive; heartbeats detect the dead ones
_VISIBLE = 90  # until a file that one machine made is visible on the others
_LEAVE = 5  # that a failing process gives the others to fail at the same point
_EXIT = 5  # that a process has for its orderly exit when its work is done

_FLAGS = ("coordinator", "num_processes", "process_id", "init_timeout")
_LOOPBACK = ("localhost", "127.", "[::1]", "::1")


def define_flags() -> None:
    """Defines --coordinator, --num_processes, --process_id, --init_timeout, unless they are defined already."""
    if "coordinator" in flags.FLAGS:
        return
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if several processes are one run")
    flags.DEFINE_integer("num_processes", None, "number of processes", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0)
    flags.DEFINE_integer("init_timeout", INIT_TIMEOUT, "seconds to wait for the other processes", lower_bound=1)


def from_flags() -> dict[str, Any]:
    """Arguments of `initialize` and `exit_code` from the command line."""
    return {name: flags.FLAGS[name].value for name in _FLAGS}


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    init_timeout: float = INIT_TIMEOUT,
) -> None:
    """Joins the processes of a run; must come before any other use of jax. Does nothing if there is one process.

    If a process does not come within `init_timeout` seconds, jax ends the others by abort (docs/clusters.md).

    Args:
      coordinator, num_processes, process_id: what is None is read from the environment, see `launchers.detect`.
      init_timeout: seconds to wait for the other processes.

    Raises:
      LcmError: incomplete flags or environment; the coordinator's port is taken; jax does not see all processes.
    """
    process = detect(coordinator, num_processes, process_id, init_timeout)
    if process is None:
        return
    # A coordinator on the loopback interface must not be reachable from other machines. None: on all interfaces.
    local = process.coordinator.startswith(_LOOPBACK)
    bind = process.coordinator if local else os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if process.index == 0:
        _check_port(bind or process.coordinator, anywhere=not bind)
    name = f"process {process.index} of {process.count}"
    waits = (
        f"{name} waits for the others at {process.coordinator}; jax aborts it after {init_timeout:g} s (--init_timeout)"
    )
    # Printed before the abort, which names neither the process nor the address.
    notice = threading.Timer(min(30, init_timeout / 2), lambda: print(waits, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            process.coordinator,
            process.count,
            process.index,
            local_device_ids=process.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=round(init_timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
            coordinator_bind_address=bind,
        )
    except RuntimeError as error:
        raise LcmError(
            f"{name} cannot join at {process.coordinator} ({str(error).strip().splitlines()[0]}); see the output of "
            "process 0"
        ) from error
    finally:
        notice.cancel()
    with together():
        seen = (jax.process_index(), jax.process_count())
        if seen != (process.index, process.count):
            raise LcmError(
                f"jax reports process {seen[0]} of {seen[1]}, but this was started as process {process.index} of "
                f"{process.count}; check JAX_PLATFORMS, and that all processes have the same devices"
            )
    assert_same("the number of devices", jax.device_count())


def _check_port(address: str, anywhere: bool) -> None:
    """Raises LcmError if process 0 cannot listen at `address`, or `anywhere` at its port; jax can crash then."""
    host, _, port = address.rpartition(":")
    host = "" if anywhere else host.strip("[]")
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        socket.create_server((host, int(port)), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise LcmError(
            f"process 0 cannot listen at {address} ({error.strerror or error}); another run may use this port, choose "
            "one with --coordinator or JAX_COORDINATOR_PORT"
        ) from error


_meetings = 0  # ends of `together` blocks so far: the same number on every process, so it can name them


@contextlib.contextmanager
def together(timeout: float = _SETUP_TIMEOUT) -> Iterator[None]:
    """A block that ends well on every process or fails on every process.

    All processes reach the ends of such blocks in the same order, from their main thread, the last at most `timeout`
    seconds after the first. Blocks may be nested: a process that fails in an outer block is met by the others at the
    end of the next inner one, and all of them leave both. Apart from that a block must not wait for another process
    (no computation on several processes' devices): that one may have failed.

    Raises:
      LcmError: the message of the first process that failed. A process that failed itself raises its own error.
    """
    global _meetings
    if not jax.distributed.is_initialized():
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        if getattr(error, "raised_on_all", False):  # by an inner block: no process comes to the end of this one
            raise
        failure = error
    _meetings += 1
    key = f"lcm_jax/meeting/{_meetings}"
    if failure is not None:
        report_failure(key, error_text(failure))
    try:
        jax_private.client().wait_at_barrier(key, round(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise failure or LcmError(
            f"not all processes reached the same point within {timeout:g} s; see the output of the others "
            f"({' '.join(str(error).split())})"
        ) from error
    if failure is None and (elsewhere := first_failure(key)):
        failure = LcmError(elsewhere)
    if failure is not None:
        failure.raised_on_all = True
        raise failure


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All call it, as they reach the end of a `together` block."""
    if not jax.distributed.is_initialized():
        return flag
    key = f"lcm_jax/any/{_meetings}"
    if flag:
        jax_private.client().key_value_set(f"{key}/{jax.process_index():09d}", "yes")
    with together():
        pass
    return bool(jax_private.client().key_value_dir_get(f"{key}/"))


def broadcast_from_first(decide: Callable[[], Any]) -> Any:
    """The value (JSON) of `decide()` on process 0, on every process. All call it, as they reach the end of a block.

    Raises:
      LcmError: on every process if `decide` raised on process 0, which raises its own error.
    """
    if not jax.distributed.is_initialized():
        return decide()
    first = jax.process_index() == 0
    with together(TIMEOUT):
        text = json.dumps(decide()) if first else ""
    key = f"lcm_jax/broadcast/{_meetings}"
    if first:
        jax_private.client().key_value_set(key, text)
    return json.loads(jax_private.client().blocking_key_value_get(key, 1000 * _SETUP_TIMEOUT))


def assert_same(what: str, value: Any) -> None:
    """Raises LcmError on every process unless all have the same `value` (as text) of what is named `what`."""
    first = broadcast_from_first(lambda: str(value))
    with together():
        if str(value) != first:
            lines = itertools.zip_longest(first.splitlines(), str(value).splitlines(), fillvalue="nothing")
            there, here = next((a.strip(), b.strip()) for a, b in lines if a != b)
            raise LcmError(
                f"{what} differs between processes: {there} on process 0, {here} on process {jax.process_index()}; "
                "start all of them with the same command"
            )


def check_shared(folder: Path) -> None:
    """Creates `folder` on process 0. Raises LcmError on every process unless all of them see it."""

    def leave_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".seen-{uuid.uuid4().hex[:8]}"
        (folder / name).touch()
        return name

    mark = folder / broadcast_from_first(leave_mark)
    try:
        with together():
            deadline = time.monotonic() + _VISIBLE
            while not mark.exists():
                if time.monotonic() > deadline:
                    raise LcmError(
                        f"{folder} is not the folder that process 0 writes to; choose a folder on a file system that "
                        "all processes share"
                    )
                time.sleep(1)
                os.listdir(folder.parent)  # network file systems cache for a while that a file did not exist
    finally:
        if jax.process_index() == 0:
            mark.unlink()


def error_text(error: BaseException) -> str:
    """The error's message; prefixed with the class name unless it is a user error."""
    return str(error) if isinstance(error, LcmError | OSError) else f"{type(error).__name__}: {error}"


def report_failure(key: str, message: str) -> None:
    """Reports under `key` that this process failed, see `first_failure`. From any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, and jax ends this one as well
        jax_private.client().key_value_set(f"{key}/{jax.process_index():09d}", message)


def first_failure(key: str) -> str:
    """The message of the first process that reported a failure, "process 1 of 2: ..."; "" if none did. Never waits."""
    failed = sorted(jax_private.client().key_value_dir_get(f"{key}/"))
    return f"process {int(failed[0][0].rsplit('/', 1)[1])} of {jax.process_count()}: {failed[0][1]}" if failed else ""


class Barrier:
    """A barrier for background threads. All processes create theirs in the same order."""

    _count = itertools.count()

    def __init__(self, name: str) -> None:
        self._key = f"lcm_jax/{name}/{next(self._count)}"

    def wait(self) -> None:
        """Returns when every process is here. A process that cannot come calls `give_up` instead."""
        if jax.distributed.is_initialized():
            jax_private.client().wait_at_barrier(self._key, 1000 * TIMEOUT)

    def give_up(self, error: BaseException) -> None:
        """This process will not come to `wait`: asks all processes to stop, and leaves `error` for them."""
        if jax.distributed.is_initialized():
            report_failure(f"{self._key}/failed", error_text(error))
            ask_to_stop()

    def given_up(self) -> str:
        """Which process has given up, and why; "" if none has. Never waits."""
        return first_failure(f"{self._key}/failed") if jax.distributed.is_initialized() else ""


def stop_asked() -> bool:
    """Whether any of several processes got a SIGTERM or asks to stop; they see it at different steps."""
    try:
        return bool(jax_private.client().key_value_try_get(jax_private.PREEMPTION_NOTICE))
    except jax.errors.JaxRuntimeError:  # no such key
        return False


def ask_to_stop() -> None:
    """Stops several processes as a SIGTERM to this one would. From any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key is set already
        now = datetime.datetime.now(datetime.UTC).isoformat()
        jax_private.client().key_value_set(jax_private.PREEMPTION_NOTICE, now)


# jax's preemption service stops after the last step that any process has reached. It must be given the number of calls,
# not the run's step: a run that resumes at step 500 and is asked to stop before that would wait for step 1.
_calls = itertools.count(1)


def stop_agreed() -> bool:
    """Whether all processes stop here because one got a SIGTERM or asked to. Each calls it once after every step."""
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def exit_code(
    program: Callable[[], int | None], left: str = "nothing was written", smaller: str = "use less", **processes: Any
) -> int:
    """Runs a program that may be one of several processes, as `ending.exit_code`; `processes`: see `initialize`.

    Returns at a good end, and if this process is alone. A process of several that fails ends here: with the others if
    they fail at the same point, else without waiting for them; jax ends those after HEARTBEAT seconds.
    """

    def joined() -> int | None:
        initialize(**processes)
        return program()

    try:
        code = ending.exit_code(joined, left, smaller)
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        code = 1
        with contextlib.suppress(OSError):  # nobody reads stderr any more; the others must not wait for that
            traceback.print_exc()
    if code and jax.distributed.is_initialized():
        _leave(code)
    jax.distributed.shutdown()
    return code


def _leave(code: int) -> None:
    _flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax_private.client().wait_at_barrier("lcm_jax/leave", 1000 * _LEAVE)
        jax.distributed.shutdown()
    os._exit(code)  # past jax's wait at exit; threads may still wait for another process's part of a checkpoint


def end_process_after(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`main`, after which the process ends in at most _EXIT seconds.

    Otherwise a thread that hangs in a call, or what a library does with its threads at exit, could keep it for ever.
    """

    def end(code: int) -> None:
        _flush()
        os._exit(code)

    def call(argv: list[str]) -> int:
        code = 1
        try:
            code = main(argv)
            return code
        finally:
            timer = threading.Timer(_EXIT, end, [code])
            timer.daemon = True
            timer.start()

    return call


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
