"""The images of a row by torch diffusers, in float32, from the files that `ours` has fetched: how far ours are away.

Found of it is "diffusers": {"images": [{"steps", "largest", "mean", "share"}], "same"}, or {"skipped": why}.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.acceptance import cases
from experiments.acceptance.cases import PROMPT, SEED, Case
from experiments.acceptance.check import arguments
from lcm_jax.ending import exit_code

NEEDS = ("torch", "diffusers", "peft")
# Two roundings to 8 bits may differ by one, and float32 differs between libraries in its last bits, which 8 steps of a
# deep network enlarge in a few pixels. Another sampler, timestep or weight moves most pixels.
CLOSE, MOST = 2, 0.001  # of 255; the share of values that may differ by more
SCHEDULERS = {
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
}


def main() -> None:
    case, out = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: all is there
    path = cases.path_of(out, case.name)
    found = json.loads(path.read_text())
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    unknown = {one["sampler"] for one in found["sampling"]} - SCHEDULERS.keys()
    if "diffusers" in found:  # ours does not fit in float32
        return
    if missing:
        found["diffusers"] = {"skipped": f"{', '.join(missing)} not installed; pip install 'lcm_jax[torch]'"}
    elif unknown:
        found["diffusers"] = {"skipped": f"no comparison of the sampler {', '.join(unknown)}"}
    else:
        import torch

        try:
            found["diffusers"] = compared(case, found, path.with_suffix(".npz"))
        except torch.cuda.OutOfMemoryError:
            found["diffusers"] = {"skipped": "diffusers in float32 does not fit this device"}
    cases.keep(out, case.name, found)


def compared(case: Case, found: dict[str, Any], ours: Path) -> dict[str, Any]:
    pipe, images = pipeline(case, found["files"]), []
    with np.load(ours) as arrays:
        for one in found["sampling"]:
            theirs = (generated(pipe, one) * 255).round()
            difference = np.abs(arrays[str(one["steps"])] - theirs)
            share = float((difference > CLOSE).mean())
            images.append({"steps": one["steps"], "largest": int(difference.max()), "share": share})
            images[-1]["mean"] = float(difference.mean())
    return {"images": images, "same": all(one["share"] <= MOST for one in images)}


def pipeline(case: Case, places: dict[str, Any]) -> Any:
    """diffusers' pipeline of a row, with its parts exchanged and its LoRAs merged."""
    import diffusers
    import torch

    if torch.cuda.is_available():  # TF32 has 10 bits
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options = {"torch_dtype": torch.float32, "variant": case.variant}
    folder = Path(places["model"])
    parts = {}
    if case.unet:
        parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(places["unet"], **options)
    if case.vae:
        parts["vae"] = diffusers.AutoencoderKL.from_pretrained(places["vae"], torch_dtype=torch.float32)
    if folder.is_file():
        index = json.loads((Path(places["model_config"]) / "model_index.json").read_text())
        kind = getattr(diffusers, index["_class_name"])
        pipe = kind.from_single_file(str(folder), config=places["model_config"], torch_dtype=torch.float32, **parts)
    else:
        index = json.loads((folder / "model_index.json").read_text())
        if "safety_checker" in index:  # ours has none, and has not fetched it
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options, **parts)
    for file, weight in places["lora"]:
        pipe.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
        pipe.fuse_lora(lora_scale=weight)
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def generated(pipe: Any, one: dict[str, Any]) -> np.ndarray:
    """An image [h w 3] in [0, 1], of what ours was asked for."""
    import diffusers
    import torch

    name, more = SCHEDULERS[one["sampler"]]
    if type(pipe.scheduler).__name__ != name or more:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    by_hand = {"timesteps": one["timesteps"]} if one["timesteps"] else {"num_inference_steps": one["steps"]}
    if one["sampler"] == "tcd":
        by_hand["eta"] = one["gamma"]
    height, width = one["size"]
    with torch.inference_mode():
        return pipe(
            prompt=[PROMPT],
            height=height,
            width=width,
            guidance_scale=one["guidance_scale"],
            generator=[torch.Generator().manual_seed(SEED)],
            output_type="np",
            **by_hand,
        ).images[0]


if __name__ == "__main__":
    sys.exit(exit_code(main))
