"""Phased LCM-LoRA of SDXL-base 1.0 at 1024 pixels, for 4 steps, with negative prompts.

Command   python -m lcm_jax.train --config=configs/sdxl_pcm_lora.py --workdir=runs/sdxl_pcm_lora
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sdxl_lcm`
Hardware  As `sdxl_lcm_lora`: the same networks at the same batch; not yet measured
Time      Not yet measured
Source    As `sd15_pcm_lora`, whose changes it makes to `sdxl_lcm_lora`; PCM's run of SDXL has lr 2e-6, 40 solver steps,
          w in [6, 7]. Dropped captions become zeros, SDXL's own null text
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    lora = runpy.run_path(str(Path(__file__).with_name("sdxl_lcm_lora.py")))["get_config"]()
    changes = runpy.run_path(str(Path(__file__).with_name("sd15_pcm_lora.py")))
    config = changes["guided_by_a_second_pass"](changes["phased"](lora))
    config.train.learning_rate = 2e-6
    config.train.weight_decay = 0.0
    return config
