"""Records -> batches; the position in the data is one integer, the step.

The stream of examples is epoch after epoch, each in an order of its own:

    position p = step * batch_size + row,   epoch e = p // N,   example = permutation[seed, e](p % N)

so batch i is a function of (seed, i) alone: nothing needs saving, a run that goes on reads what it would have read, and
hosts take their rows of the same global batch. The permutation is never stored: it is a Feistel network (a bijection of
[0, 4^m) made of hashes) walked along its cycles until it falls inside [0, N), the same on every platform and version.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lcm_jax.errors import LcmError

FEISTEL_ROUNDS = 6  # four suffice for a pseudo-random permutation if the hash is good; two more cost microseconds

Batch = Mapping[str, Any]


def _hash(x: np.ndarray) -> np.ndarray:
    """Bijective 64-bit mixer (splitmix64's finaliser); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(index: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """Image of each index in a pseudo-random permutation of [0, size).

    Args:
        index: [b] integers in [0, size).
        key: [b] uint64; equal keys, same permutation.
        size: number of elements, at least 1.

    Returns:
        [b] int64 in [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, bool)  # walk on where the value is not in [0, size) yet; every element walks once
    while outside.any():
        left, right = x >> half, x & mask
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_hash(right ^ _hash(key + np.uint64(r))) & mask)
        x = np.where(outside, (left << half) | right, x)
        outside &= x >= np.uint64(size)
    return x.astype(np.int64)


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Examples of the global batch of `step`: [batch_size] int64 in [0, num_examples).

    In each epoch of `num_examples` positions every example comes once; a batch may reach into the next epoch.
    """
    if num_examples < 1 or batch_size < 1 or step < 0:
        raise LcmError(f"no batch of {batch_size} at step {step} from {num_examples} examples; "
                       "sizes must be at least 1 and the step not negative")
    position = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch = (position // num_examples).astype(np.uint64)
    key = _hash(_hash(np.full(1, seed % 2**64, np.uint64)) + epoch)
    return permuted(position % num_examples, key, num_examples)


def _num_examples(source: Mapping[str, np.ndarray]) -> int:
    sizes = {name: len(array) for name, array in source.items()}
    if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise LcmError(f"arrays of a source must have one length, greater than 0; got {sizes}")
    return next(iter(sizes.values()))


def host_batches(source: Mapping[str, np.ndarray], seed: int, start_step: int, batch_size: int, *,
                 process_index: int = 0, process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from `start_step` on, as numpy arrays: this process's rows of each global batch.

    Args:
        source: name -> array [n ...]; memory-mapped arrays will do.
        seed: of the order.
        start_step: first step to be made.
        batch_size: rows of the global batch, a multiple of `process_count`.
    """
    if batch_size % process_count:
        raise LcmError(f"data.batch_size = {batch_size} does not split over {process_count} processes; "
                       "choose a multiple")
    num_examples, rows = _num_examples(source), batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    step = start_step
    while True:
        indices = batch_indices(seed, step, batch_size, num_examples)[mine]
        yield {name: np.asarray(array[indices]) for name, array in source.items()}
        step += 1


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


def batches(source: Mapping[str, np.ndarray], seed: int, start_step: int, batch_size: int, *,
            put: Callable[[Batch], Any] = jax.device_put, depth: int = 2,
            process_index: int = 0, process_count: int = 1) -> Iterator[Any]:
    """`host_batches`, prefetched to the device: the training loop's data. Close it (`contextlib.closing`) at the end.

    `put` takes this process's rows to the device: `functools.partial(mesh.put_batch, m)` on a mesh. Bad arguments are
    refused here, not when the first batch is asked for.
    """
    _num_examples(source)
    batch_indices(seed, start_step, batch_size, 1)
    on_host = host_batches(source, seed, start_step, batch_size, process_index=process_index,
                           process_count=process_count)
    return prefetched(on_host, put, depth)
