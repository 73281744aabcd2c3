"""ComfyUI workflows for what `lcm_jax.export` writes, made from the settings in `lcm_jax.run.clients`.

    python -m lcm_jax.run.comfyui docs/comfyui        writes one JSON file for each kind of export

They have ComfyUI's API format, node id -> {"class_type", "inputs"}, where ["4", 0] is output 0 of node "4". ComfyUI
opens it as a workflow; its server takes it as `POST /prompt` {"prompt": ...}. Nodes and inputs are those of ComfyUI
0.3.64.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lcm_jax import files
from lcm_jax.run.clients import FILE, KOHYA, MAPS, PROGRAMS

KINDS = {FILE: "checkpoint", KOHYA: "lora"}  # of exports that ComfyUI takes -> in a workflow's name
PREDICTION_TYPES = ("epsilon", "v_prediction")
STEPS = 4
_NODE = re.compile(r"(no )?node `ModelSamplingDiscrete` with `(\w+)`")
_SAMPLER = re.compile(r"KSampler: sampler `(\w+)`, scheduler `(\w+)`, CFG (\d+)")


def workflow(kind: str, which: str, prediction_type: str, side: int = 512) -> dict[str, Any]:
    """The nodes from the files to the image; kind: of `KINDS`; which: of `clients.MAPS`; side: of images, in pixels."""
    settings = PROGRAMS[0].settings[which, prediction_type]
    without, sampling = _NODE.search(settings).groups()
    sampler, scheduler, cfg = _SAMPLER.search(settings).groups()
    nodes: dict[str, Any] = {}

    def node(class_type: str, **inputs: Any) -> str:
        nodes[name := str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return name

    loader = node("CheckpointLoaderSimple", ckpt_name="base.safetensors" if kind == KOHYA else "mine.safetensors")
    model = [loader, 0]
    if kind == KOHYA:
        model = [node("LoraLoaderModelOnly", model=model, lora_name="mine.safetensors", strength_model=1.0), 0]
    if not without:
        model = [node("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False), 0]
    positive = node("CLIPTextEncode", clip=[loader, 1], text="a photo of a red fox in the snow")
    negative = node("CLIPTextEncode", clip=[loader, 1], text="")
    size = node("EmptyLatentImage", width=side, height=side, batch_size=1)
    sampled = node(
        "KSampler",
        model=model,
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=[size, 0],
        seed=0,
        steps=STEPS,
        cfg=float(cfg),
        sampler_name=sampler,
        scheduler=scheduler,
        denoise=1.0,
    )
    decoded = node("VAEDecode", samples=[sampled, 0], vae=[loader, 2])
    node("SaveImage", images=[decoded, 0], filename_prefix="lcm_jax")
    return nodes


def texts() -> dict[str, str]:
    """File name -> JSON, one node a line."""
    found = {}
    for kind, name in KINDS.items():
        for which in MAPS:
            for prediction_type in PREDICTION_TYPES:
                nodes = workflow(kind, which, prediction_type)
                lines = (f'"{number}": {json.dumps(node)}' for number, node in nodes.items())
                found[f"{name}-{which}-{prediction_type}.json"] = "{\n" + ",\n".join(lines) + "\n}\n"
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        files.write_atomic(folder / name, text)
