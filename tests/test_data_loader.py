"""Batches: resuming, processes and workers, bad records, prefetching."""

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
from training_processes import workers_of

from lcm_jax.data import encoding, loader, shapes
from lcm_jax.data.loader import BadRecordLog
from lcm_jax.data.order import Order, batch_indices, draws_at
from lcm_jax.data.records import BadRecord, BadRecordError, Record
from lcm_jax.data.rows import Arrays, CaptionDropout, FixedDraws, ImageRows, ImageTransform
from lcm_jax.errors import LcmError
from lcm_jax.runtime import waiting

LATENTS = np.random.default_rng(0).normal(size=(37, 2, 2, 4)).astype(np.float32)
ARRAYS = Arrays(({"latents": LATENTS, "label": np.arange(37, dtype=np.int32)},))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Examples that show their index and their first draw; those of `bad` cannot be used."""

    groups: tuple[int, ...]
    bad: frozenset = frozenset()

    def row(self, group, rank, draws):
        if (group, rank) in self.bad:
            raise BadRecordError("truncated")
        return {"label": np.array([group, rank], np.int32), "draw": np.array(draws.random())}

    def where(self, group, rank):
        return "a.tar", f"{group}-{rank}"


def take(n, examples=ARRAYS, batch_size=6, seed=1, **kwargs):
    order = Order(seed, batch_size, (examples.groups,))
    with contextlib.closing(loader.batches((examples,), order, **kwargs)) as batches:
        return [jax.device_get(b) for b in itertools.islice(batches, n)]


def same(a, b):
    return all(
        x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x) for x, y in zip(a, b, strict=True)
    )


def test_resumed_batches_are_those_of_an_endless_run():
    whole, rest = take(20), take(8, start_step=12)
    assert same(whole[12:], rest) and not same(whole[:8], rest)
    for step, batch in enumerate(whole):  # the arrays of one example stay together
        np.testing.assert_array_equal(batch["label"], batch_indices(1, step, 6, 37))
        np.testing.assert_array_equal(batch["latents"], LATENTS[batch["label"]])


@pytest.mark.parametrize("groups", [(37,), (20, 9)])
def test_hosts_share_one_global_batch_with_its_draws(groups):
    examples = Drawn(groups, frozenset({(0, 3), (0, 4)}))
    allowed = {"bad_records": BadRecordLog(0.1)}
    whole = take(9, examples, put=dict, **allowed)
    rows = [(0, 1), (3, 4), (2, 5)]  # as a pod's mesh may lie on its hosts
    parts = [take(9, examples, put=dict, rows=mine, **allowed) for mine in rows]
    back = np.argsort(np.concatenate(rows))
    joined = [
        {name: np.concatenate([batch[name] for batch in hosts])[back] for name in hosts[0]}
        for hosts in zip(*parts, strict=True)
    ]
    assert same(whole, joined)


@pytest.fixture
def impatient(monkeypatch, capsys):
    """(stop, lines): `stop()` is true as soon as a line says what is waited for, which comes early."""
    monkeypatch.setattr(waiting, "PATIENCE", 0.3)
    lines = []

    def stop():
        lines.append(capsys.readouterr().err)
        return "waiting" in lines[-1]

    return stop, lines


def test_workers_make_the_batches_of_threads_and_one_that_is_stopped_or_killed_is_named(impatient, monkeypatch):
    """In one loader, since processes take seconds to start."""
    examples, (stop, said) = Drawn((37,)), impatient
    monkeypatch.setattr(waiting, "PATIENCE", 60.0)
    order = Order(1, 6, (examples.groups,))
    with contextlib.closing(loader.batches((examples,), order, 3, put=dict, workers=2, stop=stop)) as batches:
        assert same(take(10, examples, start_step=3, put=dict), itertools.islice(batches, 10))
        processes = {worker: psutil.Process(pid) for pid, worker in batches._workers.indices().items()}
        processes[1].suspend()
        monkeypatch.setattr(waiting, "PATIENCE", 0.5)
        more = []
        with pytest.raises(waiting.Stopped):
            more.extend(batches)
        number, (line,) = 10 + len(more), said[-1].splitlines()
        assert f"rows 0 to 5 of the batch of step {number + 4}; worker 1 of 2" in line
        assert f"(pid {processes[1].pid}, stopped by a signal" in line
        assert same(take(1, examples, start_step=number + 3, put=dict), [batches.make(number)]), "read here"
        processes[1].kill()
        with pytest.raises(LcmError, match=rf"worker 1 of 2 \(pid {processes[1].pid}\), .* killed by SIGKILL; memory"):
            next(batches)
    psutil.wait_procs(processes.values(), timeout=60)
    assert not any(process.is_running() for process in processes.values())


@dataclasses.dataclass(frozen=True)
class Hanging(Drawn):
    """Examples that wait for an event when they are read, as for a file server."""

    event: threading.Event = dataclasses.field(default_factory=threading.Event)

    def row(self, group, rank, draws):
        self.event.wait()
        return super().row(group, rank, draws)


def test_a_stop_is_heard_while_threads_hang(impatient, monkeypatch):
    monkeypatch.setattr(loader, "CLOSE", 0.1)
    examples, (stop, said) = Hanging((37,)), impatient
    batches = loader.batches((examples,), Order(1, 6, (examples.groups,)), rows=(1, 2), put=dict, stop=stop)
    with pytest.raises(waiting.Stopped):
        next(batches)
    assert "rows 1 to 2 of the batch of step 1" in said[-1] and "threads of this process" in said[-1]
    batches.close()  # does not wait for them
    examples.event.set()
    assert batches.make(0).keys() == {"label", "draw"}


def test_rows_in_order_hear_a_stop_too(impatient):
    examples, (stop, said) = Hanging((300,)), impatient
    rows = encoding.in_order(examples, 0, 1, range(300), stop)
    with pytest.raises(waiting.Stopped):
        next(rows)
    assert "a.tar: 0-0, which is being read" in said[-1]
    examples.event.set()
    assert [rank for rank, _ in encoding.in_order(examples, 0, 1, range(300))] == [*range(300)]


class Process:
    def __init__(self, pid, exitcode=None):
        self.pid, self.exitcode = pid, exitcode


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, r"worker 0 of 2 \(pid 71\).* killed by SIGKILL; memory may have run out: lower workers or batch_size"),
        (-7, r"killed by SIGBUS; shared memory may be full"),
        (-11, r"killed by SIGSEGV; see its messages"),
        (0, r"ended with exit code 0; see its messages"),
        (3, r"ended with exit code 3; see its messages"),
    ],
)
def test_how_a_worker_ended(monkeypatch, code, words):
    other, mine = Process(5, -9), [Process(70), Process(71)]
    monkeypatch.setattr(loader.multiprocessing, "active_children", lambda: [other])
    workers = loader.Workers(2)
    monkeypatch.setattr(loader.multiprocessing, "active_children", lambda: [other, *mine])
    for index, process in enumerate(reversed(mine)):
        Path(workers._folder.name, str(index)).write_text(str(process.pid))
    workers.check()
    mine[1].exitcode = code
    monkeypatch.setattr(loader.multiprocessing, "active_children", lambda: [])
    with pytest.raises(LcmError, match=words) as ended:
        workers.check()
    assert "\n" not in str(ended.value)
    workers.close()


def test_an_error_that_cannot_be_pickled_is_raised_as_text():
    class Odd(Exception):
        def __init__(self):
            super().__init__("broken header")
            self.reader = threading.Lock()

    class Bad(Drawn):
        def row(self, group, rank, draws):
            raise Odd

    with pytest.raises(RuntimeError, match="Odd: broken header"):
        take(1, Bad((4,)))
    with pytest.raises(ZeroDivisionError):
        take(1, type("Zero", (Drawn,), {"row": lambda *_: 1 // 0})((4,)))


def test_a_bad_record_is_replaced_and_reported_once():
    reported = []
    examples = Drawn((10,), frozenset({(0, 2), (0, 3)}))
    batches = take(6, examples, batch_size=5, bad_records=BadRecordLog(0.2, reported.append))
    for epoch in range(3):
        ranks = sorted(np.concatenate([b["label"][:, 1] for b in batches[2 * epoch : 2 * epoch + 2]]))
        assert ranks == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9], "the next usable one is in their place"
    assert set(reported) == {BadRecord("a.tar", "0-2", "truncated"), BadRecord("a.tar", "0-3", "truncated")}
    assert len(reported) == 2


def test_a_text_that_no_tokenizer_takes_costs_one_record():
    def tokenize(captions):
        if captions[0] == "2":
            raise LcmError("a text that cannot be encoded")
        return {"ids": np.array([[int(captions[0])]], np.int32)}

    source = shapes.open(num_examples=5)
    captions = {number: Record(str(number), source[number].image, (str(number),)) for number in range(5)}
    listed = type("Listed", (dict,), {"where": lambda self, number: ("a.txt", str(number))})(captions)
    rows = ImageRows(listed, ((16, 16),), ImageTransform(), tokenize)
    reported = []
    batches = take(2, rows, batch_size=5, bad_records=BadRecordLog(0.2, reported.append))
    assert [sorted(batch["ids"].ravel()) for batch in batches] == [[0, 1, 3, 3, 4]] * 2
    assert reported == [BadRecord("a.txt", "2", "a text that cannot be encoded")]
    in_order = list(encoding.in_order(rows, 0, 0, range(5)))  # as precompute and encoding at the start read them
    assert [rank for rank, row in in_order if isinstance(row, BadRecord)] == [2]


def test_too_many_bad_records_stop_the_run():
    examples = Drawn((100,), frozenset((0, rank) for rank in range(0, 100, 2)))
    with pytest.raises(LcmError, match=r"a\.tar: 0-\d+: truncated; .*raise max_bad_fraction \(now 0.01\)"):
        take(100, examples, bad_records=BadRecordLog(0.01))
    with pytest.raises(LcmError, match="truncated"):
        take(5, examples)  # without a log, the first one
    few = Drawn((1000,), frozenset((0, rank) for rank in range(11)))
    with pytest.raises(LcmError, match=r"11 of \d+ records"):  # of so few, exactly the share
        take(1000 // 6 + 1, few, bad_records=BadRecordLog(0.01))
    take(1000 // 6 + 1, few, bad_records=BadRecordLog(0.011))
    with pytest.raises(LcmError, match="none of 4 consecutive records can be used"):
        take(1, Drawn((4,), frozenset((0, rank) for rank in range(4))), bad_records=BadRecordLog(1.0))


def test_what_an_index_left_out_counts_too():
    reported = []
    log = BadRecordLog(0.01, reported.append)
    bad = [BadRecord("a.tar", str(number), "empty") for number in range(1200)]
    log.indexed(bad[:900], 99_100, 99_100)
    log.add(bad[900:909], 6)  # of at least MIN_READ, a tenth of a percent may still be bad
    with pytest.raises(LcmError, match="could not be used"):
        log.add(bad[909:920], 6)
    with pytest.raises(LcmError, match="10 of 100 records"):
        BadRecordLog(0.09).indexed(bad[:10], 90, 50)
    assert len(reported) == 920


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


def test_fixed_draws_depend_on_the_row_alone():
    examples = FixedDraws(Drawn((4, 3)), seed=5, variants=2)
    assert examples.groups == (8, 6) and examples.where(1, 5) == ("a.tar", "1-2")
    for group, rank, position in [(0, 0, 0), (0, 1, 7), (0, 6, 3), (1, 0, 4), (1, 5, 7 + 6)]:
        row = examples.row(group, rank, draws_at(0, 0))
        assert row["label"].tolist() == [group, rank // 2] and row["draw"] == draws_at(5, position).random()


def test_errors_end_and_limit_of_prefetching():
    def broken():
        yield {"a": 1}
        raise OSError("tar is gone")

    ahead = loader.Prefetched(broken(), put=lambda b: b)
    assert next(ahead) == {"a": 1}
    with pytest.raises(OSError, match="tar is gone"):
        next(ahead)
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
from lcm_jax.data.rows import Arrays
from lcm_jax.data.order import Order
if __name__ == "__main__":
    rows = Arrays(({"label": np.arange(8)},))
    for batch in loader.batches((rows,), Order(0, 4, (rows.groups,)), workers=2, put=dict):
        print("read", flush=True)
        sys.stdin.readline()
"""


def interrupt(workers: list[psutil.Process]) -> None:
    for worker in workers:
        worker.send_signal(signal.SIGINT)


def test_workers_leave_signals_to_the_process_that_trains_and_end_with_it(tmp_path):
    """SIGINT to the workers alone, while they start and when they read, does nothing; they end when it is killed."""
    script = tmp_path / "reader.py"
    script.write_text(READER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(workers := workers_of(process)) < 2:
        time.sleep(0.01)
    interrupt(workers)
    assert process.stdout.readline() == b"read\n"
    interrupt(workers)
    for _ in range(5):
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"read\n"
    workers = workers_of(process)
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
