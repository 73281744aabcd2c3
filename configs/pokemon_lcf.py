"""LCM_Dreamshaper_v7 fine-tuned (LCF) on captioned Pokemon, without a teacher: the paper's example.

Command   python -m lcm_jax.train --config=configs/pokemon_lcf.py --workdir=runs/pokemon_lcf
              --config.data.path=FOLDER_OR_HUB_ID
Data      lambdalabs/pokemon-blip-captions, some held out for evaluation. The hub no longer has it, and copies, such as
          reach-vb/pokemon-blip-captions, have no better licence: this config is for the paper's numbers. For a style
          of your own: --config.data.source=folder and captioned images; or lambdalabs/naruto-blip-captions
Hardware  17.2 GB before activations, without a teacher. Modelled: 50.6 GiB on one a100-80 (experiments/aot); not yet
          measured. --config.train.accumulation_steps=N takes the batch in parts
Time      Not yet measured
Source    Paper, LCF: 30,000 steps, target EMA. What it does not state for LCF is as in its distillation: lr 8e-6, EMA
          0.999943, w in [2, 14] and k = 20, which must be those the LCM was distilled with (`sd21_base_lcm`);
          resolution and batch as in `dreamshaper_v7_lcm`, from which this config starts
Result    Not yet measured. LCF pulls every w towards the unguided model, so long runs wear guidance away. To avoid
          that: fewer steps, or --config.model.teacher=Lykon/dreamshaper-7 --config.distill.lcd_weight=1
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("dreamshaper_v7_lcm.py")))["get_config"]()
    config.objective = "lcf"
    config.model.teacher = None
    config.model.student = "SimianLuo/LCM_Dreamshaper_v7"
    config.data.source = "huggingface"
    config.train.steps = 30_000
    config.train.ema_decay = 0.999943
    config.checkpoint.every = 1_000
    config.sample.every = 1_000
    config.sample.prompts = (
        "a drawing of a green pokemon with red eyes",
        "a cartoon picture of a yellow pokemon with a long tail",
        "a blue pokemon with a shell on its back",
        "a drawing of a dragon pokemon that breathes fire",
    )
    return config
