"""What all processes of a run must decide alike, the first one decides for them; and that they see the same folder."""

from __future__ import annotations

import itertools
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lcm_jax.errors import LcmError
from lcm_jax.runtime.processes import distributed

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
    mine = distributed.everywhere(lambda: json.dumps(decide()).encode() if first else b"", timeout=TIMEOUT)
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
        distributed.tell_failure(f"{key}/failed", distributed.said(error))
        distributed.ask_to_stop()


def given_up(key: str) -> str:
    """Which process has given up `key`, and why; "" where none has."""
    return distributed.first_failure(f"{key}/failed") if jax.process_count() > 1 else ""


def check_shared(folder: Path) -> None:
    """Makes `folder` on process 0. Raises LcmError on every process unless all of them see it."""
    sign = folder / decided_by_first(lambda: _leave_sign(folder))
    try:
        distributed.everywhere(lambda: _look_for(sign))
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
