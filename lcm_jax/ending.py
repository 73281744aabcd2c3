"""How programs end: `exit_code` runs them. Each end but a good one is one line on stderr.

    0         done; also a training that was stopped and has saved its step
    1         not done, and the program says why
    2         bad input: a wrong value, file or folder, a full disk, too little memory; "error: ..." names the way out
    130, 143  SIGINT (Ctrl-C), SIGTERM: "stopped; ..." says what is left
    141       nobody reads the output any more (`| head`); without a line

Signals are the work of `signals`, from the first moment of `python -m lcm_jax.NAME` on.
"""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from lcm_jax.errors import LcmError, flags_named

GRACE = 5.0  # seconds that a call into a library, such as compiling, may keep a program from unwinding after a signal
_POLL = 0.1  # seconds between two looks at it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of files they have a name, see `files.writing`


class Stop(KeyboardInterrupt):
    """A signal, `number`, asked the program to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """What SIGINT and SIGTERM do to a program.

    before `exit_code`   they end it at once: it has only imported modules and read its command line
    in it                they raise Stop in the main thread, so that `finally` blocks run. Libraries may swallow that
                         (in callbacks, in `except BaseException`), and a call into one may last for minutes: a thread
                         raises it again, and ends the process after GRACE seconds in one call
    at its end           nothing, while its line is printed
    after it             they end it at once, with the code that it has

    A block that handles them itself (`runtime.workdir.StopSignal`) calls `heard()` from its handler.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._begun = self._heard = self._ending = False
        self._left: Callable[[], str] | None = None  # of the program in `exit_code`
        self._code: int | None = None  # after it
        self._number: int | None = None  # of the signal that was raised

    def begin(self) -> None:
        """Takes over this process, which runs a program of this package."""
        self._begun = True
        for number in self.NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and a shell's `&` set it
                signal.signal(number, self._handle)
        sys.excepthook, sys.unraisablehook = self._excepthook, self._unraisable
        for stream in filter(None, (sys.stdout, sys.stderr)):  # a shell's `>&-` closes one
            stream.reconfigure(errors="backslashreplace")  # file names and prompts have characters that they may lack
        atexit.register(self._exit)  # first of all, so that it is called last

    def heard(self) -> None:
        """A Python handler has run."""
        self._heard = True

    @contextlib.contextmanager
    def raised(self, left: Callable[[], str]) -> Iterator[None]:
        """In this block a signal raises Stop, if nobody else handles it. left: what is left then."""
        before, self._left, self._number = self._left, left, None
        main, taken = threading.current_thread() is threading.main_thread(), {}
        if main and self._begun:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        elif main:
            free = [number for number in self.NUMBERS if signal.getsignal(number) == signal.SIG_DFL]
            taken = {number: signal.signal(number, self._handle) for number in free}
        try:
            yield
        finally:
            self._left, self._ending = before, False
            for number, handler in taken.items():
                signal.signal(number, handler)

    def stopped(self, error: BaseException) -> int | None:
        """The signal that ended the program with `error`, which a library may have made of it; None: none did."""
        self._ending = True
        if self._number or isinstance(error, KeyboardInterrupt):
            return self._number or signal.SIGINT
        return None

    def ended(self, code: int) -> int:
        """The program has its exit code."""
        self._code = code if self._begun else None
        return code

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._heard = True
        if self._ending:
            return
        if self._left is None:
            self._end(number)
        self._number = number
        raise Stop(number)

    def _exit(self) -> None:
        """Ends the process past the interpreter's own end, in which signals take their default effect again."""
        try:
            print(end="", flush=True)
        except BrokenPipeError:
            self._code = _broken_pipe()
        except OSError:
            pass  # `exit_code` has said so
        if self._code is not None:
            os._exit(self._code)

    def _end(self, number: int) -> NoReturn:
        if self._code is None:
            line = f"stopped; {self._left() if self._left else 'nothing was written'}\n"
            with contextlib.suppress(OSError):  # not print: this may be within another one
                os.write(sys.__stderr__.fileno(), line.encode(errors="backslashreplace"))
        os._exit(128 + number if self._code is None else self._code)

    def _watch(self, reader: int) -> None:
        """Work of a thread: sees to it that each signal, of which `reader` gets a byte, ends the program."""
        main = threading.main_thread().ident
        while True:
            number = os.read(reader, 1)[0]
            if number not in self.NUMBERS:
                continue
            late = time.monotonic() + GRACE
            while not self._heard:
                phase = self._left or self._code is not None
                if phase and time.monotonic() > late and signal.getsignal(number) == self._handle:
                    self._end(number)
                time.sleep(_POLL)
            self._heard = False
            while self._number and self._left:
                time.sleep(10 * _POLL)
                if self._left and not _unwinding(main):
                    signal.pthread_kill(main, self._number)
                    break

    def _excepthook(self, kind: type, error: BaseException, trace: Any) -> None:
        if isinstance(error, Stop):
            self._end(error.number)
        if isinstance(error, BrokenPipeError):
            os._exit(_broken_pipe())
        sys.__excepthook__(kind, error, trace)

    def _unraisable(self, found: Any) -> None:
        if not isinstance(found.exc_value, Stop):  # `_watch` raises it again
            sys.__unraisablehook__(found)


signals = _Signals()


def _unwinding(thread: int) -> bool:
    """Whether a thread handles a Stop, or an error that was made of it."""
    found = sys._current_exceptions().get(thread)
    error = found[1] if isinstance(found, tuple) else found
    while error is not None and not isinstance(error, Stop):
        error = error.__context__
    return error is not None


def _broken_pipe() -> int:
    """Nobody reads the output: what is still in its buffer goes nowhere, instead of raising at exit. The exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # it has no descriptor
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 128 + signal.SIGPIPE


def exit_code(
    program: Callable[[], int | None],
    left: str | Callable[[], str] = "nothing was written",
    smaller: str = "use less",
) -> int:
    """Runs `program` and returns its exit code (None is 0). Any other end than a good one is one line on stderr.

    Args:
      left: what is there if a signal stops it.
      smaller: the ways out if memory is too little.
    """
    with signals.raised(left if callable(left) else lambda: left):
        try:
            with flags_named("--"):
                code = program() or 0
                print(end="", flush=True)  # what is wrong with the output shows here, not after the end
        except BaseException as error:
            if number := signals.stopped(error):
                code, line = 128 + number, f"stopped; {left() if callable(left) else left}"
            elif isinstance(error, BrokenPipeError):
                code, line = _broken_pipe(), ""
            elif getattr(error, "errno", None) in _FULL and error.filename is None and not isinstance(error, LcmError):
                code, line = 2, f"error: the output cannot be written ({error.strerror}); make room"
            elif isinstance(error, LcmError | OSError):
                code, line = 2, f"error: {error}"
            elif too_large := _no_memory(error):
                code, line = 2, f"error: {too_large}; {smaller}"
            else:
                raise
            if line:
                with contextlib.suppress(OSError):
                    print(line, file=sys.stderr, flush=True)
    return signals.ended(code)


def _no_memory(error: BaseException) -> str:
    """What is said of an error of this machine or its devices that have no memory left; "" for another one."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"the memory of this machine is too small{text and f' ({text[:200]})'}"
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    if of_jax and any(word in text for word in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ut of memory")):
        return f"the memory of the devices is too small ({text.removeprefix('RESOURCE_EXHAUSTED: ')[:200]})"
    return ""
