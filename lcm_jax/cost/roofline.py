"""What a compiled step needs per device, and a lower bound on the time it takes.

    time         max(FLOPs / peak, HBM bytes / HBM bandwidth, link bytes / link bandwidth, DCN bytes / DCN bandwidth)
    utilisation  model FLOPs of the step (flops.py) / (devices x peak x time)

FLOPs and bytes are those of XLA's cost analysis (hlo.py's for GPUs, where XLA gives none), which counts a loop's body
once and the inside of hand-written kernels not at all; hlo.py provides the missing iterations, and attention kernels
are counted by their products. XLA leaves out what convolutions do with padding, so the time never counts fewer FLOPs
than the model has.

The bound assumes that compute, memory and network overlap perfectly and that small matrices fill the matrix units, so
the utilisation is an upper bound. "serial" is closer: the operations run one after another, each limited by its own
FLOPs or bytes, and hide the network.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from lcm_jax.cost import chips, hlo
from lcm_jax.cost.chips import GIB

# Part of a kernel's name -> number of products of [queries, keys, head size] that it computes; the first match counts.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4, "fmhaSoftmaxBackward": 5, "fmhaSoftmax": 2}
PARTS = ("arguments", "results", "temporaries", "code", "workspace", "encoders")  # of the memory that XLA takes
_FUSED_BACKWARD = 5  # products of splash_mha_dkv if it computes dq, too, so that there is no splash_mha_dq


def report(
    compiled: Any,
    mesh: Mesh,
    images: int,
    model_flops: float,
    chip: chips.Chip | None = None,
    options: dict[str, Any] | None = None,
    encoders: float = 0.0,
) -> dict[str, Any]:
    """Needs and limits of a compiled step per device, as JSON values.

    Args:
      compiled: `jax.stages.Compiled` of the step.
      mesh: the mesh it was compiled for.
      images: images per step over all devices.
      model_flops: model FLOPs per step over all devices.
      chip: default: the chip of the mesh's devices; the report has no times if that is unknown.
      options: compile options, only recorded.
      encoders: bytes of the VAE and the text encoders, which a device holds besides the step.
    """
    chip = chip or chips.lookup(mesh.devices.flat[0].device_kind)
    program = hlo.read(compiled.as_text())
    operations = list(hlo.operations(program))
    cost = compiled.cost_analysis() or _cost(operations)
    loop_flops, loop_bytes = hlo.repeated(operations)
    kernels = _kernels(program)
    collectives, link, dcn = _collectives(program, mesh)
    flops = {
        "xla": cost.get("flops", 0.0),
        "loops": loop_flops,
        "kernels": sum(kernel["calls"] * kernel["flops"] for kernel in kernels),
    }
    traffic = {
        "xla": cost.get("bytes accessed", 0.0),
        "loops": loop_bytes,
        "kernels": sum(kernel["calls"] * kernel["bytes"] for kernel in kernels),
    }
    needs: dict[str, Any] = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "images_per_step": images,
        "images_per_device": images / mesh.size,
        "memory": _memory(compiled, encoders, kernels, chip, mesh.size),
        "flops": flops | {"total": sum(flops.values())},
        "bytes": traffic | {"total": sum(traffic.values())},
        "collectives": collectives,
        "link_bytes": link,
        "dcn_bytes": dcn,
        "model_flops": model_flops / mesh.size,
        "kernels": kernels,
        "kinds": [
            {"kind": kind, "count": n, "flops": f, "bytes": b} for kind, (n, f, b) in hlo.kinds(operations).items()
        ],
        "loops_of_unknown_length": len(program.unknown),
        "heaviest": [{"operation": o, "count": n, "bytes": b} for o, n, b in hlo.heaviest(operations)],
        "compile_options": options or {},
        "jax": jax.__version__,
    }
    return needs | (_limits(needs, operations, chip) if chip else {"chip": None})


def _cost(operations: list[hlo.Operation]) -> dict[str, float]:
    """What XLA's own cost analysis says, which there is none of for GPUs: hand-written kernels count nothing."""
    counted = [one for one in operations if _is_counted(one)]
    return {"flops": sum(one.flops for one in counted), "bytes accessed": sum(one.bytes for one in counted)}


def _is_counted(operation: hlo.Operation) -> bool:
    """Whether its FLOPs and bytes are known without `_kernels`."""
    return operation.instruction.opcode != "custom-call" or operation.flops > 0


def _memory(
    compiled: Any, encoders: float, kernels: list[dict[str, Any]], chip: chips.Chip | None, devices: int
) -> dict[str, float]:
    """Bytes on a device; "needed" is the sum of the parts that XLA takes; "available", if the chip is known, for it.

    "outside" is what CUDA takes beside that.
    """
    stats = compiled.memory_analysis()
    # The gradient of cuDNN's attention sums dq in float32, twice but for Hopper and Blackwell in data centres (cuDNN
    # 9.28's own answer); XLA learns this on a real GPU alone.
    copies = 1 if isinstance(chip, chips.Gpu) and chip.capability[0] in (9, 10) else 2
    workspaces = [4 * copies * math.prod(one["q"]) for one in kernels if "fmhaSoftmaxBackward" in one["name"]]
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,  # the others reuse an argument's memory
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "workspace": max(workspaces, default=0),
        "encoders": encoders,
    }
    found = parts | {"needed": sum(parts.values())}
    if isinstance(chip, chips.Gpu):
        outside = chips.CONTEXT + (chips.NCCL if devices > 1 else 0)
        return found | {"outside": outside, "available": min(chip.hbm_bytes, chip.card_bytes - outside)}
    return found | ({"available": chip.hbm_bytes} if chip else {})


def _limits(needs: dict[str, Any], operations: list[hlo.Operation], chip: chips.Chip) -> dict[str, Any]:
    """The part of the report that depends on the chip's constants."""
    seconds = {
        "flops": max(needs["flops"]["total"], needs["model_flops"]) / chip.peak_flops,
        "hbm": needs["bytes"]["total"] / chip.hbm_bandwidth,
        "links": needs["link_bytes"] / chip.link_bandwidth,
        "dcn": needs["dcn_bytes"] / chip.dcn_bandwidth,
    }
    work = [(one.times, one.flops, one.bytes) for one in operations if _is_counted(one)]
    work += [(kernel["calls"], kernel["flops"], kernel["bytes"]) for kernel in needs["kernels"]]
    serial = sum(n * max(flops / chip.peak_flops, size / chip.hbm_bandwidth) for n, flops, size in work)
    bound = max(seconds, key=seconds.get)
    time = seconds[bound]
    return {
        "chip": dataclasses.asdict(chip),
        "seconds": seconds | {"roofline": time, "bound": bound, "serial": serial},
        "utilisation": needs["model_flops"] / (chip.peak_flops * time),
        "serial_utilisation": needs["model_flops"] / (chip.peak_flops * max(serial, time)),
        "images_per_second_per_device": needs["images_per_device"] / time,
        "collective_share": (seconds["links"] + seconds["dcn"]) / time,
        "hbm_share": needs["memory"]["needed"] / needs["memory"]["available"],
    }


def _kernels(program: hlo.Program) -> list[dict[str, Any]]:
    """One entry per kernel and shape. A kernel without an entry in _PRODUCTS has 0 FLOPs and `known` false."""
    kernels = hlo.kernels(program)
    fused_backward = not any("splash_mha_dq" in kernel.name for kernel in kernels)
    entries: dict[tuple, dict[str, Any]] = {}
    for kernel in kernels:
        name = kernel.name.rstrip("0123456789.")
        products = next((n for part, n in _PRODUCTS.items() if part in name), 0)
        if "splash_mha_dkv" in name and fused_backward:
            products = _FUSED_BACKWARD
        q, k = (*kernel.operands, (), ())[:2]
        entry = {
            "name": name,
            "q": list(q),
            "k": list(k),
            "calls": 0,
            "flops": _attention_flops(name, q, k) * products if products else 0.0,
            "bytes": kernel.bytes,
            "known": bool(products),
        }
        entries.setdefault((name, q, k), entry)["calls"] += kernel.times
    return list(entries.values())


def _attention_flops(name: str, q: tuple[int, ...], k: tuple[int, ...]) -> float:
    """FLOPs of one product of all queries with all keys: [... l d] each for splash, [b l n d] each for cuDNN."""
    return 2.0 * math.prod(q) * (k[1] if "fmha" in name else k[-2])


def _collectives(program: hlo.Program, mesh: Mesh) -> tuple[dict[str, Any], float, float]:
    """({kind: {"axis+axis": {"count", "bytes"}}}, bytes over links, bytes over the data-centre network).

    A collective across slices (TPU) or nodes (GPU) is modelled in two stages: a ring inside each of these islands, then
    an exchange of each chip's share between the islands.
    """
    shape = dict(mesh.shape)
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    entries: dict[str, Any] = {}
    link = dcn = 0.0
    for collective in hlo.collectives(program):
        axes, group = collective.axes(shape), collective.groups[0]
        total = collective.times * collective.link_bytes
        entry = entries.setdefault(collective.kind, {}).setdefault("+".join(axes) or "none", {"count": 0, "bytes": 0.0})
        entry["count"] += collective.times
        entry["bytes"] += total
        if is_gpu:
            islands = len({device // chips.GPUS_PER_NODE for device in group})
        else:
            islands = shape["slice"] if "slice" in axes else 1
        if islands == 1:
            link += total
            continue
        # A ring of n moves (n - 1) / n of the payload: once in a ring of an island's chips, once in one of the islands.
        size, inside = len(group), len(group) // islands
        payload = total * size / (size - 1)
        link += payload * (inside - 1) / inside
        dcn += payload * (islands - 1) / islands / inside
    return entries, link, dcn


def text(found: dict[str, Any]) -> str:
    """The report as lines of text."""
    memory, chip = found["memory"], found["chip"]
    flops, traffic = found["flops"], found["bytes"]
    sizes = ", ".join(f"{size} {axis}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    available = f" of {_gib(memory['available'])} ({found['hbm_share']:.0%})" if chip else ""
    beside = f"; CUDA takes {_gib(memory['outside'])} outside of it" if "outside" in memory else ""
    rows = [
        ("devices", f"{found['devices']} x {found['device_kind']} ({sizes})"),
        ("images", f"{found['images_per_step']} a step, {found['images_per_device']:g} a device"),
        *((part, _gib(memory[part])) for part in PARTS if memory[part]),
        ("peak memory", f"{_gib(memory['needed'])}{available}{beside}"),
        (
            "FLOPs",
            f"{flops['total']:.3e} (kernels {flops['kernels']:.2e}, loop iterations after the first "
            f"{flops['loops']:.2e}); the model has {found['model_flops']:.3e}",
        ),
        (
            "bytes",
            f"{traffic['total']:.3e} (kernels {traffic['kernels']:.2e}, loop iterations after the first "
            f"{traffic['loops']:.2e})",
        ),
    ]
    for row in found["kinds"]:  # FLOPs of attention are in "kernels"
        products = f"{row['flops']:.2e} FLOPs, " if row["flops"] else ""
        rows.append((f"{row['count']} kernels", f"{row['kind']}: {products}{row['bytes']:.2e} bytes"))
    for kind, by_axis in found["collectives"].items():
        for axis, entry in by_axis.items():
            rows.append((kind, f"{_gib(entry['bytes'])} over {axis}, {entry['count']} times"))
    if found["loops_of_unknown_length"]:
        rows.append(("caution", f"{found['loops_of_unknown_length']} loops of unknown length count as one iteration"))
    for kernel in found["kernels"]:
        if not kernel["known"]:
            rows.append(("caution", f"the FLOPs of kernel {kernel['name']} are unknown and not counted"))
    if chip:
        rows += _limit_rows(found)
    return "\n".join(f"{name:<18} {value}" for name, value in rows) + "\n"


def _limit_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    chip, seconds = found["chip"], found["seconds"]
    parts = ", ".join(f"{name} {1e3 * seconds[name]:.1f}" for name in ("flops", "hbm", "links", "dcn"))
    return [
        (
            "chip",
            f"{chip['name']}: {chip['peak_flops'] / 1e12:g} TFLOP/s, {chip['hbm_bandwidth'] / 1e9:g} GB/s of memory, "
            f"{chip['link_bandwidth'] / 1e9:g} GB/s of links, {chip['dcn_bandwidth'] / 1e9:g} GB/s of DCN",
        ),
        ("roofline", f"{1e3 * seconds['roofline']:.1f} ms, bound by {seconds['bound']} (ms: {parts})"),
        (
            "serial",
            f"{1e3 * seconds['serial']:.1f} ms, utilisation {found['serial_utilisation']:.1%}: one operation after "
            "another, each limited by its own FLOPs or bytes",
        ),
        ("images/s/chip", f"{found['images_per_second_per_device']:.2f}"),
        (
            "utilisation",
            f"{found['utilisation']:.1%} of peak at most; collectives take {found['collective_share']:.1%} of the time",
        ),
        ("compile options", ", ".join(f"{k}={v}" for k, v in found["compile_options"].items()) or "none"),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
