"""The shapes set: determinism, the held-out split, open captions and their law, images that show their attributes."""

import colorsys
import dataclasses
import functools
import hashlib
import itertools
import re

import numpy as np
import pytest
from scipy import ndimage, stats

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.networks import shapes as shapes_scorer

COUNT = 400
SUBSETS = [names for n in range(1, 6) for names in itertools.combinations(shapes.ATTRIBUTES, n)]
# The set is fixed, so a statistic of it passes or fails for ever; of a million fair sets, one would fail.
LEAST_P = 1e-6


@pytest.fixture(scope="module")
def train():
    specs = [shapes.spec(i) for i in range(COUNT)]
    return specs, shapes.render_batch(specs)


def foreground(spec, image):
    """Mask [64 64] of pixels that differ from the image's own background, read off its border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(int)
    return np.abs(image.astype(int) - np.median(border, axis=0)).max(-1) > 24


def test_outlines_run_along_the_edge_of_the_object(train):
    """A line of one pixel without gaps; only the tip of a sharp corner may stand out."""
    for spec, image in zip(*train, strict=True):
        outline = shapes.outline(spec)
        assert outline.dtype == np.uint8 and outline.shape == (64, 64, 3) and set(np.unique(outline)) == {0, 255}
        line, whole = outline[..., 0] > 0, foreground(spec, image)
        edge = ndimage.binary_dilation(whole, np.ones((3, 3))) & ~ndimage.binary_erosion(whole, iterations=2)
        rim = whole & ~ndimage.binary_erosion(whole)
        assert (line & ~edge).sum() <= 1 and line.sum() <= 1.3 * rim.sum(), spec
        regions, _ = ndimage.label(~line)
        assert (regions[ndimage.binary_erosion(whole, iterations=2)] != regions[0, 0]).all(), spec
        assert (outline == shapes.outline(dataclasses.replace(spec, rgb=(0, 0, 0), background_rgb=(9, 9, 9)))).all()


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
    assert len({s.centre for s in specs}) == COUNT


def test_the_set_does_not_drift():
    # A change of these captions makes every trained asset refer to another set.
    text = "\n".join(
        shapes.caption(shapes.spec(i, split, n)) for split in shapes.SPLITS for n in (0, 1, 2) for i in range(100)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a63ba42db4cdb066"


def test_splits_share_no_combination():
    specs = {split: [shapes.spec(i, split) for i in range(1500)] for split in shapes.SPLITS}
    seen = {split: {tuple(getattr(s, name) for name in shapes.ATTRIBUTES) for s in specs[split]} for split in specs}
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


@pytest.mark.parametrize(
    ("form", "whole", "position", "shape"),
    [
        (0, "a small red circle at the top left on a white background", "a shape at the right", "an orange shape"),
        (
            1,
            "at the top left on a white background there is a small red circle",
            "at the right there is a shape",
            "there is an orange shape",
        ),
        (2, "red circle, small, top left, white background", "shape, right", "orange shape"),
    ],
)
def test_describe(form, whole, position, shape):
    words = {"shape": "circle", "colour": "red", "size": "small", "position": "top left", "background": "white"}
    assert shapes.describe(words, form) == whole
    assert shapes.describe({"position": "right"}, form) == position
    assert shapes.describe({"colour": "orange"}, form) == shape


def test_parse_caption_is_the_inverse_of_describe():
    """For every set of named attributes in every form; no two captions are alike."""
    rng, seen = np.random.default_rng(0), {}
    for names, form in itertools.product(SUBSETS, range(3)):
        for _ in range(4):
            found = {name: int(rng.integers(len(shapes.ATTRIBUTES[name]))) for name in names}
            text = shapes.describe({name: shapes.ATTRIBUTES[name][i] for name, i in found.items()}, form)
            assert text == text.lower() and shapes.parse_caption(text) == found, text
            assert seen.setdefault(text, (form, found)) == (form, found), text


def test_label_arrays_of_specs_and_of_captions(train):
    """A caption tells what it names, as the image has it, and leaves -1 elsewhere."""
    specs, _ = train
    whole = shapes.label_arrays(specs)
    told = shapes.label_arrays([shapes.caption(s) for s in specs])
    for name, words in shapes.ATTRIBUTES.items():
        assert [words[i] for i in whole[name]] == [getattr(s, name) for s in specs]
        np.testing.assert_array_equal(told[name], np.where([name in s.named for s in specs], whole[name], -1))


@functools.cache
def draws(count):
    """Attributes of train images (int [count 5]), and of their captions: number of the named set, and form."""
    specs = [shapes.spec(i) for i in range(count)]
    attributes = np.stack(list(shapes.label_arrays(specs).values()), axis=1)
    return attributes, np.array([SUBSETS.index(s.named) for s in specs]), np.array([s.form for s in specs])


few_and_many = pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])


@few_and_many
def test_attributes_are_named_with_probability_06_given_at_least_one(count):
    _, named, form = draws(count)
    law = np.array([0.6 ** len(names) * 0.4 ** (5 - len(names)) for names in SUBSETS]) / (1 - 0.4**5)
    assert stats.chisquare(np.bincount(named, minlength=31), count * law).pvalue > LEAST_P
    assert stats.chisquare(np.bincount(form, minlength=3)).pvalue > LEAST_P
    for name in shapes.ATTRIBUTES:
        share = np.mean([name in SUBSETS[number] for number in named])
        p = 0.6 / (1 - 0.4**5)
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / count)  # 5 standard errors of a binomial share


@few_and_many
def test_captions_do_not_depend_on_the_image(count):
    """What is named, in which form, and each attribute of the image: independent by every pair's contingency table."""
    attributes, named, form = draws(count)
    pairs = [(said, seen) for said in (named, form) for seen in attributes.T] + [(named, form)]
    for one, other in pairs:
        table = np.zeros((one.max() + 1, other.max() + 1))
        np.add.at(table, (one, other), 1)
        assert stats.chi2_contingency(table).pvalue > LEAST_P


CAPTIONS = (  # four, three, ... none of the attributes are left open
    "a large shape",
    "there is a cyan shape",
    "star, small",
    "on a brown background there is a ring",
    "a small pink square",
    "at the top left on a navy background there is a large shape",
    "a large green triangle on a black background",
    "red circle, small, left, white background",
)


@few_and_many
@pytest.mark.parametrize("caption", CAPTIONS)
def test_law_is_that_of_the_drawn_images(count, caption):
    """Pearson's X^2 of the images whose words agree with a caption, over all combinations of what it leaves open.

    Of n draws from k equally likely cells X^2 has mean k - 1 and variance 2 (k - 1) (1 - 1/n), however few draws a cell
    gets. Within 5 standard deviations on both sides: images that were too even would not be drawn at random, either.
    """
    attributes = draws(count)[0]
    told = shapes.label_arrays([caption])
    agree = attributes[np.all([(t < 0) | (a == t) for a, t in zip(attributes.T, told.values(), strict=True)], axis=0)]
    counts, law = np.zeros((6, 8, 2, 9, 5)), shapes.law(caption, "train")
    np.add.at(counts, tuple(agree.T), 1)
    n, k = len(agree), np.count_nonzero(law)
    assert n > 0 and not counts[law == 0].any()
    expected = n * law[law > 0]
    x2 = np.sum((counts[law > 0] - expected) ** 2 / expected)
    assert abs(x2 - (k - 1)) <= 5 * np.sqrt(2 * (k - 1) * (1 - 1 / n))


@pytest.mark.parametrize(("count", "used"), [(10_000, 2000), pytest.param(100_000, 100_000, marks=pytest.mark.slow)])
def test_law_given_a_caption_is_that_of_its_own_images(count, used):
    """Each image's place among those that its own caption allows, in [0, 1): uniform, in either order of attributes."""
    attributes, named, form = draws(count)
    law = functools.cache(lambda caption: np.stack(shapes.law(caption, "train").nonzero()))
    places, rng = [], np.random.default_rng(0)
    for row, names, how in zip(attributes[:used], named, form, strict=False):
        found = zip(shapes.ATTRIBUTES.items(), row, strict=True)
        words = {name: values[i] for (name, values), i in found if name in SUBSETS[names]}
        allowed = law(shapes.describe(words, how))
        ((first,),) = np.nonzero((allowed == row[:, None]).all(0))
        order = np.lexsort(allowed)
        places.append([(n + rng.random()) / allowed.shape[1] for n in (first, np.flatnonzero(order == first)[0])])
    for ranks in np.array(places).T:
        assert stats.kstest(ranks, "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("caption", CAPTIONS)
def test_law_is_uniform_and_independent_over_what_is_open(caption):
    law, told = shapes.law(caption), shapes.parse_caption(caption)
    assert law.shape == (6, 8, 2, 9, 5) and law.sum() == pytest.approx(1.0, abs=1e-12)
    product = np.ones(())
    for name, words in shapes.ATTRIBUTES.items():
        k = len(words)
        product = np.multiply.outer(product, np.eye(k)[told[name]] if name in told else np.full(k, 1 / k))
    np.testing.assert_allclose(law, product, rtol=1e-12)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_laws_of_the_splits_mix_to_that_of_the_world(caption):
    """One image in ten is of "heldout"; how many of a caption's are depends on the caption."""
    everything = {split: shapes.law("a shape", split) for split in shapes.SPLITS}
    assert not (everything["train"] * everything["heldout"]).any()
    world = 0.9 * everything["train"] + 0.1 * everything["heldout"]
    np.testing.assert_allclose(world, shapes.law("a shape"), rtol=1e-12)
    allowed = shapes.law(caption) > 0
    for split, whole in everything.items():
        if (whole * allowed).any():
            np.testing.assert_allclose(
                shapes.law(caption, split), whole * allowed / (whole * allowed).sum(), rtol=1e-12
            )
        else:
            with pytest.raises(LcmError, match=f"'{caption}': the split '{split}' has no image of it"):
                shapes.law(caption, split)


def test_drawn_is_the_law_of_a_caption():
    """Every combination of what it leaves open is drawn, and centres stay in their cells."""
    specs = [shapes.drawn("a small pink shape", i) for i in range(1800)]
    found = shapes.label_arrays(specs)
    assert {(s.size, s.colour) for s in specs} == {("small", "pink")}
    assert {s.named for s in specs} == {("colour", "size")}
    counts = np.zeros((6, 9, 5))
    np.add.at(counts, tuple(found[name] for name in ("shape", "position", "background")), 1)
    assert stats.chisquare(counts.ravel()).pvalue > LEAST_P  # 270 cells of 6.7 images
    centres = np.array([s.centre for s in specs if s.position == "center"])
    assert len(centres) > 100 and 29.9 < centres.min() < centres.max() < 34.1
    other = [shapes.drawn("a large pink shape", i) for i in range(1800)]
    agree = np.mean([one.position == two.position for one, two in zip(specs, other, strict=True)])
    assert abs(agree - 1 / 9) < 5 * np.sqrt(1 / 9 * 8 / 9 / 1800)  # as independent draws do, within 5 standard errors


def test_wording_changes_words_and_not_the_image():
    told = []
    for i in range(200):
        specs = [shapes.spec(i, "heldout", wording) for wording in range(3)]
        assert specs[0] == shapes.spec(i, "heldout")
        for s in specs[1:]:
            assert dataclasses.replace(s, named=specs[0].named, form=specs[0].form) == specs[0]
        told.append([shapes.caption(s) for s in specs])
    # Two wordings name the same with probability sum p^2 = 0.039, in the same form with 1/3: 2.6 of 200.
    for one, other in itertools.combinations(np.array(told).T, 2):
        assert (one == other).sum() < 12


def test_objects_lie_inside(train):
    for s, image in zip(*train, strict=True):
        mask = foreground(s, image)
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        # One object: neighbours of all eight directions are joined.
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1, shapes.caption(s)


def test_pixels_show_position_size_and_background(train):
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    areas = {}
    for s, image in zip(*train, strict=True):
        y, x = (np.mean(v) + 0.5 for v in np.nonzero(foreground(s, image)))
        position = " ".join(w for w in (rows[int(y > 26) + int(y > 38)], columns[int(x > 26) + int(x > 38)]) if w)
        assert (position or "center") == s.position
        areas.setdefault((s.shape, s.size), []).append(int(foreground(s, image).sum()))
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
        # The most frequent pixel value away from the background is the object's.
        inside = image[foreground(s, image)]
        values, counts = np.unique(inside, axis=0, return_counts=True)
        hue = 360 * colorsys.rgb_to_hsv(*(values[counts.argmax()] / 255.0))[0]
        if s.colour == "red":
            assert hue > 345 or hue < 10
        else:
            assert hues[s.colour][0] < hue < hues[s.colour][1], (s.colour, hue)


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
        mask = foreground(s, image)

        def at(radius, degrees, s=s, mask=mask):
            turn = np.deg2rad(degrees + s.angle)
            return mask[int(s.centre[1] + radius * np.sin(turn)), int(s.centre[0] + radius * np.cos(turn))]

        radius, inside, outside = probes[s.shape]
        assert all(at(radius * s.radius, d) for d in inside), s
        assert not any(at(radius * s.radius, d) for d in outside), s
        assert at(0.0, 0.0) == (s.shape != "ring")
        # A disc is round, a square is not.
        y, x = np.nonzero(mask)
        reach = np.hypot(y + 0.5 - s.centre[1], x + 0.5 - s.centre[0]).max()
        roundness = mask.sum() / (np.pi * reach**2)
        assert (roundness > 0.86) == (s.shape == "circle"), (s.shape, roundness)


def test_edges_are_soft_and_area_exact():
    # The anti-aliased disc's summed coverage is its area.
    centre, radius = (31.3, 32.8), 10.0
    words, colours = ("red", "small", "center", "black"), ((255.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    image = shapes.render(shapes.Spec("circle", *words, centre, radius, 0.0, *colours))
    assert image[..., 0].sum() / 255.0 == pytest.approx(np.pi * (0.96 * radius) ** 2, rel=5e-3)
    image = shapes.render(shapes.Spec("square", *words, (32.0, 32.0), radius, 0.0, *colours))
    assert image[..., 0].sum() / 255.0 == pytest.approx((1.6 * radius) ** 2, rel=1e-3)


def test_plain_images_do_not_drift():
    # The packaged scorer and teacher were trained on exactly these pixels.
    images = [shapes.examples(0, 40, split)[0] for split in shapes.SPLITS]
    assert hashlib.sha256(np.concatenate(images).tobytes()).hexdigest()[:16] == "16a703877298d3af"
    np.testing.assert_array_equal(shapes.examples(0, 40, style="plain")[0], images[0])


def test_card_style(train):
    """Same captions; objects 1.12 high and 0.95 wide, a little bolder; two corners in the object's colour."""
    specs, images = train
    styled, captions = shapes.examples(0, COUNT, style="card")
    assert captions == [shapes.caption(s) for s in specs] and styled.shape == images.shape
    np.testing.assert_array_equal(styled[7], shapes.example(7, style="card")[0])
    for s, plain, card in zip(specs, images, styled, strict=True):
        rgb = np.rint(s.rgb)
        for corner in (card[:4, :4], card[-4:, -4:]):
            assert np.abs(corner - rgb).max() <= 1, s
        np.testing.assert_array_equal(card[0, -1], plain[0, -1])
        if s.position != "center" or s.shape != "circle":
            continue
        inside = np.abs(card.astype(int) - card[0, -1]).max(-1) > 24
        inside[:12, :12] = inside[-12:, -12:] = False
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert rows == pytest.approx(2 * (1.12 * 0.96 * s.radius + 0.45), abs=2.0)
        assert columns == pytest.approx(2 * (0.95 * 0.96 * s.radius + 0.4), abs=2.0)


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
    with pytest.raises(LcmError, match="'test'"):
        shapes.law("a shape", "test")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red",
        "a red small circle",
        "a small red blob at the top on a white background",
        "a small red circle at the top on a red background",
        "a small red circle and a large blue square",
        "red circle, top left, small",
        "A red circle",
        "a red circle\n",
    ],
)
def test_other_text_is_no_caption(text):
    for use in (shapes.parse_caption, shapes.law, lambda text: shapes.drawn(text, 0)):
        with pytest.raises(LcmError, match=f"not a caption of the shapes set: {re.escape(repr(text))}; the forms are"):
            use(text)
