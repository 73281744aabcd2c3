"""What an optimised XLA program moves and repeats, read from its text: collectives, loops, hand-written kernels.

Link bytes of a collective are what each device receives, by a ring over its group of n devices:

    all-gather, all-to-all  result (n-1)/n      reduce-scatter  result (n-1)
    all-reduce              2 result (n-1)/n    collective-permute  result

The text is of one device's program, so that all sizes are per device. Pairs of -start and -done count once, fused and
called computations where they are called, a loop's body as often as it turns: XLA's `known_trip_count`, else the
constant that the loop's counter is compared with (counting from 0 by 1), else once, and the loop is among `unknown`.

What each operation of an optimised program computes and moves; what its loops repeat.

An operation is an instruction with all that is fused into it. Its FLOPs are those of products and convolutions, its
bytes those of its operands and results in main memory.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "__cudnn$fmha")
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BRACKET = re.compile(r"[()]")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "async-start",
    "async-update",
    "async-done",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, type, opcode, what stands in its brackets and what follows them."""

    name: str
    shape: str
    opcode: str
    arguments: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def source(self) -> str:
        """The JAX operation that it came from, "" where the text does not say."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: link bytes of one execution, how often it runs, the devices of a group (None: all)."""

    kind: str
    link_bytes: float
    times: int
    groups: tuple[tuple[int, ...], ...]
    source: str

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of the mesh along which devices of a group differ; devices are numbered as the mesh lists them."""
        coordinates = [np.unravel_index(group, tuple(mesh_shape.values())) for group in self.groups]
        return tuple(
            name for axis, name in enumerate(mesh_shape) if any(len(set(c[axis].tolist())) > 1 for c in coordinates)
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a hand-written kernel: its name, float operands' dimensions, bytes in and out, how often it runs."""

    name: str
    operands: tuple[tuple[int, ...], ...]
    bytes: float
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """An optimised program's computations and how often a step runs each.

    Attributes:
      computations: name -> instructions.
      times: name -> runs, of those that run.
      fused: names of those that are the inside of one operation, which no memory traffic happens between.
      unknown: loops whose length the text does not say; their bodies count once.
      devices: partitions of the program.
    """

    computations: Mapping[str, Sequence[Instruction]]
    times: Mapping[str, int]
    fused: frozenset[str]
    unknown: tuple[str, ...]
    devices: int

    def instructions(self) -> Iterator[tuple[Instruction, int, str]]:
        """(instruction, runs, its computation) of all that run."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times, name


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
        if line[:1] in ("E", "%"):
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(found))
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    times: dict[str, int] = {}
    fused: set[str] = set()
    unknown: list[str] = []

    def visit(name: str, runs: int, inside: bool) -> None:
        times[name] = times.get(name, 0) + runs
        if inside:
            fused.add(name)
        for instruction in computations[name]:
            turns = 1
            if instruction.opcode == "while":
                turns = _turns(instruction, computations)
                if turns is None:
                    unknown.append(instruction.name)
            for callee in callees(instruction):
                visit(callee, runs * (turns or 1), inside or instruction.opcode == "fusion")

    visit(entry, 1, False)
    return Program(computations, times, frozenset(fused), tuple(unknown), int(partitions[1]) if partitions else 1)


def collectives(program: Program) -> list[Collective]:
    """Every collective that runs, wherever it stands."""
    found = []
    for instruction, times, _ in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            groups = _groups(instruction, program.devices)
            found.append(Collective(kind, _link_bytes(instruction, len(groups[0])), times, groups, instruction.source))
    return found


def kernels(program: Program) -> list[Kernel]:
    """Calls of Pallas kernels (Mosaic on TPU, Triton on GPU) and cuDNN's attention: XLA does not count their inside."""
    found = []
    for instruction, times, name in program.instructions():
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        if target and target[1].startswith(_KERNELS):
            shapes = {i.name: i.shape for i in program.computations[name]}
            operands = [shapes[operand] for operand in instruction.operands]
            inputs = tuple(d for shape in operands if shape.startswith(("f", "bf")) for d in dimensions(shape))
            label = target[1] if target[1].startswith("__cudnn") else instruction.name
            found.append(Kernel(label, inputs, traffic(instruction, shapes), times))
    return found


def traffic(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    """Bytes that one operation reads and writes in main memory; `shapes`: of its computation's instructions."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    return sum(map(size_bytes, (instruction.shape, *(shapes.get(operand, "") for operand in instruction.operands))))


def size_bytes(shape: str) -> float:
    """Bytes in main memory of an array or of all of a tuple; what lies in a chip's own memory, S(n), counts nothing."""
    return float(sum(_array_bytes(*found) for found in _ARRAY.findall(shape)))


def dimensions(shape: str) -> tuple[tuple[int, ...], ...]:
    """Dimensions of each array in a type."""
    return tuple(tuple(int(n) for n in found[1].split(",") if n) for found in _ARRAY.findall(shape))


def _array_bytes(dtype: str, sides: str, layout: str, everywhere: bool = False) -> int:
    if re.search(r"S\([1-9]", layout) and not everywhere:
        return 0
    bits = re.search(r"\d+", dtype)
    width = _BYTES[dtype] if dtype in _BYTES else max(int(bits[0]), 8) // 8
    return width * math.prod(int(n) for n in sides.split(",") if n)


def _instruction(found: re.Match) -> Instruction:
    body = found[3]
    end = _closing(body, 0) if body[0] == "(" else body.index(" ")
    tail = body[end:].lstrip()
    opening = tail.index("(")
    closing = _closing(tail, opening)
    return Instruction(
        found[2], body[:end], tail[:opening], tail[opening + 1 : closing - 1], tail[closing:], bool(found[1])
    )


def _closing(text: str, opening: int) -> int:
    """Index behind the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in _BRACKET.finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"unbalanced brackets in HLO text: {text[:120]}")


def callees(instruction: Instruction) -> list[str]:
    """Computations that run when the instruction runs; scalar functions of reductions and the like are none."""
    if instruction.opcode in ("async-update", "async-done"):  # run by async-start
        return []
    names = []
    for kind, value in _CALLS.findall(instruction.rest):
        if kind != "to_apply" or instruction.opcode == "call":
            names += re.findall(r"[\w.\-]+", value)
    return names


def _turns(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = {i.name: i for i in computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]}
    root = next(i for i in condition.values() if i.root)
    if root.opcode == "compare" and "direction=LT" in root.rest:
        bound = condition.get(root.operands[-1])
        if bound and bound.opcode == "constant":
            return int(bound.arguments)
    return None


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that exchange, in any of XLA's spellings; a permutation's pairs."""
    rest = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return tuple(tuple(map(int, p.split(","))) for p in re.findall(r"\{([\d,]+)\}", pairs[1])) or ((0,),)
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest):
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids = np.arange(devices).reshape(numbers(iota[2]))
        return _rows(ids.transpose(numbers(iota[3])) if iota[3] else ids, numbers(iota[1])[-1])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        along = re.findall(r"'([^']+)'", mesh[4])
        order = [name for name in sizes if name not in along] + along
        ids = np.arange(devices).reshape(numbers(mesh[2]) if mesh[2] else -1)
        ids = (ids.transpose(numbers(mesh[3])) if mesh[3] else ids).reshape(tuple(sizes.values()))
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return _rows(ids, math.prod(sizes[name] for name in along))
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise ValueError(f"replica groups in a spelling that is not known: {rest[:200]}")
    return (tuple(range(devices)),)


def _rows(ids: np.ndarray, width: int) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, ids.reshape(-1, width).tolist()))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _link_bytes(instruction: Instruction, n: int) -> float:
    """See the module. A -start's type also holds its operands: results are the second half of an all-gather's."""
    arrays = _ARRAY.findall(instruction.shape)
    kind = instruction.opcode.removesuffix("-start")
    if kind != instruction.opcode and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    if kind != instruction.opcode and kind == "collective-permute":
        arrays = arrays[:1]
    size = sum(_array_bytes(*array, everywhere=True) for array in arrays)
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return size * share.get(kind, (n - 1) / n)


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
