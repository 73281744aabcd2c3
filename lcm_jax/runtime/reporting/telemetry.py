"""What a run tells: metrics.jsonl, TensorBoard and W&B from it, sample grids, a progress line; and when it must stop.

metrics.jsonl is the source of truth, one JSON object per logged step:

    {"step": 20, "loss": 0.031, "grad_norm": 0.8, ..., "images_per_second": 31.5, "images": 640, "seconds": 22.1}

loss, grad_norm, param_norm, update_norm, ema_distance, learning_rate
                      of this step, as the step gives them
loss_bin_0 ..         mean loss of the examples since the line before, by their place on the solver grid: the first bin
                      is nearest to the data; a bin without an example is left out
time_step, time_data, time_checkpoint, time_evaluation
                      seconds since the line before, from one finished step to another: what the program waited for the
                      others while no step was in progress; the rest is the steps'
data_wait             time_data / (time_step + time_data)
images_per_second     over time_step + time_data
mfu                   model FLOPs of the steps / (peak FLOP/s * (time_step + time_data)), where the peak is known
memory, memory_peak   bytes in use on this process's fullest device, where the backend tells it
goodput               share of the whole run's wall time that went into steps, see runtime/reporting/goodput.py
images, seconds       images since the run's beginning; seconds since the process's

Compiling counts only in a line for the very first step of a process. Steps are counted by how many are done: after the
first one, `step` is 1. A thread fetches the numbers of each step when it is finished; they are checked and written
`LAG` steps later, so that nothing waits for the step in progress but `settle()`.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from lcm_jax.data import waiting
from lcm_jax.files import write_atomic
from lcm_jax.runtime.reporting import alarms, boards, jsonl
from lcm_jax.runtime.reporting.goodput import Events
from lcm_jax.runtime.reporting.progress import TrainingProgress

METRICS_FILE = "metrics.jsonl"
LAG = 2  # steps whose numbers may still be under way when the next one is handed in
PAUSES = ("data", "checkpoint", "evaluation")  # what a program waits for between steps


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Objects of metrics.jsonl in order; a last line that was cut off by a crash is left out."""
    return jsonl.read(Path(workdir) / METRICS_FILE)


def keep_until(workdir: str | Path, step: int) -> list[dict[str, Any]]:
    """Moves the lines of metrics.jsonl beyond `step`, and a half line at its end, to metrics.cut.jsonl.

    Returns what is left.
    """
    return jsonl.keep(Path(workdir) / METRICS_FILE, lambda record: record["step"] <= step)


class _Step(NamedTuple):
    """A step whose numbers are under way: (values, when it was finished), and the pauses that came before it."""

    number: int
    result: Future
    pauses: list[tuple[str, float, float]]  # kind, begin, end


class Telemetry:
    """The measurements of one process of a run; a context manager.

    Args:
        workdir: existing folder.
        total_steps: length of the run.
        batch_size: images per step over all hosts.
        start_step: steps done before; what the files say of later ones is dropped.
        log_every: steps between logged ones; the last step is logged as well.
        stream: where progress goes; default stderr.
        flops_per_step: of the model, for the global batch, nothing counted twice; None: not known.
        peak_flops: FLOP/s of all devices together; None: not known.
        spike: stop where a loss is so many times its running mean (`alarms.Spikes`); 0: never.
        keys_of: step (the first is 1) -> (shard, key) of the records of its global batch, for bad_batch.json.
        wandb: project on Weights & Biases; "": none.
        config: of the run, shown there.
        began: `time.time()` when the program began, for the goodput; default now.

    Only process 0 writes; every process checks.

    Raises:
        LcmError: `wandb` without its package; a damaged line in a file of the workdir.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        *,
        batch_size: int,
        start_step: int = 0,
        log_every: int = 10,
        stream: TextIO | None = None,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        spike: float = 0.0,
        keys_of: Callable[[int], Sequence[tuple[str, str]]] | None = None,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        began: float | None = None,
    ) -> None:
        self.workdir, self.total_steps, self.batch_size, self.log_every = (
            Path(workdir),
            total_steps,
            batch_size,
            log_every,
        )
        self._writes, self._keys_of = jax.process_index() == 0, keys_of
        self._flops_rate = flops_per_step / peak_flops if flops_per_step and peak_flops else None
        self._pending: collections.deque[_Step] = collections.deque()
        self._pauses: list[tuple[str, float, float]] = []
        self._since_means: list[Mapping[str, float]] = []
        self._start_time = self._done = time.monotonic()
        self._wall_clock = time.time() - self._start_time  # to be added to the monotonic one
        self._first_step, self._last_step, self._saved = start_step + 1, start_step, start_step
        self._mark(start_step)
        self._bins = np.zeros((2, 1))
        records = keep_until(self.workdir, start_step) if self._writes else read_metrics(self.workdir)
        before = [record["loss"] for record in records if record["step"] <= start_step]
        self._spikes = alarms.Spikes(spike, before[-alarms.HORIZON :])
        self._file = None
        if self._writes:
            self._progress = TrainingProgress(total_steps, start_step, stream or sys.stderr)
            if wandb:
                boards.import_wandb()
            self._events = Events(self.workdir)
            self._events.add("start", began or time.time(), start_step)
            self._file = open(self.workdir / METRICS_FILE, "a")
            makers = {"Weights & Biases": lambda: boards.WeightsAndBiases(self.workdir, wandb, config)} if wandb else {}
            makers["TensorBoard"] = lambda: boards.TensorBoard(self.workdir, start_step)
            self._boards = [boards.Shown(name, make, self._progress.message) for name, make in makers.items()]
        self._fetched = _Fetched()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the numbers of a step: scalars, on the device or not, and "loss_bins" {"sum", "count"} [bins].

        "loss" is among them. Raises LcmError if a loss or gradient norm is not finite, or a loss a spike: of a step at
        most LAG before, of any step so far if this is the last one.
        """
        self._pending.append(_Step(step, self._fetched.submit(metrics), self._pauses))
        self._pauses = []
        while len(self._pending) > (0 if step >= self.total_steps else LAG):
            self._take(self._pending.popleft())
        if self._file:
            self._progress.move(step)

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Around what is done between steps: one of PAUSES. `settle()` before what needs the last step's state."""
        assert kind in PAUSES, kind
        begun = time.monotonic()
        yield
        self._pauses.append((kind, begun, time.monotonic()))

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around the wait for the next batch."""
        return self.pause("data")

    def settle(self) -> None:
        """Waits for the numbers of all steps so far and checks them. Call it before a checkpoint is saved."""
        while self._pending:
            self._take(self._pending.popleft())

    def means(self) -> dict[str, float]:
        """Mean of each number over the settled steps since the last call; {} where there are none."""
        steps, self._since_means = self._since_means, []
        return {name: float(np.mean([values[name] for values in steps])) for name in (steps[0] if steps else ())}

    def _take(self, step: _Step) -> None:
        waiting.wait(
            lambda seconds: futures.wait([step.result], seconds).done,
            lambda: f"step {step.number}, which the devices compute",
        )
        values, done = step.result.result()
        bins = values.pop("loss_bins", None)
        values = {name: float(value) for name, value in values.items()}
        self._check(step.number, values)
        self._since_means.append(values)
        for kind, begin, end in step.pauses:
            self._spent[kind] += max(0.0, end - max(begin, self._done))  # before, the step before was in progress
        if bins is not None:
            self._bins = self._bins + np.stack([bins["sum"], bins["count"]])
        self._done, self._last_step = done, step.number
        logged = step.number % self.log_every == 0 or step.number >= self.total_steps
        if self._file:
            self._tell(step.number, values, logged)
        if logged or step.number == self._first_step:
            self._mark(step.number)
        if logged:
            self._bins = np.zeros((2, 1))

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        what = alarms.not_finite(step, values["loss"], values.get("grad_norm"))
        what = what or self._spikes.check(step, values["loss"])
        if what:
            keys = self._keys_of(step) if self._keys_of else None
            raise alarms.stop(self.workdir, step, what, keys, self._writes)

    def _mark(self, step: int) -> None:
        self._mark_step, self._mark_time, self._spent = step, self._done, dict.fromkeys(PAUSES, 0.0)

    def _computing(self) -> float:
        """Seconds since the mark that the steps took."""
        return self._done - self._mark_time - sum(self._spent.values())

    def _add_steps(self, step: int) -> None:
        """The event of the steps since the mark."""
        self._events.add(
            "steps",
            self._done + self._wall_clock,
            step,
            **{"from": self._mark_step, "seconds": round(self._computing(), 4)},
        )

    def _tell(self, step: int, values: Mapping[str, float], logged: bool) -> None:
        """Events, and a line if this step has one."""
        steps = step - self._mark_step
        computing = self._computing()
        if step == self._first_step:
            self._events.add("compiled", self._done + self._wall_clock, step)
            self._progress.compiled(step)
        elif logged:
            self._add_steps(step)
        if not logged:
            return
        training = max(computing + self._spent["data"], 1e-9)
        self._write(
            {
                "step": step,
                **values,
                **{f"loss_bin_{i}": float(total / count) for i, (total, count) in enumerate(self._bins.T) if count},
                "images_per_second": round(steps * self.batch_size / training, 3),
                "data_wait": round(self._spent["data"] / training, 4),
                "time_step": round(computing, 4),
                **{f"time_{kind}": round(seconds, 4) for kind, seconds in self._spent.items()},
                **({"mfu": round(self._flops_rate * steps / training, 4)} if self._flops_rate else {}),
                **device_memory(jax.local_devices()),
                "goodput": round(self._events.goodput.share, 4),
                "images": step * self.batch_size,
                "seconds": round(self._done - self._start_time, 3),
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")
        self._file.flush()
        for board in self._boards:
            board.scalars(record)
        self._progress.report(record["step"], record["loss"], record["images_per_second"])

    def images(self, step: int, grid: np.ndarray, name: str = "samples") -> Path | None:
        """Writes a picture [h w 3] uint8 to samples/<step>.png and the boards; the PNG's path (process 0)."""
        if self._file is None:
            return None
        from PIL import Image

        folder, grid = self.workdir / name, np.asarray(grid, np.uint8)
        folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(grid).save(buffer, "PNG")
        path = folder / f"{step:08d}.png"
        write_atomic(path, buffer.getvalue())
        for board in self._boards:
            board.picture(step, name, grid)
        return path

    def saved(self, step: int | None) -> None:
        """Notes in events.jsonl, once, that the checkpoint of `step` is on disk, so that a later start misses it."""
        if self._file and step not in (None, self._saved):
            self._saved = step
            self._events.add("saved", time.time(), step)

    def message(self, text: str) -> None:
        """A line for the reader of the terminal."""
        if self._file:
            self._progress.message(text)

    def close(self) -> None:
        """Closes the files. Steps whose numbers were not settled are not written."""
        self._fetched.close()
        if self._file:
            if self._last_step > self._mark_step:  # no line was due, but they are trained
                self._add_steps(self._last_step)
            self._events.add("stop", time.time(), self._last_step)
            self._file.close()
            self._events.close()
            self._file = None
            boards.close(self._boards)
            self._progress.close()


class _Fetched:
    """Brings numbers to the host, those of one step after another, each with the moment they were finished."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, name="metrics", daemon=True).start()  # must not outlive a step that hangs

    def submit(self, metrics: Mapping[str, Any]) -> Future:
        """-> (values on the host, `time.monotonic()`); what failed in computing them is raised by its `result()`."""
        future: Future = Future()
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(metrics)):
            self._queue.put((dict(metrics), future))
        else:
            future.set_result((dict(metrics), time.monotonic()))
        return future

    def _work(self) -> None:
        for metrics, future in iter(self._queue.get, None):
            try:
                future.set_result((jax.device_get(metrics), time.monotonic()))
            except BaseException as error:  # carried to the reader, who raises it
                future.set_exception(error)

    def close(self) -> None:
        self._queue.put(None)


def device_memory(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Bytes in use, now and at the peak, on the fullest of the devices; empty where the backend tells none."""
    found = [stats for device in devices if (stats := device.memory_stats())]
    names = {"memory": "bytes_in_use", "memory_peak": "peak_bytes_in_use"}
    return {name: max(stats[key] for stats in found) for name, key in names.items() if found and key in found[0]}
