"""The torch side of a workflow: a call of diffusers' pipeline, eager, from the prompt to Pillow images."""

import itertools
import os

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from experiments.speed import side
from experiments.speed.side import Prepared
from experiments.workflows import cases
from experiments.workflows.workloads import GUIDANCE_SCALE, INPUTS, PROMPT, STEPS, STRENGTH, Workflow
from lcm_jax import assets
from lcm_jax.data import shapes

PIPELINES = {
    "text": LatentConsistencyModelPipeline,
    "image to image": LatentConsistencyModelImg2ImgPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
    "ControlNet": StableDiffusionControlNetPipeline,
}


def prepare(workflow: Workflow) -> Prepared:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    parts = {"safety_checker": None}
    if workflow.kind == "ControlNet":
        parts["controlnet"] = ControlNetModel.from_pretrained(assets.path("shapes_controlnet"))
    pipe = PIPELINES[workflow.kind].from_pretrained(workflow.folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    shared = {"prompt": [PROMPT] * workflow.batch, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}

    def options(spec: shapes.Spec) -> dict:
        image, size = Image.fromarray(shapes.render(spec)), {"height": shapes.RESOLUTION, "width": shapes.RESOLUTION}
        if workflow.kind == "image to image":  # it takes the image's size
            return {"image": image, "strength": STRENGTH}
        if workflow.kind == "inpainting":
            return {
                "image": image,
                "mask_image": Image.fromarray(255 * cases.mask_of(spec).astype(np.uint8)),
                "strength": 1.0,
                **size,
            }
        outlines = [Image.fromarray(shapes.outline(spec))] * workflow.batch
        return {"image": outlines, **size} if workflow.kind == "ControlNet" else size

    inputs = itertools.cycle([options(shapes.spec(number, "heldout")) for number in range(INPUTS)])
    return Prepared(
        ways={"eager": lambda: pipe(**shared, **next(inputs)).images},
        wait=lambda images: None,
        finite=lambda images: len(images) == workflow.batch,
        peak_bytes=side.resident_peak,
    )
