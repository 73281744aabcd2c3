"""The torch side of a run: the loop, its curve, its checkpoint, and a diffusers folder at its end."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ml_collections import ConfigDict
from transformers import CLIPTextModel

from experiments import stage
from experiments.vs_diffusers import draws, torch_lcd
from lcm_jax import assets, files
from lcm_jax.pretrained import load_pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.run import config as config_lib

CHECKPOINT = "state.pt"
CURVE = "metrics.jsonl"
SAVE_EVERY = 100


def trained_and_exported(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> None:
    """Trains as `config` says on the embedded teacher, from WORKDIR's checkpoint on, and writes WORKDIR/export.

    Raises:
      LcmError: the checkpoint is of another config, or of more steps than are asked for.
    """
    config_lib.validate(config)
    config = config_lib.resolve(config)
    source = assets.resolve(config.model.teacher)
    trainer, encode = prepared(config, source)
    pipeline = load_pipeline(source)
    batch, draw = draws.make_batches(config, pipeline, encode, say), draws.make_draw(config, *draws.shapes(config))
    workdir.mkdir(parents=True, exist_ok=True)
    losses = restored(trainer, config, workdir)
    say(f"torch: steps {len(losses) + 1} to {config.train.steps} into {workdir}")
    while len(losses) < config.train.steps:
        step = len(losses)
        losses.append(float(torch_lcd.train_step(trainer, batch(step), draw(step))))
        if len(losses) % SAVE_EVERY == 0 or len(losses) == config.train.steps:
            save(trainer, losses, config, workdir)
    export(trainer, config, source, workdir / "export")


def prepared(config: ConfigDict, source: str) -> tuple[torch_lcd.Trainer, Callable]:
    """The trainer at its beginning, and `encode` of pictures and captions; all float32 on the CPU."""
    vae = AutoencoderKL.from_pretrained(source, subfolder="vae")
    text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder").eval()
    teacher = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    scheduler = files.read_json(Path(source) / "scheduler" / "scheduler_config.json")
    encode = draws.make_encode(vae, text_encoder)
    empty = encode(conditioning.tokens(load_pipeline(source), [""]))
    null = {name: torch.from_numpy(value) for name, value in empty.items()}
    method = torch_lcd.make_method(config, scheduler, vae.config.scaling_factor, "cpu")
    return torch_lcd.make_trainer(config, method, teacher, null), encode


def save(trainer: torch_lcd.Trainer, losses: list[float], config: ConfigDict, workdir: Path) -> None:
    """The run's state, with its config, and its curve."""
    state = {"losses": losses, "config": config_lib.to_json(config)}
    for part in ("student", "target", "optimizer", "rate"):
        state[part] = getattr(trainer, part).state_dict()
    with files.new_file(workdir / CHECKPOINT) as partial:
        torch.save(state, partial)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    with files.new_file(workdir / CURVE) as partial:
        partial.write_text("\n".join(lines) + "\n")


def restored(trainer: torch_lcd.Trainer, config: ConfigDict, workdir: Path) -> list[float]:
    """Losses of the steps already made, whose state goes into `trainer`; none where there is no checkpoint."""
    path = workdir / CHECKPOINT
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    stage.check_same(json.loads(state["config"]), config, workdir)
    stage.check_not_beyond(len(state["losses"]), config, workdir)
    for part in ("student", "target", "optimizer", "rate"):
        getattr(trainer, part).load_state_dict(state[part])
    return state["losses"]


def export(trainer: torch_lcd.Trainer, config: ConfigDict, source: str, folder: Path) -> None:
    """The target as a diffusers folder that samples as it was trained."""
    none = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    pipeline = StableDiffusionPipeline.from_pretrained(source, **none, requires_safety_checker=False)
    scheduler = LCMScheduler.from_config(
        pipeline.scheduler.config,
        original_inference_steps=config.distill.solver_steps,
        timestep_scaling=config.distill.timestep_scaling,
    )
    pipeline.register_modules(unet=trainer.target, scheduler=scheduler)
    pipeline.save_pretrained(folder)
