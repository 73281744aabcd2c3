"""What the processes that an experiment starts have in common.

python experiments/processes.py PARENT COMMAND ...      COMMAND, which ends with the process PARENT
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with(parent: int) -> None:
    """The calling process ends as soon as its `parent` does, even by SIGKILL, so that nothing holds a card's memory.

    Does nothing on systems other than Linux.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that call
        os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
