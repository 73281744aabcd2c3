"""The models of a run: the teacher's pipeline, and the student that training starts from.

                  teacher (VAE, text encoders, noise table, UNet)    student's UNet
    LCD           model.teacher                                      model.student, else the teacher's
    LCF           model.teacher, else model.student                  model.student, an LCM

The student is the teacher's pipeline with a UNet of its own, which has a w embedding if it is conditioned on w and is
`Adapted` in a LoRA run, and with the constants of the run. `train`, `export` and `aot` build it from the config alone.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lcm_jax import assets, files
from lcm_jax.diffusion.consistency import SIGMA_DATA, TIMESTEP_SCALING
from lcm_jax.distill import OBJECTIVES
from lcm_jax.distill.step import named_key
from lcm_jax.distill.student import adapt, student_of, trainable
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import Pipeline, hub, load_pipeline, load_unet, read_record
from lcm_jax.pretrained.diffusers_folder import check_noise
from lcm_jax.pretrained.model import SCHEDULER, PipelineParams, in_half_precision
from lcm_jax.pretrained.names import PutFn
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """Teacher and student of a run, with weights or shapes beside them.

    Parts other than the UNet are the same in both, and so are their weights.
    """

    teacher: Pipeline
    teacher_params: PipelineParams
    student: Pipeline
    student_params: PipelineParams

    @property
    def trainable(self) -> Any:
        """What training changes: all of the student's UNet, or its adapters."""
        return trainable(self.student.unet, self.student_params["unet"])


def load(config: ConfigDict, put: PutFn | None = None) -> Models:
    """Teacher and student with their weights; put: see `load_pipeline`.

    Raises:
      LcmError: a model cannot be loaded, or is not of the kind that the config needs.
    """
    teacher = load_teacher(config, put)
    return Models(*teacher, *load_student(config, *teacher, put))


def shapes(config: ConfigDict) -> Models:
    """Teacher and student without weights: models that do not fit are found before minutes go into reading them.

    Raises:
      LcmError: a model cannot be loaded, is not of the kind that the config needs, or does not fit the other.
    """
    teacher = load_teacher(config, weights=False)
    _check_teacher(config, teacher[0])
    models = Models(*teacher, *load_student(config, *teacher))
    _check_student(config, models.teacher, models.student)
    return models


def load_teacher(
    config: ConfigDict, put: PutFn | None = None, weights: bool | Collection[str] = True
) -> tuple[Pipeline, PipelineParams]:
    """The teacher of the run. If no loss needs the teacher (plain LCF) its UNet is the student's, read once.

    put, weights: see `load_pipeline`.
    """
    model = config.model
    source = assets.resolve(model.teacher or model.student)
    unet = None if config_lib.needs_teacher(config) or model.teacher is None else assets.resolve(model.student)
    dtype = jnp.dtype("float32" if model.dtype == "auto" else model.dtype)
    vae, configs = (name and assets.resolve(name) for name in (model.vae, model.config))
    pipeline, params = load_pipeline(source, dtype=dtype, unet=unet, vae=vae, config=configs, put=put, weights=weights)
    return in_half_precision(pipeline, dtype.itemsize < 4), params


def load_student(
    config: ConfigDict, teacher: Pipeline, teacher_params: PipelineParams, put: PutFn | None = None
) -> tuple[Pipeline, PipelineParams]:
    """The teacher's pipeline with the UNet that training starts from, and the constants of the run.

    In a LoRA run its UNet is an `Adapted` one with params["unet"] = {"base", "lora"}, "base" being the teacher's own
    tree if training starts from the teacher; see `distill.student`.

    Args:
      config: of the run.
      teacher, teacher_params: from `load_teacher`.
      put: takes each parameter that is not the teacher's, see `load_pipeline`.

    Raises:
      LcmError: `config.model.student` cannot be loaded, is not an LCM though LCF needs one, was distilled with other
        constants than the config's, or has another w embedding than the config asks for.
    """
    unet, params = teacher.unet, teacher_params["unet"]
    if config_lib.needs_teacher(config) and config.model.student not in (None, config.model.teacher):
        weights = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
        source = assets.resolve(config.model.student)
        check_noise(source, teacher.schedule, config.model.teacher, weights)
        unet, params = load_unet(source, dtype=unet.dtype, put=put, weights=weights)
    dim = config.distill.w_embedding_dim
    if OBJECTIVES[config.objective].needs_lcm:
        _check_lcm(config, unet)
    if config.lora.rank and dim and unet.time_cond_proj_dim is None:
        raise LcmError(f"config.distill.w_embedding_dim = {dim}: {config_lib.W_EMBEDDING_OF_A_LORA}")
    unet, params = student_of(unet, params, dim, put)
    if config.lora.rank:
        targets = tuple(config.lora.targets) or lora.DEFAULT_TARGETS
        key = named_key(config.seed, "lora")
        unet, params = adapt(unet, params, key, config.lora.rank, config.lora.alpha, targets, put)
    student = dataclasses.replace(teacher, unet=unet)
    return dataclasses.replace(student, record=record(config, student)), {**teacher_params, "unet": params}


def record(config: ConfigDict, student: Pipeline) -> dict[str, Any]:
    """What inference must match of the run: the first part of `lcm_config.json`.

    w_embedding_dim 0 is a student without w embedding; w_min and w_max are then what it averages over, if it does.
    """
    distill, dim = config.distill, student.unet.time_cond_proj_dim or 0
    uses_w = dim or config_lib.needs_teacher(config)
    lora = {key: config.lora[key] for key in ("rank", "alpha")} | {"targets": list(config.lora.targets)}
    return {
        "objective": config.objective,
        "w_embedding_dim": dim,
        **({"w_min": distill.w_min, "w_max": distill.w_max} if uses_w else {}),
        "solver_steps": distill.solver_steps,
        "timestep_scaling": distill.timestep_scaling,
        "sigma_data": distill.sigma_data,
        "prediction_type": student.schedule.prediction_type,
        **({"lora": lora} if config.lora.rank else {}),
    }


def _check_teacher(config: ConfigDict, teacher: Pipeline) -> None:
    """Raises LcmError where config and teacher do not go together."""
    training_data.check_sizes(config, teacher)
    found, asked = teacher.schedule.prediction_type, config.model.prediction_type
    if asked not in (None, found):
        raise LcmError(
            f"config.model.prediction_type = {asked!r}, but the model's scheduler_config.json says {found!r}, and its "
            "UNet was trained so; leave it None, or correct that file if it is wrong"
        )
    if config_lib.needs_teacher(config) and teacher.has_w_embedding:
        raise LcmError(
            f"config.model.teacher = {config.model.teacher!r} is a Latent Consistency Model itself "
            "(it has a w embedding); give the diffusion model that it was made from"
        )
    if teacher.unet.in_channels != teacher.vae.latent_channels:
        raise LcmError(
            f"config.model.teacher = {config.model.teacher!r} takes {teacher.unet.in_channels} channels "
            f"(inpainting); {config.objective.upper()} needs a text-to-image model with {teacher.vae.latent_channels}"
        )


def _check_student(config: ConfigDict, teacher: Pipeline, student: Pipeline) -> None:
    """Raises LcmError where the student's UNet cannot take what the teacher's takes."""
    for field in ("in_channels", "out_channels", "addition_embed_type", "cross_attention_dim"):
        has, needs = (sorted(map(str, {*unet.per_level(field)})) for unet in (student.unet, teacher.unet))
        if has != needs:
            raise LcmError(
                f"config.model.student = {config.model.student!r} has {field} {', '.join(has)}, the teacher "
                f"{', '.join(needs)}; start from a model of the teacher's family"
            )


def _check_lcm(config: ConfigDict, unet: Any) -> None:
    """Raises LcmError unless `config.model.student` is an LCM, and was distilled as the config would go on with it."""
    name = config.model.student
    source = assets.resolve(name)
    record, scheduler = read_record(source), _lcm_scheduler(source)
    has = unet.time_cond_proj_dim
    if has is None and not record and not scheduler:
        raise LcmError(
            f"config.model.student = {name!r} is no Latent Consistency Model, which LCF fine-tunes: that has "
            "time_cond_proj_dim in unet/config.json, or an lcm_config.json, or LCMScheduler in "
            f'{SCHEDULER}; distil one first (config.objective = "lcd")'
        )
    if has is None and config.distill.w_embedding_dim:
        raise LcmError(
            f"config.distill.w_embedding_dim = {config.distill.w_embedding_dim}: config.model.student = {name!r} is an "
            "LCM without w embedding; set 0"
        )
    _check_constants(config, record, scheduler, has_w_embedding=has is not None)


def _check_constants(
    config: ConfigDict, record: Mapping[str, Any], scheduler: Mapping[str, Any], has_w_embedding: bool
) -> None:
    """Raises LcmError where the config contradicts what the LCM was distilled with, as far as its files say."""
    distill, name = config.distill, config.model.student
    known = {
        "solver_steps": record.get("solver_steps", scheduler.get("original_inference_steps", distill.solver_steps)),
        "timestep_scaling": record.get("timestep_scaling", scheduler.get("timestep_scaling", TIMESTEP_SCALING)),
        "sigma_data": record.get("sigma_data", SIGMA_DATA),
    }
    for key, value in known.items():
        if distill[key] != value:
            raise LcmError(
                f"config.distill.{key} = {distill[key]!r}, but config.model.student = {name!r} was distilled with "
                f"{value!r}; set that"
            )
    low, high = record.get("w_min", 0.0), record.get("w_max", float("inf"))
    if has_w_embedding and not low <= distill.w_min <= distill.w_max <= high:
        raise LcmError(
            f"config.distill.w_min = {distill.w_min:g}, w_max = {distill.w_max:g}: config.model.student = {name!r} was "
            f"distilled on w in [{low:g}, {high:g}]; stay within"
        )


def _lcm_scheduler(source: str) -> Mapping[str, Any]:
    """The scheduler config of a pipeline that samples with LCMScheduler; {} where there is no such."""
    path = hub.local_folder(source, [SCHEDULER]) / SCHEDULER
    config = files.read_json(path) if path.is_file() else {}
    return config if config.get("_class_name") == "LCMScheduler" else {}
