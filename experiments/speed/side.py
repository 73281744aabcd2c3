"""What both sides' processes have in common: a prepared workload, its config, and the protocol of a worker."""

import dataclasses
import json
import os
import resource
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from ml_collections import ConfigDict

from experiments.speed.workloads import MODELS, Workload
from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib

STEPS, GUIDANCE_SCALE = 4, 8.0
W_EMBEDDING = 256
PROMPT = "a large red star at the left on a white background"
TOKENS = 77  # that a published text encoder reads


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A workload of one side, in memory.

    Attributes:
      ways: name -> function that does the work n times, and returns when all of it has ended.
      finite: whether what the work gave last is finite.
      peak_bytes: the most memory used so far.
      reset_peak: forgets it, where that can be.
      flops: that one run asks for; None: this side does not count.
      profile: folder, way -> facts about where the time goes; None: this side does not tell.
    """

    ways: dict[str, Callable[[int], None]]
    finite: Callable[[], bool]
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
    """The resolved config of a training workload; frozen weights are held in the networks' dtype."""
    model = MODELS[workload.model]
    config = runpy.run_path(getattr(model, workload.kind))["get_config"]()
    config.model.teacher = source_folder(workload.model)
    config.model.vae = None
    config.model.dtype = config.model.teacher_dtype = workload.dtype
    config.data.source, config.data.path, config.data.filters = "shapes", None, ()
    config.data.resolution, config.data.batch_size = workload.size, workload.batch
    config.train.remat = workload.remat
    config_lib.validate(config)
    return config_lib.resolve(config)


def serve(prepare: Callable[[Workload], Prepared]) -> int:
    """The life of a worker: one JSON line in, one out, until the input ends.

    The first line is the workload. The next are {"do": "time", "way", "runs"} -> {"seconds" of all runs, "peak_bytes"},
    and {"do": "profile", "folder"}. What fails answers {"error"}. Standard output belongs to the protocol; whatever
    else is printed goes to standard error.
    """
    import time

    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    def act(asked: dict[str, Any], made: Prepared) -> dict[str, Any]:
        if asked["do"] == "profile":
            return made.profile(asked["folder"])
        made.reset_peak()
        begun = time.perf_counter()
        made.ways[asked["way"]](asked["runs"])
        seconds = time.perf_counter() - begun
        if not made.finite():
            raise FloatingPointError(f"{asked['way']} gave values that are not finite")
        return {"seconds": seconds, "peak_bytes": made.peak_bytes()}

    lines = iter(sys.stdin.readline, "")
    begun = time.perf_counter()
    try:
        made = prepare(Workload(**json.loads(next(lines))))
    except Exception as error:
        answer(failure(error))
        return 1
    answer({"ways": list(made.ways), "flops": made.flops, "prepare_s": time.perf_counter() - begun})
    for line in lines:
        try:
            answer(act(json.loads(line), made))
        except Exception as error:  # out of memory, a compiler that gives up: the other ways may still do
            answer(failure(error))
    return 0


def failure(error: Exception) -> dict[str, str]:
    """An answer that says what went wrong, in a line; standard error gets the whole."""
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, LcmError):
        return {"error": str(error)}
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return {"error": f"{type(error).__name__}: {first[:300]}"}
