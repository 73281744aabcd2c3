"""Examples -> batches on the device, in the order of `order.py`; the position in the data is one integer, the step.

Batch i is a function of (seed, i) alone: nothing needs saving, a run that goes on reads what it would have read, and
hosts take their rows of the same global batch. Grain reads ahead, in threads or in processes; one more thread takes
finished batches to the device. A record that cannot be used is replaced by another, counted and told.
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
from typing import Any, Protocol, TextIO

import grain
import jax
import numpy as np
from absl import flags

from lcm_jax.data.order import Order, Place, draws_at
from lcm_jax.data.records import BadRecord, Fault
from lcm_jax.errors import LcmError
from lcm_jax.runtime import waiting

THREADS = min(8, os.cpu_count() or 1)  # batches in the making at a time, where no processes make them
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE = 3.0  # seconds that who reads ahead gets to end by itself
_STATES = {  # letters of /proc/PID/stat
    "R": "running",
    "S": "waiting for something, as a pipe or a file server",
    "D": "waiting for a disk or a file server",
    "T": "stopped by a signal; kill -CONT lets it run again",
    "t": "stopped by a debugger",
    "Z": "ended",
}
MAX_STEPS = 2**40  # length of a stream that has no end, for grain
MAX_IN_A_ROW = 100  # bad records: then it is no matter of single ones
MIN_READ = 10_000  # the share of bad records is taken of no fewer (but of no more than there are)

Batch = Mapping[str, Any]


class Examples(Protocol):
    """Rows of training data, by random access. They lie in groups: one, or one for each aspect bucket.

    Rows of a group have one shape. Examples are pickled to worker processes.
    """

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of examples in each group."""
        ...

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one example; what is random about them comes from `draws`. Raises BadRecord."""
        ...

    def where(self, group: int, rank: int) -> tuple[str, str]:
        """(shard, key) of an example, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random access to this process's rows of the batches from `start` on: what grain reads ahead.

    An example that cannot be used is replaced by the next of its group that can; both are told in the faults.
    """

    examples: tuple[Examples, ...]
    order: Order
    start: int
    rows: Sequence[int]  # their positions in a global batch

    def __len__(self) -> int:
        return MAX_STEPS

    def __getitem__(self, number: int) -> tuple[dict[str, np.ndarray], tuple[Fault, ...]]:
        step, faults = self.start + number, []
        places = self.order.places(step)
        try:
            rows = [self._row(places[row], step * self.order.batch_size + row, faults) for row in self.rows]
            return stacked(rows), tuple(faults)
        except Exception as error:
            if _portable(error):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    def _row(self, place: Place, position: int, faults: list[Fault]) -> dict[str, np.ndarray]:
        examples, size = self.examples[place.stream], self.order.streams[place.stream][place.group]
        for step in range(min(size, MAX_IN_A_ROW)):
            rank = (place.rank + step) % size
            try:
                return examples.row(place.group, rank, draws_at(self.order.seed, position))
            except BadRecord as error:
                faults.append(Fault(*examples.where(place.group, rank), str(error)))
        raise LcmError(f"none of {min(size, MAX_IN_A_ROW)} records in a row can be used; the last one: {faults[-1]}")


def _portable(error: Exception) -> bool:
    """Whether it can leave a worker as it is; else it would be lost there, and waited for for ever.

    A StopIteration would end that worker's batches, and only its.
    """
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), Exception) and not isinstance(error, StopIteration)
    except Exception:
        return False


def stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows -> a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Faults:
    """Counts the records that could not be used, tells each once, and stops where they are too many.

    What indexing left out counts against all records; what reading finds, against as many as were read, so that a large
    set that is bad throughout stops early, and a small one exactly at its share.

    Args:
        share: of the records that may be bad.
        tell: called with each fault the first time it comes.
    """

    def __init__(self, share: float, tell: Callable[[Fault], None]) -> None:
        self.share, self.tell = share, tell
        self.told: set[Fault] = set()
        self.records = self.kept = self.left_out = self.read = 0

    def indexed(self, faults: Sequence[Fault], records: int, kept: int) -> None:
        """Takes what indexing all sources left out, the records it found, and how many of those the filters kept.

        Raises:
          LcmError: above the share.
        """
        self._tell(faults)
        self.left_out, self.records, self.kept = len(self.told), records, kept
        if self.left_out > self._allowed():
            self._stop(self.left_out, self.left_out + records, faults[-1])

    def add(self, faults: Sequence[Fault], read: int) -> None:
        """Takes what came of reading `read` records. Raises LcmError above the share."""
        self._tell(faults)
        self.read += read
        found, seen = len(self.told) - self.left_out, min(max(self.read, MIN_READ), self.kept)
        if faults and found * self.records > (self._allowed() - self.left_out) * seen:
            self._stop(found, min(self.read, self.kept), faults[-1])

    def _allowed(self) -> float:
        return self.share * (self.left_out + self.records)

    def _tell(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if fault not in self.told:
                self.told.add(fault)
                self.tell(fault)

    def _stop(self, bad: int, records: int, last: Fault) -> None:
        raise LcmError(
            f"{bad} of {records} records could not be used, the last one {last}; mend the data, or allow "
            f"more than --config.data.max_bad_fraction={self.share}"
        )


def _begin_worker(folder: str, index: int, count: int) -> None:
    """Signals are not for workers (`_held_back`); one that came while this worker started is dropped here.

    If the process that trains is killed outright, its workers end too, instead of waiting for it for ever. `folder`
    gets a file that says which process this worker is.
    """
    del count
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # only a message needs it
        Path(folder, str(index)).write_text(str(os.getpid()))


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Processes that this thread starts inside do not see SIGNALS, from their first moment on.

    Ctrl-C and a scheduler's SIGTERM reach all processes; the one that trains ends its workers when it has saved.
    """
    multiprocessing.resource_tracker.ensure_running()  # whoever starts it gets these signals back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class WorkerEnded(LcmError):
    """A process that reads data has ended, with this exit code; -9: by signal 9."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Workers:
    """The processes that read for one `read_ahead`: which is which, what became of them, and their end.

    Args:
        count: how many there are; 0: threads of this process read.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="lcm_jax-") if count else None  # what `_begin_worker` says
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._processes: dict[int, Any] = {}
        self._found: dict[int, int] = {}

    def options(self) -> dict[str, Any]:
        """Arguments of grain's `mp_prefetch`."""
        several = grain.MultiprocessingOptions(num_workers=self.count, per_worker_buffer_size=2)
        return {"options": several, "worker_init_fn": functools.partial(_begin_worker, self._folder.name)}

    def check(self) -> None:
        """Raises WorkerEnded if one of them has: the data have no end, so none ends by itself."""
        for pid, process in self._seen().items():
            if process.exitcode is not None and (pid in self._known() or len(self._known()) < self.count):
                raise WorkerEnded(self._ended(pid, process.exitcode), process.exitcode)

    def describe(self, number: int) -> str:
        """Who makes batch `number`, and what it does just now."""
        if not self.count:
            return f"{THREADS} threads of this process read"
        index = number % self.count  # grain takes batches from one worker after another
        pid = next((pid for pid, worker in self._known().items() if worker == index), None)
        if pid is None:
            return f"worker {index} of {self.count} makes it, which has not begun yet"
        return f"worker {index} of {self.count} makes it (pid {pid}, {_state(pid)})"

    def resume(self) -> None:
        """Lets those run that are stopped, so that they can end in order."""
        for process in self._seen().values():
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Ends those that have not ended."""
        for process in self._seen().values():
            process.kill()  # SIGTERM is not for them, nor does a stopped process hear of it

    def close(self) -> None:
        if self._folder:
            self._folder.cleanup()

    def _seen(self) -> dict[int, Any]:
        """pid -> process, of those that were ever seen alive."""
        if self.count:
            found = {process.pid: process for process in multiprocessing.active_children()}
            self._processes |= {pid: process for pid, process in found.items() if pid not in self._others}
        return self._processes

    def _known(self) -> dict[int, int]:
        """pid -> worker, of those that have begun."""
        if len(self._found) < self.count:
            for path in Path(self._folder.name).glob("*"):
                with contextlib.suppress(OSError, ValueError):  # being written
                    self._found[int(path.read_text())] = int(path.name)
        return self._found

    def _ended(self, pid: int, code: int) -> str:
        which = self._known().get(pid)
        name = f"a worker of {self.count}" if which is None else f"worker {which} of {self.count}"
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if -code == signal.SIGBUS:
            hint = "shared memory may be full: make /dev/shm larger, or lower --config.data.workers"
        elif -code == signal.SIGKILL:
            hint = "memory may have run out: lower --config.data.workers or --config.data.batch_size, or give it more"
        else:
            hint = "see what it said above; --config.data.workers=0 reads in this process"
        return f"{name} (pid {pid}), which read data, {how}; {hint}. The same command resumes the run"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _state(pid: int) -> str:
    """What a process does, in words, where the system tells it."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "its state is not known"
    return _STATES.get(letter, f"its state is {letter}")


def read_ahead(
    batches: Batches, workers: int | Workers = 0
) -> Iterator[tuple[dict[str, np.ndarray], tuple[Fault, ...]]]:
    """The batches in order, read by grain: in `workers` processes, or in threads of this one if 0."""
    if not flags.FLAGS.is_parsed():  # grain reads flags to start processes; a notebook or a script has parsed none
        flags.FLAGS.mark_as_parsed()
    watched = workers if isinstance(workers, Workers) else Workers(workers)
    threads = 1 if watched.count else THREADS
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    ahead = grain.MapDataset.source(batches).to_iter_dataset(options)
    if watched.count:
        ahead = ahead.mp_prefetch(**watched.options())
    iterator = iter(ahead)
    try:
        with _held_back() if watched.count else contextlib.nullcontext():
            first = next(iterator)  # starts threads that start the workers
        yield first
        yield from iterator
    finally:
        iterator.close()
        if watched is not workers:
            watched.close()


class Prefetched:
    """An iterator of `put` of each batch, made ahead by one thread, at most `depth` in waiting.

    An error in `batches` or `put` is raised where the batch would have come. The thread ends with the iterator: when
    `batches` ends, on `close()`, or when it is garbage. One that hangs is left to itself after CLOSE seconds.

    Args:
        batches: closed by the thread.
        put: takes a batch to the device.
        depth: batches in waiting.
        take: (queue, number of the batch) -> the queue's next item: how to wait for it.
        make: number -> a batch, see `make`.
        workers: that the thread may wait for; ended with the iterator.
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
        self._stop, self._taken, self._over = threading.Event(), 0, False
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
        kind, value = self._take(self._ready, self._taken)
        if kind == "batch":
            self._taken += 1
            return value
        self._over = True
        raise value if kind == "error" else StopIteration

    def make(self, number: int) -> Any:
        """Batch `number` (the first is 0) made here, whatever became of those who read ahead."""
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
    """The thread of `Prefetched`; it does not hold that object, which may become garbage."""

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
    except BaseException as error:  # carried to the reader, who raises it
        offer(("error", error))


def batches(
    examples: Sequence[Examples],
    order: Order,
    start_step: int = 0,
    *,
    faults: Faults | None = None,
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
        start_step: first step to be made.
        faults: what counts bad records; None: the first one is an error.
        put: takes this process's rows to the device: `functools.partial(mesh.put_batch, m)` on a mesh.
        workers: processes that read and decode; 0: threads of this one.
        depth: batches in waiting on the device.
        rows: positions in a global batch of the rows that this process reads (`mesh.process_rows`); None: all.
        stop: whether to stop, asked while a batch is waited for.

    Bad arguments are refused here, not when the first batch is asked for. `next` raises `waiting.Stopped` on a stop,
    LcmError if a worker has ended.
    """
    if tuple(tuple(e.groups) for e in examples) != order.streams or start_step < 0:
        raise LcmError(
            f"examples in groups {[e.groups for e in examples]} from step {start_step} do not fit an order "
            f"of {order.streams}"
        )
    faults = faults or Faults(0.0, lambda fault: None)
    if not faults.records:
        count = sum(map(sum, order.streams))
        faults.indexed((), count, count)
    mine = tuple(range(order.batch_size) if rows is None else rows)
    source, watched = Batches(tuple(examples), order, start_step, mine), Workers(workers)

    def on_host() -> Iterator[Batch]:
        with contextlib.closing(read_ahead(source, watched)) as read:
            for batch, found in read:
                faults.add(found, len(mine))
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
                while ended.code >= 0:  # it has said why before it ended
                    kind, value = ready.get(timeout=CLOSE)
                    if kind == "error":
                        return kind, value
            raise

    return Prefetched(on_host(), put, depth, take=take, make=lambda number: source[number][0], workers=watched)


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
