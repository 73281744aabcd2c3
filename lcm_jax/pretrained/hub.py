"""From what a user types (a folder, or `owner/name` on the Hugging Face hub) to a local folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from lcm_jax.errors import LcmError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def local_folder(source: str | Path, patterns: Sequence[str]) -> Path:
    """The folder `source`, or the local copy of the hub repository of that name.

    Args:
      source: folder, or hub id `owner/name`. A folder that exists wins.
      patterns: globs of the files that are needed; only these are downloaded.

    Raises:
      LcmError: neither a folder nor a hub id, or the repository cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise LcmError(
            f"{source} is a file; a folder in diffusers format is needed here. Only a whole model, not one part, is "
            "read from a single .safetensors file (lcm_jax.sample --model=FILE.safetensors)"
        )
    if not _HUB_ID.fullmatch(str(source)):
        raise LcmError(f"{source} does not exist; give a folder in diffusers format, or owner/name on the hub")
    return _download(str(source), patterns)


def _download(repository: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub  # here, because a run from a local folder needs none of it

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its own, httpx's, the system's and more
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LcmError(
            f"no folder {repository} here, and it cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "check name, access and network, or give a local folder"
        ) from error
