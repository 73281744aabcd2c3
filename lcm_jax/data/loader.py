"""Examples -> batches on the device, in the order of `order.py`; the position in the data is one integer, the step.

Batch i is a function of (seed, i) alone. So nothing has to be saved, a resumed run reads what it would have read, and
each host takes its rows of the same global batch. Grain reads ahead, in threads or in processes; one more thread puts
finished batches on the device. A record that cannot be used is replaced by another one, counted and reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import grain
import jax
import numpy as np
from absl import flags

from lcm_jax import files
from lcm_jax.data.order import ExampleIndex, Order, draws_at
from lcm_jax.data.records import BadRecord, BadRecordError
from lcm_jax.data.rows import Examples
from lcm_jax.errors import LcmError
from lcm_jax.runtime import waiting

THREADS = min(8, os.cpu_count() or 1)  # batches made at the same time, if no processes make them
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE = 3.0  # seconds that readers get to end by themselves
MAX_STEPS = 2**40  # length of the endless stream, as grain sees it
MAX_IN_A_ROW = 100  # consecutive bad records after which something else must be wrong
MIN_READ = 10_000  # the share of bad records is taken of at least so many (but of no more than there are)
_STATES = {  # letters of /proc/PID/stat
    "R": "running",
    "S": "waiting for something, as a pipe or a file server",
    "D": "waiting for a disk or a file server",
    "T": "stopped by a signal; kill -CONT lets it run again",
    "t": "stopped by a debugger",
    "Z": "ended",
}

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random access to this process's rows of the batches from step `start` on: what grain reads ahead.

    An item is a batch and the bad records among its examples, each of which was replaced by the next usable example of
    its group. `rows` are this process's positions in a global batch.
    """

    examples: tuple[Examples, ...]
    order: Order
    start: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return MAX_STEPS

    def __getitem__(self, number: int) -> tuple[dict[str, np.ndarray], tuple[BadRecord, ...]]:
        step, bad = self.start + number, []
        batch, first = self.order.batch(step), step * self.order.batch_size
        try:
            return stacked([self._row(batch[row], first + row, bad) for row in self.rows]), tuple(bad)
        except Exception as error:
            if _picklable(error):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    def _row(self, index: ExampleIndex, position: int, bad: list[BadRecord]) -> dict[str, np.ndarray]:
        examples, size = self.examples[index.stream], self.order.streams[index.stream][index.group]
        tries = min(size, MAX_IN_A_ROW)
        for i in range(tries):
            rank = (index.rank + i) % size
            try:
                return examples.row(index.group, rank, draws_at(self.order.seed, position))
            except BadRecordError as error:
                bad.append(BadRecord(*examples.where(index.group, rank), str(error)))
        raise LcmError(f"none of {tries} consecutive records can be used; the last one: {bad[-1]}")


def _picklable(error: Exception) -> bool:
    """Whether an error reaches the process that trains. Otherwise it would be lost, and waited for endlessly.

    A StopIteration would end the batches of one worker, and of no other.
    """
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), Exception) and not isinstance(error, StopIteration)
    except Exception:
        return False


def stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows -> a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class BadRecordLog:
    """Counts the records that could not be used, reports each once, and stops the run if there are too many.

    Those that indexing left out count against all records; those found by reading count against the records read so
    far. So a large set that is bad throughout stops early, and a small one exactly at its share.

    Args:
        max_bad_fraction: share of the records that may be bad.
        report: called with each bad record the first time it is met.
    """

    def __init__(self, max_bad_fraction: float, report: Callable[[BadRecord], Any] = lambda record: None) -> None:
        self.max_bad_fraction, self._report = max_bad_fraction, report
        self._reported: set[BadRecord] = set()
        self.records = self._kept = self._left_out = self._read = 0

    def indexed(self, bad: Sequence[BadRecord], records: int, kept: int) -> None:
        """Adds what indexing all sources left out, the records it found, and how many of those the filters kept.

        Raises:
          LcmError: above the share.
        """
        self._report_new(bad)
        self._left_out, self.records, self._kept = len(self._reported), records, kept
        if self._left_out > self._allowed():
            self._stop(self._left_out, self._left_out + records, bad[-1])

    def add(self, bad: Sequence[BadRecord], read: int) -> None:
        """Adds the bad ones among `read` records. Raises LcmError above the share."""
        self._report_new(bad)
        self._read += read
        found, seen = len(self._reported) - self._left_out, min(max(self._read, MIN_READ), self._kept)
        if bad and found * self.records > (self._allowed() - self._left_out) * seen:
            self._stop(found, min(self._read, self._kept), bad[-1])

    def _allowed(self) -> float:
        return self.max_bad_fraction * (self._left_out + self.records)

    def _report_new(self, bad: Sequence[BadRecord]) -> None:
        for record in bad:
            if record not in self._reported:
                self._reported.add(record)
                self._report(record)

    def _stop(self, bad: int, records: int, last: BadRecord) -> None:
        raise LcmError(
            f"{bad} of {records} records could not be used, the last one {last}; fix the data or raise "
            f"max_bad_fraction (now {self.max_bad_fraction})"
        )


class BadRecordFile:
    """Lists bad records in WORKDIR/bad_records.jsonl: a line {"shard", "key", "reason"} for each, once.

    The first LOUD of a process are also printed. Processes other than 0 write bad_records.<process>.jsonl.
    """

    LOUD = 20

    def __init__(self, workdir: str | Path, stream: TextIO | None = None) -> None:
        index = jax.process_index()
        self.path = Path(workdir) / (f"bad_records.{index}.jsonl" if index else "bad_records.jsonl")
        self.stream, self.count = stream or sys.stderr, 0
        self._listed = set(self.path.read_text(errors="replace").split("\n")) if self.path.exists() else set()

    def __call__(self, record: BadRecord) -> None:
        self.count += 1
        if self.count <= self.LOUD:
            rest = f" (more are listed in {self.path} only)" if self.count == self.LOUD else ""
            print(f"unusable record: {record}{rest}", file=self.stream, flush=True)
        line = json.dumps(dataclasses.asdict(record))
        if line not in self._listed:
            self._listed.add(line)
            files.append(self.path, line + "\n")


def _begin_worker(folder: str, index: int, count: int) -> None:
    """Runs first in each worker: ignores SIGNALS (see `_signals_blocked`), and writes its pid to `folder`/`index`.

    If the process that trains is killed outright, its workers end too, instead of waiting for it endlessly.
    """
    del count
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # only messages need it
        Path(folder, str(index)).write_text(str(os.getpid()))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that this thread starts inside the block do not receive SIGNALS, from their first moment on.

    Ctrl-C and a scheduler's SIGTERM reach all processes; the one that trains ends its workers after it has saved.
    """
    multiprocessing.resource_tracker.ensure_running()  # starting it unblocks these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class WorkerEnded(LcmError):
    """A process that reads data has ended, with exit code `code`; -9: by signal 9."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Workers:
    """The processes that read for one `read_ahead`: which is which, their state, and their end.

    Args:
        count: how many there are; 0: threads of this process read.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="lcm_jax-") if count else None  # of `_begin_worker`
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._processes: dict[int, Any] = {}
        self._indices: dict[int, int] = {}

    def options(self) -> dict[str, Any]:
        """Arguments of grain's `mp_prefetch`."""
        several = grain.MultiprocessingOptions(num_workers=self.count, per_worker_buffer_size=2)
        return {"options": several, "worker_init_fn": functools.partial(_begin_worker, self._folder.name)}

    def check(self) -> None:
        """Raises WorkerEnded if one of them has ended: the data are endless, so none ends by itself."""
        for pid, process in self._seen().items():
            if process.exitcode is not None and (pid in self.indices() or len(self.indices()) < self.count):
                raise WorkerEnded(self._ended(pid, process.exitcode), process.exitcode)

    def describe(self, number: int) -> str:
        """Who makes batch `number`, and what that process is doing."""
        if not self.count:
            return f"{THREADS} threads of this process read"
        index = number % self.count  # grain takes one batch from each worker in turn
        pid = next((pid for pid, worker in self.indices().items() if worker == index), None)
        if pid is None:
            return f"worker {index} of {self.count} makes it and has not begun yet"
        return f"worker {index} of {self.count} makes it (pid {pid}, {_state(pid)})"

    def resume(self) -> None:
        """Lets stopped processes run, so that they can end in order."""
        for process in self._seen().values():
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Ends those that have not ended."""
        for process in self._seen().values():
            process.kill()  # they ignore SIGTERM, and a stopped process would not receive it

    def close(self) -> None:
        if self._folder:
            self._folder.cleanup()

    def indices(self) -> dict[int, int]:
        """pid -> index of the workers that have begun."""
        if len(self._indices) < self.count:
            for path in Path(self._folder.name).glob("*"):
                with contextlib.suppress(OSError, ValueError):  # it is being written
                    self._indices[int(path.read_text())] = int(path.name)
        return self._indices

    def _seen(self) -> dict[int, Any]:
        """pid -> process, of all that were ever seen alive."""
        if self.count:
            found = {process.pid: process for process in multiprocessing.active_children()}
            self._processes |= {pid: process for pid, process in found.items() if pid not in self._others}
        return self._processes

    def _ended(self, pid: int, code: int) -> str:
        index = self.indices().get(pid)
        name = f"a worker of {self.count}" if index is None else f"worker {index} of {self.count}"
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if -code == signal.SIGBUS:
            hint = "shared memory may be full: enlarge /dev/shm or lower workers"
        elif -code == signal.SIGKILL:
            hint = "memory may have run out: lower workers or batch_size, or provide more memory"
        else:
            hint = "see its messages above; with workers=0 this process reads"
        return f"{name} (pid {pid}), which read data, {how}; {hint}. The same command resumes the run"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _state(pid: int) -> str:
    """What a process is doing, in words."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "state unknown"
    return _STATES.get(letter, f"state {letter}")


def read_ahead(
    batches: Batches, workers: int | Workers = 0
) -> Iterator[tuple[dict[str, np.ndarray], tuple[BadRecord, ...]]]:
    """The batches in order, read by grain: in `workers` processes, or in threads of this one if 0."""
    if not flags.FLAGS.is_parsed():  # grain reads flags when it starts processes; notebooks and scripts parse none
        flags.FLAGS.mark_as_parsed()
    watched = workers if isinstance(workers, Workers) else Workers(workers)
    threads = 1 if watched.count else THREADS
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    ahead = grain.MapDataset.source(batches).to_iter_dataset(options)
    if watched.count:
        ahead = ahead.mp_prefetch(**watched.options())
    iterator = iter(ahead)
    try:
        with _signals_blocked() if watched.count else contextlib.nullcontext():
            first = next(iterator)  # starts the threads that start the workers
        yield first
        yield from iterator
    finally:
        iterator.close()
        if watched is not workers:
            watched.close()


class Prefetched:
    """An iterator of `put(batch)`, made ahead by one thread, with at most `depth` of them ready.

    An error in `batches` or `put` is raised in place of the batch. The thread ends with the iterator: when `batches`
    ends, on `close()`, or when the iterator is garbage. A thread that hangs is abandoned after CLOSE seconds.

    Args:
        batches: closed by the thread.
        put: puts a batch on the device.
        depth: batches that are kept ready.
        take: (queue, number of the batch) -> the queue's next item: how to wait for it.
        make: number -> a batch, for the method `make`.
        workers: that the thread may wait for; they are ended with the iterator.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        put: Callable[[Batch], Any] = jax.device_put,
        depth: int = 2,
        *,
        take: Callable[[queue.Queue, int], Any] = lambda ready, number: ready.get(),
        make: Callable[[int], Batch] | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stop, self._number, self._over = threading.Event(), 0, False
        self._put, self._take, self._make, self._workers = put, take, make, workers
        self._thread = threading.Thread(
            target=_prefetch, args=(batches, put, self._ready, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        kind, value = self._take(self._ready, self._number)
        if kind == "batch":
            self._number += 1
            return value
        self._over = True
        raise value if kind == "error" else StopIteration

    def make(self, number: int) -> Any:
        """Batch `number` (the first is 0) made by this process, even if those that read ahead hang or have ended."""
        return self._put(self._make(number))

    def close(self) -> None:
        self._over = True
        self._stop.set()
        if self._workers:
            self._workers.resume()
        self._thread.join(CLOSE)
        if self._workers:
            if self._thread.is_alive():
                self._workers.kill()
                self._thread.join(CLOSE)
            self._workers.close()

    def __del__(self) -> None:
        self._stop.set()


def _prefetch(batches: Iterable[Batch], put: Callable[[Batch], Any], ready: queue.Queue, stop: threading.Event) -> None:
    """The thread of `Prefetched`. It does not refer to that object, which may become garbage."""

    def offer(item: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        try:
            for batch in batches:
                offer(("batch", put(batch)))
                if stop.is_set():
                    return
            offer(("end", None))
        finally:
            getattr(batches, "close", lambda: None)()
    except BaseException as error:  # raised by `__next__`
        offer(("error", error))


def batches(
    examples: Sequence[Examples],
    order: Order,
    start_step: int = 0,
    *,
    bad_records: BadRecordLog | None = None,
    put: Callable[[Batch], Any] = jax.device_put,
    workers: int = 0,
    depth: int = 2,
    rows: Sequence[int] | None = None,
    stop: Callable[[], Any] = lambda: False,
) -> Prefetched:
    """Endless batches on the device from `start_step` on: the training loop's data. Close it (`contextlib.closing`).

    Args:
        examples: of each of the order's streams.
        order: of the global batches.
        start_step: first step.
        bad_records: counts bad records; None: the first one is an error.
        put: puts this process's rows on the device: `functools.partial(mesh.put_batch, m)` on a mesh.
        workers: processes that read and decode; 0: threads of this one.
        depth: batches that are kept ready on the device.
        rows: positions in a global batch of the rows that this process reads (`mesh.process_rows`); None: all.
        stop: whether to stop, asked while waiting for a batch.

    Raises LcmError for bad arguments, here and not with the first batch. `next` raises `waiting.Stopped` on a stop,
    LcmError if a worker has ended.
    """
    if tuple(tuple(e.groups) for e in examples) != order.streams or start_step < 0:
        raise LcmError(
            f"examples in groups {[e.groups for e in examples]} from step {start_step} do not fit an order "
            f"of {order.streams}"
        )
    log = bad_records or BadRecordLog(0.0)
    if not log.records:
        count = sum(map(sum, order.streams))
        log.indexed((), count, count)
    mine = tuple(range(order.batch_size) if rows is None else rows)
    source, watched = Batches(tuple(examples), order, start_step, mine), Workers(workers)

    def on_host() -> Iterator[Batch]:
        with contextlib.closing(read_ahead(source, watched)) as read:
            for batch, bad in read:
                log.add(bad, len(mine))
                yield batch

    def take(ready: queue.Queue, number: int) -> tuple[str, Any]:
        def what() -> str:
            return (
                f"rows {mine[0]} to {mine[-1]} of the batch of step {start_step + number + 1}; "
                f"{watched.describe(number)}"
            )

        try:
            return waiting.next_item(ready, what, stop=stop, check=watched.check)
        except WorkerEnded as ended:
            with contextlib.suppress(queue.Empty):
                while ended.code >= 0:  # it has sent its error before it ended
                    kind, value = ready.get(timeout=CLOSE)
                    if kind == "error":
                        return kind, value
            raise

    return Prefetched(on_host(), put, depth, take=take, make=lambda number: source[number][0], workers=watched)
