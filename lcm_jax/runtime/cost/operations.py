"""What each operation of an optimised program computes and moves; what its loops repeat.

An operation is an instruction with all that is fused into it. Its FLOPs are those of products and convolutions, its
bytes those of its operands and results in main memory.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lcm_jax.runtime.cost.hlo import Instruction, Program, callees, dimensions, numbers, traffic


@dataclasses.dataclass(frozen=True)
class Operation:
    """What runs as one: an instruction with all that is fused into it, its FLOPs and bytes, how often it runs."""

    instruction: Instruction
    flops: float
    bytes: float
    times: int


def operations(program: Program) -> Iterator[Operation]:
    """All that takes time; FLOPs of products and convolutions alone."""
    inside: dict[str, float] = {}
    for name, times in program.times.items():
        if name not in program.fused:
            shapes = {i.name: i.shape for i in program.computations[name]}
            for instruction in program.computations[name]:
                flops = _products(instruction, shapes)
                if instruction.opcode == "fusion":
                    flops += sum(_flops_of(callee, program, inside) for callee in callees(instruction))
                memory = traffic(instruction, shapes)
                if flops or memory:
                    yield Operation(instruction, flops, memory, times)


def _flops_of(name: str, program: Program, known: dict[str, float]) -> float:
    if name not in known:
        shapes = {i.name: i.shape for i in program.computations[name]}
        known[name] = sum(
            _products(i, shapes)
            + (sum(_flops_of(c, program, known) for c in callees(i)) if i.opcode == "fusion" else 0.0)
            for i in program.computations[name]
        )
    return known[name]


def repeated(found: Iterable[Operation]) -> tuple[float, float]:
    """(FLOPs, bytes) of all turns of loops but their first, which is all that XLA's cost analysis counts."""
    again = [one for one in found if one.times > 1]
    flops, memory = (sum((one.times - 1) * getattr(one, name) for one in again) for name in ("flops", "bytes"))
    return float(flops), float(memory)


def heaviest(found: Iterable[Operation], count: int = 12) -> list[tuple[str, int, float]]:
    """The JAX operations with the most memory traffic: (operation, instructions, bytes per step)."""
    total: dict[str, float] = collections.defaultdict(float)
    number: dict[str, int] = collections.defaultdict(int)
    for one in found:
        key = f"{one.instruction.opcode} {re.sub(r'[0-9]+', '*', one.instruction.source)}"
        total[key] += one.times * one.bytes
        number[key] += one.times
    ranked = sorted(total, key=total.__getitem__, reverse=True)[:count]
    return [(key, number[key], total[key]) for key in ranked]


def _products(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    """FLOPs of a product or convolution, 0 of anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    outputs = math.prod(dimensions(instruction.shape)[0])
    left, right = (dimensions(shapes[operand])[0] for operand in instruction.operands[:2])
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.rest)
        return 2.0 * outputs * math.prod(left[axis] for axis in (numbers(axes[1]) if axes else ()))
    return 2.0 * _convolution_taps(instruction, left, right)


def _convolution_taps(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Multiplications of a convolution, none with padding or with a zero between inputs, as XLA counts them.

    A TPU's program has products as convolutions, too, their batch axes as windows of which most is padding.
    """
    inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    sizes = dict(zip(outputs, dimensions(instruction.shape)[0], strict=True))
    taps = float(sizes["b"] * sizes["f"] * right[kernel.index("i")])
    for axis in sorted(label for label in outputs if label.isdigit()):

        def setting(name: str, default: str, axis: int = int(axis)) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        stride, spread, apart = (int(setting(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(setting("pad", "0_0").split("_")[0])
        at = np.arange(sizes[axis])[:, None] * stride + np.arange(right[kernel.index(axis)]) * spread - low
        end = (left[inputs.index(axis)] - 1) * apart + 1
        taps *= np.count_nonzero((at >= 0) & (at < end) & (at % apart == 0))
    return taps
