"""The original (LDM and SGM) key names of Stable Diffusion's parts <-> torch keys, from a module's own structure.

    UNet      time_embed.{0,2}  label_emb.0.{0,2}  out.{0,2}  middle_block.{0,1,2}: resnet, transformer, resnet
              input_blocks.N    0: conv_in; then one per resnet (.0) with its transformer (.1), or downsampler (.0.op)
              output_blocks.N   one per resnet (.0) with its transformer (.1); a level's last also has the upsampler
    VAE       encoder.down.I.block.J  decoder.up.I.block.J (I counts from the image, so backwards)  mid.{block_1,attn_1}
    CLIP      transformers' own names
    OpenCLIP  transformer.resblocks.I  positional_embedding  ln_final; q, k, v stacked in attn.in_proj_{weight,bias}

An LCM's w embedding is `time_embed.cond_proj.weight`. `single_file` knows the prefixes before these names.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.pretrained import hub, names
from lcm_jax.pretrained.names import Params, PutFn, Shape

_SD1_HEADS = 8  # at every width
_HEAD_CHANNELS = 64  # of SD 2.x and SDXL, at every width

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_RESBLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
      keys: torch keys of the parameters in it, stacked along axis 0: one, or q, k and v.
      shape: as written; a trailing 1x1 may be missing or added in what is read.
      transposed: whether it is [in out], unlike torch's linear layers, [out in].
    """

    keys: tuple[str, ...]
    shape: Shape
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a part is stored: key in the file, without its prefix -> Stored; `ignored` keys carry nothing for us."""

    tensors: Mapping[str, Stored]
    ignored: re.Pattern


def unet_layout(module: UNet2DConditionModel) -> Layout:
    """A UNet's keys after `model.diffusion_model.`."""
    modules = dict(UNET_ENDS)

    def resnet(old: str, new: str) -> None:
        modules.update({f"{old}.{a}": f"{new}.{b}" for a, b in RESNET.items()})

    layers, last = module.per_level("layers_per_block"), module.num_levels - 1
    n = 1
    for i, count in enumerate(layers):
        for j in range(count):
            resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < last:
            modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    for j in (0, 1):
        resnet(f"mid_block.resnets.{j}", f"middle_block.{2 * j}")
    modules["mid_block.attentions.0"] = "middle_block.1"
    n = 0
    for i, count in enumerate(layers[::-1]):
        for j in range(count + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n + j}.0")
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n + j}.1"
        n += count + 1
        after = 2 if module.up_depths(i) else 1
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{after}.conv"
    return _renamed(module, modules, "(?!)")


def vae_layout(module: AutoencoderKL) -> Layout:
    """A VAE's keys after `first_stage_model.`; its attention's matrices are stored as 1x1 convolutions."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(module.block_out_channels) - 1
    for half, way, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in (0, 1)}
        for i in range(last + 1):
            block = f"{half}.{way}.{i if half == 'encoder' else last - i}"
            modules[f"{half}.{way}_blocks.{i}.{sampler}rs.0.conv"] = f"{block}.{sampler}.conv"
            for j in range(module.layers_per_block + 1):
                resnets[f"{half}.{way}_blocks.{i}.resnets.{j}"] = f"{block}.block.{j}"
        modules |= resnets | {f"{old}.conv_shortcut": f"{new}.nin_shortcut" for old, new in resnets.items()}
        for old, new in _VAE_ATTENTION.items():
            modules[f"{half}.mid_block.attentions.0.{old}"] = f"{half}.mid.attn_1.{new}"
    layout = _renamed(module, modules, r"loss\..*|model_ema\..*")
    for key, stored in layout.tensors.items():
        if ".attn_1." in key and len(stored.shape) == 2:
            layout.tensors[key] = dataclasses.replace(stored, shape=(*stored.shape, 1, 1))
    return layout


def clip_layout(module: CLIPTextModel) -> Layout:
    """CLIP's keys after `...transformer.`: `text_model...`."""
    table = names.torch_table(module)
    tensors = {key: Stored((key,), parameter.torch_shape) for key, parameter in table.items()}
    return Layout(tensors, re.compile(r"(.*\.)?position_ids|logit_scale" + _unused_projection(module)))


def open_clip_layout(module: CLIPTextModel) -> Layout:
    """OpenCLIP's keys after `...model.`.

    SD 2.x reads the layer before the last: its module has 23 layers, and its files a 24th that nothing uses. It is not
    written: ComfyUI and A1111 read files without it (diffusers' own script does not write it either).
    """
    modules = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for i in range(module.num_hidden_layers):
        for old, new in _RESBLOCK.items():
            modules[f"text_model.encoder.layers.{i}.{old}"] = f"transformer.resblocks.{i}.{new}"
    tensors = {}
    for key, parameter in names.torch_table(module).items():
        shape, qkv = parameter.torch_shape, _QKV.fullmatch(key)
        if qkv:
            layer, leaf = qkv.groups()
            keys = tuple(f"text_model.encoder.layers.{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            tensors[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = Stored(keys, (3 * shape[0], *shape[1:]))
        elif key == "text_model.embeddings.position_embedding.weight":
            tensors["positional_embedding"] = Stored((key,), shape)
        elif key == "text_projection.weight":
            tensors["text_projection"] = Stored((key,), shape[::-1], transposed=True)
        else:
            tensors[_exchanged(key, modules)] = Stored((key,), shape)
    unused = "" if module.with_projection else rf"|transformer\.resblocks\.{module.num_hidden_layers}\..*"
    return Layout(
        tensors, re.compile("logit_scale|attn_mask|(.*\\.)?position_ids" + _unused_projection(module) + unused)
    )


def _unused_projection(module: CLIPTextModel) -> str:
    return "" if module.with_projection else r"|text_projection(\.weight)?"


def _renamed(module: nn.Module, modules: Mapping[str, str], ignored: str) -> Layout:
    table = names.torch_table(module)
    tensors = {_exchanged(key, modules): Stored((key,), parameter.torch_shape) for key, parameter in table.items()}
    return Layout(tensors, re.compile(ignored))


def _exchanged(key: str, modules: Mapping[str, str]) -> str:
    """`key` with its longest leading module in `modules` renamed; both sides name the rest alike."""
    parts = key.split(".")
    for n in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:n])
        if head in modules:
            return ".".join([modules[head], *parts[n:]])
    raise LcmError(f"{key} has no name in a single-file checkpoint; export a diffusers folder")


def check_part(layout: Layout, prefix: str, shapes: Mapping[str, Shape], what: str) -> None:
    """Checks that the keys of a file that begin with `prefix` are those of a part.

    Raises:
      LcmError: tensors missing, left over or of a wrong shape, listed with the file's names.
    """
    wanted = {key: stored.shape for key, stored in layout.tensors.items()}
    found = {key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}
    found = {key: shape for key, shape in found.items() if key in wanted or not layout.ignored.fullmatch(key)}
    if problems := names.differences(wanted, found, names.same_but_for_1x1):
        raise LcmError(
            f"{what} does not fit its config: under {prefix} {problems}; give {hub.ARGUMENTS['config']}, the diffusers "
            "folder of the file's model"
        )


def read_part(
    module: nn.Module,
    layout: Layout,
    prefix: str,
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike | None,
    what: str,
    put: PutFn | None = None,
    change: names.ChangeFn | None = None,
) -> Params:
    """The parameter tree of `module` from the keys that begin with `prefix`; see `names.read_params`.

    Raises:
      LcmError: tensors that are not floating point.
    """
    table, flat = names.torch_table(module), {}
    shapes = traverse_util.flatten_dict(names.param_shapes(module, dtype))
    for key, stored in layout.tensors.items():
        tensor = read(prefix + key)
        tensor = tensor.T if stored.transposed else tensor
        for name, piece in zip(stored.keys, np.split(tensor, len(stored.keys)), strict=True):
            path = table[name].path
            where = f"{what}: {prefix}{key}"
            flat[path] = names.read_leaf(piece, table[name], shapes[path].dtype, where, put, change)
    return traverse_util.unflatten_dict(flat)


def write_part(module: nn.Module, layout: Layout, params: Params, dtype: DTypeLike) -> Callable[[str], np.ndarray]:
    """Function of a key of the file, without its prefix: its tensor in `dtype`, contiguous, converted when called.

    Raises:
      LcmError: `params` is not the tree of `module`.
    """
    leaves = names.torch_leaves(module, params)

    def tensor(key: str) -> np.ndarray:
        stored = layout.tensors[key]
        pieces = [names.to_torch_layout(leaves[name][1], leaves[name][0], dtype) for name in stored.keys]
        value = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return np.ascontiguousarray(value.T if stored.transposed else value).reshape(stored.shape)

    return tensor


def unet_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The `config.json` of a UNet of the family (SD 1.x, 2.x, XL, and their pruned forms), inferred from its tensors.

    What tensors do not show is as published: 8 heads if projections are convolutions (SD 1.x), else 64 channels a
    head; 32 groups. `sample_size` is left out.

    shapes: key after `model.diffusion_model.` -> shape.

    Raises:
      UnsupportedConfig: blocks that no config of diffusers can describe.
    """
    levels, n = [[]], 1
    while (down := f"input_blocks.{n}.0.op.weight" in shapes) or f"input_blocks.{n}.0.out_layers.3.weight" in shapes:
        levels.append([]) if down else levels[-1].append(f"input_blocks.{n}")
        n += 1
    n, ups = 0, []
    for blocks in levels[::-1]:
        ups.append([f"output_blocks.{n + j}" for j in range(len(blocks) + 1)])
        n += len(blocks) + 1
    widths = [shapes[f"{blocks[0]}.0.out_layers.3.weight"][0] for blocks in levels]
    down_depths = [[_depth(block, shapes) for block in blocks] for blocks in levels]
    up_depths = [[_depth(block, shapes) for block in blocks] for blocks in ups]
    mid = _depth("middle_block", shapes)
    depths = [_level_depth(entry) for entry in down_depths]
    if not any(down_depths[-1]):
        depths[-1] = mid or 1  # the last level has no transformers: its entry is the middle's
    elif mid not in (0, down_depths[-1][0]):
        raise UnsupportedConfig("transformer blocks in the middle", mid, f"{down_depths[-1][0]}, as in the last level")
    proj_in = next(shape for key, shape in shapes.items() if key.endswith("1.proj_in.weight"))
    context = next(shape for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight"))[1]
    linear = len(proj_in) == 2
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _uniform([len(blocks) for blocks in levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if any(entry) else "DownBlock2D" for entry in down_depths],
        "up_block_types": ["CrossAttnUpBlock2D" if any(entry) else "UpBlock2D" for entry in up_depths],
        "mid_block_type": _mid_type(mid, shapes),
        "transformer_layers_per_block": _uniform(depths),
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": [_heads(width) for width in widths] if linear else _SD1_HEADS,
    }
    plain = [
        [depth] * len(entry) if any(entry) else [0] * len(entry)
        for depth, entry in zip(depths[::-1], up_depths, strict=True)
        if not isinstance(depth, list)
    ]
    if plain != up_depths:
        config["reverse_transformer_layers_per_block"] = [_level_depth(entry) for entry in up_depths]
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config | file_fields(shapes)


def file_fields(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of a UNet's config that its tensors decide, whatever a config of the family says."""
    cond = shapes.get("time_embed.cond_proj.weight")
    return {"in_channels": shapes["input_blocks.0.0.weight"][1], "time_cond_proj_dim": cond and cond[1]}


def _depth(block: str, shapes: Mapping[str, Shape]) -> int:
    """Number of transformer blocks beside a resnet."""
    depth = 0
    while f"{block}.1.transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


def _heads(width: int) -> int:
    if width % _HEAD_CHANNELS:
        known = f"multiples of {_HEAD_CHANNELS}; for other widths give {hub.ARGUMENTS['config']}"
        raise UnsupportedConfig("attention_head_dim at width", width, known)
    return width // _HEAD_CHANNELS


def _level_depth(entry: list[int]) -> int | list[int]:
    if any(entry) and not all(entry):
        raise UnsupportedConfig("transformer blocks of one level", entry, "attention after every resnet or after none")
    return _uniform(entry) or 1  # a level without attention ignores its entry


def _uniform(values: list) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _mid_type(depth: int, shapes: Mapping[str, Shape]) -> str | None:
    if depth:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if "middle_block.0.in_layers.0.weight" in shapes else None
