"""CLIP score and CMMD against transformers' CLIPModel and against their definitions."""

import copy
import json
import shutil

import metrics_kit
import numpy as np
import parity
import pytest
import torch
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lcm_jax.errors import LcmError
from lcm_jax.metrics import clip_score, features
from lcm_jax.metrics import distances as cmmd

CAPTIONS = ["a red circle", "blue square on the left", "", "small circle on the large square " * 20, "hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return metrics_kit.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pair(folder):
    return clip_score.load_clip(folder, batch_size=4)


@pytest.fixture(scope="module")
def theirs(folder):
    """Embeddings of pictures and captions, and cosines between all, by transformers."""
    model, images = metrics_kit.torch_clip(), metrics_kit.pictures(5, 40, 52)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]
    words = CLIPTokenizer.from_pretrained(folder)(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], pixel_values=pixels)
        raw = model.visual_projection(model.vision_model(pixels).pooler_output)
    return images, raw.numpy(), (out.logits_per_image / model.logit_scale.exp()).numpy()


def test_embeddings_and_scores_match_transformers(pair, theirs):
    images, raw, cosines = theirs
    assert pair.pictures.dim == 20 and pair.pictures.name == "clip-2x32-patch7/processor-28"
    assert raw.std() > 0.1
    parity.close(pair.pictures(images), raw, rtol=0, atol=1e-4)
    got = clip_score.clip_scores(pair, images, CAPTIONS)
    assert got.shape == (5,) and got.dtype == np.float32
    assert (np.diag(cosines) > 0).any() and np.abs(np.diag(cosines)).max() > 0.05
    parity.close(got, 100 * np.maximum(np.diag(cosines), 0), rtol=0, atol=5e-3)
    turned = clip_score.clip_scores(pair, images, CAPTIONS[1:] + CAPTIONS[:1])
    parity.close(turned, 100 * np.maximum(np.roll(cosines, -1, 1).diagonal(), 0), rtol=0, atol=5e-3)


def test_the_hash_of_a_pair_covers_both_towers(pair, folder, tmp_path):
    model = copy.deepcopy(metrics_kit.torch_clip())
    model.text_projection.weight += 1e-3
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert clip_score.load_clip(tmp_path, batch_size=4).hash == pair.hash
    model.save_pretrained(tmp_path)
    other = clip_score.load_clip(tmp_path, batch_size=4)
    assert other.pictures.hash == pair.pictures.hash and other.hash != pair.hash


def test_scores_of_known_angles():
    a = np.array([[1.0, 0, 0], [0, 2, 0], [3, 4, 0], [1, 1, 0]])
    b = np.array([[5.0, 0, 0], [2, 0, 0], [3, 0, 0], [-1, -1, 0]])
    parity.close(clip_score.cosine_scores(a, b), [100, 0, 60, 0], atol=1e-5)
    with pytest.raises(LcmError, match=r"\[4, 3\] and \[3, 3\]"):
        clip_score.cosine_scores(a, b[:3])
    with pytest.raises(LcmError, match="check the pictures"):
        clip_score.cosine_scores(a * 0, b)


def test_pictures_alone_are_read_but_have_no_score(tmp_path, folder, theirs):
    model = metrics_kit.torch_clip()
    alone = CLIPVisionModelWithProjection.from_pretrained(folder, projection_dim=20).eval()
    alone.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(metrics_kit.PREPROCESSOR))
    assert torch.equal(alone.visual_projection.weight, model.visual_projection.weight)
    got = features.load_extractor("clip", tmp_path, batch_size=8)
    parity.close(got(theirs[0]), theirs[1], rtol=0, atol=1e-4)
    with pytest.raises(LcmError, match="a CLIP score needs texts, too"):
        clip_score.load_clip(tmp_path)


def test_refusals(pair, folder):
    images = metrics_kit.pictures(2)
    with pytest.raises(LcmError, match="2 pictures and 5 captions"):
        clip_score.clip_scores(pair, images, CAPTIONS)
    with pytest.raises(LcmError, match="no captions"):
        pair.texts([])
    with pytest.raises(LcmError, match="resize='tf1'.*processor, cmmd"):
        features.load_extractor("clip", folder, resize="tf1")


def test_cmmd_cuts_its_pictures_square(folder):
    network = features.load_extractor("clip", folder, resize="cmmd", batch_size=4)
    assert network.name == "clip-2x32-patch7/cmmd-28"
    wide = metrics_kit.pictures(3, 40, 60)
    parity.close(network(wide), network(wide[:, :, 10:50]), atol=1e-5)


def test_cmmd_is_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)) + 1, rng.standard_normal((9, 5))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]

    def mean_kernel(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])

    want = 1000 * (mean_kernel(unit[0], unit[0]) + mean_kernel(unit[1], unit[1]) - 2 * mean_kernel(*unit))
    assert want > 1
    assert cmmd.cmmd(x, y) == pytest.approx(want, rel=1e-9)
    assert cmmd.cmmd(3 * y, 5 * x) == pytest.approx(want, rel=1e-9)  # lengths do not matter, nor the order
    assert cmmd.cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_of_two_points_and_in_blocks(monkeypatch):
    # All of x at one point, all of y at the opposite one: |a - b|^2 = 4.
    x, y = np.tile([[1.0, 0]], (6, 1)), np.tile([[-1.0, 0]], (5, 1))
    assert cmmd.cmmd(x, y) == pytest.approx(2000 * (1 - np.exp(-4 / 200)), rel=1e-12)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((23, 4)) + 0.5, rng.standard_normal((10, 4))
    whole = cmmd.cmmd(x, y)
    monkeypatch.setattr(cmmd, "_BLOCK", 3)
    assert cmmd.cmmd(x, y) == pytest.approx(whole, rel=1e-10)


def test_cmmd_refusals():
    x = np.ones((3, 4))
    with pytest.raises(LcmError, match="of 3 and 1 pictures"):
        cmmd.cmmd(x, x[:1])
    with pytest.raises(LcmError, match=r"\[3, 4\] and \[3, 2\]"):
        cmmd.cmmd(x, x[:, :2])
    with pytest.raises(LcmError, match="zeros, NaN"):
        cmmd.cmmd(x, x * np.nan)
