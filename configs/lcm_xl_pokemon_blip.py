"""SDXL distilled on 833 captioned images into a student without w embedding: diffengine's `lcm_xl_pokemon_blip`.

Command   python -m lcm_jax.train --config=configs/lcm_xl_pokemon_blip.py --workdir=runs/lcm_xl_pokemon_blip
              --config.data.path=FOLDER_OR_HUB_ID
          python -m lcm_jax.export --workdir=runs/lcm_xl_pokemon_blip --out=unet --format=unet --weights=online
          python -m lcm_jax.sample --model=stabilityai/stable-diffusion-xl-base-1.0 --unet=unet
              --vae=madebyollin/sdxl-vae-fp16-fix --steps=4 --guidance_scale=1 --prompt="..." --out=pictures
Data      lambdalabs/pokemon-blip-captions, flipped with probability 1/2. The hub no longer has
          it: use a copy, or a similar set, such as lambdalabs/naruto-blip-captions
Hardware  As in `sdxl_lcm`, two images at a time. Modelled: 75.6 GiB on one h200 (experiments/aot); not yet
          measured
Time      Not yet measured
Source    diffengine, schedules and models of lcm_xl: lr 1e-6, weight decay 0, gradients clipped at norm 1, batch 2 in 2
          parts, 50 epochs (10,413 updates of 4 images), w in [3, 15], 50 solver steps, target EMA 0.95, Huber loss,
          fp16-fix VAE; the rest as in `sdxl_lcm`, from which this config starts
Deviates  Pseudo-Huber with c = 1 instead of Huber with delta = 1: both are d^2 / 2 for small d and have slope 1 for
          large d. The EMA moves once per update; diffengine's also moves after every part of it, and starts as a
          copy of the student. The skip k is always an integer. AdamW in float32 instead of 8 bits
Result    Not yet measured. Without the embedding the student learns the mean over w, and samples at guidance scale 1.
          It is here to repeat diffengine's run; for a model and images of your own: `my_sdxl_24gb`
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sdxl_lcm.py")))["get_config"]()
    config.data.source = "huggingface"
    config.data.filters = ()
    config.data.flip = 0.5
    config.data.batch_size = 4
    config.train.accumulation_steps = 2
    config.train.steps = 10_413
    config.distill.huber_c = 1.0
    config.distill.w_embedding_dim = 0
    config.checkpoint.every = 1_000
    config.sample.every = 1_000
    config.sample.guidance_scale = 1.0
    config.sample.prompts = (
        "a drawing of a green creature with red eyes",
        "a cartoon of a small yellow mouse with a lightning tail",
        "a blue turtle with a shell on its back",
        "a picture of a dragon that breathes fire",
    )
    return config
