"""The training step in float64 on eight fake devices and on one: how far their states differ, and which arrays move.

    python tests/run_step_process.py TEACHER CASES STEPS SMALL

`jnp.float32` becomes float64 before the package is imported, so that the step computes everything in float64, casts
inside the networks included, and differences between two programs are not rounding. CASES is JSON, {case: [[data, fsdp,
slices], options]}, null for one device; the options may name the objective "tangent" (tangent.py). SMALL is the number
of elements from which weights are sharded, because a tiny model has no large ones. Prints one JSON object with, for
each case,

    distances      the largest relative L2 distance among the arrays of the first gradient and of the last state; losses
    moved          [[kind, axes of the mesh, dimensions], ...] of all collectives in the compiled step
    weights        dimensions of the weights, and of their shards
    same_text      whether the step lowered from shapes alone is the same program as that of the weights
"""

import dataclasses
import functools
import json
import os
import runpy
import sys
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64

import tangent  # noqa: E402

from lcm_jax.cost import hlo  # noqa: E402
from lcm_jax.distill import OBJECTIVES  # noqa: E402
from lcm_jax.run import models as run_models  # noqa: E402
from lcm_jax.run import step as run_step  # noqa: E402
from lcm_jax.run.config import resolve  # noqa: E402
from lcm_jax.runtime import kernels  # noqa: E402
from lcm_jax.runtime.mesh import abstract_state, make_mesh, param_sharding, place, state_shardings  # noqa: E402

ROOT = Path(__file__).parents[1]
BATCH = 32  # two rows for each device in each of two parts: no activation has the shape of a weight
LOGITS = 2**12  # bytes of a block of chunked attention: several blocks


def make_config(teacher, options):
    config = runpy.run_path(str(ROOT / "configs" / "shapes_lcm.py"))["get_config"]()
    config.model.teacher = teacher
    config.data.batch_size = BATCH
    config = resolve(config).unlock()
    config.model.dtype = config.model.teacher_dtype = config.train.mu_dtype = "float64"
    config.update_from_flattened_dict(options)
    return config


def double(models):
    """The models with arrays, or shapes, in float64."""

    def one(x):
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float64)
        return shape if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.float64)

    trees = jax.tree.map(one, {"teacher_params": models.teacher_params, "student_params": models.student_params})
    return dataclasses.replace(models, **trees)


def perturbed(models):
    """The student's weights, unlike the teacher's, so that conditioning on w has an effect."""
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda x: x * (1 + 0.05 * rng.normal(size=x.shape)), models.student_params["unet"])
    projection = weights["time_embedding"]["cond_proj"]["kernel"]
    weights["time_embedding"]["cond_proj"]["kernel"] = projection + 0.05 * rng.normal(size=projection.shape)
    return weights


def make_batch(program, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape), x.sharding), program.batch)


def named(parts):
    """{part: {array's name: its value on the host}}"""
    assert {x.dtype for x in jax.tree.leaves(parts)} == {np.dtype("float64")}
    return {
        name: {jax.tree_util.keystr(path): np.array(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for name, tree in parts.items()
    }


def run(teacher, steps, sizes=None, options=None):
    """(gradient, losses and parts of the last state by name, what the compiled step is)."""
    config = make_config(teacher, options or {})
    mesh = make_mesh(*sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    models = double(run_models.load(config, place(mesh)))
    program = run_step.make(config, models, mesh)
    of_shapes = run_step.make(config, double(run_models.shapes(config)), mesh)
    lowered = program.lower()
    step = lowered.compile()
    state, frozen = program.begin(perturbed(models)), program.place_frozen(models)
    shards = {dimensions(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves((state, frozen))}
    key, parts = jax.device_put(jax.random.key(3), program.key.sharding), {}
    for n in range(steps):
        state, metrics = step(state, frozen, make_batch(program, n), key)
        parts |= named({f"loss {n + 1}": metrics["loss"]})
        if n == 0:  # the first moment is the gradient, up to a factor
            parts |= named({"gradient": state.opt_state[1][0].mu})
    parts |= named({"params": state.params, "ema_params": state.ema_params, "moments": state.opt_state[1][0][1:]})
    whole = {dimensions(x.shape) for x in jax.tree.leaves((state, frozen))}
    return parts, {
        "moved": moves(step.as_text(), mesh),
        "weights": [sorted(whole), sorted(shards)],
        "same_text": of_shapes.lower().as_text() == lowered.as_text(),
    }


def dimensions(shape):
    """Without ones, in any order: XLA may transpose an array."""
    return tuple(sorted(size for size in shape if size > 1))


def moves(text, mesh):
    program = hlo.read(text)
    found = set()
    for instruction, *_ in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind.startswith(("all-", "reduce-scatter", "collective", "ragged", "send", "recv")):
            one = dataclasses.replace(program, computations={"": [instruction]}, times={"": 1})
            axes = {collective.axes(mesh.shape) for collective in hlo.collectives(one)}
            found |= {(kind, *axes, dimensions(shape)) for shape in hlo.dimensions(instruction.shape)}
    return sorted(found)


def distances(one, other):
    def far(x, other):  # also of a gradient that is 0: of the last bias, in forward mode
        return float(np.linalg.norm(other - x) / max(np.linalg.norm(x), np.finfo(x.dtype).tiny))

    return {name: max(far(x, other[name][leaf]) for leaf, x in part.items()) for name, part in one.items()}


def main(teacher, cases, steps, small):
    for function in (param_sharding, state_shardings, abstract_state):
        function.__defaults__ = (int(small),)
    kernels.CHUNK_LOGITS = LOGITS
    OBJECTIVES["tangent"] = tangent.TANGENT

    @functools.cache
    def one(objective):
        return run(teacher, int(steps), options={"objective": objective, "model.attention": "xla"})[0]

    found = {}
    for case, (sizes, options) in json.loads(cases).items():
        other, about = run(teacher, int(steps), sizes, options)
        found[case] = {"distances": distances(one(options.get("objective", "lcd")), other), **about}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
