"""Records -> rows of arrays, as the loader batches them.

Pictures         from records: pixels and token ids, decoded, cropped, flipped and tokenised when they are asked for
Arrays           held in memory: what was encoded before training began
CaptionDropout   either of them, with the text of "" in the place of a share of the captions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lcm_jax.data import images
from lcm_jax.data.loader import Examples
from lcm_jax.data.records import Source

Tokenize = Callable[[Sequence[str]], Mapping[str, np.ndarray]]  # captions -> int32 [b l] for each text encoder


@dataclasses.dataclass(frozen=True)
class Look:
    """How a picture is made of a record.

    Attributes:
        crop: "random" or "center".
        flip: probability of a mirrored picture.
        resize_filter, decoder: see `images`.
        size_keys: fields (height, width) in pixels that are told to SDXL as the original size, where a record has both;
            otherwise, and with None, it is the size of the picture itself.
    """

    crop: str = "random"
    flip: float = 0.0
    resize_filter: str = "lanczos"
    decoder: str = "pillow"
    size_keys: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Rows {"pixels": uint8 [h w 3], token ids int32 [l] by text encoder, "time_ids": float32 [6] if wanted}.

    Attributes:
        source: of the records.
        sizes: (height, width) of the pictures in each group.
        members: numbers of the records in each group; None: one group of all.
        look: how pictures are made.
        tokenize: of the captions.
        time_ids: SDXL's size and crop conditions are part of the row.
    """

    source: Source
    sizes: tuple[tuple[int, int], ...]
    look: Look
    tokenize: Tokenize
    time_ids: bool = False
    members: tuple[np.ndarray, ...] | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        return (len(self.source),) if self.members is None else tuple(map(len, self.members))

    def _number(self, group: int, rank: int) -> int:
        return rank if self.members is None else int(self.members[group][rank])

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.source.where(self._number(group, rank))

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        record = self.source[self._number(group, rank)]
        caption, flip, *corner = draws.random(4)  # always as many, so that each keeps its meaning
        pixels, conditions = images.fit(
            images.decode(record.image, self.look.decoder),
            *self.sizes[group],
            resize_filter=self.look.resize_filter,
            crop=self.look.crop,
            draws=corner,
            flip=bool(flip < self.look.flip),
            decoder=self.look.decoder,
            original_size=self._original_size(record.fields),
        )
        ids = self.tokenize([record.captions[int(caption * len(record.captions))]])
        row = {"pixels": pixels, **{name: tokens[0] for name, tokens in ids.items()}}
        return row | ({"time_ids": conditions} if self.time_ids else {})

    def _original_size(self, fields: Mapping[str, float]) -> tuple[float, float] | None:
        found = [fields.get(key, 0) for key in self.look.size_keys or ()]
        return tuple(found) if found and min(found) >= 1 else None


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Rows of arrays in memory. `parts`: for each group name -> array [n ...]; `places`: where each example is from."""

    parts: tuple[Mapping[str, np.ndarray], ...]
    places: tuple[Sequence[tuple[str, str]], ...] | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(len(next(iter(part.values()), ())) for part in self.parts)

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        del draws
        return {name: array[rank] for name, array in self.parts[group].items()}

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.places[group][rank] if self.places else ("memory", f"{group}/{rank}")


@dataclasses.dataclass(frozen=True)
class CaptionDropout:
    """`examples` whose text is replaced by `null` with probability `share`, for guidance without a condition.

    null: the arrays of a row that stand for the text, made of ""; for one row each.
    """

    examples: Examples
    null: Mapping[str, np.ndarray]
    share: float

    @property
    def groups(self) -> tuple[int, ...]:
        return self.examples.groups

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.examples.where(group, rank)

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        dropped = draws.random() < self.share
        row = self.examples.row(group, rank, draws)
        return row | {name: value for name, value in self.null.items() if name in row} if dropped else row
