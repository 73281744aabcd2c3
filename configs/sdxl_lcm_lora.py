"""LCM-LoRA of SDXL-base 1.0 at 1024 pixels.

Command   python -m lcm_jax.train --config=configs/sdxl_lcm_lora.py --workdir=runs/sdxl_lcm_lora
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sdxl_lcm`
Hardware  12.7 GB before activations: the base once in bfloat16 (5.1 GB), 20 bytes for each of 197 million adapter
          weights, VAE and text encoders. Modelled: 110.5 GiB on one h200 (experiments/aot); not yet measured
Time      Not yet measured
Source    LCM-LoRA report: 197 million weights, guidance scale 7.5; README of diffusers' scripts: as in `sdxl_lcm`,
          with the adapters of `sd15_lcm_lora` instead of the whole model
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    full = runpy.run_path(str(Path(__file__).with_name("sdxl_lcm.py")))["get_config"]()
    return runpy.run_path(str(Path(__file__).with_name("sd15_lcm_lora.py")))["with_adapters"](full)
