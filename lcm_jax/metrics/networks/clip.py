"""A CLIP folder in transformers' format as two networks: one takes images, the other token ids of captions.

Folders: CLIPModel (both towers, tokenizer), or CLIPVisionModelWithProjection (images only).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.foreign import read_json
from lcm_jax.metrics import resizing
from lcm_jax.metrics.networks import weights
from lcm_jax.metrics.networks.network import Network, resize_variant
from lcm_jax.models import clip
from lcm_jax.models.config import RUN_FIELDS, to_config
from lcm_jax.pretrained import names
from lcm_jax.pretrained.safetensors_io import TRANSFORMERS_NAME, open_weights
from lcm_jax.pretrained.tokenizer import Tokenizer, load_tokenizer
from lcm_jax.typed import config_of

RESIZES = ("processor", "cmmd")
_TEXT = ("text_model.", "text_projection.")
_VISION = ("vision_model.", "visual_projection.")


def load(path: str | Path | None, resize: str | None = None) -> Network:
    """The image tower: projected embeddings, not normalised.

    resize: "processor" (default), what the folder's preprocessor does; "cmmd", the centre square first, then the resize
      to the network's side by the same filter.

    Raises:
      LcmError: no such folder or variant, files missing or damaged, or another network's.
    """
    resize = resize_variant("clip", resize, RESIZES)
    folder = weights.existing("clip", path)
    with config_of(folder / "config.json"):
        module = clip.vision_from_config(read_json(folder / "config.json"))
    side = module.image_size
    processor = resizing.read_processor(folder)
    if resize == "cmmd":
        processor = dataclasses.replace(processor, size=(side, side), crop=None, square_first=True)
    with open_weights(folder, TRANSFORMERS_NAME) as stored:
        shapes = {
            key: shape
            for key, shape in stored.shapes.items()
            if key.startswith(_VISION) and not key.endswith(".position_ids")
        }
        params = weights.read_params(_vision_table(module), shapes, stored.read, str(stored.source))
    name = f"clip-{module.num_hidden_layers}x{module.hidden_size}-patch{module.patch_size}/{resize}-{side}"
    words = f"{processor!r} {to_config(module)}"
    return Network(name, module.projection_dim, module, params, processor, words, _image_embeds)


def _vision_table(module: clip.CLIPVisionModel) -> dict[str, names.Parameter]:
    """Torch key -> Parameter of an image tower, with the keys of a CLIPModel."""
    table = weights.torch_table(module, (1, module.image_size, module.image_size, 3))
    return {key if key.startswith(_VISION) else f"vision_model.{key}": value for key, value in table.items()}


def load_text(path: str | Path | None) -> tuple[Network, Tokenizer]:
    """The text tower of a CLIPModel's folder, which takes token ids: projected embeddings, not normalised.

    Raises:
      LcmError: no such folder, images only, or files missing or damaged.
    """
    folder = weights.existing("clip", path)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise LcmError(
            f"{folder} holds a {config.get('model_type')}, and a CLIP score needs texts, too: give the folder of a "
            "whole CLIPModel"
        )
    known = {f.name for f in dataclasses.fields(clip.CLIPTextModel)} - RUN_FIELDS | clip.CLIPTextModel.FIXED.keys()
    with config_of(folder / "config.json"):
        text = {key: value for key, value in clip.tower(config, "text").items() if key in known}
        module = clip.from_config(text | {"architectures": ["CLIPTextModelWithProjection"]})
    tokenizer = load_tokenizer(folder, module)
    with open_weights(folder, TRANSFORMERS_NAME) as stored:
        shapes = {key: shape for key, shape in stored.shapes.items() if key.startswith(_TEXT)}
        params = names.read_params(module, shapes, stored.read, what=str(stored.source))
    words = f"{json.dumps(tokenizer.vocabulary(), sort_keys=True)} {to_config(module)}"
    network = Network("clip-text", module.projection_dim, module, params, np.asarray, words, _pooled)
    return network, tokenizer


def load_logit_scale(path: str | Path) -> float | None:
    """exp(logit_scale) of a CLIPModel's folder, by which it multiplies cosines; None if the file has none."""
    with open_weights(weights.existing("clip", path), TRANSFORMERS_NAME) as stored:
        if "logit_scale" not in stored.shapes:
            return None
        value = np.asarray(stored.read("logit_scale"), np.float64)
        if value.size != 1 or not np.isfinite(value).all():
            raise LcmError(f"{stored.source}: logit_scale is not one finite number; fetch the file again")
        return float(np.exp(value.item()))


def _image_embeds(output: Any) -> jax.Array:
    return output.image_embeds


def _pooled(output: Any) -> jax.Array:
    return output.pooled
