"""The memory that the compiled training step takes on its devices, and how fast it could be."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lcm_jax.cost import chips, roofline
from lcm_jax.cost.chips import GIB
from lcm_jax.errors import LcmError
from lcm_jax.run import models as run_models
from lcm_jax.run import step as run_step
from lcm_jax.run.config import needs_teacher
from lcm_jax.runtime import kernels, topology
from lcm_jax.runtime.mesh import abstract_state


class DoesNotFit(LcmError):
    """A program needs more memory than a chip has: `needed` of `available` bytes; its report, if it could be made."""

    def __init__(self, message: str, needed: float, available: float, report: dict[str, Any] | None = None):
        super().__init__(message)
        self.needed, self.available, self.report = needed, available, report


def build(config: ConfigDict, mesh: Mesh) -> tuple[run_step.TrainingStep, int]:
    """(step, encoders) of a resolved config, from shapes alone, as `train` would build them from weights.

    encoders: bytes that a device holds of VAE and text encoders, beside the step.

    Raises:
      LcmError: models that `train` would refuse.
    """
    models = run_models.shapes(config)
    encoders = {name: tree for name, tree in models.teacher_params.items() if name != "unet"}
    return run_step.make(config, models, mesh), device_bytes(abstract_state(mesh, encoders))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def report(config: ConfigDict, mesh: Mesh, options: dict[str, Any], chip: chips.Chip | None = None) -> dict[str, Any]:
    """Compiles the step of a resolved config; `roofline.report` of it, with the time that compiling took.

    Args:
      options: compile options besides those of `run.step`.
      chip: as in `roofline.report`.

    Raises:
      DoesNotFit: as `compile_step`; or the step fits, but not beside the encoders.
    """
    step, encoders = build(config, mesh)
    (compiled, options), seconds = timed(lambda: compile_step(step, config, options, encoders))
    options = options | kernels.training(mesh.devices.flat[0].platform, mesh.size)
    found = roofline.report(compiled, mesh, config.data.batch_size, step.model_flops(), chip, options, encoders)
    found["compile_seconds"] = seconds
    memory = found["memory"]
    if found["chip"] and memory["needed"] > memory["available"]:  # XLA itself complains on TPUs only
        raise _does_not_fit(config, mesh, memory["needed"], memory["available"], found)
    return found


def timed(compile_: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds that it took)."""
    start = time.monotonic()
    return compile_(), round(time.monotonic() - start, 1)


def compile_step(
    step: run_step.TrainingStep, config: ConfigDict, options: dict[str, Any], encoders: int = 0
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """The compiled step, and the options it was compiled with besides its own; encoders: see `build`.

    Raises:
      DoesNotFit: the device has less memory than step and encoders need; the message says how to reduce it.
    """
    try:
        return topology.compile_program(step.lower(), options)
    except jax.errors.JaxRuntimeError as error:
        needed, available = memory_asked(str(error), device_bytes((step.state, step.frozen, step.batch)))
        if not needed:
            raise
        raise _does_not_fit(config, step.key.sharding.mesh, needed + encoders, available) from error


def memory_asked(message: str, arguments: int) -> tuple[float, float]:
    """(bytes needed, bytes available) of XLA's complaint about memory; zeros if `message` is another error.

    arguments: bytes of the program's, which XLA has not added yet if temporaries alone are too large.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return 0.0, 0.0
    size, units = r"([\d.]+)([KMGT])", {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
    found = re.search(rf"Used {size} of {size}|\({size}\) exceeds.*?\({size}\)", message, re.DOTALL)
    if not found:
        return 0.0, 0.0
    needed, unit, available, other_unit = filter(None, found.groups())
    before = arguments if "HLO temporaries" in message else 0
    return float(needed) * units[unit] + before, float(available) * units[other_unit]


def _does_not_fit(
    config: ConfigDict, mesh: Mesh, needed: float, available: float, report: dict[str, Any] | None = None
) -> DoesNotFit:
    """The error, with the changes to the config that save memory; those that cost least come first."""
    train, model, ways = config.train, config.model, []
    images = config.data.batch_size // (mesh.size * train.accumulation_steps)  # on a device, in a part of the batch
    if config.mesh.fsdp == 1 and mesh.size > 1:
        ways.append("--config.mesh.fsdp=-1 --config.mesh.data=1 (or a smaller fsdp) splits weights and optimiser")
    if train.remat == "none":
        ways.append("--config.train.remat=block keeps fewer activations")
    if train.remat == "attention":
        ways.append("--config.train.remat=block keeps fewer activations than attention")
    if model.dtype == "float32":
        ways.append("--config.model.dtype=bfloat16")
    if images > 1:
        parts = next(n for n in range(2, images + 1) if images % n == 0) * train.accumulation_steps
        ways.append(f"a smaller --config.data.batch_size (now {config.data.batch_size})")
        ways.append(f"--config.train.accumulation_steps={parts}")
    if model.teacher_dtype == "float32" and (needs_teacher(config) or config.lora.rank):
        ways.append("--config.model.teacher_dtype=bfloat16")
    if train.mu_dtype == "float32":
        ways.append("--config.train.mu_dtype=bfloat16")
    ways = ways or ["use devices with more memory, or more of them"]
    kind = mesh.devices.flat[0].device_kind
    return DoesNotFit(
        f"this config does not fit {kind}: {needed / GIB:.2f} GiB of {available / GIB:.2f}, "
        f"{(needed - available) / GIB:.2f} too much; {'; '.join(ways)}",
        needed,
        available,
        report,
    )
