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
