"""What is in a folder of images: every file that a person sees there is found, or counted."""

from __future__ import annotations

import collections
import heapq
import os
import posixpath
import stat
from collections.abc import Iterable
from pathlib import Path

from lcm_jax.data import images
from lcm_jax.data.sources.parsing import TEXT_SUFFIXES
from lcm_jax.errors import printable

BESIDE = (*TEXT_SUFFIXES, "json")  # suffixes of files that describe the image of the same name


def suffix_of(name: str) -> str:
    """Lower case and without its dot; "" if there is none."""
    return posixpath.splitext(name)[1][1:].lower()


def is_image(name: str) -> bool:
    return suffix_of(name) in images.SUFFIXES


def walk(root: Path) -> tuple[dict[str, int], list[str]]:
    """All files in a folder and below it, and notes on what else is there.

    Linked folders are followed. Each folder is read once, under its own name rather than a link's.

    Returns:
      {path within the folder: bytes}, sorted by path; -1 for what is no regular file, as a broken link or a pipe.
    """
    sizes: dict[str, int] = {}
    hidden, again = [], []
    folders, links, seen = [""], [], set()
    while folders or links:
        inside = folders.pop() if folders else heapq.heappop(links)
        state = os.stat(root / inside)
        if (state.st_dev, state.st_ino) in seen:
            again.append(inside)
            continue
        seen.add((state.st_dev, state.st_ino))
        with os.scandir(root / inside) as entries:
            for entry in entries:
                name = posixpath.join(inside, entry.name)
                if entry.name.startswith("."):
                    hidden.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif os.path.isdir(entry.path):  # `entry.is_dir` raises of a link to itself
                    heapq.heappush(links, name)
                else:
                    sizes[name] = _size(entry)
    notes = _counted(hidden, "hidden file or folder", "hidden files or folders")
    notes += _counted(again, "link to a folder that is read already", "links to folders that are read already")
    return dict(sorted(sizes.items())), notes


def _size(entry: os.DirEntry[str]) -> int:
    try:
        state = entry.stat()
    except OSError:  # a broken link, or one to itself
        return -1
    return state.st_size if stat.S_ISREG(state.st_mode) else -1


def unknown(names: Iterable[str]) -> list[str]:
    """Notes on files that are of no use: texts without an image, and files of other kinds, with their suffixes."""
    texts, others = [], []
    for name in names:
        (texts if suffix_of(name) in TEXT_SUFFIXES else others).append(name)
    notes = _counted(texts, "text without an image", "texts without an image")
    if others:
        kinds = collections.Counter(f".{suffix_of(name)}" if suffix_of(name) else "no suffix" for name in others)
        most = [kind for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
        listed = " ".join(most[:8]) + (" ..." if len(most) > 8 else "")
        notes.append(f"{len(others)} file{'s' * (len(others) > 1)} of unknown kind ({printable(listed)})")
    return notes


def _counted(names: list[str], one: str, several: str) -> list[str]:
    """["3 hidden files or folders, as .git"]; nothing of no names."""
    return [f"{len(names)} {one if len(names) == 1 else several}, as {printable(min(names))}"] if names else []


def image_files(root: Path) -> tuple[list[str], list[str]]:
    """Paths within a folder of the images in it and below it, sorted, and notes on what else is there.

    Files that describe an image beside them are known, and not noted.
    """
    sizes, notes = walk(root)
    found = [name for name in sizes if is_image(name)]
    stems = {posixpath.splitext(name)[0] for name in found}
    others = [name for name in sizes if not is_image(name)]
    return found, notes + unknown(
        name for name in others if not (suffix_of(name) in BESIDE and posixpath.splitext(name)[0] in stems)
    )
