"""Diffusers folders of whole models, read; `save` writes them.

    FOLDER/model_index.json  scheduler/  tokenizer[_2]/  text_encoder[_2]/  unet/  vae/

What a config leaves out has diffusers' defaults; what does not fit (tensors, widths, classes) is refused. Safety
checkers, feature extractors and Flax weights are ignored.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax import assets, files, foreign
from lcm_jax.diffusion import schedule
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models.config import class_name
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.pretrained import digests, hub, names, safetensors_io, taesd_file
from lcm_jax.pretrained import single_file_spellings as spellings
from lcm_jax.pretrained.model import (
    PARTS,
    RECORD,
    SCHEDULER,
    TEXT_ENCODERS,
    TOKENIZER_OF,
    TOKENIZER_PATTERNS,
    Config,
    Pipeline,
    PipelineParams,
    check_fit,
    make_module,
    parts_read,
)
from lcm_jax.pretrained.names import Params, PartChangeFn, PutFn
from lcm_jax.pretrained.tokenizer import load_tokenizer
from lcm_jax.typed import checked, config_of

_ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL", "AutoencoderTiny")}
_XL_FACTOR = 0.13025  # scaling_factor of SDXL's VAE


def load_folder(
    source: str | Path,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    put: PutFn | None = None,
    change: PartChangeFn | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """(pipeline, params) of a diffusers folder; see `load.load_pipeline`."""
    read, others = parts_read(weights), {part: other for part, other in (("unet", unet), ("vae", vae)) if other}
    folder = _local(source, _pipeline_patterns(read - others.keys(), variant), bool(read))
    with config_of(folder):
        index = _model_index(folder, source, others)
        encoders = _encoders(folder, index)
    configs = {"model_index": index, "scheduler": scheduler_config(folder, index)}
    noise = schedule.from_config(configs["scheduler"])
    for origin in filter(None, (folder, unet)):
        check_noise(origin, noise, str(source), bool(read))

    folders = {}
    for part in ("unet", "vae"):
        own = folder / part
        folders[part] = part_folder(others[part], part, variant, part in read) if part in others else own
        if part not in others and not (own / "config.json").exists():
            missing = f"{own / 'config.json'} is missing; the folder is incomplete"
            raise LcmError(f"{missing}: copy or download it again, or give another {part} with {hub.ARGUMENTS[part]}")
        configs[part] = _config(folders[part], part, functools.partial(foreign.read_optional, own / "config.json"))
    for part, (name, kind) in encoders.items():
        folders[part] = folder / name
        configs[part] = _config(folders[part], part) | {"architectures": [kind]}
    modules = dict.fromkeys(PARTS)
    modules |= {part: make_module(part, configs[part], dtype, path / "config.json") for part, path in folders.items()}
    check_parts(modules, source, others)
    if "vae" in others and "vae" in read:
        with contextlib.suppress(LcmError):  # the model's own need not be there
            warn_of_scale(modules["vae"], foreign.read_json(folder / "vae" / "config.json"), source, others["vae"])
    tokenizers = dict.fromkeys(TOKENIZER_OF.values())
    for part, (name, _) in encoders.items() if read else ():
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        tokenizers[TOKENIZER_OF[part]] = load_tokenizer(tokenizer, modules[part])
    # All are found before minutes go into reading the first.
    origins = {part: (others.get(part, source), path) for part, path in folders.items() if part in read}
    variants = find_variants(origins, variant, or_without=len(origins) < len(folders))
    record = folder_record(unet or folder, bool(read))
    with config_of(folder):
        pipeline = Pipeline(**modules, **tokenizers, schedule=noise, configs=configs, record=record)
    params = {
        part: _params(part, modules[part], path, variants[part], param_dtype, put, change)
        if part in read
        else names.param_shapes(modules[part], param_dtype)
        for part, path in folders.items()
    }
    return pipeline, params


def load_parts(
    sources: Mapping[str, str | Path],
    variant: str | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None,
    put: PutFn | None,
    read: Collection[str],
    or_without: bool = False,
    change: PartChangeFn | None = None,
    own_vae: Callable[[], Config] | None = None,
) -> dict[str, tuple[nn.Module, Params]]:
    """Part -> (module, params), each from a source of its own; see `load.load_unet`.

    read: parts to read weights of. own_vae: the config for the file of a VAE, which holds none.
    """
    folders = {part: part_folder(source, part, variant, part in read) for part, source in sources.items()}
    modules = {
        part: make_module(part, _config(folder, part, own_vae), dtype, folder / "config.json")
        for part, folder in folders.items()
    }
    origins = {part: (source, folders[part]) for part, source in sources.items() if part in read}
    variants = find_variants(origins, variant, or_without or len(origins) < len(sources))
    return {
        part: (
            module,
            _params(part, module, folders[part], variants[part], param_dtype, put, change)
            if part in read
            else names.param_shapes(module, param_dtype),
        )
        for part, module in modules.items()
    }


def find_variants(
    origins: Mapping[str, tuple[str | Path, Path]], variant: str | None, or_without: bool = False
) -> dict[str, str | None]:
    """Part -> the variant of its weights to read: `variant`, or None if only other parts have it, as in diffusers.

    origins: part -> (folder or hub id, local folder of the part). A file has no variant.
    or_without: None, too, if none of them has it, as when a part that is not read may have it.

    Raises:
      LcmError: no part has the variant, or a part has no weights to read.
    """
    singles = [part for part, (_, path) in origins.items() if path.is_file()]
    origins = {part: origin for part, origin in origins.items() if part not in singles}
    having = {p for p, (_, path) in origins.items() if safetensors_io.has_weights(path, weights_name(p), variant)}
    found = dict.fromkeys(singles)
    for part, (source, path) in origins.items():
        name = weights_name(part)
        found[part] = variant if part in having or not (having or or_without) else None
        if found[part] != variant:
            logging.info("%s of %s has no variant %s: its weights without a variant are read", part, source, variant)
            plain = safetensors_io.download_patterns(name, None)  # from the hub, only the variant was fetched
            _local(source, [prefix + pattern for prefix in ("", f"{path.name}/") for pattern in plain], weights=True)
        safetensors_io.find_weights(path, name, found[part])
    return found


def check_parts(modules: Mapping[str, Any], source: str | Path, others: Mapping[str, str | Path]) -> None:
    """`check_fit`, with errors that name the model and where its `others` are from."""
    try:
        check_fit(modules)
    except LcmError as error:
        taken = "".join(f" with the {part} of {other}" for part, other in others.items())
        raise LcmError(f"{source}{taken}: {error}") from None


def warn_of_scale(vae: nn.Module, own: Config, source: str | Path, other: str | Path) -> None:
    """Warns if the `vae` of `other` takes latents of another scale than that of `source`, of the config `own`."""
    if class_name(own, "AutoencoderKL") != "AutoencoderKL":
        return  # a tiny one takes them as the UNet does
    factor = own.get("scaling_factor", AutoencoderKL.scaling_factor)
    if not isinstance(vae, AutoencoderKL) or hub.is_single_file(other):
        if taesd_file.is_xl(other) not in (None, factor == _XL_FACTOR):
            logging.warning("%s is, by its name, for another family than %s: if so, colours are wrong", other, source)
    elif vae.scaling_factor != factor:
        logging.warning(
            "the VAE of %s has scaling_factor %s, that of %s %s: if it is for another family, images will be wrong; if "
            "not, correct its config.json",
            other,
            vae.scaling_factor,
            source,
            factor,
        )


def folder_record(source: str | Path, weights: bool = True) -> Config:
    """Content of the `lcm_config.json` of a folder or hub repository; {} if it has none.

    A part's folder, as EXPORT/unet, has that of its pipeline.

    weights: False: if the hub cannot be asked, the package's own configs are used.
    """
    return digests.without(_first_of(_local(source, [RECORD], weights), RECORD))


def folder_scheduler(source: str | Path, weights: bool = True) -> Config:
    """The same for scheduler_config.json; {} of a single file."""
    return {} if hub.is_single_file(source) else _first_of(_local(source, [SCHEDULER], weights), SCHEDULER)


def _first_of(folder: Path, name: str) -> Config:
    """Content of the JSON file `name` in the first of `_roots` that has it; {} if none has."""
    return next(filter(None, (foreign.read_optional(root / name) for root in _roots(folder))), {})


def _roots(folder: Path) -> tuple[Path, ...]:
    """`folder`; of a part, as EXPORT/unet, then its pipeline's: what stands there is of this part, too."""
    above = folder.absolute().parent
    is_part = (folder / "config.json").is_file() and (above / "model_index.json").is_file()
    return (folder, above) if is_part else (folder,)


def scheduler_config(folder: Path, index: Config) -> Config:
    """The scheduler's config; if it names no class, with that of model_index.json.

    Raises:
      UnsupportedConfig: one of the two classes is unknown to `schedule.from_config`.
      LcmError: the file is missing or not a noise schedule, or diffusers, which goes by model_index.json, would read
        another one.
    """
    config, kind = foreign.read_json(folder / SCHEDULER), _class_in_index(index, "scheduler")
    config = {"_class_name": kind, **config} if kind else config
    try:
        with config_of(f"scheduler of {folder}"):
            noise = schedule.from_config(config)
            theirs = schedule.from_config(config | {"_class_name": kind}) if kind else noise
    except UnsupportedConfig:
        raise
    except LcmError as error:
        raise LcmError(f"{folder / SCHEDULER}: {error}") from None
    if theirs != noise:
        raise LcmError(
            f"{folder / SCHEDULER} names {config['_class_name']} and leaves betas out, but model_index.json names "
            f"{kind}, whose defaults differ; write the betas that the model was trained with into it"
        )
    return config


def check_noise(source: str | Path, noise: NoiseSchedule, model: str, weights: bool = True) -> None:
    """Refuses a UNet from `source` if the scheduler or the record there says that it was trained on other noise.

    Args:
      source: folder or hub id, of a pipeline or of its `unet/`.
      noise: that the UNet would be used with, of the model named `model`.
      weights: False: if the hub cannot be asked, the package's own configs are used.

    Raises:
      LcmError: it was trained on other noise.
    """
    folder = _local(source, ["model_index.json", SCHEDULER, RECORD], weights, "unet")
    for root in _roots(folder):
        index, record = (foreign.read_optional(root / name) for name in ("model_index.json", RECORD))
        found = []
        if (root / SCHEDULER).is_file():
            theirs = schedule.from_config(scheduler_config(root, index))
            found = [] if theirs == noise else [f"{SCHEDULER} says {theirs}"]
        if record.get("prediction_type", noise.prediction_type) != noise.prediction_type:
            found.append(f"{RECORD} says {record['prediction_type']}")
        if found:
            raise LcmError(
                f"{root}: {' and '.join(found)}, but {model} is used with {noise}; take the UNet and the rest from "
                "one model, or correct the wrong file"
            )


def _local(source: str | Path, patterns: Sequence[str], weights: bool, part: str | None = None) -> Path:
    """The local folder of `source`. If only configs are needed and the hub cannot be asked: the package's own."""
    try:
        return hub.local_folder(source, patterns, part)
    except LcmError:
        embedded = None if weights else assets.architecture(str(source))
        if embedded is None:
            raise
        return embedded


def part_folder(source: str | Path, part: str, variant: str | None, weights: bool) -> Path:
    """Folder of one part: SOURCE/part if there is one, else SOURCE itself; or the file of a VAE."""
    if part == "vae" and hub.is_single_file(source):
        file = hub.local_file(source)
        # A file of the hub is read as it is, whether or not the config beside it was fetched before.
        is_of_folder = safetensors_io.is_of_folder(files.expanded(source))
        if taesd_file.is_taesd(file) or (spellings.is_vae(file) and not is_of_folder):
            return file
        source = file
    tensors = safetensors_io.download_patterns(weights_name(part), variant) if weights else []
    patterns = [prefix + pattern for prefix in ("", f"{part}/") for pattern in ("config.json", *tensors)]
    folder = _local(source, ["model_index.json", RECORD, *patterns], weights, part)
    inside = folder / part
    if (inside / "config.json").is_file() or (folder / "model_index.json").is_file():
        return inside
    return folder


def _pipeline_patterns(read: Collection[str], variant: str | None) -> list[str]:
    """Globs of what a pipeline needs: configs, also of parts that are replaced, and the weights of those to `read`."""
    patterns = ["model_index.json", "config.json", RECORD, SCHEDULER]  # config.json: of what is no pipeline
    patterns += TOKENIZER_PATTERNS
    for part in PARTS:
        tensors = safetensors_io.download_patterns(weights_name(part), variant) if part in read else []
        patterns += [f"{part}/{file}" for file in ("config.json", *tensors)]
    return patterns


def weights_name(part: str) -> str:
    """NAME of the part's weight files (`safetensors_io`)."""
    return safetensors_io.TRANSFORMERS_NAME if part in TEXT_ENCODERS else safetensors_io.DIFFUSERS_NAME


def _model_index(folder: Path, source: str | Path, replaced: Collection[str]) -> Config:
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            is_unet = class_name(foreign.read_json(folder / "config.json"), "") in _CLASSES["unet"]
            beside = f", or this UNet with {hub.ARGUMENTS['unet']} beside a whole model" if is_unet else ""
            problem = "holds a single model without model_index.json; give the folder of its pipeline"
            raise LcmError(f"{source} {problem}{beside}")
        # In the hub's cache the model itself is further in.
        snapshots = sorted(str(path.parent) for path in folder.glob("snapshots/*/model_index.json"))
        inside = f"{' or '.join(snapshots[:3])}, " if snapshots else ""
        alone = names.some([path.name for path in folder.glob(f"*{safetensors_io.SUFFIX}")])
        alone = f", or one of its files ({alone})" if alone else ""
        if name := hub.repository(str(source)):  # of which only what a diffusers folder needs was fetched
            alone = f", or one file of it, {name}/FILE{safetensors_io.SUFFIX}"
        raise LcmError(
            f"{source} has no model_index.json; give a diffusers folder, {inside}which holds that file{alone}"
        )
    index = foreign.read_json(folder / "model_index.json")
    if "unet" not in replaced and _class_in_index(index, "unet") is None:
        kind = index.get("_class_name")
        other = "" if "transformer" in index else f", or the UNet of one with {hub.ARGUMENTS['unet']}"
        raise LcmError(f"{source} is a {kind} without a unet; a model of the Stable Diffusion family is needed{other}")
    return index


def _class_in_index(index: Config, part: str) -> str | None:
    """Class name that model_index gives a part (without "Flax"); None: the part is declared absent."""
    entry = index.get(part)
    if entry is None or entry == [None, None]:
        return None
    library, kind = checked(f"{part} of model_index.json", entry, tuple[str | None, str | None])
    return kind and kind.removeprefix("Flax")


def _encoders(folder: Path, index: Config) -> dict[str, tuple[str, str]]:
    """Part -> (name of its folder, class). A refiner's only encoder is "text_encoder_2", whatever its folder's name."""
    found = {}
    for part in TEXT_ENCODERS:
        kind = _class_in_index(index, part)
        if kind is not None:
            if kind not in _ENCODER_CLASSES:
                raise UnsupportedConfig(f"{part} in model_index.json", kind, _ENCODER_CLASSES)
            found[part] = part, kind
    if not found:
        raise LcmError(
            f"{folder} is a {index.get('_class_name')} without a text encoder (text_encoder, text_encoder_2 in "
            "model_index.json); a text-to-image model of the Stable Diffusion family is needed"
        )
    if list(found) == ["text_encoder"] and found["text_encoder"][1] == "CLIPTextModelWithProjection":
        return {"text_encoder_2": found["text_encoder"]}
    return found


def _config(folder: Path, part: str, own: Callable[[], Config] | None = None) -> Config:
    """own: the config of the model's own part, which is also that of a VAE in a file."""
    if folder.is_file() and taesd_file.is_taesd(folder):
        return taesd_file.CONFIG
    if folder.is_file():
        config = own and own()
        if not config or class_name(config, "AutoencoderKL") != "AutoencoderKL":
            problem = "the model's own is an AutoencoderTiny" if config else "there is no model beside it"
            raise LcmError(f"{folder} holds a VAE without its config, and {problem}: {hub.as_folder(folder, part)}")
        return config
    config, supported = foreign.read_json(folder / "config.json"), _CLASSES.get(part, _ENCODER_CLASSES)
    kind = config.get("_class_name")
    if kind is not None and str(kind).removeprefix("Flax") not in supported:
        raise UnsupportedConfig(f"_class_name of {folder / 'config.json'}", kind, supported)
    return config


def _params(
    part: str,
    module: nn.Module,
    folder: Path,
    variant: str | None,
    dtype: DTypeLike | None,
    put: PutFn | None,
    change: PartChangeFn | None = None,
) -> Params:
    change = change and functools.partial(change, part)
    if folder.is_file() and isinstance(module, AutoencoderKL):
        opened = spellings.open_vae(folder, module)
    elif folder.is_file():
        opened = taesd_file.open_both(folder)
    else:
        opened = safetensors_io.open_weights(folder, weights_name(part), variant)
    with opened as weights:
        return names.read_params(module, weights.shapes, weights.read, dtype, str(weights.source), put, change)
