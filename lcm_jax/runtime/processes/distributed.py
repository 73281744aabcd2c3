"""Several processes as one run: how they find each other, agree, stop together and end.

A program defines the flags once (`define_flags()`, where it defines its others) and does its work inside

    distributed.exit_code(program, **distributed.from_flags())

which joins the processes (`initialize`), runs, and lets them part: together at a good end; one that fails alone does
not wait for the others, whom jax ends when its heartbeats have been missing for HEARTBEAT seconds. In a run of one
process all this does nothing.

What may fail in one process alone before the first step goes through `everywhere`: it fails in all, or in none.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from absl import flags
from jax.experimental import multihost_utils

from lcm_jax import errors
from lcm_jax.errors import LcmError
from lcm_jax.runtime import jax_private
from lcm_jax.runtime.processes import cluster
from lcm_jax.runtime.processes.roll_call import roll_call

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
    place = cluster.find(coordinator, num_processes, process_id, init_timeout)
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


def _check_joined(place: cluster.Place) -> None:
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
