"""cuDNN's own answer, for a GPU that is not here: does it build a plan for a call of attention, or why not?

cuDNN takes a card's properties for the card (deviceless ahead-of-time compilation, cuDNN 9.8) and compiles the plan's
kernel for its compute capability. It links against the driver's library, in whose place `make test-cudnn` puts
cuda_without_gpu.c. The graphs are those that XLA makes of jax's custom calls `__cudnn$fmhaSoftmax` and
`__cudnn$fmhaSoftmaxBackward`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from lcm_jax.cost import chips

KIB = 2**10
FORWARD, BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"  # jax's primitives


# One of each compute capability, and what `chips` does not know of it: the most blocks on an SM (CUDA programming
# guide) and the bits of the memory bus (data sheets).
CARDS = {
    "a100-80": (32, 5120),
    "a10g": (16, 384),
    "rtx4090": (24, 384),
    "h100": (32, 5120),
    "b200": (32, 8192),
    "rtx5090": (24, 512),
}


@dataclasses.dataclass(frozen=True, order=True)
class Call:
    """What jax hands to cuDNN: q [b s n d] over k and v [b l n d]."""

    backward: bool
    statistics: bool  # whether the forward pass keeps the logarithms of its sums for the backward one
    dtype: str
    padded: bool  # whether the lengths of the sequences are given
    q: tuple[int, ...]
    k: tuple[int, ...]
    scale: float


def calls(function: Any, *args: Any) -> set[Call]:
    """Those in the jaxpr of a function; args: ShapeDtypeStructs."""
    return set(_calls(jax.make_jaxpr(function)(*args).jaxpr))


def _calls(jaxpr: core.Jaxpr) -> Iterator[Call]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in (FORWARD, BACKWARD):
            layout, mask, biases = params["layout"], params["mask_type"].name, params["variadic_args"]
            assert layout == 0 and mask in ("NO_MASK", "PADDING") and not any(biases)  # what `refusal` builds
            q, k = (x.aval for x in equation.invars[:2])
            backward = name == BACKWARD
            statistics = not backward and params["is_training"]
            yield Call(backward, statistics, q.dtype.name, mask == "PADDING", q.shape, k.shape, params["scale"])
        for inner in core.jaxprs_in_params(params):
            yield from _calls(inner)


def refusal(card: str, call: Call) -> str:
    """Why cuDNN builds no plan for the call on that card; empty if it does."""
    import cudnn  # which, with its libraries, only `make test-cudnn` has

    types = cudnn.data_type
    graph = cudnn.pygraph(
        sm_version=_version(card),
        device_property=_properties(card),
        io_data_type={"bfloat16": types.BFLOAT16, "float16": types.HALF}[call.dtype],
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
    )
    b, s, n, d = call.q
    queries, keys = _geometry(call.q), _geometry(call.k)
    options: dict[str, Any] = {"attn_scale": call.scale}
    if call.padded:
        lengths = [graph.tensor(dim=[b, 1, 1, 1], stride=[1, 1, 1, 1], data_type=types.INT32) for _ in "qk"]
        options |= {"use_padding_mask": True, "seq_len_q": lengths[0], "seq_len_kv": lengths[1]}
    q, k, v = (graph.tensor(**geometry) for geometry in (queries, keys, keys))
    if call.backward:
        o, do = graph.tensor(**queries), graph.tensor(**queries)
        stats = graph.tensor(dim=[b, n, s, 1], stride=[n * s, s, 1, 1], data_type=types.FLOAT)
        outputs = graph.sdpa_backward(q=q, k=k, v=v, o=o, dO=do, stats=stats, **options)
    else:
        *outputs, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=call.statistics, **options)
        if call.statistics:
            stats.set_output(True).set_data_type(types.FLOAT)
    for output, geometry in zip(outputs, (queries, keys, keys), strict=False):  # o; or the gradients of q, k and v
        output.set_output(True).set_dim(geometry["dim"]).set_stride(geometry["stride"])
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])  # as XLA does
        graph.check_support()
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _version(card: str) -> int:
    """89 for compute capability 8.9."""
    major, minor = chips.GPUS[card].capability
    return 10 * major + minor


def _geometry(shape: tuple[int, ...]) -> dict[str, list[int]]:
    """An array [b s n d] as it is in memory, in cuDNN's order b n s d."""
    b, s, n, d = shape
    return {"dim": [b, n, s, d], "stride": [s * n * d, d, n * d, 1]}


@functools.cache
def _properties(card: str) -> Any:
    import cudnn

    gpu, (blocks, bus) = chips.GPUS[card], CARDS[card]
    properties = {
        "deviceVer": 10 * _version(card),
        "deviceName": gpu.device_kind,
        "multiProcessorCount": gpu.sms,
        "maxSharedMemoryPerBlockOptin": gpu.shared_bytes - KIB,
        "maxThreadsPerSM": gpu.threads,
        "maxCtasPerSM": blocks,
        "totalGlobalMem": gpu.card_bytes,
        "smClockRateKHz": int(1e6 * gpu.clock_ghz),
        "l2CacheSize": gpu.l2_bytes,
        "memClockRateKHz": int(gpu.hbm_bandwidth / (bus / 8) / 2 / 1e3),  # two transfers a cycle
        "memoryBusWidth": bus,
        # The same of all of them.
        "warpSize": 32,
        "maxSharedMemoryPerBlock": 48 * KIB,
        "reservedSharedMemoryPerBlock": KIB,
        "oversizedSharedMemoryPerBlock": 0,
        "maxRegistersPerSM": 65536,
        "regsPerBlock": 65536,
        "maxThreadsPerBlock": 1024,
        "maxBlockSize": [1024, 1024, 64],
        "maxGridSize": [2**31 - 1, 65535, 65535],
        "supportCoopLaunch": 1,
        "driverVer": 12090,
        "smCountOrigin": 0,
        "pciDeviceId": 0,
        "isTccDriver": 0,
        "cudaDeviceId": 0,
    }
    return cudnn.create_device_properties(json.dumps(properties))
