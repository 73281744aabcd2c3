"""The embedded teacher: loads in diffusers, generates the same there, and is as good as its recorded rows say."""

import diffusers
import numpy as np
import pytest
import torch

import lcm_jax
from experiments import embedded
from lcm_jax import assets
from lcm_jax.data import shapes
from lcm_jax.metrics.networks import shapes as shapes_scorer
from lcm_jax.sampling.generator import draw_noise
from lcm_jax.sampling.png import to_uint8

LARGEST_BYTES = 16 * 2**20
CAPTIONS = [shapes.caption(shapes.spec(i, "heldout")) for i in range(4)]


def test_size():
    size = sum(path.stat().st_size for path in assets.path("shapes").rglob("*") if path.is_file())
    assert size <= LARGEST_BYTES


@pytest.mark.slow
def test_diffusers_draws_the_same():
    """StableDiffusionPipeline on the folder, DDIM with 4 trailing steps, from the same latents."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(assets.path("shapes")))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    noise = draw_noise(0, range(4), 4, (8, 8, 4))
    latents = torch.from_numpy(np.ascontiguousarray(noise[0].transpose(0, 3, 1, 2)))
    theirs = pipe(CAPTIONS, num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np").images
    model = lcm_jax.load("shapes")
    ours = model.decode(model.latents(model.encode(CAPTIONS), noise, 3.0, lcm_jax.Settings("ddim", 4)))
    assert np.abs(to_uint8(ours).astype(int) - to_uint8(theirs).astype(int)).max() <= 2
    predicted, _ = shapes_scorer.score(to_uint8(ours))
    right = shapes_scorer.attribute_accuracies(predicted, shapes.label_arrays(CAPTIONS))
    assert right["background"] == 1.0 and right["position"] >= 0.75  # pictures of the captions, not just equal noise


def test_recorded_rows_belong_to_this_asset_and_show_what_a_teacher_must():
    record = embedded.teacher_record()  # refuses the rows of another asset
    real = {row["method"]: row["accuracy"] for row in record["tables"]["256"]}
    assert real["renders"] >= 0.95
    best = max(record["scan"], key=lambda row: (row["accuracy"], -row["frechet"]))
    assert embedded.best_guidance_scale() == best["guidance_scale"]
    unguided = next(row for row in record["scan"] if row["guidance_scale"] == 1.0)
    assert best["accuracy"] >= 0.9 * real["VAE reconstructions"]
    assert unguided["accuracy"] <= best["accuracy"] - 0.1
