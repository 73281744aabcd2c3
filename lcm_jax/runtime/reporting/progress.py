"""How far a long job is, and how long it will take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TextIO

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
            print(
                f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingProgress:
    """A training's steps, loss, images per second and time left: a bar on a terminal, else a plain line per report."""

    def __init__(self, total: int, start: int, stream: TextIO) -> None:
        self.total, self.stream, self.bar = total, stream, None
        self.begin, self.begin_time = start, time.monotonic()
        if stream.isatty():
            self.bar = tqdm(
                total=total,
                initial=start,
                file=stream,
                unit="step",
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} steps |{bar}| {desc}",
            )

    def compiled(self, step: int) -> None:
        """The first step of this process is done: the time left is estimated from here, without compiling."""
        self.begin, self.begin_time = step, time.monotonic()

    def report(self, step: int, loss: float, images_per_second: float) -> None:
        left = (time.monotonic() - self.begin_time) * (self.total - step) / max(1, step - self.begin)
        text = f"loss {loss:.5f}, {images_per_second:.1f} images/s, {_clock(left)} left"
        if self.bar is None:
            print(f"step {step}/{self.total}: {text}", file=self.stream, flush=True)
        else:
            self.bar.set_description_str(text, refresh=False)

    def move(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self.bar.write(text, file=self.stream)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
