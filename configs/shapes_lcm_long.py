"""The embedded teacher distilled for longer than in the demo; otherwise as `configs/shapes_lcm.py`.

Data          16,384 images
Length        2,000 steps of 32 images
Optimiser     lr 5e-4, decays linearly to 0 from step 500; target EMA 0.98. With the demo's 1e-3 and 0.95, a run of this
              length ended worse than the demo's (measured on an earlier teacher)

    python -m experiments.shapes_lcm.demo --config=configs/shapes_lcm_long.py --workdir=runs/shapes_lcm_long

Results: experiments/shapes_lcm/.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("shapes_lcm.py")))["get_config"]()
    config.data.num_examples = 16_384
    config.train.steps = 2_000
    config.train.learning_rate = 5e-4
    config.train.lr_decay_start = 500
    config.train.lr_decay_steps = 1_500
    config.train.ema_decay = 0.98
    config.checkpoint.every = 500
    config.sample.every = 500
    return config
