"""One of several real processes of a run, with no model: what it does is named by --do.

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


def tell(**what) -> None:
    print(json.dumps(what), flush=True)


def join() -> None:
    """All that a process knows, and a sum over all processes."""
    from jax.experimental import multihost_utils

    total = int(multihost_utils.process_allgather(np.int32(1 + jax.process_index())).sum())
    tell(index=jax.process_index(), count=jax.process_count(), devices=jax.device_count(), total=total)


def train() -> None:
    """Steps in lockstep, numbered as those of a run that goes on, until all stop."""
    from jax.experimental import multihost_utils

    with StopSignal() as stop:
        for step in range(501, 501 + _STEPS.value):
            multihost_utils.process_allgather(np.int32(step))
            if step == 503:
                tell(ready=step)
            if stop.agreed():
                tell(stopped=step, name=stop.name)
                return
    tell(stopped=None)


def alone() -> None:
    """Steps of its own speed until this or another process is told to stop."""
    with StopSignal() as stop:
        tell(ready=0)
        for step in itertools.count():
            if stop:
                tell(stopped=step > 0, name=stop.name)
                return


def setup() -> None:
    """Things that fail in one process only; what each process sees of it."""
    index = jax.process_index()

    def fail(who: int, error: Exception) -> str:
        if index == who:
            raise error
        return "done"

    def lock() -> None:
        with locked(_WORKDIR.value):
            tell(held=True)

    attempts = (
        lambda: tell(value=distributed.everywhere(lambda: f"of {index}")),
        lambda: distributed.everywhere(lambda: fail(1, LcmError("no such file"))),
        lambda: distributed.everywhere(lambda: fail(0, TypeError("a bug"))),
        lambda: distributed.same("the seed", "a = 1\nb = 2" if index else "a = 1\nb = 3"),
        lock,
    )
    for attempt in attempts:
        try:
            attempt()
        except (LcmError, TypeError) as error:
            tell(error=str(error))
    distributed.everywhere(lambda: fail(1, LcmError("the end")))


def crash() -> None:
    """The second process fails by itself while the first waits for it."""
    from jax.experimental import multihost_utils

    multihost_utils.process_allgather(np.int32(0))
    tell(ready=0)
    if jax.process_index() == 1:
        raise RuntimeError("a bug in one process")
    multihost_utils.process_allgather(np.int32(1))


def main(argv: list[str]) -> int:
    del argv
    work = {"join": join, "train": train, "alone": alone, "setup": setup, "crash": crash}[_DO.value]
    return distributed.exit_code(work, **distributed.from_flags())


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
