"""Values of other programs against types: what fits, and the words of the refusal."""

import json
from typing import Annotated

import pytest

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.typed import Range, checked, describe, fits

NAN, INFINITY = float("nan"), float("inf")
Side = Annotated[int, Range(1, 100)]
EVERYTHING = (None, True, 0, 1, 100, 101, 2.5, NAN, INFINITY, 10**400, "1", "", [], [1], [1, 2], [[1]], {}, {"a": 1})


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        (bool, (True,)),
        (int, (0, 1, 100, 101)),
        (float, (0, 1, 100, 101, 2.5)),
        (str, ("1", "")),
        (Side, (1, 100)),
        (Side | None, (None, 1, 100)),
        (tuple[Side, ...], ([1], [1, 2])),
        (tuple[Side, Side], ([1, 2],)),
        (Annotated[tuple[Side, ...], Range(2, 3)], ([1, 2],)),
        (Side | tuple[Side | tuple[Side, ...], ...], (1, 100, [1], [1, 2], [[1]])),
        (dict, ({}, {"a": 1})),
    ],
)
def test_a_type_accepts_its_values_and_no_others(kind, accepted):
    found = [value for value in EVERYTHING if fits(value, kind)]
    assert list(map(repr, found)) == list(map(repr, accepted))  # 1 == True


def test_lists_become_tuples_and_refusals_are_one_short_line():
    assert checked("widths", [1, [2, 3]], tuple[Side | tuple[Side, ...], ...]) == (1, (2, 3))
    assert describe(Side | None) == "a whole number from 1 to 100 or null"
    assert (
        describe(Annotated[tuple[bool, ...], Range(1, 7)]) == "a list, each entry true or false, its length from 1 to 7"
    )
    for value in (json.loads("[" * 500 + "]" * 500), [1] * 10**5, 10**3000, {"a": "b" * 10**5}):
        with pytest.raises(UnsupportedConfig, match="unsupported side=.*; supported: a whole number") as caught:
            checked("side", value, Side)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
