"""Everything private of jax that this package uses; tests/test_runtime_jax_private.py tries it on the installed jax.

There is no public replacement for

- the key-value store and the barriers of the service that `jax.distributed.initialize` starts. What jax offers instead
  (`jax.experimental.multihost_utils`) are collectives of devices: a process that failed cannot take part in them, and a
  thread beside the training loop must not start one;
- what `jax.distributed.initialize` would detect, without initializing: whether there are several processes at all, and
  the address of process 0 where a process uses all devices of its machine (jax would restrict it to one);
- the key under which jax's preemption service stores a SIGTERM: the public `reached_preemption_sync_point` only says
  whether to stop after this step;
- what jax's cuDNN attention knows of the GPU and of cuDNN: it asks the default backend, not the devices that a program
  is compiled for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax._src.cudnn import fused_attention_stablehlo as cudnn

PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


def client() -> Any:
    """The connection to the service of a run of several processes; None before `jax.distributed.initialize`."""
    return distributed.global_state.client


def cluster_types() -> list[Any]:
    """The environments that `jax.distributed.initialize` looks for, in its order, as classes."""
    return [known for known in ClusterEnv._cluster_types if not known.opt_in_only_method]


@contextlib.contextmanager
def absent_gpu(capability: tuple[int, int], cudnn_version: int) -> Iterator[None]:
    """In this block jax's cuDNN attention is traced for a GPU that is not here, and for a cuDNN that is not installed.

    Args:
      capability: CUDA's compute capability, as (9, 0).
      cudnn_version: as cuDNN gives it, 91000 for 9.10.
    """
    answers = {
        "check_cudnn_version": lambda: cudnn_version,
        "check_compute_capability": lambda least: capability >= _numbers(least),
        "is_cuda_compute_capability_equal": lambda one: capability == _numbers(one),
    }
    before = {name: getattr(cudnn, name) for name in answers}
    for name, answer in answers.items():
        setattr(cudnn, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(cudnn, name, function)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
