"""Numbers that must agree: one comparison for all tests, which knows how near each came to its bound.

`close` is numpy's assert_allclose, and keeps error over bound of every call: `pytest --parity=10` lists the worst.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

_made: list[tuple[float, str]] = []


def close(got: ArrayLike, want: ArrayLike, rtol: float = 1e-7, atol: float = 0.0, what: str = "") -> None:
    """Asserts |got - want| <= atol + rtol |want|, with equal shapes; the message begins with error over bound."""
    __tracebackhide__ = True
    ratio, caller = error_over_bound(got, want, rtol, atol), sys._getframe(1)
    _made.append((ratio, f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"))
    np.testing.assert_allclose(got, want, rtol, atol, err_msg=f"{ratio:.3g} times the bound {what}".rstrip())


def error_over_bound(got: ArrayLike, want: ArrayLike, rtol: float = 1e-7, atol: float = 0.0) -> float:
    """The largest |got - want| / (atol + rtol |want|); inf where a bound is 0, a number is NaN or shapes differ."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    try:
        error, bound = np.abs(got - want), atol + rtol * np.abs(want)
    except ValueError:
        return np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(got == want, 0.0, error / bound)
    return float(np.max(np.nan_to_num(ratios, nan=np.inf), initial=0.0))


def taken() -> list[tuple[float, str]]:
    """Error over bound and place of each comparison since the last call."""
    made = _made.copy()
    _made.clear()
    return made
