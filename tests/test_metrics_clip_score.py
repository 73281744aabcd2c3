"""CLIP score, PickScore and the embeddings of both towers against transformers' CLIPModel."""

import copy
import json
import shutil

import metrics_kit
import numpy as np
import parity
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lcm_jax.errors import LcmError
from lcm_jax.metrics import measures
from lcm_jax.metrics.clip_score import clip_scores, cosine_scores, load_clip, pick_scores
from lcm_jax.metrics.features import load_extractor
from lcm_jax.metrics.networks import clip
from lcm_jax.models.clip import from_config, vision_from_config
from lcm_jax.pretrained import names

CAPTIONS = ["a red circle", "blue square on the left", "", "small circle on the large square " * 20, "hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return metrics_kit.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pair(folder):
    return load_clip(folder, batch_size=4)


@pytest.fixture(scope="module")
def theirs(folder):
    """Images, their embeddings, and the cosines between all images and captions, by transformers."""
    model, images = metrics_kit.torch_clip(), metrics_kit.images(5, 40, 52)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]
    words = CLIPTokenizer.from_pretrained(folder)(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], pixel_values=pixels)
        raw = model.visual_projection(model.vision_model(pixels).pooler_output)
    return images, raw.numpy(), (out.logits_per_image / model.logit_scale.exp()).numpy()


def test_clip_scores_match_transformers(pair, theirs):
    images, raw, cosines = theirs
    assert pair.images.dim == 20 and pair.images.name == "clip-2x32-patch7/processor-28"
    assert raw.std() > 0.1
    parity.close(pair.images(images), raw, rtol=0, atol=1e-4)
    got = clip_scores(pair, images, CAPTIONS)
    assert got.shape == (5,) and got.dtype == np.float32
    assert (np.diag(cosines) > 0).any() and np.abs(np.diag(cosines)).max() > 0.05
    parity.close(got, 100 * np.maximum(np.diag(cosines), 0), rtol=0, atol=5e-3)
    turned = clip_scores(pair, images, CAPTIONS[1:] + CAPTIONS[:1])
    parity.close(turned, 100 * np.maximum(np.roll(cosines, -1, 1).diagonal(), 0), rtol=0, atol=5e-3)


def test_hash_of_a_pair_covers_both_towers(pair, folder, tmp_path):
    model = copy.deepcopy(metrics_kit.torch_clip())
    model.text_projection.weight += 1e-3
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert load_clip(tmp_path, batch_size=4).hash == pair.hash
    model.save_pretrained(tmp_path)
    other = load_clip(tmp_path, batch_size=4)
    assert other.images.hash == pair.images.hash and other.hash != pair.hash


@pytest.mark.parametrize(
    ("tower", "key", "value"), [("vision", "hidden_act", "gelu"), ("text", "num_attention_heads", 4)]
)
def test_hash_of_a_pair_covers_what_only_its_config_says(pair, folder, tmp_path, tower, key, value):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config[f"{tower}_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = load_clip(tmp_path, batch_size=4)
    assert other.hash != pair.hash and (other.images.hash == pair.images.hash) == (tower == "text")


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory):
    return metrics_kit.write_clip(tmp_path_factory.mktemp("pick"), metrics_kit.torch_pick())


def test_pick_scores_match_transformers(pick_folder):
    """logits_per_image of CLIPModel after what CLIPProcessor does; negative ones are not cut."""
    model, images = metrics_kit.torch_pick(), metrics_kit.images(5, 52, 40)
    pixels = CLIPImageProcessorPil.from_pretrained(pick_folder)(list(images), return_tensors="pt")["pixel_values"]
    tokenizer = CLIPTokenizer.from_pretrained(pick_folder)
    words = tokenizer(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = model(**words, pixel_values=pixels).logits_per_image.numpy()
    pair = load_clip(pick_folder, batch_size=4)
    parity.close(pair.logit_scale, np.exp(3.0), rtol=1e-6)
    assert logits.max() < -0.5 and logits.std() > 1
    for shift in range(len(CAPTIONS)):
        captions = CAPTIONS[shift:] + CAPTIONS[:shift]
        want = np.roll(logits, -shift, 1).diagonal()
        parity.close(pick_scores(pair, images, captions), want, rtol=0, atol=1e-3)


def test_pickscore_is_a_measure_with_an_interval(pick_folder, tmp_path):
    captions, images = CAPTIONS * 2 + ["a", "b", "c", "d", "e"], metrics_kit.images(15)
    reference = measures.Reference((), None, tmp_path)

    def load(folder):
        (spec,) = measures.parse([f"pickscore:{folder}"])
        return measures.load(spec, captions, (40, 40), reference, batch_size=8)

    measure, scores = load(pick_folder), pick_scores(load_clip(pick_folder, batch_size=8), images, captions)
    assert measure.about.keys() == {"network", "sha256", "logit_scale"}
    state = measure.add(measure.add(None, images[:7], captions[:7]), images[7:], captions[7:])
    (value, (low, high)) = measure.estimates(state)["pickscore"]
    parity.close(value, scores.mean(dtype=np.float64), rtol=1e-5)
    assert low < value < high
    alone = shutil.copytree(pick_folder, tmp_path / "alone")
    weights = load_file(alone / "model.safetensors")
    for name, text, broken in (
        ("logit_scale", "have no logit_scale", {}),
        ("logit_scale", "not one finite number", {"logit_scale": torch.tensor(float("nan"))}),
        ("visual_projection.weight", "holds another network", {}),
    ):
        kept = {key: tensor for key, tensor in weights.items() if key != name} | broken
        save_file(kept, alone / "model.safetensors", {"format": "pt"})
        with pytest.raises(LcmError, match=text):
            load(alone)
    with pytest.raises(LcmError, match="PickScore_v1 of the Hugging Face hub"):
        load(tmp_path / "nowhere")


def test_layout_of_the_published_pickscore():
    """Keys and shapes of a CLIP ViT-H/14, by transformers without memory for them."""
    text = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24)
    vision = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=16, num_hidden_layers=32)
    text |= dict(hidden_act="gelu", projection_dim=1024, bos_token_id=0, eos_token_id=2)
    vision |= dict(hidden_act="gelu", projection_dim=1024, patch_size=14)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
    with torch.device("meta"):
        stored = {key: tuple(value.shape) for key, value in CLIPModel(config).state_dict().items()}
    found = {"model_type": "clip", "projection_dim": 1024, "text_config": text, "vision_config": vision}
    ours = {key: p.torch_shape for key, p in clip._vision_table(vision_from_config(found)).items()}
    own = dict(text, architectures=["CLIPTextModelWithProjection"], model_type="clip_text_model")
    ours |= {key: p.torch_shape for key, p in names.torch_table(from_config(own)).items()} | {"logit_scale": ()}
    assert ours == {key: shape for key, shape in stored.items() if not key.endswith("position_ids")}
    assert sum(np.prod(shape, dtype=int) for shape in ours.values()) == 986_109_441


def test_cosine_scores():
    a = np.array([[1.0, 0, 0], [0, 2, 0], [3, 4, 0], [1, 1, 0]])
    b = np.array([[5.0, 0, 0], [2, 0, 0], [3, 0, 0], [-1, -1, 0]])
    parity.close(cosine_scores(a, b), [100, 0, 60, 0], atol=1e-5)
    with pytest.raises(LcmError, match=r"\[4, 3\] and \[3, 3\]"):
        cosine_scores(a, b[:3])
    with pytest.raises(LcmError, match="check the images"):
        cosine_scores(a * 0, b)


def test_image_tower_alone_has_features_but_no_score(tmp_path, folder, theirs):
    model = metrics_kit.torch_clip()
    alone = CLIPVisionModelWithProjection.from_pretrained(folder, projection_dim=20).eval()
    alone.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(metrics_kit.PREPROCESSOR))
    assert torch.equal(alone.visual_projection.weight, model.visual_projection.weight)
    got = load_extractor("clip", tmp_path, batch_size=4)
    parity.close(got(theirs[0]), theirs[1], rtol=0, atol=1e-4)
    with pytest.raises(LcmError, match="a CLIP score needs texts, too"):
        load_clip(tmp_path)


def test_refusals(pair, folder):
    with pytest.raises(LcmError, match="2 images and 5 captions"):
        clip_scores(pair, metrics_kit.images(2), CAPTIONS)
    with pytest.raises(LcmError, match="no captions"):
        pair.texts([])
    with pytest.raises(LcmError, match="resize='tf1'.*processor, cmmd"):
        load_extractor("clip", folder, resize="tf1")


def test_cmmd_resize_crops_to_the_square(folder):
    network = load_extractor("clip", folder, resize="cmmd", batch_size=4)
    assert network.name == "clip-2x32-patch7/cmmd-28"
    wide = metrics_kit.images(3, 40, 60)
    parity.close(network(wide), network(wide[:, :, 10:50]), atol=1e-5)
