"""What a run tells: metrics.jsonl, TensorBoard events, sample grids, a progress line; and the stop on NaN or Inf.

metrics.jsonl is the source of truth, one JSON object per logged step:

    {"step": 20, "loss": 0.031, "grad_norm": 0.8, ..., "images_per_second": 31.5, "images": 640, "seconds": 22.1}

`images_per_second` is over the steps since the line before, from one finished step to another; compiling counts only in
a line for the very first step of a process. `data_wait` is the share of that time that the program waited for data.
`images` counts from the run's beginning, `seconds` from the process's.

Steps are counted by how many are done: after the first one, `step` is 1. Numbers stay on the device for `LAG` steps so
that the host never waits for the step in progress; a logged step and `settle()` wait.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from lcm_jax.data.records import Fault
from lcm_jax.errors import LcmError
from lcm_jax.runtime.workdir import write_atomic

METRICS_FILE = "metrics.jsonl"
LAG = 2  # steps whose numbers may still be under way when the next one is handed in


def check_finite(step: int, loss: float, grad_norm: float | None = None) -> None:
    """Raises LcmError if the loss or the gradient's norm of `step` is NaN or infinite."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            raise LcmError(f"{name} of step {step} is {float(value)}; training stopped, no checkpoint was made of it. "
                           "Lower train.learning_rate, and see metrics.jsonl for where it began")


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Objects of metrics.jsonl in order; a last line that was cut off by a crash is left out."""
    path = Path(workdir) / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise LcmError(f"{path} line {number} is not JSON; repair or remove that line") from None
    return records


def keep_until(workdir: str | Path, step: int) -> None:
    """Drops the lines of metrics.jsonl beyond `step`, and a half line at its end, in one atomic replacement."""
    path = Path(workdir) / METRICS_FILE
    if path.exists():
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if text != path.read_text():
            write_atomic(path, text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Steps, loss, images per second and time left: a bar on a terminal, else a plain line per report."""

    def __init__(self, total: int, start: int, stream: TextIO) -> None:
        self.total, self.stream, self.bar = total, stream, None
        self.begin, self.begin_time = start, time.monotonic()
        if stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, file=stream, unit="step", dynamic_ncols=True,
                            bar_format="{n_fmt}/{total_fmt} steps |{bar}| {desc}")

    def compiled(self, step: int) -> None:
        """The first step of this process is done: the time left is estimated from here, without compiling."""
        self.begin, self.begin_time = step, time.monotonic()

    def report(self, step: int, loss: float, images_per_second: float) -> None:
        left = (time.monotonic() - self.begin_time) * (self.total - step) / max(1, step - self.begin)
        text = f"loss {loss:.5f}, {images_per_second:.1f} images/s, {_clock(left)} left"
        if self.bar is None:
            print(f"step {step}/{self.total}: {text}", file=self.stream, flush=True)
        else:
            self.bar.set_description_str(text, refresh=False)

    def move(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self.bar.write(text, file=self.stream)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Telemetry:
    """The measurements of one process of a run; a context manager.

    Args:
        workdir: existing folder.
        total_steps: length of the run.
        batch_size: images per step over all hosts.
        start_step: steps done before; what the files say of later ones is dropped.
        log_every: steps between logged ones; the last step is logged as well.
        stream: where progress goes; default stderr.

    Only process 0 writes; every process checks.
    """

    def __init__(self, workdir: str | Path, total_steps: int, *, batch_size: int, start_step: int = 0,
                 log_every: int = 10, stream: TextIO | None = None) -> None:
        self.workdir, self.total_steps, self.batch_size, self.log_every = (
            Path(workdir), total_steps, batch_size, log_every)
        self._pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._start_time = self._mark_time = time.monotonic()
        self._first_step, self._mark_step = start_step + 1, start_step
        self._waited = 0.0
        self._file = self._board = self._progress = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            keep_until(self.workdir, start_step)
            self._file = open(self.workdir / METRICS_FILE, "a")
            self._board = SummaryWriter(str(self.workdir / "tensorboard"),
                                        purge_step=start_step + 1 if start_step else None)
            self._progress = Progress(total_steps, start_step, stream or sys.stderr)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the numbers of a step: scalars, on the device or not; "loss" is among them, "grad_norm" is checked too.

        Raises LcmError if a loss or gradient norm is not finite: of this step if it is logged, else at most LAG later.
        """
        self._pending.append((step, metrics))
        if step == self._first_step or step % self.log_every == 0 or step >= self.total_steps:
            self.settle()
        while len(self._pending) > LAG:
            self._take(*self._pending.popleft())
        if self._progress:
            self._progress.move(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def settle(self) -> None:
        """Waits for the numbers of all steps so far and checks them. Call it before a checkpoint is saved."""
        while self._pending:
            self._take(*self._pending.popleft())

    def _take(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        check_finite(step, values["loss"], values.get("grad_norm"))
        now = time.monotonic()
        if step % self.log_every == 0 or step >= self.total_steps:
            passed = max(now - self._mark_time, 1e-9)
            rate = (step - self._mark_step) * self.batch_size / passed
            self._write({
                "step": step,
                **values,
                "images_per_second": round(rate, 3),
                "data_wait": round(self._waited / passed, 4),
                "images": step * self.batch_size,
                "seconds": round(now - self._start_time, 3),
            })
            self._mark(step, now)
        if step == self._first_step:
            self._mark(step, now)
            if self._progress:
                self._progress.compiled(step)

    def _mark(self, step: int, now: float) -> None:
        self._mark_step, self._mark_time, self._waited = step, now, 0.0

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, record["step"])
        self._progress.report(record["step"], record["loss"], record["images_per_second"])

    def images(self, step: int, grid: np.ndarray, name: str = "samples") -> Path | None:
        """Writes a picture [h w 3] uint8 to TensorBoard and to samples/<step>.png; the PNG's path (process 0)."""
        if self._board is None:
            return None
        from PIL import Image

        folder = self.workdir / name
        folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(grid, np.uint8)).save(buffer, "PNG")
        path = folder / f"{step:08d}.png"
        write_atomic(path, buffer.getvalue())
        self._board.add_image(name, np.asarray(grid, np.uint8), step, dataformats="HWC")
        self._restart_clock(step)
        return path

    def _restart_clock(self, step: int) -> None:
        """Time for samples is not training time; used when the numbers of `step` are settled."""
        if not self._pending and self._mark_step == step:
            self._mark(step, time.monotonic())

    def message(self, text: str) -> None:
        """A line for the reader of the terminal."""
        if self._progress:
            self._progress.message(text)

    def close(self) -> None:
        """Closes the files. Steps whose numbers were not settled are not written."""
        if self._file:
            self._progress.close()
            self._file.close()
            self._board.close()
            self._file = self._board = self._progress = None


class BadRecords:
    """The list of records that could not be used: bad_records.jsonl, a line {"shard", "key", "reason"} each, once.

    The first LOUD of a process are told on the terminal too. Processes other than 0 write bad_records.<process>.jsonl.
    """

    LOUD = 20

    def __init__(self, workdir: str | Path, stream: TextIO | None = None) -> None:
        index = jax.process_index()
        self.path = Path(workdir) / (f"bad_records.{index}.jsonl" if index else "bad_records.jsonl")
        self.stream, self.count = stream or sys.stderr, 0
        self._listed = set(self.path.read_text().splitlines()) if self.path.exists() else set()

    def __call__(self, fault: Fault) -> None:
        self.count += 1
        if self.count <= self.LOUD:
            rest = f" (more are listed in {self.path} only)" if self.count == self.LOUD else ""
            print(f"unusable record: {fault}{rest}", file=self.stream, flush=True)
        line = json.dumps({"shard": fault.shard, "key": fault.key, "reason": fault.reason})
        if line not in self._listed:
            self._listed.add(line)
            with open(self.path, "a") as file:
                file.write(line + "\n")
