"""Model FLOPs of a function: those of its matrix products and convolutions, counted in its jaxpr without running it.

    dot_general  2 x batch x rows x columns x contracted
    convolution  2 x output elements x kernel positions x input channels per group; kernel positions over padding count,
                 as in torch's counter; the zeros that a transposed convolution puts between inputs do not

Everything else counts as 0. Sizes are those of the whole, unsharded function. Rematerialised work would count twice and
a kernel hides its work, so count a version of the function without either.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any) -> float:
    """FLOPs of `function(*args)`; args are arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a while loop that contains products, or a Pallas kernel.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)  # keeps the static arguments of a jitted one
    return of_jaxpr(jitted.trace(*args).jaxpr.jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all equations: every iteration of a scan, the most expensive branch of a cond."""
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_general(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "cond":
        return max(of_jaxpr(branch.jaxpr) for branch in params["branches"])
    inner = sum(map(of_jaxpr, core.jaxprs_in_params(params)))
    if name == "scan":
        return params["length"] * inner
    if name == "while" and inner:
        raise ValueError(
            "cannot count the products in a while loop, whose number of iterations is unknown; use scan or a "
            "fori_loop of fixed length instead"
        )
    if name == "pallas_call":
        raise ValueError("cannot count the FLOPs of a Pallas kernel; count the function with XLA operations instead")
    if name == "shard_map":  # the body sees one device's part
        return inner * _shards(equation)
    return inner


def _shards(equation: core.JaxprEqn) -> int:
    """Number of devices that a shard_map divides its arguments among; each of them runs the body."""
    entries = [entry for spec in equation.params["in_specs"] for entry in spec if entry is not None]
    names = {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}
    return math.prod(equation.params["mesh"].shape[name] for name in names)


def _dot_general(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> float:
    params, kernel = equation.params, equation.invars[1].aval.shape
    _, inputs, *positions = params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[axis] for axis in positions)
    dilation = math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps * kernel[inputs] / dilation
