"""Conditioning of captions, against the `encode_prompt` of diffusers' pipelines, which also defines the null text.

Weights, chunks, clip skip and textual inversion against worked cases, the encoders' own states and diffusers' tokens.
"""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch

from lcm_jax.models.attention import dot_product_attention
from lcm_jax.pretrained import load_pipeline, text
from lcm_jax.pretrained.embeddings import Embedding
from lcm_jax.sampling.chunks import chunked
from lcm_jax.sampling.prompts import Reading

CAPTIONS = ["a red circle", "hello", "small blue square on the left", ""]
SIZE = (64, 96)  # height and width in pixels, not square, so that a swap is noticed


def encoded_by_torch(folder) -> tuple[dict, dict]:
    """(conditioning of the captions [4 ...], of the null text [1 ...]) in float64, with SDXL's sizes in the first."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float64)
    with torch.no_grad():
        hidden, null, *pooled = pipe.encode_prompt(
            prompt=CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    cond, empty = {"encoder_hidden_states": hidden.numpy()}, {"encoder_hidden_states": null[:1].numpy()}
    if pooled:
        sizes = pipe._get_add_time_ids(SIZE, (0, 0), SIZE, torch.float64, 32).numpy()
        cond |= {"text_embeds": pooled[0].numpy(), "time_ids": sizes.repeat(4, 0)}
        empty |= {"text_embeds": pooled[1][:1].numpy()}
    return cond, empty


@pytest.mark.parametrize(("name", "zeros"), [("sd1", None), ("sd2", None), ("sdxl", True), ("sdxl", False)])
def test_captions_sizes_and_null_text_are_encoded_as_in_diffusers(name, zeros, tmp_path):
    """SD's null text is "" encoded; SDXL's is zeros, or "" encoded, according to model_index.json."""
    folder = tiny.copy(name, tmp_path / "model")
    if zeros is not None:
        index = json.loads((folder / "model_index.json").read_text())
        tiny.write_json(folder / "model_index.json", index | {"force_zeros_for_empty_prompt": zeros})
    pipeline, params = load_pipeline(folder)
    cond, null = encoded_by_torch(folder)
    assert all(np.any(value) != bool(zeros) for value in null.values())
    sizes = {"time_ids": text.time_ids(*SIZE, 4)} if pipeline.is_xl else {}
    empty = {key: value[3:] for key, value in cond.items() if key != "time_ids"}
    for got, want in (
        (text.encode(pipeline, params, CAPTIONS) | sizes, cond),
        (text.null(pipeline, params), null),
        (text.null(pipeline, params, ""), empty),  # a negative prompt of "" is not the null text
    ):
        assert got.keys() == want.keys() and {value.dtype for value in got.values()} == {np.dtype(np.float32)}
        for key, value in want.items():
            parity.close(got[key], value, rtol=0, of_max=parity.NETWORK, what=key)


def encoded(name: str, prompts: list[str], reading: Reading, embeddings=None, params=None) -> dict[str, np.ndarray]:
    pipeline, own = tiny.loaded(name)
    chunks = chunked(pipeline, embeddings or {}, prompts, reading)
    found = text.encode_chunks(pipeline, params or own, chunks, reading.emphasis, reading.clip_skip)
    return {key: np.asarray(value) for key, value in found.items()}


Z = np.array([[[1, 2], [3, -1], [0.5, 0.5]]], np.float32)
E = np.array([[[1, 2], [0, 1], [0.5, 0]]], np.float32)


@pytest.mark.parametrize(
    ("emphasis", "want"),
    [
        ("original", [[0.857143, 1.714286], [3.857143, -1.285714], [0.428571, 0.428571]]),
        ("no_norm", [[1, 2], [4.5, -1.5], [0.5, 0.5]]),
        ("interpolate", [[1, 2], [4.5, -2], [0.5, 0.5]]),
    ],
)
def test_weights_change_states_as_in_the_worked_case(emphasis, want):
    weights = np.array([[1, 1.5, 1]], np.float32)
    parity.close(text.weighted(Z, weights, emphasis, E)[0], want, rtol=0, atol=5e-7)  # half of the last digit
    for z in (Z, Z.astype(jnp.bfloat16)):
        same = text.weighted(z, np.ones((1, 3), np.float32), emphasis, E)
        assert same.dtype == z.dtype and (same == z).all()


def test_a_mean_of_zero_is_left_alone():
    z = np.array([[[1.0, 1.0], [2.0, 2.0]]], np.float32)
    found = text.weighted(z, np.array([[1, -0.5]], np.float32), "original")
    assert np.asarray(found).tolist() == [[[1, 1], [-1, -1]]]


@pytest.mark.parametrize(("name", "syntax"), [("sd1", "comfy"), ("sdxl", "a1111")])
def test_prompts_whose_weights_are_all_1_are_plain_ones_bit_for_bit(name, syntax):
    pipeline, params = tiny.loaded(name)
    plain = text.encode(pipeline, params, ["a red circle", "hello"])
    found = encoded(name, ["a (red:1.0) circle", "hello"], Reading(syntax, "interpolate"))
    assert all((found[key] == value).all() for key, value in plain.items())


@pytest.mark.parametrize("emphasis", ["original", pytest.param("no_norm", marks=pytest.mark.slow), "interpolate"])
def test_sdxl_weighs_each_encoder_by_itself_and_not_what_is_pooled(emphasis):
    """And only the prompt of its row."""
    plain = encoded("sdxl", ["a red circle", "hello"], Reading("plain"))
    empty = encoded("sdxl", [""], Reading("plain"))["encoder_hidden_states"]
    found = encoded("sdxl", ["a (red:1.5) circle", "hello"], Reading("a1111", emphasis))
    weights = np.ones((1, 77), np.float32)
    weights[0, 2] = 1.5
    z, want = plain["encoder_hidden_states"], []
    for half in (slice(0, 32), slice(32, 64)):
        want.append(text.weighted(z[:1, :, half], weights, emphasis, empty[:, :, half]))
    parity.close(found["encoder_hidden_states"][0], np.concatenate(want, -1)[0], rtol=0, of_max=parity.NETWORK)
    assert np.abs(found["encoder_hidden_states"][0] - z[0]).max() > 0.1
    parity.close(found["encoder_hidden_states"][1], z[1], rtol=0, of_max=parity.NETWORK)
    parity.close(found["text_embeds"], plain["text_embeds"], rtol=0, of_max=parity.NETWORK)


def test_chunks_are_encoded_one_by_one_and_the_first_is_pooled():
    found = encoded("sdxl", ["red " * 76, "circle"], Reading("a1111"))
    alone = encoded("sdxl", ["red " * 75, "red", "circle"], Reading("plain"))
    z = alone["encoder_hidden_states"]
    want = np.stack([np.concatenate([z[0], z[1]]), np.concatenate([z[2], z[2]])])
    parity.close(found["encoder_hidden_states"], want, rtol=0, of_max=parity.NETWORK)
    parity.close(found["text_embeds"], alone["text_embeds"][[0, 2]], rtol=0, of_max=parity.NETWORK)


def test_repeating_the_text_changes_nothing():
    """Softmax over copies of all keys: only the order of the sums differs."""
    rng = np.random.default_rng(0)
    q, cond, null = (rng.standard_normal((1, length, 2, 8)).astype(np.float32) for length in (16, 154, 77))
    first, second = ({"encoder_hidden_states": x.reshape(1, -1, 16)} for x in (cond, null))
    longer, shorter = text.same_length(first, second)
    assert longer is first and shorter["encoder_hidden_states"].shape == (1, 154, 16)
    copies = shorter["encoder_hidden_states"].reshape(1, 154, 2, 8)
    once, twice = dot_product_attention(q, null, null), dot_product_attention(q, copies, copies)
    parity.close(twice, once, rtol=0, of_max=8 * parity.EPS)


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_clip_skip_takes_the_hidden_states_of_transformers(name):
    """Counted as A1111 and ComfyUI do: 1 is the last layer. SD's final LayerNorm follows, SDXL's does not."""
    ids = text.tokens(tiny.loaded(name)[0], CAPTIONS).values()
    encoders = [tiny.torch_text_encoder(encoder) for encoder, _ in tiny.FOLDERS[name][2].values()]
    outputs = [
        tiny.in_float64(encoder, torch.tensor(i).long(), output_hidden_states=True)
        for encoder, i in zip(encoders, ids, strict=True)
    ]
    norm = next(module for key, module in encoders[0].named_modules() if key.endswith("final_layer_norm"))
    for skip in (1, 2):
        want = torch.cat([out.hidden_states[-skip] for out in outputs], -1)
        if name != "sdxl":
            want = torch.nn.functional.layer_norm(want, (32,), norm.weight.double(), norm.bias.double(), norm.eps)
        found = encoded(name, CAPTIONS, Reading("plain", clip_skip=skip))
        parity.close(found["encoder_hidden_states"], want.numpy(), rtol=0, of_max=parity.NETWORK)
    default, own = (encoded(name, CAPTIONS, Reading(clip_skip=skip)) for skip in (None, 2 if name == "sdxl" else 1))
    assert all((default[key] == own[key]).all() for key in default)


def vectors_of(name: str, count: int) -> Embedding:
    rng = np.random.default_rng(1)
    return Embedding(
        "star", {part: rng.standard_normal((count, 32), np.float32) for part in tiny.loaded(name)[0].tokenizers}
    )


def test_textual_inversion_is_diffusers(tmp_path):
    one = vectors_of("sd1", 3)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.folder("sd1"))
    pipe.load_textual_inversion({"star": torch.tensor(one.vectors["text_encoder"])})
    prompts = ["a red star on the left", "star, star"]
    with torch.no_grad():
        want = pipe.to(torch.float64).encode_prompt(prompts, "cpu", 1, False)[0].numpy()
    found = encoded("sd1", prompts, Reading("plain"), {"star": one})["encoder_hidden_states"]
    parity.close(found, want, rtol=0, of_max=parity.NETWORK)


def test_vectors_are_tokens_with_these_embeddings_and_the_same_end_is_pooled():
    pipeline, params = tiny.loaded("sdxl")
    one = vectors_of("sdxl", 2)
    changed = {part: dict(tree) for part, tree in params.items()}
    words = ["large</w>", "small</w>"]  # two tokens of no other use here
    for part, value in one.vectors.items():
        ids = [tiny.vocabulary()[0][word] for word in words]
        table = np.array(params[part]["embeddings"]["token_embedding"]["embedding"])
        table[ids] = value
        embeddings = params[part]["embeddings"]
        changed[part]["embeddings"] = {**embeddings, "token_embedding": {"embedding": table}}
    found = encoded("sdxl", ["a star, red"], Reading("a1111"), {"star": one})
    want = encoded("sdxl", ["a large small, red"], Reading("a1111"), params=changed)
    for key, value in want.items():
        parity.close(found[key], value, rtol=0, of_max=parity.NETWORK, what=key)
    assert np.abs(found["text_embeds"] - encoded("sdxl", ["a, red"], Reading("a1111"))["text_embeds"]).max() > 0.1
