"""Values that other programs wrote, checked against Python's types before anything computes with them.

    checked("layers_per_block", [2, 2], int | tuple[Annotated[int, Range(1, 100)], ...])  ->  (2, 2)

The type says all: a bool is no number, a whole number may stand for a float, numbers are finite and within their
`Range`, a tuple is a list in JSON, None is null.
"""

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union

from lcm_jax.errors import UnsupportedConfig


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a number or of a list's length, both included."""

    low: float
    high: float

    def __str__(self):
        return f"from {self.low:g} to {self.high:g}"


_WORDS = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    str: "a text",
    types.NoneType: "null",
}

Offset = Annotated[float, Range(-1e6, 1e6)]
Positive = Annotated[float, Range(1e-6, 1e6)]


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """Name -> type, with its `Range`s, of a dataclass's fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@contextlib.contextmanager
def config_of(file: object) -> Iterator[None]:
    """In this block an UnsupportedConfig names the file, too."""
    try:
        yield
    except UnsupportedConfig as error:
        raise UnsupportedConfig(error.field, error.value, f"{error.supported} ({file})") from None


def checked(name: str, value: Any, kind: Any) -> Any:
    """`value`, lists in it as tuples. Raises UnsupportedConfig, which names it and its value, if it is not a `kind`."""
    if not fits(value, kind):
        raise UnsupportedConfig(name, value, supported=describe(kind))
    return _frozen(value)


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is what `kind` says."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        plain, limits = arguments
        return fits(value, plain) and limits.low <= (len(value) if _is_list(value) else value) <= limits.high
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if kind is Any:
        return True
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(one, arguments[1]) for one in value.values())
    if origin is tuple:
        if not _is_list(value):
            return False
        if arguments[-1] is ...:
            return len(value) > 0 and all(fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if kind in (int, float):
        numbers = int if kind is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool) and -1e300 < value < 1e300
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """What `kind` takes, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        of_length = ", its length" if typing.get_origin(arguments[0]) is tuple else ""
        return f"{describe(arguments[0])}{of_length} {arguments[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if origin is Mapping:
        return "an object" if arguments[1] is Any else f"an object, each value {describe(arguments[1])}"
    if origin is tuple:
        count = "" if arguments[-1] is ... else f" of {len(arguments)}"
        return f"a list{count}, each entry {describe(arguments[0])}"
    return _WORDS[kind]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _frozen(value: Any) -> Any:
    """Lists, also nested ones, as tuples, so that what has them is hashable."""
    return tuple(map(_frozen, value)) if _is_list(value) else value
