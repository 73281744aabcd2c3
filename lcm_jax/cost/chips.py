"""Peak FLOP/s, memory and bandwidths of chips, and how to name several of them.

    peak_flops      dense bfloat16 FLOP/s, sums in float32
    hbm_bytes       memory per chip that XLA may use (its error says "of 15.75G hbm" on a v5e); of a GPU the share POOL
    hbm_bandwidth   bytes/s
    link_bandwidth  bytes/s that a chip receives over the inter-chip network in a collective. TPU: one direction of one
                    link per dimension of the torus, which is all that a corner chip of a slice without wrap-around has.
                    GPU: NVLink, or PCI Express x16 where there is none
    dcn_bandwidth   bytes/s per chip between slices (TPU) or between nodes of eight (GPU)

Sources. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak 275, 197, 459, 918 TFLOP/s; HBM 32, 16, 95, 32 GB at
1200, 819, 2765, 1638 GB/s; bidirectional bandwidth of all links 600 (v4: 6 of 50 GB/s each way), 400, 1200, 800 GB/s
over 6, 4, 6, 4 ports; data-centre network v5p 50 Gbit/s a chip, v5e 6.4 Tbit/s a pod of 256, v6e 4 x 200 Gbit/s a host
of 8, v4 assumed equal to v5p. GPU: NVIDIA's data sheets and architecture papers (SXM where there is a choice), the
table of compute capabilities in the CUDA programming guide, and for `card_bytes` what CUDA reports as total memory;
network 200 (A100), 400 (H100, H200, B200) Gbit/s a GPU, for others 100 Gbit/s a node, which is an assumption.
"""

import dataclasses
import math
import re

from lcm_jax.errors import LcmError

GIB = 2**30
GPUS_PER_NODE = 8  # of a topology with several nodes; their numbers are consecutive
POOL = 0.92  # share of a GPU's memory that XLA takes
# Outside of it, usual sizes, not measured: CUDA and its libraries; the buffers of collectives between several GPUs.
CONTEXT, NCCL = int(0.6 * GIB), int(0.5 * GIB)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Constants of one chip (not of one of its cores) in FLOP/s, bytes and bytes/s; see the module."""

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """A GPU, as XLA's compiler needs to know it.

    Attributes:
      device_kind: jax's name.
      card_bytes: all its memory.
      capability: CUDA's compute capability.
      sms: streaming multiprocessors. lanes: float32 units of each. clock_ghz: boost clock.
      l2_bytes: second-level cache. shared_bytes: shared memory of an SM. threads: of an SM at most.
    """

    device_kind: str
    card_bytes: int
    capability: tuple[int, int]
    sms: int
    lanes: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    threads: int


def _gpu(name, kind, capability, gib, bandwidth, peak, link, dcn, sms, clock, l2) -> Gpu:
    """Units as on data sheets: GiB, GB/s, TFLOP/s, GHz, MiB."""
    lanes, shared, threads = {
        (8, 0): (64, 164, 2048),
        (8, 6): (128, 100, 1536),
        (8, 9): (128, 100, 1536),
        (9, 0): (128, 228, 2048),
        (10, 0): (128, 228, 2048),
        (12, 0): (128, 100, 1536),
    }[capability]
    return Gpu(
        name=name,
        peak_flops=peak * 1e12,
        hbm_bytes=POOL * int(gib * GIB),
        hbm_bandwidth=bandwidth * 1e9,
        link_bandwidth=link * 1e9,
        dcn_bandwidth=dcn * 1e9,
        device_kind=kind,
        card_bytes=int(gib * GIB),
        capability=capability,
        sms=sms,
        lanes=lanes,
        clock_ghz=clock,
        l2_bytes=l2 * 2**20,
        shared_bytes=shared * 2**10,
        threads=threads,
    )


_SLOW = 100 / 8 / GPUS_PER_NODE  # GB/s of a GPU, of a node's 100 Gbit/s

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1200e9, 3 * 50e9, 6.25e9),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 2 * 50e9, 3.125e9),
        Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 3 * 100e9, 6.25e9),
        Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 2 * 100e9, 12.5e9),
        _gpu("rtx3060", "NVIDIA GeForce RTX 3060", (8, 6), 11.76, 360, 25.4, 32, _SLOW, 28, 1.777, 3),
        _gpu("rtx4080", "NVIDIA GeForce RTX 4080", (8, 9), 15.70, 716.8, 97.5, 32, _SLOW, 76, 2.505, 64),
        _gpu("l4", "NVIDIA L4", (8, 9), 21.96, 300, 121, 32, _SLOW, 58, 2.04, 48),
        _gpu("a10g", "NVIDIA A10G", (8, 6), 22.20, 600, 70, 32, _SLOW, 80, 1.71, 6),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 23.65, 1008, 165, 32, _SLOW, 128, 2.52, 72),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 23.69, 936, 71, 32, _SLOW, 82, 1.695, 6),
        _gpu("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 31.36, 1792, 209, 64, _SLOW, 170, 2.407, 96),
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", (8, 0), 39.39, 1555, 312, 300, 25, 108, 1.41, 40),
        _gpu("l40s", "NVIDIA L40S", (8, 9), 44.52, 864, 362, 32, _SLOW, 142, 2.52, 96),
        _gpu("a100-80", "NVIDIA A100-SXM4-80GB", (8, 0), 79.25, 2039, 312, 300, 25, 108, 1.41, 40),
        _gpu("h100", "NVIDIA H100 80GB HBM3", (9, 0), 79.11, 3352, 989, 450, 50, 132, 1.98, 50),
        _gpu("h200", "NVIDIA H200", (9, 0), 139.8, 4800, 989, 450, 50, 132, 1.98, 50),
        _gpu("b200", "NVIDIA B200", (10, 0), 178.3, 8000, 2250, 900, 50, 148, 1.965, 126),
    )
}
GPUS = {name: chip for name, chip in CHIPS.items() if isinstance(chip, Gpu)}

# Words in jax's device_kind -> chip; the first match counts.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "A100-SXM4-40GB": "a100-40",
    "A100": "a100-80",
    "H100": "h100",
} | {gpu.device_kind.removeprefix("NVIDIA "): name for name, gpu in GPUS.items()}
# Chips of the same name with other numbers.
_VARIANT = re.compile(r"\b(PCI[eE]|MIG|NVL|Ti|SUPER|Laptop|D)\b")

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}


def lookup(device_kind: str) -> Chip | None:
    """The chip with jax's `device_kind`; None if its constants are unknown, as for a CPU."""
    if _VARIANT.search(device_kind):
        return None
    return next((CHIPS[name] for kind, name in _KINDS.items() if re.search(rf"\b{kind}\b", device_kind)), None)


def of_topology(topology: str) -> tuple[Chip, int]:
    """Chip and number of chips: "v5e:4x4" -> (v5e, 16), "h100:8" -> (h100, 8), "h100:2x8" (two nodes) -> (h100, 16).

    Raises:
      LcmError: unknown topology; the message lists the known ones.
    """
    name, _, shape = topology.partition(":")
    if shape in TOPOLOGIES.get(name, ()):
        return CHIPS[name], math.prod(map(int, shape.split("x")))
    if name in GPUS and (found := re.fullmatch(rf"([1-{GPUS_PER_NODE}])|([1-9]\d{{0,3}})x{GPUS_PER_NODE}", shape)):
        return GPUS[name], int(found[1] or GPUS_PER_NODE * int(found[2]))
    known = "; ".join(f"{name}:{{{','.join(shapes)}}}" for name, shapes in TOPOLOGIES.items())
    raise LcmError(
        f"unknown topology {topology!r}; choose one of {known}; {{{','.join(GPUS)}}}:N for up to {GPUS_PER_NODE} GPUs, "
        f":Mx{GPUS_PER_NODE} for M nodes of {GPUS_PER_NODE}"
    )
