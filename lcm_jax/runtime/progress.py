"""How far a long job is, and how long it will take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10  # between lines where there is no terminal


class Progress:
    """Things done, per second, and time left, on stderr; a context manager.

    Args:
        total: how many there are.
        done: how many of them were done before.
        unit: what they are, as "rows".
    """

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.total, self.done, self.unit = total, done, unit
        self.bar = tqdm(total=total, initial=done, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, disable=None)
        self._begun: tuple[int, float] | None = None  # after the first ones, whose time is the compiler's
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def move(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self._begun is None:
            self._begun = self.done, now
        elif self.bar.disable and now - self._told > LINE_SECONDS:
            self._told = now
            rate = (self.done - self._begun[0]) / (now - self._begun[1])
            left = tqdm.format_interval((self.total - self.done) / rate)
            print(f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left} left",
                  file=sys.stderr, flush=True)
