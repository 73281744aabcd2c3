"""ControlNets of SD 1.x, 2.x and SDXL -> module and parameter tree.

    FOLDER/config.json, diffusion_pytorch_model[.VARIANT].safetensors     as diffusers writes them
    NAME.safetensors    the same keys without a config, or the original's, with or without `control_model.` before them:

    time_embed.{0,2}, label_emb.0.{0,2}, input_blocks.N, middle_block.{0,1,2}: as a UNet's (`single_file_keys`)
    input_hint_block.{0,2,..12,14}   controlnet_cond_embedding.{conv_in, blocks.0, ..5, conv_out}
    zero_convs.N.0, middle_block_out.0   controlnet_down_blocks.N, controlnet_mid_block

What a file without config does not show (heads, groups of norms, sinusoids) is that of the UNet it is loaded for.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from lcm_jax import foreign
from lcm_jax.errors import LcmError
from lcm_jax.models import controlnet
from lcm_jax.models.controlnet import ControlNetModel
from lcm_jax.models.unet import MID_BLOCKS, Encoder
from lcm_jax.pretrained import diffusers_folder, hub, names, safetensors_io
from lcm_jax.pretrained.model import Config, Pipeline
from lcm_jax.pretrained.names import ChangeFn, Params, PutFn, Shape
from lcm_jax.pretrained.single_file_keys import RESNET, UNET_ENDS
from lcm_jax.typed import config_of

PREFIX = "control_model."
_FIRST = "controlnet_cond_embedding.conv_in.weight"  # every ControlNet has it
# A key that only files of this kind have -> what they are, and the way out.
_OTHERS = {
    r"lora_controlnet": "a Control-LoRA, which is not supported yet; give a whole ControlNet",
    r"(task_embedding|transformer_layes|spatial_ch_projs|control_add_embedding)\b.*": "a ControlNet-Union, which is "
    "not supported yet; give a ControlNet for one kind of image",
    r"(adapter\.)?body\.\d+\..*": "a T2I-Adapter, which is not supported yet; give a ControlNet",
    r"(image_proj|ip_adapter)\..*": "an IP-Adapter, which is not supported yet; give a ControlNet",
    r"lllite_.*": "a ControlNet-LLLite, which is not supported; give a ControlNet",
    r".*lora.*": "a LoRA, which is given with loras= (--lora)",
}
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}  # by the width of the text

_ENDS = {old: new for new, old in UNET_ENDS.items()}
_ENDS |= {"input_hint_block.0": "controlnet_cond_embedding.conv_in", "middle_block_out.0": "controlnet_mid_block"}
_ENDS["input_hint_block.14"] = "controlnet_cond_embedding.conv_out"
_RESNETS = {old: new for new, old in RESNET.items()}
_NUMBERED = re.compile(r"(input_blocks|middle_block|input_hint_block|zero_convs)\.(\d{1,3})\.(?:([01])\.)?(.*)")


def load_controlnet(
    source: str | Path,
    pipeline: Pipeline,
    variant: str | None = None,
    param_dtype: DTypeLike | None = None,
    *,
    put: PutFn | None = None,
    change: ChangeFn | None = None,
) -> tuple[ControlNetModel, Params]:
    """(module, params) of a ControlNet for the UNet of `pipeline`, in whose dtype it computes.

    Args:
      source: folder or hub id, whose folder `controlnet` is taken if there is one; or NAME.safetensors.
      variant: weights to read, e.g. "fp16"; if there are none, those without a variant.
      param_dtype, put: as in `load_pipeline`. change: as in `names.read_params`.

    Raises:
      LcmError: nothing there, damaged, no ControlNet (the kind is named), or one for another family.
      UnsupportedConfig: a config asks for something outside the Stable Diffusion family.
    """
    config: Config | None = None
    if hub.is_single_file(source):
        where = hub.local_file(source)
        weights = safetensors_io.open_file(where)
    else:
        folder = diffusers_folder.part_folder(source, "controlnet", variant, True)
        kept = diffusers_folder.find_variants({"controlnet": (source, folder)}, variant, or_without=True)["controlnet"]
        weights = safetensors_io.open_weights(folder, safetensors_io.DIFFUSERS_NAME, kept)
        where = folder / "config.json"
        config = foreign.read_json(where)
    with weights as stored:
        keys = torch_names(stored.shapes)
        if (other := _other(stored.shapes)) or _FIRST not in keys:
            raise LcmError(f"{stored.source} is {other or _unknown(stored.shapes)}")
        shapes = {name: stored.shapes[key] for name, key in keys.items()}
        with config_of(where):
            config = config_from_shapes(shapes, pipeline.unet, where) if config is None else config
            net = controlnet.from_config(config, pipeline.unet.dtype)
        check_fit(net, pipeline, source)
        read, what = lambda name: stored.read(keys[name]), str(stored.source)
        return net, names.read_params(net, shapes, read, param_dtype, what, put, change)


def check_fit(net: ControlNetModel, pipeline: Pipeline, source: str | Path) -> None:
    """Raises LcmError, which names both families, for a net whose residuals are not for the UNet of `pipeline`."""
    unet = pipeline.unet

    def family(module: Encoder) -> str:
        width = module.per_level("cross_attention_dim")[0]
        return f"{_FAMILIES.get(width, 'a model of another kind')} (context {width})"

    def inputs(module: Encoder) -> str:
        if module.addition_embed_type is None:
            return "neither pooled text nor sizes"
        return f"{module.projection_class_embeddings_input_dim} features of pooled text and sizes"

    def skips(module: Encoder) -> str:
        return f"skips of widths {', '.join(map(str, module.skip_widths))}"

    problem = None
    if family(net) != family(unet):
        problem = f"is for {family(net)}, the model is {family(unet)}"
    elif inputs(net) != inputs(unet):
        problem = f"takes {inputs(net)}, the model's UNet {inputs(unet)}"
    elif net.skip_widths != unet.skip_widths:
        problem = f"is for {skips(net)}, the model's UNet has {skips(unet)}"
    elif net.in_channels != unet.out_channels:
        problem = f"reads latents of {net.in_channels} channels, those of the model have {unet.out_channels}"
    elif net.factor != pipeline.vae.factor:
        problem = f"has one latent for {net.factor} x {net.factor} pixels, the model's VAE {pipeline.vae.factor}"
    if problem:
        raise LcmError(f"the ControlNet {source} {problem}; give one that was made for this model's family")


def torch_names(keys: Collection[str]) -> dict[str, str]:
    """diffusers' key -> key in a file; keys that no ControlNet has keep their name."""
    found = {key.removeprefix(PREFIX): key for key in keys if key.startswith(PREFIX)} or {key: key for key in keys}
    numbers = itertools.count(1)
    layers = next(n for n in numbers if f"input_blocks.{n}.0.in_layers.0.weight" not in found) - 1  # of a level
    return {_torch_name(key, layers): stored for key, stored in found.items()}


def _torch_name(key: str, layers: int) -> str:
    """diffusers' name of an original key."""
    module, _, leaf = key.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{leaf}"
    if not (match := _NUMBERED.fullmatch(key)):
        return key
    block, number, place, rest = match[1], int(match[2]), match[3], match[4]
    if block == "input_hint_block":
        return f"controlnet_cond_embedding.blocks.{number // 2 - 1}.{rest}"
    if block == "zero_convs":
        return f"controlnet_down_blocks.{number}.{rest}"
    if block == "middle_block":
        return f"mid_block.attentions.0.{rest}" if number == 1 else _resnet(f"mid_block.resnets.{number // 2}", rest)
    level, layer = divmod(number - 1, layers + 1)
    if rest.startswith("op."):
        return f"down_blocks.{level}.downsamplers.0.conv.{leaf}"
    if place == "1":
        return f"down_blocks.{level}.attentions.{layer}.{rest}"
    return _resnet(f"down_blocks.{level}.resnets.{layer}", rest)


def _resnet(module: str, rest: str) -> str:
    layer, _, leaf = rest.rpartition(".")
    return f"{module}.{_RESNETS.get(layer, layer)}.{leaf}"


def config_from_shapes(shapes: Mapping[str, Shape], unet: Encoder, source: Path) -> dict[str, Any]:
    """The config of a net from its tensors by diffusers' keys, and from the UNet that it is for what they do not show.

    Raises:
      LcmError: tensors are missing.
    """

    def count(pattern: str) -> int:
        return next(n for n in itertools.count() if pattern.format(n) not in shapes)

    try:
        levels = range(count("down_blocks.{}.resnets.0.conv1.weight"))
        attends = [f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in levels]
        blocks = "{}.attentions.0.transformer_blocks.{{}}.norm1.weight"
        # A level without transformers ignores its entry; the last entry is also the middle's.
        depths = [count(blocks.format(f"down_blocks.{i}")) if attends[i] else 1 for i in levels]
        if not attends[-1]:
            depths[-1] = count(blocks.format("mid_block")) or 1
        widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels]
        projections = [shape for key, shape in shapes.items() if key.endswith(".proj_in.weight")]
        contexts = [shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")]
        middle = [key for key in ("attentions.0.norm", "resnets.0.norm1") if f"mid_block.{key}.weight" in shapes]
        steps = range(1, count("controlnet_cond_embedding.blocks.{}.weight"), 2)
        found = {
            "in_channels": shapes["conv_in.weight"][1],
            "conditioning_channels": shapes[_FIRST][1],
            "conditioning_embedding_out_channels": [
                shapes[_FIRST][0],
                *(shapes[f"controlnet_cond_embedding.blocks.{n}.weight"][0] for n in steps),
            ],
            "block_out_channels": widths,
            "layers_per_block": count("down_blocks.0.resnets.{}.conv1.weight"),
            "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends],
            "mid_block_type": MID_BLOCKS[2 - len(middle)],
            "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
            "cross_attention_dim": contexts[0] if contexts else unet.cross_attention_dim,
            "use_linear_projection": len(projections[0]) == 2 if projections else unet.use_linear_projection,
            "attention_head_dim": unet.attention_head_dim if widths == list(unet.block_out_channels) else 1,
        }
        if "add_embedding.linear_1.weight" in shapes:
            found |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": unet.addition_time_embed_dim or 256,
                "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
            }
    except LookupError:
        raise LcmError(f"{source} lacks tensors of a ControlNet; copy or download it again") from None
    kept = ("flip_sin_to_cos", "freq_shift", "norm_num_groups", "norm_eps", "upcast_attention")
    return {key: getattr(unet, key) for key in kept} | found


def _other(keys: Iterable[str]) -> str | None:
    """What a file holds, and the way out, if it is of a kind of `_OTHERS`."""
    plain = [key.removeprefix(PREFIX) for key in keys]
    return next((text for pattern, text in _OTHERS.items() if any(re.fullmatch(pattern, key) for key in plain)), None)


def _unknown(keys: Collection[str]) -> str:
    wanted = f"{_FIRST} or input_hint_block.0.weight"
    return f"no ControlNet of the Stable Diffusion family: it lacks {wanted}, and holds {names.some(keys) or 'nothing'}"
