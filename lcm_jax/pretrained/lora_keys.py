"""Names in LoRA files -> layers of a model, by a table that is made from the model itself.

A key is a prefix, a layer's name and the tensor's role, such as

    unet.down_blocks.0.attentions.1.proj_in.lora_A.weight                peft, as diffusers saves today
    unet.down_blocks.0.attentions.1.proj_in.lora.down.weight             diffusers 0.21 to 0.25
    unet.[..].attn1.processor.to_q_lora.down.weight                      diffusers 0.14 to 0.20, attention only
    base_model.model.[unet.]down_blocks.0. ... .lora_A.weight            peft's trainer
    lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight        sd-scripts
    lora_unet_input_blocks_2_1_proj_in.lora_down.weight                  sd-scripts for SDXL
    lycoris_down_blocks_0_attentions_1_proj_in.lora_down.weight          LyCORIS, SimpleTuner
    unet.input_blocks.2.1.proj_in.lora_down.weight                       OneTrainer
    diffusion_model.input_blocks.2.1.proj_in.lora_down.weight            ComfyUI
    text_encoders.clip_l.transformer.text_model.encoder. ... .lora_up.weight    ComfyUI
    lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight        sd-scripts

Any prefix may stand before any spelling: diffusers' name or that of the original UNet (sgm, ldm), with dots or with
underscores for dots. Underscores are ambiguous, so names are not parsed: the table holds every spelling of every layer.
Roles: the two factors, of LyCORIS also one between them (`.lora_mid`); `.alpha`; and what is added as it is, to weights
(`.diff`, `.w_norm`) and to biases (`.diff_b`, `.b_norm`, and `.lora_B.bias` with the factors' scale).
"""

import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from absl import logging
from flax import linen as nn

from lcm_jax.errors import LcmError
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained import names, single_file_keys

# Part -> what stands before its layers' names, each followed by a dot or an underscore.
_PREFIXES = {
    "unet": r"unet|(?:model[._])?diffusion_model|lora_unet|lora_prior_unet",
    "text_encoder": (
        r"(?:lora_)?text_encoder(?:_1)?|(?:lora_)?te1?|(?:text_encoders[._])?clip_[lh](?:[._]transformer)?"
        r"|cond_stage_model[._]transformer|conditioner[._]embedders[._]0[._]transformer"
    ),
    "text_encoder_2": r"(?:lora_)?text_encoder_2|(?:lora_)?te2|(?:text_encoders[._])?clip_g(?:[._]transformer)?",
}
_ANY_PART = r"(?:(?:base_model[._]model|lycoris|_orig_mod|module)[._])*"  # of peft, LyCORIS, torch.compile and DDP
_SPELLING = {
    part: re.compile(rf"{_ANY_PART}(?:(?:{prefix})[._])?{_ANY_PART}(?P<name>.+)") for part, prefix in _PREFIXES.items()
}

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # peft's name of an adapter
_DOWN = rf"(?:\.lora_A{_ADAPTER}|\.lora_down|(?:\.lora|_lora|\.lora_linear_layer)\.down)"
_UP = rf"(?:\.lora_B{_ADAPTER}|\.lora_up|(?:\.lora|_lora|\.lora_linear_layer)\.up)"
_KEY = re.compile(
    rf"(?P<name>.+?)(?:(?P<lora_A>{_DOWN}(?:\.weight)?)|(?P<lora_B>{_UP}(?:\.weight)?)|(?P<lora_bias>{_UP}\.bias)"
    r"|(?P<lora_mid>\.lora_mid\.weight)|(?P<alpha>(?:\.lora|_lora|\.lora_linear_layer)?\.alpha)"
    r"|(?P<diff>\.diff|\.w_norm)|(?P<diff_b>\.diff_b|\.b_norm))"
)
FACTORS, MID, _OF_BIAS = ("lora_A", "lora_B"), "lora_mid", ("lora_bias", "diff_b")
OF_PRODUCT = (*FACTORS, MID, "alpha")  # roles of what is multiplied; the others are added as they are

# Part of a key -> the kind of adapter that has it.
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "rotation (OFT)",
    "boft_": "rotation (BOFT)",
    "on_input": "(IA)^3",
    "ia3_l": "(IA)^3",
    "vera_lambda": "VeRA",
    "a1.weight": "GLoRA",
    "lora_E": "AdaLoRA",
    "___.": "file of HCP-Diffusion",
    "set_weight": "set of replaced weights",
    "reshape_weight": "LoRA that reshapes layers",
}
_OTHER_KIND = re.compile(rf"(?:^|[._])({'|'.join(map(re.escape, _OTHER_KINDS))})")
_EMBEDDING = re.compile(r"bundle_emb\.(.+?)(?:\.(?:string_to_param|emb_params|clip_l|clip_g|t5)(?:\..*)?)?")

_FAMILY = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}
_TEXT_INPUT = re.compile(r".*attn2[._](?:processor[._])?to_[kv]")


class Layer(NamedTuple):
    """A layer that a file may change: part of the pipeline, torch name in it, parameters."""

    part: str
    name: str
    weight: names.Parameter
    bias: names.Parameter | None

    def parameter(self, role: str) -> names.Parameter | None:
        """What a tensor of this role changes; None: nothing that this layer has."""
        found = self.bias if role in _OF_BIAS else self.weight
        least = {MID: 3} | dict.fromkeys(FACTORS, 2)  # axes of the weight: a convolution alone has a window
        return found if found and len(found.shape) >= least.get(role, 0) else None


Matched = Mapping[Layer, Mapping[str, str]]  # layer -> role -> key in the file


@functools.lru_cache(maxsize=64)
def layers(module: nn.Module) -> Mapping[str, names.Parameter]:
    """Torch name -> kernel of every linear and convolutional layer."""
    table = names.torch_table(module)
    return {key.removesuffix(".weight"): p for key, p in table.items() if p.path[-1] == "kernel"}


@functools.lru_cache(maxsize=64)
def spellings(part: str, module: nn.Module) -> Mapping[str, Layer]:
    """Every spelling, without prefix, of every layer with a weight -> the layer."""
    parameters, table = names.torch_table(module), {}
    original = sgm_names(module) if part == "unet" else {}
    for key, weight in parameters.items():
        name = key.removesuffix(".weight")
        if name == key:
            continue
        layer = Layer(part, name, weight, parameters.get(f"{name}.bias"))
        for spelled in (name, *filter(None, [original.get(name)])):
            for variant in _variants(spelled):
                table |= dict.fromkeys((variant, underscored(variant, "")), layer)
    return table


def layers_of(spelling: str, modules: Mapping[str, nn.Module]) -> list[Layer]:
    """The layers that a spelling may mean: none, or several if it does not say which text encoder it is for."""
    matches = {part: _SPELLING[part].fullmatch(spelling) for part in modules}
    found = [spellings(part, modules[part]).get(match["name"]) for part, match in matches.items() if match]
    return [layer for layer in found if layer]


def sgm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Torch name in diffusers -> name in the original UNet (sgm, ldm) of everything with a weight."""
    tensors = single_file_keys.unet_layout(unet).tensors
    ends = {stored.keys[0]: key for key, stored in tensors.items() if key.endswith(".weight")}
    return {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in ends.items()}


def kohya_names(unet: UNet2DConditionModel) -> Mapping[str, str]:
    """Torch name of each layer -> the name whose dots become underscores in kohya's file; absent: diffusers reads none.

    A1111 translates diffusers' names as if the first upsampler had no transformer beside it, as in SD and SDXL's
    refiner. Other UNets of SDXL get their original names, as from sd-scripts; diffusers reads these of SDXL alone, with
    one number of resnets for all levels.
    """
    sdxl = unet.addition_embed_type is not None and isinstance(unet.layers_per_block, int)
    original = sdxl and bool(unet.up_depths(0))
    spelled = sgm_names(unet) if original else {name: name for name in layers(unet)}
    unread = ("time_embedding.cond_proj",) if original else ("time_embedding.cond_proj", "add_embedding.")
    return {name: spelled[name] for name in layers(unet) if not name.startswith(unread)}


def underscored(name: str, prefix: str = "lora_unet_") -> str:
    """Kohya's spelling of a dotted name."""
    return prefix + name.replace(".", "_")


def _variants(name: str) -> list[str]:
    """`name`, and as older diffusers, transformers and OneTrainer spelled it."""
    found = [name]
    if name.startswith("text_model."):
        found.append(name.removeprefix("text_model."))
    attention = re.fullmatch(r"(.*)\.to_([qkv]|out\.0)", name)
    if attention:
        found += [f"{attention[1]}.{middle}to_{attention[2].removesuffix('.0')}" for middle in ("", "processor.")]
    attention = re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name)
    if attention:
        found += [f"{before}.to_{attention[2]}" for before in (attention[1], attention[1].removeprefix("text_model."))]
    upsampler = re.fullmatch(r"(output_blocks\.\d+)\.1\.conv", name)
    if upsampler:  # OneTrainer's table has SDXL's place for SD, too
        found.append(f"{upsampler[1]}.2.conv")
    return found


def split(key: str) -> tuple[str, str]:
    """(spelling of the layer, role: a group of `_KEY`) of a key; both "" if it is not a LoRA's."""
    found = _KEY.fullmatch(key)
    return (found["name"], found.lastgroup) if found else ("", "")


def match(
    source: str, shapes: Mapping[str, names.Shape], modules: Mapping[str, nn.Module], ignore_unused: bool
) -> Matched:
    """The layers that a file changes, with their keys; both factors or none exist, and all have the right shape.

    Embeddings that are bundled with a LoRA are left out, with a warning.

    Args:
      source: the file's name, for errors.
      shapes: key -> shape of every tensor in the file.
      modules: "unet", "text_encoder", "text_encoder_2" -> module, for the parts that the model has.
      ignore_unused: ignore the keys that match no layer, and log their number.

    Raises:
      LcmError: see `lora_files.read_lora`.
    """
    if odd := [key for key in shapes if not key.isprintable()]:
        raise LcmError(f"{source} has a key {odd[0]!r} with control characters; the file is broken, use another")
    bundled = {key: found[1] for key in shapes if (found := _EMBEDDING.fullmatch(key))}
    embeddings, shapes = set(bundled.values()), {key: shapes[key] for key in shapes if key not in bundled}
    if embeddings and not shapes:
        raise LcmError(f"{source} holds embeddings alone ({names.some(embeddings)}), no LoRA; name another file")
    _check_kind(source, shapes)
    _check_text_width(source, shapes, modules)
    matched: dict[Layer, dict[str, str]] = {}
    for key in shapes:
        spelling, role = split(key)
        means = [layer for layer in layers_of(spelling, modules) if layer.parameter(role)]
        if len(means) > 1:
            parts = " and ".join(layer.part for layer in means)
            raise LcmError(f"{source}: {key} may be for {parts} of this model; put the part's name before such keys")
        keys = matched.setdefault(means[0], {}) if means else {}
        if role in keys:
            raise LcmError(f"{source} has both {keys[role]} and {key} for one layer; keep one adapter in the file")
        keys[role] = key
    matched = {layer: keys for layer, keys in matched.items() if keys.keys() != {"alpha"}}
    _check_unused(source, shapes, {key for keys in matched.values() for key in keys.values()}, modules, ignore_unused)
    incomplete = [keys for keys in matched.values() if not set(FACTORS) <= keys.keys()]
    halves = [key for keys in incomplete for role, key in keys.items() if role in (*FACTORS, MID, "lora_bias")]
    if halves:
        raise LcmError(
            f"{source}: {len(halves)} keys lack a factor of their layer ({names.some(halves)}); "
            "the file is incomplete, download or save it again"
        )
    _check_shapes(source, shapes, matched)
    if embeddings:
        logging.warning("%s holds embeddings, too (%s); they are left out", source, names.some(embeddings))
    return matched


def _check_kind(source: str, shapes: Mapping[str, names.Shape]) -> None:
    if not shapes:
        raise LcmError(f"{source} holds no tensors; download or save it again")
    for key in shapes:
        if found := _OTHER_KIND.search(key):
            kind = _OTHER_KINDS[found[1]]
            raise LcmError(f"{source} is a {kind} ({key}), which is not supported; use a plain LoRA, or convert it")
    if all(split(key)[1] in ("", "alpha") for key in shapes):
        raise LcmError(f"{source} holds no LoRA: none of its {len(shapes)} keys ({names.some(shapes)}) is a factor")


def _check_text_width(source: str, shapes: Mapping[str, names.Shape], modules: Mapping[str, nn.Module]) -> None:
    """Reports a LoRA for another family in one line, before hundreds of its keys fail to match."""
    if "unet" not in modules:
        return
    found = set()
    for key, shape in shapes.items():
        spelling, role = split(key)
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


def _check_unused(
    source: str,
    shapes: Mapping[str, names.Shape],
    used: Collection[str],
    modules: Mapping[str, nn.Module],
    ignore_unused: bool,
) -> None:
    unused = {key for key in shapes.keys() - used if not (used and _is_idle(key, modules))}
    if not unused:
        return
    what = f"{source}: {len(unused)} of {len(shapes)} keys match no layer of this model ({names.some(unused)})"
    if not used:
        raise LcmError(f"{what}; it is for another architecture, or for parts that this model does not have")
    if not ignore_unused:
        if any(split(key)[1] in FACTORS for key in unused):
            why = "is it for another architecture, or for parts that this model does not have? Set"
        else:
            why = "every factor does. What these change would be lost; set"
        raise LcmError(f"{what}; {why} ignore_unused (--ignore_unused) to load the rest")
    logging.warning("%s; they are ignored", what)


def _is_idle(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a key is for the projection of a text encoder that is used without it; ComfyUI has one in each."""
    found = (_SPELLING[part].fullmatch(split(key)[0]) for part in modules.keys() - {"unet"})
    return any(match["name"] == "text_projection" for match in found if match)


def _check_shapes(source: str, shapes: Mapping[str, names.Shape], found: Matched) -> None:
    wrong = []
    for layer, keys in found.items():
        shape = {role: shapes[key] for role, key in keys.items()}
        same = names.same_but_for_1x1
        for role in shape.keys() - set(OF_PRODUCT):
            target = layer.parameter(role).torch_shape
            if not same(shape[role], target):
                wrong.append(f"{keys[role]} {list(shape[role])} for {list(target)}")
        if "lora_A" in shape:
            out, fan, *window = wanted = layer.weight.torch_shape
            a, b = shape["lora_A"], shape["lora_B"]
            if a[:1] == (0,):
                raise LcmError(f"{source}: {keys['lora_A']} is of rank 0; the file is broken, use another")
            mid = shape.get(MID, a[:1] * 2 + (*window,))
            reach = () if MID in shape else window
            fits = len(a) > 1 and same(a, (a[0], fan, *reach)) and same(b, (out, a[0]))
            if not (fits and mid == (a[0], a[0], *window)):
                found_shapes = ", ".join(str(list(one)) for role, one in shape.items() if role in (*FACTORS, MID))
                wrong.append(f"{layer.part}.{layer.name} {found_shapes} for {list(wanted)}")
        if math.prod(shape.get("alpha", ())) != 1:
            wrong.append(f"{keys['alpha']} {list(shape['alpha'])} for []")
    if wrong:
        raise LcmError(
            f"{source}: {len(wrong)} of {len(found)} layers have other shapes than this model's "
            f"({names.some(wrong)}); it is for another architecture"
        )
