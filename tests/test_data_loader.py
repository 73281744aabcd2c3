"""Batches: going on, processes and workers, bad records, prefetching."""

import contextlib
import dataclasses
import itertools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from lcm_jax.data import loader
from lcm_jax.data.examples import Arrays, CaptionDropout
from lcm_jax.data.order import Order, batch_indices
from lcm_jax.data.records import BadRecord, Fault
from lcm_jax.errors import LcmError

LATENTS = np.random.default_rng(0).normal(size=(37, 2, 2, 4)).astype(np.float32)
ARRAYS = Arrays(({"latents": LATENTS, "label": np.arange(37, dtype=np.int32)},))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Examples that tell their place and their first draw; those of `bad` cannot be used."""

    groups: tuple[int, ...]
    bad: frozenset = frozenset()

    def row(self, group, rank, draws):
        if (group, rank) in self.bad:
            raise BadRecord("truncated")
        return {"label": np.array([group, rank], np.int32), "draw": np.array(draws.random())}

    def where(self, group, rank):
        return "a.tar", f"{group}-{rank}"


def take(n, examples=ARRAYS, batch_size=6, seed=1, **kwargs):
    order = Order(seed, batch_size, (examples.groups,))
    with contextlib.closing(loader.batches((examples,), order, **kwargs)) as batches:
        return [jax.device_get(b) for b in itertools.islice(batches, n)]


def same(a, b):
    return all(x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x)
               for x, y in zip(a, b, strict=True))  # fmt: skip


def test_going_on_equals_never_stopping():
    whole, rest = take(20), take(8, start_step=12)
    assert same(whole[12:], rest) and not same(whole[:8], rest)
    for step, batch in enumerate(whole):  # the arrays of one example stay together
        np.testing.assert_array_equal(batch["label"], batch_indices(1, step, 6, 37))
        np.testing.assert_array_equal(batch["latents"], LATENTS[batch["label"]])


@pytest.mark.parametrize("groups", [(37,), (20, 9)])
def test_hosts_share_one_global_batch_with_its_draws(groups):
    examples = Drawn(groups, frozenset({(0, 3), (0, 4)}))
    allowed = {"faults": loader.Faults(0.1, lambda fault: None)}
    whole = take(9, examples, put=dict, **allowed)
    rows = [(0, 1), (3, 4), (2, 5)]  # as a pod's mesh may lie on its hosts
    parts = [take(9, examples, put=dict, rows=mine, **allowed) for mine in rows]
    back = np.argsort(np.concatenate(rows))
    joined = [
        {name: np.concatenate([batch[name] for batch in hosts])[back] for name in hosts[0]}
        for hosts in zip(*parts, strict=True)
    ]
    assert same(whole, joined)


def test_workers_and_threads_make_the_same_batches():
    examples = Drawn((37,))
    assert same(take(10, examples, start_step=3), take(10, examples, start_step=3, workers=2))


def test_a_bad_record_is_replaced_told_once_and_not_forgotten():
    told = []
    examples = Drawn((10,), frozenset({(0, 2), (0, 3)}))
    batches = take(6, examples, batch_size=5, faults=loader.Faults(0.2, told.append))
    for epoch in range(3):
        ranks = sorted(np.concatenate([b["label"][:, 1] for b in batches[2 * epoch : 2 * epoch + 2]]))
        assert ranks == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9], "the next good one stands in"
    assert set(told) == {Fault("a.tar", "0-2", "truncated"), Fault("a.tar", "0-3", "truncated")} and len(told) == 2


def test_too_many_bad_records_stop_the_run():
    examples = Drawn((100,), frozenset((0, rank) for rank in range(0, 100, 2)))
    with pytest.raises(LcmError, match=r"a\.tar: 0-\d+: truncated.*max_bad_fraction=0.01"):
        take(100, examples, faults=loader.Faults(0.01, lambda fault: None))
    with pytest.raises(LcmError, match="truncated"):
        take(5, examples)  # where nobody counts, the first one
    few = Drawn((1000,), frozenset((0, rank) for rank in range(11)))
    with pytest.raises(LcmError, match=r"11 of \d+ records"):  # of so few, exactly the share
        take(1000 // 6 + 1, few, faults=loader.Faults(0.01, lambda fault: None))
    take(1000 // 6 + 1, few, faults=loader.Faults(0.011, lambda fault: None))
    with pytest.raises(LcmError, match="none of 4 records in a row can be used"):
        take(1, Drawn((4,), frozenset((0, rank) for rank in range(4))), faults=loader.Faults(1.0, lambda fault: None))


def test_what_an_index_left_out_counts_too():
    faults, told = loader.Faults(0.01, lambda fault: told.append(fault)), []
    bad = [Fault("a.tar", str(number), "empty") for number in range(1200)]
    faults.indexed(bad[:900], 99_100, 99_100)
    faults.add(bad[900:909], 6)  # of at least MIN_READ, a tenth of a percent may still be bad
    with pytest.raises(LcmError, match="could not be used"):
        faults.add(bad[909:920], 6)
    with pytest.raises(LcmError, match="10 of 100 records"):
        loader.Faults(0.09, lambda fault: None).indexed(bad[:10], 90, 50)
    assert len(told) == 920


def test_examples_and_order_must_fit():
    with pytest.raises(LcmError, match="do not fit an order"):
        loader.batches((ARRAYS,), Order(0, 4, ((36,),)))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout(share):
    text = {"label": np.array(-1, np.int32)}
    batches = take(100, CaptionDropout(ARRAYS, text | {"not in the rows": np.zeros(3)}, share), batch_size=37)
    dropped = np.mean([b["label"] == -1 for b in batches])
    assert abs(dropped - share) <= 4 * np.sqrt(share * (1 - share) / 3700)
    assert set(batches[0]) == {"label", "latents"}


def test_errors_come_through():
    def broken():
        yield {"a": 1}
        raise OSError("tar is gone")

    ahead = loader.Prefetched(broken(), put=lambda b: b)
    assert next(ahead) == {"a": 1}
    with pytest.raises(OSError, match="tar is gone"):
        next(ahead)


def test_end_and_limit_of_prefetching():
    made = []
    ahead = loader.Prefetched((made.append(i) or i for i in range(100)), put=lambda b: b, depth=2)
    assert next(ahead) == 0
    threading.Event().wait(0.3)
    assert len(made) <= 4, "one taken, two waiting, one in hand"
    assert list(ahead) == list(range(1, 100))
    before = threading.active_count()
    ahead = loader.Prefetched(itertools.count(), put=lambda b: b)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


READER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from lcm_jax.data import loader
from lcm_jax.data.examples import Arrays
from lcm_jax.data.order import Order
if __name__ == "__main__":
    rows = Arrays(({"label": np.arange(8)},))
    for batch in loader.batches((rows,), Order(0, 4, (rows.groups,)), workers=2, put=dict):
        print("read", flush=True)
        sys.stdin.readline()
"""


def workers_of(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    return []


def interrupt(workers: list[psutil.Process]) -> None:
    for worker in workers:
        worker.send_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_leave_signals_to_the_process_that_trains_and_end_with_it(tmp_path, number):
    script = tmp_path / "reader.py"
    script.write_text(READER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parents[1])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    if number == signal.SIGINT:  # to the workers alone, while they start and when they read: nothing happens
        while len(workers := workers_of(process.pid)) < 2:
            time.sleep(0.01)
        interrupt(workers)
    assert process.stdout.readline() == b"read\n"
    if number == signal.SIGINT:
        interrupt(workers)
        for _ in range(5):
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"read\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


@pytest.mark.gpu
def test_batches_arrive_on_the_accelerator():
    with contextlib.closing(loader.batches((ARRAYS,), Order(1, 6, (ARRAYS.groups,)))) as batches:
        batch = next(batches)
    assert batch["latents"].devices() == {jax.devices()[0]} and jax.devices()[0].platform != "cpu"
    np.testing.assert_array_equal(batch["label"], batch_indices(1, 0, 6, 37))
