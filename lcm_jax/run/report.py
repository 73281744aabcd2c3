"""What the compiled training step takes of its devices, and how fast it could be."""

import math
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from lcm_jax.cost import chips, roofline
from lcm_jax.errors import LcmError
from lcm_jax.pretrained.model import PipelineParams
from lcm_jax.run import models as student_lib
from lcm_jax.run import step as training_step
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib


class DoesNotFit(LcmError):
    """A step needs more memory than a chip has: `needed` of `available` bytes."""

    def __init__(self, message: str, needed: float, available: float):
        super().__init__(message)
        self.needed, self.available = needed, available


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[training_step.TrainingStep, int]:
    """The step of a resolved config from shapes alone, as `train` would build it from weights; `encoder_bytes`.

    Raises:
      LcmError: models that `train` would refuse.
    """
    models = student_lib.shapes(config)
    return training_step.make(config, models, mesh), encoder_bytes(models.teacher_params, mesh)


def report(
    config: ConfigDict, mesh: jax.sharding.Mesh, options: dict[str, Any], chip: chips.Chip | None = None
) -> dict[str, Any]:
    """Compiles the step of a resolved config; `roofline.report` of it, with the time that compiling took.

    Args:
      options: compile options beside those of `training_step`.
      chip: as `roofline.report`.

    Raises:
      DoesNotFit: as `compile_step`; the step fits, but not beside the encoders.
    """
    step, encoders = build(config, mesh)
    start = time.monotonic()
    compiled = compile_step(step, config, options, encoders)
    seconds = round(time.monotonic() - start, 1)
    options = options | compiler.training(mesh.devices.flat[0].platform)
    found = roofline.report(compiled, mesh, config.data.batch_size, step.model_flops(), chip, options, encoders)
    needed = found["memory"]["needed"]
    if found["chip"] and needed > found["chip"]["hbm_bytes"]:  # XLA itself complains on TPUs alone
        raise _does_not_fit(config, found["device_kind"], needed, found["chip"]["hbm_bytes"])
    return found | {"compile_seconds": seconds}


def encoder_bytes(params: PipelineParams, mesh: jax.sharding.Mesh) -> int:
    """Bytes that one device holds of the VAE and the text encoders."""
    leaves = jax.tree.leaves({name: tree for name, tree in params.items() if name != "unet"})
    return sum(
        math.prod(mesh_lib.param_sharding(mesh, leaf.shape).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
    )


def compile_step(
    step: training_step.TrainingStep, config: ConfigDict, options: dict[str, Any], encoders: int = 0
) -> jax.stages.Compiled:
    """The compiled step. encoders: see `encoder_bytes`; they count in the error.

    Raises:
      DoesNotFit: it needs more memory than the device has; says how much, and what in the config to change.
    """
    try:
        return step.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed, available = memory_asked(str(error))
        if not needed:
            raise
        if "HLO temporaries" in str(error):  # XLA gave up before it added what the step is called with
            needed += argument_bytes(step)
        kind = step.key.sharding.mesh.devices.flat[0].device_kind
        raise _does_not_fit(config, kind, needed + encoders, available) from error


def _does_not_fit(config: ConfigDict, kind: str, needed: float, available: float) -> DoesNotFit:
    return DoesNotFit(
        f"this config does not fit {kind}: {needed / roofline.GIB:.2f} GiB of {available / roofline.GIB:.2f}, "
        f"{(needed - available) / roofline.GIB:.2f} too much; {_remedies(config)}",
        needed,
        available,
    )


def argument_bytes(step: training_step.TrainingStep) -> int:
    """Bytes that one device holds of the step's arguments."""
    leaves = jax.tree.leaves((step.state, step.frozen, step.batch))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def memory_asked(message: str) -> tuple[float, float]:
    """(bytes needed, bytes there are) of XLA's complaint about memory; zeros where `message` is none."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return 0.0, 0.0
    size = r"([\d.]+)([KMGT])"
    for pattern in (rf"Used {size} of {size}", rf"\({size}\) exceeds.*?\({size}\)"):
        if found := re.search(pattern, message, re.DOTALL):
            units = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
            return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    return 0.0, 0.0


def _remedies(config: ConfigDict) -> str:
    """What of the config takes memory, and the change that saves it, those that cost least first."""
    train, ways = config.train, []
    if config.mesh.fsdp == 1:
        ways.append("--config.mesh.fsdp=-1 --config.mesh.data=1 (or a smaller fsdp) splits weights and optimiser")
    if train.remat == "none":
        ways.append("--config.train.remat=block keeps fewer activations")
    if train.remat == "attention":
        ways.append("--config.train.remat=block keeps fewer activations than attention")
    ways.append(
        f"a smaller --config.data.batch_size (now {config.data.batch_size}), or "
        f"--config.train.accumulation_steps={2 * train.accumulation_steps}"
    )
    if config.model.teacher_dtype == "float32":
        ways.append("--config.model.teacher_dtype=bfloat16")
    if train.mu_dtype == "float32":
        ways.append("--config.train.mu_dtype=bfloat16")
    return "; ".join(ways)
