"""An LCM-LoRA of the embedded teacher; otherwise as `configs/shapes_lcm.py`.

Method        LCD of adapters on the teacher's frozen UNet: rank 16, alpha 16, the LCM-LoRA report's 14 target modules
Guidance      no w embedding: w = 1 throughout, guidance scale 2, the teacher's best
Target        EMA 0.95 of the adapters; --config.train.ema_decay=0 takes the student itself, as in the report
Optimiser     AdamW, lr 1e-3, decays linearly from step 500 to 0 at 1,000
Hardware      Two CPU cores. Modelled: 0.1 GiB on one rtx3060 (experiments/aot)

    python -m lcm_jax.train --config=configs/shapes_lcm_lora.py --workdir=runs/shapes_lcm_lora/lcm

Results: experiments/shapes_lcm_lora/.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("shapes_lcm.py")))["get_config"]()
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.distill.w_embedding_dim = 0
    config.distill.w_min = 1.0
    config.distill.w_max = 1.0
    config.train.steps = 1_000
    config.train.lr_decay_start = 500
    config.train.lr_decay_steps = 500
    config.checkpoint.every = 500
    config.sample.every = 500
    config.sample.guidance_scale = 1.0
    return config
