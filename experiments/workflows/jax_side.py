"""The `lcm_jax` side of a workflow: a call of the model, from the prompt to Pillow images."""

import itertools

import lcm_jax
from experiments.speed import side
from experiments.speed.side import Prepared
from experiments.workflows import cases
from experiments.workflows.workloads import GUIDANCE_SCALE, INPUTS, PROMPT, STEPS, STRENGTH, Workflow
from lcm_jax.data import shapes


def prepare(workflow: Workflow) -> Prepared:
    model, batch = lcm_jax.load(workflow.folder), workflow.batch
    net = model.control_net("shapes_controlnet") if workflow.kind == "ControlNet" else None
    shared = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "num_images": batch, "batch_size": batch}

    def options(spec: shapes.Spec) -> dict:
        if workflow.kind == "image to image":
            return {"image": shapes.render(spec), "strength": STRENGTH}
        if workflow.kind == "inpainting":
            return {"image": shapes.render(spec), "mask": cases.mask_of(spec), "strength": 1.0}
        return {"control": [lcm_jax.Control(net, shapes.outline(spec))]} if net else {}

    inputs = itertools.cycle([options(shapes.spec(number, "heldout")) for number in range(INPUTS)])
    return Prepared(
        ways={"lcm_jax": lambda: model(PROMPT, **shared, **next(inputs))},
        wait=lambda images: None,  # they are on the host
        finite=lambda images: len(images) == batch,  # a call raises for what is not finite
        peak_bytes=side.resident_peak,
    )
