"""The scorer of shapes images: the packaged weights' accuracy, its measures, and its files."""

import json
import shutil

import numpy as np
import parity
import pytest

from lcm_jax.data.shapes import ATTRIBUTES, label_arrays, render_batch, spec
from lcm_jax.errors import LcmError
from lcm_jax.metrics.distances import frechet_distance
from lcm_jax.metrics.networks.shapes import (
    ASSET,
    attribute_accuracies,
    caption_accuracy,
    load_scorer,
    save_scorer,
    score,
)

COUNT = 512


@pytest.fixture(scope="module")
def heldout():
    specs = [spec(i, "heldout") for i in range(COUNT)]
    images = render_batch(specs)
    return images, label_arrays(specs), *score(images)


def test_score_reads_heldout_renders(heldout):
    images, labels, predicted, features = heldout
    assert caption_accuracy(predicted, labels) >= 0.95
    assert min(attribute_accuracies(predicted, labels).values()) >= 0.95
    assert features.shape == (COUNT, 64) and features.dtype == np.float32
    again, more = score(images[:130])  # a last batch that is padded
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(again[name], predicted[name][:130])
    parity.close(more, features[:130], atol=1e-3)


def test_score_reads_softened_images(heldout):
    """What a lossy autoencoder does at worst: halve the resolution (means of 2 x 2) and come back."""
    images, labels, _, _ = heldout
    small = images[:256].reshape(256, 32, 2, 32, 2, 3).mean((2, 4))
    predicted, _ = score(small.repeat(2, 1).repeat(2, 2).round().astype(np.uint8))
    assert caption_accuracy(predicted, {name: values[:256] for name, values in labels.items()}) > 0.9


def test_accuracies_of_wrong_captions(heldout):
    _, labels, predicted, _ = heldout
    moved = {name: np.roll(values, 1) for name, values in labels.items()}
    assert caption_accuracy(predicted, moved) < 0.02
    for name, accuracy in attribute_accuracies(predicted, moved).items():
        assert accuracy < 1 / len(ATTRIBUTES[name]) + 0.12


def test_caption_accuracy_needs_all_attributes():
    labels = {name: np.zeros(4, np.int32) for name in ATTRIBUTES}
    read = labels | {"size": np.array([1, 0, 0, 0]), "colour": np.array([0, 1, 0, 0])}
    assert caption_accuracy(read, labels) == 0.5
    wrong = {"colour": 0.75, "size": 0.75}
    assert attribute_accuracies(read, labels) == dict.fromkeys(ATTRIBUTES, 1.0) | wrong
    with pytest.raises(LcmError, match="4 predictions of shape for 3 labels"):
        caption_accuracy(read, {name: values[:3] for name, values in labels.items()})


def test_accuracies_are_of_named_attributes():
    labels = label_arrays(["a large circle", "there is a square", "circle, small", "a square at the center"])
    assert [labels["size"].tolist(), labels["colour"].tolist()] == [[1, -1, 0, -1], [-1] * 4]
    read = {name: np.zeros(4, np.int32) for name in ATTRIBUTES}  # small red circles at the center, on white
    assert caption_accuracy(read, labels) == 0.25
    assert attribute_accuracies(read, labels) == {
        "shape": 0.5,
        "colour": None,
        "size": 0.5,
        "position": 1.0,
        "background": None,
    }


def test_features_tell_renders_from_ghosts(heldout):
    """Each image mixed with another: the marginal of every pixel stays plausible, the objects do not."""
    images, _, _, features = heldout
    near = frechet_distance(features[:256], features[256:])
    ghosts = (images[256:].astype(np.int32) + np.roll(images[256:], 1, axis=0)) // 2
    assert frechet_distance(features[:256], score(ghosts.astype(np.uint8))[1]) > 2 * near


def test_save_scorer_and_load_scorer(tmp_path):
    scorer = load_scorer()
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 2e6
    assert scorer.config["accuracy"]["all"] >= 0.95
    save_scorer(tmp_path, scorer)
    again = load_scorer(tmp_path)
    for layer, leaves in scorer.params.items():
        for leaf, value in leaves.items():
            np.testing.assert_array_equal(value, again.params[layer][leaf])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_refusals(tmp_path):
    def refused(match):
        with pytest.raises(LcmError, match=match):
            load_scorer(tmp_path)

    refused("no readable scorer")
    shutil.copytree(ASSET, tmp_path, dirs_exist_ok=True)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps(whole | {"feature_dim": 32}))
    refused("features.kernel")
    config.write_text(json.dumps(whole | {"attributes": {"shape": ["circle"]}}))
    refused("other attribute words")
    config.write_text(json.dumps(whole))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("no readable scorer")
    with pytest.raises(LcmError, match=r"\(64, 64, 3\)"):
        score(np.zeros((64, 64, 3), np.uint8))


def test_images_that_are_not_uint8_are_refused(heldout):
    """Floats too, in whatever range: those in [0, 1] were read as images in [-1, 1] without contrast."""
    image = heldout[0][:1]
    for other in (
        image / np.float32(255),
        image / np.float32(127.5) - np.float32(1),
        image.astype(np.float64),
        image.astype(np.int64),
    ):
        match = rf"images of type {other.dtype}: give uint8 in 0\.\.255, as sampling\.png\.to_uint8 makes them"
        with pytest.raises(LcmError, match=match):
            score(other)
