"""Numbers that must agree: one comparison for all tests, which knows how near each came to its bound.

`close` and `near` keep error over bound of every call: `pytest --parity=10` lists the worst.

CPUs round differently: another instruction set or number of threads sums in another order. So a bound has a reason: an
oracle in float64, or `EPS` times the size that the computation goes through, 3 times what any CPU was seen to need. And
it stays 10 times below the smallest wrong answer: tests/mutants.py makes the wrong answers and measures them.
Values written down with few digits, whole pixels and counts are exempt: their bound is half a unit of the last digit.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

EPS = float(np.finfo(np.float32).eps)  # twice the relative error of one rounding
HALF = float(np.finfo(np.float16).eps)
BFLOAT16 = 2.0**-7

# Relative to the largest output, of a network of some 100 layers in float32: the layers' errors, each of a few EPS, add
# up as independent ones do.
NETWORK = 64 * EPS

_made: list[tuple[float, str]] = []


def close(
    got: ArrayLike, want: ArrayLike, rtol: float = 1e-7, atol: ArrayLike = 0.0, what: str = "", of_max: float = 0.0
) -> None:
    """Asserts |got - want| <= atol + rtol |want| + of_max max|want|, with equal shapes; one may be a scalar.

    The message begins with error over bound. atol: one number, or one for each element. of_max: for arrays whose
    elements are sums of the same terms, so that those near 0 have the others' errors.
    """
    __tracebackhide__ = True
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape or () in (got.shape, want.shape), f"shapes {got.shape} and {want.shape} {what}"
    if of_max:
        atol = atol + of_max * np.max(np.abs(want))
    _judge(ratios(got, want, rtol, atol), got, want, what, sys._getframe(1))


def near(got: ArrayLike, want: ArrayLike, bound: float, what: str = "") -> None:
    """Asserts |got - want| <= bound |want| in the Euclidean norm over all elements: for gradients."""
    __tracebackhide__ = True
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes {got.shape} and {want.shape} {what}"
    error, norm = np.linalg.norm(got - want), np.linalg.norm(want)
    _judge(ratios(error, 0.0, 0.0, bound * norm), error, norm, what, sys._getframe(1))


def sinusoid(values: ArrayLike, dim: int, shift: float) -> np.ndarray:
    """Bound [b dim] of sines and cosines of values [b] times 10000^(-k / (dim // 2 - shift)), in either order.

    A frequency has the error of its exponential, 1 to 2 units of the last place; the product rounds once more; all of
    it counts as an angle's part, so that low frequencies, where the values show, are held tightly.
    """
    half = dim // 2
    angles = np.multiply.outer(np.abs(np.asarray(values, np.float64)), 1e4 ** (-np.arange(half) / (half - shift)))
    return np.pad(8 * EPS * (1 + np.concatenate([angles, angles], axis=1)), ((0, 0), (0, dim % 2)))


def ratios(got: ArrayLike, want: ArrayLike, rtol: float, atol: ArrayLike) -> np.ndarray:
    """|got - want| / (atol + rtol |want|) of each element; 0 where both are equal, inf of a NaN or a bound of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(got == want, 0.0, np.abs(np.subtract(got, want)) / (atol + rtol * np.abs(want)))
    return np.nan_to_num(found, nan=np.inf)


def taken() -> list[tuple[float, str]]:
    """Error over bound and place of each comparison since the last call."""
    made = _made.copy()
    _made.clear()
    return made


def _judge(found: np.ndarray, got: np.ndarray, want: np.ndarray, what: str, caller) -> None:
    __tracebackhide__ = True
    worst = float(np.max(found, initial=0.0))
    _made.append((worst, f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"))
    if worst > 1:
        at = np.unravel_index(np.argmax(found), found.shape)
        one, other = (np.broadcast_to(x, found.shape)[at] for x in (got, want))
        where = f"{one:.9g}, not {other:.9g}, at {[int(i) for i in at]}; {np.sum(found > 1)} of {found.size} elements"
        raise AssertionError(f"{worst:.3g} times the bound {what}".rstrip() + f": {where}")
