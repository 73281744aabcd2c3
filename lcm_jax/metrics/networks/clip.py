"""A CLIP folder in transformers' format as metrics use it: the picture tower as features, the text tower beside it.

Folders: CLIPModel (both towers, tokenizer), or CLIPVisionModelWithProjection (pictures only).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_jax.errors import LcmError
from lcm_jax.files import read_json
from lcm_jax.metrics import resizing
from lcm_jax.metrics.networks import weights
from lcm_jax.metrics.networks.network import Network
from lcm_jax.models import clip
from lcm_jax.models import clip as clip_vision
from lcm_jax.models.config import RUN_FIELDS
from lcm_jax.pretrained import names
from lcm_jax.pretrained.safetensors_io import TRANSFORMERS_NAME, open_weights
from lcm_jax.pretrained.tokenizer import load_tokenizer

RESIZES = ("processor", "cmmd")
_TEXT = ("text_model.", "text_projection.")
_VISION = ("vision_model.", "visual_projection.")


@dataclasses.dataclass(frozen=True, eq=False)
class TextTower:
    """Module, float32 parameters and tokenizer of a CLIPModel's text half, with its projection."""

    module: clip.CLIPTextModel
    params: Mapping[str, Any]
    tokenizer: Any


def load(path: str | Path | None, resize: str | None = None) -> Network:
    """The picture tower: projected embeddings, not normalised.

    resize: "processor" (default), what the folder's preprocessor says; "cmmd", the centre square first, then to the
    network's side by the same filter.

    Raises:
      LcmError: no such folder or variant, files missing or damaged, or another network's.
    """
    resize = resize or "processor"
    if resize not in RESIZES:
        raise LcmError(f"resize={resize!r} of clip features is unknown; choose one of {', '.join(RESIZES)}")
    folder = weights.existing("clip", path)
    module = clip_vision.vision_from_config(read_json(folder / "config.json"))
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

    def apply(params, x):
        return module.apply({"params": params}, x).image_embeds

    label = f"clip-{module.num_hidden_layers}x{module.hidden_size}-patch{module.patch_size}/{resize}-{side}"
    return Network(label, module.projection_dim, processor, apply, params, repr(processor))


def _vision_table(module: clip_vision.CLIPVisionModel) -> dict[str, names.Parameter]:
    table = weights.torch_table(module, (1, module.image_size, module.image_size, module.num_channels))
    return {key if key.startswith(_VISION) else f"vision_model.{key}": value for key, value in table.items()}


def load_text(path: str | Path | None) -> TextTower:
    """The text tower of a CLIPModel's folder.

    Raises:
      LcmError: no such folder, pictures only, or files missing or damaged.
    """
    folder = weights.existing("clip", path)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise LcmError(
            f"{folder} holds a {config.get('model_type')}, and a CLIP score needs texts, too: give the "
            "folder of a whole CLIPModel"
        )
    known = {f.name for f in dataclasses.fields(clip.CLIPTextModel)} - RUN_FIELDS | clip.CLIPTextModel.FIXED.keys()
    text = {key: value for key, value in clip_vision.tower(config, "text").items() if key in known}
    module = clip.from_config(text | {"architectures": ["CLIPTextModelWithProjection"]})
    words = load_tokenizer(folder, module.max_position_embeddings)
    with open_weights(folder, TRANSFORMERS_NAME) as stored:
        shapes = {key: shape for key, shape in stored.shapes.items() if key.startswith(_TEXT)}
        params = names.read_params(module, shapes, stored.read, what=str(stored.source))
    return TextTower(module, params, words)
