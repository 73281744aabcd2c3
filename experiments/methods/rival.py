"""A few-step LoRA on a fine-tune that it has never seen, against one that was distilled on that fine-tune.

The fine-tune is the embedded teacher with the style LoRA of experiments/shapes_lcm_lora merged. For each map a LoRA is
distilled on the plain teacher and one on the fine-tune, by configs/shapes_lcm_lora.py; each is measured on both.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments import embedded, stage
from experiments.methods.arms import LORA_STEPS, LORAS, TEACHERS, config_of_lora
from experiments.shapes_lcm_lora import train_style
from lcm_jax import assets, pretrained
from lcm_jax.pretrained import lora_files


def fine_tune(workdir: Path, steps: int | None, say: Callable[[str], None]) -> Path:
    """WORKDIR/teacher: the teacher with the style LoRA merged; trained if it is not there."""
    folder = workdir / "teacher"
    if not folder.exists():
        say("training the style LoRA")
        path = train_style.train(workdir, steps or train_style.STEPS)
        pipeline, params = pretrained.load_pipeline(assets.path("shapes"))
        style = lora_files.read_lora(path, lora_files.modules_of(pipeline))
        pretrained.save_pipeline(pipeline, lora_files.merge_into(pipeline, params, [(style, 1.0)]), folder)
    return folder


def rows_of(
    workdir: Path, seed: int, steps: int | None, count: int, say: Callable[[str], None]
) -> list[dict[str, Any]] | None:
    """Rows of all LoRAs of a seed on both teachers, and with seed 0 of the teachers alone; None if a training was
    stopped."""
    sources = {"plain": "shapes", "style": str(fine_tune(workdir / "style", steps, say))}
    found = []
    if seed == 0:
        row = f"--row=ddim:50:{embedded.best_guidance_scale():g}"
        for teacher, source in sources.items():
            about = {"lora": None, "teacher": teacher, "seed": None}
            found.append(about | measured(workdir, f"{teacher} teacher", [f"--model={source}"], row, count))
    for map_name, (_, sampler) in LORAS.items():
        for distilled in TEACHERS:
            folder = workdir / f"seed{seed}" / f"{map_name.lower()}_{distilled}"
            if not stage.made(config_of_lora(map_name, distilled, sources[distilled], seed, steps), folder, say):
                return None
            for teacher in TEACHERS:
                say(f"rows of the {map_name} LoRA of the {distilled} teacher on the {teacher} one, seed {seed}")
                flags = [f"--model={sources[teacher]}", f"--lora={folder / 'export'}:1.0"]
                about = {"lora": f"{map_name}, {distilled}", "teacher": teacher, "seed": seed}
                name = f"{teacher} + {map_name} LoRA of {distilled}, seed {seed}"
                found.append(about | measured(workdir, name, flags, f"--row={sampler}:{LORA_STEPS}:1", count))
            jax.clear_caches()
    return found


def measured(workdir: Path, name: str, flags: list[str], row: str, count: int) -> dict[str, Any]:
    """Accuracy, coverage, and Frechet distances to renders in the style and to plain ones."""
    out = workdir / "evaluate"
    (plain,), (style,) = (
        embedded.evaluated(
            out / f"{kind}_{count}x{embedded.EACH}", name, count, *flags, row, *more, "--endpoint_steps=1"
        )
        for kind, more in (("plain", ()), ("style", (f"--style={train_style.STYLE}",)))
    )
    return {
        "evaluations": plain.evaluations,
        "accuracy": plain.values["caption_accuracy"],
        "coverage": plain.values["coverage_distance"],
        "to_style": style.values["shapes_frechet"],
        "to_plain": plain.values["shapes_frechet"],
    }
