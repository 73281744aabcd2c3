"""experiments/vs_diffusers: the independent torch trainer and ours have the same losses on the same data and draws."""

import argparse
import json
import types

import jax
import numpy as np
import parity
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from scipy import stats

from experiments import stage
from experiments.vs_diffusers import compare, draws, run, torch_lcd, torch_run
from lcm_jax import assets, pretrained
from lcm_jax.data import encoding
from lcm_jax.distill import step as step_lib
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import text
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as student_lib
from lcm_jax.run import step as training_step
from lcm_jax.runtime import mesh as mesh_lib

STEPS = 3


def small(path: str, steps: int = STEPS):
    config = stage.read_config(path)
    config.data.batch_size, config.data.num_examples, config.train.steps = 2, 8, steps
    config.data.caption_dropout = 0.3
    return config_lib.resolve(config)


def our_losses(config, steps: int) -> list[float]:
    """The losses of `lcm_jax`'s step with its own encoders."""
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    models = student_lib.load(config)
    made = training_step.make(config, models, mesh)
    encode = encoding.make_encode(models.teacher, models.teacher_params)
    batch = draws.make_batches(config, models.teacher, encode, print)
    state, frozen = made.begin(models.trainable), made.place_frozen(models)
    losses = []
    for step in range(steps):
        rows = jax.tree.map(lambda x: x.numpy(), batch(step))
        state, metrics = made.step(state, frozen, rows, step_lib.named_key(config.seed, "draws"))
        losses.append(float(metrics["loss"]))
    return losses


def torch_losses(config, steps: int) -> list[float]:
    source = assets.resolve(config.model.teacher)
    trainer, encode = torch_run.prepared(config, source)
    batch = draws.make_batches(config, pretrained.load_pipeline(source)[0], encode, print)
    draw = draws.make_draw(config)
    return [float(torch_lcd.train_step(trainer, batch(step), draw(step))) for step in range(steps)]


@pytest.mark.slow
def test_first_losses_are_the_same():
    """To rounding. With Adam's usual eps the first update is the gradient's sign, which is random for gradients that
    consist of rounding (a bias before a norm); with a larger eps it is smooth, and the test can be sharp.
    """
    config = small("configs/shapes_lcm.py")
    config.train.adam_eps = 1e-3
    theirs, ours = torch_losses(config, STEPS), our_losses(config, STEPS)
    parity.close(theirs[0], ours[0], rtol=2e-5)
    parity.close(theirs, ours, rtol=3e-4)  # a distance of 0.02 between latents of size 1


@pytest.mark.slow
def test_first_losses_of_adapters_are_the_same():
    """The adapters start without effect: the first loss is the same, the next ones depend on the draw of A."""
    config = small("configs/shapes_lcm_lora.py")
    parity.close(torch_losses(config, 1), our_losses(config, 1), rtol=2e-5)


def test_encoders_agree():
    """The latents and embeddings that each side makes of the same rows are the same."""
    source = assets.resolve("shapes")
    pipeline, params = pretrained.load_pipeline(source)
    config = small("configs/shapes_lcm.py")
    _, torch_encode = torch_run.prepared(config, source)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    rows = {"pixels": pixels, **text.tokens(pipeline, ["a small red star", ""])}
    theirs, ours = torch_encode(rows), jax.device_get(encoding.make_encode(pipeline, params)(rows))
    assert theirs.keys() == ours.keys()
    for name in ("mean", "logvar"):
        parity.close(theirs[name], np.moveaxis(ours[name], -1, 1), atol=2e-4, rtol=2e-4)
    parity.close(theirs["encoder_hidden_states"], ours["encoder_hidden_states"], atol=1e-4)


def test_w_embedding_of_the_reference():
    """Values at w = 7.5, D = 256, in float64."""
    found = torch_lcd.w_embedding(torch.tensor([7.5]), 256)[0]
    parity.close(found[:3], [-0.8512359, 0.8422281, 0.0118197], atol=1e-3)
    parity.close(found[128:131], [-0.5247832, 0.5391213, -0.9999302], atol=1e-3)


@pytest.mark.slow
def test_a_stopped_torch_run_is_resumed_and_exported(tmp_path, monkeypatch):
    """Four steps equal two and then two; the folder loads in diffusers and here, with the target's weights."""
    say = []
    for steps in (2, 4):
        assert torch_run.made(small("configs/shapes_lcm.py", steps), tmp_path / "a", say.append)
    assert torch_run.made(small("configs/shapes_lcm.py", 4), tmp_path / "b", say.append)
    assert "torch: steps 3 to 4" in " ".join(say)
    curves = [compare.read_curve(tmp_path / side / "metrics.jsonl") for side in "ab"]
    assert list(curves[0]) == [1, 2, 3, 4]
    parity.close(list(curves[0].values()), list(curves[1].values()), rtol=1e-6)

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "a" / "export", safety_checker=None)
    assert pipeline.unet.config.time_cond_proj_dim == 256
    ours, params = pretrained.load_pipeline(tmp_path / "a" / "export")
    assert ours.configs["scheduler"]["_class_name"] == "LCMScheduler"
    assert ours.schedule.prediction_type == "v_prediction"
    kernel = pipeline.unet.conv_in.weight.detach().numpy()
    np.testing.assert_array_equal(params["unet"]["conv_in"]["kernel"], kernel.transpose(2, 3, 1, 0))
    saved = torch.load(tmp_path / "a" / torch_run.CHECKPOINT, weights_only=True)
    np.testing.assert_array_equal(kernel, saved["target"]["conv_in.weight"].numpy())
    monkeypatch.setattr(torch_run, "prepared", None)  # a finished run is kept
    assert torch_run.made(small("configs/shapes_lcm.py", 4), tmp_path / "a", say.append)


def test_adapters_share_the_weights_under_them():
    """A LoRA run has no copy of the base, and adapts the same 14 kinds of layers as `lcm_jax`."""
    config = small("configs/shapes_lcm_lora.py")
    trainer, _ = torch_run.prepared(config, assets.resolve("shapes"))
    teacher, student = (dict(net.named_parameters()) for net in (trainer.teacher, trainer.student))
    assert teacher["conv_in.weight"] is student["conv_in.weight"]
    ours = student_lib.shapes(config).trainable
    assert sum(p.numel() for p in trainer.theta) == sum(leaf.size for leaf in jax.tree.leaves(ours))
    assert [p.shape for p in trainer.averages] == [p.shape for p in trainer.theta]
    assert not set(map(id, trainer.averages)) & set(map(id, trainer.theta))


def test_agreement_and_curves():
    same = compare.agreement("Frechet distance", 4, [1.0, 2.0, 3.0], [1.5, 2.5, 2.0])
    assert same["means"] == [2.0, 2.0] and same["difference"] == 0 and same["agrees"]
    apart = compare.agreement("caption accuracy", 1, [0.90, 0.91, 0.92], [0.70, 0.72, 0.71])
    assert not apart["agrees"]
    one = compare.agreement("caption accuracy", 1, [0.9], [0.8])  # one seed says nothing about noise
    assert one["agrees"] is None and one["deviations"] is None
    text = compare.markdown([same, apart, one], ("a", "b"))
    assert "| Frechet distance | 4 | 2.00 ± 1.00 |" in text and "| no |" in text
    assert "| 90.0% | 80.0% | -10.0% |  | one seed |" in text
    found = compare.apart({1: 1.0, 2: 2.0, 3: 4.0}, {1: 1.0, 2: 2.5, 3: 4.0, 4: 9.0})
    assert (found["maximum"], found["median"], found["end"]) == (0.25, 0.0, 0.0)


def test_agreement_is_the_paired_t_test():
    """scipy's p value."""
    rng, verdicts = np.random.default_rng(0), set()
    for seeds in (2, 3, 5, 21, 22, 40):
        for shift in (0.0, 0.3, 3.0, 100.0):
            of_seed = 10 * rng.normal(size=seeds)  # what both sides share is not noise of their difference
            a, b = of_seed + rng.normal(size=seeds), of_seed + rng.normal(size=seeds) + shift
            found = compare.agreement("Frechet distance", 4, a.tolist(), b.tolist())
            test = stats.ttest_rel(b, a)
            parity.close(found["difference"] / found["error"], test.statistic)
            assert found["agrees"] == (test.pvalue >= 0.05)
            verdicts.add(found["agrees"])
    assert verdicts == {True, False}


def test_a_run_trained_otherwise_is_refused(tmp_path, monkeypatch):
    """With more steps than the config, or with another config, by the torch side and by ours."""
    config = config_lib.resolve(run.make_config(0, 4))
    torch.save({"losses": [0.1] * 4, "config": config_lib.to_json(config)}, tmp_path / torch_run.CHECKPOINT)
    assert len(torch_run.saved(config, tmp_path)["losses"]) == 4
    with config.unlocked():
        config.train.steps = 3
    with pytest.raises(LcmError, match="trained to step 4, beyond the 3"):
        torch_run.made(config, tmp_path, print)
    with config.unlocked():
        config.train.learning_rate = 0.5
    with pytest.raises(LcmError, match="train.learning_rate: .* 0.5 now"):
        torch_run.made(config, tmp_path, print)
    monkeypatch.setattr(stage, "train", lambda config, workdir: types.SimpleNamespace(step=9))
    with pytest.raises(LcmError, match="trained to step 9, beyond the 3"):
        stage.trained_and_exported(config, tmp_path, print)


def test_write_results(tmp_path):
    """Table, JSON and figure of two seeds."""
    args = argparse.Namespace(seeds=2, steps=5, workdir=tmp_path, count=65)
    rows = {}
    for seed in range(2):
        for place, side in enumerate(run.SIDES):
            folder = tmp_path / f"seed{seed}" / side
            folder.mkdir(parents=True)
            lines = [json.dumps({"step": n, "loss": (1 + 0.1 * place + seed) / n}) for n in range(1, 6)]
            (folder / "metrics.jsonl").write_text("\n".join(lines))
            row = {"guidance_scale": 3.0, "accuracy": 0.5 + 0.1 * seed, "frechet": 7.0 + seed}
            rows[seed, side] = [row | {"steps": n} for n in (1, 2, 4, 8)]
    text = run.write_results(args, rows)
    assert text == (tmp_path / "table.md").read_text() and text.count("55.0% ± 7.1%") == 8
    found = json.loads((tmp_path / "table.json").read_text())
    assert len(found["rows"]) == 16 and all(one["agrees"] for one in found["agreement"])
    parity.close(found["curves"]["0"]["maximum"], 0.1)
    assert Image.open(tmp_path / "curves.png").format == "PNG"
