"""config + models + mesh -> the jitted training step, with shapes and shardings of all that it takes.

    step(state, frozen, batch, key) -> (state, metrics)        state donated

The models may hold arrays or only shapes (`jax.ShapeDtypeStruct`): `train` runs, and `aot` compiles for machines that
are not here, one and the same program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lcm_jax.cost import flops
from lcm_jax.diffusion import solvers
from lcm_jax.distill import OBJECTIVES
from lcm_jax.distill import objective as losses
from lcm_jax.distill import objective as objectives
from lcm_jax.distill import state as state_lib
from lcm_jax.distill import step as step_lib
from lcm_jax.errors import LcmError
from lcm_jax.models.attention import dot_product_attention
from lcm_jax.models.lora import Adapted
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.run import config as config_lib
from lcm_jax.run.models import Models
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.kernels import on_mesh


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One program and what it is made of. All but `problem`, `rate` and `step` are trees of ShapeDtypeStructs.

    Attributes:
      problem: what is distilled, its networks as they are compiled (attention, rematerialisation, gathering).
      optimizer: AdamW behind clipping.
      rate: learning rate of a step.
      step: (state, frozen, batch, key) -> (state, metrics), jitted, state donated.
      state, frozen, batch, key: what the step takes, with shardings. The batch is that of square pictures.
    """

    problem: objectives.Problem
    optimizer: optax.GradientTransformation
    rate: Callable[[Any], Any]
    step: Any
    state: state_lib.TrainState
    frozen: objectives.Frozen
    batch: Any
    key: Any

    def begin(self, theta: Any) -> state_lib.TrainState:
        """The state at step 0 of a student whose weights are `theta`, made where it shall lie."""
        create = functools.partial(state_lib.create, optimizer=self.optimizer)
        return jax.jit(create, out_shardings=_shardings(self.state))(theta)

    def place_frozen(self, models: Models) -> objectives.Frozen:
        """The frozen arrays, each once, in their final sharding and dtype."""
        null = conditioning.null(models.teacher, models.teacher_params) if self.frozen.null is not None else None
        return jax.tree.map(_placed, make_frozen(self.problem, models, null), self.frozen)

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered from shapes alone."""
        return self.step.lower(self.state, self.frozen, self.batch, self.key)

    def model_flops(self) -> float:
        """FLOPs that the networks of one step ask for, over all devices; what is computed twice counts once."""
        plain = {name: _plain(getattr(self.problem, name)) for name in ("student", "teacher")}
        problem = dataclasses.replace(self.problem, **plain)

        def loss(params: Any, target: Any, frozen: objectives.Frozen, batch: Any, key: jax.Array) -> jax.Array:
            draws = objectives.draw(problem, key, batch["mean"].shape)
            return OBJECTIVES[problem.objective].loss(problem, params, target, frozen, batch, draws).mean()

        args = (self.state.params, self.state.ema_params, self.frozen, self.batch, self.key)
        return flops.count(jax.value_and_grad(loss), *args)


def make(config: ConfigDict, models: Models, mesh: Mesh) -> TrainingStep:
    """The training step of a resolved config.

    Args:
      models: with weights, or with their shapes alone.
      mesh: over the devices that the step is compiled for.

    Raises:
      LcmError: the batch does not split over the mesh; the attention asked for cannot run there, or lacks the
        forward-mode derivative that the objective takes.
    """
    mesh_lib.check_batch(mesh, config.data.batch_size, config.train.accumulation_steps)
    attention, remat = config.model.attention, config.train.remat
    if OBJECTIVES[config.objective].forward_mode and attention not in compiler.FORWARD_MODE:
        raise LcmError(
            f"config.model.attention = {attention!r}: objective {config.objective!r} differentiates the student in "
            f"forward mode, which not every attention can; set one of {', '.join(compiler.FORWARD_MODE)}"
        )
    teacher, student = (on_mesh(pipeline, mesh, attention, remat) for pipeline in (models.teacher, models.student))
    problem = make_problem(config, teacher, student)
    rate = step_lib.learning_rate_schedule(
        config.train.learning_rate,
        config.train.lr_warmup_steps,
        config.train.lr_decay_start,
        config.train.lr_decay_steps,
    )
    optimizer = step_lib.make_optimizer(
        rate,
        b1=config.train.adam_b1,
        b2=config.train.adam_b2,
        eps=config.train.adam_eps,
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        mu_dtype=config.train.mu_dtype,
    )
    theta = _shapes(models.trainable)
    state = mesh_lib.abstract_state(mesh, jax.eval_shape(lambda p: state_lib.create(p, optimizer), theta))
    cond = text_shapes(models, 1) if problem.teacher is not None else None
    frozen = _shapes(make_frozen(problem, models, None), jnp.dtype(config.model.teacher_dtype))
    frozen = mesh_lib.abstract_state(mesh, frozen.replace(null=cond))
    rows, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_shapes(config, models))
    step = jax.jit(
        step_lib.make_step(problem, optimizer, config.train.ema_decay, config.train.accumulation_steps, rate),
        donate_argnums=0,
        in_shardings=(_shardings(state), _shardings(frozen), rows, everywhere),
        out_shardings=(_shardings(state), everywhere),
        compiler_options=compiler.training(mesh.devices.flat[0].platform),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    return TrainingStep(problem, optimizer, rate, step, state, frozen, batch, key)


def _plain(unet: Any) -> Any:
    """The network in its plainest form, which computes nothing twice and all of it by JAX's own operations."""
    if isinstance(unet, Adapted):
        return dataclasses.replace(unet, module=_plain(unet.module))
    return unet and unet.clone(attention_fn=dot_product_attention, weights_fn=None, remat="none")


def make_problem(config: ConfigDict, teacher: Pipeline, student: Pipeline) -> objectives.Problem:
    """What the config distils. `student` is the teacher's pipeline with the student's UNet."""
    distance = {
        "l2": losses.l2,
        "huber": functools.partial(losses.pseudo_huber, c=config.distill.huber_c),
    }[config.distill.loss]
    return objectives.Problem(
        student=student.unet,
        teacher=teacher.unet if config_lib.needs_teacher(config) else None,
        schedule=teacher.schedule,
        grid=solvers.solver_grid(teacher.schedule, config.distill.solver_steps, config.distill.solver),
        distance=distance,
        w_min=config.distill.w_min,
        w_max=config.distill.w_max,
        scaling_factor=teacher.vae.scaling_factor,
        sigma_data=config.distill.sigma_data,
        timestep_scaling=config.distill.timestep_scaling,
        objective=config.objective,
        lcd_weight=config.distill.lcd_weight,
    )


def as_batch(arrays: dict[str, Any]) -> dict[str, Any]:
    """Encoded rows -> the step's batch: the posterior's moments, and "cond"."""
    arrays = dict(arrays)
    moments = {name: arrays.pop(name) for name in ("mean", "logvar")}
    return {**moments, "cond": arrays}


def batch_shapes(config: ConfigDict, models: Models) -> dict[str, Any]:
    """ShapeDtypeStructs of a batch of square images, as `encoding.make_encode` makes it."""
    pipeline = models.teacher
    b, side = config.data.batch_size, config.data.resolution // pipeline.vae.factor
    moments = jax.ShapeDtypeStruct((b, side, side, pipeline.vae.latent_channels), jnp.float32)
    cond = text_shapes(models, b)
    if pipeline.is_xl:
        cond["time_ids"] = jax.ShapeDtypeStruct((b, 6), jnp.float32)
    return {"mean": moments, "logvar": moments, "cond": cond}


def text_shapes(models: Models, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """ShapeDtypeStructs of the conditioning of `batch` captions, float32, without SDXL's time_ids."""
    pipeline = models.teacher
    ids = {
        name: jax.ShapeDtypeStruct((batch, getattr(pipeline, name).max_position_embeddings), jnp.int32)
        for name in pipeline.tokenizers
    }
    params = _shapes({name: models.teacher_params[name] for name in ids})
    encode = functools.partial(conditioning.encode_tokens, pipeline.text_encoders)
    cond = jax.eval_shape(encode, params, ids)
    return {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in cond.items()}


def make_frozen(problem: objectives.Problem, models: Models, null: Any) -> objectives.Frozen:
    """Frozen weights without duplicates: adapters on the teacher's own weights share them."""
    weights = models.teacher_params["unet"] if problem.teacher is not None else None
    base = models.student_params["unet"]["base"] if isinstance(models.student.unet, Adapted) else None
    return objectives.Frozen(teacher=weights, null=null, base=None if base is weights else base)


def _shapes(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _placed(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """`value` in the dtype and on the sharding of `like`; no copy where it is so already."""
    return jax.device_put(value if value.dtype == like.dtype else jnp.asarray(value, like.dtype), like.sharding)
