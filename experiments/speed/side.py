"""What the processes of both sides share: a prepared workload, its models' configs, and the config of a training."""

import dataclasses
import functools
import json
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import stage
from experiments.speed.workloads import MODELS, Workload
from lcm_jax import assets, foreign
from lcm_jax.run import config as config_lib

STEPS, GUIDANCE_SCALE = 4, 8.0
W_EMBEDDING = 256
PROMPT = "a large red star at the left on a white background"
TOKENS = 77  # context length of the published text encoders
NARROWING = 8
_WIDTHS = {  # every number in the configs that is a width, and the groups of norms
    "block_out_channels",
    "norm_num_groups",
    "cross_attention_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
}
_DEPTHS = {"layers_per_block": 1, "num_hidden_layers": 2}


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
      facts: folder -> facts about the work, as the memory that the compiler plans; files go to the folder.
      profile: folder -> where the time goes; None: this side has none.
    """

    ways: dict[str, Callable[[], Any]]
    wait: Callable[[Any], Any]
    finite: Callable[[Any], bool]
    peak_bytes: Callable[[], int]
    reset_peak: Callable[[], None] = lambda: None
    flops: float | None = None
    facts: Callable[[str], dict[str, Any]] = lambda folder: {}
    profile: Callable[[str], dict[str, Any]] | None = None


def resident_peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def source_folder(workload: Workload) -> str:
    """Folder of the workload's model: the embedded one, or the configs of a published one."""
    return model_folder(MODELS[workload.model].source, workload.narrow)


def model_folder(source: str, narrow: bool) -> str:
    """Folder of a model: the embedded one, or the configs of a published one; any other is an LCM of the embedded."""
    if folder := assets.architecture(source):
        return str(narrow_copy(folder) if narrow else folder)
    found = assets.path("shapes")
    return str(found if assets.resolve(source) == str(found) else _copy(found, _conditioned))


@functools.cache
def narrow_copy(folder: Path) -> Path:
    """A copy of a published model's configs with an eighth of every width, and less depth, which costs compiling.

    Kinds of blocks, heads, their number, and the conditioning stay. A UNet keeps its first and its last level, blocks
    one layer and one transformer, text encoders two layers.
    """
    return _copy(folder, _narrow)


def _narrow(config: dict[str, Any]) -> dict[str, Any]:
    levels = len(config.get("block_out_channels", ()))
    is_unet = config.get("_class_name") == "UNet2DConditionModel"

    def less(key: str, value: Any) -> Any:
        if key.endswith("transformer_layers_per_block") and value:
            return [1, 1]
        if key in _WIDTHS and value:
            value = [one // NARROWING for one in value] if isinstance(value, list) else value // NARROWING
        if is_unet and isinstance(value, list) and len(value) == levels:
            return [value[0], value[-1]]
        return min(value, _DEPTHS.get(key, value)) if isinstance(value, int) else value

    return {key: less(key, value) for key, value in config.items()}


def _conditioned(config: dict[str, Any]) -> dict[str, Any]:
    is_unet = config.get("_class_name") == "UNet2DConditionModel"
    return config | ({"time_cond_proj_dim": W_EMBEDDING} if is_unet else {})


def _copy(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a model without weights, its configs changed, that lives as long as this process."""
    _copies.append(tempfile.TemporaryDirectory(prefix="lcm_jax-configs-"))
    target = Path(_copies[-1].name)
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in target.rglob("config.json"):
        path.write_text(json.dumps(change(foreign.read_json(path))))
    return target


_copies: list[tempfile.TemporaryDirectory] = []


def of_config(path: Path, narrow: bool) -> Workload:
    """The training step of a file of configs/."""
    config = stage.read_config(path)
    size, batch = config.data.resolution, config.data.batch_size
    found = Workload("step", path.stem, size, batch, config.model.dtype, config.train.remat, alone=True)
    return dataclasses.replace(found.narrowed(), batch=config.train.accumulation_steps) if narrow else found


def training_config(workload: Workload) -> ConfigDict:
    """The resolved config of a training workload, which reads no files.

    Frozen weights are held in the compute dtype, except in a "step", which is the config's own.
    """
    if workload.kind == "step":
        config = stage.read_config(f"configs/{workload.model}.py")
        for part in ("teacher", "student", "vae"):
            if config.model[part]:
                config.model[part] = model_folder(config.model[part], workload.narrow)
    else:
        config = stage.read_config(getattr(MODELS[workload.model], workload.kind))
        config.model.teacher, config.model.vae = source_folder(workload), None
        config.model.dtype = config.model.teacher_dtype = workload.dtype
        config.train.remat = workload.remat
    config.data.source, config.data.path, config.data.filters = "shapes", None, ()
    config.data.resolution, config.data.batch_size = workload.size, workload.batch
    config_lib.validate(config)
    return config_lib.resolve(config)
