"""Who is next: one at a time, and of each visitor the newest request alone. What was overtaken is dropped."""

import contextlib
import itertools
import threading
from collections.abc import Iterator


class Turns:
    """Requests wait here for their turn, each in a thread of its own.

    with turns.next(visitor) as mine:
        if mine: ...     it is this request's turn; else a newer one of the visitor came while it waited
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._numbers, self._waiting, self._busy = itertools.count(), {}, False

    def waiting(self) -> int:
        """Requests that wait; at most one of each visitor."""
        with self._changed:
            return len(self._waiting)

    @contextlib.contextmanager
    def next(self, visitor: str) -> Iterator[bool]:
        """Waits for this request's turn; whoever waits longest is next."""
        with self._changed:
            number = next(self._numbers)
            self._waiting[visitor] = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._overtaken(visitor, number) or self._first(number))
            mine = not self._overtaken(visitor, number)
            if mine:
                del self._waiting[visitor]
                self._busy = True
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _overtaken(self, visitor: str, number: int) -> bool:
        return self._waiting.get(visitor) != number

    def _first(self, number: int) -> bool:
        return not self._busy and number == min(self._waiting.values())
