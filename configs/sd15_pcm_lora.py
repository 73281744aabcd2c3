"""Phased LCM-LoRA of Stable Diffusion 1.5 at 512 pixels, for 4 steps, with negative prompts.

Command   python -m lcm_jax.train --config=configs/sd15_pcm_lora.py --workdir=runs/sd15_pcm_lora
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      As in `sd15_lcm`
Hardware  As `sd15_lcm_lora`: the same networks at the same batch; not yet measured
Time      Not yet measured
Source    PCM (arXiv 2405.18407) and its released scripts: rank 64, Adam, weight decay 1e-3, gradients clipped at 1, no
          EMA; TDD (arXiv 2409.01347): w = 3.5 fixed and a fifth of the captions dropped, so that the student knows the
          null text and takes guidance scales of 1 to 3.5 with a negative prompt
Deviates  40 solver steps instead of 50, so that the edges 749, 499, 249 are what every program samples 4 steps at;
          alpha 64 (theirs: 8); lr 1e-5, between the 5e-6 of PCM and the 1e-4 of LCM-LoRA
Result    Not yet measured

`phased` turns any config of a run that starts from a teacher into that of a phased map.
"""

import runpy
from pathlib import Path


def phased(config, phases=4):
    config.distill.map = "phased"
    config.distill.phases = config.sample.steps = phases
    config.distill.solver_steps = 40
    return config


def get_config():
    lora = runpy.run_path(str(Path(__file__).with_name("sd15_lcm_lora.py")))["get_config"]()
    return guided_by_a_second_pass(phased(lora))


def guided_by_a_second_pass(config):
    config.train.learning_rate = 1e-5
    config.train.weight_decay = 1e-3
    config.data.caption_dropout = 0.2
    config.distill.w_min = config.distill.w_max = 3.5
    return config
