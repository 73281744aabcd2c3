"""A digest of every file of a folder, written last: what is read is what was written, or it is said which file is not.

    digests.json    {"files": {"state/manifest.ocdbt": {"bytes": 114, "sha256": "9f86..."}, ...},
                     "sha256": that of "files" as json.dumps writes it}

Only the files that are listed are looked at; one that someone or a file system (.nfs...) put beside them later is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lcm_jax import files

FILE = "digests.json"
# Files hashed at a time when a folder is verified. Writing takes one thread only: it runs beside the training.
THREADS = min(8, os.cpu_count() or 1)


def write(folder: Path) -> None:
    """Makes all files under `folder` last on the disk, and then digests.json of them."""
    entries = {}
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(place, name)
            entries[path.relative_to(folder).as_posix()] = _entry(path)
        files.sync_folder(Path(place))
    with files.new_file(folder / FILE) as partial:
        partial.write_text(json.dumps({"files": entries, "sha256": _of_entries(entries)}, indent=1) + "\n")


def find_damage(folder: Path, under: str = "") -> str | None:
    """What is wrong with the files of `folder` whose names begin with `under`: the first problem in words, else None.

    Raises:
      OSError: a file is there and cannot be read, which is no word on what it holds.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
        entries = content["files"]
        if content["sha256"] != _of_entries(entries):
            raise ValueError
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{FILE} is not as it was written"
    expected = {name: entry for name, entry in entries.items() if name.startswith(under)}
    if not expected:
        return f"{FILE} lists no file{f' of {under}' if under else ''}"
    for name, entry in expected.items():  # cheap, and tells more: before anything is hashed
        path, size = folder / name, entry["bytes"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _sha256(folder / name), expected)
        for (name, entry), actual in zip(expected.items(), found, strict=True):
            if actual != entry["sha256"]:
                return f"the content of {name} is not what was written"
    return None


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _of_entries(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
