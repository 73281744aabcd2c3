"""What an evaluation draws and compares with: captions of a file or a data source, and pictures of that source.

Picture i of every row is of caption i. Of a source these are the first caption of its first records that can be read;
the others are left out, and counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lcm_jax.data import images
from lcm_jax.data.records import BadRecordError, Source
from lcm_jax.data.sources import parsing
from lcm_jax.errors import LcmError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Captions, and where they are from.

    Attributes:
      captions: one for each picture of a row.
      origin: "a.txt", or source and path.
      source: with pictures of the captions, if there is one.
      left_out: unusable records among those that were read.
    """

    captions: tuple[str, ...]
    origin: str
    source: Source | None = None
    left_out: int = 0

    def about(self) -> dict[str, str]:
        """Tells these captions, in this order, from others."""
        return {"from": self.origin, "sha256": hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()}


def of_prompts(prompts: Sequence[str], count: int | None, origin: str) -> Inputs:
    """`count` captions of a list of prompts, by turns; None: each once.

    Raises:
      LcmError: there is no prompt.
    """
    if not prompts:
        raise LcmError(f"{origin} holds no prompt; write one per line")
    return Inputs(tuple(prompts[i % len(prompts)] for i in range(count or len(prompts))), origin)


def of_source(source: Source, count: int, origin: str) -> Inputs:
    """The captions of the first `count` records that can be read.

    Raises:
      LcmError: there are fewer.
    """
    captions: list[str] = []
    bad = 0
    for number in range(len(source)):
        if len(captions) == count:
            break
        try:
            captions.append(source[number].captions[0])
        except BadRecordError:
            bad += 1
    if len(captions) < count:
        raise LcmError(
            f"{origin} has {len(captions)} records that can be read, --count={count} are asked for; give "
            f"--count={len(captions)} or less"
        )
    return Inputs(tuple(captions), origin, source, bad)


def source_pictures(source: Source, count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """The first `count` pictures of a source that can be decoded: uint8 [height width 3], see `_fitted`.

    Raises:
      LcmError: there are fewer.
    """
    return _fitted(_decoded(source, count), height, width)


def source_about(source: Source, count: int, origin: str) -> dict[str, Any]:
    """Tells the first `count` pictures of a source that can be read from others: by what is in them.

    They are not decoded: one that stands in for a broken picture among them is not told apart.
    """
    digest, found = hashlib.sha256(), 0
    for number in range(len(source)):
        if found == count:
            break
        try:
            image = source[number].image
        except BadRecordError:
            continue
        found += 1
        digest.update(hashlib.sha256(image if isinstance(image, bytes) else np.ascontiguousarray(image)).digest())
    return {"from": origin, "pictures": count, "sha256": digest.hexdigest()}


def _decoded(source: Source, count: int) -> Iterator[np.ndarray]:
    found = 0
    for number in range(len(source)):
        if found == count:
            return
        try:
            picture = images.decode(source[number].image)
        except BadRecordError:
            continue
        found += 1
        yield picture
    if found < count:
        raise LcmError(
            f"{found} pictures of the source can be decoded, {count} are needed as reference; give "
            f"--references={found} or less"
        )


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and the folders in it, by name. Raises LcmError if there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in parsing.IMAGE_SUFFIXES)
    if not found:
        raise LcmError(
            f"--reference={folder} holds no pictures ({' '.join(parsing.IMAGE_SUFFIXES)}); give a folder "
            "with some, or a .npz of statistics"
        )
    return found


def file_pictures(paths: Sequence[Path], height: int, width: int) -> Iterator[np.ndarray]:
    """Pictures of files: uint8 [height width 3], see `_fitted`. Raises LcmError, which names a broken file."""

    def decoded() -> Iterator[np.ndarray]:
        for path in paths:
            try:
                yield images.decode(parsing.read_file(path))
            except BadRecordError as error:
                raise LcmError(f"--reference: {path}: {error}; remove it or mend it") from None

    return _fitted(decoded(), height, width)


def _fitted(pictures: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Pictures resized and cropped to a size; warns at the end of those that had to be enlarged."""
    count, small = 0, []
    for picture in pictures:
        count += 1
        if picture.shape[0] < height or picture.shape[1] < width:
            small.append(picture.shape[:2])
        yield images.fit(picture, height, width)[0]
    if small:
        h, w = min(small, key=min)
        logging.warning(
            "%d of %d reference pictures are smaller than %d x %d (the smallest is %d x %d) and were "
            "enlarged: they are smoother than pictures of that size, and features see it",
            len(small),
            count,
            width,
            height,
            w,
            h,
        )


def in_batches(pictures: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Pictures [h w 3] -> uint8 [b h w 3], b at most `size`."""
    batch: list[np.ndarray] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def files_about(paths: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Tells this set of files from others: by what is in them. Raises LcmError, which names one that is no image."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(parsing.read_file(path)).digest())
    return {"from": str(folder), "pictures": len(paths), "sha256": digest.hexdigest()}
