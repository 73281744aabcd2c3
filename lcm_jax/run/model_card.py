"""The README.md of an exported model: what it is, how it was made, how to draw with it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import lcm_jax
from lcm_jax.distill import OBJECTIVES
from lcm_jax.pretrained import Pipeline, lora_files

VAE_FOR_HALF = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's own overflows in float16

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SOLVERS = {"ddim": "DDIM", "dpm_solver": "DPM-Solver", "dpm_solver_pp": "DPM-Solver++"}
_LORA_REPORT = "[Luo et al. 2023](https://arxiv.org/abs/2311.05556)"


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
    has_w_embedding, is_lora = bool(record["w_embedding_dim"]), kind.startswith("lora-")
    scale = student.default_guidance_scale()
    lines = [*_front_matter(record, is_lora), f"# {name}", "", _what_it_is(record, kind), ""]
    lines += [*_rows(("", ""), _facts(config, record).items()), ""]
    if table is not None:
        lines += ["## Measurements", "", table.strip(), ""]
    lines += ["## Use", "", _how_to_guide(record), ""]
    if kind != "single-file" or not has_w_embedding:
        example = _diffusers_example(record, name, kind, student.is_xl, scale)
        lines += ["With diffusers:", "", "```python", *example, "```", ""]
    lines += ["With lcm_jax:", "", "```bash", _command(record, name, kind, student.is_xl, scale), "```", ""]
    lines += [*_elsewhere(record, name, kind), "## Configuration", ""]
    values = ((f"`{key}`", f"`{json.dumps(value)}`".replace("|", "\\|")) for key, value in _flat(config))
    lines += _rows(("key", "value"), values)
    return "\n".join(lines) + "\n"


def _what_it_is(record: Mapping[str, Any], kind: str) -> str:
    fine_tuned = OBJECTIVES[record["objective"]].needs_lcm
    made = f"fine-tuned from `{record['student']}`" if fine_tuned else f"distilled from `{record['teacher']}`"
    if kind.startswith("lora-"):
        return (
            f"An LCM-LoRA for `{_base(record)}`, {made}: with it that model, and others fine-tuned from the same one, "
            "draw in two to eight steps. It adds to other LoRAs."
        )
    guided = (
        "The guidance scale is an input of the network, so a step is one pass."
        if record["w_embedding_dim"]
        else "Guidance is distilled in, so a step is one pass."
    )
    return f"A Latent Consistency Model: pictures in one to eight steps, {made}. {guided}"


def _facts(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    weights = {"ema": "the EMA target network", "online": "the online student network"}[record["weights"]]
    objective = OBJECTIVES[record["objective"]]
    role, model = ("Fine-tuned", record["student"]) if objective.needs_lcm else ("Teacher", record["teacher"])
    weight = config["distill"]["lcd_weight"]
    mixed = f", with {weight:g} times the LCD loss" if weight else ""
    facts = {
        role: f"`{model}` ({record['prediction_type']} prediction)",
        "Method": objective.title + mixed,
        "End of a step": objective.step_end,
    }
    if "lora" in record:
        lora = record["lora"]
        facts["Adapters"] = f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g} ({_LORA_REPORT})"
    facts |= {
        "Weights": f"{weights} after step {record['step']:,} of {config['train']['steps']:,}",
        "Batch": f"{config['data']['batch_size']} images of {config['data']['resolution']} pixels a step "
        f"(data: `{config['data']['source']}`)",
    }
    if "w_min" in record:
        low, high = record["w_min"], record["w_max"]
        facts["Guidance"] = (
            f"w in [{low:g}, {high:g}], that is `guidance_scale` {low + 1:g} to {high + 1:g}"
            + ("" if record["w_embedding_dim"] else ", distilled in")
            + (f"; `guidance_scale` {record['guidance_scale']:g} folded in" if "guidance_scale" in record else "")
        )
    solver = _SOLVERS[config["distill"]["solver"]]
    return facts | {
        "Solver": f"{solver} on a grid of {record['solver_steps']} points; sample with 1 to 8 steps",
        "Boundary": f"timestep_scaling {record['timestep_scaling']:g}, sigma_data {record['sigma_data']:g}",
        "Made with": f"lcm_jax {lcm_jax.__version__}",
    }


def _how_to_guide(record: Mapping[str, Any]) -> str:
    if record["w_embedding_dim"]:
        low, high = record["w_min"] + 1.0, record["w_max"] + 1.0
        return f"`guidance_scale` outside {low:g} to {high:g} was never trained. A negative prompt has no effect."
    return (
        "Take `guidance_scale` 1: a step is one pass. Between 1 and 2 there is a second pass, with a negative prompt; "
        "above 2 pictures come out oversaturated."
    )


def _front_matter(record: Mapping[str, Any], is_lora: bool) -> list[str]:
    base = [f"base_model: {_base(record)}"] if _HUB_ID.fullmatch(_base(record)) else []
    words = ("latent-consistency-model", "text-to-image", "lcm_jax", *(("lora",) if is_lora else ()))
    tags = ["tags:", *(f"- {tag}" for tag in words)]
    return ["---", "library_name: diffusers", "pipeline_tag: text-to-image", *base, *tags, "---", ""]


def _base(record: Mapping[str, Any]) -> str:
    """The model that a LoRA, or the pipeline that a UNet, is for."""
    return record["student"] if "lora" in record else record["teacher"] or record["student"]


def _shown_base(record: Mapping[str, Any]) -> str:
    """The same in examples for others, to whom a folder here says nothing."""
    return _base(record) if _HUB_ID.fullmatch(_base(record)) else "folder of the teacher"


def _diffusers_example(record: Mapping[str, Any], name: str, kind: str, is_xl: bool, scale: float) -> list[str]:
    call = f'image = pipe("...", num_inference_steps=4, guidance_scale={scale:g}).images[0]'
    constants = f"original_inference_steps={record['solver_steps']}, timestep_scaling={record['timestep_scaling']:g}"
    scheduler = f"pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, {constants})"
    if kind in ("pipeline", "merged"):
        load = f'pipe = DiffusionPipeline.from_pretrained("{name}")'
        return ["from diffusers import DiffusionPipeline", "", load, call]
    plain = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    if kind == "single-file":
        load = f'pipe = {plain}.from_single_file("{name}")'
        return [f"from diffusers import LCMScheduler, {plain}", "", load, scheduler, call]
    if kind.startswith("lora-"):
        return [
            "from diffusers import DiffusionPipeline, LCMScheduler",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{_shown_base(record)}")',
            scheduler,
            f'pipe.load_lora_weights("{name}", weight_name="{lora_files.FILE_NAME}")',
            call,
        ]
    return _unet_example(record, name, is_xl, constants, call)


def _unet_example(record: Mapping[str, Any], name: str, is_xl: bool, constants: str, call: str) -> list[str]:
    """A bare UNet in the teacher's pipeline; SDXL's in half precision, with the VAE that bears it."""
    base = _shown_base(record)
    scheduler = f'scheduler = LCMScheduler.from_pretrained("{base}", subfolder="scheduler", {constants})'
    if is_xl:
        half = "torch_dtype=torch.float16"
        return [
            "import torch",
            "from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel",
            "",
            f'unet = UNet2DConditionModel.from_pretrained("{name}", {half})',
            f'vae = AutoencoderKL.from_pretrained("{VAE_FOR_HALF}", {half})',
            scheduler,
            "pipe = StableDiffusionXLPipeline.from_pretrained(",
            f'    "{base}", unet=unet, vae=vae, scheduler=scheduler, {half}',
            ")",
            call,
        ]
    pipeline = "LatentConsistencyModelPipeline" if record["w_embedding_dim"] else "StableDiffusionPipeline"
    return [
        f"from diffusers import LCMScheduler, {pipeline}, UNet2DConditionModel",
        "",
        f'unet = UNet2DConditionModel.from_pretrained("{name}")',
        scheduler,
        f'pipe = {pipeline}.from_pretrained("{base}", unet=unet, scheduler=scheduler)',
        call,
    ]


def _command(record: Mapping[str, Any], name: str, kind: str, is_xl: bool, scale: float) -> str:
    source = {
        "unet": f"--model={_base(record)} --unet={name}" + (f" --vae={VAE_FOR_HALF}" if is_xl else ""),
        "lora-kohya": f"--model={_base(record)} --lora={name}",
        "lora-peft": f"--model={_base(record)} --lora={name}",
    }.get(kind, f"--model={name}")
    return f'python -m lcm_jax.sample {source} --prompt="..." --steps=4 --guidance_scale={scale:g} --out=pictures'


def _elsewhere(record: Mapping[str, Any], name: str, kind: str) -> list[str]:
    """How the programs with a window use the file, as lines; none for folders, which they do not load."""
    how = "sampler `lcm` (ComfyUI: scheduler `sgm_uniform`), CFG 1 to 2, 4 to 8 steps"
    if kind == "lora-kohya":
        text = (
            f"ComfyUI: `{lora_files.FILE_NAME}`, as `{name}.safetensors`, into `models/loras`, strength 1. A1111: into "
            f"`models/Lora`, and `<lora:{name}:1>` in the prompt. Both: {how}."
        )
    elif kind == "lora-peft":
        text = "For ComfyUI and A1111 take `--format=lora-kohya`."
    elif kind == "single-file" and record["w_embedding_dim"]:
        text = (
            "ComfyUI, A1111 and diffusers' single-file loader do not know the w embedding: for them export again with "
            "`--guidance_scale`, which folds one scale in."
        )
    elif kind == "single-file":
        text = f"ComfyUI: into `models/checkpoints`. A1111: into `models/Stable-diffusion`. Both: {how}."
    else:
        return []
    return ["Elsewhere:", "", text, ""]


def _rows(head: tuple[str, str], rows: Any) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        if isinstance(tree[key], Mapping):
            yield from _flat(tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree[key]
