"""Chips by jax's device kinds, and slices by name."""

import pytest

from lcm_jax.cost import chips
from lcm_jax.errors import LcmError

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
}


def test_lookup_by_device_kind():
    assert {kind: chips.lookup(kind).name for kind in KINDS} == KINDS
    others = "GeForce RTX 3090 Ti", "H100 PCIe", "H100 NVL", "A100-PCIE-40GB", "H100 80GB HBM3 MIG 1g.10gb"
    for unknown in ("cpu", "TPU v3", "Tesla T4", *(f"NVIDIA {name}" for name in others)):
        assert chips.lookup(unknown) is None, unknown


def test_topology_gives_chip_and_count():
    for topology, want in {"v5e:4x4": 16, "v5p:2x2x4": 16, "v5e:16x16": 256, "v5p:4x8x8": 256}.items():
        chip, count = chips.of_topology(topology)
        assert (chip.name, count) == (topology[:3], want)
    for topology, want in {"h100:8": 8, "h100:2x8": 16, "rtx4090:1": 1, "a100-80:32x8": 256}.items():
        chip, count = chips.of_topology(topology)
        assert (chip.name, count) == (topology.partition(":")[0], want)


@pytest.mark.parametrize(
    "topology", ["v5e:4x5", "v7:2x2", "v5e", "v5p:4x4", "", "v5e:16", "h100", "h100:9", "h100:2x4", "t4:1"]
)
def test_unknown_topology_lists_the_known_ones(topology):
    with pytest.raises(LcmError, match=r"unknown topology '.*'; .*v5e:\{2x2,2x4,4x4.*v5p:\{2x2x1"):
        chips.of_topology(topology)


def test_memory_is_what_cuda_reports_and_not_the_data_sheets_figure():
    """A card's own GB, taken for GiB, would be more than it has; what torch prints as the capacity of each."""
    reported = {"h200": 139.8, "h100": 79.11, "rtx4090": 23.65, "l40s": 44.52}
    assert {name: round(chips.GPUS[name].card_bytes / chips.GIB, 2) for name in reported} == reported


def test_constants_have_plausible_units():
    for chip in chips.CHIPS.values():
        assert chip.peak_flops > chip.hbm_bandwidth > chip.link_bandwidth > chip.dcn_bandwidth > 1e9
        assert 10 * chips.GIB < chip.hbm_bytes < 200 * chips.GIB
    for name, gpu in chips.GPUS.items():
        lanes = 2e9 * gpu.sms * gpu.lanes * gpu.clock_ghz  # FLOP/s outside the matrix units
        assert 1.9 < gpu.peak_flops / lanes < 40 and gpu.hbm_bytes + chips.CONTEXT < gpu.card_bytes, name
