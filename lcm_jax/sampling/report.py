"""The memory that generating images takes on a device, and how fast it could be: text encoders, sampler, decoder."""

from typing import Any

import jax
from jax.sharding import Mesh

from lcm_jax.cost import chips, roofline
from lcm_jax.cost.chips import GIB
from lcm_jax.run.report import DoesNotFit, device_bytes, memory_asked, timed
from lcm_jax.runtime import topology
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.request import Request


def report(
    generator: Generator, request: Request, batch: int, options: dict[str, Any], chip: chips.Chip
) -> dict[str, Any]:
    """Compiles the programs of a batch of images and says what they take, as JSON values.

    {"programs": {name: `roofline.report`}, "memory": bytes on a device, "seconds": of the batch, at best}. All weights
    stay on the device; "needed" is their sum and what the program that needs most takes beside them.

    Args:
      generator: on a mesh; its weights may be shapes.
      batch: images at once, over all devices.
      options: compile options besides the generator's own.

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
            raise _does_not_fit(request, batch, mesh, needed, available) from error
        programs[name] = roofline.report(compiled, mesh, batch, 0.0, chip, used) | {"compile_seconds": seconds}
    beside = {name: one["memory"]["needed"] - one["memory"]["arguments"] for name, one in programs.items()}
    available = programs["sampler"]["memory"]["available"]
    needed = weights + max(beside.values())
    found = {
        "images": batch,
        "steps": request.settings.steps,
        "size": [request.height, request.width],
        "devices": mesh.size,
        "device_kind": programs["sampler"]["device_kind"],
        "programs": programs,
        "memory": {"weights": weights, "beside": beside, "needed": needed, "available": available},
        "seconds": {way: sum(one["seconds"][way] for one in programs.values()) for way in ("roofline", "serial")},
    }
    if needed > available:
        raise _does_not_fit(request, batch, mesh, needed, available, found)
    return found


def _does_not_fit(
    request: Request, batch: int, mesh: Mesh, needed: float, available: float, found: dict[str, Any] | None = None
) -> DoesNotFit:
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return DoesNotFit(
        f"{batch} images of {request.width} x {request.height} do not fit {devices}: {needed / GIB:.2f} GiB of "
        f"{available / GIB:.2f} on each; use a smaller --batch_size (lcm_jax.sample --tiled decodes in less memory)",
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
            f"{one['bytes']['total']:.3e} bytes, {one['flops']['total']:.3e} FLOPs, "
            f"roofline {1e3 * one['seconds']['roofline']:.1f} ms, serial {1e3 * one['seconds']['serial']:.1f} ms"
        )
    share = memory["needed"] / memory["available"]
    lines += [
        f"{'peak memory':<18} {memory['needed'] / GIB:.2f} GiB of {memory['available'] / GIB:.2f} ({share:.0%})",
        f"{'a batch':<18} roofline {1e3 * seconds['roofline']:.1f} ms, serial {1e3 * seconds['serial']:.1f} ms",
    ]
    return "\n".join(lines) + "\n"
