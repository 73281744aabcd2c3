"""How programs end: one line on stderr and an exit code, at a signal in any phase, without memory, without a reader."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lcm_jax import ending
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError

ROOT = Path(__file__).parents[1]


class JaxRuntimeError(RuntimeError):  # jax's is known by its name
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (LcmError("no such thing"), 2, "error: no such thing"),
        (BadArgument("steps", 0, "choose more"), 2, "error: --steps=0: choose more"),
        (OSError("the disk is gone"), 2, "error: the disk is gone"),
        (OSError(28, "No space left"), 2, "error: the output cannot be written .No space left.; make room"),
        (MemoryError(), 2, "error: the memory of this machine is too small; use less"),
        (MemoryError("Unable to\nallocate 9 GiB"), 2, "error: .* too small .Unable to allocate 9 GiB.; use less"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n  on TPU"),
            2,
            "error: .*devices.*Out of memory on TPU.*use less",
        ),
        (KeyboardInterrupt(), 130, "stopped; nothing was written"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_end_is_one_line(error, code, line, capsys):
    def program():
        raise error

    assert exit_code(program) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(line)
    for found in lines:
        assert re.fullmatch(line, found), found


def test_a_fault_of_the_program_is_a_traceback():
    for error in (RuntimeError("a bug"), JaxRuntimeError("INTERNAL: a bug")):
        with pytest.raises(RuntimeError, match="a bug"):
            exit_code(lambda error=error: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("swallowed", [False, True])
def test_sigterm_runs_the_finally_blocks(swallowed, capsys):
    ended = []

    def program():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt as stop:
            if swallowed:  # a library made another error of it
                raise RuntimeError("a callback failed") from stop
            raise
        finally:
            ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(program, lambda: "3 images are there") == 143
    assert ended and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "stopped; 3 images are there\n"


def test_a_thread_that_unwinds_is_known():
    me = threading.get_ident()
    assert not ending._unwinding(me)
    try:
        raise ending.Stop(signal.SIGINT)
    except ending.Stop:
        try:
            raise ValueError
        except ValueError:
            assert ending._unwinding(me)
    try:
        raise ValueError
    except ValueError:
        assert not ending._unwinding(me)


PROGRAM = """
import sys, threading, time
from lcm_jax.ending import exit_code, signals
signals.begin()
def program():
    print("here", flush=True)
    {body}
sys.exit(exit_code(program))
"""
CALLBACK = """
    class Odd:
        def __del__(self): time.sleep(30)
    odd = Odd()
    del odd
    time.sleep(30)"""
LIBRARY = """
    try: time.sleep(30)
    except BaseException: pass
    time.sleep(30)"""
LONG_CALL = """
    from lcm_jax import ending
    ending.GRACE = 0.5
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)"""
WAITING = """
    thread = threading.Thread(target=time.sleep, args=(30,), daemon=True)
    thread.start()
    thread.join()"""


@pytest.mark.parametrize(
    ("number", "body"),
    [
        pytest.param(signal.SIGINT, CALLBACK, id="swallowed in a callback"),
        pytest.param(signal.SIGTERM, LIBRARY, id="swallowed by a library"),
        pytest.param(signal.SIGINT, LONG_CALL, id="in one long call"),
        pytest.param(signal.SIGTERM, WAITING, id="while it waits for a thread"),
    ],
)
def test_a_signal_is_never_lost(number, body):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "here\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (128 + number, "stopped; nothing was written\n")


def test_a_signal_before_the_program_and_no_reader_of_its_output():
    """`python -m` imports jax first, for seconds; `| head` reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lcm_jax.sample", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] in (b"stopped; nothing was written\n", b"")
    source = PROGRAM.format(body="[print('x' * 1000) for _ in range(1000)]")
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=20) == 141
