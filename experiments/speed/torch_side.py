"""The torch side of a workload: diffusers' pipelines, and the trainer of experiments/vs_diffusers, made fast.

eager            scaled-dot-product attention, channels last and TF32 on a GPU, cuDNN's search for kernels
compile          the same with `torch.compile` on the networks
compile, graphs  for sampling on a GPU: with CUDA graphs, too (mode "reduce-overhead")
"""

import dataclasses
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
from lcm_jax import assets, foreign

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def prepare(workload: Workload) -> Prepared:
    """The workload, with random weights in diffusers' own classes."""
    torch.manual_seed(0)
    if ON_GPU:  # TF32; on a CPU both sides compute float32 as it is
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if workload.kind in TRAINING:
        return _prepared(_training(workload))
    ways = {"matmul": _matmul, "unet": _unet, "sample": _sample}[workload.kind](workload)
    return _prepared({name: torch.no_grad()(way) for name, way in ways.items()})


def _prepared(ways: dict[str, Callable[[], torch.Tensor]]) -> Prepared:
    return Prepared(
        ways=ways,
        wait=lambda result: torch.cuda.synchronize() if ON_GPU else None,
        finite=lambda result: bool(torch.isfinite(result).all()),
        peak_bytes=torch.cuda.max_memory_allocated if ON_GPU else side.resident_peak,
        reset_peak=torch.cuda.reset_peak_memory_stats if ON_GPU else lambda: None,
    )


def _matmul(workload: Workload) -> dict[str, Callable[[], torch.Tensor]]:
    n = workload.size
    a, b = (torch.randn(n, n, dtype=getattr(torch, workload.dtype), device=DEVICE) for _ in range(2))
    return {"eager": lambda: a @ b}


def _unet(workload: Workload) -> dict[str, Callable[[], torch.Tensor]]:
    unet = _for_inference(_unet_with_w(workload), workload)
    text = torch.randn(workload.batch, _text_length(workload), unet.config.cross_attention_dim, device=DEVICE)
    w = torch.randn(workload.batch, side.W_EMBEDDING, device=DEVICE)
    z, text, w = (x.to(unet.dtype) for x in (torch.randn(_latent_shape(workload, unet), device=DEVICE), text, w))
    t = torch.full((workload.batch,), 499, device=DEVICE)

    def passing(network: Callable) -> Callable[[], torch.Tensor]:
        return lambda: network(z, t, text, timestep_cond=w, return_dict=False)[0]

    return {"eager": passing(unet), "compile": passing(torch.compile(unet))}


def _sample(workload: Workload) -> dict[str, Callable[[], torch.Tensor]]:
    pipe = _pipeline(workload)
    plain = {"unet": pipe.unet, "decode": pipe.vae.decode, "text_encoder": pipe.text_encoder}
    if hasattr(pipe, "text_encoder_2"):
        plain["text_encoder_2"] = pipe.text_encoder_2
    ways = {"eager": plain, "compile": {name: torch.compile(part) for name, part in plain.items()}}
    if ON_GPU:  # the graphs of two text encoders would overwrite each other's outputs
        graphs = {name: torch.compile(plain[name], mode="reduce-overhead") for name in ("unet", "decode")}
        ways["compile, graphs"] = ways["compile"] | graphs
    latents = torch.randn(_latent_shape(workload, pipe.unet), device=DEVICE).to(pipe.dtype)
    in_use = plain

    def sampling(parts: dict[str, Any]) -> Callable[[], torch.Tensor]:
        def sample() -> torch.Tensor:
            nonlocal in_use
            if in_use is not parts:
                for name, part in parts.items():
                    setattr(pipe.vae if name == "decode" else pipe, name, part)
                in_use = parts
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

        return sample

    return {name: sampling(parts) for name, parts in ways.items()}


def _training(workload: Workload) -> dict[str, Callable[[], torch.Tensor]]:
    config = side.training_config(workload)
    precision = getattr(torch, workload.dtype)
    teacher = _network(UNet2DConditionModel, workload, "unet")
    if ON_GPU:
        teacher = teacher.to(memory_format=torch.channels_last)
    latent_scale = _config(workload, "vae").get("scaling_factor", 0.18215)
    method = torch_lcd.make_method(config, _config(workload, "scheduler"), latent_scale, DEVICE, precision)
    cond = _conditioning(workload, teacher)
    null = {name: torch.zeros_like(value[:1]) for name, value in cond.items() if name != "time_ids"}
    if config.lora.rank:
        teacher.to(precision)  # adapters share these weights; a full student is a float32 copy of them
    trainer = torch_lcd.make_trainer(config, method, teacher, null)
    teacher.to(precision)
    if ON_GPU:
        for network in (trainer.student, trainer.target):
            network.to(memory_format=torch.channels_last)
    compiled = {name: torch.compile(getattr(trainer, name)) for name in ("teacher", "student")}
    one_network = trainer.target is trainer.student
    compiled["target"] = compiled["student"] if one_network else torch.compile(trainer.target)
    shape = _latent_shape(workload, teacher)
    batch = {"mean": torch.randn(shape, device=DEVICE), "logvar": torch.randn(shape, device=DEVICE), "cond": cond}

    def step_of(trainer: torch_lcd.Trainer) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            low, high = config.distill.w_min, config.distill.w_max
            draws = {
                "index": torch.randint(0, method.jumps, shape[:1], device=DEVICE),
                "w": torch.rand(shape[0], device=DEVICE) * (high - low) + low,
                "posterior": torch.randn(shape, device=DEVICE),
                "noise": torch.randn(shape, device=DEVICE),
            }
            return torch_lcd.train_step(trainer, batch, draws)

        return step

    return {"eager": step_of(trainer), "compile": step_of(dataclasses.replace(trainer, **compiled))}


def _conditioning(workload: Workload, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    b, width = workload.batch, unet.config.cross_attention_dim
    cond = {"encoder_hidden_states": torch.randn(b, _text_length(workload), width, device=DEVICE)}
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[workload.size, workload.size, 0, 0, workload.size, workload.size]], device=DEVICE)
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        cond |= {"text_embeds": torch.randn(b, pooled, device=DEVICE), "time_ids": sizes.float().repeat(b, 1)}
    return cond


def _pipeline(workload: Workload) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(assets.path("shapes") / "tokenizer")
    tokenizer.model_max_length = _text_length(workload)
    parts = {
        "vae": _network(AutoencoderKL, workload, "vae"),
        "unet": _unet_with_w(workload),
        "text_encoder": _text_encoder(CLIPTextModel, workload, "text_encoder"),
    }
    if (Path(side.source_folder(workload)) / "text_encoder_2").is_dir():
        parts["text_encoder_2"] = _text_encoder(CLIPTextModelWithProjection, workload, "text_encoder_2")
    parts = {name: _for_inference(part, workload) for name, part in parts.items()}
    parts |= {"tokenizer": tokenizer, "scheduler": LCMScheduler.from_config(_config(workload, "scheduler"))}
    if "text_encoder_2" in parts:
        pipe = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        none = dict.fromkeys(("safety_checker", "feature_extractor"))
        pipe = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _config(workload: Workload, part: str) -> dict[str, Any]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return foreign.read_json(Path(side.source_folder(workload)) / part / name)


def _text_encoder(kind: type, workload: Workload, part: str) -> torch.nn.Module:
    with torch.device(DEVICE):
        return kind(CLIPTextConfig.from_dict(_config(workload, part)))


def _network(kind: type, workload: Workload, part: str, **changes: Any) -> torch.nn.Module:
    """A part of the workload's model with random weights, float32, on the device."""
    with torch.device(DEVICE):
        return kind.from_config(_config(workload, part) | changes)


def _unet_with_w(workload: Workload) -> torch.nn.Module:
    return _network(UNet2DConditionModel, workload, "unet", time_cond_proj_dim=side.W_EMBEDDING)


def _for_inference(network: torch.nn.Module, workload: Workload) -> torch.nn.Module:
    """The network in the workload's dtype, channels last on a GPU."""
    network = network.to(DEVICE, getattr(torch, workload.dtype)).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last) if ON_GPU else network


def _latent_shape(workload: Workload, unet: UNet2DConditionModel) -> tuple[int, ...]:
    """[b c h w]."""
    edge = workload.size // 2 ** (len(_config(workload, "vae")["block_out_channels"]) - 1)
    return workload.batch, unet.config.in_channels, edge, edge


def _text_length(workload: Workload) -> int:
    return _config(workload, "text_encoder").get("max_position_embeddings", side.TOKENS)
