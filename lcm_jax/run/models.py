"""The models of a run: the teacher's pipeline, and the student that training starts from.

                  teacher (VAE, text encoders, noise table, UNet)    student's UNet
    LCD           model.teacher                                      model.student, else the teacher's
    LCF           model.teacher, else model.student                  model.student, an LCM

The student is the teacher's pipeline with another UNet and the record of the run. Its UNet has a w embedding if it is
conditioned on w, and is `Adapted` in a LoRA run. `train`, `export` and `aot` build it from the config alone.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lcm_jax import assets
from lcm_jax.diffusion import schedule
from lcm_jax.diffusion.consistency import SIGMA_DATA, TIMESTEP_SCALING
from lcm_jax.distill import OBJECTIVES
from lcm_jax.distill.step import named_key
from lcm_jax.distill.student import adapt, student_of, trainable
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.models.config import RUN_FIELDS
from lcm_jax.pretrained import Pipeline, hub, load_pipeline, load_unet, read_record
from lcm_jax.pretrained.diffusers_folder import check_noise, folder_scheduler
from lcm_jax.pretrained.model import (
    SCHEDULER,
    TOKENIZER_OF,
    PipelineParams,
    check_text_to_image,
    in_half_precision,
    recorded,
)
from lcm_jax.pretrained.names import PutFn
from lcm_jax.run.config import needs_teacher, phases_at_end
from lcm_jax.run.data import check_sizes
from lcm_jax.run.keys import W_EMBEDDING_OF_A_LORA
from lcm_jax.runtime.workdir import digest_entry


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """Teacher and student of a run, with their weights or shapes.

    They share all parts except the UNet. `digests`: entries of the workdir's models.json; {} for shapes.
    """

    teacher: Pipeline
    teacher_params: PipelineParams
    student: Pipeline
    student_params: PipelineParams
    digests: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def trainable(self) -> Any:
        """What training changes: all of the student's UNet, or its adapters."""
        return trainable(self.student.unet, self.student_params["unet"])


def load(config: ConfigDict, put: PutFn | None = None) -> Models:
    """Teacher and student with their weights; put: see `load_pipeline`. They must have passed `shapes`.

    Raises:
      LcmError: a model cannot be loaded.
    """
    weights = _Checksums(put)
    teacher = load_teacher(config, weights)
    models = Models(*teacher, *load_student(config, *teacher, weights))
    return dataclasses.replace(models, digests=_digests(config, models, weights))


class _Checksums:
    """A `put` that keeps a checksum of what goes through it, before it is split over devices and processes.

    Every byte counts, at the price of some seconds for 10 GB, which are in memory at that moment anyway.
    """

    def __init__(self, put: PutFn | None) -> None:
        self._put, self._of = put, {}

    def __call__(self, value: Any) -> Any:
        host = np.ascontiguousarray(value)
        placed = value if self._put is None else self._put(value)
        self._of[id(placed)] = f"{host.dtype} {host.shape} {zlib.crc32(host.reshape(-1).view(np.uint8)):08x}"
        return placed

    def of(self, params: Any) -> dict[str, str]:
        """Name of each parameter -> its dtype, shape and checksum."""
        return {name: self._of[id(leaf)] for name, leaf in flatten_dict(params, sep="/").items()}


def _digests(config: ConfigDict, models: Models, weights: _Checksums) -> dict[str, dict[str, str]]:
    """Part -> an entry of models.json: what of it the training depends on, whatever files it came from.

    Files that were moved, cut into shards or written anew with the same numbers have the same digests.
    """
    teacher, params, model = models.teacher, models.teacher_params, config.model
    student, base = models.student.unet, models.student_params["unet"]
    if isinstance(student, lora.Adapted):
        student, base = student.module, base["base"]
    noise = schedule.noise_fields(teacher.configs["scheduler"]), teacher.constants.zero_null
    found = {part: (_fields(module), weights.of(params[part])) for part, module in teacher.parts.items()}
    found |= {TOKENIZER_OF[part]: (t.digest, t.length) for part, t in teacher.tokenizers.items()}
    found |= {"scheduler": noise, "student": (_fields(student), weights.of(base))}
    keys = dict.fromkeys(found, "teacher" if model.teacher else "student") | {"student": "student"}
    keys |= {} if needs_teacher(config) else {"unet": "student"}
    keys |= {"vae": "vae"} if model.vae else {}
    names = {key: f"{key} {_with_revision(model[key] or model.teacher)}" for key in {*keys.values()}}
    digest = {part: hashlib.sha256(json.dumps(content, sort_keys=True).encode()) for part, content in found.items()}
    return {part: digest_entry(digest[part].hexdigest(), names[keys[part]]) for part in found}


def _fields(module: nn.Module) -> list[str]:
    """What a module is, without what a later version may add with a default."""
    fields = [field for field in dataclasses.fields(module) if field.name not in RUN_FIELDS]
    values = {
        field.name: getattr(module, field.name) for field in fields if field.default != getattr(module, field.name)
    }
    return [type(module).__name__, *(f"{name}={value!r}" for name, value in sorted(values.items()))]


def _with_revision(source: str) -> str:
    """A model as the config names it; one on the hub with the revision that was read: `owner/name@revision`."""
    place = assets.resolve(source)
    path = hub.local_file(place) if hub.is_single_file(place) else hub.local_folder(place, [SCHEDULER])
    above, _, below = path.as_posix().partition("/snapshots/")
    return f"{source}@{below.split('/')[0]}" if below and "models--" in above else source


def shapes(config: ConfigDict) -> Models:
    """Teacher and student without weights, checked, so that unfit models are refused before minutes of reading.

    Raises:
      LcmError: a model cannot be loaded, is not what the config needs, or does not fit the other.
    """
    teacher = load_teacher(config, weights=False)
    check_teacher(config, teacher[0])
    models = Models(*teacher, *load_student(config, *teacher))
    _check_student(config, models.teacher, models.student)
    return models


def load_teacher(
    config: ConfigDict, put: PutFn | None = None, weights: bool | Collection[str] = True
) -> tuple[Pipeline, PipelineParams]:
    """The teacher of the run. If no loss needs one (plain LCF), its UNet is the student's, which is read once.

    put, weights: see `load_pipeline`.
    """
    model = config.model
    source = assets.resolve(model.teacher or model.student)
    unet = None if needs_teacher(config) or model.teacher is None else assets.resolve(model.student)
    dtype = jnp.dtype("float32" if model.dtype == "auto" else model.dtype)
    vae, configs = (name and assets.resolve(name) for name in (model.vae, model.config))
    pipeline, params = load_pipeline(
        source, model.variant, dtype, unet=unet, vae=vae, config=configs, put=put, weights=weights
    )
    return in_half_precision(pipeline, dtype.itemsize < 4), params


def load_student(
    config: ConfigDict, teacher: Pipeline, teacher_params: PipelineParams, put: PutFn | None = None
) -> tuple[Pipeline, PipelineParams]:
    """The teacher's pipeline with the UNet that training starts from, and the record of the run.

    In a LoRA run that UNet is `Adapted` and params["unet"] = {"base", "lora"}; "base" is the teacher's own tree if
    training starts from the teacher. See `distill.student`.

    Args:
      config: of the run.
      teacher, teacher_params: from `load_teacher`.
      put: for each parameter that the teacher does not have, see `load_pipeline`.

    Raises:
      LcmError: `config.model.student` cannot be loaded, is not an LCM although LCF needs one, or was distilled with
        other constants or another w embedding than the config's.
    """
    unet, params = teacher.unet, teacher_params["unet"]
    weights = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    if needs_teacher(config) and config.model.student not in (None, config.model.teacher):
        source = assets.resolve(config.model.student)
        check_noise(source, teacher.schedule, config.model.teacher, weights)
        variant = config.model.variant
        unet, params = load_unet(source, variant, unet.dtype, put=put, weights=weights, or_without=True)
    dim = config.distill.w_embedding_dim
    if OBJECTIVES[config.objective].needs_lcm:
        _check_lcm(config, unet, weights)
    if config.lora.rank and dim and unet.time_cond_proj_dim is None:
        raise LcmError(f"config.distill.w_embedding_dim = {dim}: {W_EMBEDDING_OF_A_LORA}")
    unet, params = student_of(unet, params, dim, put)
    if config.lora.rank:
        targets = tuple(config.lora.targets) or lora.DEFAULT_TARGETS
        key = named_key(config.seed, "lora")
        unet, params = adapt(unet, params, key, config.lora.rank, config.lora.alpha, targets, put)
    student = dataclasses.replace(teacher, unet=unet)
    return dataclasses.replace(student, record=record(config, student)), {**teacher_params, "unet": params}


def record(config: ConfigDict, student: Pipeline) -> dict[str, Any]:
    """What sampling must match of the run: the first part of `lcm_config.json`.

    A student without w embedding has w_embedding_dim 0; w_min and w_max are then the range that it averages over.
    """
    distill, dim = config.distill, student.unet.time_cond_proj_dim or 0
    uses_w = dim or needs_teacher(config)
    lora = {key: config.lora[key] for key in ("rank", "alpha")} | {"targets": list(config.lora.targets)}
    return {
        "objective": config.objective,
        "w_embedding_dim": dim,
        **({"w_min": distill.w_min, "w_max": distill.w_max} if uses_w else {}),
        "solver_steps": distill.solver_steps,
        "timestep_scaling": distill.timestep_scaling,
        "sigma_data": distill.sigma_data,
        **({"map": distill.map, "phases": phases} if (phases := phases_at_end(config)) else {}),
        "prediction_type": student.schedule.prediction_type,
        **({"lora": lora} if config.lora.rank else {}),
    }


def check_teacher(config: ConfigDict, teacher: Pipeline) -> None:
    """Raises LcmError if the config cannot be run with this teacher."""
    check_sizes(config, teacher)
    found, asked = teacher.schedule.prediction_type, config.model.prediction_type
    if asked not in (None, found):
        raise LcmError(
            f"config.model.prediction_type = {asked!r}, but the model's scheduler_config.json has {found!r}; leave it "
            "None, or correct that file if the UNet was trained otherwise"
        )
    if needs_teacher(config) and teacher.has_w_embedding:
        raise LcmError(
            f"config.model.teacher = {config.model.teacher!r} is a Latent Consistency Model itself (it has a w "
            "embedding); give the diffusion model that it was distilled from"
        )
    key = "teacher" if config.model.teacher else "student"
    check_text_to_image(teacher, f"config.model.{key} = {config.model[key]!r}")


def _check_student(config: ConfigDict, teacher: Pipeline, student: Pipeline) -> None:
    """Raises LcmError if the student's UNet does not take the teacher's inputs."""
    added = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    for field in ("in_channels", "out_channels", "cross_attention_dim", *added):
        has, needs = (sorted(map(str, {*unet.per_level(field)})) for unet in (student.unet, teacher.unet))
        if has != needs:
            raise LcmError(
                f"config.model.student = {config.model.student!r} has {field} {', '.join(has)}, the teacher "
                f"{', '.join(needs)}; start from a model of the teacher's family"
            )


def _check_lcm(config: ConfigDict, unet: Any, weights: bool) -> None:
    """Raises LcmError unless `config.model.student` is an LCM that was distilled with the config's constants.

    If its files do not record them, timestep scaling and sigma_data are those of the published LCMs, and any number of
    solver steps is accepted. weights: False: if the hub cannot be asked, the package's own configs are used.
    """
    distill, name = config.distill, config.model.student
    source, has_w_embedding = assets.resolve(name), unet.time_cond_proj_dim is not None
    record, scheduler = read_record(source, weights), folder_scheduler(source, weights)
    scheduler = scheduler if scheduler.get("_class_name") == "LCMScheduler" else {}
    if not (has_w_embedding or record or scheduler):
        raise LcmError(
            f"config.model.student = {name!r} is not a Latent Consistency Model, which LCF fine-tunes: it has no "
            f"time_cond_proj_dim in unet/config.json, no lcm_config.json, and no LCMScheduler in {SCHEDULER}; distil "
            'one first (config.objective = "lcd")'
        )
    if distill.w_embedding_dim and not has_w_embedding:
        raise LcmError(
            f"config.distill.w_embedding_dim = {distill.w_embedding_dim}: config.model.student = {name!r} is an LCM "
            "without w embedding; set 0"
        )
    constants = recorded(record)
    phases = constants.get("phases", 0)
    made_with = {
        "solver_steps": constants.get("solver_steps", scheduler.get("original_inference_steps", distill.solver_steps)),
        "timestep_scaling": constants.get("timestep_scaling", scheduler.get("timestep_scaling", TIMESTEP_SCALING)),
        "sigma_data": constants.get("sigma_data", SIGMA_DATA),
        **({"map": "phased", "phases": phases} if phases else {"map": "origin"}),
    }
    for key, value in made_with.items():
        if distill[key] != value:
            raise LcmError(
                f"config.distill.{key} = {distill[key]!r}, but config.model.student = {name!r} was distilled with "
                f"{value!r}; set that"
            )
    low, high = constants.get("w_min", 0.0), constants.get("w_max", float("inf"))
    if has_w_embedding and not low <= distill.w_min <= distill.w_max <= high:
        raise LcmError(
            f"config.distill.w_min = {distill.w_min:g}, w_max = {distill.w_max:g}: config.model.student = {name!r} was "
            f"distilled on w in [{low:g}, {high:g}]; stay within"
        )
