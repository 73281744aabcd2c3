"""The reader of shapes pictures: the packaged weights' accuracy, its measures, and its files."""

import json
import shutil

import numpy as np
import parity
import pytest

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.networks import shapes as shapes_scorer

COUNT = 512


@pytest.fixture(scope="module")
def heldout():
    specs = [shapes.spec(i, "heldout") for i in range(COUNT)]
    images = shapes.render_batch(specs)
    return images, shapes.label_arrays(specs), *shapes_scorer.score(images)


def test_accuracy_on_heldout_renders(heldout):
    _, labels, predicted, features = heldout
    assert shapes_scorer.caption_accuracy(predicted, labels) >= 0.95
    assert min(shapes_scorer.attribute_accuracies(predicted, labels).values()) >= 0.95
    assert features.shape == (COUNT, 64) and features.dtype == np.float32


def test_wrong_captions_are_not_accepted(heldout):
    _, labels, predicted, _ = heldout
    moved = {name: np.roll(v, 1) for name, v in labels.items()}
    assert shapes_scorer.caption_accuracy(predicted, moved) < 0.02
    for name, accuracy in shapes_scorer.attribute_accuracies(predicted, moved).items():
        assert accuracy < 1 / len(shapes.ATTRIBUTES[name]) + 0.12


def test_one_wrong_attribute_fails_the_caption():
    labels = {name: np.zeros(4, np.int32) for name in shapes.ATTRIBUTES}
    logits = {name: np.tile([2.0, 1.0, 0.0], (4, 1)) for name in shapes.ATTRIBUTES}
    logits["size"][0] = [0.0, 1.0, 0.5]
    logits["colour"][1] = [0.0, 1.0, 0.5]
    assert shapes_scorer.caption_accuracy(logits, labels) == 0.5
    assert shapes_scorer.attribute_accuracies(logits, labels) == {
        "shape": 1.0,
        "colour": 0.75,
        "size": 0.75,
        "position": 1.0,
        "background": 1.0,
    }
    with pytest.raises(LcmError, match="3 labels"):
        shapes_scorer.caption_accuracy(logits, {k: v[:3] for k, v in labels.items()})


def test_bytes_and_floats_and_batches_agree(heldout):
    images, _, predicted, features = heldout
    again, more = shapes_scorer.score(images[:130].astype(np.float32) / 127.5 - 1.0)
    for name in shapes.ATTRIBUTES:
        np.testing.assert_array_equal(again[name], predicted[name][:130])
    parity.close(more, features[:130], atol=1e-3)


def test_softened_pictures_are_still_read(heldout):
    # What a lossy autoencoder does at worst: halve the resolution (means of 2 x 2) and come back.
    images, labels, _, _ = heldout
    small = images[:256].reshape(256, 32, 2, 32, 2, 3).mean((2, 4))
    soft = small.repeat(2, 1).repeat(2, 2).round().astype(np.uint8)
    read, _ = shapes_scorer.score(soft)
    assert shapes_scorer.caption_accuracy(read, {k: v[:256] for k, v in labels.items()}) > 0.9


def test_features_tell_renders_from_ghosts(heldout):
    # Each picture mixed with another: the marginal of every pixel stays plausible, the objects do not.
    images, _, _, features = heldout
    near = frechet.frechet_distance(features[:256], features[256:])
    ghosts = (images[256:].astype(np.int32) + np.roll(images[256:], 1, axis=0)) // 2
    far = frechet.frechet_distance(features[:256], shapes_scorer.score(ghosts.astype(np.uint8))[1])
    assert far > 2 * near


def test_files(tmp_path):
    scorer = shapes_scorer.load_scorer()
    assert sum(f.stat().st_size for f in shapes_scorer.ASSET.iterdir()) < 2e6
    assert scorer.config["accuracy"]["all"] >= 0.95
    shapes_scorer.save_scorer(tmp_path, scorer)
    again = shapes_scorer.load_scorer(tmp_path)
    for layer, leaves in scorer.params.items():
        for leaf, value in leaves.items():
            np.testing.assert_array_equal(value, again.params[layer][leaf])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_refusals(tmp_path):
    with pytest.raises(LcmError, match="no readable scorer"):
        shapes_scorer.load_scorer(tmp_path)
    shutil.copytree(shapes_scorer.ASSET, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"feature_dim": 32}))
    with pytest.raises(LcmError, match="features.kernel"):
        shapes_scorer.load_scorer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"attributes": {"shape": ["circle"]}}))
    with pytest.raises(LcmError, match="other attribute words"):
        shapes_scorer.load_scorer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LcmError, match="no readable scorer"):
        shapes_scorer.load_scorer(tmp_path)
    with pytest.raises(LcmError, match=r"\(64, 64, 3\)"):
        shapes_scorer.score(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(LcmError, match="int64"):
        shapes_scorer.score(np.zeros((1, 64, 64, 3), np.int64))
