"""experiments/workflows and shapes_controlnet: what is asked for, what counts as done, and that both sides do it."""

import dataclasses
import functools
import re
import time

import diffusers
import jax
import numpy as np
import parity
import pytest
import tiny
import torch

from experiments import results
from experiments.shapes_controlnet import train
from experiments.speed.worker import Worker
from experiments.workflows import cases, latency, run
from experiments.workflows.workloads import KINDS, Workflow
from lcm_jax import assets
from lcm_jax.data import shapes
from lcm_jax.distill.student import student_of
from lcm_jax.pretrained import load_pipeline, names, save_pipeline
from lcm_jax.pretrained.controlnets import load_controlnet
from lcm_jax.sampling.image_to_image import Source
from lcm_jax.sampling.inpaint import Mask

COUNT = 5  # cases


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        (cases.recoloured, {"colour"}),
        (cases.repainted, {"shape", "colour"}),
        (lambda number: cases.outlined(number, False), set()),
        (lambda number: cases.outlined(number, True), set(cases.OUTLINED)),
    ],
)
def test_captions_change_what_they_say_and_nothing_else(case, changed):
    for number in range(60):
        one = case(number)
        assert {name for name, word in one.words.items() if word != getattr(one.spec, name)} == changed
        words = {name: shapes.ATTRIBUTES[name][n] for name, n in shapes.parse_caption(one.caption).items()}
        assert words == one.words and set(words) == set(shapes.ATTRIBUTES)


def test_captions_that_mislead_name_other_objects_in_the_same_form():
    for number in range(60):
        spec, caption = shapes.spec(number), train.misleading(number)
        words = {name: shapes.ATTRIBUTES[name][n] for name, n in shapes.parse_caption(caption).items()}
        assert set(words) == set(spec.named) and caption == shapes.describe(words, spec.form)
        assert all((word != getattr(spec, name)) == (name in cases.OUTLINED) for name, word in words.items())


def test_masks_hold_the_whole_object_and_some_background():
    for number in range(60):
        spec = cases.repainted(number).spec
        image, inside = shapes.render(spec).astype(int), cases.mask_of(spec)
        background = np.rint(np.clip(spec.background_rgb, 0, 255)).astype(int)
        assert (image[~inside] == background).all() and 0.05 < inside.mean() < 0.6
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        assert inside.sum() == len(rows) * len(columns), "a square"


def test_each_row_has_its_own_image_and_mask():
    """Also where several share one, or a row comes again."""
    asked = [cases.repainted(number) for number in range(3)]
    images, masks = tuple(case.given for case in asked), tuple(cases.mask_of(case.spec) for case in asked)
    for given, rows, of in (
        (images, [0, 2, 2, 1], masks),
        (images[:1], [0, 1, 2], masks),
        (images, [2, 0], masks[1:2]),
    ):
        found = Source(given, mask=Mask(of)).of(rows).canvases(64, 64, 8, len(rows))
        for canvas, row in zip(found, rows, strict=True):
            image, mask = (one[row if len(one) > 1 else 0] for one in (given, of))
            assert (canvas.original == image).all() and (canvas.hole == mask).all()


def obeying(captions, **options):
    """Renders of what captions name."""
    return shapes.render_batch([shapes.drawn(caption, i) for caption in captions for i in range(run.EACH)])


def copying(captions, image=None, outline=None, **options):
    """The images that are given; for an outline, a render of the same object."""
    if outline is not None:
        specs = [cases.outlined(number, False).spec for number in range(COUNT)]
        image = [shapes.render(next(spec for spec in specs if (shapes.outline(spec) == outline).all()))]
    return np.repeat(image, run.EACH, axis=0)


@pytest.fixture(scope="module")
def measured():
    """Workflow -> rows of a model that does what captions say, and of one that only copies."""
    ask = {("LCM", 1): obeying, ("teacher", 50): copying}
    found = {}
    for name, workflow in run.WORKFLOWS.items():
        rows, lines, captions = workflow(ask, COUNT)
        assert all(images.shape == (COUNT, 64, 64, 3) for images in lines.values()) and len(captions) == COUNT
        text = results.table_of(run.COLUMNS[name], rows)
        assert len(text.splitlines()) == 2 + len(rows) and "|  |" not in text
        found[name] = {key: [row for row in rows if row["model"] == key] for key in ("LCM", "teacher")}
    return found


def test_image_to_image_measures_captions_and_distance(measured):
    obedient, copies = measured["image to image"]["LCM"], measured["image to image"]["teacher"]
    assert [row["strength"] for row in obedient] == list(run.STRENGTHS)
    assert obedient[0]["accuracy"] >= 0.95 and obedient[0]["changed"] >= 0.95 and obedient[0]["distance"] > 5
    assert copies[0]["accuracy"] == copies[0]["changed"] == copies[0]["distance"] == 0 and copies[0]["kept"] == 1


def test_inpainting_measures_what_is_kept_bit_for_bit(measured):
    (obedient,), (copy,) = measured["inpainting"]["LCM"], measured["inpainting"]["teacher"]
    assert obedient["accuracy"] >= 0.95 and obedient["exact"] < 0.2  # shades of backgrounds differ
    assert copy["changed"] == 0 and copy["kept"] == copy["exact"] == 1


def test_control_net_measures_outlines_against_captions(measured):
    agree, contradict = measured["ControlNet"]["LCM"]
    assert (agree["caption"], contradict["caption"]) == ("agrees", "contradicts")
    assert min(agree["outline"], agree["object"], agree["rest"], contradict["object"], contradict["rest"]) >= 0.95
    assert contradict["outline"] == 0
    for row in measured["ControlNet"]["teacher"]:  # by the outline
        assert row["outline"] >= 0.95
    assert measured["ControlNet"]["teacher"][1]["object"] == 0


def test_a_new_net_is_the_encoder_and_changes_nothing():
    """Its residuals are zero until it is trained, and so is what the outline adds; gradients begin at the kernels."""
    pipeline, params = tiny.loaded("sd1")
    net, initial = train.net_of(pipeline.unet, params["unet"])
    shapes_of = functools.partial(jax.tree.map, np.shape)
    assert shapes_of(initial) == shapes_of(names.abstract_params(net))
    shared = set(initial) & set(params["unet"])
    assert shared == {"conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"}
    for name in shared:
        jax.tree.map(np.testing.assert_array_equal, initial[name], params["unet"][name])
    outline = initial["controlnet_cond_embedding"]
    zeros = [tree for name, tree in initial.items() if re.fullmatch(r"controlnet_(mid_block|down_blocks_\d)", name)]
    assert len(zeros) == len(pipeline.unet.skip_widths) + 1
    assert not np.any(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves([*zeros, outline["conv_out"]])]))
    assert all(np.any(tree["kernel"]) for name, tree in outline.items() if name != "conv_out")


def test_rows_of_latency():
    eager = {"jax_seconds": [0.02, 0.01, 0.03], "seconds": [0.03, 0.04, 0.02], "ratios": [1.5, 4.0, 0.7], "ratio": 1.5}
    found = latency.row("inpainting", 4, {"jax": {}, "torch": {"eager": eager}})
    middle = {"ours": 20.0, "theirs": 30.0, "ratio": 1.5, "turns": "0.70 to 4.00"}
    assert found == {"kind": "inpainting", "batch": 4, **middle, "goal": "met"}
    assert latency.row("text", 1, {"jax": {}, "torch": {"eager": eager | {"ratio": 1.1}}})["goal"] == "missed"
    failed = {"jax": {}, "torch": {"eager": {"error": "MemoryError"}}}
    assert latency.row("text", 1, failed) == {"kind": "text", "batch": 1, "goal": "MemoryError"}
    assert latency.row("text", 1, {"jax": {"error": "no net"}})["goal"] == "no net"


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    """A folder with the embedded teacher as an LCM that has not been trained."""
    pipeline, params = load_pipeline(assets.path("shapes"))
    unet, weights = student_of(pipeline.unet, params["unet"], 256)
    pipeline = dataclasses.replace(pipeline, unet=unet, record={"solver_steps": 50})
    return save_pipeline(pipeline, {**params, "unet": weights}, tmp_path_factory.mktemp("lcm") / "lcm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_a_workflow_run(kind, lcm, tmp_path):
    """In their processes; and both make as many images as are asked for."""
    for side, way in (("jax", "lcm_jax"), ("torch", "eager")):
        deadline, package = time.monotonic() + 900, "experiments.workflows"
        with Worker(side, Workflow(kind, str(lcm), 2), "cpu", deadline, tmp_path / "log", package) as one:
            assert one.ready["ways"] == [way] and one.time(way, 2)["seconds"] > 0


@pytest.mark.slow
def test_training_resumes_and_writes_what_diffusers_reads(tmp_path, monkeypatch):
    """In two parts as in one; diffusers computes the same residuals."""
    monkeypatch.setattr(train, "BATCH", 2)
    whole = train.train(tmp_path / "whole", 4, examples=64)
    monkeypatch.setattr(train, "run", functools.partial(stopped, train.run))
    train.train(tmp_path / "parts", 4, examples=64)
    monkeypatch.undo()
    monkeypatch.setattr(train, "BATCH", 2)
    parts = train.train(tmp_path / "parts", 4, examples=64)
    pipeline, params = load_pipeline(assets.path("shapes"))
    nets = [load_controlnet(folder, pipeline) for folder in (whole, parts)]
    jax.tree.map(np.testing.assert_array_equal, nets[0][1], nets[1][1])
    theirs = diffusers.ControlNetModel.from_pretrained(whole)
    rng = np.random.default_rng(0)
    z, image, text = (rng.random(shape, np.float32) for shape in ((1, 8, 8, 4), (1, 64, 64, 3), (1, 24, 96)))
    with torch.no_grad():
        want = theirs(
            *map(torch.from_numpy, (z.transpose(0, 3, 1, 2), np.array([499]), text, image.transpose(0, 3, 1, 2)))
        )
    got = jax.jit(nets[0][0].apply)({"params": nets[0][1]}, z, np.array([499.0]), text, image)
    assert np.abs(got[-1]).max() > 0
    for one, other in zip(got, [*want.down_block_res_samples, want.mid_block_res_sample], strict=True):
        parity.close(one, other.permute(0, 2, 3, 1).numpy(), rtol=0, of_max=2 * parity.NETWORK)


def stopped(run, workdir, state, step, batch, steps, **options):
    """`loop.run`, stopped half way."""
    return run(workdir, state, step, batch, steps // 2, **options)
