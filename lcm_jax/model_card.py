"""The README.md of an exported model: what it is, how it was made, how to draw with it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import lcm_jax
from lcm_jax.pretrained import Pipeline

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(
    config: Mapping[str, Any], record: Mapping[str, Any], student: Pipeline, name: str, kind: str, table: str | None
) -> str:
    """Markdown, with the hub's front matter.

    Args:
      config: of the run, nested.
      record: of the export, `lcm_config.json`.
      student: what was exported.
      name: title of the model, and its folder in the examples.
      kind: "pipeline" or "unet".
      table: measurements in Markdown, or None.
    """
    low, high = record["w_min"] + 1.0, record["w_max"] + 1.0
    weights = {"ema": "the EMA target network", "online": "the online student network"}[record["weights"]]
    facts = {
        "Teacher": f"`{record['teacher']}` ({record['prediction_type']} prediction)",
        "Method": "latent consistency distillation (LCD, [Luo et al. 2023](https://arxiv.org/abs/2310.04378))",
        "Weights": f"{weights} after step {record['step']:,} of {config['train']['steps']:,}",
        "Batch": f"{config['data']['batch_size']} images of {config['data']['resolution']} pixels a step "
        f"(data: `{config['data']['source']}`)",
        "Guidance": f"w in [{record['w_min']:g}, {record['w_max']:g}], that is `guidance_scale` {low:g} to {high:g}",
        "Solver": f"DDIM on a grid of {record['solver_steps']} points; sample with 1 to 8 steps",
        "Boundary": f"timestep_scaling {record['timestep_scaling']:g}, sigma_data {record['sigma_data']:g}",
        "Made with": f"lcm_jax {lcm_jax.__version__}",
    }
    lines = [*_front_matter(record["teacher"]), f"# {name}", ""]
    lines += [
        f"A Latent Consistency Model: pictures in one to eight steps, distilled from `{record['teacher']}`. The "
        "guidance scale is an input of the network, so a step is one pass.",
        "",
        *_rows(("", ""), facts.items()),
        "",
    ]
    if table is not None:
        lines += ["## Measurements", "", table.strip(), ""]
    scale = 8.0 if low <= 8.0 <= high else (low + high) / 2.0
    lines += ["## Use", "", f"`guidance_scale` outside {low:g} to {high:g} was never trained.", ""]
    lines += ["With diffusers:", "", "```python", *_diffusers_example(record, name, kind, student.is_xl, scale), "```"]
    source = f"--model={name}" if kind == "pipeline" else f"--model={record['teacher']} --unet={name}"
    command = f'python -m lcm_jax.sample {source} --prompt="..." --steps=4 --guidance_scale={scale:g} --out=pictures'
    lines += ["", "With lcm_jax:", "", "```bash", command, "```", "", "## Configuration", ""]
    values = ((f"`{key}`", f"`{json.dumps(value)}`".replace("|", "\\|")) for key, value in _flat(config))
    lines += _rows(("key", "value"), values)
    return "\n".join(lines) + "\n"


def _front_matter(teacher: str) -> list[str]:
    base = [f"base_model: {teacher}"] if _HUB_ID.fullmatch(teacher) else []
    tags = ["tags:", *(f"- {tag}" for tag in ("latent-consistency-model", "text-to-image", "lcm_jax"))]
    return ["---", "library_name: diffusers", "pipeline_tag: text-to-image", *base, *tags, "---", ""]


def _diffusers_example(record: Mapping[str, Any], name: str, kind: str, is_xl: bool, scale: float) -> list[str]:
    call = f'image = pipe("...", num_inference_steps=4, guidance_scale={scale:g}).images[0]'
    if kind == "pipeline":
        load = f'pipe = DiffusionPipeline.from_pretrained("{name}")'
        return ["from diffusers import DiffusionPipeline", "", load, call]
    pipeline = "StableDiffusionXLPipeline" if is_xl else "LatentConsistencyModelPipeline"
    teacher = record["teacher"] if _HUB_ID.fullmatch(record["teacher"]) else "folder of the teacher"
    constants = f"original_inference_steps={record['solver_steps']}, timestep_scaling={record['timestep_scaling']:g}"
    return [
        f"from diffusers import LCMScheduler, {pipeline}, UNet2DConditionModel",
        "",
        f'unet = UNet2DConditionModel.from_pretrained("{name}")',
        f'scheduler = LCMScheduler.from_pretrained("{teacher}", subfolder="scheduler", {constants})',
        f'pipe = {pipeline}.from_pretrained("{teacher}", unet=unet, scheduler=scheduler)',
        call,
    ]


def _rows(head: tuple[str, str], rows: Any) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        if isinstance(tree[key], Mapping):
            yield from _flat(tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree[key]
