"""LCM-LoRA of SSD-1B at 1024 pixels.

Command   python -m lcm_jax.train --config=configs/ssd1b_lcm_lora.py --workdir=runs/ssd1b_lcm_lora
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sdxl_lcm`
Hardware  8.4 GB before activations: the base once in bfloat16 (2.7 GB), 20 bytes for each of 105 million adapter
          weights, VAE and text encoders. Modelled: 64.2 GiB on one a100-80 (experiments/aot); not yet measured
Time      Not yet measured
Source    LCM-LoRA report: 105 million weights, guidance scale 7.5; README of diffusers' scripts: as in `ssd1b_lcm`,
          with the adapters of `sd15_lcm_lora` instead of the whole model
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    full = runpy.run_path(str(Path(__file__).with_name("ssd1b_lcm.py")))["get_config"]()
    return runpy.run_path(str(Path(__file__).with_name("sd15_lcm_lora.py")))["with_adapters"](full)
