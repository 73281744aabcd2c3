"""LoRA files: read in every format that circulates for the Stable Diffusion family, written as kohya's or peft's.

    lora = read_lora("pytorch_lora_weights.safetensors", modules_of(pipeline))
    params = merge_into(pipeline, params, [(lora, 0.8), (lcm_lora, 1.0)])

merged: W + sum_i weight_i * (alpha/rank)_i * B_i A_i

`lora_keys` knows how files name layers. Torch's factors are A [r i], B [o r] of a linear layer and A [r i kh kw],
B [o r 1 1] of a convolution; here they have the layout of `models.lora`. A layer's alpha is its `.alpha` tensor, or
is in the header under `lora_adapter_metadata`, or in peft's adapter_config.json; without any of these it is the rank.
What a file adds to weights without factors (norms, biases, whole matrices) is added with the LoRA's weight.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike

from lcm_jax import files, foreign
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained import hub, lora_keys, names, noise_marks, safetensors_io
from lcm_jax.pretrained.model import Pipeline, PipelineParams

FILE_NAME = "pytorch_lora_weights.safetensors"
FORMATS = ("kohya", "peft")
_DOWN = ("lora_down.weight", "lora_A.weight")
_ROUNDING = 2**-8  # of an alpha in half precision
_LARGEST = float(np.finfo(np.float32).max)
_QUANTIFIER, _QUANTIFIED_GROUP = re.compile(r"[*+{]|(?<!\()\?"), re.compile(r"\)[*+?{]")
_TRAINER_FILE, _TRAINER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """One layer's adapter: lora_A [.. i r] and lora_B [.. r o], float32, in the layout of `models.lora`.

    alpha: None if the file does not give it; the scale is then 1.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-1]

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True, eq=False)
class LoraFile:
    """Content of one file.

    Attributes:
      parts: part ("unet", "text_encoder", "text_encoder_2") -> layer's path -> Factors.
      deltas: part -> parameter's path -> what is added to it at weight 1, float32, in the tree's layout.
      marks: of the noise that its base was trained on.
    """

    parts: Mapping[str, Mapping[names.Path, Factors]]
    deltas: Mapping[str, Mapping[names.Path, np.ndarray]] = dataclasses.field(default_factory=dict)
    marks: noise_marks.Marks | None = None

    def tree(self, part: str) -> dict[str, Any]:
        """The part's adapter tree (see `models.lora`), without its scales."""
        flat = {}
        for path, factors in self.parts[part].items():
            flat[(*path, "lora_A")], flat[(*path, "lora_B")] = factors.lora_A, factors.lora_B
        return traverse_util.unflatten_dict(flat)

    def scales(self, part: str, weight: float = 1.0) -> dict[names.Path, float]:
        """Layer's path -> weight * alpha / rank."""
        return {path: weight * factors.scale for path, factors in self.parts[part].items()}


def modules_of(pipeline: Pipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that a LoRA may adapt."""
    return {part: module for part, module in pipeline.parts.items() if part != "vae"}


def read_lora(source: str | Path, modules: Mapping[str, nn.Module], ignore_unused: bool = False) -> LoraFile:
    """Reads a LoRA file for a model.

    Args:
      source: a .safetensors file, a folder or a hub repository `owner/name` that holds one (`owner/name/FILE` if it
        holds several).
      modules: the model's parts (`modules_of`); the layers' names and shapes are checked against them.
      ignore_unused: ignore the tensors that belong to no layer of `modules`; their number is logged.

    Embeddings that are bundled with a LoRA are left out, with a warning.

    Raises:
      LcmError: file missing, damaged, pickled, or not a LoRA; of another kind (LoHa, LoKr, DoRA); made for another
        architecture; keys of no layer, a factor without its partner, an alpha that is missing though required, or a
        number that is not finite.
    """
    path = locate(source)
    with safetensors_io.open_file(path) as weights:
        marks = _marks(weights)
        shapes = {key: shape for key, shape in weights.shapes.items() if key not in noise_marks.KEYS}
        found = lora_keys.match(str(path), shapes, modules, ignore_unused)
        alphas = _alphas(path, found, weights)
        parts: dict[str, dict[names.Path, Factors]] = collections.defaultdict(dict)
        deltas: dict[str, dict[names.Path, np.ndarray]] = collections.defaultdict(dict)
        for layer, keys in found.items():
            scale = 1.0
            if "lora_A" in keys:
                factors = Factors(*_factors(weights, layer, keys), alphas[layer])
                scale = factors.scale
                if layer.weight.path[-1] == "kernel":
                    parts[layer.part][layer.weight.path[:-1]] = factors
                else:  # an embedding, [rows features] on both sides
                    deltas[layer.part][layer.weight.path] = scale * (factors.lora_A @ factors.lora_B).T
            for role in keys.keys() - set(lora_keys.OF_PRODUCT):
                parameter, changed = layer.parameter(role), deltas[layer.part]
                value = _read(weights, keys[role], parameter) * (scale if role == "lora_bias" else 1)
                changed[parameter.path] = changed.get(parameter.path, 0) + value
    found_in = (("layers", parts), ("parameters without factors", deltas))
    counts = [f"{len(changed)} {what} of {part}" for what, of in found_in for part, changed in of.items()]
    logging.info("%s: %s", path, ", ".join(counts))
    return LoraFile(dict(parts), dict(deltas), marks)


def merge_into(pipeline: Pipeline, params: PipelineParams, loras: Sequence[tuple[LoraFile, float]]) -> PipelineParams:
    """The weights W + sum_i weight_i * scale_i * B_i A_i of every adapted layer; `params` are not changed.

    See `changes`, which warns and raises.
    """
    found = changes(pipeline, params, loras)
    return {**params, **{part: lora.add_changes(params[part], of_part) for part, of_part in found.items()}}


def changes(
    pipeline: Pipeline, params: PipelineParams, loras: Sequence[tuple[LoraFile, float]]
) -> dict[str, lora.Changes]:
    """Part -> `lora.changes` of all LoRAs together, for the parts that they adapt; params: arrays or shapes.

    A LoRA that is marked for other noise than the pipeline's is merged with a warning.

    Raises:
      LcmError: a weight that is not finite, or a LoRA for a part that the pipeline does not have. The functions: if
        what is to be added is not finite.
    """
    found, noise = {}, pipeline.schedule
    for one, weight in loras:
        if not math.isfinite(weight):
            raise LcmError(f"LoRA weight {weight} is not finite; 1 is the LoRA as it was trained")
        if one.marks is not None and not one.marks.agree_with(noise):
            # Not an error: such LoRAs are in use, and the noise stays the model's.
            logging.warning("%s is marked %s, but the model is used with %s", one.marks.source, one.marks.text, noise)
    for part in sorted({part for one, _ in loras for part in (*one.parts, *one.deltas)}):
        if part not in params:
            raise LcmError(f"the LoRA adapts a {part}, which this model does not have; use the model it was made for")
        adapters = [(one.tree(part), one.scales(part, weight)) for one, weight in loras if part in one.parts]
        deltas = [(one.deltas[part], weight) for one, weight in loras if part in one.deltas]
        of_part = lora.changes(params[part], adapters, deltas)
        found[part] = {path: functools.partial(_finite_change, part, path, change) for path, change in of_part.items()}
    return found


def _finite_change(part: str, path: names.Path, change: Callable[[], Any]) -> Any:
    """What is added to a leaf. Raises LcmError if no float32 can hold it, though factors, scales and weights are."""
    with np.errstate(over="ignore", invalid="ignore"):
        value = change()
    if not np.isfinite(value).all():
        raise LcmError(
            f"the LoRAs add what is not finite to {'/'.join(path)} of {part}; use smaller weights, or other files"
        )
    return value


def write_lora(
    path: str | Path,
    tree: Mapping[str, Any],
    unet: UNet2DConditionModel,
    *,
    alpha: float,
    rank: int,
    format: str = "kohya",
    dtype: DTypeLike = np.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the adapters of a UNet to one file, which appears under its name when it is complete.

    Args:
      path: NAME.safetensors, which must not exist.
      tree: adapter tree of `unet`, every layer of rank `rank`.
      alpha: the trained alpha, for all layers; the scale is alpha / rank.
      format: "kohya" (names with underscores, an `.alpha` per layer, for diffusers, ComfyUI and A1111: diffusers' names
        as in the published LCM-LoRAs, of SDXL the original UNet's as in sd-scripts, see `lora_keys.kohya_names`) or
        "peft" (what diffusers saves: alpha in the header; ComfyUI reads a part of it, A1111 none).
      dtype: of all tensors, kohya's alphas included: float16, bfloat16 or float32.
      metadata: more text entries for the header.

    Returns:
      `path`.

    Raises:
      LcmError: the file exists, too little disk space, unknown format or dtype, adapters that do not fit `unet`, are
        not of that rank, or are not finite in `dtype`.
    """
    entries, header = _entries(tree, unet, format), dict(metadata or {})
    if not (math.isfinite(alpha) and alpha > 0):
        raise LcmError(f"LoRA alpha {alpha} must be positive; alpha = rank is a scale of 1")
    if not entries:
        raise LcmError("there are no adapters to write")
    for key, (parameter, _) in entries.items():
        if key.endswith(_DOWN) and parameter.shape[-1] != rank:
            raise LcmError(f"{key} is of rank {parameter.shape[-1]}, not {rank}; give the rank that was trained")
    if format == "peft":
        by_path = {kernel.path[:-1]: name for name, kernel in lora_keys.layers(unet).items()}
        layers = sorted(by_path[path] for path in lora.by_layer(tree))
        config = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": layers}
        header["lora_adapter_metadata"] = json.dumps(config, indent=2, sort_keys=True)

    def tensor(key: str) -> np.ndarray:
        parameter, leaf = entries[key]
        value = np.float64(alpha) if leaf is None else leaf
        return names.to_torch_layout(value, parameter, dtype).reshape(parameter.torch_shape)

    shapes = {key: parameter.torch_shape for key, (parameter, _) in entries.items()}
    return safetensors_io.save_file(Path(path), shapes, tensor, dtype, header)


def file_shapes(tree: Mapping[str, Any], unet: UNet2DConditionModel, format: str = "kohya") -> dict[str, names.Shape]:
    """Key -> shape of every tensor in the file that `write_lora` writes; `tree` may hold only shapes."""
    return {key: parameter.torch_shape for key, (parameter, _) in _entries(tree, unet, format).items()}


def locate(source: str | Path) -> Path:
    """The local file of a LoRA, fetched if it is on the hub; arguments and errors are those of `read_lora`."""
    if hub.is_single_file(source) or files.expanded(source).is_file():
        path = hub.local_file(source)
        if path.suffix not in (safetensors_io.SUFFIX, *safetensors_io.PICKLED):
            safetensors_io.check_kind(path)
            raise LcmError(f"{path} is not a .safetensors file; give one, or rename it if it is one")
        if path.name == _TRAINER_FILE:
            hub.fetch_beside(source, _TRAINER_CONFIG)
        return path
    folder = hub.local_folder(source, [FILE_NAME, _TRAINER_FILE, _TRAINER_CONFIG])
    for name in (FILE_NAME, _TRAINER_FILE):
        if (folder / name).is_file():
            return folder / name
    present = sorted(path for path in folder.glob("*") if path.suffix == safetensors_io.SUFFIX)
    pickled = sorted(path for path in folder.glob("*") if path.suffix in safetensors_io.PICKLED)
    if len(present) > 1:
        raise LcmError(f"{folder} holds {names.some([path.name for path in present])}; name one of them")
    if present or pickled:
        return [*present, *pickled][0]  # opening a pickled one is refused, with the way out
    raise LcmError(f"{folder} holds no LoRA file ({FILE_NAME}); name the file")


def _marks(weights: safetensors_io.Weights) -> noise_marks.Marks | None:
    try:
        return noise_marks.read(weights.source, weights.shapes, weights.metadata)
    except LcmError as error:  # the model decides which noise is used
        logging.warning("%s", error)
        return None


def _factors(
    weights: safetensors_io.Weights, layer: lora_keys.Layer, keys: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """A layer's lora_A and lora_B; those of an embedding [rows features] as of a linear layer from features to rows.

    With a third factor between them (LyCORIS' Tucker form), lora_A is 1x1: the two together are a lora_A.
    """
    out, fan, *window = layer.weight.torch_shape
    rank, ones = weights.shapes[keys["lora_A"]][0], [1 for _ in window]

    def read(role: str, *shape: int) -> np.ndarray:
        return _read(weights, keys[role], names.Parameter(("kernel",), shape))

    b = read("lora_B", *ones, rank, out)
    if lora_keys.MID not in keys:
        return read("lora_A", *window, fan, rank), b
    return read("lora_A", *ones, fan, rank) @ read(lora_keys.MID, *window, rank, rank), b


def _read(weights: safetensors_io.Weights, key: str, parameter: names.Parameter) -> np.ndarray:
    """A tensor in the tree's layout, float32 and finite."""
    with np.errstate(over="ignore"):  # what became infinite is refused
        value = names.read_leaf(weights.read(key), parameter, np.float32, f"{weights.source}: {key}")
    if not np.isfinite(value).all():
        raise LcmError(f"{weights.source}: {key} has values that are not finite; the file is broken, use another")
    return value


def _finite(value: Any, what: str) -> float:
    """A number of a file that multiplies weights. Raises LcmError if it is none, or no float32 can hold it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= _LARGEST:
        raise LcmError(f"{what} is {str(value)[:40]}, not a finite number; the file is broken, use another")
    return float(value)


def _alphas(
    path: Path, found: lora_keys.Matched, weights: safetensors_io.Weights
) -> dict[lora_keys.Layer, float | None]:
    """The alpha of each layer with factors; None if the file does not give it."""
    found = {layer: keys for layer, keys in found.items() if "lora_A" in keys}
    in_file = {}
    for layer, keys in found.items():
        if "alpha" in keys:
            alpha = weights.read(keys["alpha"]).reshape(())
            value = float(alpha) if jnp.issubdtype(alpha.dtype, jnp.floating) else alpha.item()
            in_file[layer] = _finite(value, f"{path}: {keys['alpha']}")
    configs = _adapter_configs(path, weights.metadata)
    trained = weights.metadata.get("ss_network_alpha", "None")
    if trained != "None" and configs is None and len(in_file) < len(found):
        lacking = sorted(f"{layer.part}.{layer.name}" for layer in found.keys() - in_file.keys())
        raise LcmError(
            f"{path} was trained with alpha {' '.join(trained.split())[:40]} (ss_network_alpha) but {len(lacking)} "
            f"layers have no .alpha ({names.some(lacking)}); use the file as it was trained"
        )
    alphas: dict[lora_keys.Layer, float | None] = {layer: in_file.get(layer) for layer in found}
    if configs is not None:
        alpha_of = {part: _config_alpha(path, part, configs) for part in {layer.part for layer in found}}
        for layer, keys in found.items():
            alphas[layer] = alpha = alpha_of[layer.part](layer.name, weights.shapes[keys["lora_A"]][0])
            if not math.isclose(in_file.get(layer, alpha), alpha, rel_tol=_ROUNDING):
                raise LcmError(
                    f"{path}: alpha of {layer.part}.{layer.name} is {in_file[layer]} in its tensor and {alpha} in the "
                    "metadata; remove the wrong one"
                )
    if zero := [f"{layer.part}.{layer.name}" for layer, alpha in alphas.items() if alpha == 0]:
        logging.warning(
            "%s: alpha is 0 for %d layers (%s), which it leaves as they are", path, len(zero), names.some(zero)
        )
    return alphas


def _adapter_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Part -> peft's config of its adapter; None if neither the file nor its folder holds one."""
    if "lora_adapter_metadata" in metadata:
        where = f"{path}: its lora_adapter_metadata"
        entries = foreign.json_object(metadata["lora_adapter_metadata"], where, "save it again")
    elif path.name == _TRAINER_FILE:
        entries = foreign.read_json(path.with_name(_TRAINER_CONFIG))
    else:
        return None
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        part, dot, field = key.partition(".")
        if not dot:  # one model's adapter, saved by itself
            part, field = "", key
        configs.setdefault(part, {})[field] = value
    return configs


def _config_alpha(path: Path, part: str, configs: Mapping[str, Mapping[str, Any]]) -> Callable[[str, int], float]:
    """Function of a layer's name and rank: its alpha in peft's config of its part."""
    config = configs.get(part, configs.get("", {}))
    for name in ("use_dora", "use_rslora"):
        if not isinstance(config.get(name) or False, bool):
            raise LcmError(f"{path}: {name} of {part} is {str(config[name])[:40]}, not true or false; save it again")
    if config.get("use_dora"):
        raise LcmError(f"{path} is a DoRA (use_dora), which is not supported; use a plain LoRA, or convert it to one")
    given, default = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    if not isinstance(given, Mapping):
        raise LcmError(f"{path}: alpha_pattern of {part} is {str(given)[:40]}, not an object; save it again")
    patterns = []
    for pattern, value in given.items():
        shown = f"alpha_pattern {pattern[:40]!r}"
        if _QUANTIFIED_GROUP.search(pattern) or len(_QUANTIFIER.findall(pattern)) > 3 or pattern.count("(") > 3:
            raise LcmError(f"{path}: {shown} could take for ever to match; write the layers' names instead")
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise LcmError(f"{path}: {shown} is not a pattern ({foreign.one_line(error)}); save it again") from None
        patterns.append((compiled, _finite(value, f"{path}: {shown}")))
    default = None if default is None else _finite(default, f"{path}: lora_alpha of {part}")

    def alpha(name: str, rank: int) -> float:
        found = next((value for pattern, value in patterns if pattern.match(name)), default)
        if found is None:
            raise LcmError(
                f"{path}: its metadata gives no lora_alpha for {part}, so the strength is unknown; "
                "save it again with the adapter's config of every part"
            )
        factor = rank**0.5 if config.get("use_rslora") else 1.0  # rank-stabilised: alpha / sqrt(rank)
        return _finite(found * factor, f"{path}: alpha of {part}.{name}")

    return alpha


def _entries(
    tree: Mapping[str, Any], unet: UNet2DConditionModel, format: str
) -> dict[str, tuple[names.Parameter, Any]]:
    """Key -> (its layout, leaf of `tree`; None for an alpha), sorted as safetensors sorts.

    Raises:
      LcmError: unknown format; an adapter that fits no layer of `unet`, or whose layer has no name in the format.
    """
    if format not in FORMATS:
        raise LcmError(f"unknown LoRA format {format!r}; choose one of {', '.join(FORMATS)}")
    by_path = {kernel.path[:-1]: (name, kernel) for name, kernel in lora_keys.layers(unet).items()}
    kohya_names, found = lora_keys.kohya_names(unet), {}
    for path, factors in lora.by_layer(tree).items():
        if path not in by_path:
            raise LcmError(f"the adapter {'/'.join(path)} fits no layer of this UNet; use the UNet it was made for")
        name, kernel = by_path[path]
        if format == "kohya" and name not in kohya_names:
            raise LcmError(f"diffusers cannot read kohya's name of {name}; write format='peft', or do not adapt it")
        a, b = (names.Parameter((*path, "kernel"), tuple(factors[role].shape)) for role in ("lora_A", "lora_B"))
        rank = a.shape[-1]
        wanted = (*kernel.shape[:-1], rank), (*(1 for _ in kernel.shape[2:]), rank, kernel.shape[-1])
        if (a.shape, b.shape) != wanted:
            raise LcmError(f"adapter {name}: shapes {list(a.shape)}, {list(b.shape)} on a kernel {list(kernel.shape)}")
        if format == "peft":
            found[f"unet.{name}.lora_A.weight"] = a, factors["lora_A"]
            found[f"unet.{name}.lora_B.weight"] = b, factors["lora_B"]
        else:
            stem = lora_keys.underscored(kohya_names[name])
            found[f"{stem}.lora_down.weight"] = a, factors["lora_A"]
            found[f"{stem}.lora_up.weight"] = b, factors["lora_B"]
            found[f"{stem}.alpha"] = names.Parameter((*path, "alpha"), ()), None
    return dict(sorted(found.items()))
