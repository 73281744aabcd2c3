"""Where the records of metrics.jsonl are shown as well: TensorBoard, and Weights & Biases (extra `wandb`).

metrics.jsonl is the truth, a board is a convenience: each lives in a thread of its own behind a queue (`Shown`). One
that fails, blocks or takes too little never stops or delays the training; one line says so.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.files import write_atomic

WANDB_FILE = "wandb.json"
WAITING = {"scalars": 1000, "picture": 8}  # what may wait for a board; more is left out
BLOCKED = 60.0  # seconds in one call after which a board counts as blocked
CLOSE = 10.0  # seconds that a board gets at the end since its call in progress began


class Board(Protocol):
    """Shows records and pictures."""

    def scalars(self, record: Mapping[str, float]) -> None:
        """Takes a record with its "step"."""
        ...

    def picture(self, step: int, name: str, grid: np.ndarray) -> None:
        """grid: [h w 3] uint8."""
        ...

    def close(self) -> None: ...


class Shown:
    """A board in a thread of its own, which takes what it is given when it can.

    Args:
      name: of the board, for messages.
      make: makes the board, in the thread.
      tell: takes a line for the reader of the terminal: what became of the board, each once.
    """

    def __init__(self, name: str, make: Callable[[], Board], tell: Callable[[str], None]) -> None:
        self.name, self._make, self._tell = name, make, tell
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting, self._lock = Counter(), threading.Lock()
        self._since: float | None = None  # when the call in progress began
        self._over = self._told = False
        self._thread = threading.Thread(target=self._work, name=f"board {name}", daemon=True)
        self._thread.start()

    def scalars(self, record: Mapping[str, float]) -> None:
        self._put("scalars", dict(record))

    def picture(self, step: int, name: str, grid: np.ndarray) -> None:
        self._put("picture", step, name, grid)

    def end(self) -> None:
        """Nothing more comes; `close` waits for what is under way."""
        self._queue.put(("close", ()))

    def close(self) -> None:
        """Waits for the board as long as its calls take less than CLOSE seconds each."""
        begun = time.monotonic()
        while self._thread.is_alive() and not self._over:
            since = self._since
            if time.monotonic() - (begun if since is None else since) > CLOSE:
                self._tell_once(f"did not end within {CLOSE:.0f} s")
                return
            self._thread.join(0.05)

    def _put(self, method: str, *values: Any) -> None:
        """Leaves out what the board cannot take in time."""
        if self._over:
            return
        since = self._since
        if since is not None and time.monotonic() - since > BLOCKED:
            self._tell_once(f"has not answered for {time.monotonic() - since:.0f} s")
        with self._lock:
            full = self._waiting[method] >= WAITING[method]
            self._waiting[method] += not full
        if full:
            self._tell_once("takes no more for now")
        else:
            self._queue.put((method, values))

    def _work(self) -> None:
        try:
            self._since = time.monotonic()
            board = self._make()
            while True:
                self._since = None
                method, values = self._queue.get()
                self._since = time.monotonic()
                getattr(board, method)(*values)
                if method == "close":
                    return
                with self._lock:
                    self._waiting[method] -= 1
        except BaseException as error:  # also a library's SystemExit: the board ends, nothing else does
            self._tell(f"{self.name} ended ({_short(error)}); the training continues, metrics.jsonl has all numbers")
            self._over = True

    def _tell_once(self, what: str) -> None:
        if not self._told and not self._over:
            self._told = True
            self._tell(f"{self.name} {what}; what it does not take is left out, metrics.jsonl has all numbers")


def close(boards: list[Shown]) -> None:
    """Ends all of them at once; in bounded time."""
    for board in boards:
        board.end()
    for board in boards:
        board.close()


def _short(error: BaseException) -> str:
    """An error of a library, which can have pages, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class TensorBoard:
    """Event files in workdir/tensorboard, from `start_step` on: what they say of later steps is hidden."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._failures: list[BaseException] = []
        _catch_thread_errors(self._failures)
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, record: Mapping[str, float]) -> None:
        """Takes a record with its "step"."""
        for name, value in record.items():
            if name != "step":
                self._check()
                self._writer.add_scalar(name, value, record["step"])

    def picture(self, step: int, name: str, grid: np.ndarray) -> None:
        """grid: [h w 3] uint8."""
        self._check()
        self._writer.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        self._check()
        self._writer.close()

    def _check(self) -> None:
        if self._failures:
            raise self._failures[0]


def _catch_thread_errors(failures: list[BaseException]) -> None:
    """What ends a thread of tensorboardX goes to `failures`: else it is a traceback, and the next calls hang."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__.startswith("tensorboardX"):
            failures.append(args.exc_value or args.exc_type())
        else:
            before(args)

    threading.excepthook = hook


def import_wandb() -> ModuleType:
    """Raises LcmError where the package is missing."""
    try:
        import wandb
    except ImportError:
        raise LcmError(
            "log.wandb needs the package wandb: pip install 'lcm_jax[wandb]'; or leave it out, TensorBoard "
            "has the same numbers"
        ) from None
    return wandb


class WeightsAndBiases:
    """A run of a project on Weights & Biases; a workdir that goes on continues it (its id is in wandb.json).

    Args:
      workdir: of the run.
      project: on Weights & Biases.
      config: nested dict, shown with the run.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any] | None = None) -> None:
        self._wandb, path = import_wandb(), workdir / WANDB_FILE
        saved = json.loads(path.read_text()) if path.exists() else {}
        known = saved.get("id") if saved.get("project") == project else None
        self._run = self._wandb.init(
            project=project,
            id=known,
            resume="allow",
            dir=str(workdir),
            name=workdir.name,
            config=None if config is None else dict(config),
        )
        self._run.define_metric("*", step_metric="step")  # its own count refuses steps that are done again
        if self._run.id != known:
            write_atomic(path, json.dumps({"project": project, "id": self._run.id}) + "\n")

    def scalars(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record))

    def picture(self, step: int, name: str, grid: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(grid)})

    def close(self) -> None:
        self._run.finish()
