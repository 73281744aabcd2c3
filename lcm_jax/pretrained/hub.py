"""What a user types (a path, `owner/name` on the Hugging Face hub, an address there) -> a local folder or file."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import safetensors_io
from lcm_jax.pretrained.safetensors_io import PICKLED, SUFFIX

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILE = re.compile(
    r"(?:https?://(?:huggingface\.co|hf\.co)/)?(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)/"
    r"(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>[^?]+\.safetensors)(?:\?.*)?"
)
# What is given beside a model -> its names in the library, the programs and the configs of runs.
ARGUMENTS = {
    "unet": "unet= (--unet, config.model.student)",
    "vae": "vae= (--vae, config.model.vae)",
    "config": "config= (--model_config, config.model.config)",
}
_TO_FOLDER = {  # diffusers' class, and what its from_single_file takes for a file whose keys may lack the prefix
    "unet": (
        "UNet2DConditionModel",
        "{{'model.diffusion_model.' + k.split('diffusion_model.')[-1]: v for k, v in s.load_file('{0}').items()}}",
    ),
    "vae": ("AutoencoderKL", "'{0}'"),
}
_SUFFIXES = (SUFFIX, *PICKLED, ".gguf")


def is_single_file(source: str | Path) -> bool:
    """Whether `source` names one weight file, here or on the hub (owner/name/FILE, or its address), of any kind."""
    path = files.expanded(source)
    return not path.is_dir() and (path.exists() or str(source).split("?")[0].lower().endswith(_SUFFIXES))


def is_name(source: str) -> bool:
    """Whether a text has the form of a name on the hub: owner/name, owner/name/FILE.safetensors, or its address."""
    return any(form.fullmatch(source) for form in (_HUB_ID, _HUB_FILE))


def is_repository(source: str) -> bool:
    """Whether a text names a repository on the hub, and not a folder here, which `local_folder` prefers."""
    return bool(_HUB_ID.fullmatch(source)) and not files.expanded(source).is_dir()


def as_folder(path: Path, part: str) -> str:
    """What to do with a file of one part ("unet" or "vae"), which is read from a folder."""
    if (path.parent / "config.json").is_file():
        return f"give its folder, {path.parent}"
    (kind, content), folder = _TO_FOLDER[part], path.with_suffix("")
    return (
        "make it in an environment with torch, MODEL being a diffusers folder or hub id of the model it goes with: "
        f'python -c "import safetensors.torch as s; from diffusers import {kind} as M; M.from_single_file('
        f"{content.format(path)}, config='MODEL', subfolder='{part}').save_pretrained('{folder}-{part}')\""
    )


def local_folder(source: str | Path, patterns: Sequence[str], part: str | None = None) -> Path:
    """The folder `source`, or the local copy of the hub repository of that name.

    Args:
      source: folder, or hub id `owner/name`. A folder that exists wins.
      patterns: globs of the files that are needed; only these are downloaded.
      part: "unet" or "vae" if the folder of one part is asked for, for errors.

    Raises:
      LcmError: neither a folder nor a hub id, or the repository cannot be fetched.
    """
    path = files.expanded(source)
    if path.is_dir():
        return path
    if path.is_file():
        safetensors_io.check_kind(path)
        wanted = f"{source} is a file; a folder in diffusers format is needed here"
        if part and path.suffix == SUFFIX:
            raise LcmError(f"{wanted}: {as_folder(path, part)}")
        raise LcmError(
            f"{wanted}. Only a whole model, not one part, is read from a single .safetensors file "
            "(lcm_jax.sample --model=FILE.safetensors)"
        )
    if not _HUB_ID.fullmatch(str(source)):
        raise LcmError(f"{source} does not exist; give a folder in diffusers format, or owner/name on the hub")
    import huggingface_hub  # here, because a run from a local folder does not need it

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its own, httpx's, the system's and more
        raise _not_fetched("folder", source, error) from error


def local_file(source: str | Path) -> Path:
    """The file `source`, or the local copy of a file on the hub: owner/name/FILE.safetensors, or its address.

    Raises:
      LcmError: neither a file nor such a name, or it cannot be fetched.
    """
    path = files.expanded(source)
    if os.path.lexists(path):
        safetensors_io.check_regular(path)
        return path
    match = _HUB_FILE.fullmatch(str(source))
    if not match:
        raise LcmError(f"{source} does not exist; give a .safetensors file, or owner/name/FILE.safetensors on the hub")
    import huggingface_hub  # here, because a run from a local file does not need it

    try:
        return Path(huggingface_hub.hf_hub_download(match["repository"], match["file"], revision=match["revision"]))
    except Exception as error:  # the hub's client raises its own, httpx's, the system's and more
        raise _not_fetched("file", source, error) from error


def _not_fetched(kind: str, source: str | Path, error: Exception) -> LcmError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return LcmError(
        f"no {kind} {source} here, and it cannot be fetched from the hub ({type(error).__name__}: {reason}); check "
        f"name, access and network, or give a local {kind}"
    )
