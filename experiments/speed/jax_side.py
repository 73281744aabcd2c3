"""The `lcm_jax` side of a workload: the sampler and the jitted training step, as the programs use them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
from lcm_jax.distill.step import named_key
from lcm_jax.distill.student import student_of
from lcm_jax.pretrained import Pipeline, load_pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.tokenizer import load_tokenizer
from lcm_jax.run import models as run_models
from lcm_jax.run import step as run_step
from lcm_jax.run.models import Models
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.kernels import on_mesh
from lcm_jax.sampling.generator import Generator, draw_noise
from lcm_jax.sampling.plan import Settings, make_plan, noise_entries
from lcm_jax.sampling.programs import latents
from lcm_jax.sampling.request import is_guided

WAY = "lcm_jax"
SETTINGS = Settings(steps=side.STEPS)
REPEATS = 3  # of the work inside a profile


def prepare(workload: Workload) -> Prepared:
    """The workload with random weights on the default device."""
    if workload.kind in TRAINING:
        return _training(workload)
    return {"matmul": _matmul, "unet": _unet, "sample": _sample}[workload.kind](workload)


def _matmul(workload: Workload) -> Prepared:
    n = workload.size
    a, b = (jax.device_put(_normal((n, n), seed).astype(workload.dtype)) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return _prepared(lambda: product(a, b), 2.0 * n**3)


def _unet(workload: Workload) -> Prepared:
    pipeline, weights = _pipeline(workload)
    mesh = _mesh()
    unet, params = on_mesh(pipeline, mesh).unet, jax.tree.map(jax.device_put, weights["unet"])
    latent = _latent_shape(pipeline, workload)
    text = run_step.text_shapes(Models(pipeline, weights, pipeline, weights), workload.batch)
    args = _normal(latent, 0), np.full(workload.batch, 499, np.int32), _normal(text["encoder_hidden_states"].shape, 1)
    args = jax.tree.map(jax.device_put, (*args, _normal((workload.batch, side.W_EMBEDDING), 2)))
    apply = jax.jit(lambda params, *args: unet.apply({"params": params}, *args), compiler_options=compiler.inference())
    count = flops.count(lambda params, *args: pipeline.unet.apply({"params": params}, *args), params, *args)
    return _prepared(lambda: apply(params, *args), count)


def _sample(workload: Workload) -> Prepared:
    pipeline, params = _pipeline(workload)
    size = (workload.size, workload.size)
    count = sampling_flops(pipeline, params, SETTINGS, side.GUIDANCE_SCALE, size, workload.batch)
    generator = Generator(pipeline, params, _mesh())
    prompts = [side.PROMPT] * workload.batch
    noise = draw_noise(0, range(workload.batch), side.STEPS, _latent_shape(pipeline, workload)[1:])

    def text() -> dict[str, jax.Array]:
        return generator.encode(prompts)

    def sample() -> np.ndarray:
        return generator.decode(generator.latents(text(), noise, side.GUIDANCE_SCALE, SETTINGS))

    def facts(folder: str) -> dict[str, Any]:
        cond = text()
        z = generator.latents(cond, noise, side.GUIDANCE_SCALE, SETTINGS)
        stages = {
            "text": text,
            "unet steps": lambda: generator.latents(cond, noise, side.GUIDANCE_SCALE, SETTINGS),
            "decoding": lambda: generator.decode(z),
        }
        return {"stage_seconds": {name: trace.best_of(REPEATS, stage) for name, stage in stages.items()}}

    return _prepared(sample, count, facts)


def sampling_flops(
    pipeline: Pipeline,
    params: Mapping[str, Any],
    settings: Settings,
    guidance_scale: float,
    size: tuple[int, int],
    batch: int,
) -> float:
    """FLOPs of the text encoders, all steps of the UNet, and decoding, for `batch` images of (height, width) pixels.

    pipeline: with XLA's attention, whose products can be counted. params: arrays or shapes.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    unet, noise_schedule, plan = pipeline.unet, pipeline.schedule, make_plan(pipeline, settings)
    ids = conditioning.tokens(pipeline, [side.PROMPT] * batch)
    edges = (edge // pipeline.vae.factor for edge in size)
    shape = (noise_entries(settings), batch, *edges, pipeline.vae.latent_channels)
    noise = jax.ShapeDtypeStruct(shape, jnp.float32)

    def sample(params: Any, noise: jax.Array) -> jax.Array:
        cond = conditioning.encode_tokens(pipeline.text_encoders, params, ids)
        if pipeline.is_xl:
            cond["time_ids"] = conditioning.time_ids(*size, batch)
        null = cond if is_guided(pipeline, guidance_scale) else None
        z = latents(unet, noise_schedule, plan, params["unet"], cond, null, noise, guidance_scale)
        return pipeline.vae.apply({"params": params["vae"]}, z, method="decode")

    return flops.count(sample, params, noise)


def _training(workload: Workload) -> Prepared:
    config = side.training_config(workload)
    teacher, params = run_models.load_teacher(config, weights=False)
    teacher, params = with_tokenizers(teacher), random_weights(dict(params))
    models = Models(teacher, params, *run_models.load_student(config, teacher, params))
    mesh = _mesh()
    made = run_step.make(config, models, mesh)
    key = jax.device_put(named_key(0, "draws"), made.key.sharding)
    batch = jax.tree.map(lambda x: jax.device_put(_normal(x.shape, 0), x.sharding), made.batch)
    frozen, state = made.place_frozen(models), made.begin(models.trainable)
    del params, models  # host copies

    @functools.cache
    def compiled() -> jax.stages.Compiled:  # in the first run, whose time is reported
        return made.lower().compile()

    def one() -> jax.Array:
        nonlocal state
        state, metrics = compiled()(state, frozen, batch, key)
        return metrics["loss"]

    def facts(folder: str) -> dict[str, Any]:
        found = roofline.report(compiled(), mesh, workload.batch, made.model_flops())
        (Path(folder) / "cost.txt").write_text(roofline.text(found))
        return {"cost": found}

    return _prepared(one, made.model_flops(), facts)


def _prepared(
    function: Callable[[], Any], count: float, facts: Callable[[str], dict[str, Any]] = lambda folder: {}
) -> Prepared:
    """`function` as the one way of this side."""
    return Prepared(
        ways={WAY: function},
        wait=jax.block_until_ready,
        finite=lambda result: bool(np.isfinite(np.asarray(result, np.float32)).all()),
        peak_bytes=peak_bytes,
        flops=count,
        facts=facts,
        profile=lambda folder: trace.kernels(folder, function, REPEATS),
    )


def peak_bytes() -> int:
    """The most memory that the first device has had in use; where it does not say, as a CPU, that of this process."""
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else side.resident_peak()


def _pipeline(workload: Workload) -> tuple[Pipeline, dict[str, Any]]:
    """An LCM with a w embedding; weights are held as `lcm_jax.load` holds them."""
    dtype = jnp.dtype(workload.dtype)
    pipeline, params = load_pipeline(side.source_folder(workload), dtype=dtype, param_dtype=None, weights=False)
    unet, unet_params = student_of(pipeline.unet, params["unet"], side.W_EMBEDDING)
    pipeline = dataclasses.replace(pipeline, unet=unet, record={"solver_steps": 50})
    return with_tokenizers(pipeline), random_weights({**params, "unet": unet_params})


def with_tokenizers(pipeline: Pipeline) -> Pipeline:
    """The pipeline with the embedded tokenizer instead of its own."""
    first = pipeline.text_encoder or pipeline.text_encoder_2
    tokenizer = load_tokenizer(assets.path("shapes") / "tokenizer", first)
    tokenizer = dataclasses.replace(tokenizer, length=first.max_position_embeddings)
    return dataclasses.replace(
        pipeline,
        tokenizer=pipeline.text_encoder and tokenizer,
        tokenizer_2=pipeline.text_encoder_2 and tokenizer,
    )


def random_weights(shapes: Any) -> Any:
    """Arrays for shapes: kernels normal with variance 1 / fan_in, scales 1, biases 0; signals keep their size."""
    block = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, name == "scale", leaf.dtype)
        fan_in = max(1, int(np.prod(leaf.shape[:-1]))) if name == "kernel" else leaf.shape[-1]
        return np.resize(block * np.float32(fan_in**-0.5), leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _mesh() -> Mesh:
    """One device, as torch has."""
    return mesh_lib.make_mesh(devices=jax.devices()[:1])


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _latent_shape(pipeline: Pipeline, workload: Workload) -> tuple[int, ...]:
    """[b h w c]."""
    edge = workload.size // pipeline.vae.factor
    return workload.batch, edge, edge, pipeline.unet.in_channels
