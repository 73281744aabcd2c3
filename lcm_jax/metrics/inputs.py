"""What an evaluation generates from and compares with: captions of a file or a data source, and reference images.

Image i of every row is of caption i; captions stand there as often in a row as one has images. A data source gives the
first captions of its first usable records; the others are skipped and counted.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lcm_jax.data import images
from lcm_jax.data.records import BadRecordError, Record, Source
from lcm_jax.data.sources.parsing import read_file
from lcm_jax.data.sources.tree import image_files
from lcm_jax.errors import LcmError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Captions and their origin.

    Attributes:
      captions: one for each image of a row.
      name: of their origin: "--prompts=a.txt", or source and path.
      each: number of images of a caption.
      source: of the captions, with images; None if they are from a file.
      skipped: unusable records among those that were read.
    """

    captions: tuple[str, ...]
    name: str
    each: int = 1
    source: Source | None = None
    skipped: int = 0

    def about(self) -> dict[str, str]:
        """Identifies these captions in this order; "from" is for the reader alone."""
        origin = self.name if self.each == 1 else f"{self.name}, {self.each} images of each"
        return {"from": origin, "sha256": hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()}


def of_prompts(prompts: Sequence[str], count: int | None, name: str, each: int = 1) -> Inputs:
    """Captions of `count` images from a list of prompts, which is repeated if it is too short; None: all of them.

    Raises:
      LcmError: there is no prompt.
    """
    if not prompts:
        raise LcmError(f"{name} holds no prompt; write one per line")
    return Inputs(_repeated(itertools.cycle(prompts), each, count or len(prompts) * each), name, each)


def of_source(source: Source, count: int, name: str, each: int = 1) -> Inputs:
    """Captions of `count` images from the first usable records. Raises LcmError if there are too few."""
    if source.notes:
        logging.warning(f"{name}: not used: {', '.join(source.notes)}")
    records = math.ceil(count / each)
    found = list(itertools.islice(_usable(source, lambda record: record.captions[0]), records))
    if len(found) < records:
        raise LcmError(
            f"{name} has {len(found)} usable records, --count={count} needs {records}; give "
            f"--count={len(found) * each} or less"
        )
    captions = _repeated((caption for _, caption in found), each, count)
    return Inputs(captions, name, each, source, found[-1][0] + 1 - records)


def _repeated(captions: Iterable[str], each: int, count: int) -> tuple[str, ...]:
    """Each caption `each` times in a row, `count` in all."""
    return tuple(itertools.islice((caption for caption in captions for _ in range(each)), count))


def _usable(source: Source, use: Callable[[Record], Any]) -> Iterator[tuple[int, Any]]:
    """(number, `use(record)`) of the records of a source for which `use` does not raise BadRecordError."""
    for number in range(len(source)):
        try:
            value = use(source[number])
        except BadRecordError:
            continue
        yield number, value


class ReferenceImages(abc.ABC):
    """Images to compare with.

    Attributes:
      about: identifies them by their content: "sha256", "pictures" (their number), "from" (for the reader alone). All
        of them are read for it, once.
    """

    about: dict[str, Any]

    @abc.abstractmethod
    def decoded(self) -> Iterator[np.ndarray]:
        """uint8 [h w 3], each of its own size. Raises LcmError if one is missing or broken."""

    def read(self, height: int, width: int) -> Iterator[np.ndarray]:
        """The images resized and cropped to uint8 [height width 3]; warns at the end if some had to be enlarged."""
        count, small = 0, []
        for image in self.decoded():
            count += 1
            if image.shape[0] < height or image.shape[1] < width:
                small.append(image.shape[:2])
            yield images.fit(image, height, width)[0]
        if small:
            h, w = min(small, key=min)
            logging.warning(
                f"{len(small)} of {count} reference images are smaller than {width} x {height} (the smallest is "
                f"{w} x {h}) and were enlarged: they are smoother than images of that size, and features see it"
            )


@dataclasses.dataclass(frozen=True)
class SourceImages(ReferenceImages):
    """The first `count` usable images of a data source, which `name` describes."""

    source: Source
    count: int
    name: str

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        digest, count = hashlib.sha256(), 0
        # Not decoded: if one of them is broken, the image that replaces it is not part of the hash.
        for _, image in itertools.islice(_usable(self.source, lambda record: record.image), self.count):
            count += 1
            digest.update(hashlib.sha256(image if isinstance(image, bytes) else np.ascontiguousarray(image)).digest())
        return {"from": self.name, "pictures": count, "sha256": digest.hexdigest()}

    def decoded(self) -> Iterator[np.ndarray]:
        count = 0
        for _, image in itertools.islice(_usable(self.source, lambda r: images.decode(r.image)), self.count):
            count += 1
            yield image
        if count < self.count:
            raise LcmError(
                f"{count} images of the source can be decoded, {self.count} are needed as reference; give "
                f"--references={count} or less"
            )


@dataclasses.dataclass(frozen=True)
class FolderImages(ReferenceImages):
    """All images in a folder and its subfolders, in the order of their names; warns of what else is in there.

    Raises LcmError if there are none.
    """

    folder: Path

    def __post_init__(self) -> None:
        notes = ", ".join(self._found[1])
        if not self.paths:
            raise LcmError(
                f"--reference={self.folder} holds no images ({' '.join(images.SUFFIXES)})"
                + (f", but {notes}" if notes else "")
                + "; give a folder with some, or a .npz of statistics"
            )
        if notes:
            logging.warning(f"--reference={self.folder}: {len(self.paths)} images; not used: {notes}")

    @functools.cached_property
    def _found(self) -> tuple[list[str], list[str]]:
        return image_files(self.folder)

    @functools.cached_property
    def paths(self) -> list[Path]:
        return sorted(self.folder / name for name in self._found[0])

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(hashlib.sha256(read_file(path)).digest())
        return {"from": str(self.folder), "pictures": len(self.paths), "sha256": digest.hexdigest()}

    def decoded(self) -> Iterator[np.ndarray]:
        for path in self.paths:
            try:
                yield images.decode(read_file(path))
            except BadRecordError as error:
                raise LcmError(f"--reference: {path}: {error}; remove it or replace it") from None
