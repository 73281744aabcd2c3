"""A whole model folder as one small record: modules, parameters, tokenizers, noise schedule.

    FOLDER/model_index.json  scheduler/  tokenizer[_2]/  text_encoder[_2]/  unet/  vae/

What a config leaves out has diffusers' defaults; what does not fit (tensors, widths, classes) is refused. Safety
checkers, feature extractors and Flax weights in the folder are not looked at.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lcm_jax import assets, files
from lcm_jax.diffusion import schedule
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip, unet, vae
from lcm_jax.pretrained import hub, names, tokenizer, weight_files
from lcm_jax.pretrained.model import PARTS, RECORD, SCHEDULER, Config, Pipeline, check_fit, parts_read

Dtype = Any

_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": _TEXT_ENCODERS,
    "text_encoder_2": _TEXT_ENCODERS,
}


def load_folder(
    source: str | Path,
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    place: names.Place | None = None,
    weights: bool | Collection[str] = True,
) -> Pipeline:
    """Load a diffusers folder; see `load.load_pipeline`."""
    read = parts_read(weights)
    wanted = {"text_encoder", "text_encoder_2"} | {p for p, other in (("unet", unet), ("vae", vae)) if other is None}
    folder = _folder(source, _pipeline_patterns(wanted, read, variant), bool(read))
    index = _model_index(folder, str(source))
    encoders = _encoder_slots(folder, index)
    configs = {"model_index": index, "scheduler": scheduler_config(folder, index)}
    noise = schedule.from_config(configs["scheduler"])
    for one in (folder, unet or folder):
        check_noise(one, noise, str(source), bool(read))

    modules: dict[str, Any] = dict.fromkeys(PARTS)
    tokenizers: dict[str, Any] = dict.fromkeys(("tokenizer", "tokenizer_2"))
    sources: dict[str, tuple[Path, str, str | None]] = {}
    for part, other in (("unet", unet), ("vae", vae)):
        own = folder / part if other is None else _part_folder(other, part, variant, part in read)
        configs[part] = _config(own, part)
        modules[part] = _module(part, configs[part], dtype)
        sources[part] = own, weight_files.DIFFUSERS_NAME, variant
    for part, (own, kind) in encoders.items():
        configs[part] = _config(own, part) | ({"architectures": [kind]} if kind else {})
        modules[part] = _module(part, configs[part], dtype)
        sources[part] = own, weight_files.TRANSFORMERS_NAME, variant
        slot = own.name.replace("text_encoder", "tokenizer")
        length = modules[part].max_position_embeddings
        if read:
            tokenizers[part.replace("text_encoder", "tokenizer")] = tokenizer.load_tokenizer(folder / slot, length)
    check_fit(modules)
    for part in (part for part in sources if part in read):  # all there, before minutes go into reading the first
        weight_files.weight_files(*sources[part])
    params = {
        part: _params(modules[part], *sources[part], param_dtype, place)
        if part in read
        else _shapes(modules[part], param_dtype)
        for part in sources
    }
    return Pipeline(
        **modules, **tokenizers, params=params, schedule=noise, configs=configs, source=str(folder.resolve())
    )


def load_part(
    part: str,
    source: str | Path,
    variant: str | None,
    dtype: Dtype,
    param_dtype: Dtype,
    place: names.Place | None,
    weights: bool,
):
    folder = _part_folder(source, part, variant, weights)
    module = _module(part, _config(folder, part), dtype)
    if not weights:
        return module, _shapes(module, param_dtype)
    return module, _params(module, folder, weight_files.DIFFUSERS_NAME, variant, param_dtype, place)


def _folder(source: str | Path, patterns: Sequence[str], weights: bool) -> Path:
    """The local folder of `source`. Where only configs are wanted and the hub cannot be asked: the package's own."""
    patterns = [pattern for pattern in patterns if weights or ".safetensors" not in pattern]
    try:
        return hub.local_folder(source, patterns)
    except LcmError:
        embedded = None if weights else assets.architecture(str(source))
        if embedded is None:
            raise
        return embedded


def _shapes(module: nn.Module, dtype: Dtype) -> names.Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), names.abstract_params(module))


def _part_folder(source: str | Path, part: str, variant: str | None, weights: bool = True) -> Path:
    """Folder of one part: SOURCE/part where that is, else SOURCE itself."""
    patterns = ["config.json", "model_index.json", RECORD, f"{part}/config.json"]
    tensors = weight_files.download_patterns(weight_files.DIFFUSERS_NAME, variant)
    patterns += [prefix + pattern for prefix in ("", f"{part}/") for pattern in tensors]
    folder = _folder(source, patterns, weights)
    inside = folder / part
    if (inside / "config.json").is_file() or (folder / "model_index.json").is_file():
        return inside
    return folder


def _pipeline_patterns(parts: set[str], read: set[str], variant: str | None) -> list[str]:
    """Globs of what `parts` of a pipeline need: configs, and the weights of those that are `read`."""
    patterns = ["model_index.json", RECORD, SCHEDULER]
    patterns += [f"{slot}/{name}" for slot in ("tokenizer", "tokenizer_2") for name in ("*.json", "*.txt")]
    for part in sorted(parts):
        name = weight_files.TRANSFORMERS_NAME if part.startswith("text_encoder") else weight_files.DIFFUSERS_NAME
        tensors = weight_files.download_patterns(name, variant) if part in read else []
        patterns += [f"{part}/{file}" for file in ("config.json", *tensors)]
    return patterns


def _model_index(folder: Path, source: str) -> Config:
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            raise LcmError(f"{source} holds a single model, no pipeline (no model_index.json); give its whole pipeline")
        raise LcmError(f"{source} is no diffusers folder (no model_index.json); give the folder that holds that file")
    index = files.read_json(folder / "model_index.json")
    if "unet" not in index:
        kind = index.get("_class_name")
        raise LcmError(f"{source} is a {kind} without a unet; a model of the Stable Diffusion family is needed")
    return index


def _entry_class(index: Config, part: str) -> str | None:
    """Class name that model_index gives a part (without "Flax"); None: the part is declared absent."""
    entry = index.get(part)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
        return None
    return entry[1].removeprefix("Flax")


def _encoder_slots(folder: Path, index: Config) -> dict[str, tuple[Path, str | None]]:
    """Part -> (folder, class). A refiner's only encoder becomes "text_encoder_2" wherever its folder puts it."""
    found = {}
    for part in ("text_encoder", "text_encoder_2"):
        kind = _entry_class(index, part)
        if kind is not None:
            if kind not in _TEXT_ENCODERS:
                raise UnsupportedConfig(f"{part} in model_index.json", kind, _TEXT_ENCODERS)
            found[part] = folder / part, kind
    if not found:
        raise LcmError(f"{folder} has no text encoder (text_encoder, text_encoder_2 in model_index.json); add one")
    if list(found) == ["text_encoder"] and found["text_encoder"][1] == "CLIPTextModelWithProjection":
        return {"text_encoder_2": found["text_encoder"]}
    return found


def _config(folder: Path, part: str) -> Config:
    config = files.read_json(folder / "config.json")
    kind = config.get("_class_name")
    if isinstance(kind, str) and kind.removeprefix("Flax") not in _CLASSES[part]:
        raise UnsupportedConfig(f"_class_name of {folder / 'config.json'}", kind, _CLASSES[part])
    return config


def _module(part: str, config: Config, dtype: Dtype) -> nn.Module:
    return _FROM_CONFIG[part](config, dtype=dtype)


_FROM_CONFIG: dict[str, Callable[..., nn.Module]] = {
    "unet": unet.from_config,
    "vae": vae.from_config,
    "text_encoder": clip.from_config,
    "text_encoder_2": clip.from_config,
}


def _params(
    module: nn.Module, folder: Path, name: str, variant: str | None, dtype: Dtype, place: names.Place | None
) -> names.Params:
    with weight_files.open_weights(folder, name, variant) as weights:
        return names.read_params(module, weights.shapes, weights.read, jnp.dtype(dtype), str(weights.source), place)


def scheduler_config(folder: Path, index: Config) -> Config:
    """The scheduler's config, with the class that model_index.json gives it where it names none itself.

    Raises:
      UnsupportedConfig: either class is none that `schedule.from_config` takes.
      LcmError: the file is missing or no noise schedule, or diffusers, which goes by model_index.json, reads another.
    """
    config, kind = files.read_json(folder / SCHEDULER), _entry_class(index, "scheduler")
    config = {"_class_name": kind, **config} if kind else config
    try:
        noise = schedule.from_config(config)
        theirs = schedule.from_config(config | {"_class_name": kind}) if kind else noise
    except UnsupportedConfig as error:
        raise UnsupportedConfig(error.field, error.value, f"{error.supported} (scheduler of {folder})") from None
    except LcmError as error:
        raise LcmError(f"{folder / SCHEDULER}: {error}") from None
    if not theirs.same_as(noise):
        raise LcmError(
            f"{folder / SCHEDULER} names {config['_class_name']} and leaves betas out, but model_index.json names "
            f"{kind}, which has others; write the betas that the model was trained with into it"
        )
    return config


def check_noise(source: str | Path, noise: NoiseSchedule, model: str, weights: bool = True) -> None:
    """Refuse a UNet from `source` if the scheduler or the record there says that it was trained on other noise.

    Args:
      source: folder or hub id.
      noise: what the UNet would be used with, of `model`.
      weights: False: where the hub cannot be asked, the package's own configs.
    """
    folder = _folder(source, ["model_index.json", SCHEDULER, RECORD], weights)
    above = folder.absolute().parent
    for place in (folder, above) if (above / "model_index.json").is_file() else (folder,):
        index, record = (
            files.read_json(place / name) if (place / name).is_file() else {} for name in ("model_index.json", RECORD)
        )
        said = []
        if (place / SCHEDULER).is_file():
            theirs = schedule.from_config(scheduler_config(place, index))
            said = [] if theirs.same_as(noise) else [f"{SCHEDULER} says {theirs}"]
        if record.get("prediction_type", noise.prediction_type) != noise.prediction_type:
            said.append(f"{RECORD} says {record['prediction_type']}")
        if said:
            raise LcmError(
                f"{place}: {' and '.join(said)}, but {model} is used with {noise}; take the UNet and the rest from one "
                "model, or correct what is wrong"
            )
