"""One record of a data set, and what every source of records can do.

A source gives random access to records by their number. It may know numbers about its records without reading them
(`field`): filters and aspect buckets use these. A record that proves unusable while the source is indexed gets no
number and is listed in `bad_records`; one that proves unusable when it is read raises `BadRecordError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lcm_jax.errors import LcmError, printable


class BadRecordError(LcmError):
    """A record that cannot be used; the message is the reason. Training replaces it with another one."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
      key: its name, unique within the source.
      image: an encoded image (JPEG, PNG, WebP, ...), or uint8 [h w 3] RGB.
      captions: one or more texts, each of which describes the image.
      fields: numbers known about it, as "width", "height", "pwatermark"; unknown ones are left out.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    fields: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that was not used: the file that holds it, its key there, and the reason."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        """One line, whatever characters the data have in names and texts."""
        return printable(f"{self.shard}: {self.key}: {self.reason}")


class Source(Protocol):
    """Random access to records. It is pickled to worker processes, so its pickle holds no open files."""

    bad_records: Sequence[BadRecord]  # unusable records found by indexing; they have no number
    notes: Sequence[str]  # what else was found and is not used, a phrase each, as "3 files of unknown kind (.heic)"

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Record:
        """Record `number`, 0 <= number < len. Raises BadRecordError."""
        ...

    def field(self, name: str) -> np.ndarray | None:
        """The number `name` of every record: float64 [n], NaN where it is missing; None if no record has it."""
        ...

    def where(self, number: int) -> tuple[str, str]:
        """(shard, key) of record `number`, for messages; the record is not read."""
        ...

    def digest(self) -> str:
        """`digest_of` the records in their order: keys, and what else is known without reading them.

        That is the size of images and captions in bytes, so that other content under an old key is noticed unless it
        has the same size. Where the data are, and when they were copied there, does not count.
        """
        ...


def digest_of(*parts: str | bytes | np.ndarray) -> str:
    """SHA-256 (hex) of all parts and their sizes."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        content = content.tobytes() if isinstance(content, np.ndarray) else content
        found.update(b"%d " % len(content))
        found.update(content)
    return found.hexdigest()
