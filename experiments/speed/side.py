"""What the processes of both sides share: a prepared workload, and the config of a training workload."""

import dataclasses
import resource
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from experiments import stage
from experiments.speed.workloads import MODELS, Workload
from lcm_jax import assets
from lcm_jax.run import config as config_lib

STEPS, GUIDANCE_SCALE = 4, 8.0
W_EMBEDDING = 256
PROMPT = "a large red star at the left on a white background"
TOKENS = 77  # context length of the published text encoders


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A workload of one side, in memory.

    Attributes:
      ways: name -> function that does the work once; it may return before the work has ended.
      wait: result -> returns when all work up to it has ended.
      finite: result -> whether its values are.
      peak_bytes: the most memory used so far.
      reset_peak: forgets it, if the device can.
      flops: of one run; None: this side does not count them.
      profile: folder -> facts about where the time goes; None: this side has none.
    """

    ways: dict[str, Callable[[], Any]]
    wait: Callable[[Any], Any]
    finite: Callable[[Any], bool]
    peak_bytes: Callable[[], int]
    reset_peak: Callable[[], None] = lambda: None
    flops: float | None = None
    profile: Callable[[str], dict[str, Any]] | None = None


def resident_peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def source_folder(name: str) -> str:
    """Folder of a model: the embedded one, or the configs of a published one."""
    folder = assets.architecture(MODELS[name].source)
    return str(folder) if folder else assets.resolve(MODELS[name].source)


def training_config(workload: Workload) -> ConfigDict:
    """The resolved config of a training workload; frozen weights are held in the compute dtype."""
    config = stage.read_config(getattr(MODELS[workload.model], workload.kind))
    config.model.teacher = source_folder(workload.model)
    config.model.vae = None
    config.model.dtype = config.model.teacher_dtype = workload.dtype
    config.data.source, config.data.path, config.data.filters = "shapes", None, ()
    config.data.resolution, config.data.batch_size = workload.size, workload.batch
    config.train.remat = workload.remat
    config_lib.validate(config)
    return config_lib.resolve(config)
