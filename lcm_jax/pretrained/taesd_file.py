"""TAESD and TAESDXL in their makers' files, whose keys number the layers of a flat Sequential.

    encoder    N.weight, N.conv.{0,2,4}.weight, ...     -> encoder.layers.N. ...
    decoder    likewise                                 -> decoder.layers.(N - 1). ...   its layer 0 has no weights

There is one file for each half, or one for both with the prefixes taesd_encoder. and taesd_decoder., as ComfyUI joins
them. Its scalars vae_scale and vae_shift are of the latents that it stores, and ignored: the networks take those of
diffusion.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from lcm_jax.errors import LcmError
from lcm_jax.models.taesd import AutoencoderTiny
from lcm_jax.pretrained import safetensors_io
from lcm_jax.pretrained.model import Config
from lcm_jax.pretrained.safetensors_io import SUFFIX, Weights

CONFIG: Config = {"_class_name": "AutoencoderTiny"}  # the files have no other widths and depths than its defaults
_KEY = re.compile(r"(?:taesd_(encoder|decoder)\.)?(\d{1,3})\.((?:conv\.\d\.)?(?:weight|bias))")
_SCALARS = {"vae_scale", "vae_shift"}


def is_taesd(path: Path) -> bool:
    """Whether a file is one of these, of this or another family. Raises LcmError for one that cannot be read."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    with safetensors_io.open_file(path) as file:
        return any(_KEY.fullmatch(key) for key in file.shapes)


def is_xl(source: str | Path) -> bool | None:
    """Whether the name of a VAE's file or folder says that it is for SDXL, which tensors do not show; None: neither."""
    name = str(source).lower()
    if "taesd" in name:
        return "taesdxl" in name
    return True if re.search(r"xl[^/\\]*$", name) else None


@contextlib.contextmanager
def open_both(path: Path) -> Iterator[Weights]:
    """Opens the file of one half, with the other beside it, or of both; with diffusers' keys.

    Raises:
      LcmError: the other half is missing, or the latents are of another family.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(safetensors_io.open_file(path))
        found = _half(file)
        if not any(key.startswith("taesd_") for key in file.shapes):
            own, other = ("encoder", "decoder") if "encoder.layers.0.weight" in found else ("decoder", "encoder")
            beside = path.with_name(path.name.replace(own, other))
            if beside == path or not beside.is_file():
                problem = f"put the other half beside it, under that name with {other} for {own}"
                raise LcmError(f"{path} is the {own} of a TAESD; {problem}, or give madebyollin/taesd (or taesdxl)")
            found |= _half(stack.enter_context(safetensors_io.open_file(beside)))
        shapes = {name: weights.shapes[key] for name, (weights, key) in found.items()}
        first = shapes.get("decoder.layers.0.weight", ())
        if len(first) == 4 and first[1] != AutoencoderTiny.latent_channels:
            raise LcmError(
                f"{path} is for latents of {first[1]} channels, as those of SD 3, Flux or Sana; give taesd or taesdxl"
            )
        yield Weights(path, shapes, lambda name: found[name][0].read(found[name][1]))


def _half(file: Weights) -> dict[str, tuple[Weights, str]]:
    """diffusers' key -> (file, key in it)."""
    found = {}
    for key in file.shapes.keys() - _SCALARS:
        if match := _KEY.fullmatch(key):
            half = match[1] or ("encoder" if "0.weight" in file.shapes else "decoder")
            key_there = f"{half}.layers.{int(match[2]) - (half == 'decoder')}.{match[3]}"
        else:
            key_there = key  # reported as one too many
        found[key_there] = file, key
    return found
