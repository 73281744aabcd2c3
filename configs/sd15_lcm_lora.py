"""LCM-LoRA of Stable Diffusion 1.5 at 512 pixels: adapters that make any of its fine-tunes a few-step model.

Command   python -m lcm_jax.train --config=configs/sd15_lcm_lora.py --workdir=runs/sd15_lcm_lora
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sd15_lcm`
Hardware  3.1 GB before activations: the base once in bfloat16 (1.7 GB), 20 bytes for each of 67.5 million adapter
          weights. Modelled: 17.6 GiB on one l4 (experiments/aot); not yet measured
Time      Not yet measured
Source    LCM-LoRA report: 67.5 million weights in the 14 kinds of layers, guidance fixed at scale 7.5, that is w = 6.5;
          no EMA. README of diffusers' scripts: rank 64, lr 1e-4; defaults of its script: alpha 64; all else
          as in `sd15_lcm`, from which this config starts
Deviates  The script draws w from [5, 15], although adapters cannot be conditioned on it; here w is the report's
          single value
Result    Not yet measured

`with_adapters` turns any config of a full run into that of its LCM-LoRA.
"""

import runpy
from pathlib import Path


def with_adapters(config):
    config.lora.rank = 64
    config.lora.alpha = 64.0
    config.train.learning_rate = 1e-4
    config.train.ema_decay = 0.0
    config.distill.w_embedding_dim = 0
    config.distill.w_min = config.distill.w_max = 6.5
    config.sample.guidance_scale = 1.0
    return config


def get_config():
    return with_adapters(runpy.run_path(str(Path(__file__).with_name("sd15_lcm.py")))["get_config"]())
