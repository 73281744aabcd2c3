"""Resizes and preprocessing of feature networks against the libraries that made the metrics' published numbers."""

import json

import numpy as np
import parity
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.metrics import resizing

SIZES = [(64, 64), (40, 61), (70, 33), (24, 24)]
BLENDED = 8 * 255 * parity.EPS  # values up to 255, blended twice in float32; the oracles are float64


def random_images(height, width, count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_at_pixel_centres_is_torchs(size):
    images = random_images(*size)
    nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float64))
    want = torch.nn.functional.interpolate(nchw, (29, 29), mode="bilinear", align_corners=False)
    got = resizing.bilinear(images, 29, centres=True)
    assert got.dtype == np.float32
    parity.close(got, want.permute(0, 2, 3, 1).numpy(), rtol=0, atol=BLENDED)


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_of_tensorflow_1(size):
    images, side = random_images(*size, count=1), 29
    height, width = size
    want = np.empty((side, side, 3))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            rows, columns = (int(y), min(int(y) + 1, height - 1)), (int(x), min(int(x) + 1, width - 1))
            corner = images[0][np.ix_(rows, columns)].astype(float)
            down, across = np.array([1 - y % 1, y % 1]), np.array([1 - x % 1, x % 1])
            want[i, j] = np.einsum("i,j,ijc->c", down, across, corner)
    parity.close(resizing.bilinear(images, side, centres=False)[0], want, rtol=0, atol=BLENDED)


def test_bilinear_variants_differ_unless_nothing_is_resized():
    images = random_images(64, 64)
    a, b = (resizing.bilinear(images, 29, centres=c) for c in (False, True))
    assert np.abs(a - b).mean() > 10
    for centres in (False, True):
        np.testing.assert_array_equal(resizing.bilinear(images, 64, centres), images)


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_float_is_torchs_antialiased(size):
    # torch's antialias follows Pillow's filter (a = -0.5, support grows with the shrinking).
    images = random_images(*size)
    nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float64))
    want = torch.nn.functional.interpolate(nchw, (29, 29), mode="bicubic", antialias=True).clamp(0, 255)
    got = resizing.bicubic_float(images, 29)
    parity.close(got, want.permute(0, 2, 3, 1).numpy(), rtol=0, atol=BLENDED)


@pytest.mark.parametrize("size", [*SIZES, (32, 32)])
@pytest.mark.parametrize("kind", ["clip", "dinov2", "square"])
def test_processor_is_transformers(size, kind, tmp_path):
    theirs = {
        "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        "dinov2": lambda: BitImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 28, "width": 28},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        "square": lambda: BitImageProcessorPil(size={"height": 30, "width": 27}, do_center_crop=False, resample=2),
    }[kind]()
    theirs.save_pretrained(tmp_path)
    images = random_images(*size)
    want = theirs([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    got = resizing.read_processor(tmp_path)(images)
    assert got.dtype == np.float32
    parity.close(got, want.transpose(0, 2, 3, 1), atol=1e-5)


def test_read_processor_of_early_and_whole_configs(tmp_path):
    early = {
        "crop_size": 28,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "size": 28,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(early))
    first = resizing.read_processor(tmp_path)
    assert first == resizing.Processor(28, (28, 28), (0.5,) * 3, (0.25,) * 3)
    no_crop_flag = {key: value for key, value in early.items() if key != "do_center_crop"}
    for kind, crop in (("CLIPImageProcessor", (28, 28)), ("BitImageProcessor", (28, 28)), ("ViTImageProcessor", None)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(no_crop_flag | {"image_processor_type": kind}))
        assert resizing.read_processor(tmp_path).crop == crop
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(early))
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": early}))
    assert resizing.read_processor(tmp_path) == first


def test_processor_crops_to_the_square_first():
    processor = resizing.Processor((28, 28), None, (0.0,) * 3, (1.0,) * 3, square_first=True)
    image = random_images(41, 60, count=1)[0]
    want = np.asarray(Image.fromarray(image).crop((9, 0, 50, 41)).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    parity.close(processor(image[None])[0], want, atol=1e-6)


def test_refusals(tmp_path):
    config = {"size": 28, "crop_size": 28, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(LcmError, match="preprocessor_config.json is missing"):
        resizing.read_processor(tmp_path)
    for change, message in (
        ({"do_resize": False}, "do_resize=False"),
        ({"resample": 1}, "resample=1"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedConfig, match=message):
            resizing.read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28}))
    with pytest.raises(LcmError, match="image_mean"):
        resizing.read_processor(tmp_path)
    with pytest.raises(LcmError, match="centre of 30 x 30 in images of 28 x 28"):
        resizing.Processor(28, (30, 30), (0.0,) * 3, (1.0,) * 3)(random_images(40, 40))


SIDES = (True, "x", -1, 0, 2.5, [28], {}, {"height": 28}, {"shortest_edge": "x"}, {"height": 0, "width": 28}, 10**12)
VALUES = ("x", [], [0.5], ["a"] * 3, [float("nan")] * 3, {"a": 1}, 3)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("size", (*SIDES, None)),
        ("crop_size", (*SIDES, 29)),
        ("image_mean", (*VALUES, None)),
        ("image_std", (*VALUES, None, [0.5, 0.5, 0])),
        ("rescale_factor", ("x", None, [1], float("nan"))),
        ("resample", ([3], {}, True)),
        ("do_center_crop", ("no", 1)),
        ("do_resize", ("no", None, [])),
        ("image_processor_type", (3, ["CLIP"])),
    ],
)
def test_odd_values_are_refused_by_name(tmp_path, key, values):
    config = {"size": 28, "crop_size": 28, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for value in values:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(LcmError, match=key):
            resizing.read_processor(tmp_path)
