"""TensorBoard and Weights & Biases (extra `wandb`), which show what metrics.jsonl records.

metrics.jsonl is the source of truth, a board is a convenience. So each board has its own thread behind a queue
(`QueuedBoard`): one that fails, hangs or is slow never stops or delays the training, and one line reports it.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from lcm_jax import foreign
from lcm_jax.errors import LcmError
from lcm_jax.files import write_atomic

WANDB_FILE = "wandb.json"
QUEUE_LIMITS = {"scalars": 1000, "image": 8}  # calls that may wait for a board; further ones are dropped
BLOCKED_SECONDS = 60.0  # duration of a call after which a board is reported
CLOSE_SECONDS = 10.0  # duration of a call after which a board is abandoned at the end of the run


class Board(Protocol):
    """Shows records and images."""

    def scalars(self, record: Mapping[str, float]) -> None:
        """Shows a record of metrics.jsonl, which includes its "step"."""
        ...

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows an image [h w 3] uint8."""
        ...

    def close(self) -> None: ...


class QueuedBoard:
    """A board in its own thread, which handles calls when it can.

    Args:
      name: of the board, for messages.
      make: creates the board, in the thread.
      report: prints a line; called at most once for a slow board and once for one that ends with an error.
    """

    def __init__(self, name: str, make: Callable[[], Board], report: Callable[[str], None]) -> None:
        self.name, self._make, self._report = name, make, report
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._room = {method: threading.Semaphore(limit) for method, limit in QUEUE_LIMITS.items()}
        self._call_began: float | None = None  # of the call in progress
        self._ended = self._reported = False
        self._thread = threading.Thread(target=self._work, name=f"board {name}", daemon=True)
        self._thread.start()

    def scalars(self, record: Mapping[str, float]) -> None:
        self._put("scalars", dict(record))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._put("image", step, name, image)

    def finish(self) -> None:
        """Announces that no call follows, without waiting."""
        self._queue.put(("close", ()))

    def join(self) -> None:
        """Waits for the board to finish, as long as none of its calls takes more than CLOSE_SECONDS."""
        begun = time.monotonic()
        while self._thread.is_alive() and not self._ended:
            since = self._call_began
            if time.monotonic() - (begun if since is None else since) > CLOSE_SECONDS:
                self._report_slow(f"did not end within {CLOSE_SECONDS:.0f} s")
                return
            self._thread.join(0.05)

    def _put(self, method: str, *values: Any) -> None:
        if self._ended:
            return
        since = self._call_began
        if since is not None and time.monotonic() - since > BLOCKED_SECONDS:
            self._report_slow(f"has not answered for {time.monotonic() - since:.0f} s")
        if self._room[method].acquire(blocking=False):
            self._queue.put((method, values))
        else:
            self._report_slow("is too slow")

    def _work(self) -> None:
        try:
            self._call_began = time.monotonic()
            board = self._make()
            method = ""
            while method != "close":
                self._call_began = None
                method, values = self._queue.get()
                self._call_began = time.monotonic()
                getattr(board, method)(*values)
                if method in self._room:
                    self._room[method].release()
        except BaseException as error:  # even a library's SystemExit ends only the board
            self._report(f"{self.name} ended ({_one_line(error)}); training continues, metrics.jsonl has all numbers")
            self._ended = True

    def _report_slow(self, what: str) -> None:
        if not self._reported and not self._ended:
            self._reported = True
            self._report(f"{self.name} {what}; it may miss numbers, metrics.jsonl has them all")


def _one_line(error: BaseException) -> str:
    """The first line of an error, whose text can have pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def start(
    workdir: Path, start_step: int, project: str, config: Mapping[str, Any] | None, report: Callable[[str], None]
) -> list[QueuedBoard]:
    """The boards of a run that resumes after `start_step`: TensorBoard, and Weights & Biases if `project` is not ""."""
    boards = []
    if project:
        boards.append(QueuedBoard("Weights & Biases", lambda: WeightsAndBiases(workdir, project, config), report))
    return [*boards, QueuedBoard("TensorBoard", lambda: TensorBoard(workdir, start_step), report)]


def close(boards: Sequence[QueuedBoard]) -> None:
    """Closes all boards, in bounded time."""
    for board in boards:
        board.finish()
    for board in boards:
        board.join()


class TensorBoard:
    """Event files in workdir/tensorboard; those of an earlier attempt are hidden beyond `start_step`."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._failures: list[BaseException] = []
        _catch_thread_errors(self._failures)
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "step":
                self._check()
                self._writer.add_scalar(name, value, record["step"])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._check()
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._check()
        self._writer.close()

    def _check(self) -> None:
        if self._failures:
            raise self._failures[0]


def _catch_thread_errors(failures: list[BaseException]) -> None:
    """Appends errors that end a thread of tensorboardX to `failures`, instead of a traceback and calls that hang."""
    previous_hook = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__.startswith("tensorboardX"):
            failures.append(args.exc_value or args.exc_type())
        else:
            previous_hook(args)

    threading.excepthook = hook


def import_wandb() -> ModuleType:
    """The package. Raises LcmError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise LcmError(
            "log.wandb needs the package wandb: pip install 'lcm_jax[wandb]'; or leave it out, TensorBoard "
            "has the same numbers"
        ) from None
    return wandb


class WeightsAndBiases:
    """A run on Weights & Biases, whose id is in wandb.json: a workdir that resumes continues the same run.

    Args:
      workdir: of the run.
      project: on Weights & Biases.
      config: nested dict, shown with the run.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any] | None = None) -> None:
        self._wandb, path = import_wandb(), workdir / WANDB_FILE
        saved = foreign.read_json(path, "delete it to begin another run there") if path.exists() else {}
        known = saved.get("id") if saved.get("project") == project else None
        if not isinstance(known, str | None):
            raise LcmError(f"{path} has an id that is no text; delete it to begin another run there")
        self._run = self._wandb.init(
            project=project,
            id=known,
            resume="allow",
            dir=str(workdir),
            name=workdir.name,
            config=None if config is None else dict(config),
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own counter refuses steps that are trained again
        if self._run.id != known:
            write_atomic(path, json.dumps({"project": project, "id": self._run.id}) + "\n")

    def scalars(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()
