"""The torch side of a run: the loop, its curve, its checkpoint, and a diffusers folder at its end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ml_collections import ConfigDict
from transformers import CLIPTextModel

from experiments import stage
from experiments.vs_diffusers import draws, torch_lcd
from lcm_jax import assets, files, foreign
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.run import config as config_lib

CHECKPOINT = "state.pt"
CURVE = "metrics.jsonl"
SAVE_EVERY = 100
PARTS = ("student", "target", "optimizer", "rate")  # of a trainer, in its checkpoint


def made(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> bool:
    """Trains as `config` says on the embedded teacher, from WORKDIR's checkpoint on, and writes WORKDIR/export; True.

    Raises:
      LcmError: the checkpoint belongs to another config, or has more steps than `config`.
    """
    config_lib.validate(config)
    config = config_lib.resolve(config)
    state = saved(config, workdir)
    losses = state["losses"] if state else []
    if len(losses) == config.train.steps and (workdir / "export").exists():
        return True
    shutil.rmtree(workdir / "export", ignore_errors=True)  # of fewer steps
    source = assets.resolve(config.model.teacher)
    trainer, encode = prepared(config, source)
    if state:
        for part in PARTS:
            getattr(trainer, part).load_state_dict(state[part])
    pipeline, _ = load_pipeline(source)
    batch, draw = draws.make_batches(config, pipeline, encode, say), draws.make_draw(config)
    say(f"torch: steps {len(losses) + 1} to {config.train.steps} into {workdir}")
    while len(losses) < config.train.steps:
        step = len(losses)
        losses.append(float(torch_lcd.train_step(trainer, batch(step), draw(step))))
        if len(losses) % SAVE_EVERY == 0 or len(losses) == config.train.steps:
            save(trainer, losses, config, workdir)
    export(trainer, config, source, workdir / "export")
    return True


def prepared(config: ConfigDict, source: str) -> tuple[torch_lcd.Trainer, Callable]:
    """The initial trainer, and `encode` of images and captions; all float32 on the CPU."""
    vae = AutoencoderKL.from_pretrained(source, subfolder="vae")
    text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder").eval()
    teacher = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    scheduler = foreign.read_json(Path(source) / "scheduler" / "scheduler_config.json")
    encode = draws.make_encode(vae, text_encoder)
    empty = encode(conditioning.tokens(load_pipeline(source)[0], [""]))
    null = {name: torch.from_numpy(value) for name, value in empty.items()}
    method = torch_lcd.make_method(config, scheduler, vae.config.scaling_factor, "cpu")
    return torch_lcd.make_trainer(config, method, teacher, null), encode


def save(trainer: torch_lcd.Trainer, losses: list[float], config: ConfigDict, workdir: Path) -> None:
    """Writes the run's state with its config, and its curve."""
    state = {"losses": losses, "config": config_lib.to_json(config)}
    state |= {part: getattr(trainer, part).state_dict() for part in PARTS}
    with files.new_file(workdir / CHECKPOINT) as partial:
        torch.save(state, partial)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    files.write_atomic(workdir / CURVE, "\n".join(lines) + "\n")


def saved(config: ConfigDict, workdir: Path) -> dict | None:
    """The checkpoint of a run of `config`, None if there is none. Raises LcmError: it belongs to another run."""
    path = workdir / CHECKPOINT
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    different = config_lib.differences(json.loads(state["config"]), config)
    if different:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
        raise LcmError(f"{workdir} was trained with another config ({listed}); use the same values or another workdir")
    stage.check_not_beyond(len(state["losses"]), config, workdir)
    return state


def export(trainer: torch_lcd.Trainer, config: ConfigDict, source: str, folder: Path) -> None:
    """Writes the target as a diffusers folder that samples as it was trained."""
    none = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    pipeline = StableDiffusionPipeline.from_pretrained(source, **none, requires_safety_checker=False)
    scheduler = LCMScheduler.from_config(
        pipeline.scheduler.config,
        original_inference_steps=config.distill.solver_steps,
        timestep_scaling=config.distill.timestep_scaling,
    )
    pipeline.register_modules(unet=trainer.target, scheduler=scheduler)
    partial = folder.with_name("export.partial")  # a folder under the final name is complete
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    partial.rename(folder)
