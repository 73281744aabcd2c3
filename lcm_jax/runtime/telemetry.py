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

When a run must stop: a loss that is NaN, infinite or far above its mean; and which records were in that batch.

What part of a run's time went into training: events.jsonl, which no restart shortens, and the sum of it.

    {"event": "start", "time": 1790000000.0, "step": 0}                       an attempt begins, `step` steps are done
    {"event": "compiled", "time": ..., "step": 1}                             its first step is done
    {"event": "steps", "time": ..., "from": 1, "step": 10, "seconds": 2.5}    steps 2 .. 10 took 2.5 s of computing
    {"event": "saved", "time": ..., "step": 500}                              a checkpoint is on disk
    {"event": "stop", "time": ..., "step": 500}                               it ends in order

Times are seconds since 1970. An attempt that was killed ends with its last event; the time between attempts does not
count. Steps that a later attempt does again, because it went on from an older checkpoint, are lost.

Files of one JSON object per line, each with its "step", which a crash may have cut off in the last one.

How far a long job is, and how long it will take: a bar on a terminal, else a line now and then.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from tqdm import tqdm

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.files import write_atomic
from lcm_jax.runtime import boards, waiting

METRICS_FILE = "metrics.jsonl"
LAG = 2  # steps whose numbers may still be under way when the next one is handed in
PAUSES = ("data", "checkpoint", "evaluation")  # what a program waits for between steps


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Objects of metrics.jsonl in order; a last line that was cut off by a crash is left out."""
    return read(Path(workdir) / METRICS_FILE)


def keep_until(workdir: str | Path, step: int) -> list[dict[str, Any]]:
    """Moves the lines of metrics.jsonl beyond `step`, and a half line at its end, to metrics.cut.jsonl.

    Returns what is left.
    """
    return keep(Path(workdir) / METRICS_FILE, lambda record: record["step"] <= step)


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
        self._spikes = Spikes(spike, before[-HORIZON:])
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
        what = not_finite(step, values["loss"], values.get("grad_norm"))
        what = what or self._spikes.check(step, values["loss"])
        if what:
            keys = self._keys_of(step) if self._keys_of else None
            raise stop(self.workdir, step, what, keys, self._writes)

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


BAD_BATCH_FILE = "bad_batch.json"
HORIZON = 100  # losses in the running mean
WARMUP = 20  # losses before the mean is one


def not_finite(step: int, loss: float, grad_norm: float | None = None) -> str | None:
    """What is wrong where the loss or the gradient's norm of `step` is NaN or infinite, else None."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            return f"{name} of step {step} is {float(value)}"
    return None


class Spikes:
    """Tells a loss that is more than `factor` times the mean of those before it.

    The mean after n losses is m_n = m_(n-1) + (loss_n - m_(n-1)) / min(n, HORIZON): of all of them at first, then with
    weights that fall by exp(-1 / HORIZON) per loss. Nothing is told before n = WARMUP.

    Args:
      factor: 0: never.
      before: losses that the mean begins with, of a run that goes on.
    """

    def __init__(self, factor: float, before: Iterable[float] = ()) -> None:
        self.factor, self.mean, self.count = factor, 0.0, 0
        for loss in before:
            self._add(loss)

    def check(self, step: int, loss: float) -> str | None:
        """What is wrong with this loss, else None, and it counts for the mean. Losses are finite."""
        if self.factor and self.count >= WARMUP and loss > self.factor * self.mean:
            return (
                f"loss of step {step} is {loss:.6g}, {loss / self.mean:.1f} times its running mean {self.mean:.6g} "
                f"(log.spike = {self.factor:g})"
            )
        self._add(loss)
        return None

    def _add(self, loss: float) -> None:
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, HORIZON)


def stop(workdir: Path, step: int, what: str, keys: Sequence[tuple[str, str]] | None, write: bool) -> LcmError:
    """The error that ends the run; with `write`, `keys`, (shard, key) of the step's records, go to bad_batch.json."""
    advice = "Lower train.learning_rate, and see metrics.jsonl for where it began"
    if keys is not None:
        path = workdir / BAD_BATCH_FILE
        if write:
            records = [{"shard": shard, "key": key} for shard, key in keys]
            write_atomic(path, json.dumps({"step": step, "reason": what, "records": records}, indent=1) + "\n")
        advice += f"; the step's records are listed in {path}"
    return LcmError(f"{what}; training stopped, no checkpoint was made of it. {advice}")


EVENTS_FILE = "events.jsonl"


class Goodput:
    """The sum of events, in seconds.

    Attributes:
      attempts: how many there were.
      wall: from each attempt's start to its end.
      steps: of `wall`, computing steps that count.
      redone: computing steps that were done again later.
      startup: from an attempt's start to the end of its first step: loading, compiling.

    What is left of `wall` went into waiting for data, checkpoints and evaluation.
    """

    def __init__(self) -> None:
        self.attempts, self.wall, self.redone, self.startup = 0, 0.0, 0.0, 0.0
        self._ranges: list[tuple[int, int, float]] = []  # (from, to, seconds), rising
        self._seconds = self._last = 0.0

    @property
    def steps(self) -> float:
        return self._seconds

    @property
    def share(self) -> float:
        """Of the wall time, what went into steps that count; 0 before there is any."""
        return self._seconds / self.wall if self.wall else 0.0

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next event."""
        if event["event"] == "start":
            self.attempts += 1
            self._go_back(event["step"])
            self._last = event["time"]
            return
        passed = max(0.0, event["time"] - self._last)
        self.wall += passed
        self._last = event["time"]
        if event["event"] == "compiled":
            self.startup += passed
        elif event["event"] == "steps":
            self._ranges.append((event["from"], event["step"], event["seconds"]))
            self._seconds += event["seconds"]

    def _go_back(self, step: int) -> None:
        while self._ranges and self._ranges[-1][1] > step:
            first, last, seconds = self._ranges.pop()
            kept = seconds * max(0, step - first) / (last - first)
            self.redone += seconds - kept
            self._seconds -= seconds - kept
            if step > first:
                self._ranges.append((first, step, kept))


def goodput(workdir: str | Path) -> Goodput:
    """The sum of a workdir's events. Raises LcmError where a line of the file is damaged."""
    total = Goodput()
    for event in read(Path(workdir) / EVENTS_FILE):
        total.add(event)
    return total


class Events:
    """Appends to a workdir's events and keeps their sum, `goodput`."""

    def __init__(self, workdir: str | Path) -> None:
        path = Path(workdir) / EVENTS_FILE
        keep(path)
        self.goodput = goodput(workdir)
        self._file = open(path, "a")

    def add(self, event: str, time: float, step: int, **values: Any) -> None:
        record = {"event": event, "time": round(time, 3), "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.goodput.add(record)

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The objects in order, none if there is no file; a last line that was cut off is left out.

    Raises:
      LcmError: another line is not JSON, or no object with a whole number "step".
    """
    return [record for _, record in _lines(Path(path)) if record is not None]


def keep(path: str | Path, wanted: Callable[[dict[str, Any]], bool] = lambda record: True) -> list[dict[str, Any]]:
    """Drops the other objects, and a half line at the end, in one atomic replacement; returns what is left.

    What is dropped is appended to NAME.cut.jsonl before.
    """
    path = Path(path)
    lines = _lines(path)
    kept = [(line, record) for line, record in lines if record is not None and wanted(record)]
    cut = [line for line, record in lines if record is None or not wanted(record)]
    if cut:
        with open(path.with_suffix(".cut.jsonl"), "ab") as file:
            file.write(b"".join(line + b"\n" for line in cut))
            files.sync(file)
    text = b"".join(line + b"\n" for line, _ in kept)
    if path.exists() and text != path.read_bytes():
        write_atomic(path, text)
    return [record for _, record in kept]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(line, its object); None for a last one that was cut off."""
    data = path.read_bytes() if path.exists() else b""
    lines, found = data.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError
        except (ValueError, RecursionError):
            if number < len(lines) or data.endswith(b"\n"):
                raise LcmError(
                    f"{path} line {number} is not a JSON object with a step; repair or remove that line"
                ) from None
            record = None
        found.append((line, record))
    return found


LINE_SECONDS = 10  # between lines where there is no terminal


class Progress:
    """Things done, per second, and time left, on stderr; a context manager.

    Args:
        total: how many there are.
        done: how many of them were done before.
        unit: what they are, as "rows".
    """

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.total, self.done, self.unit = total, done, unit
        self.bar = tqdm(total=total, initial=done, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, disable=None)
        self._begun: tuple[int, float] | None = None  # after the first ones, whose time is the compiler's
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def move(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self._begun is None:
            self._begun = self.done, now
        elif self.bar.disable and now - self._told > LINE_SECONDS:
            self._told = now
            rate = (self.done - self._begun[0]) / (now - self._begun[1])
            left = tqdm.format_interval((self.total - self.done) / rate)
            print(
                f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingProgress:
    """A training's steps, loss, images per second and time left: a bar on a terminal, else a plain line per report."""

    def __init__(self, total: int, start: int, stream: TextIO) -> None:
        self.total, self.stream, self.bar = total, stream, None
        self.begin, self.begin_time = start, time.monotonic()
        if stream.isatty():
            self.bar = tqdm(
                total=total,
                initial=start,
                file=stream,
                unit="step",
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} steps |{bar}| {desc}",
            )

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
