"""Errors of bad input: one line that names the value and the way out.

Programs print the line as `error: ...` and exit with code 2.
"""

import sys
from collections.abc import Callable
from typing import Any


class LcmError(ValueError):
    """Bad input: a wrong value, file, folder or configuration. The message is one line."""


class BadArgument(LcmError):
    """A bad value of one argument. A library function names its argument, a program its flag (`at`)."""

    def __init__(self, name: str, value: Any, problem: str, prefix: str = ""):
        super().__init__(f"{prefix}{name}={value}: {problem}")
        self.name, self.value, self.problem = name, value, problem

    def at(self, prefix: str) -> LcmError:
        """The same error of the flag or key `prefix` + name."""
        return BadArgument(self.name, self.value, self.problem, prefix)

    def __reduce__(self):
        return type(self), (self.name, self.value, self.problem)


def exit_code(program: Callable[[], int | None]) -> int:
    """Runs `program` and returns its exit code (None is 0). Bad input is one line on stderr, and code 2."""
    try:
        return program() or 0
    except (LcmError, OSError) as error:
        error = error.at("--") if isinstance(error, BadArgument) else error
        print(f"error: {error}", file=sys.stderr)
        return 2


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
        super().__init__(f"unsupported {field}={value!r}; supported: {supported}")
        self.field = field
        self.value = value
        self.supported = supported

    def __reduce__(self):  # the default would call __init__ with the message alone
        return type(self), (self.field, self.value, self.supported)
