"""Reads the text of an optimised XLA program: its loops, operations, collectives and hand-written kernels.

The text describes the program of one device, so all sizes are per device. A -start and -done pair counts once; a called
computation counts at each call, and a loop's body once per iteration. The number of iterations is XLA's
`known_trip_count` or else the constant that the loop's counter is compared with (counting from 0 by 1). A loop without
either counts once and is listed in `Program.unknown`.

Bytes that each device receives over links, for a ring over a group of n devices:

    all-gather, all-to-all  result (n-1)/n      reduce-scatter      result (n-1)
    all-reduce              2 result (n-1)/n    collective-permute  result

An operation is an instruction together with everything fused into it: on a GPU one kernel. Its FLOPs are those of its
matrix products and convolutions, also of those that XLA calls cuBLAS and cuDNN for; its bytes are the sizes of its
operands and results in main memory.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# XLA's cost analysis does not look inside these: Mosaic (Pallas on TPU), Triton (Pallas on GPU), cuDNN's attention.
_KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "__cudnn$fmha")
_NO_TRAFFIC = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "async-start async-update async-done".split()
)
_LIBRARIES = ("__cudnn$", "__cublas")
# Begin of a custom call's target, or of what a fusion's backend_config calls its kind -> what kind of kernel it is.
_KINDS = {
    "__cudnn$convBackwardInput": "cuDNN convolution, input's gradient",
    "__cudnn$convBackwardFilter": "cuDNN convolution, filter's gradient",
    "__cudnn$conv": "cuDNN convolution",
    "__cudnn$fmhaSoftmaxBackward": "cuDNN attention, gradient",
    "__cudnn$fmha": "cuDNN attention",
    "__cublas": "cuBLAS product",
    "__triton_nested_gemm": "Triton product",
    "__triton_gemm": "Triton product",
    "__triton": "Triton reduction",
    "tpu_custom_call": "Mosaic kernel",
}
_ITEM_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}  # others: digits of the name
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BRACKET = re.compile(r"[()]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `[ROOT] name = shape opcode(arguments), attributes`, and the shapes of its operands."""

    is_root: bool
    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    operand_shapes: tuple[str, ...]

    @property
    def source(self) -> str:
        """The JAX operation that the instruction comes from; "" if the text does not record it."""
        return self._text("op_name=")

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return self._text("custom_call_target=")

    @property
    def kind(self) -> str:
        """The kind of kernel that it is, in words: one of _KINDS, else the opcode."""
        name = self.target or (self._text('"kind":') if self.opcode == "fusion" else "")
        return next((kind for begin, kind in _KINDS.items() if name.startswith(begin)), self.opcode)

    def _text(self, key: str) -> str:
        found = re.search(rf'{key}"([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: link bytes of one execution, number of executions, and its groups of devices."""

    kind: str
    link_bytes: float
    times: int
    groups: tuple[tuple[int, ...], ...]

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ; device numbers follow the order of the mesh."""
        coordinates = [np.unravel_index(group, tuple(mesh_shape.values())) for group in self.groups]
        return tuple(
            name for axis, name in enumerate(mesh_shape) if any(len(set(c[axis].tolist())) > 1 for c in coordinates)
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a hand-written kernel: dimensions of its float operands, bytes of operands and results, calls."""

    name: str
    operands: tuple[tuple[int, ...], ...]
    bytes: float
    times: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction with everything fused into it: FLOPs and bytes of one execution, number of executions."""

    instruction: Instruction
    flops: float
    bytes: float
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of an optimised program.

    Attributes:
      computations: name -> instructions.
      times: name -> executions per step, for the computations that run.
      fused: names of computations inside a fusion, whose intermediate results never reach main memory.
      unknown: names of loops without a known number of iterations; their bodies count once.
      devices: number of partitions.
    """

    computations: Mapping[str, Sequence[Instruction]]
    times: Mapping[str, int]
    fused: frozenset[str]
    unknown: tuple[str, ...]
    devices: int

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """(instruction, executions) of everything that runs."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times


def read(text: str) -> Program:
    """The program whose text is `compiled.as_text()`."""
    lines: dict[str, list[tuple[str | None, ...]]] = {}
    entry = ""
    for line in text.splitlines():
        if line[:1] in ("E", "%"):
            if head := _COMPUTATION.match(line):
                current = lines.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(found.groups())
    computations = {name: _instructions(found) for name, found in lines.items()}
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    times: collections.Counter[str] = collections.Counter()
    fused: set[str] = set()
    unknown: list[str] = []

    def visit(name: str, runs: int, inside: bool) -> None:
        times[name] += runs
        if inside:
            fused.add(name)
        for instruction in computations[name]:
            iterations = 1
            if instruction.opcode == "while":
                iterations = _iterations(instruction, computations)
                if iterations is None:
                    unknown.append(instruction.name)
            for callee in callees(instruction):
                visit(callee, runs * (iterations or 1), inside or instruction.opcode == "fusion")

    visit(entry, 1, False)
    return Program(computations, times, frozenset(fused), tuple(unknown), int(partitions[1]) if partitions else 1)


def _instructions(lines: Iterable[tuple[str | None, ...]]) -> list[Instruction]:
    """The instructions of a computation, from (ROOT or None, name, what follows the equals sign)."""
    found = [(bool(root), name, *_split(body)) for root, name, body in lines]
    shapes = {name: shape for _, name, shape, *_ in found}
    return [
        Instruction(*parts, tuple(shapes.get(operand, "") for operand in _OPERAND.findall(parts[4]))) for parts in found
    ]


def _split(body: str) -> tuple[str, str, str, str]:
    """ "shape opcode(arguments), attributes" -> these four parts."""
    end = _closing(body, 0) if body[0] == "(" else body.index(" ")  # a tuple's shape contains spaces
    opening = body.index("(", end)
    closing = _closing(body, opening)
    return body[:end], body[end:opening].strip(), body[opening + 1 : closing - 1], body[closing:]


def _closing(text: str, opening: int) -> int:
    """Index after the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in _BRACKET.finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"unbalanced brackets in HLO text: {text[:120]}")


def callees(instruction: Instruction) -> list[str]:
    """Names of the computations that run when the instruction runs, without the scalar functions of reductions."""
    if instruction.opcode in ("async-update", "async-done"):  # async-start has run them
        return []
    names = []
    for kind, value in _CALLS.findall(instruction.attributes):
        if kind != "to_apply" or instruction.opcode == "call":
            names += re.findall(r"[\w.\-]+", value)
    return names


def _iterations(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = {i.name: i for i in computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]}
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
        bound = condition.get(_OPERAND.findall(root.arguments)[-1])
        if bound and bound.opcode == "constant":
            return int(bound.arguments)
    return None


def size_bytes(shape: str, on_chip: bool = False) -> float:
    """Bytes of an array, or of all arrays of a tuple; those in a chip's own memory, S(n), count only with `on_chip`."""
    return float(sum(_array_bytes(*array, on_chip) for array in _ARRAY.findall(shape)))


def _array_bytes(dtype: str, sides: str, layout: str, on_chip: bool) -> int:
    if re.search(r"S\([1-9]", layout) and not on_chip:
        return 0
    width = _ITEM_BYTES[dtype] if dtype in _ITEM_BYTES else max(int(re.search(r"\d+", dtype)[0]), 8) // 8
    return width * math.prod(_integers(sides))


def dimensions(shape: str) -> tuple[tuple[int, ...], ...]:
    """Dimensions of each array in a type."""
    return tuple(_integers(sides) for _, sides, _ in _ARRAY.findall(shape))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def collectives(program: Program) -> list[Collective]:
    """Every collective that runs, in any computation."""
    found = []
    for instruction, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            groups = _groups(instruction, program.devices)
            found.append(Collective(kind, _link_bytes(instruction, len(groups[0])), times, groups))
    return found


def _link_bytes(instruction: Instruction, n: int) -> float:
    """Bytes over links by the module's table, for groups of n devices."""
    arrays = _ARRAY.findall(instruction.shape)
    kind = instruction.opcode.removesuffix("-start")
    if kind != instruction.opcode:  # the type of a -start begins with its operands
        if kind == "all-gather":
            arrays = arrays[len(arrays) // 2 :]
        elif kind == "collective-permute":  # operand, result, two counters
            arrays = arrays[:1]
    size = sum(_array_bytes(*array, on_chip=True) for array in arrays)
    factors = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return size * factors.get(kind, (n - 1) / n)


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that exchange data, in any of XLA's notations; the pairs of a permutation."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return tuple(map(_integers, re.findall(r"\{([\d,]+)\}", pairs[1]))) or ((0,),)
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", text):
        return tuple(map(_integers, re.findall(r"\{([\d,]+)\}", listed[1])))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape(_integers(iota[2]))
        return _rows(ids.transpose(_integers(iota[3])) if iota[3] else ids, _integers(iota[1])[-1])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        along = re.findall(r"'([^']+)'", mesh[4])
        order = [name for name in sizes if name not in along] + along
        ids = np.arange(devices).reshape(_integers(mesh[2]) if mesh[2] else -1)
        ids = (ids.transpose(_integers(mesh[3])) if mesh[3] else ids).reshape(tuple(sizes.values()))
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return _rows(ids, math.prod(sizes[name] for name in along))
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"unknown notation of replica groups: {text[:200]}")
    return (tuple(range(devices)),)


def _rows(ids: np.ndarray, width: int) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, ids.reshape(-1, width).tolist()))


def kernels(program: Program) -> list[Kernel]:
    """Calls of hand-written kernels, whose inside XLA's cost analysis does not count."""
    found = []
    for instruction, times in program.instructions():
        if instruction.target.startswith(_KERNEL_TARGETS):
            floats = (shape for shape in instruction.operand_shapes if shape.startswith(("f", "bf")))
            operands = tuple(sides for shape in floats for sides in dimensions(shape))
            name = instruction.target if instruction.target.startswith("__cudnn") else instruction.name
            found.append(Kernel(name, operands, _traffic(instruction), times))
    return found


def _traffic(instruction: Instruction) -> float:
    """Bytes that one execution reads from and writes to main memory."""
    if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith("-done"):
        return 0.0
    result = instruction.shape
    if instruction.target.startswith(_LIBRARIES):
        result = re.sub(r"\b[su]8\[\d+\]", "", result)  # workspace
    return sum(map(size_bytes, (result, *instruction.operand_shapes)))


def operations(program: Program) -> Iterator[Operation]:
    """Every operation that has FLOPs or moves bytes."""

    def flops(instruction: Instruction) -> float:
        inside = callees(instruction) if instruction.opcode == "fusion" else ()
        return _product_flops(instruction) + sum(map(computation_flops, inside))

    @functools.cache
    def computation_flops(name: str) -> float:
        return sum(map(flops, program.computations[name]))

    for name, times in program.times.items():
        if name not in program.fused:
            for instruction in program.computations[name]:
                operation = Operation(instruction, flops(instruction), _traffic(instruction), times)
                if operation.flops or operation.bytes:
                    yield operation


def repeated(found: Iterable[Operation]) -> tuple[float, float]:
    """(FLOPs, bytes) of all loop iterations after the first, which XLA's cost analysis leaves out."""
    again = [operation for operation in found if operation.times > 1]
    return (
        float(sum((operation.times - 1) * operation.flops for operation in again)),
        float(sum((operation.times - 1) * operation.bytes for operation in again)),
    )


def heaviest(found: Iterable[Operation], count: int = 12) -> list[tuple[str, int, float]]:
    """The JAX operations with the most memory traffic: (operation, executions, bytes per step).

    Operations whose names differ only in numbers are summed.
    """
    traffic: dict[str, float] = collections.defaultdict(float)
    executions: dict[str, int] = collections.defaultdict(int)
    for operation in found:
        instruction = operation.instruction
        key = f"{instruction.opcode} {re.sub(r'[0-9]+', '*', instruction.source)}"
        traffic[key] += operation.times * operation.bytes
        executions[key] += operation.times
    return [(key, executions[key], traffic[key]) for key in sorted(traffic, key=traffic.get, reverse=True)[:count]]


def kinds(found: Iterable[Operation]) -> dict[str, tuple[int, float, float]]:
    """Kind of kernel -> (executions, FLOPs, bytes) per step, most executions first."""
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for operation in found:
        row = sums[operation.instruction.kind]
        for i, value in enumerate((1, operation.flops, operation.bytes)):
            row[i] += operation.times * value
    return {kind: tuple(sums[kind]) for kind in sorted(sums, key=lambda kind: -sums[kind][0])}


def _product_flops(instruction: Instruction) -> float:
    """FLOPs of a matrix product or convolution; 0 for anything else."""
    if instruction.target.startswith(("__cudnn$conv", "__cublas")):
        return _library_flops(instruction)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    outputs = math.prod(dimensions(instruction.shape)[0])
    left, right = (dimensions(shape)[0] for shape in instruction.operand_shapes[:2])
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.attributes)
        return 2.0 * outputs * math.prod(left[axis] for axis in (_integers(axes[1]) if axes else ()))
    return 2.0 * _convolution_products(instruction, left, right)


def _library_flops(instruction: Instruction) -> float:
    """FLOPs of a call of cuBLAS or of cuDNN's convolutions; kernel positions over padding count."""
    result = dimensions(instruction.shape)[0]
    left, right = (dimensions(shape)[0] for shape in instruction.operand_shapes[:2])
    if instruction.target.startswith("__cublas"):
        axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    # XLA keeps the labels of the forward convolution: which of the three is input, kernel and output is in the name.
    kernel, output = {"Input": (right, left), "Filter": (result, right)}.get(
        instruction.target.partition("Backward")[2], (right, result)
    )
    _, labels, _ = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    return 2.0 * math.prod(output) * math.prod(kernel) / kernel[labels.index("o")]


def _convolution_products(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Multiplications of a convolution as XLA counts them: none with padding or with a zero between inputs.

    This matters on TPUs, where matrix products are convolutions, too: their batch axes are windows, mostly of padding.
    """
    inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def setting(name: str, axis: int, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    sizes = dict(zip(outputs, dimensions(instruction.shape)[0], strict=True))
    products = float(sizes["b"] * sizes["f"] * right[kernel.index("i")])
    for label in sorted(filter(str.isdigit, outputs)):
        axis = int(label)
        stride, spread, apart = (int(setting(name, axis, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(setting("pad", axis, "0_0").split("_")[0])
        # [output position, kernel position] -> position in the padded input with its zeros.
        at = np.arange(sizes[label])[:, None] * stride + np.arange(right[kernel.index(label)]) * spread - low
        end = (left[inputs.index(label)] - 1) * apart + 1
        products *= np.count_nonzero((at >= 0) & (at < end) & (at % apart == 0))
    return products
