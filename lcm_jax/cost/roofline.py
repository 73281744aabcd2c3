"""What a compiled step needs of a chip, and the least time it can take there.

    time         the largest of  FLOPs / peak,  HBM bytes / bandwidth,  link bytes / bandwidth,  DCN bytes / bandwidth
    utilisation  model FLOPs of the step (runtime/cost/flops.py, nothing computed twice) / (devices x peak x time)

FLOPs and bytes are XLA's own of the optimised program, which count a loop's body once and the inside of hand-written
kernels not at all; what is missing is added (runtime/cost/hlo.py; attention kernels by their products). XLA leaves out
what convolutions do with padding, so that the model's FLOPs are the least that the time is reckoned with. Compute,
memory and network are taken to overlap perfectly, and units that a small matrix leaves idle to work: an upper bound.
"serial" is a nearer one: each operation bound by its own FLOPs or bytes, one after another, behind which the network
hides.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lcm_jax.cost import chips, hlo
from lcm_jax.cost import hlo as operations_lib

GIB = 2**30

# Part of a kernel's name -> products of [queries, keys, head size] that it computes.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4, "fmhaSoftmaxBackward": 5, "fmhaSoftmax": 2}
_FUSED_BACKWARD = 5  # splash_mha_dkv where it computes dq as well, instead of a kernel for it


def report(
    compiled: Any,
    mesh: Mesh,
    images: int,
    model_flops: float,
    chip: chips.Chip | None = None,
    options: dict[str, Any] | None = None,
    encoders: float = 0.0,
) -> dict[str, Any]:
    """What the compiled step needs, per device, as JSON values.

    Args:
      compiled: `jax.stages.Compiled` of a step.
      mesh: that it was compiled for.
      images: per step over all devices.
      model_flops: of the whole step over all devices.
      chip: its constants; None: of the mesh's devices, and no times where these are not known.
      options: compile options, for the record.
      encoders: bytes that a device holds beside the step.
    """
    chip = chip or chips.lookup(mesh.devices.flat[0].device_kind)
    program = hlo.read(compiled.as_text())
    cost = compiled.cost_analysis()
    operations = list(operations_lib.operations(program))
    loop_flops, loop_bytes = operations_lib.repeated(operations)
    kernels = _kernels(program)
    kernel_flops = sum(kernel["calls"] * kernel["flops"] for kernel in kernels)
    kernel_bytes = sum(kernel["calls"] * kernel["bytes"] for kernel in kernels)
    collectives, link, dcn = _collectives(program, mesh)
    flops = {"xla": cost.get("flops", 0.0), "loops": loop_flops, "kernels": kernel_flops}
    memory = {"xla": cost.get("bytes accessed", 0.0), "loops": loop_bytes, "kernels": kernel_bytes}
    found: dict[str, Any] = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "images_per_step": images,
        "images_per_device": images / mesh.size,
        "memory": _memory(compiled, encoders),
        "flops": flops | {"total": sum(flops.values())},
        "bytes": memory | {"total": sum(memory.values())},
        "collectives": collectives,
        "link_bytes": link,
        "dcn_bytes": dcn,
        "model_flops": model_flops / mesh.size,
        "kernels": kernels,
        "loops_of_unknown_length": len(program.unknown),
        "heaviest": [{"operation": o, "count": n, "bytes": b} for o, n, b in operations_lib.heaviest(operations)],
        "compile_options": options or {},
        "jax": jax.__version__,
    }
    return found | (_times(found, operations, chip) if chip else {"chip": None})


def _memory(compiled: Any, encoders: float) -> dict[str, float]:
    """Bytes: of arguments, of results that take no argument's place, of temporaries, of code, of VAE and text encoders
    beside the step; "needed": all of them."""
    stats = compiled.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "encoders": encoders,
    }
    return parts | {"needed": sum(parts.values())}


def _times(found: dict[str, Any], operations: list[operations_lib.Operation], chip: chips.Chip) -> dict[str, Any]:
    seconds = {
        "flops": max(found["flops"]["total"], found["model_flops"]) / chip.peak_flops,
        "hbm": found["bytes"]["total"] / chip.hbm_bandwidth,
        "links": found["link_bytes"] / chip.link_bandwidth,
        "dcn": found["dcn_bytes"] / chip.dcn_bandwidth,
    }
    work = [(one.times, one.flops, one.bytes) for one in operations if one.instruction.opcode != "custom-call"]
    work += [(kernel["calls"], kernel["flops"], kernel["bytes"]) for kernel in found["kernels"]]
    serial = sum(n * max(flops / chip.peak_flops, size / chip.hbm_bandwidth) for n, flops, size in work)
    bound = max(seconds, key=seconds.__getitem__)
    time = seconds[bound]
    return {
        "chip": dataclasses.asdict(chip),
        "seconds": seconds | {"roofline": time, "bound": bound, "serial": serial},
        "utilisation": found["model_flops"] / (chip.peak_flops * time),
        "serial_utilisation": found["model_flops"] / (chip.peak_flops * max(serial, time)),
        "images_per_second_per_device": found["images_per_device"] / time,
        "collective_share": (seconds["links"] + seconds["dcn"]) / time,
        "hbm_share": found["memory"]["needed"] / chip.hbm_bytes,
    }


def _kernels(program: hlo.Program) -> list[dict[str, Any]]:
    """Kernels of one kind and shape as one entry. FLOPs of a kernel that is not known here: 0, and `known` false."""
    found = hlo.kernels(program)
    fused = not any("splash_mha_dq" in kernel.name for kernel in found)
    merged: dict[tuple, dict[str, Any]] = {}
    for kernel in found:
        name = kernel.name.rstrip("0123456789.")
        products = next((n for part, n in _PRODUCTS.items() if part in kernel.name), 0)
        if "splash_mha_dkv" in kernel.name and fused:
            products = _FUSED_BACKWARD
        q, k = (*kernel.operands, (), ())[:2]
        flops = _attention_flops(kernel.name, q, k) * products if products else 0.0
        entry = merged.setdefault(
            (name, q, k),
            {
                "name": name,
                "q": list(q),
                "k": list(k),
                "calls": 0,
                "flops": flops,
                "bytes": kernel.bytes,
                "known": bool(products),
            },
        )
        entry["calls"] += kernel.times
    return list(merged.values())


def _attention_flops(name: str, q: tuple[int, ...], k: tuple[int, ...]) -> float:
    """Of one product of all queries with all keys: splash has [... tokens head], cuDNN [b tokens heads head]."""
    return 2.0 * math.prod(q) * (k[1] if "fmha" in name else k[-2])


def _collectives(program: hlo.Program, mesh: Mesh) -> tuple[dict[str, Any], float, float]:
    """({kind: {"axis+axis": {"count", "bytes"}}}, bytes over links, bytes over the data-centre network).

    What crosses slices (TPU) or nodes (GPU) goes around inside each of them first, and a chip's share of it then from
    one to the other.
    """
    shape = dict(mesh.shape)
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    found: dict[str, Any] = {}
    link = dcn = 0.0
    for collective in hlo.collectives(program):
        axes = collective.axes(shape)
        total = collective.times * collective.link_bytes
        entry = found.setdefault(collective.kind, {}).setdefault("+".join(axes) or "none", {"count": 0, "bytes": 0.0})
        entry["count"] += collective.times
        entry["bytes"] += total
        size = len(collective.groups[0])
        islands = _nodes(collective.groups[0]) if is_gpu else shape["slice"] if "slice" in axes else 1
        if islands == 1:
            link += total
            continue
        inside = size // islands
        # Bytes follow (n - 1) / n of the same payload, in a ring of an island's chips and in one of the islands.
        payload = total * size / (size - 1)
        link += payload * (inside - 1) / inside
        dcn += payload * (islands - 1) / islands / inside
    return found, link, dcn


def _nodes(group: Sequence[int]) -> int:
    """How many nodes the GPUs of a group are in."""
    return len({device // chips.NODE for device in group})


def text(found: dict[str, Any]) -> str:
    """The report in lines for a reader."""
    memory, chip = found["memory"], found["chip"]
    sizes = ", ".join(f"{size} {axis}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    rows = [
        ("devices", f"{found['devices']} x {found['device_kind']} ({sizes})"),
        ("images", f"{found['images_per_step']} a step, {found['images_per_device']:g} a device"),
        ("arguments", _gib(memory["arguments"])),
        ("temporaries", _gib(memory["temporaries"])),
        (
            "peak HBM",
            _gib(memory["needed"])
            + (f" of {_gib(chip['hbm_bytes'])} ({found['hbm_share']:.0%})" if chip else "")
            + ", code, results and encoders included",
        ),
        (
            "FLOPs",
            f"{found['flops']['total']:.3e} (kernels {found['flops']['kernels']:.2e}, "
            f"repeated turns of loops {found['flops']['loops']:.2e}); the model's {found['model_flops']:.3e}",
        ),
        (
            "bytes",
            f"{found['bytes']['total']:.3e} (kernels {found['bytes']['kernels']:.2e}, "
            f"repeated turns of loops {found['bytes']['loops']:.2e})",
        ),
    ]
    for kind, by_axis in found["collectives"].items():
        for axis, entry in by_axis.items():
            rows.append((kind, f"{_gib(entry['bytes'])} over {axis}, {entry['count']} times"))
    if found["loops_of_unknown_length"]:
        rows.append(("caution", f"{found['loops_of_unknown_length']} loops of unknown length count as one turn"))
    for kernel in found["kernels"]:
        if not kernel["known"]:
            rows.append(("caution", f"the FLOPs of kernel {kernel['name']} are not known and count nothing"))
    return "\n".join(f"{name:<18} {value}" for name, value in rows + (_time_rows(found) if chip else [])) + "\n"


def _time_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    chip, seconds = found["chip"], found["seconds"]
    parts = ", ".join(f"{name} {1e3 * seconds[name]:.1f}" for name in ("flops", "hbm", "links", "dcn"))
    return [
        (
            "chip",
            f"{chip['name']}: {chip['peak_flops'] / 1e12:g} TFLOP/s, {chip['hbm_bandwidth'] / 1e9:g} GB/s of HBM, "
            f"{chip['link_bandwidth'] / 1e9:g} GB/s of links, {chip['dcn_bandwidth'] / 1e9:g} GB/s of DCN",
        ),
        ("roofline", f"{1e3 * seconds['roofline']:.1f} ms, bound by {seconds['bound']} (ms: {parts})"),
        (
            "one by one",
            f"{1e3 * seconds['serial']:.1f} ms, utilisation {found['serial_utilisation']:.1%}: each "
            "operation by its own FLOPs or bytes",
        ),
        ("images/s/chip", f"{found['images_per_second_per_device']:.2f}"),
        (
            "utilisation",
            f"{found['utilisation']:.1%} of peak, modelled; collectives {found['collective_share']:.1%} of the time",
        ),
        ("compile options", ", ".join(f"{k}={v}" for k, v in found["compile_options"].items()) or "none"),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
