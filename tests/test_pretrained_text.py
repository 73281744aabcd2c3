"""Conditioning of captions, against the `encode_prompt` of diffusers' pipelines, which also defines the null text."""

import json

import diffusers
import numpy as np
import parity
import pytest
import tiny
import torch

from lcm_jax.pretrained import load_pipeline, text

CAPTIONS = ["a red circle", "hello", "small blue square on the left", ""]


def encoded_by_torch(folder) -> tuple[dict, dict]:
    """(conditioning of the captions [4 ...], of the null text [1 ...]) in float64."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float64)
    with torch.no_grad():
        hidden, null, *pooled = pipe.encode_prompt(
            prompt=CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    cond, empty = {"encoder_hidden_states": hidden.numpy()}, {"encoder_hidden_states": null[:1].numpy()}
    if pooled:
        cond |= {"text_embeds": pooled[0].numpy()}
        empty |= {"text_embeds": pooled[1][:1].numpy()}
    return cond, empty


@pytest.mark.parametrize(("name", "zeros"), [("sd1", None), ("sd2", None), ("sdxl", True), ("sdxl", False)])
def test_captions_and_null_text_are_encoded_as_in_diffusers(name, zeros, tmp_path):
    """SD's null text is "" encoded; SDXL's is zeros, or "" encoded, as model_index.json says."""
    folder = tiny.copy(name, tmp_path / "model")
    if zeros is not None:
        index = json.loads((folder / "model_index.json").read_text())
        tiny.write_json(folder / "model_index.json", index | {"force_zeros_for_empty_prompt": zeros})
    pipeline, params = load_pipeline(folder)
    cond, null = encoded_by_torch(folder)
    assert all(np.any(value) != bool(zeros) for value in null.values())
    for got, want in (
        (text.encode(pipeline, params, CAPTIONS), cond),
        (text.null(pipeline, params), null),
        (text.null(pipeline, params, ""), {key: value[3:] for key, value in cond.items()}),  # never zeros
    ):
        assert got.keys() == want.keys()
        for key, value in want.items():
            parity.close(got[key], value, rtol=0, of_max=parity.NETWORK, what=key)


def test_time_ids_have_the_height_first():
    """SDXL's order, for an image that is not square: original size, crop, target size."""
    found = text.time_ids(64, 96, 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[64, 96, 0, 0, 64, 96]] * 2)
