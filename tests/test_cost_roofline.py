"""Bytes of a collective inside and between islands of fast links; FLOPs of attention kernels."""

import types

import numpy as np
import pytest

from lcm_jax.cost import chips, hlo, roofline

GPUS = {"slice": 1, "data": 4, "fsdp": 8}  # four nodes of eight
ALL = (tuple(range(32)),)
NODES = tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(4))
ACROSS = tuple(tuple(range(i, 32, 8)) for i in range(8))  # one GPU of each node


@pytest.mark.parametrize(
    ("platform", "shape", "groups", "received", "want"),
    [
        # Of a ring's 31/32 payloads, 7/8 stay inside the nodes, and an eighth of 3/4 goes between them.
        ("gpu", GPUS, ALL, 31.0, (32 * 7 / 8, 32 * 3 / 4 / 8)),
        ("gpu", GPUS, NODES, 7.0, (7.0, 0.0)),
        ("gpu", GPUS, ACROSS, 3.0, (0.0, 3.0)),
        ("tpu", GPUS, ALL, 31.0, (31.0, 0.0)),
        ("tpu", {"slice": 2, "data": 1, "fsdp": 4}, (tuple(range(8)),), 7.0, (8 * 3 / 4, 8 / 2 / 4)),
    ],
    ids=["nodes", "inside nodes", "across nodes", "one slice", "two slices"],
)
def test_link_and_network_bytes(monkeypatch, platform, shape, groups, received, want):
    mesh = types.SimpleNamespace(shape=shape, devices=np.array([types.SimpleNamespace(platform=platform)]))
    collective = hlo.Collective("all-gather", received, 1, groups)
    monkeypatch.setattr(hlo, "collectives", lambda program: [collective])
    assert roofline._collectives(None, mesh)[1:] == pytest.approx(want)


@pytest.mark.parametrize("separate_dq", [False, True])
def test_flops_of_attention_kernels(monkeypatch, separate_dq):
    """A product of all queries with all keys has 2 b n l l' d FLOPs; dkv computes dq, too, if no other kernel does."""
    q, k, cudnn = (2, 8, 4096, 40), (2, 8, 1024, 40), (2, 4096, 8, 40)
    operands = {"splash_mha_fwd.3": (q, k), "splash_mha_dkv.1": (q, k), "__cudnn$fmhaSoftmax": (cudnn, cudnn)}
    operands |= {"splash_mha_dq": (q, k)} if separate_dq else {}
    kernels = [hlo.Kernel(name, shapes, 1.0, 3) for name, shapes in ({"mine": ()} | operands).items()]
    monkeypatch.setattr(hlo, "kernels", lambda program: kernels)
    found = {kernel["name"]: kernel["flops"] for kernel in roofline._kernels(None)}
    one, cudnn_one = (2 * 2 * 8 * 4096 * keys * 40 for keys in (1024, 4096))
    want = {"mine": 0, "splash_mha_fwd": 2 * one, "splash_mha_dkv": (4 if separate_dq else 5) * one}
    assert found == want | {"__cudnn$fmhaSoftmax": 2 * cudnn_one} | ({"splash_mha_dq": 3 * one} if separate_dq else {})


def test_memory_of_a_gpu():
    """cuDNN's gradient of attention sums dq in float32, before Hopper twice; CUDA itself takes its part of the card."""
    sizes = {"argument_size": 100, "output_size": 50, "alias_size": 40, "temp_size": 7, "generated_code_size": 3}
    stats = types.SimpleNamespace(**{f"{name}_in_bytes": size for name, size in sizes.items()})
    compiled = types.SimpleNamespace(memory_analysis=lambda: stats)
    kernels = [{"name": "__cudnn$fmhaSoftmaxBackward", "q": [2, 64, 8, 40]}, {"name": "__cudnn$fmhaSoftmax", "q": [9]}]

    def memory(chip, devices=1):
        return roofline._memory(compiled, 1000, kernels, chip, devices)

    dq = 4 * 2 * 64 * 8 * 40
    for name, copies in {"h100": 1, "rtx4090": 2, "a100-80": 2}.items():
        found = memory(chips.GPUS[name])
        assert found["workspace"] == copies * dq
        assert found["needed"] == 100 + (50 - 40) + 7 + 3 + 1000 + found["workspace"]
        assert found["available"] == chips.POOL * chips.GPUS[name].card_bytes and found["outside"] == chips.CONTEXT
    small = chips.GPUS["rtx3060"]
    assert memory(small, 2)["available"] == small.card_bytes - chips.CONTEXT - chips.NCCL < small.hbm_bytes
    assert memory(chips.CHIPS["v5e"])["available"] == 15.75 * chips.GIB
    assert "available" not in memory(None)
