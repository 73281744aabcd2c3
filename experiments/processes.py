"""What the processes that an experiment starts have in common."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with(parent: int) -> None:
    """The calling process ends as soon as its `parent` does, even by SIGKILL, so that nothing holds a card's memory.

    Does nothing on systems other than Linux. Called in a new process, also between fork and exec.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that call
        os._exit(1)
