"""Digests of exported files: loading warns of one that is no longer what was exported.

a folder        its lcm_config.json has {"sha256": {"unet/diffusion_pytorch_model.safetensors": "9f86...", ...}}
a single file   its header has `modelspec.hash_sha256`, of all bytes after the header (safetensors_io.save_file)
"""

import hashlib
import json
from collections.abc import Collection
from concurrent import futures
from pathlib import Path

from absl import logging

from lcm_jax import files, foreign
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import hub, safetensors_io
from lcm_jax.pretrained.model import RECORD, Config

KEY = "sha256"
_THREADS = 4
_FREE = ("README.md", RECORD)  # people edit the model card


def without(record: Config) -> Config:
    """A record without the digests of the folder that it is in."""
    return {key: value for key, value in record.items() if key != KEY}


def add(folder: Path) -> None:
    """Adds the digests of the files in `folder` to its record, if it has one."""
    if (folder / RECORD).is_file():
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _FREE)
        names = [path.relative_to(folder).as_posix() for path in paths]
        record = foreign.read_json(folder / RECORD) | {KEY: dict(zip(names, _digests(paths), strict=True))}
        files.write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def warn(source: str | Path, replaced: Collection[str] = ()) -> None:
    """Logs a warning for each file of an exported folder, or for a file, whose content is no longer what was exported.

    source: folder, file or hub id. replaced: parts (folders in it) that are not used.
    """
    try:
        is_file = hub.is_single_file(source) or files.expanded(source).is_file()
        path = hub.local_file(source) if is_file else hub.local_folder(source, [RECORD])
        changed = _changed_file(path) if is_file else _changed_in(path, replaced)
    except (LcmError, OSError):  # whoever loads it will say so
        return
    for file in changed:
        logging.warning("%s is not what was exported: its SHA-256 is another than recorded; copy it again", file)


def _changed_in(folder: Path, replaced: Collection[str]) -> list[Path]:
    folder = folder.absolute()
    root = folder if (folder / RECORD).is_file() else folder.parent
    recorded = foreign.read_json(root / RECORD).get(KEY) if (root / RECORD).is_file() else None
    recorded = recorded if isinstance(recorded, dict) else {}
    found = {
        files.inside(root, name): digest for name, digest in recorded.items() if name.split("/")[0] not in replaced
    }
    found = {path: digest for path, digest in found.items() if path.is_file() and path.is_relative_to(folder)}
    return [path for path, digest in zip(found, _digests(found), strict=True) if digest != found[path]]


def _changed_file(path: Path) -> list[Path]:
    with safetensors_io.open_file(path) as stored:
        metadata = stored.metadata
    if RECORD not in metadata or safetensors_io.HASH not in metadata:  # other programs may hash something else
        return []
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return [] if metadata[safetensors_io.HASH] == f"0x{found}" else [path]


def _digests(paths: Collection[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest, paths))
