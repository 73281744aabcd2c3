"""LCM-LoRA of Illustrious XL, or of any of its fine-tunes that predict epsilon, on one 24 GB card.

Command   python -m lcm_jax.train --config=configs/illustrious_lcm_lora.py --workdir=runs/illustrious_lcm_lora
              --config.data.path=FOLDER
Data      Illustrations with their tags as captions, as "1girl, solo, night sky": in a .txt beside each. Without any:
          the model makes them of lines of tags (docs/my_model.md)
Hardware  As `my_sdxl_24gb`: the same networks at the same batch; not yet measured
Time      Not yet measured
Source    As `my_sdxl_24gb`, from which this config starts. Guidance fixed at scale 6, that is w = 5, our choice: the
          card of NoobAI-XL 1.0, a fine-tune of this model, recommends 5 to 6. The file's name on the hub was not tried
Result    Not yet measured

Another fine-tune: --config.model.teacher=MODEL.safetensors.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("my_sdxl_24gb.py")))["get_config"]()
    config.model.teacher = "OnomaAIResearch/Illustrious-xl-early-release-v0/Illustrious-XL-v0.1.safetensors"
    config.model.prediction_type = "epsilon"
    config.distill.w_min = config.distill.w_max = 5.0
    config.sample.prompts = (
        "1girl, solo, silver hair, kimono, cherry blossoms, looking at viewer, masterpiece, best quality",
        "no humans, scenery, lighthouse, cliff, ocean, sunset, cloudy sky, masterpiece, best quality",
        "1boy, knight, armor, sword, standing, castle, night, masterpiece, best quality",
        "cat, sitting, window, rain, indoors, no humans, masterpiece, best quality",
    )
    return config
