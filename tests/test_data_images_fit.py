"""Resizing, cropping, SDXL's conditions and aspect buckets; the oracles are Pillow's resize of the whole image, closed
forms, exact fractions, and blocks whose position the conditions predict."""

from fractions import Fraction

import numpy as np
import parity
import pytest
from image_kit import noise
from PIL import Image, ImageOps

from lcm_jax.data import images
from lcm_jax.data.records import BadRecordError
from lcm_jax.errors import LcmError

DECODERS = ("pillow", "opencv")
PAIRS = [(decoder, name) for decoder in DECODERS for name in images.FILTERS[decoder]]


def apart(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


def test_opencv_reduces_as_an_exact_area_mean():
    """By a factor of 4 both are means of 4 x 4 pixels; by 1.7, on a photo-like image, they are close."""
    image = noise(96, 128)
    mean = image.reshape(24, 4, 32, 4, 3).mean(axis=(1, 3))[:, 4:28]
    for decoder in DECODERS:
        pixels, _ = images.fit(image, 24, 24, resize_filter="area", decoder=decoder)
        assert apart(pixels, mean) <= 1
    smooth = np.asarray(Image.fromarray(noise(5, 7)).resize((239, 170), Image.Resampling.BICUBIC))
    both = [images.fit(smooth, 100, 100, resize_filter="area", decoder=d)[0].astype(float) for d in DECODERS]
    assert apart(*both) <= 12 and np.abs(both[0] - both[1]).mean() < 1.5


def test_box_and_area_enlarge_bilinearly():
    image, target = noise(20, 33), (64, 64)
    expected, _ = images.fit(image, *target, resize_filter="bilinear")
    for decoder, name in (("pillow", "box"), ("pillow", "area"), ("opencv", "area")):
        np.testing.assert_array_equal(images.fit(image, *target, resize_filter=name, decoder=decoder)[0], expected)


# Geometry

SIZES = [(65, 97), (97, 65), (64, 65), (65, 64), (33, 131), (131, 33), (51, 51)]


@pytest.mark.parametrize("decoder, resize_filter", PAIRS)
@pytest.mark.parametrize("height, width", SIZES)
def test_a_marked_block_at_scale_1(height, width, decoder, resize_filter):
    """The shorter side is the target: nothing is resized, and the conditions locate every pixel."""
    side, rng = min(height, width), np.random.default_rng(height)
    image = noise(height, width)
    for flip in (False, True):
        for draws in (*rng.random((4, 2)), (0.0, 0.0), (1 - 2**-53, 1 - 2**-53)):
            pixels, conditions = images.fit(
                image, side, side, crop="random", draws=draws, flip=flip, decoder=decoder, resize_filter=resize_filter
            )
            original_height, original_width, top, left, *target = conditions.astype(int)
            assert (original_height, original_width, *target) == (height, width, side, side)
            for y, x in np.ndindex(side, side) if side < 40 else rng.integers(0, side, (50, 2)):
                column = width - 1 - (left + x) if flip else left + x
                assert (pixels[y, x] == image[top + y, column]).all()


@pytest.mark.parametrize("decoder, resize_filter", PAIRS)
@pytest.mark.parametrize("target", [(48, 48), (48, 64), (64, 48), (150, 150)])
@pytest.mark.parametrize("height, width", [(131, 97), (97, 131), (101, 101), (77, 231), (231, 77)])
def test_a_marked_block_at_any_scale(height, width, target, decoder, resize_filter):
    scale = max(target[0] / height, target[1] / width)
    rng, block = np.random.default_rng(0), max(5, round(5 / scale))
    for flip in (False, True):
        draws = rng.random(2)
        at = images.find_crop((height, width), target, "random", draws)
        # a block somewhere inside the crop
        y = int(at.top / scale + rng.random() * (target[0] / scale - block))
        x = int(at.left / scale + rng.random() * (target[1] / scale - block))
        y, x = min(y, height - block), min(x, width - block)
        image = np.zeros((height, width, 3), np.uint8)
        column = width - x - block if flip else x
        image[y : y + block, column : column + block] = 255
        pixels, conditions = images.fit(
            image, *target, crop="random", draws=draws, flip=flip, decoder=decoder, resize_filter=resize_filter
        )
        top, left = conditions[2:4]
        rows, columns = np.nonzero(pixels[..., 0] > 127)
        assert abs(rows.mean() + 0.5 - ((y + block / 2) * scale - top)) < 1
        assert abs(columns.mean() + 0.5 - ((x + block / 2) * scale - left)) < 1
        assert abs(np.ptp(rows) + 1 - block * scale) < 2 and abs(np.ptp(columns) + 1 - block * scale) < 2


@pytest.mark.parametrize("resize_filter", ["lanczos", "bicubic", "bilinear", "box"])
@pytest.mark.parametrize(
    "size, target",
    [
        ((500, 667), (256, 256)),
        ((667, 500), (256, 256)),
        ((167, 250), (192, 192)),
        ((351, 499), (160, 224)),
        ((64, 1501), (128, 128)),
    ],
)
def test_the_resized_part_is_the_part_of_the_resized(size, target, resize_filter):
    image, at = noise(*size), images.find_crop(size, target, "random", (0.3, 0.6))
    enlarging_box = resize_filter == "box" and at.resized_height > size[0]
    kernel = Image.Resampling.BILINEAR if enlarging_box else Image.Resampling[resize_filter.upper()]
    mirrored = ImageOps.mirror(Image.fromarray(image))
    whole = np.asarray(mirrored.resize((at.resized_width, at.resized_height), kernel))
    pixels, _ = images.fit(image, *target, resize_filter=resize_filter, crop="random", draws=(0.3, 0.6), flip=True)
    assert apart(pixels, whole[at.top : at.top + target[0], at.left : at.left + target[1]]) <= 1


@pytest.mark.parametrize("decoder, resize_filter", PAIRS)
def test_reducing_antialiases(decoder, resize_filter):
    """Stripes of one pixel, 8 times smaller, are grey; without a filter they would be black or white."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = images.fit(stripes, 64, 64, resize_filter=resize_filter, decoder=decoder)
    assert apart(pixels[4:-4, 4:-4], 127.5) < 8


@pytest.mark.parametrize("decoder, resize_filter", PAIRS)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 5000), (5000, 1), (2, 4000)])
def test_images_of_any_size_fit(size, decoder, resize_filter):
    flat = np.full((*size, 3), (10, 100, 200), np.uint8)
    pixels, conditions = images.fit(
        flat, 512, 512, crop="random", draws=(0.9, 0.9), resize_filter=resize_filter, decoder=decoder
    )
    assert pixels.shape == (512, 512, 3) and (pixels == flat[0, 0]).all()
    assert tuple(conditions[:2]) == size


def test_the_original_size_may_be_another():
    _, conditions = images.fit(noise(50, 70), 32, 32, original_size=(3000, 4200))
    assert conditions.dtype == np.float32
    np.testing.assert_array_equal(conditions, [3000, 4200, 0, (45 - 32) // 2, 32, 32])  # 70 * 32 / 50 = 44.8


def test_cover_rounds_halves_up_and_never_falls_short():
    rng = np.random.default_rng(0)
    sizes, targets = rng.integers(1, 3000, (500, 2)).tolist(), rng.integers(1, 800, (500, 2)).tolist()
    for (height, width), target in zip(sizes, targets, strict=True):
        scale = max(Fraction(target[0], height), Fraction(target[1], width))
        exact = height * scale, width * scale
        expected = tuple(max(t, int(e + Fraction(1, 2))) for t, e in zip(target, exact, strict=True))
        assert images.cover((height, width), tuple(target)) == expected
    assert images.cover((2, 5), (1, 1)) == (1, 3)  # 2.5
    assert images.cover((10, 20), (10, 10)) == (10, 20)


def test_every_random_position_is_as_likely():
    draws = (np.arange(1000) + 0.5) / 1000
    lefts = [images.find_crop((64, 73), (64, 64), "random", (u, u)).left for u in draws]
    np.testing.assert_array_equal(np.bincount(lefts), np.full(10, 100))
    assert images.find_crop((64, 73), (64, 64)) == images.Crop(64, 73, 0, 4)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"resize_filter": "lanczos", "decoder": "opencv"}, "^resize_filter=lanczos: the decoder opencv has only area"),
        ({"resize_filter": "nearest"}, "^resize_filter=nearest: the decoder pillow has only lanczos, "),
        ({"decoder": "turbo"}, "^decoder=turbo: .*pillow, opencv"),
        ({"crop": "middle"}, '^crop=middle: .*"random" or "center"'),
        ({"crop": "random"}, "two draws"),
        ({"crop": "random", "draws": (0.5, 1.0)}, "two draws"),
    ],
)
def test_bad_choices(options, reason):
    with pytest.raises(LcmError, match=reason) as caught:
        images.fit(noise(40, 50), 32, 32, **options)
    assert not isinstance(caught.value, BadRecordError)


# Buckets


@pytest.mark.parametrize(
    "resolution, step, max_aspect",
    [(512, 64, 2.0), (1024, 64, 2.0), (1024, 64, 4.0), (64, 8, 3.0), (768, 32, 1.5), (512, 512, 2.0), (512, 64, 1.0)],
)
def test_buckets_have_one_area_and_whole_steps(resolution, step, max_aspect):
    buckets = images.bucket_sizes(resolution, step=step, max_aspect=max_aspect)
    assert (resolution, resolution) in buckets and list(buckets) == sorted(set(buckets))
    for height, width in buckets:
        assert height % step == width % step == 0 and (width, height) in buckets
        assert max(height, width) <= max_aspect * min(height, width)
        assert height * width <= resolution**2 < min(height, width) * (max(height, width) + step)


def test_buckets_of_sdxl():
    assert images.bucket_sizes(1024, max_aspect=2.0) == (
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (960, 1088),
        (1024, 1024),
        (1088, 960),
        (1152, 896),
        (1216, 832),
        (1344, 768),
    )
    assert {(512, 2048), (576, 1792), (640, 1600), (704, 1472)} <= set(images.bucket_sizes(1024, max_aspect=4))


@pytest.mark.parametrize(
    "arguments", [(500, 64, 2.0), (0, 64, 2.0), (512, 0, 2.0), (512, 64, 0.5), (512, 64, float("nan"))]
)
def test_impossible_buckets(arguments):
    with pytest.raises(LcmError, match=f"^resolution={arguments[0]}: no aspect buckets"):
        images.bucket_sizes(arguments[0], step=arguments[1], max_aspect=arguments[2])


def test_the_nearest_bucket_by_log_aspect():
    buckets = images.bucket_sizes(512)
    shuffled = [buckets[i] for i in np.random.default_rng(1).permutation(len(buckets))]
    sizes = np.random.default_rng(0).integers(1, 4000, (3000, 2))
    for choice in (buckets, shuffled):
        chosen = images.nearest_bucket(sizes, choice)
        logs = np.array([np.log(h / w) for h, w in choice])
        gaps = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - logs)
        assert chosen.dtype == np.int64 and set(chosen) == set(range(len(choice)))
        parity.close(gaps[np.arange(len(sizes)), chosen], gaps.min(axis=1), atol=1e-12)
    np.testing.assert_array_equal(images.nearest_bucket(np.array(buckets) * 3, buckets), np.arange(len(buckets)))


def test_unknown_sizes_go_to_the_square_bucket():
    buckets = images.bucket_sizes(512)
    sizes = np.array([[0, 0], [0, 900], [900, 0], [np.nan, 500], [300, 300]])
    assert {buckets[i] for i in images.nearest_bucket(sizes, buckets)} == {(512, 512)}
    assert images.nearest_bucket(np.zeros((0, 2), int), buckets).shape == (0,)
    np.testing.assert_array_equal(images.nearest_bucket([[1, 9], [5, 5]], [(64, 64)]), [0, 0])
