"""Keys of single files as other programs spell them -> as the original does, which `single_file_keys` knows.

    UNet      numbers with gaps: diffusers' script counts three places a level, however few a pruned UNet has, and puts
              the upsampler into the third; diffusers' names, where that script does not expect a module
    VAE       diffusers' names of its attention's matrices, old and new
    CLIP      without `text_model.`
    OpenCLIP  transformers' names, all or some; q, k and v apart; text_projection.weight [out in]
    SD 2.x    its encoder where SGM has it, or where SD 1.x has its own

A VAE alone may be in a file, too (`open_vae`), with all of these names or diffusers', with or without the prefix.

diffusers' scripts are convert_diffusers_to_original_{stable_diffusion,sdxl}.py.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lcm_jax import foreign
from lcm_jax.errors import LcmError
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.pretrained import safetensors_io
from lcm_jax.pretrained import single_file_keys as keys
from lcm_jax.pretrained.names import Shape
from lcm_jax.pretrained.safetensors_io import SUFFIX, Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST_OF_VAE = "encoder.conv_in.weight"
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
SGM = "conditioner.embedders."
_CLIP = (SD1_TEXT, SGM + "0.transformer.")
_OPEN_CLIP = (SD2_TEXT, SGM + "1.model.", SGM + "0.model.")
_SD2_WIDTH = 1024  # of its text; CLIP ViT-L 768, OpenCLIP bigG 1280

_ATTENTION = re.compile(r"(.*\.attn_1\.)(group_norm|to_q|to_k|to_v|to_out\.0|query|key|value|proj_attn)\.")
_ATTENTION_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_NAMES |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_LEFT_OVER = re.compile(r"(down|up)_blocks\.(\d{1,2})\.attentions\.(\d{1,2})\.")
_HALVES = ("input", "output")
_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.")
_PLACES = 3  # of a level in diffusers' script
_TRANSFORMERS = (
    (r"(transformer\.)?text_model\.|transformer\.(?=text_projection)", ""),
    (r"(encoder\.layers|resblocks)\.", "transformer.resblocks."),
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm\.", "ln_final."),
)
_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn"}
_QKV = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")


def is_vae(path: Path) -> bool:
    """Whether a file holds a VAE, alone or in a checkpoint."""
    if path.suffix != SUFFIX:
        return False
    with safetensors_io.open_file(path) as file:
        return bool({FIRST_OF_VAE, VAE + FIRST_OF_VAE} & file.shapes.keys())


@contextlib.contextmanager
def open_vae(path: Path, module: AutoencoderKL) -> Iterator[Weights]:
    """Opens the file of a VAE, or of a checkpoint that holds one, with diffusers' keys."""
    layout = keys.vae_layout(module)
    with safetensors_io.open_file(path) as file:
        whole = any(key.startswith(VAE) for key in file.shapes)
        stored = {key if whole else VAE + key: key for key in file.shapes if not whole or key.startswith(VAE)}
        shapes = {key: file.shapes[name] for key, name in stored.items()}
        weights = original(Weights(path, shapes, lambda key: file.read(stored[key])))
        found = {}
        for key in weights.shapes:
            name = key.removeprefix(VAE)
            if name in layout.tensors:
                found[layout.tensors[name].keys[0]] = key
            elif not layout.ignored.fullmatch(name):
                found[name] = key
        shapes = {name: weights.shapes[key] for name, key in found.items()}
        yield Weights(path, shapes, lambda name: weights.read(found[name]))


def original(weights: Weights) -> Weights:
    """The same tensors by the original's keys; keys of no spelling stay as they are.

    Raises:
      LcmError: two keys of the file are one of the original's.
    """
    pieces: dict[str, dict[str, str]] = {}  # the original's key -> {"": key} or {"q": key, "k": key, "v": key}
    for key, (name, piece) in _names(weights.shapes).items():
        others = pieces.setdefault(name, {})
        if others and (piece in others or not piece or "" in others):
            both = f"{next(iter(others.values()))} and {key}"
            raise LcmError(f"{weights.source} holds {both}, which are one tensor; remove one of them")
        others[piece] = key

    def stored(name: str) -> list[str]:
        return [pieces[name][piece] for piece in sorted(pieces[name], key="qkv".find)]

    def transposed(name: str) -> bool:
        return name.endswith(".text_projection") and not stored(name)[0].endswith(".text_projection")

    def shape(name: str) -> Shape:
        first, *others = (weights.shapes[key] for key in stored(name))
        first = (sum(one[0] for one in (first, *others)), *first[1:]) if others and first and all(others) else first
        return first[::-1] if transposed(name) else first

    def read(name: str) -> np.ndarray:
        tensors = [weights.read(key) for key in stored(name)]
        with foreign.reading(weights.source, "a checkpoint"):
            tensor = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        return tensor.T if transposed(name) else tensor

    return Weights(weights.source, {name: shape(name) for name in pieces}, read, weights.metadata)


def _names(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, str]]:
    """Key of a file -> (the original's key, which of q, k and v it is there: "" if it is all of it)."""
    found, moved = {}, _moved(shapes)
    unet = _unet([key.removeprefix(UNET) for key in shapes if key.startswith(UNET)])
    for key in shapes:
        prefix = next((p for p in (UNET, VAE, *_CLIP, *_OPEN_CLIP) if key.startswith(p)), "")
        name, piece, prefix = key.removeprefix(prefix), "", moved.get(prefix, prefix)
        if prefix == UNET:
            name = unet[name]
        elif prefix == VAE and (match := _ATTENTION.match(name)):
            name = match[1] + _ATTENTION_NAMES[match[2]] + name[match.end(2) :]
        elif prefix in _CLIP and name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            name = "text_model." + name
        elif prefix in _OPEN_CLIP:
            name, piece = _open_clip(name)
        found[key] = prefix + name, piece
    return found


def _moved(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Prefix -> that of SD 2.x, where a file has the text encoder of SD 2.x (by its width, or no sizes, as XL has)."""
    unet, sizes = (UNET + key in shapes for key in ("input_blocks.0.0.weight", "label_emb.0.0.weight"))
    found = {}
    for prefix, is_sd2 in ((SD1_TEXT, False), (SGM + "0.model.", unet and not sizes)):
        tables = [s for k, s in shapes.items() if k.startswith(prefix) and k.endswith("token_embedding.weight")]
        if tables and (is_sd2 or tables[0][1:] == (_SD2_WIDTH,)):
            found[prefix] = SD2_TEXT
    return found


def _unet(found: Iterable[str]) -> dict[str, str]:
    """Key of a UNet, without prefix -> the original's: its blocks in the same order, without gaps."""
    names = {}
    for key in found:
        end = next((old for old in keys.UNET_ENDS if key.startswith(old + ".")), None)
        names[key] = keys.UNET_ENDS[end] + key.removeprefix(end) if end else key
        if match := _LEFT_OVER.match(key):
            place = _PLACES * int(match[2]) + int(match[3])
            block = f"input_blocks.{place + 1}" if match[1] == "down" else f"output_blocks.{place}"
            names[key] = f"{block}.1.{key[match.end() :]}"
    blocks = {key: (m[1], int(m[2]), m[3], name[m.end() :]) for key, name in names.items() if (m := _BLOCK.match(name))}
    order = {half: sorted({n for h, n, place, _ in blocks.values() if h + place == half + "0"}) for half in _HALVES}
    attentions = {n for half, n, place, rest in blocks.values() if half + place == "output1" and rest[:5] != "conv."}
    for key, (half, number, place, rest) in blocks.items():
        if half == "output" and rest.startswith("conv."):  # an upsampler belongs to the resnet before it
            number = max((n for n in order[half] if n <= number), default=number)
            place = "2" if number in attentions else "1"
        if number in order[half]:
            names[key] = f"{half}_blocks.{order[half].index(number)}.{place}.{rest}"
    return names


def _open_clip(key: str) -> tuple[str, str]:
    """Key of an encoder, without prefix -> OpenCLIP's, and which of q, k, v it is."""
    for pattern, new in _TRANSFORMERS:
        key = re.sub("^(" + pattern + ")", new, key)
    key = ".".join(_LAYER.get(part, part) for part in key.split("."))
    key = "text_projection" if key == "text_projection.weight" else key
    match = _QKV.fullmatch(key)
    return (f"{match[1]}in_proj_{match[3]}", match[2]) if match else (key, "")
