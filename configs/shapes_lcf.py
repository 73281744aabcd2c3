"""The embedded LCM fine-tuned on images of another style, without its teacher; otherwise as `configs/shapes_lcm.py`.

Start         the export of `make demo`, runs/shapes_lcm/export: a full LCM with w embedding
Data          4,096 renders in the style "card" (lcm_jax/data/shapes.py), which their captions do not mention
Method        LCF; --config.distill.lcd_weight=0.5 --config.model.teacher=shapes adds LCD, which keeps guidance
Optimiser     AdamW, lr 5e-4, decays linearly from step 200 to 0 at 400

    python -m lcm_jax.train --config=configs/shapes_lcf.py --workdir=runs/shapes_lcf/lcf

Results: experiments/shapes_lcf/.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("shapes_lcm.py")))["get_config"]()
    config.objective = "lcf"
    config.model.teacher = None
    config.model.student = "runs/shapes_lcm/export"
    config.data.style = "card"
    config.train.steps = 400
    config.train.learning_rate = 5e-4
    config.train.lr_decay_start = 200
    config.train.lr_decay_steps = 200
    config.checkpoint.every = 200
    config.sample.every = 200
    return config
