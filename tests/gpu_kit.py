"""A GPU that is not here, as far as tracing and lowering for CUDA ask for one; no CUDA, cuDNN or plugin is needed."""

import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax's CUDA plugin"
)


def devices(platform: str, count: int = 1, capability: str = "8.0") -> SimpleNamespace:
    """What `runtime.attention` reads of a mesh."""
    flat = [SimpleNamespace(platform=platform, compute_capability=capability)] * count
    return SimpleNamespace(devices=np.array(flat, object), size=count)


TPU, CPU = devices("tpu", 4), devices("cpu")
A100, H100, B200 = (devices("gpu", capability=capability) for capability in ("8.0", "9.0", "10.0"))


def pretend(monkeypatch: pytest.MonkeyPatch, mesh: SimpleNamespace) -> None:
    """jax's cuDNN attention, which asks the default backend, answers as on the GPU of `mesh` with cuDNN 9.10."""
    capability = float(mesh.devices.flat[0].compute_capability)
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda least: capability >= float(least))


def lowered(traced: jax.stages.Traced) -> str:
    """The program for CUDA."""
    return traced.lower(lowering_platforms=("cuda",)).as_text()
