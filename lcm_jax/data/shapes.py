"""Captioned images of coloured shapes, rendered by code: the embedded data set, and a source of records (`open`).

Every example is a pure function of (split, index). The random numbers are the raw output of Philox-4x64, a
counter-based generator, keyed by the split and the index: example 10**9 costs what example 0 costs, and the set is the
same on every platform and with every NumPy.

An image is 64 px wide and high and holds one object. Captions are open: each of the five attributes is named with
probability 0.6, at least one of them, in one of three forms:

    a small red circle at the top left on a white background
    on a white background there is a circle
    red shape, top left

Neither choice depends on the image, so what a caption does not name is distributed as before it was written: uniform
and independent. `law` is that distribution, and `drawn` draws from it.

Objects are rendered from signed distances d (pixels, negative inside): coverage = clip(1/2 - d, 0, 1), which is a box
filter one pixel wide, and pixel = background + coverage * (colour - background).

One tenth of all (shape, colour, size, position, background) combinations is kept out of the "train" split; the
"heldout" split uses that tenth only.

Every image can be rendered in another style (`STYLES`), which its caption does not name: a style LoRA or a fine-tuning
learns it. "card" makes objects taller, narrower and bolder, and marks two corners in the object's colour.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lcm_jax.data.records import BadRecord, Record, digest_of
from lcm_jax.errors import BadArgument, LcmError

RESOLUTION = 64
SPLITS = ("train", "heldout")
NAMED = 0.6  # probability that a caption names an attribute, before captions that name none are drawn again

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
POSITIONS = ("center", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "black", "gray", "navy", "brown")
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}

COLOUR_RGB = {
    "red": (222, 28, 36),
    "orange": (250, 138, 14),
    "yellow": (250, 226, 36),
    "green": (36, 164, 58),
    "cyan": (52, 214, 226),
    "blue": (40, 88, 236),
    "purple": (142, 44, 184),
    "pink": (250, 128, 188),
}
BACKGROUND_RGB = {
    "white": (246, 246, 246),
    "black": (10, 10, 10),
    "gray": (134, 134, 134),
    "navy": (14, 20, 72),
    "brown": (98, 58, 26),
}
COLOUR_JITTER = 9.0  # largest change of a channel of an object's colour, of 255
SHADE_JITTER = 6.0  # largest change of a background's shade, of 255, the same for its three channels
ANGLE_JITTER = 12.0  # degrees

# Column and row of each position in a 3 x 3 grid, counted from the top left.
_CELL = {
    "center": (1, 1),
    "left": (0, 1),
    "right": (2, 1),
    "top": (1, 0),
    "bottom": (1, 2),
    "top left": (0, 0),
    "top right": (2, 0),
    "bottom left": (0, 2),
    "bottom right": (2, 2),
}
_CIRCUMRADIUS = {"circle": 0.96, "square": 0.8 * 2**0.5, "triangle": 1.16, "star": 1.16, "cross": 1.112, "ring": 1.0}
_COUNTS = tuple(len(words) for words in ATTRIBUTES.values())
_HELDOUT_FRACTION = 0.1
_KEY = 0x5EED_5AA9_E500  # first word of the Philox key, added to the split's number
_CENTRES, _CENTRE_JITTER = (18.56, 32.0, 45.44), 2.0  # pixels
_RADII = {"small": (9.0, 10.5), "large": (15.0, 17.0)}  # pixels, smallest and largest
# Every set of attributes that a caption may name, with its probability.
_NAMES = tuple(names for n in range(1, 6) for names in itertools.combinations(ATTRIBUTES, n))
_NAMES_P = np.array([NAMED ** len(names) * (1 - NAMED) ** (5 - len(names)) for names in _NAMES]) / (
    1 - (1 - NAMED) ** 5
)


@dataclasses.dataclass(frozen=True)
class Style:
    """How objects are rendered.

    Attributes:
      stretch: (across, along) of each object about its centre.
      growth: of its outline, in pixels.
      corner_radius: in pixels, of discs in the first object's colour around the top left and bottom right corner.
    """

    stretch: tuple[float, float] = (1.0, 1.0)
    growth: float = 0.0
    corner_radius: float = 0.0


# "card" is as far from "plain" as the packaged scorer and the embedded VAE can follow, which saw plain images only.
STYLES = {"plain": Style(), "card": Style(stretch=(0.95, 1.12), growth=0.4, corner_radius=7.0)}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything that determines one image and its caption.

    Attributes:
      shape, colour, size, position, background: words of `ATTRIBUTES`.
      centre: of the object, (x, y) in pixels from the image's top left corner (pixel (0, 0) has its middle at
        (0.5, 0.5)).
      radius: in pixels.
      angle: in degrees.
      rgb, background_rgb: in 0..255.
      named: the attributes that the caption names.
      form: of the caption, 0, 1 or 2.
    """

    shape: str
    colour: str
    size: str
    position: str
    background: str
    centre: tuple[float, float]
    radius: float
    angle: float
    rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]
    named: tuple[str, ...] = tuple(ATTRIBUTES)
    form: int = 0

    @property
    def extent(self) -> float:
        """Radius in pixels of the smallest circle around `centre` that contains the object."""
        return self.radius * _CIRCUMRADIUS[self.shape]


def combination(shape: str, colour: str, size: str, position: str, background: str) -> int:
    """Number of a combination of attributes, 0 .. 4319."""
    words = (shape, colour, size, position, background)
    return int(
        np.ravel_multi_index([names.index(w) for names, w in zip(ATTRIBUTES.values(), words, strict=True)], _COUNTS)
    )


@functools.cache
def heldout_combinations() -> frozenset[int]:
    """The combinations (see `combination`) that "heldout" uses and "train" never shows."""
    total = int(np.prod(_COUNTS))
    order = np.argsort(np.random.Philox(key=np.array([_KEY, 0], np.uint64)).random_raw(total), kind="stable")
    return frozenset(int(i) for i in order[: round(_HELDOUT_FRACTION * total)])


@functools.cache
def _choices(split: str) -> tuple[np.ndarray, ...]:
    """Per background, the split's combinations as rows (shape, colour, size, position) of indices."""
    held = heldout_combinations()
    rows = np.array([i for i in range(int(np.prod(_COUNTS))) if (i in held) == (split == "heldout")])
    table = np.stack(np.unravel_index(rows, _COUNTS), axis=1)
    return tuple(table[table[:, 4] == b, :4] for b in range(len(BACKGROUNDS)))


def spec(index: int, split: str = "train", wording: int = 0) -> Spec:
    """Image number `index` (0 or more) of a split ("train" or "heldout") and one of its captions.

    A training that sees an image again can describe it in other words: `wording` (0 or more) draws `named` and `form`.
    """
    _check_split(split)
    if not 0 <= index < 2**63:
        raise LcmError(f"example index {index} is out of range: use 0 or more")
    key = _KEY + 16 * (1 + SPLITS.index(split))
    u = _uniform(key + 1, index, 10)
    # Backgrounds in proportion to their numbers of combinations make all combinations equally likely.
    choices = _choices(split)
    sizes = np.cumsum([len(c) for c in choices])
    b = int(np.searchsorted(sizes, u[0] * sizes[-1], side="right"))
    row = (*choices[b][int(u[2] * len(choices[b]))], b)
    words = {name: names[number] for (name, names), number in zip(ATTRIBUTES.items(), row, strict=True)}
    which, form = _uniform(key, index, 2, counter=wording)
    named = _NAMES[min(int(np.searchsorted(_NAMES_P.cumsum(), which, side="right")), len(_NAMES) - 1)]
    return _spec(words, u, named, int(form * len(_FORMS)))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise LcmError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")


def drawn(caption: str, index: int) -> Spec:
    """Image number `index` (0 or more) of those that a caption allows, drawn from `law(caption)`; of no split.

    Images of two captions are drawn independently of each other.

    Raises:
      LcmError: not a caption of this set.
    """
    named = parse_caption(caption)
    count = 10 + len(ATTRIBUTES)
    u = _uniform(_KEY, index, count, counter=count * zlib.crc32(caption.encode()))
    words = {
        name: names[named.get(name, int(v * len(names)))]
        for (name, names), v in zip(ATTRIBUTES.items(), u[10:], strict=True)
    }
    return _spec(words, u, tuple(named), 0)


def _spec(words: Mapping[str, str], u: np.ndarray, named: tuple[str, ...], form: int) -> Spec:
    """The image of these words; what they leave open comes from the uniform numbers u[1] and u[3] .. u[9]."""
    low, high = _RADII[words["size"]]
    radius = float(low + (high - low) * u[3])
    margin = radius * _CIRCUMRADIUS[words["shape"]] + 2.0  # the soft edge reaches beyond sharp corners
    centre = (
        float(np.clip(_CENTRES[cell] + _CENTRE_JITTER * (2.0 * v - 1.0), margin, RESOLUTION - margin))
        for cell, v in zip(_CELL[words["position"]], u[4:6], strict=True)
    )
    rgb = (
        float(np.clip(c + COLOUR_JITTER * (2.0 * v - 1.0), 0.0, 255.0))
        for c, v in zip(COLOUR_RGB[words["colour"]], u[7:10], strict=True)
    )
    shade = SHADE_JITTER * (2.0 * u[1] - 1.0)
    return Spec(
        **words,
        centre=tuple(centre),
        radius=radius,
        angle=float(ANGLE_JITTER * (2.0 * u[6] - 1.0)),
        rgb=tuple(rgb),
        background_rgb=tuple(c + float(shade) for c in BACKGROUND_RGB[words["background"]]),
        named=named,
        form=form,
    )


def _uniform(key: int, index: int, count: int, counter: int = 0) -> np.ndarray:
    """Numbers in [0, 1): float64 [count]."""
    raw = np.random.Philox(key=np.array([key, index], np.uint64), counter=counter).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def caption(spec: Spec) -> str:
    """The image in words, all lower case: what `spec.named` lists, in the form `spec.form`."""
    return describe({name: getattr(spec, name) for name in spec.named}, spec.form)


def describe(words: Mapping[str, str], form: int = 0) -> str:
    """The caption that names these words, {attribute: word}, in one of the forms 0, 1 and 2."""
    noun = words.get("shape", "shape")
    position, background = words.get("position"), words.get("background")
    if form == 2:
        tags = [" ".join(filter(None, (words.get("colour"), noun))), words.get("size"), position]
        return ", ".join(filter(None, (*tags, background and f"{background} background")))
    thing = " ".join(filter(None, (words.get("size"), words.get("colour"), noun)))
    thing = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    where = (position and f"at the {position}", background and f"on a {background} background")
    return " ".join(filter(None, (*where, "there is", thing) if form else (thing, *where)))


def _pattern(name: str) -> str:
    return f"(?P<{name}>{'|'.join(sorted(ATTRIBUTES[name], key=len, reverse=True))})"


_NOUN = rf"(?:{_pattern('shape')}|shape)"
_THING = rf"an? (?:{_pattern('size')} )?(?:{_pattern('colour')} )?{_NOUN}"
_AT, _ON = rf"at the {_pattern('position')}", rf"on a {_pattern('background')} background"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"{_THING}(?: {_AT})?(?: {_ON})?",
        rf"(?:{_AT} )?(?:{_ON} )?there is {_THING}",
        rf"(?:{_pattern('colour')} )?{_NOUN}(?:, {_pattern('size')})?(?:, {_pattern('position')})?"
        rf"(?:, {_pattern('background')} background)?",
    )
)


def parse_caption(text: str) -> dict[str, int]:
    """Class indices of the attributes that a caption names: the inverse of `describe`.

    Raises:
      LcmError: not a caption of this set.
    """
    if found := next(filter(None, (form.fullmatch(text) for form in _FORMS)), None):
        return {name: words.index(found[name]) for name, words in ATTRIBUTES.items() if found[name]}
    raise LcmError(
        f"not a caption of the shapes set: {text!r}; the forms are 'a small red circle at the top left on a white "
        "background', 'at the top left on a white background there is a small red circle' and 'red circle, small, "
        "top left, white background'; each word of them may be left out, and 'shape' stands for no shape's name"
    )


def law(caption: str, split: str | None = None) -> np.ndarray:
    """p(attributes | caption), float64 [6 8 2 9 5] in the order of `ATTRIBUTES`: uniform over what the caption allows.

    Without a split it is that of the whole world, in which attributes are independent; a split's own has holes where
    combinations belong to the other one.

    Raises:
      LcmError: not a caption of this set, an unknown split, or one without any image of the caption.
    """
    allowed = np.zeros(_COUNTS)
    named = parse_caption(caption)
    allowed[tuple(named.get(name, slice(None)) for name in ATTRIBUTES)] = 1.0
    if split is not None:
        _check_split(split)
        held = np.isin(np.arange(allowed.size), list(heldout_combinations())).reshape(_COUNTS)
        allowed *= held if split == "heldout" else ~held
        if not allowed.any():
            raise LcmError(
                f"{caption!r}: the split {split!r} has no image of it; leave the split out, or take the other"
            )
    return allowed / allowed.sum()


def labels(spec: Spec) -> dict[str, int]:
    """Class indices {shape, colour, size, position, background} of the image."""
    return {name: words.index(getattr(spec, name)) for name, words in ATTRIBUTES.items()}


def label_arrays(specs: Iterable[Spec | str]) -> dict[str, np.ndarray]:
    """Class indices of images, given as specs or captions: {attribute: int32 [b]}; -1 where a caption does not tell."""
    rows = [parse_caption(s) if isinstance(s, str) else labels(s) for s in specs]
    return {name: np.array([r.get(name, -1) for r in rows], np.int32) for name in ATTRIBUTES}


def render(spec: Spec, style: str = "plain") -> np.ndarray:
    """The image in one of STYLES: uint8 [64 64 3], RGB."""
    if style not in STYLES:
        raise LcmError(f"unknown style {style!r}: use one of {', '.join(STYLES)}")
    rendering = STYLES[style]
    image = np.empty((RESOLUTION, RESOLUTION, 3), np.float32)
    image[:] = spec.background_rgb
    if rendering.corner_radius:
        _mark_corners(image, spec.rgb, rendering.corner_radius)
    where, distance = _distance(spec, rendering)
    _paint(image[where], spec.rgb, distance)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def outline(spec: Spec) -> np.ndarray:
    """The object's outline, white on black, as a ControlNet reads it: uint8 [64 64 3].

    White are the pixels whose middle is at most half a pixel from it: a line one pixel wide, as edge detectors give it.
    """
    image = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    where, distance = _distance(spec, STYLES["plain"])
    image[where][np.abs(distance) <= 0.5] = 255
    return image


def _distance(spec: Spec, rendering: Style) -> tuple[tuple[slice, slice], np.ndarray]:
    """(rows and columns of the square around the object, signed distance there [h w] in pixels)."""
    across, along = rendering.stretch
    # One pixel more on every side for the soft edge.
    reach = spec.extent * max(rendering.stretch) + rendering.growth
    x0, y0 = (max(int(c - reach) - 1, 0) for c in spec.centre)
    x1, y1 = (min(int(c + reach) + 2, RESOLUTION) for c in spec.centre)
    x = (np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - spec.centre[0])) / across
    y = (np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - spec.centre[1])) / along
    c, s = np.float32(np.cos(np.deg2rad(spec.angle))), np.float32(np.sin(np.deg2rad(spec.angle)))
    distance = _signed_distance(spec.shape, c * x + s * y, c * y - s * x, np.float32(spec.radius))
    return (slice(y0, y1), slice(x0, x1)), distance * min(rendering.stretch) - rendering.growth


def _paint(patch: np.ndarray, rgb: tuple[float, float, float], distance: np.ndarray) -> None:
    """Paints in place, on float32 [h w 3], the object with this signed distance [h w] in pixels."""
    patch += np.clip(0.5 - distance, 0.0, 1.0)[..., None] * (np.asarray(rgb, np.float32) - patch)


def _mark_corners(image: np.ndarray, rgb: tuple[float, float, float], radius: float) -> None:
    """Paints in place, on float32 [64 64 3], quarter discs at the top left and at the bottom right."""
    side = int(radius) + 2
    n = np.arange(side, dtype=np.float32) + np.float32(0.5)
    distance = np.hypot(n[None, :], n[:, None]) - np.float32(radius)
    _paint(image[:side, :side], rgb, distance)
    _paint(image[-side:, -side:], rgb, distance[::-1, ::-1])


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    """Distance in pixels to the outline, negative inside; exact along straight edges, a lower bound outside corners."""
    if shape == "circle":
        return np.hypot(x, y) - 0.96 * r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.77 * r) - 0.23 * r
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - 0.8 * r
    if shape == "cross":  # arms 2.1 r long and 0.72 r wide
        long, wide = 1.05 * r, 0.36 * r
        return np.minimum(np.maximum(ax - long, ay - wide), np.maximum(ax - wide, ay - long))
    if shape == "triangle":  # equilateral, a corner up; the inscribed circle has half the circumradius
        return np.maximum(y, np.float32(0.75**0.5) * ax - 0.5 * y) - 0.58 * r
    # Star: five points, one up. Fold the plane into the tenth between a tip (at angle 0) and the next notch.
    tenth = np.pi / 5.0
    angle = np.arctan2(ax, -y)
    angle = np.abs(angle - 2.0 * tenth * np.rint(angle / (2.0 * tenth)))
    length = np.hypot(x, y)
    u, v = length * np.cos(angle), length * np.sin(angle)
    tip, notch = 1.16 * r, 0.54 * r
    edge_u, edge_v = notch * np.cos(tenth) - tip, notch * np.sin(tenth)
    return ((u - tip) * edge_v - v * edge_u) / np.hypot(edge_u, edge_v)


def render_batch(specs: Sequence[Spec], style: str = "plain") -> np.ndarray:
    """Images of several specs: uint8 [b 64 64 3]."""
    images = [render(s, style) for s in specs]
    return np.stack(images) if images else np.empty((0, RESOLUTION, RESOLUTION, 3), np.uint8)


def example(index: int, split: str = "train", style: str = "plain") -> tuple[np.ndarray, str]:
    """Image (uint8 [64 64 3]) and caption number `index` of a split."""
    s = spec(index, split)
    return render(s, style), caption(s)


def examples(start: int, count: int, split: str = "train", style: str = "plain") -> tuple[np.ndarray, list[str]]:
    """Images (uint8 [count 64 64 3]) and captions number `start` .. `start + count - 1` of a split."""
    specs = [spec(i, split) for i in range(start, start + count)]
    return render_batch(specs, style), [caption(s) for s in specs]


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """The first `num_examples` images of a split, in one style, as a `Source`."""

    num_examples: int
    style: str
    split: str
    bad_records: tuple[BadRecord, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, number: int) -> Record:
        image, text = example(number, self.split, style=self.style)
        side = float(RESOLUTION)
        return Record(self.where(number)[1], image, (text,), {"width": side, "height": side})

    def field(self, name: str) -> np.ndarray | None:
        return np.full(len(self), float(RESOLUTION)) if name in ("width", "height") else None

    def where(self, number: int) -> tuple[str, str]:
        return f"shapes/{self.split}/{self.style}", str(number)

    def digest(self) -> str:
        return digest_of("open captions", self.split, self.style, str(self.num_examples))


def open(*, num_examples: int = 4096, style: str = "plain", split: str = "train") -> ShapesSource:
    """The data set as a source. Raises BadArgument: unknown split or style, no images."""
    if split not in SPLITS:
        raise BadArgument("split", split, f"the shapes set has {', '.join(SPLITS)}")
    if style not in STYLES:
        raise BadArgument("style", style, f"must be one of {', '.join(STYLES)}")
    if num_examples < 1:
        raise BadArgument("num_examples", num_examples, "must be at least 1")
    return ShapesSource(num_examples, style, split)
