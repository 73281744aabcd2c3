"""Model FLOPs of a function: what its matrix products and convolutions ask for, from its jaxpr, nothing executed.

    dot_general  2 x batch x rows x columns x contracted
    convolution  2 x output elements x kernel positions x input channels per group; positions over padding count, as
                 they do in torch's counter; zeros that a transposed convolution puts between inputs do not

Everything else counts nothing. Sizes are those of the whole, unsharded function. What a rematerialised function
computes twice would count twice, and a kernel's inside is not seen: count the function without either.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any) -> float:
    """FLOPs of `function(*args)`; args are arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a loop whose length the jaxpr does not say, or a hand-written kernel.
    """
    traced = function if hasattr(function, "trace") else jax.jit(function)  # jitted already or not
    return of_jaxpr(traced.trace(*args).jaxpr.jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all equations; a loop's body counts at every turn, of a branch the dearest side."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_general(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "cond":
        return max(of_jaxpr(branch.jaxpr) for branch in params["branches"])
    inner = sum(of_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params))
    if name == "scan":
        return params["length"] * inner
    if name == "while" and inner:
        raise ValueError(
            "a while loop with products in it: how often it turns is not known; use scan, or a fori_loop "
            "of fixed length under differentiation"
        )
    if name == "pallas_call":
        raise ValueError("a Pallas kernel: what it computes is not counted here; count the function with its XLA form")
    if name == "shard_map":  # the body sees one device's part
        return inner * _ways(equation)
    return inner


def _ways(equation: core.JaxprEqn) -> int:
    """Devices among which a shard_map's arguments are divided; each runs its body."""
    names = [
        name
        for spec in equation.params["in_specs"]
        for entry in spec
        if entry is not None
        for name in (entry if isinstance(entry, tuple) else (entry,))
    ]
    return math.prod(equation.params["mesh"].shape[name] for name in set(names))


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
