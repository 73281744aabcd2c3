"""Stable Diffusion 1.5 distilled at 512 pixels: the recipe of diffusers' `consistency_distillation` README.

Command   python -m lcm_jax.train --config=configs/sd15_lcm.py --workdir=runs/sd15_lcm
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      Captioned images of at least 512 pixels; the README uses CC12M, as img2dataset writes it, on the hub as
          pixparse/cc12m-wds (for other formats set --config.data.source). For a dry run on rendered images set
          --config.data.source=shapes, and no path
Hardware  Student, gradient, AdamW's moments and target in float32 and the teacher in bfloat16 take 18.9 GB before
          activations. Modelled: 29.7 GiB on one a100-40 (experiments/aot); not yet measured
Time      Not yet measured
Source    README of the script: lr 1e-6, weight decay 0, pseudo-Huber c = 1e-3, target EMA 0.95, batch 12, 1,000
          steps, checkpoints and samples every 200. Its defaults: w in [5, 15], 50 solver steps (k = 20), w embedding
          of 256, timestep scaling 10, gradients clipped at norm 1, random crops, bilinear
Deviates  AdamW in float32 instead of 8 bits; bfloat16 instead of float16, and only inside the networks; the w
          projection starts at zero (LCM paper), not at random
Result    Not yet measured. 12,000 images are a demonstration: the LCM paper's run takes 7.2 million
          (`sd21_base_lcm`)

Every other full-size config starts from this one.
"""

from lcm_jax.config import default_config


def get_config():
    config = default_config()
    config.model.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.model.prediction_type = "epsilon"
    config.data.source = "webdataset"
    config.data.resolution = 512
    config.data.resize_filter = "bilinear"
    config.data.batch_size = 12
    config.train.steps = 1_000
    config.train.learning_rate = 1e-6
    config.train.weight_decay = 0.0
    config.train.ema_decay = 0.95
    config.train.max_grad_norm = 1.0
    config.distill.solver_steps = 50
    config.distill.w_min = 5.0
    config.distill.w_max = 15.0
    config.distill.loss = "huber"
    config.distill.huber_c = 1e-3
    config.distill.w_embedding_dim = 256
    config.distill.timestep_scaling = 10.0
    config.checkpoint.every = 200
    config.checkpoint.keep = 10
    config.sample.every = 200
    config.sample.steps = 4
    config.sample.guidance_scale = 8.0
    config.sample.prompts = (
        "a photo of a red fox in the snow, soft morning light",
        "portrait of an old fisherman, oil painting",
        "a lighthouse on a cliff above a stormy sea, highly detailed",
        "a bowl of ramen on a wooden table, food photography",
    )
    return config
