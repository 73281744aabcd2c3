"""The shapes set (`data/shapes.py`) as a source of records: pictures rendered when they are asked for."""

from __future__ import annotations

import dataclasses

import numpy as np

from lcm_jax.data import shapes
from lcm_jax.data.records import Fault, Record
from lcm_jax.errors import LcmError


@dataclasses.dataclass(frozen=True)
class Rendered:
    """The first `num_examples` pictures of a split, in one style."""

    num_examples: int
    style: str
    split: str
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, number: int) -> Record:
        picture, caption = shapes.example(number, self.split, style=self.style)
        side = float(shapes.RESOLUTION)
        return Record(self.where(number)[1], picture, (caption,), {"width": side, "height": side})

    def field(self, name: str) -> np.ndarray | None:
        return np.full(len(self), float(shapes.RESOLUTION)) if name in ("width", "height") else None

    def where(self, number: int) -> tuple[str, str]:
        return f"shapes/{self.split}/{self.style}", str(number)


def open(*, num_examples: int = 4096, style: str = "plain", split: str = "train") -> Rendered:
    """The source. Raises LcmError: unknown split or style, no pictures."""
    if split not in shapes.SPLITS:
        raise LcmError(f"config.data.split = {split!r}: the shapes set has {', '.join(shapes.SPLITS)}")
    if style not in shapes.STYLES:
        raise LcmError(f"config.data.style = {style!r}: must be one of {', '.join(shapes.STYLES)}")
    if num_examples < 1:
        raise LcmError(f"config.data.num_examples = {num_examples}: must be at least 1")
    return Rendered(num_examples, style, split)
