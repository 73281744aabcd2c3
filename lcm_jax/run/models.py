"""The models of a run: the pipeline that it takes its parts from, and the student that training starts from.

                  pipeline (VAE, text encoders, noise table, teacher's UNet)    student's UNet
    LCD           model.teacher                                                 model.student, else the teacher's
    LCF           model.teacher, else model.student                             model.student, an LCM

The student is that pipeline with its own UNet: with a w embedding if it is told w, `Adapted` in a LoRA run. The
programs that need it, `train` and `export`, build it from the run's config alone.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lcm_jax import assets, files
from lcm_jax.diffusion.consistency import SIGMA_DATA, TIMESTEP_SCALING
from lcm_jax.distill import state
from lcm_jax.distill.step import named_key
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import Pipeline, hub, load_pipeline, load_unet, read_record
from lcm_jax.pretrained.diffusers_folder import check_noise
from lcm_jax.pretrained.names import Place
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data

_SCHEDULER = "scheduler/scheduler_config.json"


def load_teacher(config: ConfigDict, place: Place | None = None, weights: bool | Collection[str] = True) -> Pipeline:
    """The pipeline of the run. Where no loss asks the teacher (plain LCF) its UNet is the student's, read once.

    place: takes each parameter as soon as it is read; weights: False for shapes alone, or names of parts; see
    `load_pipeline`.

    Raises:
      LcmError: a model cannot be loaded.
    """
    model = config.model
    source = assets.resolve(model.teacher or model.student)
    unet = None if config_lib.asks_teacher(config) or model.teacher is None else assets.resolve(model.student)
    dtype = jnp.dtype("float32" if model.dtype == "auto" else model.dtype)
    vae, configs = (name and assets.resolve(name) for name in (model.vae, model.config))
    pipeline = load_pipeline(source, dtype=dtype, unet=unet, vae=vae, config=configs, place=place, weights=weights)
    if dtype.itemsize < 4 and getattr(pipeline.vae, "force_upcast", False):  # SDXL's overflows in half precision
        pipeline = dataclasses.replace(pipeline, vae=pipeline.vae.clone(dtype=jnp.float32))
    return pipeline


def load_student(config: ConfigDict, teacher: Pipeline, place: Place | None = None) -> Pipeline:
    """The pipeline with the UNet that training starts from.

    In a LoRA run its UNet is an `Adapted` one with `params["unet"]` = {"base", "lora"}, "base" being the teacher's own
    tree where training starts from the teacher; see `theta`, `with_theta` and `merged`.

    Args:
      config: of the run.
      teacher: from `load_teacher`.
      place: takes each parameter that the teacher has not, see `load_pipeline`.

    Raises:
      LcmError: `config.model.student` cannot be loaded, is no LCM though LCF needs one, was distilled with other
        constants than the config's, or has another w embedding than the config asks for.
    """
    unet, params = teacher.unet, teacher.params["unet"]
    if config_lib.asks_teacher(config) and config.model.student not in (None, config.model.teacher):
        weights = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
        source = assets.resolve(config.model.student)
        check_noise(source, teacher.schedule, config.model.teacher, weights)
        unet, params = load_unet(source, dtype=unet.dtype, place=place, weights=weights)
    dim = config.distill.w_embedding_dim
    if config.objective == "lcf":
        _check_lcm(config, unet)
    if config.lora.rank and dim and unet.time_cond_proj_dim is None:
        raise LcmError(f"config.distill.w_embedding_dim = {dim}: {config_lib.W_EMBEDDING_OF_A_LORA}")
    unet, params = state.student_of(unet, params, dim, place)
    if config.lora.rank:
        targets = tuple(config.lora.targets) or lora.DEFAULT_TARGETS
        key = named_key(config.seed, "lora")
        unet, params = state.adapt(unet, params, key, config.lora.rank, config.lora.alpha, targets, place)
    return dataclasses.replace(teacher, unet=unet, params={**teacher.params, "unet": params})


def shapes(config: ConfigDict) -> tuple[Pipeline, Pipeline]:
    """Teacher and student without weights: what does not go together is found before minutes go into reading them.

    Raises:
      LcmError: a model cannot be loaded, is not of the kind that the config needs, or does not fit the other.
    """
    teacher = load_teacher(config, weights=False)
    _check_teacher(config, teacher)
    student = load_student(config, teacher)
    _check_student(config, teacher, student)
    return teacher, student


def theta(student: Pipeline) -> Any:
    """What training changes and checkpoints hold: the UNet's weights, or in a LoRA run its adapters."""
    params = student.params["unet"]
    return params["lora"] if isinstance(student.unet, lora.Adapted) else params


def with_theta(student: Pipeline, params: Any) -> Pipeline:
    """The student with other values of `theta`."""
    if isinstance(student.unet, lora.Adapted):
        params = {"base": student.params["unet"]["base"], "lora": params}
    return dataclasses.replace(student, params={**student.params, "unet": params})


def merged(student: Pipeline) -> Pipeline:
    """The student as an ordinary pipeline: adapters, where it has any, merged into their base."""
    if not isinstance(student.unet, lora.Adapted):
        return student
    params = student.params["unet"]
    unet = lora.merge(params["base"], [(params["lora"], student.unet.scale)])
    return dataclasses.replace(student, unet=student.unet.module, params={**student.params, "unet": unet})


def _check_teacher(config: ConfigDict, teacher: Pipeline) -> None:
    """Raises LcmError where config and teacher do not go together."""
    training_data.check_sizes(config, teacher)
    found, asked = teacher.schedule.prediction_type, config.model.prediction_type
    if asked not in (None, found):
        raise LcmError(
            f"config.model.prediction_type = {asked!r}, but the model's scheduler_config.json says {found!r}, and its "
            "UNet was trained so; leave it None, or correct that file if it is wrong"
        )
    if config_lib.asks_teacher(config) and teacher.has_w_embedding:
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
            f'{_SCHEDULER}; distil one first (config.objective = "lcd")'
        )
    if has is None and config.distill.w_embedding_dim:
        raise LcmError(
            f"config.distill.w_embedding_dim = {config.distill.w_embedding_dim}: config.model.student = {name!r} is an "
            "LCM without w embedding; set 0"
        )
    _check_constants(config, record, scheduler, told_w=has is not None)


def _check_constants(config: ConfigDict, record: Mapping[str, Any], scheduler: Mapping[str, Any], told_w: bool) -> None:
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
    if told_w and not low <= distill.w_min <= distill.w_max <= high:
        raise LcmError(
            f"config.distill.w_min = {distill.w_min:g}, w_max = {distill.w_max:g}: config.model.student = {name!r} was "
            f"distilled on w in [{low:g}, {high:g}]; stay within"
        )


def _lcm_scheduler(source: str) -> Mapping[str, Any]:
    """The scheduler config of a pipeline that samples with LCMScheduler; {} where there is no such."""
    path = hub.local_folder(source, [_SCHEDULER]) / _SCHEDULER
    config = files.read_json(path) if path.is_file() else {}
    return config if config.get("_class_name") == "LCMScheduler" else {}
