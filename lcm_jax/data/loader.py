"""Examples -> batches on the device, in the order of `order.py`; the position in the data is one integer, the step.

Batch i is a function of (seed, i) alone: nothing needs saving, a run that goes on reads what it would have read, and
hosts take their rows of the same global batch. Grain reads ahead, in threads or in processes; one more thread takes
finished batches to the device. A record that cannot be used is replaced by another, counted and told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from lcm_jax.data.order import Order, Place, draws_at
from lcm_jax.data.records import BadRecord, Fault
from lcm_jax.errors import LcmError

THREADS = min(8, os.cpu_count() or 1)  # batches in the making at a time, where no processes make them
SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
        rows = [self._row(places[row], step * self.order.batch_size + row, faults) for row in self.rows]
        return stacked(rows), tuple(faults)

    def _row(self, place: Place, position: int, faults: list[Fault]) -> dict[str, np.ndarray]:
        examples, size = self.examples[place.stream], self.order.streams[place.stream][place.group]
        for step in range(min(size, MAX_IN_A_ROW)):
            rank = (place.rank + step) % size
            try:
                return examples.row(place.group, rank, draws_at(self.order.seed, position))
            except BadRecord as error:
                faults.append(Fault(*examples.where(place.group, rank), str(error)))
        raise LcmError(f"none of {min(size, MAX_IN_A_ROW)} records in a row can be used; the last one: {faults[-1]}")


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
        raise LcmError(f"{bad} of {records} records could not be used, the last one {last}; mend the data, or allow "
                       f"more than --config.data.max_bad_fraction={self.share}")


def _begin_worker(index: int, count: int) -> None:
    """Signals are not for workers (`_held_back`); one that came while this worker started is dropped here.

    If the process that trains is killed outright, its workers end too, instead of waiting for it for ever.
    """
    del index, count
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


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


def read_ahead(batches: Batches, workers: int = 0) -> Iterator[tuple[dict[str, np.ndarray], tuple[Fault, ...]]]:
    """The batches in order, read by grain: in `workers` processes, or in threads of this one if 0."""
    if not flags.FLAGS.is_parsed():  # grain reads flags to start processes; a notebook or a script has parsed none
        flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else THREADS
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    ahead = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        several = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        ahead = ahead.mp_prefetch(several, worker_init_fn=_begin_worker)
    iterator = iter(ahead)
    try:
        with _held_back() if workers else contextlib.nullcontext():
            first = next(iterator)  # starts threads that start the workers
        yield first
        yield from iterator
    finally:
        iterator.close()


def prefetched(batches: Iterator[Batch], put: Callable[[Batch], Any] = jax.device_put, depth: int = 2) -> Iterator[Any]:
    """`put` of each batch, made ahead by one thread, at most `depth` in waiting.

    An error in `batches` or `put` is raised where the batch would have come. The thread ends with the iterator: when
    `batches` ends, on `.close()`, or when it is garbage.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                offer(("batch", put(batch)))
                if stop.is_set():
                    return
            offer(("end", None))
        except BaseException as error:  # carried to the reader, who raises it
            offer(("error", error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()


def batches(examples: Sequence[Examples], order: Order, start_step: int = 0, *, faults: Faults | None = None,
            put: Callable[[Batch], Any] = jax.device_put, workers: int = 0, depth: int = 2,
            rows: Sequence[int] | None = None) -> Iterator[Any]:
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

    Bad arguments are refused here, not when the first batch is asked for.
    """
    if tuple(tuple(e.groups) for e in examples) != order.streams or start_step < 0:
        raise LcmError(f"examples in groups {[e.groups for e in examples]} from step {start_step} do not fit an order "
                       f"of {order.streams}")
    faults = faults or Faults(0.0, lambda fault: None)
    if not faults.records:
        count = sum(map(sum, order.streams))
        faults.indexed((), count, count)
    mine = tuple(range(order.batch_size) if rows is None else rows)

    def on_host() -> Iterator[Batch]:
        read = read_ahead(Batches(tuple(examples), order, start_step, mine), workers)
        with contextlib.closing(read):
            for batch, found in read:
                faults.add(found, len(mine))
                yield batch

    return prefetched(on_host(), put, depth)
