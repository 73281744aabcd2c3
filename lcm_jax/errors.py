"""Errors of bad input: one line that names the value and the way out.

Programs print the line as `error: ...` and exit with code 2: see `ending`.
"""

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

_short = reprlib.Repr()  # of values in files, which may be nested deeply or have thousands of entries or digits
_short.maxtuple = _short.maxlist = _short.maxdict = 12
_short.maxstring = _short.maxother = _short.maxlong = 200

_LONGEST = 4000  # characters of a message: a file may have much more in the place of a word


def printable(text: str) -> str:
    """`text` with escapes in place of line breaks, control characters and what UTF-8 cannot encode."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LcmError(ValueError):
    """Bad input: a wrong value, file, folder or configuration. The message is one line, whatever names it quotes."""

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class BadArgument(LcmError):
    """An argument whose value cannot be used. The library names the argument, the program the flag: see `flags_named`.

    Attributes:
      name: of the argument.
      value: the value given.
      problem: what is wrong with it, and what to do.
    """

    def __init__(self, name: str, value: Any, problem: str):
        super().__init__(f"{name}={value}: {problem}")
        self.name, self.value, self.problem = name, value, problem

    def at(self, prefix: str) -> LcmError:
        """The same error for the one who typed the flag `prefix` + name, as "--config.data.path=/nowhere: ..."."""
        return LcmError(f"{prefix}{self}")

    def __reduce__(self):  # the default would call __init__ with the message alone
        return type(self), (self.name, self.value, self.problem)


@contextlib.contextmanager
def flags_named(prefix: str) -> Iterator[None]:
    """In this block, or in a function that it decorates, a BadArgument is raised as its error `at(prefix)`."""
    try:
        yield
    except BadArgument as error:
        raise error.at(prefix) from None


class UnsupportedConfig(LcmError):
    """A model or scheduler configuration asks for something that this package does not implement.

    Attributes:
      field: name of the configuration key.
      value: the value found.
    """

    def __init__(self, field: str, value: Any, supported: Any):
        """`supported`: what would be accepted, as a phrase or a collection of values."""
        if not isinstance(supported, str):
            supported = ", ".join(repr(choice) for choice in supported)
        super().__init__(f"unsupported {field}={_short.repr(value)}; supported: {supported}")
        self.field = field
        self.value = value
        self.supported = supported

    def __reduce__(self):  # the default would call __init__ with the message alone
        return type(self), (self.field, self.value, self.supported)
