"""Latent Consistency Distillation in torch, on diffusers' networks: the other side of a comparison, not a product.

Written from the paper (Luo et al. 2023, arXiv 2310.04378, Algorithm 1); it shares no line with `lcm_jax`. With a grid
of N jumps of k = T // N timesteps, jump i goes from t = (i + 1) k - 1 to s = max(t - k, 0):

    z_t = alpha_t z + sigma_t eps
    o   = U_teacher(z_t, t, c) + w (U_teacher(z_t, t, c) - U_teacher(z_t, t, null))
    z_s = alpha_s x0(o) + sigma_s eps(o)
    f(z, t) = c_skip(t) z + c_out(t) x0(U(z, t, c, w))
    loss    = mean sqrt((f_student(z_t, t) - f_target(z_s, s))^2 + c^2) - c

Arrays are torch's [b c h w]. Everything outside the networks is float32; the networks run under autocast.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from ml_collections import ConfigDict
from peft import LoraConfig

Conditioning = Mapping[str, torch.Tensor]  # encoder_hidden_states [b l d]; SDXL's text_embeds [b p], time_ids [b 6]

# The layers that the LCM-LoRA report adapts.
LORA_TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut downsamplers.0.conv "
    "upsamplers.0.conv time_emb_proj"
).split()


@dataclasses.dataclass(frozen=True)
class Method:
    """Constants of the loss.

    abar: float32 [T]; predicts: "epsilon" or "v_prediction"; precision: compute dtype of the networks.
    """

    abar: torch.Tensor
    predicts: str
    jumps: int
    distance: str
    huber_c: float
    sigma_data: float
    timestep_scaling: float
    latent_scale: float
    precision: torch.dtype


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The networks of a run and its optimiser. `target` is `student` itself if there is no EMA.

    theta: the student's trained parameters; averages: the target's, in the same order; empty without EMA.
    """

    method: Method
    teacher: torch.nn.Module
    student: torch.nn.Module
    target: torch.nn.Module
    theta: list[torch.nn.Parameter]
    averages: list[torch.nn.Parameter]
    null: Conditioning
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float
    ema_decay: float


def make_method(
    config: ConfigDict,
    scheduler: Mapping[str, Any],
    latent_scale: float,
    device: str,
    precision: torch.dtype = torch.float32,
) -> Method:
    """The constants of a training config and a teacher's `scheduler_config.json`."""
    noise = DDPMScheduler.from_config(scheduler)
    return Method(
        abar=noise.alphas_cumprod.float().to(device),
        predicts=noise.config.prediction_type,
        jumps=config.distill.solver_steps,
        distance=config.distill.loss,
        huber_c=config.distill.huber_c,
        sigma_data=config.distill.sigma_data,
        timestep_scaling=config.distill.timestep_scaling,
        latent_scale=latent_scale,
        precision=precision,
    )


def make_trainer(config: ConfigDict, method: Method, teacher: UNet2DConditionModel, null: Conditioning) -> Trainer:
    """The initial state of a run: student and target start as copies of the teacher, which is frozen.

    In a LoRA run all three share the teacher's weights, and only adapters are trained.
    """
    teacher.requires_grad_(False)
    if config.lora.rank:
        student = adapted(teacher, config.lora.rank, config.lora.alpha)
    else:
        student = with_w_embedding(teacher, config.distill.w_embedding_dim)
    if config.train.remat != "none":
        student.enable_gradient_checkpointing()
    names, theta = zip(*((name, p) for name, p in student.named_parameters() if p.requires_grad), strict=True)
    target, averages = student, []
    if config.train.ema_decay:
        target = copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad})
        target.disable_gradient_checkpointing()
        target.requires_grad_(False)
        averages = [dict(target.named_parameters())[name] for name in names]
    train = config.train
    optimizer = torch.optim.AdamW(
        theta,
        lr=train.learning_rate,
        betas=(train.adam_b1, train.adam_b2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        fused=True,
    )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (train.lr_warmup_steps + 1))
        if not train.lr_decay_steps:
            return warm
        return warm * min(1.0, max(0.0, 1.0 - (step - train.lr_decay_start) / train.lr_decay_steps))

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Trainer(
        method,
        teacher,
        student,
        target,
        list(theta),
        averages,
        null,
        optimizer,
        rate,
        train.max_grad_norm,
        train.ema_decay,
    )


def with_w_embedding(teacher: UNet2DConditionModel, dim: int) -> UNet2DConditionModel:
    """A trainable float32 copy of the teacher with a w embedding, whose projection starts at zero as in ControlNet."""
    with next(teacher.parameters()).device:
        student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=dim or None)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    new = ["time_embedding.cond_proj.weight"] if dim else []
    if missing != new or unexpected:
        raise ValueError(f"student and teacher differ in {missing} and {unexpected}")
    if dim:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.train()


def adapted(teacher: UNet2DConditionModel, rank: int, alpha: float) -> UNet2DConditionModel:
    """The teacher's own weights with trainable float32 adapters on them."""
    student = copy.deepcopy(teacher, {id(p): p for p in teacher.parameters()})
    student.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS)))
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student.train()


def train_step(trainer: Trainer, batch: Mapping[str, Any], draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One optimiser step: loss, gradient, clipping, AdamW, EMA. Returns the loss, a scalar without gradient.

    Args:
      batch: "mean", "logvar" [b c h w] of the VAE's posterior; "cond", the captions' conditioning.
      draws: "posterior", "noise" [b c h w]; "index" [b] of the jump; "w" [b].
    """
    loss = lcd_loss(trainer, batch, draws)
    trainer.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if trainer.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(trainer.theta, trainer.max_grad_norm)
    trainer.optimizer.step()
    trainer.rate.step()
    if trainer.averages:
        with torch.no_grad():
            torch._foreach_lerp_(trainer.averages, trainer.theta, 1.0 - trainer.ema_decay)
    return loss.detach()


def lcd_loss(trainer: Trainer, batch: Mapping[str, Any], draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The distance between the student at t and the target at the end of the guided teacher's jump from t; a scalar."""
    method, cond = trainer.method, batch["cond"]
    k = len(method.abar) // method.jumps
    t = (draws["index"] + 1) * k - 1
    s = (t - k).clamp(min=0)
    z = method.latent_scale * (batch["mean"] + torch.exp(batch["logvar"] / 2) * draws["posterior"])
    z_t = _column(method.abar[t].sqrt()) * z + _column((1 - method.abar[t]).sqrt()) * draws["noise"]
    with torch.no_grad():
        z_s = jump(trainer, z_t, t, s, cond, draws["w"])
        wanted = consistent(method, trainer.target, z_s, s, cond, draws["w"])
    found = consistent(method, trainer.student, z_t, t, cond, draws["w"])
    squared = (found - wanted) ** 2
    if method.distance == "l2":
        return squared.mean()
    return (torch.sqrt(squared + method.huber_c**2) - method.huber_c).mean()


def jump(
    trainer: Trainer, z_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, cond: Conditioning, w: torch.Tensor
) -> torch.Tensor:
    """The teacher's DDIM step from t to s, guided by w; text and null text are evaluated in one batch of 2b."""
    method = trainer.method
    null = {name: trainer.null.get(name, value).expand_as(value) for name, value in cond.items()}
    both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
    output = predict(method, trainer.teacher, torch.cat([z_t, z_t]), torch.cat([t, t]), both)
    guided, unguided = output.chunk(2)
    x0, eps = to_x0_eps(method, guided + _column(w) * (guided - unguided), z_t, t)
    return _column(method.abar[s].sqrt()) * x0 + _column((1 - method.abar[s]).sqrt()) * eps


def consistent(
    method: Method, network: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Conditioning, w: torch.Tensor
) -> torch.Tensor:
    """The consistency function f of a network, which is conditioned on w if it has a w embedding."""
    dim = network.config.time_cond_proj_dim
    output = predict(method, network, z, t, cond, None if dim is None else w_embedding(w, dim))
    scaled = t.float() * method.timestep_scaling
    total = scaled**2 + method.sigma_data**2
    x0, _ = to_x0_eps(method, output, z, t)
    return _column(method.sigma_data**2 / total) * z + _column(scaled / total.sqrt()) * x0


def predict(
    method: Method,
    network: torch.nn.Module,
    z: torch.Tensor,
    t: torch.Tensor,
    cond: Conditioning,
    timestep_cond: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's output, float32."""
    half = method.precision != torch.float32
    cast = torch.autocast(z.device.type, method.precision) if half else contextlib.nullcontext()
    added = {name: value for name, value in cond.items() if name != "encoder_hidden_states"}
    with cast:
        output = network(
            z,
            t,
            cond["encoder_hidden_states"],
            timestep_cond=timestep_cond,
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
    return output.float()


def to_x0_eps(method: Method, output: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(x0, eps) of a network's output at (z, t)."""
    alpha, sigma = _column(method.abar[t].sqrt()), _column((1 - method.abar[t]).sqrt())
    if method.predicts == "epsilon":
        return (z - sigma * output) / alpha, output
    if method.predicts == "v_prediction":
        return alpha * z - sigma * output, alpha * output + sigma * z
    raise ValueError(f"prediction type {method.predicts}")


def w_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines, then cosines of 1000 w at frequencies from 1 to 1/10000: [b] -> float32 [b dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _column(values: torch.Tensor) -> torch.Tensor:
    """[b] -> [b 1 1 1]."""
    return values[:, None, None, None]
