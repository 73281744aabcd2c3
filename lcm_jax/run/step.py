"""config + models + mesh -> the jitted training step, with shapes and shardings of all that it takes.

    step(state, frozen, batch, key) -> (state, metrics)        state donated

The models may hold arrays or only shapes (`jax.ShapeDtypeStruct`), so `train` runs the same program that `aot` compiles
for machines that are not here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lcm_jax.cost import flops
from lcm_jax.diffusion import phases
from lcm_jax.diffusion.solvers import solver_grid
from lcm_jax.distill import OBJECTIVES
from lcm_jax.distill.objective import Frozen, Problem, draw, l2, pseudo_huber
from lcm_jax.distill.state import TrainState, create
from lcm_jax.distill.step import learning_rate_schedule, make_optimizer, make_step
from lcm_jax.errors import LcmError
from lcm_jax.models.attention import dot_product_attention
from lcm_jax.models.layers import dtypes_in_use
from lcm_jax.models.lora import Adapted
from lcm_jax.pretrained import text
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.run.config import needs_teacher, stages
from lcm_jax.run.models import Models
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import abstract_state, batch_sharding, check_batch, replicated


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One program and what it is made of. All but `problem`, `optimizer` and `step` are trees of ShapeDtypeStructs.

    Attributes:
      problem: what is distilled, its networks as they are compiled (attention, rematerialisation, gathering).
      optimizer: AdamW behind clipping.
      step: (state, frozen, batch, key) -> (state, metrics), jitted, state donated.
      state, frozen, batch, key: what the step takes, with shardings; the batch is one of square images.
    """

    problem: Problem
    optimizer: optax.GradientTransformation
    step: Any
    state: TrainState
    frozen: Frozen
    batch: Any
    key: Any

    def begin(self, theta: Any) -> TrainState:
        """The initial state of a student with weights `theta`, created in its final sharding."""
        new = functools.partial(create, optimizer=self.optimizer)
        return jax.jit(new, out_shardings=_shardings(self.state))(theta)

    def place_frozen(self, models: Models) -> Frozen:
        """The frozen arrays, each once, in their final sharding and dtype."""

        def placed(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:  # without a copy if it is so already
            return jax.device_put(value if value.dtype == like.dtype else jnp.asarray(value, like.dtype), like.sharding)

        null = text.null(models.teacher, models.teacher_params) if self.frozen.null is not None else None
        return jax.tree.map(placed, make_frozen(self.problem, models, null), self.frozen)

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered from shapes alone."""
        return self.step.lower(self.state, self.frozen, self.batch, self.key)

    def model_flops(self) -> float:
        """FLOPs that the networks of one step ask for, over all devices; what is computed twice counts once."""
        plain = {name: _plain(getattr(self.problem, name)) for name in ("student", "teacher")}
        problem = dataclasses.replace(self.problem, **plain)

        def loss(params: Any, target: Any, frozen: Frozen, batch: Any, key: jax.Array) -> jax.Array:
            draws = draw(problem, key, batch["mean"].shape)
            return OBJECTIVES[problem.objective].loss(problem, params, target, frozen, batch, draws).mean()

        args = (self.state.params, self.state.ema_params, self.frozen, self.batch, self.key)
        return flops.count(jax.value_and_grad(loss), *args)


def make(config: ConfigDict, models: Models, mesh: Mesh) -> TrainingStep:
    """The training step of a resolved config.

    Args:
      models: with weights, or with their shapes alone.
      mesh: over the devices that the step is compiled for.

    Raises:
      LcmError: the batch does not split over the mesh; the config's attention cannot run there, or lacks the
        forward-mode derivative that the objective takes.
    """
    train, attention = config.train, config.model.attention
    check_batch(mesh, config.data.batch_size, train.accumulation_steps)
    if OBJECTIVES[config.objective].forward_mode and attention not in kernels.FORWARD_MODE:
        raise LcmError(
            f"config.model.attention = {attention!r}: objective {config.objective!r} differentiates the student in "
            f"forward mode, which not every attention can; set one of {', '.join(kernels.FORWARD_MODE)}"
        )
    on_mesh = functools.partial(kernels.on_mesh, mesh=mesh, unet_attention=attention, remat=train.remat)
    problem = make_problem(config, on_mesh(models.teacher), on_mesh(models.student))
    rate = learning_rate_schedule(
        train.learning_rate, train.lr_warmup_steps, train.lr_decay_start, train.lr_decay_steps
    )
    optimizer = make_optimizer(
        rate,
        b1=train.adam_b1,
        b2=train.adam_b2,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        mu_dtype=train.mu_dtype,
    )
    theta = _shapes(models.trainable)
    state = abstract_state(mesh, jax.eval_shape(lambda params: create(params, optimizer), theta))
    null = text_shapes(models, 1) if problem.teacher is not None else None
    frozen = make_frozen(problem, models, None)
    weights = {name: tree for name in ("teacher", "base") if (tree := getattr(frozen, name)) is not None}
    dtypes = dtypes_in_use(weights, config.model.teacher_dtype)
    weights = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), weights, dtypes)
    frozen = abstract_state(mesh, Frozen(null=null, **weights))
    rows, whole = batch_sharding(mesh), replicated(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_shapes(config, models))
    step = jax.jit(
        make_step(problem, optimizer, train.ema_decay, train.accumulation_steps, rate),
        donate_argnums=0,
        in_shardings=(_shardings(state), _shardings(frozen), rows, whole),
        out_shardings=(_shardings(state), whole),
        compiler_options=kernels.training(mesh.devices.flat[0].platform, mesh.size),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    return TrainingStep(problem, optimizer, step, state, frozen, batch, key)


def _plain(unet: Any) -> Any:
    """The network in its plainest form: it computes nothing twice, and all by JAX's own operations."""
    if isinstance(unet, Adapted):
        return dataclasses.replace(unet, module=_plain(unet.module))
    return unet and unet.clone(attention_fn=dot_product_attention, weights_fn=None, remat="none")


def make_problem(config: ConfigDict, teacher: Pipeline, student: Pipeline) -> Problem:
    """What the config distils. `student` is the teacher's pipeline with the student's UNet."""
    distill = config.distill
    grid = solver_grid(teacher.schedule, distill.solver_steps, distill.solver)
    phased = stages(distill) if distill.map == "phased" else []
    return Problem(
        student=student.unet,
        teacher=teacher.unet if needs_teacher(config) else None,
        schedule=teacher.schedule,
        grid=grid,
        distance={"l2": l2, "huber": functools.partial(pseudo_huber, c=distill.huber_c)}[distill.loss],
        w_min=distill.w_min,
        w_max=distill.w_max,
        scaling_factor=teacher.vae.scaling_factor,
        sigma_data=distill.sigma_data,
        timestep_scaling=distill.timestep_scaling,
        objective=config.objective,
        lcd_weight=distill.lcd_weight,
        ends=phases.ends(teacher.schedule, grid, [count for count, _ in phased]) if phased else None,
        stages=tuple(step for _, step in phased[1:]),
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
    cond = jax.eval_shape(functools.partial(text.encode_tokens, pipeline.text_encoders), params, ids)
    return {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in cond.items()}


def make_frozen(problem: Problem, models: Models, null: Any) -> Frozen:
    """Frozen weights without duplicates: adapters on the teacher's own weights share them."""
    weights = models.teacher_params["unet"] if problem.teacher is not None else None
    base = models.student_params["unet"]["base"] if isinstance(models.student.unet, Adapted) else None
    return Frozen(teacher=weights, null=null, base=None if base is weights else base)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
