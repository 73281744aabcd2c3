"""The embedded teacher: loads in diffusers, generates the same there, and is as good as its recorded rows say; and its
ControlNet."""

import re
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import tiny
import torch

import lcm_jax
from experiments import embedded
from experiments.shapes_controlnet import train
from experiments.workflows import cases
from lcm_jax import assets, foreign
from lcm_jax.data import shapes
from lcm_jax.metrics.networks import shapes as shapes_scorer
from lcm_jax.sampling.generator import draw_noise
from lcm_jax.sampling.png import to_uint8

LARGEST_BYTES = {"shapes": 16 * 2**20, "shapes_controlnet": 4_000_000}
CAPTIONS = [shapes.caption(shapes.spec(i, "heldout")) for i in range(64)]


@pytest.mark.parametrize("name", LARGEST_BYTES)
def test_size(name):
    size = sum(path.stat().st_size for path in assets.path(name).rglob("*") if path.is_file())
    assert size <= LARGEST_BYTES[name]


def test_every_word_of_the_captions_is_one_token():
    tokenizer = lcm_jax.load("shapes").pipeline.tokenizer
    captions = [shapes.caption(shapes.spec(i)) for i in range(500)]  # of all forms, with all words
    assert {f"{word}</w>" for word in re.findall(r"\w+|,", " ".join(captions))} <= tokenizer.vocabulary().keys()


def test_images_show_what_captions_name():
    """By 4 guided DDIM steps."""
    images = lcm_jax.load("shapes")(CAPTIONS, sampler="ddim", steps=4, guidance_scale=3.0, batch_size=32)
    predicted, _ = shapes_scorer.score(np.stack(images))
    assert shapes_scorer.caption_accuracy(predicted, shapes.label_arrays(CAPTIONS)) >= 0.9


@pytest.mark.slow
def test_diffusers_makes_the_same_images():
    """StableDiffusionPipeline on the folder, DDIM with 4 trailing steps, from the same latents."""
    pipe = tiny.torch_pipeline(diffusers.StableDiffusionPipeline, assets.path("shapes"), diffusers.DDIMScheduler)
    noise = draw_noise(0, range(4), 4, (8, 8, 4))
    latents = torch.from_numpy(np.ascontiguousarray(noise[0].transpose(0, 3, 1, 2)))
    theirs = pipe(CAPTIONS[:4], num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np").images
    model = lcm_jax.load("shapes")
    ours = model.decode(model.latents(model.encode(CAPTIONS[:4]), noise, 3.0, lcm_jax.Settings("ddim", 4)))
    assert np.abs(to_uint8(ours).astype(int) - to_uint8(theirs).astype(int)).max() <= 2
    predicted, _ = shapes_scorer.score(to_uint8(ours))
    # Pictures of the captions, not just equal noise.
    assert shapes_scorer.caption_accuracy(predicted, shapes.label_arrays(CAPTIONS[:4])) >= 0.75


def test_the_control_net_is_this_teachers_and_loads_in_diffusers():
    made = foreign.read_json(Path(train.__file__).with_name("made.json"))
    assert made == {"teacher": embedded.asset_hash(assets.path("shapes")), "steps": train.STEPS}, "train it again"
    net = lcm_jax.load("shapes").control_net("shapes_controlnet")
    theirs = diffusers.ControlNetModel.from_pretrained(assets.path("shapes_controlnet"))
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.size for p in jax.tree.leaves(net.params))


@pytest.mark.slow
def test_the_control_net_follows_outlines():
    """Of a teacher whose captions do not name what they show, by 4 guided DDIM steps."""
    model, specs = lcm_jax.load("shapes"), [shapes.spec(i, "heldout") for i in range(32)]
    net, asked = model.control_net("shapes_controlnet"), {"sampler": "ddim", "steps": 4, "guidance_scale": 3.0}
    images = [
        model("a shape", control=[lcm_jax.Control(net, shapes.outline(spec))], num_images=1, **asked)[0]
        for spec in specs
    ]
    labels = {name: value for name, value in shapes.label_arrays(specs).items() if name in cases.OUTLINED}
    ignored = {name: np.full(len(specs), -1) for name in shapes.ATTRIBUTES}
    assert shapes_scorer.caption_accuracy(shapes_scorer.score(np.stack(images))[0], ignored | labels) >= 0.8


@pytest.fixture(scope="module")
def record():
    return embedded.teacher_record()  # refuses the rows of another asset


def recorded(rows, **wanted):
    """The one row with these values."""
    (found,) = [row for row in rows if wanted.items() <= row.items()]
    return found


def test_the_best_guidance_scale_is_that_of_the_scan(record):
    """The smallest distance of those whose interval of accuracy overlaps that of the best."""
    rows = sorted(record["scan"], key=lambda row: row["accuracy"])
    low, _ = rows[-1]["intervals"]["accuracy"]
    near = {row["frechet"]: row["guidance_scale"] for row in rows if row["intervals"]["accuracy"][1] >= low}
    assert embedded.best_guidance_scale() == near[min(near)] > 1.0


def test_recorded_rows_show_what_a_teacher_must(record):
    """It needs its guidance and its steps, and without guidance it covers what captions leave open."""
    rows = embedded.recorded_rows(embedded.DEMO)
    names = ("renders", "VAE reconstructions", "one render of each caption")
    renders, again, single = (recorded(rows, method=name) for name in names)
    assert again["accuracy"] >= 0.99 and renders["collapsed"] <= 0.02 and single["collapsed"] == 1.0
    assert abs(renders["coverage"]) < 0.02 and single["coverage"] > 0.2

    def ddim(steps, scale):
        return recorded(rows, method="DDIM", steps=steps, guidance_scale=scale)

    guided, unguided, one = ddim(50, record["best_guidance_scale"]), ddim(50, 1.0), ddim(1, 1.0)
    assert guided["accuracy"] >= 0.95 * again["accuracy"]
    assert guided["accuracy"] > unguided["accuracy"] > 0.8 * again["accuracy"]
    assert unguided["coverage"] <= renders["coverage"] + 0.03
    assert unguided["coverage"] < ddim(50, embedded.HIGH_SCALE)["coverage"]  # what guidance costs
    assert one["accuracy"] <= 0.6 * unguided["accuracy"] and one["frechet"] >= 3 * unguided["frechet"]
