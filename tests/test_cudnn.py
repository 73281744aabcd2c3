"""cuDNN itself builds a plan for every attention that `auto` hands it, on cards that are not here: `make test-cudnn`.

The shapes are those that the architectures of the package meet when they are traced; which of them go to cuDNN, and in
what form, jax says.
"""

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import cudnn_kit
import gpu_kit
import jax
import pytest
from cudnn_kit import CARDS, Call

from lcm_jax import assets
from lcm_jax.cost import chips
from lcm_jax.data.images import bucket_sizes
from lcm_jax.pretrained import load_pipeline
from lcm_jax.runtime import kernels

pytestmark = pytest.mark.cudnn

Shapes = set[tuple[tuple[int, ...], tuple[int, ...]]]  # of q [1 s n d] and k [1 l n d]

SIDES = (768, 1024)  # pixels, at which smaller models are sampled too
TRAINING_BATCH = 12  # of a device: configs/sd15_lcm.py


def struct(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def met_by(folder: Path) -> tuple[Shapes, Shapes]:
    """What the attention of a model meets in one image: in training with aspect buckets; in sampling and encoding."""
    pipeline, params = load_pipeline(folder, weights=False)
    found: Shapes = set()

    def record(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
        found.add((q.shape, k.shape))
        return q

    unet, vae = (getattr(pipeline, part).clone(attention_fn=record) for part in ("unet", "vae"))
    context = struct(1, pipeline.text_encoder.max_position_embeddings, unet.per_level("cross_attention_dim")[0])
    added = None
    if pipeline.is_xl:
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        added = {"text_embeds": struct(1, pooled), "time_ids": struct(1, 6)}

    def traced(height: int, width: int) -> Shapes:
        found.clear()
        latent = struct(1, height // vae.factor, width // vae.factor, unet.in_channels)
        jax.eval_shape(unet.apply, {"params": params["unet"]}, latent, struct(1), context, None, added)
        return set(found)

    def coded(weights: Any, image: jax.Array) -> jax.Array:
        return vae.apply(weights, vae.apply(weights, image, method="encode")[0], method="decode")

    side, _ = pipeline.default_size
    buckets = {size: traced(*size) for size in bucket_sizes(side) if size[0] <= size[1]}  # portraits: as many
    squares = [traced(larger, larger) for larger in SIDES if 512 <= side < larger]
    found.clear()
    jax.eval_shape(coded, {"params": params["vae"]}, struct(1, side, side, 3))
    return set.union(*buckets.values()), set.union(found, buckets[side, side], *squares)


@functools.cache
def met() -> tuple[Shapes, Shapes]:
    """`met_by` all models that come with the package."""
    folders = [index.parent for index in Path(assets.__file__).parent.rglob("model_index.json")]
    assert len(folders) == 8
    trained, sampled = zip(*map(met_by, folders), strict=True)
    return set.union(*trained), set.union(*sampled)


def handed(card: str, shapes: Shapes, batch: int, dtype: str, trained: bool = False) -> set[Call]:
    """What `auto` hands to cuDNN of these shapes: without gradients, and if `trained` also with them."""
    capability = chips.GPUS[card].capability
    mesh = gpu_kit.devices("gpu", capability=".".join(map(str, capability)))
    fn = kernels.choose("auto", dtype, mesh)

    def gradients(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(fn, *qkv)
        return backward(out)

    found = set()
    with gpu_kit.tracing_for(mesh):
        for q, k in shapes:
            q, k = (struct(batch, *shape[1:], dtype=dtype) for shape in (q, k))
            for function in (fn, gradients) if trained else (fn,):
                found |= cudnn_kit.calls(function, q, k, k)
    return found


@pytest.fixture(scope="module")
def refusals() -> Iterator[Callable[[str, Collection[Call]], dict[Call, str]]]:
    """(card, calls) -> those that cuDNN refuses, and why; a plan takes 0.3 seconds of one core to build."""
    with multiprocessing.get_context("spawn").Pool() as pool:

        def refusals(card: str, calls: Collection[Call]) -> dict[Call, str]:
            answers = pool.starmap(cudnn_kit.refusal, [(card, call) for call in calls], chunksize=8)
            return {call: why for call, why in zip(calls, answers, strict=True) if why}

        yield refusals


@pytest.mark.parametrize("card", ["a100-80", "rtx4090", "h100"])
def test_cudnn_runs_all_that_auto_hands_it_of_the_architectures(card, refusals):
    trained, sampled = met()
    calls = handed(card, trained, TRAINING_BATCH, "bfloat16", trained=True)
    calls |= handed(card, sampled, 1, "bfloat16") | handed(card, sampled, 2, "float16")  # 2: with guidance
    large = {160} if card == "h100" else set()
    assert {call.q[-1] for call in calls if call.backward} == {32, 40, 64, 80} | large
    assert {call.q[-1] for call in calls} == {32, 40, 64, 80, 96} | large  # 96: the VAE of the shapes model
    assert any(call.padded for call in calls)
    print(f"{card}: {len(calls)} plans")
    assert not refusals(card, calls)


@pytest.mark.parametrize("card", CARDS)
def test_cudnn_differentiates_every_head_size_and_length_that_auto_knows(card, refusals):
    """Head sizes are the multiples of 8 up to auto's largest, and no others; lengths any even number."""
    largest = 256 if card == "h100" else 128
    shapes = {((1, 256, 4, d), (1, keys, 4, d)) for d in range(8, largest + 1, 8) for keys in (77, 256)}
    shapes |= {((1, s, 4, 64), (1, keys, 4, 64)) for s in (2, 6, 34, 130, 1022, 2**16) for keys in (77, s)}
    calls = handed(card, shapes, 2, "bfloat16", trained=True)
    assert {call.q[-1] for call in calls} == set(range(8, largest + 1, 8))
    assert not handed(card, {((1, 256, 4, largest + 8), (1, 256, 4, largest + 8))}, 2, "bfloat16")
    gradients = {call for call in calls if call.backward}
    print(f"{card}: {len(gradients)} plans")
    assert not refusals(card, gradients)
    for size in (36, largest + 8):
        call = dataclasses.replace(min(gradients), q=(2, 256, 4, size), k=(2, 256, 4, size))
        assert "hidden_dim" in cudnn_kit.refusal(card, call)
