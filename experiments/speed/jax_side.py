"""The `lcm_jax` side of a workload: `Generator`, and the jitted step of `training_step.make`, as the programs use them.

python -m experiments.speed.jax_side      a worker, see `side.serve`
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.speed import side, trace
from experiments.speed.side import Prepared
from experiments.speed.workloads import TRAINING, Workload
from lcm_jax import assets
from lcm_jax.cost import flops, roofline
from lcm_jax.distill import step
from lcm_jax.distill.student import student_of
from lcm_jax.pretrained import Pipeline, load_pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.text import load_tokenizer
from lcm_jax.run import models as student
from lcm_jax.run import step as training_step
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.kernels import on_mesh
from lcm_jax.sampling import generator as generate

WAY = "lcm_jax"
SETTINGS = generate.Settings(steps=side.STEPS)
REPEATS = 3  # of the work inside a profile


def prepare(workload: Workload) -> Prepared:
    """The workload, with weights on the default device."""
    if workload.kind in TRAINING:
        return _training(workload)
    return {"matmul": _matmul, "unet": _unet, "sample": _sample}[workload.kind](workload)


def _matmul(workload: Workload) -> Prepared:
    n = workload.size
    a, b = (jax.device_put(_normal((n, n), seed).astype(workload.dtype)) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return _of_function(lambda: product(a, b), 2.0 * n**3)


def _unet(workload: Workload) -> Prepared:
    pipeline = _pipeline(workload)
    mesh = _mesh()
    unet, params = on_mesh(pipeline, mesh).unet, jax.tree.map(jax.device_put, pipeline.params["unet"])
    latent, text = _latent_shape(pipeline, workload), training_step.text_shapes(pipeline, workload.batch)
    args = _normal(latent, 0), np.full(workload.batch, 499, np.int32), _normal(text["encoder_hidden_states"].shape, 1)
    args = jax.tree.map(jax.device_put, (*args, _normal((workload.batch, side.W_EMBEDDING), 2)))
    apply = jax.jit(lambda params, *args: unet.apply({"params": params}, *args), compiler_options=compiler.inference())
    count = flops.count(lambda params, *args: pipeline.unet.apply({"params": params}, *args), params, *args)
    return _of_function(lambda: apply(params, *args), count)


def _sample(workload: Workload) -> Prepared:
    pipeline = _pipeline(workload)
    count = _sampling_flops(pipeline, workload)
    generator = generate.Generator(pipeline, mesh=_mesh())
    prompts = [side.PROMPT] * workload.batch
    noise = generate.draw_noise(0, range(workload.batch), side.STEPS, _latent_shape(pipeline, workload)[1:])

    def text() -> dict[str, jax.Array]:
        return generator.encode(prompts, report=False)

    def draw() -> np.ndarray:
        return generator(text(), noise, side.GUIDANCE_SCALE, SETTINGS)

    def stages(folder: str) -> dict[str, Any]:
        cond = text()
        z = generator.latents(cond, noise, side.GUIDANCE_SCALE, SETTINGS)
        parts = {
            "text": text,
            "unet steps": lambda: generator.latents(cond, noise, side.GUIDANCE_SCALE, SETTINGS),
            "decoding": lambda: generator.decode(z),
        }
        seconds = {
            name: trace.best_of(REPEATS, lambda part=part: jax.block_until_ready(part()))
            for name, part in parts.items()
        }
        return {"stage_seconds": seconds, **trace.kernels(folder, draw, REPEATS)}

    return dataclasses.replace(_of_function(draw, count), profile=stages)


def _sampling_flops(pipeline: Pipeline, workload: Workload) -> float:
    """FLOPs of the text encoders, all steps of the UNet, and decoding."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(pipeline.params))
    ids = conditioning.tokens(pipeline, [side.PROMPT] * workload.batch)
    noise = jax.ShapeDtypeStruct((side.STEPS, *_latent_shape(pipeline, workload)), jnp.float32)

    def draw(params: Any, noise: jax.Array) -> jax.Array:
        cond = conditioning.encode_tokens(pipeline, params, ids)
        if pipeline.is_xl:
            cond["time_ids"] = conditioning.time_ids(workload.size, workload.size, workload.batch)
        z = generate.latents(pipeline, params["unet"], cond, cond, noise, side.GUIDANCE_SCALE, SETTINGS)
        return pipeline.vae.apply({"params": params["vae"]}, z, method="decode")

    return flops.count(draw, params, noise)


def _training(workload: Workload) -> Prepared:
    config = side.training_config(workload)
    teacher = _filled(student.load_teacher(config, weights=False))
    begun = student.load_student(config, teacher)
    mesh = _mesh()
    made = training_step.make(config, teacher, begun, mesh)
    key = jax.device_put(step.named_key(0, "draws"), made.key.sharding)
    batch = jax.tree.map(lambda x: jax.device_put(_normal(x.shape, 0), x.sharding), made.batch)
    frozen, held = made.place_frozen(teacher, begun), [made.begin(student.theta(begun))]
    del teacher, begun  # host copies

    @functools.cache
    def compiled() -> jax.stages.Compiled:  # in the first run, whose time is told
        return made.lower().compile()

    def one() -> jax.Array:
        held[0], metrics = compiled()(held[0], frozen, batch, key)
        return metrics["loss"]

    def facts(folder: str) -> dict[str, Any]:
        found = roofline.report(compiled(), mesh, workload.batch, made.model_flops())
        (Path(folder) / "cost.txt").write_text(roofline.text(found))
        return {"cost": found, **trace.kernels(folder, one, REPEATS)}

    return dataclasses.replace(_of_function(one, made.model_flops()), profile=facts)


def _of_function(function: Callable[[], Any], count: float) -> Prepared:
    """`function` as the one way of this side. Runs are not waited for one by one, as in a training."""
    last: list[Any] = [None]

    def repeat(runs: int) -> None:
        for _ in range(runs):
            last[0] = function()
        jax.block_until_ready(last[0])

    def profile(folder: str) -> dict[str, Any]:
        return trace.kernels(folder, function, REPEATS)

    return Prepared(
        ways={WAY: repeat},
        finite=lambda: bool(np.isfinite(np.asarray(last[0], np.float32)).all()),
        peak_bytes=_peak_bytes,
        flops=count,
        profile=profile,
    )


def _peak_bytes() -> int:
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else side.resident_peak()


def _pipeline(workload: Workload) -> Pipeline:
    """An LCM: the model, with a w embedding; weights in the compute dtype."""
    dtype = jnp.dtype(workload.dtype)
    pipeline = load_pipeline(side.source_folder(workload.model), dtype=dtype, param_dtype=dtype, weights=False)
    unet, params = student_of(pipeline.unet, pipeline.params["unet"], side.W_EMBEDDING)
    return _filled(dataclasses.replace(pipeline, unet=unet, params={**pipeline.params, "unet": params}))


def _filled(pipeline: Pipeline) -> Pipeline:
    """A pipeline of shapes with random weights on the host, and the embedded tokenizer in the place of its own."""
    tokenizer = load_tokenizer(assets.path("shapes") / "tokenizer", side.TOKENS)
    first = pipeline.text_encoder or pipeline.text_encoder_2
    tokenizer.model_max_length = first.max_position_embeddings
    return dataclasses.replace(
        pipeline,
        params=random_weights(pipeline.params),
        tokenizer=pipeline.text_encoder and tokenizer,
        tokenizer_2=pipeline.text_encoder_2 and tokenizer,
    )


def random_weights(shapes: Any) -> Any:
    """Arrays for shapes: kernels normal with variance 1 / fan_in, scales 1, biases 0. Signals keep their size."""
    block = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, name == "scale", leaf.dtype)
        fan_in = max(1, int(np.prod(leaf.shape[:-1]))) if name == "kernel" else leaf.shape[-1]
        return np.resize(block * np.float32(fan_in**-0.5), leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _mesh() -> Mesh:
    """Of one device: torch has one, too."""
    return mesh_lib.make_mesh(devices=jax.devices()[:1])


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _latent_shape(pipeline: Pipeline, workload: Workload) -> tuple[int, ...]:
    """[b h w c]."""
    edge = workload.size // pipeline.vae.factor
    return workload.batch, edge, edge, pipeline.unet.in_channels


if __name__ == "__main__":
    sys.exit(side.serve(prepare))
