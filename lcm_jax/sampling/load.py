"""A model to generate images with: a pipeline from anywhere, with LoRAs merged and parts exchanged."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from lcm_jax import assets, files
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.models import int8
from lcm_jax.pretrained import digests, hub, is_single_file, load_pipeline, lora_files, read_record
from lcm_jax.pretrained.embeddings import read_embeddings
from lcm_jax.pretrained.model import Pipeline, PipelineParams, check_generates, recorded
from lcm_jax.pretrained.safetensors_io import SUFFIX
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import default_device, make_mesh, place
from lcm_jax.sampling import offload as offload_lib
from lcm_jax.sampling.generator import Generator

# In which records must agree.
CONSTANTS = ("solver_steps", "timestep_scaling", "sigma_data", "phases", "prediction_type")

WEIGHTS = ("int8",)
DTYPES = ("float32", "bfloat16", "float16")

Lora = tuple[str, float]  # file, folder or hub id; weight


def load(
    source: str | Path,
    *,
    loras: str | Path | Sequence[str | Path | Lora] = (),
    embeddings: str | Path | Sequence[str | Path] = (),
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    model_config: str | Path | None = None,
    dtype: Any = "auto",
    mesh: Mesh | None = None,
    tiled: bool = False,
    sliced: bool = False,
    weights: str | None = None,
    offload: str | None = None,
    ignore_unused: bool = False,
) -> Generator:
    """The model of a folder, file or hub id, on its devices, to be called for images.

    Args:
      source: a diffusers folder, a hub id, a single .safetensors file, or "shapes", the embedded teacher.
      loras: merged in, one or several: "FILE", "FILE:WEIGHT" or (file, weight); files, folders or hub ids.
      embeddings: textual inversions, one or several: "FILE" or "NAME=FILE" (`pretrained.embeddings`); prompts use them
        by name.
      unet, vae: folders or hub ids of a UNet or a VAE to use instead; of the VAE also a file (see `load_pipeline`).
      variant: weight files to read, such as "fp16".
      model_config: for a single file: folder or hub id with its tokenizers and configs.
      dtype: that the networks compute in, and hold their weights in (`layers.dtypes_in_use`): "float32", "bfloat16",
        "float16", or "auto": `kernels.auto_dtype`.
      mesh: of the devices that share the work (`runtime.mesh.make_mesh`); None: the default device.
      tiled: decode large images in tiles: less memory, faint seams.
      sliced: decode images one at a time, on a mesh one on each device: less memory.
      weights: "int8": kernels of UNet, text encoders and ControlNets in 8 bits, LoRAs merged before (`models.int8`):
        less memory, and other images; None: in `dtype`.
      offload: weights that wait in host memory, "text" or "all" (`sampling.offload`): less memory, the same images.
      ignore_unused: ignore keys of a LoRA that match no layer of the model, instead of refusing it.

    Raises:
      LcmError: the model cannot be loaded, or a LoRA or an embedding does not fit it.
    """
    source = str(source)
    if mesh is None:  # with a mesh the networks have the attention that suits device and size
        mesh = make_mesh(devices=[default_device()])
    platform = mesh.devices.flat[0].platform
    if weights not in (None, *WEIGHTS):
        raise BadArgument("weights", weights, f"choose {', '.join(WEIGHTS)}, or leave it out")
    offload_lib.check(offload)
    if offload and platform == "cpu":
        logging.warning("offload=%s saves nothing here: a CPU's memory is the host's", offload)
    if isinstance(dtype, str) and dtype == "auto":
        dtype = kernels.auto_dtype(platform)
    dtype = _dtype(dtype)
    if model_config is not None and not is_single_file(source):
        raise BadArgument(
            "model_config", model_config, f"is for a single .safetensors file, which {source} is not; remove it"
        )
    pairs = pairs_of(loras)
    others = {"unet": unet, "vae": vae}
    digests.warn(assets.resolve(source), [part for part, other in others.items() if other])
    for other in [*filter(None, others.values()), *(lora for lora, _ in pairs)]:
        digests.warn(other)
    read = functools.partial(
        load_pipeline,
        assets.resolve(source),
        variant,
        dtype,
        None,
        unet=unet,
        vae=vae,
        config=model_config and assets.resolve(model_config),
    )
    name = source if unet is None else f"{source} with the UNet of {unet}"
    described, shapes = read(weights=False)
    check_generates(described, name)  # before minutes of reading
    words = [embeddings] if isinstance(embeddings, str | Path) else embeddings
    words = read_embeddings(described, list(map(str, words)))
    found, record = _read_loras(described, pairs, ignore_unused)
    changes = lora_files.changes(described, shapes, found)

    def changed(part: str, path: tuple[str, ...], value: np.ndarray) -> Any:
        change = changes.get(part, {}).get(path)
        value = value if change is None else value + change()
        return int8.change(path, value) if weights == "int8" and part != "vae" else value

    put = functools.partial(offload_lib.to_host, mesh) if offload else place(mesh)
    pipeline, params = read(put=put, change=changed if pairs or weights else None)
    if unet is not None or pairs:
        pipeline = dataclasses.replace(pipeline, record=record, may_be_lcm=True)
    named = {lora_name(lora): weight for lora, weight in pairs}
    return Generator(pipeline, params, mesh, tiled, words, named, offload, sliced)


def _dtype(given: Any) -> jnp.dtype:
    """A dtype, or its name. Raises BadArgument unless networks can compute in it."""
    try:
        found = jnp.dtype(given)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise BadArgument("dtype", given, f"choose one of auto, {', '.join(DTYPES)}")
    return found


def add_loras(
    pipeline: Pipeline, params: PipelineParams, loras: Sequence[Lora], ignore_unused: bool = False
) -> tuple[Pipeline, PipelineParams]:
    """The model with LoRAs merged; its record joins those of the model and the LoRAs.

    A LoRA without a record leaves the model's as it is: 50 solver steps and timestep scaling 10, those of the published
    LCM-LoRAs, unless the model records others.

    Raises:
      LcmError: a file that cannot be used (`lora_files.read_lora`), or records that contradict each other.
    """
    read, record = _read_loras(pipeline, loras, ignore_unused)
    merged = lora_files.merge_into(pipeline, params, read)
    return dataclasses.replace(pipeline, record=record, may_be_lcm=True), merged


def _read_loras(
    pipeline: Pipeline, loras: Sequence[Lora], ignore_unused: bool
) -> tuple[list[tuple[lora_files.LoraFile, float]], dict[str, Any]]:
    """(LoRAs with their weights, the record that joins those of the model and the LoRAs); see `add_loras`."""
    modules = lora_files.modules_of(pipeline)
    read = [(lora_files.read_lora(source, modules, ignore_unused), weight) for source, weight in loras]
    # A folder may hold the file alone, without the lcm_config.json beside it: its header has the same.
    of_loras = {source: read_record(source) or read_record(lora_files.locate(source)) for source, _ in loras}
    own = {**pipeline.record, "prediction_type": pipeline.schedule.prediction_type}
    for source, record in of_loras.items():
        try:
            recorded(record)
        except LcmError as error:
            raise BadArgument("lora", source, str(error)) from None
    for key in CONSTANTS:
        values = {name: record[key] for name, record in {"the model": own, **of_loras}.items() if key in record}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} for {name}" for name, value in values.items())
            problem = f"{key} is {listed}; they cannot go together, use LoRAs made for this model"
            raise BadArgument("lora", ", ".join(of_loras), problem)
    joined = {key: value for record in (pipeline.record, *of_loras.values()) for key, value in record.items()}
    return read, joined


def lora_name(source: str | Path) -> str:
    """What prompts call the LoRA of a file, folder or hub id: <lora:NAME:WEIGHT>."""
    return Path(source).name.removesuffix(SUFFIX)


def pairs_of(loras: str | Path | Sequence[str | Path | Lora]) -> list[Lora]:
    """(file, weight) of LoRAs as `load` takes them. Raises BadArgument for what is none, and as `parse_lora`."""
    found: list[Lora] = []
    for one in [loras] if isinstance(loras, str | Path) else loras:
        match one:
            case str() | Path():
                found.append(parse_lora(str(one)))
            case (str() | Path() as source, numbers.Real() as weight):
                found.append((str(source), _finite(source, float(weight))))
            case _:
                raise BadArgument("loras", one, 'is no LoRA; give "FILE", "FILE:WEIGHT" or (file, weight)')
    return found


def _finite(lora: str | Path, weight: float) -> float:
    """The weight of a LoRA. Raises BadArgument if it is not finite."""
    if not math.isfinite(weight):
        raise BadArgument("lora", lora, f"weight {weight} is not finite; 1 is the LoRA as it was trained")
    return weight


def parse_lora(text: str) -> Lora:
    """`FILE[:weight]`: what follows the last colon is a weight if it is a number, else part of the name; default 1.0.

    Raises:
      BadArgument: no file by that name and no name or address on the hub, or a weight that is not finite.
    """
    source, colon, last = text.rpartition(":")
    try:
        weight = float(last) if colon else 1.0
    except ValueError:
        colon, weight = "", 1.0
    source = source if colon else text
    _finite(text, weight)
    name, found, _ = source.rpartition(":")
    if found and files.expanded(name).exists() and not files.expanded(source).exists():
        raise BadArgument("lora", text, f"{text[len(name) + 1 :]!r} is no weight; write {name}:0.8")
    if not files.expanded(source).exists() and hub.repository(source) is None:
        raise BadArgument("lora", text, f"{source} does not exist; give a .safetensors file, a folder, or owner/name")
    return source, weight
