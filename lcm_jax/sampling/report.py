"""The memory that generating images takes on a device, and how fast it could be: text encoders, sampler, decoder."""

from typing import Any

import jax

from lcm_jax.cost import chips, roofline
from lcm_jax.cost.chips import GIB
from lcm_jax.models import int8
from lcm_jax.run.report import DoesNotFit, device_bytes, memory_asked, timed
from lcm_jax.runtime import topology
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.offload import AWAY, resident
from lcm_jax.sampling.request import Request


def report(
    generator: Generator, request: Request, batch: int, options: dict[str, Any], chip: chips.Chip | None
) -> dict[str, Any]:
    """Compiles the programs of a batch of images and says what they take, as JSON values.

    {"programs": {name: `roofline.report`}, "memory": bytes on a device, "seconds": of the batch, at best}. "peak" is,
    by mode of `sampling.offload` ("none": without), the most that weights on the device and a program beside them take;
    "needed" is that of the generator's own mode. The time of bringing weights to the device is not counted.

    Args:
      generator: on a mesh; its weights may be shapes.
      batch: images at once, over all devices.
      options: compile options besides the generator's own.
      chip: of the mesh; None: of unknown limits, as a CPU; the report has no times and nothing is too large then.

    Raises:
      DoesNotFit: with the report, if XLA could compile the programs.
    """
    programs, mesh, weights = {}, generator.mesh, device_bytes(generator.params)
    for name, traced in generator.trace(request, batch).items():
        try:
            (compiled, used), seconds = timed(lambda: topology.compile_program(traced.lower(), options))  # noqa: B023
        except jax.errors.JaxRuntimeError as error:  # on TPUs
            needed, available = memory_asked(str(error), weights)
            if not needed:
                raise
            raise _does_not_fit(generator, request, batch, needed, available) from error
        programs[name] = roofline.report(compiled, mesh, batch, 0.0, chip, used) | {"compile_seconds": seconds}
    of_parts = {part: device_bytes(tree) for part, tree in generator.params.items()}
    parts_of = {"text": tuple(generator.pipeline.tokenizers), "sampler": ("unet",), "decoder": ("vae",)}
    beside = {name: one["memory"]["needed"] - one["memory"]["arguments"] for name, one in programs.items()}
    available = programs["sampler"]["memory"].get("available")
    peak = {
        mode or "none": max(
            sum(of_parts[part] for part in resident(mode, of_parts, parts_of[name])) + beside[name] for name in programs
        )
        for mode in AWAY
    }
    needed = peak[generator.weights.mode or "none"]
    found = {
        "images": batch,
        "steps": request.settings.steps,
        "size": [request.height, request.width],
        "devices": mesh.size,
        "device_kind": programs["sampler"]["device_kind"],
        "programs": programs,
        "memory": {
            "weights": weights,
            "of_parts": of_parts,
            "beside": beside,
            "peak": peak,
            "needed": needed,
            "available": available,
        },
        "seconds": chip
        and {way: sum(one["seconds"][way] for one in programs.values()) for way in ("roofline", "serial")},
    }
    if chip and needed > available:
        raise _does_not_fit(generator, request, batch, needed, available, found)
    return found


def _does_not_fit(
    generator: Generator,
    request: Request,
    batch: int,
    needed: float,
    available: float,
    found: dict[str, Any] | None = None,
) -> DoesNotFit:
    """The error, with what the generator does not yet do to save memory."""
    mesh, ways = generator.mesh, ["a smaller --batch_size"] if batch > generator.mesh.size else []
    ways += [] if generator.sliced else ["--sliced"]
    ways += [] if any(map(int8.has_quantised, generator.params.values())) else ["--weights=int8"]
    ways += [] if generator.weights.mode == "all" else ["--offload=all"]
    return DoesNotFit(
        f"{batch} images of {request.width} x {request.height} do not fit {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}: {needed / GIB:.2f} GiB of {available / GIB:.2f} on each; use "
        f"{' or '.join(ways) or 'devices with more memory'}",
        needed,
        available,
        found,
    )


def text(found: dict[str, Any]) -> str:
    """The report as lines of text."""
    memory, seconds = found["memory"], found["seconds"]
    height, width = found["size"]
    lines = [
        f"{'devices':<18} {found['devices']} x {found['device_kind']}",
        f"{'images':<18} {found['images']} of {width} x {height} in {found['steps']} steps",
        f"{'weights':<18} {memory['weights'] / GIB:.2f} GiB, of all networks",
    ]
    for name, one in found["programs"].items():
        kernels = sum(row["count"] for row in one["kinds"])
        lines.append(
            f"{name:<18} {memory['beside'][name] / GIB:.2f} GiB beside the weights, {kernels} kernels, "
            f"{one['bytes']['total']:.3e} bytes, {one['flops']['total']:.3e} FLOPs" + _times(one.get("seconds"))
        )
    share = f" of {memory['available'] / GIB:.2f} ({memory['needed'] / memory['available']:.0%})" if seconds else ""
    modes = ", ".join(f"{mode} {size / GIB:.2f}" for mode, size in memory["peak"].items())
    lines.append(f"{'peak memory':<18} {memory['needed'] / GIB:.2f} GiB{share}; by --offload: {modes}")
    if seconds:
        lines.append(f"{'a batch':<18} {_times(seconds).removeprefix(', ')}")
    return "\n".join(lines) + "\n"


def _times(seconds: dict[str, float] | None) -> str:
    return f", roofline {1e3 * seconds['roofline']:.1f} ms, serial {1e3 * seconds['serial']:.1f} ms" if seconds else ""
