"""SSD-1B, half of SDXL, distilled at 1024 pixels.

Command   python -m lcm_jax.train --config=configs/ssd1b_lcm.py --workdir=runs/ssd1b_lcm
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sdxl_lcm`
Hardware  29.3 GB before activations (22 bytes for each of 1.33 billion weights), 3.6 GB of VAE and text encoders.
          Modelled: 72.9 GiB on one h200 (experiments/aot); not yet measured
Time      Not yet measured
Source    None is published for this model's LCM: all as in `sdxl_lcm` (README of diffusers' scripts), whose structure
          it has; segmind/Segmind-Vega works likewise, with --config.model.teacher
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sdxl_lcm.py")))["get_config"]()
    config.model.teacher = "segmind/SSD-1B"
    return config
