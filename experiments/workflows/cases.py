"""What the workflows are asked for: something else than what an image of the held-out split shows.

Captions name all five attributes. Those that are not as in the image:

    image to image    the colour; given is the image
    inpainting        shape and colour; the image, and a mask around its object
    ControlNet        none, or shape, size and position; the outline, which shows these three
"""

import dataclasses
from collections.abc import Collection, Iterable

import numpy as np

from lcm_jax.data import shapes

OUTLINED = ("shape", "size", "position")  # what an outline shows
MARGIN = 3.0  # pixels of the background that are masked around an object


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One question.

    Attributes:
      spec: of the image that is given, or whose outline is.
      words: what the caption names, {attribute: word}.
    """

    spec: shapes.Spec
    words: dict[str, str]

    @property
    def caption(self) -> str:
        return shapes.describe(self.words)

    @property
    def given(self) -> np.ndarray:
        """The image, uint8 [64 64 3]."""
        return shapes.render(self.spec)


def recoloured(number: int) -> Case:
    """Of image to image."""
    return _case(number, ("colour",))


def repainted(number: int) -> Case:
    """Of inpainting."""
    return _case(number, ("shape", "colour"))


def outlined(number: int, contradicts: bool) -> Case:
    """Of ControlNet."""
    return _case(number, OUTLINED if contradicts else ())


def _case(number: int, changed: tuple[str, ...]) -> Case:
    """Image `number` of the held-out split in words, those of `changed` replaced by others, which depend on it."""
    spec = shapes.spec(number, "heldout")
    return Case(spec, reworded(spec, tuple(shapes.ATTRIBUTES), changed, number))


def reworded(spec: shapes.Spec, named: Iterable[str], changed: Collection[str], number: int) -> dict[str, str]:
    """Words for the attributes `named`: the image's, but others for those of `changed`; which, depends on `number`."""
    found = {}
    for name in named:
        words = shapes.ATTRIBUTES[name]
        step = 1 + number % (len(words) - 1) if name in changed else 0
        found[name] = words[(words.index(getattr(spec, name)) + step) % len(words)]
    return found


def mask_of(spec: shapes.Spec) -> np.ndarray:
    """The square around an object, which is to be painted: bool [64 64]."""
    mask, reach = np.zeros((shapes.RESOLUTION,) * 2, bool), spec.extent + MARGIN
    left, top = (max(0, int(c - reach)) for c in spec.centre)
    right, bottom = (int(np.ceil(c + reach)) for c in spec.centre)
    mask[top:bottom, left:right] = True
    return mask
