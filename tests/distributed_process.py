"""One of several real processes of a run without a model; --do names what it does.

    python tests/distributed_process.py --do=join [--coordinator=... --num_processes=... --process_id=...]

Each line on stdout is one JSON object.
"""

import itertools
import json

import jax
import numpy as np
from absl import app, flags

from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.runtime import distributed
from lcm_jax.runtime.workdir import StopSignal, locked

distributed.define_flags()
_DO = flags.DEFINE_enum("do", "join", ("join", "train", "alone", "setup", "crash"), "what this process does")
_STEPS = flags.DEFINE_integer("steps", 10**6, "of the loop")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder to lock")


def report(**what) -> None:
    print(json.dumps(what), flush=True)


def join() -> None:
    """Reports what a process knows, and a sum over all processes."""
    from jax.experimental import multihost_utils

    total = int(multihost_utils.process_allgather(np.int32(1 + jax.process_index())).sum())
    report(index=jax.process_index(), count=jax.process_count(), devices=jax.device_count(), total=total)


def train() -> None:
    """Steps in lockstep, numbered like those of a run that resumes, until all stop."""
    from jax.experimental import multihost_utils

    with StopSignal() as stop:
        for step in range(501, 501 + _STEPS.value):
            multihost_utils.process_allgather(np.int32(step))
            if step == 503:
                report(ready=step)
            if stop.agreed():
                report(stopped=step, name=stop.name)
                return
    report(stopped=None)


def alone() -> None:
    """Steps at its own speed until this or another process is asked to stop."""
    with StopSignal() as stop:
        report(ready=0)
        for step in itertools.count():
            if stop:
                report(stopped=step > 0, name=stop.name)
                return


def setup() -> None:
    """Reports what each process sees of failures in one process only."""
    index = jax.process_index()

    def fail(who: int, error: Exception) -> None:
        if index == who:
            raise error

    def nested(who: int) -> None:
        """One process fails before blocks that the other reaches."""
        with distributed.together():
            fail(who, LcmError("too early"))
            with distributed.together():
                distributed.assert_same("the seed", 1)
            report(reached=True)

    def lock() -> None:
        with locked(_WORKDIR.value):
            report(held=True)

    attempts = (
        lambda: report(
            value=distributed.broadcast_from_first(lambda: [index]), any=distributed.any_process(index == 1)
        ),
        lambda: fail(1, LcmError("no such file")),
        lambda: fail(0, TypeError("a bug")),
        lambda: distributed.broadcast_from_first(lambda: fail(0, OSError("disk full"))),
        lambda: distributed.assert_same("the seed", "a = 1\nb = 2" if index else "a = 1\nb = 3"),
        lambda: nested(1),
        lambda: nested(0),
        lock,
    )
    for attempt in attempts:
        try:
            with distributed.together():
                attempt()
        except (LcmError, TypeError, OSError) as error:
            report(error=str(error))
    with distributed.together():
        fail(1, LcmError("the end"))


def crash() -> None:
    """The second process fails by itself while the first waits for it."""
    from jax.experimental import multihost_utils

    multihost_utils.process_allgather(np.int32(0))
    report(ready=0)
    if jax.process_index() == 1:
        raise RuntimeError("a bug in one process")
    multihost_utils.process_allgather(np.int32(1))


def main(argv: list[str]) -> int:
    del argv
    work = {"join": join, "train": train, "alone": alone, "setup": setup, "crash": crash}[_DO.value]
    return distributed.exit_code(work, **distributed.from_flags())


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
