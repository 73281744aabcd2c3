"""What an experiment prints while it runs."""

import time
from collections.abc import Callable


def teller() -> Callable[[str], None]:
    """A function that prints a line with the seconds since this call before it."""
    begun = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)
