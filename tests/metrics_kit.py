"""Tiny folders of feature networks with random weights, and images to put into them."""

import functools
import json
from pathlib import Path

import numpy as np
import tiny
import transformers
from safetensors.torch import save_file

VISION = dict(
    hidden_size=32, image_size=28, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, patch_size=7
)
TEXT = dict(
    hidden_size=24,
    intermediate_size=32,
    num_attention_heads=3,
    num_hidden_layers=2,
    max_position_embeddings=77,
    hidden_act="gelu",
)
DINO = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14, mlp_ratio=2)
PREPROCESSOR = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "size": {"shortest_edge": 28},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}


def images(count, height=40, width=40, seed=0):
    """Noise on a gradient, uint8 [count height width 3]."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width)[:, None] + rng.uniform(0, 80, (count, 1, 1, 3))
    return np.clip(ramp + rng.normal(0, 30, (count, height, width, 3)), 0, 255).astype(np.uint8)


@functools.cache
def torch_clip() -> transformers.CLIPModel:
    return _torch_clip(VISION)


@functools.cache
def torch_pick() -> transformers.CLIPModel:
    """As ViT-H/14 of LAION: GELU in both towers, heads of 80 / 8 numbers, and 2 for the end of text."""
    model = _torch_clip(VISION | dict(hidden_size=40, hidden_act="gelu"), eos_token_id=2)
    model.logit_scale.data.fill_(3.0)
    model.visual_projection.weight.data.neg_()  # with these weights cosines are negative then
    return model


def _torch_clip(vision: dict, **changes) -> transformers.CLIPModel:
    vocabulary = tiny.vocabulary()[0]
    ids = dict(vocab_size=len(vocabulary), bos_token_id=vocabulary[tiny.START], eos_token_id=vocabulary[tiny.END])
    config = transformers.CLIPConfig(text_config=TEXT | ids | changes, vision_config=vision, projection_dim=20)
    return tiny.randomise(transformers.CLIPModel(config), 7)


def write_clip(folder: Path, model: transformers.CLIPModel | None = None) -> Path:
    (model or torch_clip()).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def torch_dinov2(**changes) -> transformers.Dinov2Model:
    return tiny.randomise(transformers.Dinov2Model(transformers.Dinov2Config(**DINO | changes)), 8)


def write_dinov2(folder: Path, model: transformers.Dinov2Model, published: bool = True) -> Path:
    """published: keys as in the files of the hub; else as in the modules of today's transformers."""
    model.save_pretrained(folder)  # writes the published keys
    if not published:
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
