"""What a run reports: metrics.jsonl, boards, sample grids and progress; and the alarms that stop it.

metrics.jsonl is the source of truth. It has one JSON object per logged step:

    {"step": 20, "loss": 0.031, "grad_norm": 0.8, ..., "images_per_second": 31.5, "images": 640, "seconds": 22.1}

loss, grad_norm, param_norm, update_norm, ema_distance, learning_rate
                      of this step, as the step function returns them
loss_bin_0 ..         mean loss of the examples since the previous line, by their position on the solver grid: the first
                      bin is nearest to the data; bins without an example are left out
time_step, time_data, time_checkpoint, time_evaluation
                      seconds since the previous line by cause: the time that the program spent on data, checkpoints and
                      evaluation while no step was running; the rest is the time of the steps
data_wait             time_data / (time_step + time_data)
images_per_second     over time_step + time_data
mfu                   model FLOPs of the steps / (peak FLOP/s * (time_step + time_data)), if the peak is known
memory, memory_peak   bytes in use on the fullest device of this process, if the backend reports them
goodput               share of the whole run's wall time spent on steps that count, see `Goodput`
images, seconds       images since the beginning of the run; seconds since the beginning of the process

Compile time is only in a line for the very first step of a process. Steps are counted from 1. A thread fetches the
numbers of each step when it has finished; they are checked and written up to `LAG` steps later, so that only `settle()`
waits for the step in progress.

events.jsonl records every attempt at the run; a restart never shortens it:

    {"event": "start", "time": 1790000000.0, "step": 0}                       an attempt begins after `step` steps
    {"event": "compiled", "time": ..., "step": 1}                             its first step has finished
    {"event": "steps", "time": ..., "from": 1, "step": 10, "seconds": 2.5}    steps 2 .. 10 computed for 2.5 s
    {"event": "saved", "time": ..., "step": 500}                              a checkpoint is on disk
    {"event": "stop", "time": ..., "step": 500}                               the attempt ends in good order

Times are seconds since 1970. A killed attempt ends with its last event; the time between attempts does not count.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from tqdm import tqdm

from lcm_jax import files, foreign, typed
from lcm_jax.errors import LcmError
from lcm_jax.runtime import boards, waiting

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
BAD_BATCH_FILE = "bad_batch.json"
LAG = 2  # steps whose numbers may be outstanding when the next step is dispatched
PAUSES = ("data", "checkpoint", "evaluation")  # what a program does between steps
HORIZON = 100  # losses in the running mean that spikes are measured against
WARMUP = 20  # losses before the first alarm
_REPAIR = "repair or remove the line"
_COUNT, _SECONDS = Annotated[int, typed.Range(0, 1e18)], Annotated[float, typed.Range(0, 1e18)]
_EVENT = {"event": str, "step": _COUNT, "time": _SECONDS}  # and of the event "steps":
_STEPS_EVENT = {"from": _COUNT, "seconds": _SECONDS}
LINE_SECONDS = 10  # between lines of progress if stderr is not a terminal


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What `Telemetry` needs to know about a run.

    Attributes:
        total_steps: length of the run.
        batch_size: images per step over all hosts.
        start_step: steps done by earlier attempts.
        began: `time.time()` when the program began, for the goodput; default: now.
        flops_per_step: model FLOPs of a global batch, recomputation not counted; None: unknown.
        peak_flops: FLOP/s of all devices together; None: unknown.
        keys_of: step -> (shard, key) of the records in its global batch, for bad_batch.json.
        config: shown on Weights & Biases.
    """

    total_steps: int
    batch_size: int
    start_step: int = 0
    began: float | None = None
    flops_per_step: float | None = None
    peak_flops: float | None = None
    keys_of: Callable[[int], Sequence[tuple[str, str]]] | None = None
    config: Mapping[str, Any] | None = None


class Telemetry(contextlib.AbstractContextManager):
    """Measures one process of a run; a context manager. Only process 0 writes, every process checks.

    Args:
        workdir: existing folder. Lines of its metrics.jsonl beyond `run.start_step` move to metrics.cut.jsonl.
        run: the run.
        every: steps between logged ones; the last step is always logged.
        spike: stop at a loss of more than this many times its running mean; 0: never.
        wandb: project on Weights & Biases; "": none.

    Raises:
        LcmError: a damaged line in metrics.jsonl or events.jsonl.
    """

    def __init__(
        self, workdir: str | Path, run: RunInfo, *, every: int = 10, spike: float = 0.0, wandb: str = ""
    ) -> None:
        self.workdir, self.run, self.every = Path(workdir), run, every
        # (step, its future numbers and `time.monotonic()` when they are ready, the pauses before it).
        self._pending: collections.deque[tuple[int, futures.Future, list]] = collections.deque()
        self._pauses: list[tuple[str, float, float]] = []  # (kind, begin, end)
        self._since_means: list[Mapping[str, float]] = []
        self._began = self._done = time.monotonic()
        self._epoch = time.time() - self._began  # monotonic time + this: seconds since 1970
        self._last_step = self._saved_step = run.start_step
        self._begin_interval()
        self._bins = np.zeros((2, 1))
        metrics, writes = self.workdir / METRICS_FILE, jax.process_index() == 0
        records = cut_jsonl(metrics, run.start_step) if writes else read_jsonl(metrics)
        with foreign.reading(metrics, "the metrics of a run", _REPAIR):
            losses = [record["loss"] for record in records if record["step"] <= run.start_step]
            self._spikes = SpikeDetector(spike, losses[-HORIZON:])
        self._file = None
        if writes:
            self._progress = Progress(run.total_steps, run.start_step, "steps", every=math.inf)
            events = self.workdir / EVENTS_FILE
            cut_jsonl(events)
            self._goodput = Goodput(read_events(self.workdir))
            self._file, self._events = metrics, events
            self._add_event("start", run.began or time.time(), run.start_step)
            self._boards = boards.start(self.workdir, run.start_step, wandb, run.config, waiting.say)
        self._to_fetch: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon, so that a step that hangs cannot keep the process alive.
        threading.Thread(target=_fetch, args=(self._to_fetch,), name="metrics", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the numbers of a step that was dispatched.

        Args:
            step: its number.
            metrics: scalars, on the device or not, with "loss" among them; and "loss_bins" {"sum", "count"} [bins].

        Raises:
            LcmError: a loss or gradient norm that is not finite, or a spike of the loss, LAG or more steps ago; in any
                step so far if this is the last one.
        """
        result: futures.Future = futures.Future()
        self._to_fetch.put((metrics, result))
        self._pending.append((step, result, self._pauses))
        self._pauses = []
        while len(self._pending) > (0 if step >= self.run.total_steps else LAG):
            self._settle_one()

    def settle(self) -> None:
        """Waits for the numbers of all steps so far and checks them. Call it before a checkpoint is saved."""
        while self._pending:
            self._settle_one()

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Context of what the program does between steps. `kind`: one of PAUSES."""
        assert kind in PAUSES, kind
        begin = time.monotonic()
        yield
        self._pauses.append((kind, begin, time.monotonic()))

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Context of waiting for the next batch."""
        return self.pause("data")

    def means(self) -> dict[str, float]:
        """Mean of each number over the steps settled since the last call; {} if there are none."""
        steps, self._since_means = self._since_means, []
        return {name: float(np.mean([values[name] for values in steps])) for name in (steps[0] if steps else ())}

    def images(self, step: int, grid: np.ndarray) -> Path | None:
        """Writes an image [h w 3] uint8 to samples/<step>.png and the boards; returns the file's path on process 0."""
        if self._file is None:
            return None
        from PIL import Image

        grid = np.asarray(grid, np.uint8)
        path = self.workdir / "samples" / f"{step:08d}.png"
        with files.new_file(path) as partial:
            Image.fromarray(grid).save(partial, "PNG")
        for board in self._boards:
            board.image(step, "samples", grid)
        return path

    def saved(self, step: int | None) -> None:
        """Records once in events.jsonl that the checkpoint of `step` is on disk: a later start knows if it is lost."""
        if self._file and step not in (None, self._saved_step):
            self._saved_step = step
            self._add_event("saved", time.time(), step)

    def message(self, text: str) -> None:
        """Prints a line on stderr, on process 0."""
        if self._file:
            waiting.say(text)

    def close(self) -> None:
        """Closes the boards. Steps that are not settled are not written."""
        self._to_fetch.put(None)
        if self._file:
            if self._last_step > self._interval_step:  # trained, though no line was due
                self._add_steps()
            self._add_event("stop", time.time(), self._last_step)
            self._file = None
            boards.close(self._boards)
            self._progress.bar.close()

    def _settle_one(self) -> None:
        """Waits for the oldest outstanding step, checks its numbers, and writes what is due."""
        step, result, pauses = self._pending.popleft()
        waiting.wait(
            lambda seconds: futures.wait([result], seconds).done, lambda: f"the numbers of step {step} from the devices"
        )
        values, done = result.result()
        bins = values.pop("loss_bins", None)
        values = {name: float(value) for name, value in values.items()}
        self._check(step, values)
        self._since_means.append(values)
        for kind, begin, end in pauses:
            self._paused[kind] += max(0.0, end - max(begin, self._done))  # until _done the previous step was running
        if bins is not None:
            self._bins = self._bins + np.stack([bins["sum"], bins["count"]])
        self._done, self._last_step = done, step
        first = step == self.run.start_step + 1
        logged = step % self.every == 0 or step >= self.run.total_steps
        if self._file:
            self._progress.move(1)
            if first:
                self._add_event("compiled", done + self._epoch, step)
            elif logged:
                self._add_steps()
            if logged:
                self._write(self._record(values))
        if first or logged:
            self._begin_interval()
        if logged:
            self._bins = np.zeros((2, 1))

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        checked = {"loss": values["loss"], "gradient norm": values.get("grad_norm", 0.0)}
        bad = [f"{name} of step {step} is {value}" for name, value in checked.items() if not math.isfinite(value)]
        reason = bad[0] if bad else self._spikes.check(step, values["loss"])
        if not reason:
            return
        advice = (
            "metrics.jsonl shows where it began. A lower train.learning_rate needs another workdir, which can start "
            "from an export of the last checkpoint (--config.model.student=EXPORT)"
        )
        if self.run.keys_of:
            path = self.workdir / BAD_BATCH_FILE
            if self._file:
                records = [{"shard": shard, "key": key} for shard, key in self.run.keys_of(step)]
                content = {"step": step, "reason": reason, "records": records}
                files.write_atomic(path, json.dumps(content, indent=1) + "\n")
            advice += f"; {path} lists the records of the step"
        raise LcmError(f"{reason}; training stopped and saved no checkpoint of it. {advice}")

    def _begin_interval(self) -> None:
        """Times are summed from here: the end of the last logged step, or of the first step, which compiles."""
        self._interval_step, self._interval_time = self._last_step, self._done
        self._paused = dict.fromkeys(PAUSES, 0.0)

    def _computing(self) -> float:
        """Seconds that steps took in this interval."""
        return self._done - self._interval_time - sum(self._paused.values())

    def _add_steps(self) -> None:
        interval = {"from": self._interval_step, "seconds": round(self._computing(), 4)}
        self._add_event("steps", self._done + self._epoch, self._last_step, **interval)

    def _add_event(self, event: str, when: float, step: int, **values: Any) -> None:
        record = {"event": event, "time": round(when, 3), "step": step, **values}
        files.append(self._events, json.dumps(record) + "\n")
        self._goodput.add(record)

    def _record(self, values: Mapping[str, float]) -> dict[str, float]:
        """The line of metrics.jsonl for the last step, see the module."""
        run, steps, computing = self.run, self._last_step - self._interval_step, self._computing()
        training = max(computing + self._paused["data"], 1e-9)
        record = {"step": self._last_step, **values}
        record |= {f"loss_bin_{i}": float(total / count) for i, (total, count) in enumerate(self._bins.T) if count}
        record["images_per_second"] = round(steps * run.batch_size / training, 3)
        record["data_wait"] = round(self._paused["data"] / training, 4)
        record["time_step"] = round(computing, 4)
        record |= {f"time_{kind}": round(seconds, 4) for kind, seconds in self._paused.items()}
        if run.flops_per_step and run.peak_flops:
            record["mfu"] = round(run.flops_per_step / run.peak_flops * steps / training, 4)
        record |= device_memory(jax.local_devices())
        record["goodput"] = round(self._goodput.share, 4)
        record["images"] = self._last_step * run.batch_size
        record["seconds"] = round(self._done - self._began, 3)
        return record

    def _write(self, record: dict[str, float]) -> None:
        line = json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()})
        files.append(self._file, line + "\n")
        for board in self._boards:
            board.scalars(record)
        text = f"loss {record['loss']:.5f}, {record['images_per_second']:.1f} images/s"
        self._progress.report(f"step {record['step']}/{self.run.total_steps}: {text}", text)


def _fetch(steps: queue.SimpleQueue) -> None:
    """Work of the thread that brings the numbers of one step after another to the host; None ends it."""
    for metrics, result in iter(steps.get, None):
        try:
            result.set_result((jax.device_get(metrics), time.monotonic()))
        except BaseException as error:  # the program's thread raises it
            result.set_exception(error)


def device_memory(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Bytes in use, now and at the peak, on the fullest of the devices; {} if the backend does not report them."""
    found = [stats for device in devices if (stats := device.memory_stats())]
    names = {"memory": "bytes_in_use", "memory_peak": "peak_bytes_in_use"}
    return {name: max(stats[key] for stats in found) for name, key in names.items() if found and key in found[0]}


class SpikeDetector:
    """Detects a loss of more than `factor` times the mean of the losses before it.

    The mean after n losses is m_n = m_(n-1) + (loss_n - m_(n-1)) / min(n, HORIZON): the plain mean of the first ones,
    then one whose weights fall by exp(-1 / HORIZON) per loss. Nothing is a spike before n = WARMUP.

    Args:
        factor: 0: nothing is a spike.
        before: losses of a run that resumes.
    """

    def __init__(self, factor: float, before: Iterable[float] = ()) -> None:
        self.factor, self.mean, self.count = factor, 0.0, 0
        for loss in before:
            self._add(loss)

    def check(self, step: int, loss: float) -> str | None:
        """A description if `loss` is a spike; otherwise None, and the loss enters the mean."""
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


class Goodput:
    """The share of a run's wall time that went into steps that count, summed over its events.

    Steps that a later attempt trains again, because it resumed from an older checkpoint, do not count. The rest of the
    time went into loading, compiling, such steps, and waiting for data, checkpoints and evaluation.

    Attributes:
        wall: seconds from the start of each attempt to its last event.
        steps: seconds in which steps that count were computed.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.wall = self.steps = 0.0
        self._ranges: list[tuple[int, int, float]] = []  # (from, to, seconds), ascending
        self._time = 0.0  # of the last event
        for event in events:
            self.add(event)

    @property
    def share(self) -> float:
        return min(1.0, self.steps / self.wall) if self.wall else 0.0  # the clock may have been set back

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next event."""
        if event["event"] == "start":
            self._go_back(event["step"])
        else:
            self.wall += max(0.0, event["time"] - self._time)  # the clock may have been set back
        self._time = event["time"]
        if event["event"] == "steps":
            self._ranges.append((event["from"], event["step"], event["seconds"]))
            self.steps += event["seconds"]

    def _go_back(self, step: int) -> None:
        while self._ranges and self._ranges[-1][1] > step:
            first, last, seconds = self._ranges.pop()
            kept = seconds * max(0, step - first) / (last - first)
            self.steps -= seconds - kept
            if step > first:
                self._ranges.append((first, step, kept))


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The objects of a workdir's metrics.jsonl, see `read_jsonl`."""
    return read_jsonl(Path(workdir) / METRICS_FILE)


def read_events(workdir: str | Path) -> list[dict[str, Any]]:
    """The events in a workdir's events.jsonl, see `read_jsonl`.

    Raises:
        LcmError: as there; also if an event lacks what `Goodput` reads, or has another type there.
    """
    path = Path(workdir) / EVENTS_FILE
    events = read_jsonl(path)
    with foreign.reading(path, "the events of a run", _REPAIR):
        for event in events:
            for name, kind in _EVENT.items() | (_STEPS_EVENT.items() if event.get("event") == "steps" else ()):
                typed.checked(name, event.get(name), kind)
            if event["event"] == "steps" and event["from"] >= event["step"]:
                raise LcmError(f"steps from {event['from']} to {event['step']}")
    return events


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file, one per line; [] if there is no file. A last line that a crash cut off is left out.

    Raises:
        LcmError: another line is not a JSON object with an integer "step".
    """
    return [record for _, record in _parse_jsonl(Path(path)) if record is not None]


def cut_jsonl(path: str | Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Moves lines beyond `last_step` and an incomplete last line to NAME.cut.jsonl; returns the objects that stay.

    They are appended there first and then removed in one atomic replacement, so that no line is lost.
    """
    path = Path(path)
    kept, cut = [], []
    for line, record in _parse_jsonl(path):
        (kept if record is not None and record["step"] <= last_step else cut).append((line + b"\n", record))
    if cut:
        files.append(path.with_suffix(".cut.jsonl"), b"".join(line for line, _ in cut), synced=True)
    text = b"".join(line for line, _ in kept)
    if path.exists() and text != path.read_bytes():
        files.write_atomic(path, text)
    return [record for _, record in kept]


def _parse_jsonl(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(line, its object) of each line; the object is None if the last line is incomplete."""
    data = path.read_bytes() if path.exists() else b""
    lines, found = data.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = foreign.json_object(line, path)
            if type(record.get("step")) is not int:
                raise LcmError(f"{path} has no step")
        except LcmError:
            if number < len(lines) or data.endswith(b"\n"):
                raise LcmError(
                    f"{path} line {number} is not a JSON object with a step; repair or remove that line"
                ) from None
            record = None
        found.append((line, record))
    return found


class Progress(contextlib.AbstractContextManager):
    """Progress of a long job on stderr: a bar on a terminal, otherwise plain lines; a context manager.

    Args:
        total: how many things there are to do.
        done: how many of them were done before.
        unit: what they are, for example "rows".
        every: seconds between the plain lines of `move`.
    """

    def __init__(self, total: int, done: int, unit: str, every: float = LINE_SECONDS) -> None:
        self.total, self.done, self.unit, self.every = total, done, unit, every
        self.bar = tqdm(total=total, initial=done, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, disable=None)
        self._start: tuple[int, float] | None = None  # (done, time) after the first ones, which compile
        self._reported = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def move(self, count: int) -> None:
        """Counts `count` more as done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self._start is None:
            self._start = self.done, now
        elif self.bar.disable and now - self._reported > self.every:
            rate = (self.done - self._start[0]) / (now - self._start[1])
            self.report(f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s", "")

    def report(self, line: str, note: str) -> None:
        """Prints `line` and the time left, or shows `note` beside a terminal's bar, which has the time left itself."""
        if not self.bar.disable:
            self.bar.set_postfix_str(note, refresh=False)
            return
        self._reported = time.monotonic()
        done, begun = self._start
        left = (self._reported - begun) * (self.total - self.done) / max(1, self.done - done)
        waiting.say(f"{line}, {tqdm.format_interval(left)} left")
