"""Rows of arrays by random access: what the loader makes batches of.

ImageRows        of records: pixels and token ids, decoded, cropped, flipped and tokenised when a row is read
Arrays           in memory: rows that were encoded before training
cache.Cached     on disk: rows that `lcm_jax.precompute` encoded
CaptionDropout   any of them, with a share of the captions replaced by ""
FixedDraws       any of them, with random numbers that depend on the row alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from lcm_jax.data import images
from lcm_jax.data.order import draws_at
from lcm_jax.data.records import BadRecordError, Record, Source
from lcm_jax.errors import LcmError

Tokenize = Callable[[Sequence[str]], Mapping[str, np.ndarray]]  # captions -> int32 [b l] for each text encoder


class Examples(Protocol):
    """Rows of training data in one group, or in one for each aspect bucket; they are pickled to worker processes.

    All rows of a group have the same shapes.
    """

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of examples in each group."""
        ...

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one example, all its randomness from `draws`. Raises BadRecordError."""
        ...

    def where(self, group: int, rank: int) -> tuple[str, str]:
        """(shard, key) of an example, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """How the image of a record becomes pixels and SDXL's size conditions.

    Attributes:
        crop: "random" or "center".
        flip: probability of a mirrored image.
        resize_filter, decoder: see `images.fit`.
        size_keys: fields (height, width) in pixels that SDXL is conditioned on as the original size, if a record has
            both; otherwise, and with None, it is the size of the image itself.
    """

    crop: str = "random"
    flip: float = 0.0
    resize_filter: str = "lanczos"
    decoder: str = "pillow"
    size_keys: tuple[str, str] | None = None

    def __call__(
        self, record: Record, size: tuple[int, int], flip: float, corner: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [h w 3] of `size` = (h, w), and time_ids float32 [6]; `flip` and the two of `corner` are in [0, 1)."""
        known = [record.fields.get(key, 0) for key in self.size_keys or ()]
        return images.fit(
            images.decode(record.image, self.decoder),
            *size,
            resize_filter=self.resize_filter,
            crop=self.crop,
            draws=corner,
            flip=bool(flip < self.flip),
            decoder=self.decoder,
            original_size=tuple(known) if known and min(known) >= 1 else None,
        )


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Rows {"pixels": uint8 [h w 3], token ids int32 [l] by text encoder, "time_ids": float32 [6] if wanted}.

    Attributes:
        source: of the records.
        sizes: (height, width) of the images in each group.
        transform: of the images.
        tokenize: of the captions.
        time_ids: whether SDXL's size and crop conditions are part of a row.
        members: numbers of the records in each group; None: one group of all records.
    """

    source: Source
    sizes: tuple[tuple[int, int], ...]
    transform: ImageTransform
    tokenize: Tokenize
    time_ids: bool = False
    members: tuple[np.ndarray, ...] | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        return (len(self.source),) if self.members is None else tuple(map(len, self.members))

    def record(self, group: int, rank: int) -> Record:
        """The record of a row. Raises BadRecordError."""
        return self.source[self._number(group, rank)]

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        record = self.record(group, rank)
        caption, flip, *corner = draws.random(4)  # four whatever is used, so that each keeps its meaning
        pixels, time_ids = self.transform(record, self.sizes[group], flip, corner)
        try:
            ids = self.tokenize([record.captions[int(caption * len(record.captions))]])
        except LcmError as error:
            raise BadRecordError(str(error)) from None
        row = {"pixels": pixels, **{name: tokens[0] for name, tokens in ids.items()}}
        return row | ({"time_ids": time_ids} if self.time_ids else {})

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.source.where(self._number(group, rank))

    def _number(self, group: int, rank: int) -> int:
        return rank if self.members is None else int(self.members[group][rank])


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Rows of arrays in memory.

    Attributes:
        parts: for each group name -> array [n ...].
        origins: for each group the (shard, key) of its examples; None: unknown.
    """

    parts: tuple[Mapping[str, np.ndarray], ...]
    origins: tuple[Sequence[tuple[str, str]], ...] | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(len(next(iter(part.values()), ())) for part in self.parts)

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        del draws
        return {name: array[rank] for name, array in self.parts[group].items()}

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.origins[group][rank] if self.origins else ("memory", f"{group}/{rank}")


@dataclasses.dataclass(frozen=True)
class CaptionDropout:
    """`examples` whose text is replaced by `null` with probability `share`, for classifier-free guidance.

    null: the arrays that stand for the text "" in one row.
    """

    examples: Examples
    null: Mapping[str, np.ndarray]
    share: float

    @property
    def groups(self) -> tuple[int, ...]:
        return self.examples.groups

    def row(self, group: int, rank: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
        dropped = draws.random() < self.share
        row = self.examples.row(group, rank, draws)
        return row | {name: value for name, value in self.null.items() if name in row} if dropped else row

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.examples.where(group, rank)


@dataclasses.dataclass(frozen=True)
class FixedDraws:
    """`examples` with random numbers that depend on the row, not on its position in the order of the data.

    Row i * variants + v is variant v of example i of its group. If example i is the j-th of all N in the groups, that
    row has the random numbers of position v * N + j.
    """

    examples: Examples
    seed: int
    variants: int = 1

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(size * self.variants for size in self.examples.groups)

    def row(self, group: int, rank: int, draws: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        del draws
        number, variant = divmod(rank, self.variants)
        sizes = self.examples.groups
        position = variant * sum(sizes) + sum(sizes[:group]) + number
        return self.examples.row(group, number, draws_at(self.seed, position))

    def where(self, group: int, rank: int) -> tuple[str, str]:
        return self.examples.where(group, rank // self.variants)
