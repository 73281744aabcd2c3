"""The torch side of a workload: diffusers' pipelines, and the trainer of experiments/vs_diffusers, made fast.

eager            scaled-dot-product attention, channels last and TF32 on a GPU, cuDNN's kernels tried out
compile          the same with `torch.compile` on the networks
compile, graphs  sampling on a GPU: with CUDA graphs, too (mode "reduce-overhead")

python -m experiments.speed.torch_side      a worker, see `side.serve`
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from experiments.speed import side
from experiments.speed.side import Prepared
from experiments.speed.workloads import TRAINING, Workload
from experiments.vs_diffusers import torch_lcd
from lcm_jax import assets, files

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPHS = "reduce-overhead"


def prepare(workload: Workload) -> Prepared:
    """The workload, with random weights in diffusers' own classes."""
    torch.manual_seed(0)
    if DEVICE == "cuda":  # TF32; on a CPU both sides compute float32 as it is
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if workload.kind in TRAINING:
        return _training(workload)
    return {"matmul": _matmul, "unet": _unet, "sample": _sample}[workload.kind](workload)


def _matmul(workload: Workload) -> Prepared:
    n = workload.size
    a, b = (torch.randn(n, n, dtype=getattr(torch, workload.dtype), device=DEVICE) for _ in range(2))
    return _of_functions({"eager": lambda: a @ b})


def _unet(workload: Workload) -> Prepared:
    unet = _placed(_network(UNet2DConditionModel, workload, "unet", time_cond_proj_dim=side.W_EMBEDDING), workload)
    edge = workload.size // _vae_factor(workload)
    z = torch.randn(workload.batch, unet.config.in_channels, edge, edge, device=DEVICE, dtype=unet.dtype)
    text = torch.randn(
        workload.batch, _text_length(workload), unet.config.cross_attention_dim, device=DEVICE, dtype=unet.dtype
    )
    w = torch.randn(workload.batch, side.W_EMBEDDING, device=DEVICE, dtype=unet.dtype)
    t = torch.full((workload.batch,), 499, device=DEVICE)

    def passing(network: Callable) -> Callable[[], torch.Tensor]:
        return lambda: network(z, t, text, timestep_cond=w, return_dict=False)[0]

    return _of_functions({"eager": passing(unet), "compile": passing(torch.compile(unet))})


def _sample(workload: Workload) -> Prepared:
    pipe = _pipeline(workload)
    plain = {"unet": pipe.unet, "decode": pipe.vae.decode, "text_encoder": pipe.text_encoder}
    if hasattr(pipe, "text_encoder_2"):
        plain["text_encoder_2"] = pipe.text_encoder_2
    ways = {"eager": plain, "compile": {name: torch.compile(part) for name, part in plain.items()}}
    if DEVICE == "cuda":  # graphs of the text encoders' would overwrite each other's outputs
        graphs = {name: torch.compile(plain[name], mode=GRAPHS) for name in ("unet", "decode")}
        ways["compile, graphs"] = ways["compile"] | graphs
    edge = workload.size // _vae_factor(workload)
    latents = torch.randn(workload.batch, pipe.unet.config.in_channels, edge, edge, device=DEVICE, dtype=pipe.dtype)

    fitted: list[Any] = [plain]

    def drawing(parts: dict[str, Any]) -> Callable[[], torch.Tensor]:
        def draw() -> torch.Tensor:
            if fitted[0] is not parts:
                for name, part in parts.items():
                    setattr(pipe.vae if name == "decode" else pipe, name, part)
                fitted[0] = parts
            images = pipe(
                prompt=[side.PROMPT] * workload.batch,
                num_inference_steps=side.STEPS,
                latents=latents,
                guidance_scale=side.GUIDANCE_SCALE,
                height=workload.size,
                width=workload.size,
                output_type="np",
            ).images
            return torch.from_numpy(images)

        return draw

    return _of_functions({name: drawing(parts) for name, parts in ways.items()})


def _training(workload: Workload) -> Prepared:
    config = side.training_config(workload)
    precision = getattr(torch, workload.dtype)
    teacher = _network(UNet2DConditionModel, workload, "unet").to(DEVICE)
    if DEVICE == "cuda":
        teacher = teacher.to(memory_format=torch.channels_last)
    vae = files.read_json(Path(side.source_folder(workload.model)) / "vae" / "config.json")
    scheduler = files.read_json(Path(side.source_folder(workload.model)) / "scheduler" / "scheduler_config.json")
    method = torch_lcd.make_method(config, scheduler, vae.get("scaling_factor", 0.18215), DEVICE, precision)
    cond = _conditioning(workload, teacher)
    null = {name: torch.zeros_like(value[:1]) for name, value in cond.items() if name != "time_ids"}
    if not config.lora.rank:  # the student is a float32 copy of its own; adapters share the weights under them
        trainer = torch_lcd.make_trainer(config, method, teacher, null)
        teacher.to(precision)
    else:
        trainer = torch_lcd.make_trainer(config, method, teacher.to(precision), null)
    if DEVICE == "cuda":
        for network in (trainer.student, trainer.target):
            network.to(memory_format=torch.channels_last)
    compiled = {name: torch.compile(getattr(trainer, name)) for name in ("teacher", "student")}
    one_network = trainer.target is trainer.student
    compiled["target"] = compiled["student"] if one_network else torch.compile(trainer.target)
    edge = workload.size // _vae_factor(workload)
    shape = workload.batch, teacher.config.in_channels, edge, edge
    batch = {"mean": torch.randn(shape, device=DEVICE), "logvar": torch.randn(shape, device=DEVICE), "cond": cond}

    def step_of(trainer: torch_lcd.Trainer) -> Callable[[], torch.Tensor]:
        def one() -> torch.Tensor:
            index = torch.randint(0, method.jumps, shape[:1], device=DEVICE)
            low, high = config.distill.w_min, config.distill.w_max
            w = torch.rand(shape[0], device=DEVICE) * (high - low) + low
            posterior, noise = (torch.randn(shape, device=DEVICE) for _ in range(2))
            draws = {"posterior": posterior, "noise": noise, "index": index, "w": w}
            return torch_lcd.train_step(trainer, batch, draws)

        return one

    ways = {"eager": step_of(trainer), "compile": step_of(dataclasses.replace(trainer, **compiled))}
    return _of_functions(ways, training=True)


def _conditioning(workload: Workload, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    b, width = workload.batch, unet.config.cross_attention_dim
    cond = {"encoder_hidden_states": torch.randn(b, _text_length(workload), width, device=DEVICE)}
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[workload.size, workload.size, 0, 0, workload.size, workload.size]], device=DEVICE)
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        cond |= {"text_embeds": torch.randn(b, pooled, device=DEVICE), "time_ids": sizes.float().repeat(b, 1)}
    return cond


def _of_functions(functions: dict[str, Callable[[], torch.Tensor]], training: bool = False) -> Prepared:
    last: list[Any] = [None]

    def repeating(function: Callable[[], torch.Tensor]) -> Callable[[int], None]:
        def repeat(runs: int) -> None:
            with torch.set_grad_enabled(training):
                for _ in range(runs):
                    last[0] = function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return repeat

    return Prepared(
        ways={name: repeating(function) for name, function in functions.items()},
        finite=lambda: bool(torch.isfinite(last[0]).all()),
        peak_bytes=torch.cuda.max_memory_allocated if DEVICE == "cuda" else side.resident_peak,
        reset_peak=torch.cuda.reset_peak_memory_stats if DEVICE == "cuda" else lambda: None,
    )


def _pipeline(workload: Workload) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    folder = Path(side.source_folder(workload.model))
    tokenizer = CLIPTokenizer.from_pretrained(assets.path("shapes") / "tokenizer")
    tokenizer.model_max_length = _text_length(workload)
    parts = {
        "vae": _network(AutoencoderKL, workload, "vae"),
        "unet": _network(UNet2DConditionModel, workload, "unet", time_cond_proj_dim=side.W_EMBEDDING),
        "text_encoder": _text_encoder(CLIPTextModel, folder / "text_encoder"),
        "tokenizer": tokenizer,
        "scheduler": LCMScheduler.from_config(files.read_json(folder / "scheduler" / "scheduler_config.json")),
    }
    if (folder / "text_encoder_2").is_dir():
        second = _text_encoder(CLIPTextModelWithProjection, folder / "text_encoder_2")
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for name in ("vae", "unet", "text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            _placed(getattr(pipe, name), workload)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(kind: type, folder: Path) -> torch.nn.Module:
    with torch.device(DEVICE):
        return kind(CLIPTextConfig.from_dict(files.read_json(folder / "config.json")))


def _network(kind: type, workload: Workload, part: str, **changes: Any) -> torch.nn.Module:
    """A part of the workload's model with random weights, float32, on the device."""
    config = files.read_json(Path(side.source_folder(workload.model)) / part / "config.json")
    with torch.device(DEVICE):
        return kind.from_config(config | changes)


def _placed(network: torch.nn.Module, workload: Workload) -> torch.nn.Module:
    """For inference: in the workload's dtype, channels last on a GPU."""
    network = network.to(DEVICE, getattr(torch, workload.dtype)).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last) if DEVICE == "cuda" else network


def _vae_factor(workload: Workload) -> int:
    config = files.read_json(Path(side.source_folder(workload.model)) / "vae" / "config.json")
    return 2 ** (len(config["block_out_channels"]) - 1)


def _text_length(workload: Workload) -> int:
    folder = Path(side.source_folder(workload.model)) / "text_encoder"
    return files.read_json(folder / "config.json").get("max_position_embeddings", side.TOKENS)


if __name__ == "__main__":
    sys.exit(side.serve(prepare))
