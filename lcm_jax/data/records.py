"""One record of a data set, and what every source of records can do.

A source is random access: a length, and the record of each number. It may know numbers about its records (`field`)
without reading them, which is what filters and aspect buckets work on. What it found unusable while it was indexed is
not among its records but among its `faults`; what turns out unusable when it is read raises `BadRecord`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lcm_jax.errors import LcmError


class BadRecord(LcmError):
    """One record that cannot be used: its message is the reason. Training goes on with another in its place."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One captioned picture.

    Attributes:
      key: its name, unique within the source.
      image: an encoded picture (JPEG, PNG, WebP, ...), or uint8 [h w 3] RGB.
      captions: one or more texts, each of which describes it.
      fields: numbers known about it, as "width", "height", "pwatermark"; what is not known is not there.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    fields: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A record that was not used: the file it stands in, its key there, and the reason."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


class Source(Protocol):
    """Random access to records. It is pickled to worker processes, so it holds no open files when it is."""

    faults: Sequence[Fault]  # unusable records that indexing found; they have no number

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Record:
        """Record `number`, 0 <= number < len. Raises BadRecord."""
        ...

    def field(self, name: str) -> np.ndarray | None:
        """What is known as `name` of every record: float64 [n], NaN where it is missing; None if no record has it."""
        ...

    def where(self, number: int) -> tuple[str, str]:
        """(shard, key) of record `number`, for messages, without reading it."""
        ...
