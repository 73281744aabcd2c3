"""LCD on SD 2.1 and SDXL with the text encoders' own outputs, against torch.

Algorithm 1 is that of `test_distill_objective`, but captions go through both programs' text encoders:
`pretrained.text` on our side, the `encode_prompt` of diffusers' pipelines on torch's, which also decides what the null
text is: "" encoded for SD; zeros or "" for SDXL, depending on the model's config.
"""

import functools
import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import parity
import pytest
import test_distill_objective as lcd
import tiny
import torch
from flax.traverse_util import flatten_dict

from lcm_jax.diffusion import guidance
from lcm_jax.distill import objective
from lcm_jax.pretrained import load_pipeline, names
from lcm_jax.pretrained import text as conditioning

CAPTIONS = ["a red circle", "hello", "small blue square on the left", ""]
# Original height and width, crop top and left, target height and width, all different, so that a swap is noticed.
SIZES = [(513, 640, 3, 0, 515, 643), (1023, 769, 8, 21, 1025, 1031), (66, 64, 0, 9, 67, 65), (1, 2, 3, 4, 5, 6)]


@functools.cache
def sdxl_without_zeros() -> Path:
    """SDXL's folder, of a model that was trained on "" encoded."""
    folder = tiny.copy("sdxl", tiny.folder("sdxl").parent / "sdxl_without_zeros")
    index = json.loads((folder / "model_index.json").read_text())
    tiny.write_json(folder / "model_index.json", index | {"force_zeros_for_empty_prompt": False})
    return folder


def sizes_as_diffusers(pipe) -> np.ndarray:
    return np.concatenate(
        [
            pipe._get_add_time_ids((h, w), (top, left), (to_h, to_w), torch.float64, 32).numpy()
            for h, w, top, left, to_h, to_w in SIZES
        ]
    )


def encoded_by_torch(folder: Path) -> tuple[dict, dict]:
    """(conditioning of the captions [4 ...], of the null text [1 ...]) in float64."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float64)
    with torch.no_grad():
        text, null, *pooled = pipe.encode_prompt(
            prompt=CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    cond, empty = {"encoder_hidden_states": text.numpy()}, {"encoder_hidden_states": null[:1].numpy()}
    if pooled:
        cond |= {"text_embeds": pooled[0].numpy(), "time_ids": sizes_as_diffusers(pipe)}
        empty |= {"text_embeds": pooled[1][:1].numpy()}
    return cond, empty


def encoded_by_us(folder: Path) -> tuple[dict, dict]:
    pipeline, params = load_pipeline(folder)
    cond = dict(conditioning.encode(pipeline, params, CAPTIONS))
    if pipeline.is_xl:
        cond["time_ids"] = np.array(SIZES, np.float32)
    return cond, conditioning.null(pipeline, params)


CASES = {
    "sd2, v prediction": ("sd2", "v_prediction", lambda: tiny.folder("sd2")),
    "sdxl, null is zero": ("sdxl", "epsilon", lambda: tiny.folder("sdxl")),
    "sdxl, null is encoded": ("sdxl", "epsilon", sdxl_without_zeros),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_loss_and_gradient_match_torch_from_the_caption_on(case):
    family, prediction_type, folder = CASES[case]
    torch_cond, torch_null = encoded_by_torch(folder())
    cond, null = encoded_by_us(folder())
    assert cond.keys() == torch_cond.keys() and null.keys() == torch_null.keys()
    is_zero = case == "sdxl, null is zero"
    assert all(np.any(value) != is_zero for value in (*null.values(), *torch_null.values()))

    batch, _, draws = lcd.inputs("sd1")
    models = lcd.float64_unets(family)
    models["student"].zero_grad()
    embedding = np.asarray(guidance.w_embedding(lcd.W, lcd.W_DIM))
    torch_batch = batch | {"cond": torch_cond}
    want_loss = lcd.algorithm_1(models, prediction_type, "huber", torch_batch, torch_null, draws, embedding)
    want_loss.backward()
    gradient = {name: value.grad for name, value in models["student"].named_parameters()}
    want = flatten_dict(names.from_torch(lcd.make_problem(family).student, gradient, np.float64), sep="/")

    params = lcd.jax_params(family)
    weights = params["student"], params["target"], params["teacher"]
    which = list(lcd.TORCH_DISTANCES).index("huber")
    run = lcd.loss_and_gradient(family, prediction_type)
    got_loss, got = run(*weights, null, batch | {"cond": cond}, objective.Draws(**draws), which)
    got = flatten_dict(got, sep="/")
    parity.close(got_loss, want_loss.item(), rtol=1e-4)
    assert got.keys() == want.keys()
    for key, value in want.items():
        parity.near(got[key], value, 1e-4, key)
    assert all(np.any(value) for value in want.values())

    if family == "sdxl":  # each condition counts: with another, the loss changes
        other = dict(cond) | {"time_ids": cond["time_ids"][:, [1, 0, 3, 2, 5, 4]]}
        swapped, _ = run(*weights, null, batch | {"cond": other}, objective.Draws(**draws), which)
        assert abs(swapped / got_loss - 1) > 1e-3
        nulls = jax.tree.map(lambda x: x + 1.0, null)
        moved, _ = run(*weights, nulls, batch | {"cond": cond}, objective.Draws(**draws), which)
        assert abs(moved / got_loss - 1) > 1e-3
