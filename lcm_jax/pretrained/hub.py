"""What a user types (a path, `owner/name` on the Hugging Face hub, an address there) -> a local folder or file."""

import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import safetensors_io
from lcm_jax.pretrained.safetensors_io import PICKLED, SUFFIX

_HUB, _REPOSITORY = r"https?://(?:huggingface\.co|hf\.co)/", r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)"
_HUB_ID = re.compile(_REPOSITORY)
_HUB_PAGE = re.compile(rf"{_HUB}{_REPOSITORY}(?:/tree/(?P<revision>[^/?]+))?/?(?:\?.*)?")
_HUB_FILE = re.compile(
    rf"(?:{_HUB})?{_REPOSITORY}/(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>[^?]+\.safetensors)(?:\?.*)?"
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


def repository(source: str) -> str | None:
    """owner/name of what a user named on the hub: that, owner/name/FILE.safetensors, or an address; None: a path."""
    if files.expanded(source).exists():
        return None
    found = next(filter(None, (form.fullmatch(source) for form in (_HUB_ID, _HUB_PAGE, _HUB_FILE))), None)
    return found and found["repository"]


def as_folder(path: Path, part: str) -> str:
    """What to do with a file of one part ("unet" or "vae"), which is read from a folder."""
    if safetensors_io.is_of_folder(path):
        return f"give its folder, {path.parent}"
    with safetensors_io.open_file(path) as file:
        in_diffusers_names = any(key.startswith("down_blocks.") for key in file.shapes)
    if in_diffusers_names:
        name = safetensors_io.file_name(safetensors_io.DIFFUSERS_NAME, None)
        return f"copy it into a new one as {name}, and {part}/config.json of the model it goes with beside it"
    (kind, content), folder = _TO_FOLDER[part], path.with_suffix("")
    return (
        "make it in an environment with torch, MODEL being a diffusers folder or hub id of the model it goes with: "
        f'python -c "import safetensors.torch as s; from diffusers import {kind} as M; M.from_single_file('
        f"{content.format(path)}, config='MODEL', subfolder='{part}').save_pretrained('{folder}-{part}')\""
    )


def local_folder(source: str | Path, patterns: Sequence[str], part: str | None = None) -> Path:
    """The folder `source`, or the local copy of the hub repository of that name.

    Args:
      source: folder, or hub id `owner/name` or its address. A folder that exists wins.
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
            f"{wanted}. Only a whole model, a VAE and a LoRA are read from a single .safetensors file "
            "(lcm_jax.sample --model=FILE.safetensors, --vae, --lora)"
        )
    page = _HUB_PAGE.fullmatch(str(source))
    if not (page or _HUB_ID.fullmatch(str(source))):
        raise LcmError(f"{source} does not exist; give a folder in diffusers format, or owner/name on the hub")
    import huggingface_hub  # here, because a run from a local folder does not need it

    try:
        name, more = (page["repository"], {"revision": _plain(page["revision"])}) if page else (str(source), {})
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **more))
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
        name, file, revision = match["repository"], match["file"], match["revision"]
        file = _plain(file) if str(source).startswith("http") else file
        return Path(huggingface_hub.hf_hub_download(name, file, revision=_plain(revision)))
    except Exception as error:  # the hub's client raises its own, httpx's, the system's and more
        raise _not_fetched("file", source, error) from error


def fetch_beside(source: str | Path, name: str) -> None:
    """Fetches the file `name` beside a file, at the same revision, if both are on the hub."""
    match = None if files.expanded(source).exists() else _HUB_FILE.fullmatch(str(source))
    if match:
        revision = f"/tree/{match['revision']}" if match["revision"] else ""
        local_folder(f"https://huggingface.co/{match['repository']}{revision}", [f"*{name}"])


def _plain(part: str | None) -> str | None:
    """A part of an address without its escapes: %20 is a blank, refs%2Fpr%2F1 the revision refs/pr/1."""
    return part and urllib.parse.unquote(part)


def _not_fetched(kind: str, source: str | Path, error: Exception) -> LcmError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return LcmError(
        f"no {kind} {source} here, and it cannot be fetched from the hub ({type(error).__name__}: {reason}); check "
        f"name, access and network, or give a local {kind}"
    )
