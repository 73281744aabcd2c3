"""The shapes set: determinism, the held-out split, and images that show what their captions say."""

import colorsys
import hashlib

import numpy as np
import pytest
from scipy import ndimage

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.networks import shapes as shapes_scorer

COUNT = 400


@pytest.fixture(scope="module")
def train():
    specs = [shapes.spec(i) for i in range(COUNT)]
    return specs, shapes.render_batch(specs)


def foreground(spec, image):
    """Mask [64 64] of pixels that differ from the image's own background, read off its border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(int)
    return np.abs(image.astype(int) - np.median(border, axis=0)).max(-1) > 24


def test_a_function_of_split_and_index(train):
    specs, images = train
    image, words = shapes.example(123)
    assert specs[123] == shapes.spec(123) and words == shapes.caption(specs[123])
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    np.testing.assert_array_equal(image, images[123])
    some, captions = shapes.examples(120, 5)
    np.testing.assert_array_equal(some, images[120:125])
    assert captions[3] == words
    assert shapes.spec(123, "heldout") != specs[123]
    shapes.spec(2**62)
    assert len({s.objects[0].centre for s in specs}) == COUNT


def test_the_set_does_not_drift():
    # A change of these captions makes every trained asset refer to another set.
    text = "\n".join(
        shapes.caption(shapes.spec(i, split, n)) for split in shapes.SPLITS for n in (1, 2, 3) for i in range(100)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c882aa96c0991ba5"


def test_splits_share_no_combination():
    seen = {split: set() for split in shapes.SPLITS}
    for split in shapes.SPLITS:
        for n in (1, 2, 3):
            for i in range(1500 if n == 1 else 300):
                s = shapes.spec(i, split, n)
                seen[split] |= {(o.shape, o.colour, o.size, o.position, s.background) for o in s.objects}
    assert not seen["train"] & seen["heldout"]
    held = shapes.heldout_combinations()
    assert len(held) == 432  # a tenth of 6 * 8 * 2 * 9 * 5
    assert len(seen["heldout"]) > 400 and {shapes.combination(*c) for c in seen["heldout"]} <= held


def test_all_words_are_about_equally_frequent():
    for split in shapes.SPLITS:
        arrays = shapes.label_arrays(shapes.spec(i, split) for i in range(2000))
        for name, words in shapes.ATTRIBUTES.items():
            counts = np.bincount(arrays[name], minlength=len(words))
            assert counts.min() > 0.7 * 2000 / len(words) and counts.max() < 1.4 * 2000 / len(words), (name, counts)


def test_caption_and_back(train):
    specs, _ = train
    assert shapes.caption(specs[0]) == "a large orange square at the right on a gray background"
    for n in (1, 2, 3):
        for i in range(100):
            s = shapes.spec(i, "train", n)
            assert len(s.objects) == n
            words = shapes.caption(s)
            assert words == words.lower()
            assert shapes.parse_caption(words) == [shapes.labels(s, k) for k in range(n)]
    arrays = shapes.label_arrays(specs)
    from_words = shapes.label_arrays([shapes.caption(s) for s in specs])
    for name in shapes.ATTRIBUTES:
        np.testing.assert_array_equal(arrays[name], from_words[name])


def test_objects_lie_inside_and_apart():
    for n in (1, 2, 3):
        for i in range(100):
            s = shapes.spec(i, "train", n)
            image = shapes.render(s)
            mask = foreground(s, image)
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
            blobs = ndimage.label(mask, np.ones((3, 3)))[1]  # neighbours of all eight directions are joined
            assert blobs == n, shapes.caption(s)


def test_pixels_show_position_size_and_background(train):
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    areas = {}
    for s, image in zip(*train, strict=True):
        o = s.objects[0]
        y, x = (np.mean(v) + 0.5 for v in np.nonzero(foreground(s, image)))
        position = " ".join(w for w in (rows[int(y > 26) + int(y > 38)], columns[int(x > 26) + int(x > 38)]) if w)
        assert (position or "center") == o.position
        areas.setdefault((o.shape, o.size), []).append(int(foreground(s, image).sum()))
        corner = image[0, 0] / 255.0
        hue, saturation, value = colorsys.rgb_to_hsv(*corner)
        if s.background == "white":
            assert corner.min() > 0.9
        elif s.background == "black":
            assert corner.max() < 0.1
        elif s.background == "gray":
            assert saturation < 0.05 and 0.4 < value < 0.65
        elif s.background == "navy":
            assert 0.58 < hue < 0.72 and value < 0.4
        else:
            assert s.background == "brown" and 0.04 < hue < 0.11 and 0.25 < value < 0.5
    for shape in shapes.SHAPES:
        assert min(areas[shape, "large"]) > 1.5 * max(areas[shape, "small"])


def test_pixels_show_colour(train):
    hues = {
        "orange": (22, 42),
        "yellow": (46, 62),
        "green": (115, 150),
        "cyan": (172, 195),
        "blue": (215, 235),
        "purple": (270, 295),
        "pink": (315, 345),
    }
    for s, image in zip(*train, strict=True):
        o = s.objects[0]
        # The most frequent pixel value away from the background is the object's.
        inside = image[foreground(s, image)]
        values, counts = np.unique(inside, axis=0, return_counts=True)
        hue = 360 * colorsys.rgb_to_hsv(*(values[counts.argmax()] / 255.0))[0]
        if o.colour == "red":
            assert hue > 345 or hue < 10
        else:
            assert hues[o.colour][0] < hue < hues[o.colour][1], (o.colour, hue)


def test_pixels_show_shape(train):
    """The outline, probed in directions that must be inside or outside, on a circle around the middle."""
    probes = {  # radius of the circle, directions inside, directions outside (degrees clockwise from the right)
        "circle": (0.8, range(0, 360, 30), ()),
        "ring": (0.77, range(0, 360, 30), ()),
        "square": (0.72, range(0, 360, 45), ()),
        "cross": (0.78, range(0, 360, 90), range(45, 360, 90)),
        "triangle": (0.8, range(-90, 270, 120), range(-30, 270, 120)),
        "star": (0.8, range(-90, 270, 72), range(-54, 270, 72)),
    }
    for s, image in zip(*train, strict=True):
        o, mask = s.objects[0], foreground(s, image)

        def at(radius, degrees, o=o, mask=mask):
            turn = np.deg2rad(degrees + o.angle)
            return mask[int(o.centre[1] + radius * np.sin(turn)), int(o.centre[0] + radius * np.cos(turn))]

        radius, inside, outside = probes[o.shape]
        assert all(at(radius * o.radius, d) for d in inside), shapes.caption(s)
        assert not any(at(radius * o.radius, d) for d in outside), shapes.caption(s)
        assert at(0.0, 0.0) == (o.shape != "ring")
        # A disc is round, a square is not.
        y, x = np.nonzero(mask)
        reach = np.hypot(y + 0.5 - o.centre[1], x + 0.5 - o.centre[0]).max()
        roundness = mask.sum() / (np.pi * reach**2)
        assert (roundness > 0.86) == (o.shape == "circle"), (o.shape, roundness)


def test_edges_are_soft_and_area_exact():
    # The anti-aliased disc's summed coverage is its area.
    centre, radius = (31.3, 32.8), 10.0
    o = shapes.Object("circle", "red", "small", "center", centre, radius, 0.0, (255.0, 0.0, 0.0))
    image = shapes.render(shapes.Spec("black", (0.0, 0.0, 0.0), (o,)))
    assert image[..., 0].sum() / 255.0 == pytest.approx(np.pi * (0.96 * radius) ** 2, rel=5e-3)
    square = shapes.Object("square", "red", "small", "center", (32.0, 32.0), radius, 0.0, (255.0, 0.0, 0.0))
    image = shapes.render(shapes.Spec("black", (0.0, 0.0, 0.0), (square,)))
    assert image[..., 0].sum() / 255.0 == pytest.approx((1.6 * radius) ** 2, rel=1e-3)


def test_plain_images_do_not_drift():
    # The packaged scorer and teacher were trained on exactly these pixels.
    images = [shapes.examples(0, 40, split, n)[0] for split in shapes.SPLITS for n in (1, 2, 3)]
    assert hashlib.sha256(np.concatenate(images).tobytes()).hexdigest()[:16] == "ff6e3622f80a3598"
    np.testing.assert_array_equal(shapes.examples(0, 40, style="plain")[0], images[0])


def test_card_style(train):
    """Same captions; objects 1.12 high and 0.95 wide, a little bolder; two corners in the object's colour."""
    specs, images = train
    styled, captions = shapes.examples(0, COUNT, style="card")
    assert captions == [shapes.caption(s) for s in specs] and styled.shape == images.shape
    np.testing.assert_array_equal(styled[7], shapes.example(7, style="card")[0])
    for s, plain, card in zip(specs, images, styled, strict=True):
        rgb = np.rint(s.objects[0].rgb)
        for corner in (card[:4, :4], card[-4:, -4:]):
            assert np.abs(corner - rgb).max() <= 1, shapes.caption(s)
        np.testing.assert_array_equal(card[0, -1], plain[0, -1])
        o = s.objects[0]
        if o.position != "center" or o.shape != "circle":
            continue
        inside = np.abs(card.astype(int) - card[0, -1]).max(-1) > 24
        inside[:12, :12] = inside[-12:, -12:] = False
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert rows == pytest.approx(2 * (1.12 * 0.96 * o.radius + 0.45), abs=2.0)
        assert columns == pytest.approx(2 * (0.95 * 0.96 * o.radius + 0.4), abs=2.0)


def test_the_scorer_reads_the_style():
    count = 512
    specs = [shapes.spec(i, "heldout") for i in range(count)]
    labels = shapes.label_arrays(specs)
    plain, card = (shapes_scorer.score(shapes.render_batch(specs, style)) for style in ("plain", "card"))
    assert shapes_scorer.caption_accuracy(card[0], labels) > 0.97
    others = shapes_scorer.score(shapes.examples(100_000, count, "heldout")[0])[1]
    apart, chance = (frechet.frechet_distance(features, others) for features in (card[1], plain[1]))
    assert apart > 2.0 * chance


def test_refusals():
    with pytest.raises(LcmError, match="'oil'"):
        shapes.example(0, style="oil")
    with pytest.raises(LcmError, match="'test'"):
        shapes.spec(0, "test")
    with pytest.raises(LcmError, match="-1"):
        shapes.spec(-1)
    with pytest.raises(LcmError, match="num_objects=4"):
        shapes.spec(0, "train", 4)
    for text in (
        "",
        "a red circle",
        "a small red blob at the top on a white background",
        "a small red circle at the top on a red background",
    ):
        with pytest.raises(LcmError, match="not a caption"):
            shapes.parse_caption(text)
