"""Wrong answers that the tests must notice: `make test-mutants`, or `python tests/mutants.py WORD ...` for some.

A mutant is one change of one file of lcm_jax, made in a copy of the package and its tests; one of its tests must fail.
A bound that lets rounding through on every CPU must not let an error through, so of a mutant that changes numbers a
bound (see parity.py) must be exceeded at least `FACTOR` times. The tests named here must pass on the unchanged copy.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lcm_jax", "tests", "experiments", "configs", "pyproject.toml", "setup.py", "README.md")
FACTOR = 10.0


class Mutant(NamedTuple):
    """`old`, which occurs once in lcm_jax/`file`, becomes `new`.

    Attributes:
      tests: what is run, relative to tests/, one of which must fail.
      numeric: whether a bound must be exceeded `FACTOR` times; else any failure will do.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    numeric: bool = True


TABLES = ("test_diffusion_schedule.py::test_tables_equal_diffusers",)
LCM = ("test_diffusion_samplers.py::test_lcm_equals_diffusers[4-epsilon]",)
DDIM = (
    "test_diffusion_samplers.py::test_ddim_equals_diffusers[8-trailing-epsilon]",
    "test_diffusion_samplers.py::test_ddim_equals_diffusers[8-trailing-v_prediction]",
)
DPM = ("test_diffusion_samplers.py::test_dpm_solver_equals_diffusers[14-epsilon-trailing]",)
DPM_PP = ("test_diffusion_samplers.py::test_dpm_solver_pp_equals_diffusers[8-trailing-epsilon]",)
JUMPS = ("test_diffusion_solvers.py::test_second_order_jumps_equal_diffusers",)
BOUNDARY = (
    "test_diffusion_guidance.py::test_boundary_scalings_reference_values",
    "test_diffusion_guidance.py::test_boundary_scalings_equal_diffusers",
)
W = ("test_diffusion_guidance.py::test_w_embedding_equals_the_diffusers_pipeline",)
LCD = ("test_distill_objective.py::test_loss_and_gradient_match_torch[sd1-epsilon-l2]",)
STEP = ("test_distill_step.py::test_three_steps_match_torch_adamw[0.0]",)
LAYERS = ("test_models_layers.py",)
NORMS = ("test_models_norms.py",)
CLIP = ("test_models_clip.py::test_text_matches_transformers",)
UNET = ("test_models_unet.py::test_matches_diffusers[prefixed-even]",)
VAE = ("test_models_vae.py::test_kl_decode[sd]", "test_models_vae.py::test_kl_encode")
LORA_DELTAS = ("test_pretrained_lora_files.py::test_what_a_file_adds_without_factors",)
LORA_FILES = ("test_pretrained_lora_files.py::test_one_file_gives_the_model_that_diffusers_gives",)
RESIZING = ("test_metrics_resizing.py",)
TEACHER = ("test_sample.py::test_the_teacher_generates_the_images_of_diffusers",)

NUMBERS = [
    # The schedule and what converts with it.
    Mutant(
        "scaled_linear betas as linear",
        "diffusion/schedule.py",
        "_linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2",
        "_linspace(beta_start, beta_end, num_train_timesteps)",
        TABLES,
    ),
    Mutant(
        "alpha_t is abar_t",
        "diffusion/schedule.py",
        "return np.sqrt(self.alphas_cumprod)",
        "return self.alphas_cumprod",
        ("test_diffusion_schedule.py::test_add_noise_and_velocity_equal_diffusers",),
    ),
    Mutant(
        "v read as eps",
        "diffusion/schedule.py",
        "return alpha * z_t - sigma * output",
        "return (z_t - sigma * output) / alpha",
        DDIM,
    ),
    Mutant(
        "eps read as v",
        "diffusion/schedule.py",
        "return (z_t - sigma * output) / alpha",
        "return alpha * z_t - sigma * output",
        DDIM,
    ),
    Mutant(
        "sign of v",
        "diffusion/schedule.py",
        "return alpha * _float32(eps) - sigma * _float32(z)",
        "return sigma * _float32(z) - alpha * _float32(eps)",
        ("test_diffusion_schedule.py::test_add_noise_and_velocity_equal_diffusers",),
    ),
    # Samplers and solvers: one timestep off.
    Mutant(
        "lcm: the network's timestep is one off",
        "diffusion/samplers.py",
        "model(x, t), x, alpha, sigma)\n        return next_alpha",
        "model(x, t - 1), x, alpha, sigma)\n        return next_alpha",
        LCM,
    ),
    Mutant(
        "lcm: boundary scalings one timestep off",
        "diffusion/samplers.py",
        "boundary_scalings(t, sigma_data, timestep_scaling)",
        "boundary_scalings(t + 1, sigma_data, timestep_scaling)",
        ("test_diffusion_samplers.py::test_lcm_other_solver_grids_and_scalings",),
    ),
    Mutant(
        "lcm: renoised to one timestep off",
        "diffusion/samplers.py",
        "np.append(schedule.alphas[t[1:]], np.float32(1))",
        "np.append(schedule.alphas[t[1:] - 1], np.float32(1))",
        LCM,
    ),
    Mutant(
        "ddim: ends one timestep off",
        "diffusion/samplers.py",
        "prev = t - (schedule.num_train_timesteps // len(t)",
        "prev = t - 1 - (schedule.num_train_timesteps // len(t)",
        DDIM,
    ),
    Mutant(
        "ddim: always ends at abar = 1",
        "diffusion/samplers.py",
        "final = np.float32(1) if set_alpha_to_one else schedule.alphas_cumprod[0]",
        "final = np.float32(1)",
        ("test_diffusion_samplers.py::test_ddim_and_dpm_solvers_equal_diffusers_with_offsets",),
    ),
    Mutant(
        "dpm_solver_pp: noise levels one timestep off",
        "diffusion/samplers.py",
        "alpha, sigma, half_log_snr = alpha_sigma_lambda(schedule.alphas_cumprod[t])",
        "alpha, sigma, half_log_snr = alpha_sigma_lambda(schedule.alphas_cumprod[np.maximum(t - 1, 0)])",
        DPM_PP,
    ),
    Mutant(
        "dpm_solver: the last step of order 2 from 14 steps on",
        "diffusion/samplers.py",
        "_LOWER_ORDER_FINAL = 15",
        "_LOWER_ORDER_FINAL = 14",
        DPM,
    ),
    Mutant(
        "solver: jumps end one timestep off",
        "diffusion/solvers.py",
        "end = np.maximum(start - skip, 0)",
        "end = np.maximum(start - skip + 1, 0)",
        LCD,
    ),
    Mutant(
        "solver: the second call at one timestep off",
        "diffusion/solvers.py",
        "output = model(u, s)",
        "output = model(u, s - 1)",
        JUMPS,
    ),
    Mutant(
        "solver: the correction twice",
        "diffusion/solvers.py",
        "(weights / (2 * q)).astype(np.float32)",
        "(weights / q).astype(np.float32)",
        JUMPS,
    ),
    # Consistency function and guidance.
    Mutant(
        "c_skip and c_out swapped",
        "diffusion/consistency.py",
        "return sigma_data**2 / total, u / jnp.sqrt(total)",
        "return u / jnp.sqrt(total), sigma_data**2 / total",
        BOUNDARY,
    ),
    Mutant(
        "c_out with sigma_data",
        "diffusion/consistency.py",
        "u / jnp.sqrt(total)",
        "sigma_data * u / jnp.sqrt(total)",
        BOUNDARY,
    ),
    Mutant("sigma_data 1", "diffusion/consistency.py", "SIGMA_DATA = 0.5", "SIGMA_DATA = 1.0", BOUNDARY),
    Mutant(
        "timestep scaling 1", "diffusion/consistency.py", "TIMESTEP_SCALING = 10.0", "TIMESTEP_SCALING = 1.0", BOUNDARY
    ),
    Mutant(
        "guidance scale for w",
        "diffusion/guidance.py",
        "return cond + broadcast_like(w, cond) * (cond - uncond)",
        "return uncond + broadcast_like(w, cond) * (cond - uncond)",
        (
            "test_diffusion_guidance.py::test_guiding_the_output_guides_x0_and_eps",
            "test_diffusion_guidance.py::test_guidance_zero_is_the_conditional_branch",
            "test_diffusion_solvers.py::test_guiding_x0_and_eps_is_the_paper_s_guided_increment",
            *LCD,
        ),
    ),
    Mutant("w embedding of 999 w", "diffusion/guidance.py", "angles = (1000.0 * w)", "angles = (999.0 * w)", W),
    Mutant("w embedding divides by h", "diffusion/guidance.py", "np.float32(half - 1)", "np.float32(half)", W),
    Mutant(
        "w embedding with cosines first",
        "diffusion/guidance.py",
        "[jnp.sin(angles), jnp.cos(angles)]",
        "[jnp.cos(angles), jnp.sin(angles)]",
        W,
    ),
    # The loss and the step.
    Mutant(
        "target: the network's timestep is one off",
        "distill/lcm.py",
        "f(target_params, z_end, p.grid.prev_timesteps)",
        "f(target_params, z_end, p.grid.prev_timesteps + 1)",
        LCD,
    ),
    Mutant(
        "target: theta in place of theta^-",
        "distill/lcm.py",
        "stop_gradient(f(target_params, z_end,",
        "stop_gradient(f(params, z_end,",
        LCD,
    ),
    Mutant(
        "null and caption exchanged",
        "diffusion/denoiser.py",
        "classifier_free(output[:, 0], output[:, 1], w)",
        "classifier_free(output[:, 1], output[:, 0], w)",
        LCD,
    ),
    Mutant("latents not scaled", "distill/objective.py", "z = problem.scaling_factor * (", "z = (", LCD),
    Mutant(
        "posterior's variance for its deviation",
        "distill/objective.py",
        "jnp.exp(0.5 * batch[",
        "jnp.exp(1.0 * batch[",
        LCD,
    ),
    Mutant("Huber c twice", "distill/objective.py", "c: float = 1e-3", "c: float = 2e-3", ("test_distill_losses.py",)),
    Mutant("Huber without - c", "distill/objective.py", "+ c**2) - c)", "+ c**2))", ("test_distill_losses.py",)),
    Mutant(
        "EMA decay swapped",
        "distill/state.py",
        "decay * e + (1.0 - decay) * p",
        "(1.0 - decay) * e + decay * p",
        ("test_distill_state.py::test_ema_distance_shrinks_geometrically",),
    ),
    Mutant(
        "weight decay inside Adam",
        "distill/step.py",
        "adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype)",
        "adamw = optax.chain(optax.add_decayed_weights(weight_decay), "
        "optax.adam(learning_rate, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype))",
        STEP,
    ),
    Mutant(
        "clipped to twice the norm",
        "distill/step.py",
        "optax.clip_by_global_norm(max_grad_norm)",
        "optax.clip_by_global_norm(2 * max_grad_norm)",
        ("test_distill_step.py::test_three_steps_match_torch_adamw[0.1]",),
    ),
    # Networks.
    Mutant(
        "attention without its scale",
        "models/attention.py",
        "scale = q.shape[-1] ** -0.5",
        "scale = 1.0",
        ("test_models_layers.py::test_softmax_is_float32_at_large_logits",),
    ),
    Mutant(
        "attention scaled by the width of all heads",
        "models/attention.py",
        "scale = q.shape[-1] ** -0.5",
        "scale = (q.shape[-1] * q.shape[-2]) ** -0.5",
        CLIP,
    ),
    Mutant(
        "logits in half precision",
        "models/attention.py",
        'jnp.einsum("bnsd,bnld->bnsl", q, k, preferred_element_type=jnp.float32)',
        'jnp.einsum("bnsd,bnld->bnsl", q, k)',
        ("test_models_layers.py::test_softmax_is_float32_at_large_logits",),
    ),
    Mutant(
        "gradients of keys summed over blocks in half precision",
        "models/attention.py",
        "k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)",
        "k32, v32 = k, v",
        ("test_runtime_kernels.py::test_blocks_sum_the_gradients_of_keys_in_float32",),
    ),
    Mutant(
        "splash attention scaled by d^-0.499",
        "runtime/kernels.py",
        "(q * q.shape[-1] ** -0.5, k, v)",
        "(q * q.shape[-1] ** -0.499, k, v)",
        ("test_runtime_kernels.py::test_splash_is_xlas[40]",),
    ),
    Mutant(
        "attention covers later tokens",
        "models/attention.py",
        "keep = jnp.tril(",
        "keep = jnp.ones_like(",
        ("test_models_layers.py::test_softmax_is_float32_at_large_logits", *CLIP),
    ),
    Mutant("quick_gelu as gelu", "models/clip.py", "x * nn.sigmoid(1.702 * x)", "nn.gelu(x, approximate=False)", CLIP),
    Mutant("gelu as quick_gelu", "models/clip.py", "nn.gelu(x, approximate=False)", "x * nn.sigmoid(1.702 * x)", CLIP),
    Mutant(
        "gelu by tanh in CLIP", "models/clip.py", "nn.gelu(x, approximate=False)", "nn.gelu(x, approximate=True)", CLIP
    ),
    Mutant(
        "gelu by tanh in the UNet",
        "models/unet.py",
        "nn.gelu(gate, approximate=False)",
        "nn.gelu(gate, approximate=True)",
        LAYERS,
    ),
    Mutant("GEGLU's halves swapped", "models/unet.py", "value, gate = jnp.split", "gate, value = jnp.split", UNET),
    Mutant(
        "cosines and sines swapped",
        "models/layers.py",
        "[jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos",
        "[jnp.sin(angles), jnp.cos(angles)] if not flip_sin_to_cos",
        LAYERS,
    ),
    Mutant("freq_shift left out", "models/layers.py", "np.float32(half - freq_shift)", "np.float32(half)", LAYERS),
    Mutant(
        "variance in one pass",
        "models/layers.py",
        "group(mean(jnp.square(centred))) + self.epsilon",
        "group(mean(jnp.square(x))) - jnp.square(group(mean(x))) + self.epsilon",
        LAYERS,
    ),
    Mutant(
        "GroupNorm without epsilon",
        "models/layers.py",
        "group(mean(jnp.square(centred))) + self.epsilon",
        "group(mean(jnp.square(centred))) + 1e-20",
        LAYERS,
    ),
    Mutant(
        "what is added before a norm missing in the second moment",
        "models/layers.py",
        "offset * (2 * first + offset)",
        "offset * 2 * first",
        LAYERS,
    ),
    Mutant(
        "variances below zero",
        "models/layers.py",
        "jnp.maximum(group(second) - jnp.square(centre), 0.0)",
        "(group(second) - jnp.square(centre))",
        LAYERS,
        False,
    ),
    Mutant(
        "LayerNorm's epsilon 1e-5 whatever is asked for",
        "models/layers.py",
        ".mean(-1, keepdims=True) + self.epsilon",
        ".mean(-1, keepdims=True) + 1e-5",
        LAYERS,
    ),
    Mutant(
        "epsilon 1e-5 before the UNet's transformers",
        "models/unet.py",
        "GroupNorm(self.groups, 1e-6,",
        "GroupNorm(self.groups, 1e-5,",
        NORMS,
        False,
    ),
    Mutant("epsilon 1e-5 in the VAE", "models/vae.py", "EPSILON = 1e-6", "EPSILON = 1e-5", NORMS, False),
    Mutant(
        "epsilon 1e-6 in the UNet's resnets", "models/unet.py", "epsilon=self.norm_eps,", "epsilon=1e-6,", NORMS, False
    ),
    Mutant(
        "epsilon 1e-5 in CLIP whatever the config says",
        "models/clip.py",
        'LayerNorm(self.layer_norm_eps, run, name="final_layer_norm")',
        'LayerNorm(1e-5, run, name="final_layer_norm")',
        NORMS,
        False,
    ),
    Mutant(
        "the UNet pads when it shrinks as XLA's SAME",
        "models/layers.py",
        "pad = (0, 1) if self.asymmetric else (1, 1)",
        "pad = (0, 1)",
        UNET,
    ),
    Mutant(
        "the VAE pads on every side when it shrinks",
        "models/layers.py",
        "pad = (0, 1) if self.asymmetric else (1, 1)",
        "pad = (1, 1)",
        VAE,
    ),
    Mutant(
        "logarithm of the deviation for that of the variance",
        "models/vae.py",
        "return mean, jnp.clip(logvar, ",
        "return mean, jnp.clip(0.5 * logvar, ",
        VAE,
    ),
    Mutant(
        "pooled at the last token",
        "models/clip.py",
        "self.end_of_text(input_ids)[:, None, None]",
        "0 * self.end_of_text(input_ids)[:, None, None] + input_ids.shape[1] - 1",
        CLIP,
    ),
    # Adapters.
    Mutant(
        "LoRA: factors swapped",
        "models/lora.py",
        "* (a @ b.reshape(b.shape[-2:]))",
        "* ((lambda x: x.swapaxes(-1, -2) if x.shape[-1] == x.shape[-2] else x)(a @ b.reshape(b.shape[-2:])))",
        LORA_FILES,
    ),
    Mutant(
        "LoRA: alpha not over rank",
        "pretrained/lora_files.py",
        "return 1.0 if self.alpha is None else self.alpha / self.rank",
        "return 1.0 if self.alpha is None else self.alpha",
        LORA_FILES,
    ),
    Mutant(
        "LoRA: no alpha at all",
        "pretrained/lora_files.py",
        "return 1.0 if self.alpha is None else self.alpha / self.rank",
        "return 1.0",
        LORA_FILES,
    ),
    Mutant(
        "LoRA: alpha 2 % off",
        "pretrained/lora_files.py",
        "self.alpha / self.rank",
        "1.02 * self.alpha / self.rank",
        LORA_FILES,
    ),
    Mutant(
        "LoRA: one layer's alpha for a file without",
        "pretrained/lora_files.py",
        "return 1.0 if self.alpha is None",
        "return 0.5 if self.alpha is None",
        LORA_FILES,
    ),
    Mutant(
        "LoRA: biases without the factors' scale",
        "pretrained/lora_files.py",
        '(scale if role == "lora_bias" else 1)',
        "1",
        LORA_DELTAS,
    ),
    Mutant(
        "LoRA: differences at full weight",
        "models/lora.py",
        "functools.partial(operator.mul, scale, change)",
        "functools.partial(operator.mul, 1.0, change)",
        LORA_DELTAS,
    ),
    Mutant(
        "LoRA in training: no scale",
        "models/lora.py",
        "(hidden * jnp.asarray(scale, dtype)) @",
        "hidden @",
        ("test_models_lora.py::test_adapted_and_merged_equal_peft[sdxl-8]",),
    ),
    Mutant(
        "LoRA in training: alpha not over rank",
        "distill/student.py",
        "alpha / rank)",
        "alpha)",
        ("test_distill_state.py::test_what_a_student_adds_is_as_its_parameters_are",),
        False,
    ),
    Mutant(
        "LoRA in training: 0.1 % more of it where weights are fetched",
        "models/lora.py",
        "factors, self.scale, call_args[0])",
        "factors, 1.001 * self.scale if weights_fn else self.scale, call_args[0])",
        ("test_models_remat.py::test_gradients_of_weights_and_adapters_are_the_same[block]",),
    ),
    # Resizing.
    Mutant(
        "bilinear half a pixel off",
        "metrics/resizing.py",
        "(np.arange(side) + 0.5) * (size / side) - 0.5 if centres",
        "np.arange(side) * (size / side) if centres",
        RESIZING,
    ),
    Mutant(
        "bilinear 1 % of a pixel off",
        "metrics/resizing.py",
        "(np.arange(side) + 0.5) * (size / side) - 0.5 if",
        "(np.arange(side) + 0.5) * (size / side) - 0.51 if",
        RESIZING,
    ),
    Mutant(
        "bicubic as bilinear",
        "metrics/resizing.py",
        ".resize((side, side), Image.Resampling.BICUBIC)",
        ".resize((side, side), Image.Resampling.BILINEAR)",
        RESIZING,
    ),
]

# Of what keeps the parts together; any failing test will do.
CONTRACTS = [
    Mutant(
        "outlines three pixels wide",
        "data/shapes.py",
        "np.abs(distance) <= 0.5",
        "np.abs(distance) <= 1.5",
        ("test_data_shapes.py::test_outlines_run_along_the_edge_of_the_object",),
        False,
    ),
    Mutant(
        "the embedded ControlNet has no name",
        "sampling/generator.py",
        "place = assets.resolve(str(source))",
        "place = str(source)",
        ("test_assets.py::test_the_control_net_is_this_teachers_and_loads_in_diffusers",),
        False,
    ),
    Mutant(
        "gathered weights meet the tangent of a block's input",
        "runtime/mesh.py",
        "after = jax.lax.stop_gradient(after)",
        "after = after",
        ("test_configs.py::test_a_forward_mode_objective_needs_an_attention_that_has_it",),
        False,
    ),
    Mutant(
        "SDXL's sizes with the width first",
        "pretrained/text.py",
        "np.array([height, width, 0, 0, *last], np.float32)",
        "np.array([width, height, 0, 0, *last], np.float32)",
        ("test_pretrained_text.py",),
        False,
    ),
    Mutant(
        "clip skip counted as in diffusers",
        "pretrained/text.py",
        "skip = clip_skip or (2 if is_xl else 1)",
        "skip = clip_skip + 1 if clip_skip else (2 if is_xl else 1)",
        ("test_pretrained_text.py::test_clip_skip_takes_the_hidden_states_of_transformers",),
        False,
    ),
    Mutant(
        "the last chunk pooled",
        "pretrained/text.py",
        "pooled[::count]",
        "pooled[count - 1 :: count]",
        ("test_pretrained_text.py::test_chunks_are_encoded_one_by_one_and_the_first_is_pooled",),
        False,
    ),
    Mutant(
        "latents multiplied by the VAE's factor before decoding",
        "sampling/generator.py",
        "z = z / vae.scaling_factor",
        "z = z * vae.scaling_factor",
        TEACHER,
        False,
    ),
    Mutant(
        "the user's guidance scale taken as w",
        "sampling/programs.py",
        "jnp.asarray(guidance_scale, jnp.float32) - 1.0",
        "jnp.asarray(guidance_scale, jnp.float32)",
        TEACHER,
        False,
    ),
    # A contract of the design each.
    Mutant(
        "the order of the data without the seed",
        "data/order.py",
        "return shuffled(seed, step * batch_size",
        "return shuffled(0, step * batch_size",
        ("test_data_order.py",),
        False,
    ),
    Mutant(
        "a resumed run reads its data from the start",
        "train.py",
        "order,\n            step,",
        "order,\n            0,",
        ("test_train.py::test_stopped_and_resumed_is_bitwise_the_same_as_never_stopped",),
        False,
    ),
    Mutant(
        "every step draws the same",
        "distill/step.py",
        "jax.random.fold_in(key, state.step)",
        "key",
        ("test_distill_step.py::test_draws_depend_on_key_and_step_alone",),
        False,
    ),
    Mutant(
        "a state that is not finite is saved",
        "train.py",
        "telemetry.settle()  # a step whose loss",
        "pass  # a step whose loss",
        ("test_train.py::test_more_steps_resume_until_one_is_not_finite",),
        False,
    ),
    Mutant(
        "the teacher held twice by adapters on it",
        "run/step.py",
        "base=None if base is weights else base",
        "base=base",
        ("test_run_models.py",),
        False,
    ),
    Mutant(
        "a damaged checkpoint passes",
        "runtime/checkpoints.py",
        'if actual != entry["sha256"]:',
        "if False:",
        ("test_runtime_checkpoint_damage.py",),
        False,
    ),
    Mutant(
        "a failed write leaves a part",
        "files.py",
        "            stack.callback(remove, partial)\n",
        "",
        ("test_files.py",),
        False,
    ),
    Mutant(
        "an export without its tokenizers",
        "pretrained/save.py",
        'texts |= {f"{TOKENIZER_OF[part]}/{name}": content for name, content in tokenizer.files.items()}',
        "pass",
        ("test_pretrained_saving.py",),
        False,
    ),
    Mutant(
        "sums of half-precision logits in half precision",
        "models/attention.py",
        'logits = jnp.einsum("bnsd,bnld->bnsl", q, k, preferred_element_type=jnp.float32)',
        'logits = jnp.einsum("bnsd,bnld->bnsl", q, k).astype(jnp.float32)',
        LAYERS,
        False,
    ),
    Mutant(
        "a causal attention goes to a kernel that has no mask",
        "runtime/kernels.py",
        '"xla" if causal else self.kind',
        "self.kind",
        ("test_runtime_kernels.py",),
        False,
    ),
    Mutant(
        "text attention of 77 keys as it is",
        "runtime/kernels.py",
        "if k.shape[1] % 2:",
        "if False:",
        ("test_runtime_kernels.py::test_gradient_of_auto_lowers_for_cuda",),
        False,
    ),
    # What GPUs are promised, without one.
    Mutant(
        "Blackwell gets heads above 128",
        "runtime/kernels.py",
        "if 9 <= capability < 10 else",
        "if capability >= 9 else",
        ("test_runtime_kernels.py::test_choice", "test_runtime_kernels.py::test_cudnn_names_the_layer_it_cannot_run"),
        False,
    ),
    Mutant(
        "auto is float32 on GPUs",
        "runtime/kernels.py",
        '== "cpu" else "bfloat16"',
        '!= "tpu" else "bfloat16"',
        ("test_runtime_kernels.py::test_auto_is_bfloat16_but_on_a_cpu",),
        False,
    ),
    Mutant(
        "several GPUs without overlap",
        "runtime/kernels.py",
        "if devices > 1 else {}",
        "if devices > 2 else {}",
        ("test_runtime_compiler.py::test_each_platform_has_its_own",),
        False,
    ),
    Mutant(
        "XLA takes a whole GPU",
        "cost/chips.py",
        "POOL = 0.92",
        "POOL = 1.0",
        ("test_cost_chips.py::test_constants_have_plausible_units",),
        False,
    ),
    Mutant(
        "Hopper's workspace on Ampere",
        "cost/roofline.py",
        "chip.capability[0] in (9, 10)",
        "chip.capability[0] in (8, 9, 10)",
        ("test_cost_roofline.py::test_memory_of_a_gpu",),
        False,
    ),
    Mutant(
        "a backward convolution's filter taken for its output",
        "cost/hlo.py",
        '"Filter": (result, right)',
        '"Filter": (right, result)',
        ("test_cost_hlo.py",),
        False,
    ),
    Mutant(
        "sampling on GPUs as a loop",
        "sampling/programs.py",
        'UNROLLED if platform == "gpu" else 0',
        "0",
        ("test_diffusion_samplers.py::test_on_gpus_few_steps_are_no_loop",),
        False,
    ),
    Mutant(
        "image to image that starts at the end of the grid",
        "diffusion/timesteps.py",
        "last = kept(original_steps, strength)",
        "last = max(num_steps, original_steps)",
        ("test_sampling_image_to_image.py::test_goldens_of_the_loop_without_a_network",),
    ),
    Mutant(
        "image to image without the noise of its start",
        "sampling/image_to_image.py",
        "schedule.alphas[t[0]] * z + schedule.sigmas[t[0]] * eps",
        "schedule.alphas[t[0]] * z + 0 * schedule.sigmas[t[0]] * eps",
        ("test_sampling_image_to_image.py::test_latents_of_diffusers_lcm_pipeline_with_torchs_noise",),
    ),
    Mutant(
        "the posterior's noise drawn behind the start",
        "sampling/noise.py",
        "early, start, late = entries(before, 1), entries(1, images), entries(behind, 1)",
        "start, early, late = entries(1, images), entries(before, 1), entries(behind, 1)",
        ("test_sampling_image_to_image.py::test_latents_of_diffusers_lcm_pipeline_with_torchs_noise",),
    ),
    Mutant(
        "latents of an image without the VAE's factor",
        "sampling/image_to_image.py",
        "return np.float32(self._vae.scaling_factor) * z",
        "return z",
        ("test_sampling_image_to_image.py::test_latents_of_diffusers_lcm_pipeline_with_torchs_noise",),
    ),
    Mutant(
        "inpainting that keeps what it should paint",
        "sampling/inpaint.py",
        "return (1 - m) * (alpha * z + sigma * eps) + m * x",
        "return m * (alpha * z + sigma * eps) + (1 - m) * x",
        ("test_sampling_inpaint.py::test_goldens_of_the_loop_without_a_network",),
    ),
    Mutant(
        "what is kept noised at this step's level, not at the next one's",
        "sampling/image_to_image.py",
        "np.append(table[t[1:]], np.float32(end))",
        "table[t]",
        ("test_sampling_inpaint.py::test_goldens_of_the_loop_without_a_network",),
    ),
    Mutant(
        "the mask behind the image in a UNet of 9 channels",
        "sampling/image_to_image.py",
        "np.concatenate([m, known], axis=-1)",
        "np.concatenate([known, m], axis=-1)",
        ("test_sampling_inpaint.py::test_latents_of_diffusers_with_a_unet_of_nine_channels",),
    ),
    Mutant(
        "a hole that is black, not grey",
        "sampling/image_to_image.py",
        "np.where(hole[:, :, None], np.float32(0), pixels)",
        "np.where(hole[:, :, None], np.float32(-1), pixels)",
        ("test_sampling_inpaint.py::test_latents_of_diffusers_with_a_unet_of_nine_channels",),
    ),
    Mutant(
        "a latent painted only if all of its pixels are",
        "sampling/inpaint.py",
        "hole.reshape(h, factor, w, factor).any(axis=(1, 3))",
        "hole.reshape(h, factor, w, factor).all(axis=(1, 3))",
        ("test_sampling_inpaint.py::test_cells_with_any_pixel_to_be_painted_are_painted",),
        False,
    ),
    Mutant(
        "kept pixels that the VAE has changed",
        "sampling/inpaint.py",
        "mixed = share * whole + (np.float32(1) - share) * self.original",
        "mixed = np.float32(1) * whole",
        ("test_sampling_inpaint.py::test_kept_pixels_are_those_of_the_image_bit_for_bit",),
        False,
    ),
    Mutant(
        "a ControlNet's residual of the middle left out",
        "models/unet.py",
        "x = x + residuals[-1].astype(x.dtype)",
        "x = x + 0 * residuals[-1].astype(x.dtype)",
        ("test_sampling_control.py::test_images_of_diffusers_with_two_nets_by_one_program",),
    ),
    Mutant(
        "a ControlNet's window that ends a step late",
        "sampling/control.py",
        "(i + 1) / steps > self.end",
        "i / steps > self.end",
        ("test_sampling_control.py::test_gains_by_step_and_skip",),
        False,
    ),
    Mutant(
        "gains of guess mode that fall",
        "sampling/control.py",
        "rising = 10.0 **",
        "rising = 0.1 **",
        ("test_sampling_control.py::test_gains_by_step_and_skip",),
        False,
    ),
    Mutant(
        "a phased map that goes to the origin",
        "diffusion/phases.py",
        'np.searchsorted(rising, limits, side="right") - 1',
        "np.zeros(limits.shape, int)",
        ("test_distill_phased.py::test_edges_are_the_samplers_timesteps",),
        False,
    ),
    Mutant(
        "a jump that rounds where it stands",
        "diffusion/phases.py",
        "jnp.where(broadcast_like(t - s, z_t) == 0, jnp.asarray(z_t, jnp.float32), z_s)",
        "z_s",
        ("test_distill_phased.py::test_the_target_is_z_end_itself_at_the_start_of_a_phase",),
        False,
    ),
    Mutant(
        "a stage that begins one step late",
        "distill/objective.py",
        'step, side="right")',
        'step, side="left")',
        ("test_distill_phased.py::test_stages_change_where_steps_end_and_nothing_else",),
        False,
    ),
    Mutant(
        "tcd that adds noise to the whole jump",
        "diffusion/samplers.py",
        "np.floor((1 - gamma) * following)",
        "np.floor(following * 1.0)",
        ("test_diffusion_samplers.py::test_tcd_equals_diffusers[4-epsilon-0.3]",),
    ),
    Mutant(
        "euler_ancestral without its way up",
        "diffusion/samplers.py",
        "np.sqrt(1 - share**2)",
        "0 * share",
        ("test_diffusion_samplers.py::test_euler_equals_diffusers[4-epsilon-euler_ancestral]",),
    ),
    Mutant(
        'dropped captions of SDXL as the states of ""',
        "data/encoding.py",
        "jnp.where(_rows_like(has_text, value), value, 0)",
        "value",
        ("test_run_data.py::test_dropped_captions_of_sdxl_are_its_own_null_text",),
        False,
    ),
    Mutant(
        "attention guidance that bounds each feature by itself",
        "sampling/nag.py",
        "jnp.abs(x).sum((2, 3), keepdims=True)",
        "jnp.abs(x)",
        ("test_sampling_nag.py::test_one_layer_is_the_formula_before_the_last_projection",),
    ),
    Mutant(
        "attention guidance by the paper's scale",
        "sampling/nag.py",
        "(scale - 1.0) * (z - negative)",
        "scale * (z - negative)",
        ("test_sampling_nag.py::test_one_layer_is_the_formula_before_the_last_projection",),
    ),
    Mutant(
        "attention guidance in self-attention",
        "sampling/nag.py",
        '_CROSS_ATTENTION = "attn2"',
        '_CROSS_ATTENTION = "attn1"',
        ("test_sampling_nag.py::test_images_of_diffusers_with_the_formula_in_its_attention",),
        False,
    ),
    Mutant(
        "a refiner that starts at the lowest point of the grid",
        "sampling/chain.py",
        "stop // spacing * spacing - 1",
        "spacing - 1",
        ("test_sampling_chain.py::test_where_the_base_hands_over",),
        False,
    ),
    Mutant(
        "an image without noise handed to the refiner",
        "sampling/chain.py",
        "_noised(then.model.pipeline, asked.settings, z, fresh) if is_lcm",
        "z if is_lcm",
        ("test_sampling_chain.py::test_an_lcm_hands_over_with_the_noise_of_the_refiners_first_timestep",),
    ),
    Mutant(
        "a base whose last step keeps its fresh noise to itself",
        "sampling/chain.py",
        "z + plan.table[-1][-1] * fresh",
        "z",
        ("test_sampling_chain.py::test_fresh_noise_of_the_bases_last_step_is_in_what_it_hands_over",),
    ),
    Mutant(
        "a refiner's second pass with the score of its first",
        "sampling/generator.py",
        "text.NULL_SCORE",
        "text.SCORE",
        ("test_sampling_chain.py::test_base_and_refiner_are_diffusers_pipelines",),
    ),
    Mutant(
        "latents enlarged by cubic interpolation",
        "sampling/chain.py",
        '"bilinear"',
        '"cubic"',
        ("test_sampling_chain.py::test_hires_is_diffusers_image_to_image_from_enlarged_latents",),
    ),
    Mutant(
        "the second pass with the noise of the first",
        "sampling/noise.py",
        "_SECOND_PASS if again else 0",
        "0",
        ("test_sampling_chain.py::test_the_second_pass_has_noise_of_its_own",),
    ),
    Mutant(
        "int8 weights with one scale for all channels",
        "models/int8.py",
        "np.abs(kernel).max(tuple(range(kernel.ndim - 1)))",
        "np.full(kernel.shape[-1], np.abs(kernel).max())",
        ("test_sampling_memory.py::test_quantised_kernels_are_off_by_half_a_step_at_most",),
        False,
    ),
    Mutant(
        "int8 weights rounded down",
        "models/int8.py",
        "np.rint(kernel /",
        "np.floor(kernel /",
        ("test_sampling_memory.py::test_quantised_kernels_are_off_by_half_a_step_at_most",),
        False,
    ),
    Mutant(
        "int8 weights whole before the loop over the steps",
        "models/int8.py",
        "if self.barriers:",
        "if True:",
        ("test_sampling_memory.py::test_dequantised_kernels_are_never_all_whole_at_once",),
        False,
    ),
    Mutant(
        "int8 weights of the first layer",
        "models/int8.py",
        '("conv_in", "conv_out",',
        '("conv_out",',
        ("test_sampling_memory.py::test_what_is_stored_in_8_bits",),
        False,
    ),
    Mutant(
        "a LoRA left out of int8 weights",
        "sampling/load.py",
        "return int8.change(path, value) if",
        "return int8.change(path, value if change is None else value - change()) if",
        ("test_sampling_memory.py::test_a_lora_is_added_before_and_refused_after",),
        False,
    ),
    Mutant(
        "offloaded networks that stay on the device",
        "sampling/offload.py",
        "del self._visiting[part]",
        "pass",
        ("test_sampling_memory.py::test_offloaded_networks_are_on_the_device_only_while_they_run",),
        False,
    ),
    Mutant(
        "sliced decoding of all images at once",
        "runtime/mesh.py",
        "rows.reshape(devices, -1, *rows.shape[1:])",
        "rows.reshape(rows.shape[0], -1, *rows.shape[1:])",
        ("test_sampling_memory.py::test_sliced_decodes_one_image_at_a_time",),
        False,
    ),
    Mutant(
        "norms held in 16 bits",
        "models/layers.py",
        'path[-1] == "embedding" or (*path[:-1], "scale") in flat',
        'path[-1] == "embedding"',
        ("test_pretrained_model.py::test_weights_held_as_they_are_used_compute_the_same_bits",),
        False,
    ),
    Mutant(
        "a LoRA added to a rounded weight",
        "pretrained/names.py",
        "change(parameter.path, to_jax(tensor, parameter, np.float32))",
        "change(parameter.path, to_jax(tensor, parameter, dtype))",
        ("test_sample_lora.py::test_loras_are_added_in_float32_and_rounded_once",),
        False,
    ),
    Mutant(
        "three sums of squares an array on GPUs",
        "distill/step.py",
        "cuda=_squared_together",
        "cuda=_squared_by_products",
        ("test_distill_step.py::test_a_gpus_program_sums_the_norms_of_an_array_at_once",),
        False,
    ),
    Mutant(
        "what a visitor has overtaken has its turn",
        "page/turns.py",
        "mine = not self._overtaken(visitor, number)",
        "mine = True",
        ("test_page.py::test_of_a_visitor_only_the_newest_request_that_waits_has_a_turn",),
        False,
    ),
    Mutant(
        "an answer without the token",
        "page/guard.py",
        "if self._token is not None and not self._known(scope, headers):",
        "if self._token is None and not self._known(scope, headers):",
        ("test_page.py::test_every_route_needs_the_token",),
        False,
    ),
    Mutant(
        "objects as values, which Gradio takes for files",
        "page/guard.py",
        "isinstance(one, str | int | float | None)",
        "isinstance(one, str | int | float | dict | None)",
        ("test_page.py::test_values_are_texts_and_numbers",),
        False,
    ),
    Mutant(
        "a checkpoint of an earlier stage recorded as one of the last",
        "export.py",
        "phases_after(config, step)",
        "phases_after(config, config.train.steps)",
        ("test_export.py::test_a_checkpoint_of_an_earlier_stage_has_the_phases_that_it_was_trained_for",),
        False,
    ),
    Mutant(
        "a foreign config.json is replaced",
        "runtime/workdir.py",
        "_check_replaceable(path, config)\n        if begun",
        "pass\n        if begun",
        ("test_runtime_workdir.py::test_a_config_that_is_none_of_a_run_is_not_replaced",),
        False,
    ),
]


def copy_to(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code, and what it said, for tests of the copy in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    command = [sys.executable, "-m", "pytest", "-m", "not (gpu or aot or gpu_aot or tpu_aot)", "-q"]
    command += ["--tb=short", "--durations=0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def judge(mutant: Mutant) -> tuple[bool, str]:
    """Whether its tests notice a mutant, and its row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        file = folder / "lcm_jax" / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            return False, f"{mutant.name} | {mutant.file} has {text.count(mutant.old)} times {mutant.old!r} |"
        file.write_text(text.replace(mutant.old, mutant.new))
        code, said = run_tests(folder, mutant.tests)
    failed = re.findall(r"^FAILED tests/(\S+)", said, re.MULTILINE)
    ratios = [float(ratio) for ratio in re.findall(r"^E .*?(\S+) times the bound", said, re.MULTILINE)]
    ratio = max(ratios, default=0.0)
    if code not in (0, 1):
        return False, f"{mutant.name} | pytest ended with {code}: {said[-500:]} |"
    noticed = bool(failed) and (not mutant.numeric or ratio >= FACTOR)
    first = failed[0] + (f" and {len(failed) - 1} more" if len(failed) > 1 else "") if failed else "no test"
    return noticed, f"{mutant.name} | {first} | {f'{ratio:.3g}' if ratios else ''}"


def main(words: list[str]) -> int:
    chosen = [m for m in NUMBERS + CONTRACTS if not words or any(word in m.name for word in words)]
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        code, said = run_tests(Path(name), tuple(dict.fromkeys(test for m in chosen for test in m.tests)))
    if code:
        print(f"the tests do not pass on the unchanged package:\n{said[-3000:]}")
        return 1
    print("mutant | test that fails | error over bound", flush=True)
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        for noticed, row in pool.map(judge, chosen):
            print(row if noticed else f"NOT NOTICED: {row}", flush=True)
            survivors += not noticed
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants noticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
