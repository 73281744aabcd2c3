"""The README.md of an exported model: what it is, how it was made, how to generate images with it."""

import json
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

import lcm_jax
from lcm_jax.distill import OBJECTIVES
from lcm_jax.models import unet
from lcm_jax.pretrained import Pipeline, hub
from lcm_jax.pretrained.lora_files import FILE_NAME
from lcm_jax.pretrained.save import family_of, scheduler_class
from lcm_jax.run import clients

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
{base_model}tags:
- latent-consistency-model
- text-to-image
- lcm_jax
{lora_tag}---

# {name}

{summary}

|  |  |
|---|---|
| {role} | `{origin}` ({prediction_type} prediction) |
| Method | {method} |
| End of a step | {step_end} |
{adapters}| Weights | {network} after step {step:,} of {total_steps:,} |
| Batch | {batch_size} images of {resolution} pixels a step (data: `{source}`) |
{guided}| Solver | {solver} on a grid of {solver_steps} points; sample with {in_steps} |
| {map} |
| Made with | lcm_jax {version} |

{measurements}## Use

{advice}

{diffusers}With lcm_jax:

```bash
python -m lcm_jax.sample {flags} --prompt="..." --steps={steps} --guidance_scale={scale:g} --out=images
```

{elsewhere}## Configuration

| key | value |
|---|---|
{config}
"""
_SUMMARY = (
    "{kind}: images in {in_steps}, {made}. {guidance}, so a step is one pass.",
    "{kind} for `{base}`, {made}: with it that model, and others fine-tuned from the same one, generate images in "
    "{in_steps}. It can be combined with other LoRAs.",
)  # of a model; of a LoRA
_KIND = {  # is phased -> of a model, of a LoRA: what it is, and in how many steps it samples
    False: (("A Latent Consistency Model", "1 to 8 steps"), ("An LCM-LoRA", "2 to 8 steps")),
    True: (
        ("A Phased Consistency Model", "{steps}, no fewer"),
        ("A LoRA of a Phased Consistency Model", "{steps}, no fewer"),
    ),
}
_MAPS = {
    False: "Boundary | timestep_scaling {timestep_scaling:g}, sigma_data {sigma_data:g}",
    True: "Map | phased ([Wang et al. 2024](https://arxiv.org/abs/2405.18407)): each step jumps to the edge of one of "
    "{phases} phases, which are the timesteps of {phases} steps",
}
_ADAPTERS = """\
| Adapters | LoRA of rank {rank}, alpha {alpha:g} ([Luo et al. 2023](https://arxiv.org/abs/2311.05556)) |
"""
_ADVICE = (
    "Use `guidance_scale` 1: a step is one pass. Between 1 and 2 there is a second pass, with a negative prompt; above "
    "2 images come out oversaturated.",
    "`guidance_scale` outside {low:g} to {high:g} was never trained. A negative prompt has no effect.",
)  # without w embedding; with one
_DIFFUSERS = """\
With diffusers:

```python
CODE
image = pipe("...", num_inference_steps={steps}, guidance_scale={scale:g}).images[0]
```

"""
_PIPELINE = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")"""
_SINGLE_FILE = """\
from diffusers import {scheduler}, {plain}

pipe = {plain}.from_single_file("{name}"{file_config})
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {constants}, {noise})"""
_LORA = """\
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{shown_base}")
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {constants})
pipe.load_lora_weights("{name}", weight_name="{lora_file}")"""
_LORA_OF_FILE = """\
from diffusers import {scheduler}, {plain}

pipe = {plain}.from_single_file("file of the teacher"{file_config})
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {constants}, {noise})
pipe.load_lora_weights("{name}", weight_name="{lora_file}")"""
_UNET = """\
from diffusers import {scheduler}, {pipeline}, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{name}")
scheduler = {scheduler}.from_pretrained("{shown_base}", subfolder="scheduler", {constants})
pipe = {pipeline}.from_pretrained("{shown_base}", unet=unet, scheduler=scheduler)"""
_UNET_XL = """\
import torch
from diffusers import AutoencoderKL, {scheduler}, StableDiffusionXLPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{name}", torch_dtype=torch.float16)
vae = AutoencoderKL.from_pretrained("{vae}", torch_dtype=torch.float16)
scheduler = {scheduler}.from_pretrained("{shown_base}", subfolder="scheduler", {constants})
pipe = StableDiffusionXLPipeline.from_pretrained(
    "{shown_base}", unet=unet, vae=vae, scheduler=scheduler, torch_dtype=torch.float16
)"""
# Format -> (flags of lcm_jax.sample, code with diffusers, what it is for other programs).
_KINDS = {
    "pipeline": ("--model={name}", _PIPELINE, clients.FOLDER),
    "merged": ("--model={name}", _PIPELINE, clients.FOLDER),
    "unet": ("--model={base} --unet={name}", _UNET, None),
    "unet of SDXL": ("--model={base} --unet={name} --vae={vae}", _UNET_XL, None),
    "lora-kohya": ("--model={base} --lora={name}", _LORA, clients.KOHYA),
    "lora-peft": ("--model={base} --lora={name}", _LORA, clients.PEFT),
    "single-file": ("--model={name}", _SINGLE_FILE, clients.FILE),
    "single-file with w embedding": ("--model={name}", "", clients.FILE),
}
_VAE_FOR_HALF = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's own overflows in float16
_SOLVERS = {"ddim": "DDIM", "dpm_solver": "DPM-Solver", "dpm_solver_pp": "DPM-Solver++"}
_NETWORKS = {"ema": "the EMA target network", "online": "the online student network"}


def model_card(
    config: Mapping[str, Any], record: Mapping[str, Any], student: Pipeline, name: str, kind: str, table: str | None
) -> str:
    """Markdown, with the hub's front matter.

    Args:
      config: of the run, nested.
      record: of the export, `lcm_config.json`.
      student: what was exported.
      name: title of the model, and its folder or file in the examples.
      kind: the format of the export.
      table: measurements in Markdown, or None.
    """
    objective, has_w, is_lora = OBJECTIVES[record["objective"]], bool(record["w_embedding_dim"]), "lora-" in kind
    role, origin, made = "Teacher", record["teacher"], "distilled"
    if objective.needs_lcm:
        role, origin, made = "Fine-tuned", record["student"], "fine-tuned"
    # The model that a LoRA, or the pipeline that a UNet, is for.
    base = record["student"] if "lora" in record else record["teacher"] or record["student"]
    repository, is_file = hub.repository(base), hub.is_single_file(base)
    plain = "StableDiffusionXLPipeline" if student.is_xl else "StableDiffusionPipeline"
    if kind == "unet" and student.is_xl:
        kind = "unet of SDXL"
    elif kind == "single-file" and has_w:
        kind = "single-file with w embedding"
    flags, code, used_as = _KINDS[kind]
    code = _LORA_OF_FILE if is_lora and is_file else code
    phases = record.get("phases", 0)
    steps = phases or 4
    noise = student.schedule
    elsewhere = used_as and clients.recipe(export_of(used_as, student, record), name.removesuffix(".safetensors"))
    weight, low, high = config["distill"]["lcd_weight"], record.get("w_min", 0) + 1, record.get("w_max", 0) + 1
    blanks = {
        **record,
        "name": name,
        "base": base,
        # A path of ours means nothing to others.
        "shown_base": repository if repository and not is_file else "folder of the teacher",
        "plain": plain,
        "file_config": file_config(student) if "from_single_file" in code else "",
        "pipeline": "LatentConsistencyModelPipeline" if has_w and not phases else plain,
        "constants": f"original_inference_steps={record['solver_steps']}, "
        f"timestep_scaling={record['timestep_scaling']:g}",
        "noise": f'prediction_type="{noise.prediction_type}"'
        + (", rescale_betas_zero_snr=True" if noise.alphas_cumprod[-1] == 0 else ""),
        "vae": _VAE_FOR_HALF,
        "lora_file": FILE_NAME,
        "scale": student.default_guidance_scale(),
        "scheduler": scheduler_class(student),
        "steps": steps,
        "kind": _KIND[bool(phases)][is_lora][0],
        "in_steps": _KIND[bool(phases)][is_lora][1].format(steps=f"{steps} step{'s' * (steps > 1)}"),
        "made": f"{made} from `{origin}`",
        "guidance": "The guidance scale is an input of the network" if has_w else "Guidance is distilled in",
        "low": low,
        "high": high,
    }
    guided = ""
    if "w_min" in record:
        guided = f"| Guidance | w in [{low - 1:g}, {high - 1:g}], that is `guidance_scale` {low:g} to {high:g}"
        guided += "" if has_w else ", distilled in"
        guided += f"; `guidance_scale` {record['guidance_scale']:g} folded in" if "guidance_scale" in record else ""
        guided += " |\n"
    values = {key: json.dumps(value).replace("|", "\\|") for key, value in flatten_dict(config, sep=".").items()}
    blanks |= {
        **{key: config["data"][key] for key in ("batch_size", "resolution", "source")},
        "base_model": f"base_model: {repository}\n" if repository else "",
        "lora_tag": "- lora\n" if is_lora else "",
        "summary": _SUMMARY[is_lora].format_map(blanks),
        "role": role,
        "origin": origin,
        "method": objective.title + (f", with {weight:g} times the LCD loss" if weight else ""),
        "step_end": objective.step_end,
        "adapters": _ADAPTERS.format_map(record["lora"]) if "lora" in record else "",
        "network": _NETWORKS[record["weights"]],
        "total_steps": config["train"]["steps"],
        "guided": guided,
        "map": _MAPS[bool(phases)].format_map(record),
        "solver": _SOLVERS[config["distill"]["solver"]],
        "version": lcm_jax.__version__,
        "measurements": "" if table is None else f"## Measurements\n\n{table.strip()}\n\n",
        "advice": _ADVICE[has_w].format_map(blanks),
        "diffusers": (code and _DIFFUSERS.replace("CODE", code)).format_map(blanks),
        "flags": flags.format_map(blanks),
        "elsewhere": f"Elsewhere:\n\n{elsewhere}\n\n" if elsewhere else "",
        "config": "\n".join(f"| `{key}` | `{value}` |" for key, value in sorted(values.items())),
    }
    return _CARD.format_map(blanks)


def file_config(student: Pipeline) -> str:
    """What diffusers' from_single_file needs beside the file: for SD 2.x its own configs are gone from the hub."""
    family = family_of(student)
    if family.name != "sd2":
        return ""
    return f', config="{family.tokenizers}{"" if student.schedule.prediction_type == "v_prediction" else "-base"}"'


def export_of(kind: str, student: Pipeline, record: Mapping[str, Any]) -> clients.Export:
    """What other programs need to know of it; kind: of clients.KINDS."""
    family = family_of(student) if kind == clients.FILE else None
    # The refiner's own UNet is not among the configs that come with the package.
    has_published = family is not None and family.name != "sdxl-refiner"
    constants = tuple(record[key] for key in ("solver_steps", "timestep_scaling", "sigma_data"))
    which = clients.PHASED if record.get("phases") else clients.LCM
    return clients.Export(
        kind,
        student.schedule.prediction_type,
        family=family.name if family else "",
        zero_snr=student.schedule.alphas_cumprod[-1] == 0,
        pruned=has_published and _layers(student.unet) != _layers(unet.from_config(family.config("unet"))),
        has_w=bool(record["w_embedding_dim"]),
        constants=constants,
        map=which,
    )


def _layers(module: unet.UNet2DConditionModel) -> tuple:
    """Which layers it has, whatever their widths."""
    levels = range(module.num_levels)
    attention = [(module.down_depths(i), module.up_depths(i)) for i in levels]
    return module.per_level("layers_per_block"), attention, module.mid_block_type, module.mid_depth()
