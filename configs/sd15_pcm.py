"""Phased distillation of the whole of Stable Diffusion 1.5 at 512 pixels, conditioned on w: 8 phases, then 4.

Command   python -m lcm_jax.train --config=configs/sd15_pcm.py --workdir=runs/sd15_pcm
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sd15_lcm`
Hardware  As `sd15_lcm`: the same networks at the same batch; not yet measured
Time      Not yet measured
Source    As `sd15_lcm`, from which it starts, with the map of PCM (arXiv 2405.18407). That w is an input, as in LCM, is
          ours: PCM fixes it. So are stages, after Hyper-SD (arXiv 2404.13686), which halves the phases in turn
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    full = runpy.run_path(str(Path(__file__).with_name("sd15_lcm.py")))["get_config"]()
    config = runpy.run_path(str(Path(__file__).with_name("sd15_pcm_lora.py")))["phased"](full, 8)
    config.distill.stages = (f"4:{config.train.steps // 2}",)
    config.sample.steps = 4
    return config
