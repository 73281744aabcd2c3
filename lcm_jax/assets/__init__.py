"""Files that come with the package: a small Stable Diffusion and a ControlNet for it, and published models' configs."""

from __future__ import annotations

import json
from pathlib import Path

from lcm_jax.errors import LcmError

# What a user may type instead of a folder or a hub id.
_FOLDERS = {"shapes": "shapes_teacher", "shapes_controlnet": "shapes_controlnet"}


def path(name: str) -> Path:
    """Folder of the asset `name` ("shapes" or the folder's own name). Raises LcmError if it is not there."""
    folder = Path(__file__).parent / _FOLDERS.get(name, name)
    if not folder.is_dir():
        known = sorted(p.name for p in Path(__file__).parent.iterdir() if p.is_dir() and not p.name.startswith("_"))
        raise LcmError(f"asset {name!r} is not part of this installation; present: {', '.join(known) or 'none'}")
    return folder


def resolve(source: str) -> str:
    """`source` as loaders take it: the name of an asset becomes its folder, anything else stays as it is."""
    return str(path(source)) if source in _FOLDERS else source


def architecture(source: str) -> Path | None:
    """Folder with the configs alone of the published model that the hub calls `source`; None where there is none.

    Facts of the models, not their files: what decides shapes and noise tables. Fine-tunes share their base's.
    """
    folder = Path(__file__).parent / "architectures"
    name = json.loads((folder / "hub.json").read_text()).get(source)
    return None if name is None else folder / name
