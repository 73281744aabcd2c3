"""The embedded teacher distilled on two CPU cores in a few minutes: what `make demo` runs.

Teacher       lcm_jax/assets/shapes_teacher, a Stable Diffusion for 64-pixel images of coloured shapes
Data          4,096 rendered images with captions, encoded once; no download
Method        LCD, DDIM grid of 50 points (k = 20), pseudo-Huber c = 1e-3, target EMA 0.95
Optimiser     AdamW, lr 1e-3, decays linearly to 0 in the second half; gradients clipped at norm 1
Guidance      w uniform in [0.5, 7]: guidance scales 1.5 to 8, which include the teacher's best and 7.5
Hardware      Two CPU cores. Modelled: 0.1 GiB on one rtx3060 (experiments/aot)

    python -m lcm_jax.train --config=configs/shapes_lcm.py --workdir=runs/shapes_lcm

Results: README.md and experiments/shapes_lcm/.
"""

from lcm_jax.config import default_config


def get_config():
    config = default_config()
    config.model.teacher = "shapes"
    config.data.source = "shapes"
    config.data.resolution = 64
    config.data.batch_size = 32
    config.data.num_examples = 4096
    config.data.encode = "start"
    config.train.steps = 800
    config.train.learning_rate = 1e-3
    config.train.lr_decay_start = 400
    config.train.lr_decay_steps = 400
    config.train.ema_decay = 0.95
    config.distill.loss = "huber"
    config.distill.huber_c = 1e-3
    config.distill.w_min = 0.5
    config.distill.w_max = 7.0
    config.checkpoint.every = 400
    config.checkpoint.keep = 2
    config.log.every = 10
    config.sample.every = 400
    config.sample.steps = 4
    config.sample.guidance_scale = 2.0
    config.sample.prompts = (
        "a large red circle at the center on a white background",
        "at the top left there is a blue shape",
        "triangle, small, black background",
        "a yellow star",
    )
    return config
