"""LCM-LoRA of NoobAI-XL V-Pred, v-prediction with zero terminal SNR, from one file, on one 24 GB card.

Command   python -m lcm_jax.train --config=configs/noobai_vpred_lcm_lora.py --workdir=runs/noobai_vpred_lcm_lora
              --config.data.path=FOLDER
Data      As in `illustrious_lcm_lora`
Hardware  As `my_sdxl_24gb`: the same networks at the same batch; not yet measured
Time      Not yet measured
Source    As `illustrious_lcm_lora`, from which this config starts. Guidance fixed at scale 5, that is w = 4, our
          choice. The file's name on the hub was not tried
Result    Not yet measured

What the file predicts is read from its keys: `v_pred`, and `ztsnr` for zero terminal SNR. A file that lacks `v_pred` is
refused here. In ComfyUI the LoRA goes without the node `ModelSamplingDiscrete` (docs/clients.md). Another fine-tune:
--config.model.teacher=MODEL.safetensors.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("illustrious_lcm_lora.py")))["get_config"]()
    config.model.teacher = "Laxhar/noobai-XL-Vpred-1.0/NoobAI-XL-Vpred-v1.0.safetensors"
    config.model.prediction_type = "v_prediction"
    config.distill.w_min = config.distill.w_max = 4.0
    return config
