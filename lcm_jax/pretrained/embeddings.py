"""Textual-inversion embeddings: n vectors that stand in a prompt for a word, read from the files that circulate.

    key of the .safetensors                   written by               for
    emb_params                                A1111, kohya             SD 1.x (768 wide), SD 2.x (1024)
    *, the only one                           a converter of .pt       SD 1.x, 2.x
    any other, the only one                   diffusers: the word      SD 1.x, 2.x
    clip_l, clip_g                            A1111, ComfyUI, kohya    SDXL (768 and 1280)
    text_encoders_0, text_encoders_1          pivotal tuning           SDXL

Tensors are [n d], or [d] for n = 1. Pickled files (.pt, .bin) are never opened.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lcm_jax import files
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.pretrained import safetensors_io
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline

_OF_XL = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_OF_SD = "emb_params"
_IMAGES = (".png", ".webp")
_CONVERT = (
    "is pickled, which can run code, and is not opened; convert it once, in an environment with torch: "
    "python -c \"import torch, safetensors.torch as s; t = torch.load('{0}', weights_only=True); "
    "t = {{k: v.detach().clone() for k, v in t.get('string_to_param', t).items() if hasattr(v, 'detach')}}; "
    "s.save_file(t if 'clip_g' in t else {{'emb_params': next(iter(t.values()))}}, '{1}.safetensors')\""
)


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """One word of prompts.

    Attributes:
      name: the word, as the user writes it; case does not matter.
      vectors: text encoder's name -> float32 [n d], in place of the embeddings of n tokens.
    """

    name: str
    vectors: Mapping[str, np.ndarray]


def read_embeddings(pipeline: Pipeline, given: Sequence[str]) -> dict[str, Embedding]:
    """Name in lower case -> embedding, for the arguments "FILE" and "NAME=FILE".

    Without NAME the word is the key of diffusers' files, else the file's name without suffix.

    Raises:
      BadArgument: no such file, or not an embedding for this model, see `read_embedding`; one name twice.
    """
    found: dict[str, Embedding] = {}
    for text in given:
        name, file = _parse(text)
        try:
            one = read_embedding(pipeline, file, name)
        except LcmError as error:
            raise BadArgument("embedding", text, str(error)) from None
        if one.name.lower() in found:
            raise BadArgument("embedding", text, f"{one.name!r} is given twice; name one of them NAME=FILE")
        found[one.name.lower()] = one
    return found


def _parse(text: str) -> tuple[str | None, Path]:
    """(name or None, file) of "FILE" or "NAME=FILE"."""
    name, equals, file = text.partition("=")
    if files.expanded(text).exists() or not equals:
        return None, files.expanded(text)
    if not name.strip():
        raise BadArgument("embedding", text, "has no name before the =; write NAME=FILE, or FILE")
    return name.strip(), files.expanded(file)


def read_embedding(pipeline: Pipeline, file: Path, name: str | None = None) -> Embedding:
    """The embedding in a file, for the text encoders of a model.

    Raises:
      LcmError: missing, pickled, an image or damaged; no embedding; for a model of another family or width; more
        vectors than a prompt has tokens; numbers that are not finite.
    """
    if file.suffix.lower() in safetensors_io.PICKLED:
        raise LcmError(f"{file} {_CONVERT.format(file, file.with_suffix(''))}")
    if file.suffix.lower() in _IMAGES:
        raise LcmError(f"{file} is an image; embeddings inside of images are not read, give the .safetensors")
    with safetensors_io.open_file(file) as weights:
        keys, word = _keys(file, weights.shapes, pipeline)
        vectors = {part: _vectors(file, weights, key, part, getattr(pipeline, part)) for part, key in keys.items()}
    counts = [len(value) for value in vectors.values()]
    if len(set(counts)) > 1:
        raise LcmError(f"{file} has {counts[0]} vectors and {counts[1]}; it is damaged, download it again")
    if not (name := (name or word).strip()):
        raise LcmError(f"{file} gives its word no name; write NAME=FILE")
    return Embedding(name, vectors)


def _keys(file: Path, shapes: Mapping[str, tuple[int, ...]], pipeline: Pipeline) -> tuple[dict[str, str], str]:
    """(text encoder's name -> key of its tensor, word that the file gives)."""
    parts = [part for part in TEXT_ENCODERS if getattr(pipeline, part) is not None]
    of_xl = next((pair for pair in _OF_XL if shapes.keys() >= set(pair)), None)
    if of_xl and len(parts) == 2:
        return dict(zip(parts, of_xl, strict=True)), file.stem
    if of_xl:
        raise LcmError(f"{file} is for SDXL, whose two text encoders the model does not have; use one for this model")
    key = _OF_SD if _OF_SD in shapes else next(iter(shapes)) if len(shapes) == 1 else None
    if key is None or key in {name for pair in _OF_XL for name in pair}:
        listed = ", ".join(list(shapes)[:4]) or "nothing"
        raise LcmError(
            f"{file} is no embedding: it holds {listed}; it should be one tensor, {_OF_SD}, or clip_l and clip_g"
        )
    if len(parts) != 1:
        raise LcmError(f"{file} is for one text encoder, the model has two; use one for SDXL (clip_l and clip_g)")
    return {parts[0]: key}, file.stem if key in (_OF_SD, "*") else key


def _vectors(file: Path, weights: safetensors_io.Weights, key: str, part: str, encoder: CLIPTextModel) -> np.ndarray:
    """float32 [n d] for a text encoder, the model's `part`."""
    shape, room = weights.shapes[key], encoder.max_position_embeddings - 2
    if len(shape) not in (1, 2) or 0 in shape:
        raise LcmError(f"{file} is no embedding: {key} has the shape {list(shape)}; it should be [vectors, width]")
    if shape[-1] != encoder.hidden_size:
        raise LcmError(
            f"{file} has vectors of width {shape[-1]}, the model's {part} has {encoder.hidden_size}; use an embedding "
            "that was made for this model"
        )
    if len(shape) == 2 and shape[0] > room:
        raise LcmError(f"{file} has {shape[0]} vectors, and a text has room for {room} tokens; use a smaller one")
    value = weights.read(key)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise LcmError(f"{file}: {key} is {value.dtype}, and vectors are floating-point numbers; download it again")
    with np.errstate(over="ignore"):  # what became infinite is refused
        value = np.atleast_2d(value.astype(np.float32))
    if not np.isfinite(value).all():
        raise LcmError(f"{file} has numbers that are not finite; download it again")
    return value
