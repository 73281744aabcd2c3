"""Lines for the reader of an experiment's terminal."""

import time
from collections.abc import Callable


def teller() -> Callable[[str], None]:
    """Prints lines, each with the seconds since now before it."""
    begun = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)
