"""Names in LoRA files -> layers of a model, by a table that is made from the model itself.

A key is a layer's spelling and the tensor's role in it. With `down_blocks.0.attentions.1.proj_in` for example:

    unet.down_blocks.0.attentions.1.proj_in.lora_A.weight           peft, as diffusers saves today
    unet.down_blocks.0.attentions.1.proj_in.lora.down.weight        diffusers 0.21 to 0.25
    unet.[..].attn1.processor.to_q_lora.down.weight                 diffusers 0.14 to 0.20, attention only
    base_model.model.[unet.]down_blocks.0. ... .lora_A.weight       peft's trainer
    lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight   kohya; text encoders lora_te_, lora_te1_, lora_te2_
    lora_unet_input_blocks_2_1_proj_in.lora_down.weight             kohya with the names of the original UNet (sgm, ldm)

and lora_B, up, lora_up for the other factor, `.alpha` for the scale. Kohya's underscores are ambiguous, so the names
are not parsed: the table holds every spelling of every layer.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from absl import logging
from flax import linen as nn

from lcm_jax.errors import LcmError
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained import names, single_file_keys

# Part -> prefixes of its layers: of dotted names, and of names with underscores for dots.
_DOTTED = {
    "unet": ("unet.", "", "base_model.model.", "base_model.model.unet.", "unet.base_model.model."),
    "text_encoder": ("text_encoder.",),
    "text_encoder_2": ("text_encoder_2.",),
}
_UNDERSCORED = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}

_DOWN = r"\.lora_A(?:\.\w+)?|\.lora_down|\.lora\.down|\.lora_linear_layer\.down|_lora\.down"
_UP = r"\.lora_B(?:\.\w+)?|\.lora_up|\.lora\.up|\.lora_linear_layer\.up|_lora\.up"
_KEY = re.compile(rf"(?P<name>.+?)(?:(?P<lora_A>{_DOWN})\.weight|(?P<lora_B>{_UP})\.weight|(?P<alpha>\.alpha))")

# Part of a key -> the kind of adapter that has it.
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with CP decomposition",
}

_FAMILY = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}
_TEXT_INPUT = re.compile(r".*attn2[._](?:processor[._])?to_[kv]")


class Layer(NamedTuple):
    """A layer that a file may adapt: part of the pipeline, torch name in it, kernel."""

    part: str
    name: str
    kernel: names.Parameter


Matched = Mapping[Layer, Mapping[str, str]]  # layer -> {"lora_A", "lora_B" [, "alpha"] -> key in the file}


@functools.lru_cache(maxsize=16)
def layers(module: nn.Module) -> Mapping[str, names.Parameter]:
    """Torch name -> kernel of every linear and convolutional layer."""
    table = names.torch_table(module)
    return {key.removesuffix(".weight"): p for key, p in table.items() if p.path[-1] == "kernel"}


def spellings(modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Every spelling of every layer -> the layer.

    modules: "unet", "text_encoder", "text_encoder_2" -> module, for the parts that the model has.
    """
    table = {}
    for part, module in modules.items():
        original = sgm_names(module) if part == "unet" else {}
        for name, kernel in layers(module).items():
            layer = Layer(part, name, kernel)
            for variant in _variants(name):
                table |= dict.fromkeys((prefix + variant for prefix in _DOTTED[part]), layer)
                table |= dict.fromkeys((underscored(variant, prefix) for prefix in _UNDERSCORED[part]), layer)
            if name in original:
                table[underscored(original[name], "lora_unet_")] = layer
    return table


def sgm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Torch name in diffusers -> name in the original UNet (sgm, ldm) of everything with a weight."""
    tensors = single_file_keys.unet_layout(unet).tensors
    ends = {stored.keys[0]: key for key, stored in tensors.items() if key.endswith(".weight")}
    return {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in ends.items()}


def underscored(name: str, prefix: str = "lora_unet_") -> str:
    """Kohya's spelling of a dotted name."""
    return prefix + name.replace(".", "_")


def _variants(name: str) -> list[str]:
    """`name`, and as older diffusers and transformers spelled it."""
    found = [name]
    if name.startswith("text_model."):
        found.append(name.removeprefix("text_model."))
    attention = re.fullmatch(r"(.*)\.to_([qkv]|out\.0)", name)
    if attention:
        found.append(f"{attention[1]}.processor.to_{attention[2].removesuffix('.0')}")
    attention = re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name)
    if attention:
        found += [f"{before}.to_{attention[2]}" for before in (attention[1], attention[1].removeprefix("text_model."))]
    return found


def split(key: str) -> tuple[str, str] | None:
    """(spelling of the layer, "lora_A" | "lora_B" | "alpha") of a key; None if it is not a LoRA's."""
    match = _KEY.fullmatch(key)
    return (match["name"], match.lastgroup) if match else None


def match(
    source: str, shapes: Mapping[str, names.Shape], modules: Mapping[str, nn.Module], ignore_unused: bool
) -> Matched:
    """The layers that a file adapts, with their keys; both factors exist and have the right shape.

    Args:
      source: the file's name, for errors.
      shapes: key -> shape of every tensor in the file.
      modules: see `spellings`.
      ignore_unused: ignore the keys that match no layer, and log their number.

    Raises:
      LcmError: see `lora_files.read_lora`.
    """
    _check_kind(source, shapes)
    _check_text_width(source, shapes, modules)
    table = spellings(modules)
    found: dict[Layer, dict[str, str]] = {}
    for key in shapes:
        spelling, role = split(key) or ("", "")
        if spelling not in table:
            continue
        keys = found.setdefault(table[spelling], {})
        if role in keys:
            raise LcmError(f"{source} has both {keys[role]} and {key} for one layer; keep one adapter in the file")
        keys[role] = key
    found = {layer: keys for layer, keys in found.items() if keys.keys() != {"alpha"}}
    _check_unused(source, shapes, {key for keys in found.values() for key in keys.values()}, ignore_unused)
    halves = [key for keys in found.values() if not {"lora_A", "lora_B"} <= keys.keys() for key in keys.values()]
    if halves:
        raise LcmError(
            f"{source}: {len(halves)} keys lack a factor of their layer ({names.some(halves)}); "
            "the file is incomplete, download or save it again"
        )
    _check_shapes(source, shapes, found)
    return found


def _check_kind(source: str, shapes: Mapping[str, names.Shape]) -> None:
    if not shapes:
        raise LcmError(f"{source} holds no tensors; download or save it again")
    for word, kind in _OTHER_KINDS.items():
        key = next((key for key in shapes if word in key), None)
        if key:
            raise LcmError(f"{source} is a {kind} ({key}), which is not supported; use a plain LoRA, or convert it")
    if not any((split(key) or ("", ""))[1].startswith("lora_") for key in shapes):
        raise LcmError(f"{source} holds no LoRA: none of its {len(shapes)} keys ({names.some(shapes)}) is a factor")


def _check_text_width(source: str, shapes: Mapping[str, names.Shape], modules: Mapping[str, nn.Module]) -> None:
    """Reports a LoRA for another family in one line, before hundreds of its keys fail to match."""
    if "unet" not in modules:
        return
    found = set()
    for key, shape in shapes.items():
        spelling, role = split(key) or ("", "")
        if role == "lora_A" and len(shape) > 1 and _TEXT_INPUT.fullmatch(spelling):
            found.add(shape[1])
    mine = set(modules["unet"].per_level("cross_attention_dim"))
    if found - mine:
        raise LcmError(
            f"{source} is for a UNet that attends to text of width {_families(found - mine)}; this model's has "
            f"{_families(mine)}: use a LoRA for this model, or the model of this LoRA"
        )


def _families(widths: set[int]) -> str:
    return ", ".join(f"{n} ({_FAMILY[n]})" if n in _FAMILY else str(n) for n in sorted(widths))


def _check_unused(source: str, shapes: Mapping[str, names.Shape], used: set[str], ignore_unused: bool) -> None:
    unused = shapes.keys() - used
    if not unused:
        return
    what = f"{source}: {len(unused)} of {len(shapes)} keys match no layer of this model ({names.some(unused)})"
    if not used:
        raise LcmError(f"{what}; it is for another architecture, or for parts that this model does not have")
    if not ignore_unused:
        raise LcmError(f"{what}; is it for another architecture? Set ignore_unused to load the rest")
    logging.warning("%s; they are ignored", what)


def _check_shapes(source: str, shapes: Mapping[str, names.Shape], found: Matched) -> None:
    wrong = []
    for layer, keys in found.items():
        out, fan, *window = wanted = layer.kernel.torch_shape
        a, b = shapes[keys["lora_A"]], shapes[keys["lora_B"]]
        same = names.same_but_for_1x1
        fits = len(a) > 1 and a[0] > 0 and same(a, (a[0], fan, *window)) and same(b, (out, a[0]))
        if not fits:
            wrong.append(f"{layer.part}.{layer.name} {list(a)}, {list(b)} for {list(wanted)}")
        elif "alpha" in keys and math.prod(shapes[keys["alpha"]]) != 1:
            wrong.append(f"{keys['alpha']} {list(shapes[keys['alpha']])} for []")
    if wrong:
        raise LcmError(
            f"{source}: {len(wrong)} of {len(found)} layers have other shapes than this model's "
            f"({names.some(wrong)}); it is for another architecture"
        )
