"""Devices that are not here, to compile for: TPU slices by libtpu, NVIDIA GPUs by jax's CUDA plugin.

    with tracing_for(chip):
        lowered = step.lower(...)           a step on make_mesh(devices=devices("h100:8"))

Neither needs the hardware, a driver, or CUDA's libraries. A program for such devices can be compiled and read, not run.
"""

import contextlib
import importlib.util
import os
from typing import Any

import jax

from lcm_jax.cost.chips import GPUS_PER_NODE, Chip, Gpu, of_topology
from lcm_jax.errors import LcmError
from lcm_jax.runtime import jax_private, waiting

CUDNN = (9, 10, 0)  # the version that programs for absent GPUs are compiled for
CUDA = "12.9.0"

# Without these libtpu would ask the metadata server of a TPU machine.
_NO_MACHINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_NO_TILES = "Couldn't find output tile sizes"  # XLA, of a product of matrices that it would write in Triton


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices, one per chip, for compiling only: of `slices` slices of a TPU topology, or of GPUs.

    Raises:
      LcmError: topology unknown; libtpu or the CUDA plugin missing; libtpu in use by another process.
    """
    chip, count = of_topology(topology)
    return _gpus(chip, count) if isinstance(chip, Gpu) else _tpus(topology, slices)


def tracing_for(chip: Chip) -> contextlib.AbstractContextManager[None]:
    """The block in which a program for these chips must be traced."""
    if isinstance(chip, Gpu):
        major, minor, patch = CUDNN
        return jax_private.absent_gpu(chip.capability, 10_000 * major + 100 * minor + patch)
    return contextlib.nullcontext()


def compile_program(lowered: jax.stages.Lowered, options: dict[str, Any]) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """(compiled program, the options that it was compiled with).

    XLA's compiler for GPUs tries tiles for its own products of matrices on the card, and leaves a product to cuBLAS
    where none is better. Without a card it takes tiles untried, which some products do not have: then cuBLAS gets all.
    """
    try:
        return lowered.compile(compiler_options=options), options
    except jax.errors.JaxRuntimeError as error:
        if _NO_TILES not in str(error):
            raise
    waiting.say("XLA has no tiles for a product of this program without a card: compiling with cuBLAS for all products")
    options = options | {"xla_gpu_enable_triton_gemm": False}
    return lowered.compile(compiler_options=options), options


def _tpus(topology: str, slices: int) -> list[jax.Device]:
    chip, count = of_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise LcmError("compiling for TPUs needs libtpu, which is not installed: pip install 'lcm_jax[tpu]'")
    for name, value in _NO_MACHINE.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":  # otherwise a device is one of its two cores
        options["chip_config_name"] = "megacore"
    try:
        found = _described("tpu", topology_name=topology, **options)
    except Exception as error:  # jaxlib's, RuntimeError or its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        locked = "lockfile" in str(error)
        remedy = "another process is using libtpu, wait for it to end" if locked else "see libtpu's message"
        raise LcmError(f"libtpu gives no topology {topology} x {slices} ({reason}); {remedy}") from error
    if len(found) != slices * count:
        raise LcmError(f"libtpu gives {len(found)} devices for {slices} x {topology}, which has {count} chips")
    return found


def _gpus(gpu: Gpu, count: int) -> list[jax.Device]:
    if not any(map(importlib.util.find_spec, _PLUGINS)):
        raise LcmError(
            "compiling for NVIDIA GPUs needs jax's CUDA plugin, which is not installed: pip install "
            "'lcm_jax[cuda-aot]' (180 MB, no GPU needed)"
        )
    each = min(count, GPUS_PER_NODE)
    return _described("cuda", topology=f"1x{count // each}x{each}", target_config=_target_config(gpu))


def _described(platform: str, **options: Any) -> list[jax.Device]:
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform=platform, **options).devices)


def _target_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto as text; what is not of `gpu` is equal on all of them."""
    major, minor = gpu.capability
    features = "ACCELERATED_FEATURES" if gpu.capability >= (9, 0) else "NONE"
    dnn = dict(zip(("major", "minor", "patch"), CUDNN, strict=True))
    return f"""
      platform_name: "CUDA"
      device_description_str: "{gpu.device_kind}"
      dnn_version_info {{ {" ".join(f"{name}: {number}" for name, number in dnn.items())} }}
      gpu_device_info {{
        name: "{gpu.device_kind}"
        device_vendor: "NVIDIA Corporation"
        cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
        driver_version: "{CUDA}" runtime_version: "{CUDA}" compile_time_toolkit_version: "{CUDA}"
        dnn_version: "{".".join(map(str, CUDNN))}"
        core_count: {gpu.sms} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock_ghz}
        device_memory_size: {gpu.card_bytes} memory_bandwidth: {int(gpu.hbm_bandwidth)} l2_cache_size: {gpu.l2_bytes}
        shared_memory_per_core: {gpu.shared_bytes} shared_memory_per_block: 49152
        shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
        threads_per_core_limit: {gpu.threads} threads_per_block_limit: 1024 threads_per_warp: 32
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        device_address_bits: 64
      }}
    """
