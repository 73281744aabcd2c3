"""GPUs and TPUs that are not here, as far as tracing and lowering ask for them; no CUDA, libtpu or plugin is needed."""

import contextlib
import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from lcm_jax.cost import chips
from lcm_jax.data import encoding
from lcm_jax.run import models as run_models
from lcm_jax.run import step as run_step
from lcm_jax.runtime import topology
from lcm_jax.runtime.mesh import AXES, batch_sharding
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.request import make_request

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax's CUDA plugin"
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What jax and `runtime` read of a device of a mesh before anything is compiled."""

    platform: str
    compute_capability: str
    id: int
    process_index: int = 0

    @property
    def device_kind(self) -> str:
        return self.platform

    @property
    def client(self) -> object:
        return jax.devices()[0].client


def devices(platform: str, count: int = 1, capability: str = "8.0", fsdp: int = 1) -> Mesh:
    """A mesh of absent devices."""
    flat = np.array([Device(platform, capability, i) for i in range(count)], object)
    return Mesh(flat.reshape(1, count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 3)


TPU, CPU = devices("tpu", 4), devices("cpu")
A100, H100, B200 = (devices("gpu", capability=capability) for capability in ("8.0", "9.0", "10.0"))


def tracing_for(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """The block in which programs for the devices of a mesh must be traced."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return contextlib.nullcontext()
    capability = tuple(map(int, device.compute_capability.split(".")))
    return topology.tracing_for(next(gpu for gpu in chips.GPUS.values() if gpu.capability == capability))


def lowered(traced: jax.stages.Traced, mesh: Mesh = A100) -> str:
    """The program for the devices of a mesh."""
    platform = mesh.devices.flat[0].platform
    return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()


def traced(config: ConfigDict, mesh: Mesh) -> dict[str, jax.stages.Traced]:
    """All that a run of a resolved config compiles, and sampling 4 images in 4 steps, traced from shapes alone."""
    models = run_models.shapes(config)
    step = run_step.make(config, models, mesh)
    generator = Generator(models.student, models.student_params, mesh)
    side = config.data.resolution
    scale = config.sample.guidance_scale
    request = make_request(generator.pipeline, steps=4, guidance_scale=scale, height=side, width=side)
    shape = config.data.batch_size, side, side, 3
    pixels = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))

    def encode(params, rows):
        return encoding.make_encode(models.teacher, params, mesh, config.data.encode_chunk)(rows)

    return {
        "step": step.step.trace(step.state, step.frozen, step.batch, step.key),
        "encode": jax.jit(encode).trace(generator.params, {"pixels": pixels}),
        **generator.trace(request, 4),
    }
