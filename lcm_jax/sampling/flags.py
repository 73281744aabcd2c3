"""Command-line flags that the programs share that load a model and generate images with it."""

import argparse
import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from jax.sharding import Mesh

from lcm_jax import files
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.text import EMPHASES
from lcm_jax.runtime.mesh import make_mesh
from lcm_jax.sampling import chain
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.image import FITS
from lcm_jax.sampling.image_to_image import POSTERIORS
from lcm_jax.sampling.inpaint import STARTS
from lcm_jax.sampling.load import DTYPES, WEIGHTS, load
from lcm_jax.sampling.offload import MODES
from lcm_jax.sampling.prompts import SYNTAXES
from lcm_jax.sampling.request import MAX_PROMPT

SMALLER = (
    "use a smaller --batch_size, --height or --width, --dtype=bfloat16, --weights=int8, --sliced, --tiled, "
    "--offload=all, or more devices with --fsdp=-1"
)
MAX_TEXT = 2**26  # bytes of a text file that a flag names
_UNSEEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ufeff]")  # control characters but the tab, and byte order marks
_BLANK = " \t\xa0\u3000"  # around a prompt


class Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line, as the programs report all errors."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_model_flags(p: argparse.ArgumentParser, required: bool = True) -> None:
    p.add_argument(
        "--model", required=required, help='model folder in diffusers format, hub id, single .safetensors, or "shapes"'
    )
    p.add_argument("--model_config", help="for a single file: folder or hub id with its tokenizers and configs")
    p.add_argument("--unet", help="UNet folder to use instead (as lcm-sdxl's: config.json at its root)")
    p.add_argument("--vae", help="VAE to use instead: folder or .safetensors; of a TAESD with the other half beside it")
    p.add_argument("--variant", help="weight files to read, such as fp16")
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA to merge: file, folder or hub id; may be given several times",
    )
    p.add_argument("--ignore_unused", action="store_true", help="ignore keys of a LoRA that match no layer")
    p.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the networks; auto: float32 on CPU, bfloat16 elsewhere",
    )
    p.add_argument("--fsdp", type=int, default=1, help="devices that hold one copy of the weights together; -1: all")
    p.add_argument("--tiled", action="store_true", help="decode large images in tiles: less memory, faint seams")
    p.add_argument("--sliced", action="store_true", help="decode images one at a time: less memory")
    p.add_argument("--weights", choices=WEIGHTS, help="of UNet and text encoders: 8 bits a number, other images")
    p.add_argument(
        "--offload",
        choices=MODES,
        help="weights that wait in host memory, for less of the device's: text: the text encoders'; all: each "
        "network's, which is on the device only while it runs",
    )


def add_image_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--negative_prompt",
        help="text that guidance moves away from; of a UNet with w embedding, or at guidance scale 1, by --nag_scale",
    )
    p.add_argument(
        "--nag_scale",
        type=float,
        default=1.0,
        help="guidance in attention, away from the negative prompt, in the same pass; default: 1, none; usual: 3",
    )
    p.add_argument("--height", type=int, help="pixels; default: the model's")
    p.add_argument("--width", type=int, help="pixels; default: the model's")


def add_source_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--image",
        type=files.expanded,
        metavar="FILE|FOLDER",
        help="start from this image, or from each one of a folder, instead of noise. Default size of images: its own",
    )
    p.add_argument("--strength", type=float, help="how far from --image, more than 0 to 1; default: 0.5, with --mask 1")
    p.add_argument("--fit", choices=FITS, help="of an --image of another aspect; default: crop")
    p.add_argument("--background", metavar="COLOUR", help="under transparent parts of --image; default: white")
    p.add_argument(
        "--max_side", type=int, help="pixels that a larger --image is reduced to; default: twice the model's"
    )
    p.add_argument(
        "--posterior",
        choices=POSTERIORS,
        help="of the VAE's encoder; sample: with noise, as diffusers; default: mode, with --noise=torch sample",
    )


def add_second_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--hires", type=float, metavar="SCALE", help="a second pass at SCALE times the size, 1 to 4")
    p.add_argument("--hires_strength", type=float, help="how far from the first pass; default: 0.5")
    p.add_argument("--hires_steps", type=int, help="of the second pass; default: --steps")
    p.add_argument("--hires_by", choices=chain.WAYS, help="what is enlarged; default: latent")
    p.add_argument("--refiner", metavar="MODEL", help="SDXL's refiner, which finishes images: folder, hub id or file")
    p.add_argument("--refiner_start", type=float, help="part of the noise that --model removes before; default: 0.8")
    p.add_argument("--refiner_steps", type=int, help="default: 10")
    p.add_argument("--refiner_guidance_scale", type=float, help="default: 5")


def add_mask_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--mask",
        type=files.expanded,
        metavar="FILE|FOLDER",
        help="white where --image is painted, black where it stays as it is; a folder has a mask of each image's name",
    )
    p.add_argument("--mask_blur", type=float, help="radius in pixels that softens the edge outwards; default: 0")
    p.add_argument("--mask_grow", type=int, help="pixels that the white part grows by; default: 0")
    p.add_argument(
        "--crop_padding",
        type=int,
        help="paint only the part of the image around the white, with so many pixels, at full size; results have the "
        "image's own size",
    )
    p.add_argument("--paste", choices=("on", "off"), help="off: what is kept comes from the VAE, too; default: on")
    p.add_argument("--start", choices=STARTS, help="at strength 1; noise: as diffusers; default: image, faintly seen")


def add_prompt_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--prompt_syntax",
        choices=SYNTAXES,
        help="plain (default): all is text; a1111, comfy: weights in brackets and prompts of any length, as those "
        "programs read them",
    )
    p.add_argument("--emphasis", choices=EMPHASES, help="what weights do; default: original, of comfy interpolate")
    p.add_argument(
        "--clip_skip",
        type=int,
        help="layer of the text encoders to use, counted from the last, which is 1; default: the model's, of SDXL 2",
    )
    p.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="textual inversion, used where prompts have its name (comfy: embedding:NAME); may be given several times",
    )


def parse_timesteps(text: str) -> tuple[int, ...]:
    """--timesteps=999,749,499,249, for argparse."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, such as 999,749,499,249") from None


def load_model(args: argparse.Namespace, embeddings: Sequence[str] = ()) -> Generator:
    """The model of the command line, on all devices."""
    return load(
        args.model,
        loras=args.lora,
        embeddings=embeddings,
        unet=args.unet,
        vae=args.vae,
        variant=args.variant,
        model_config=args.model_config,
        dtype=args.dtype,
        mesh=mesh_of(args.fsdp),
        tiled=args.tiled,
        sliced=args.sliced,
        weights=args.weights,
        offload=args.offload,
        ignore_unused=args.ignore_unused,
    )


def mesh_of(fsdp: int) -> Mesh:
    """All devices, `fsdp` of them (-1: all) for one copy of the weights."""
    count = jax.device_count()
    if fsdp != -1 and (fsdp < 1 or count % fsdp):
        raise BadArgument("fsdp", fsdp, f"does not divide the {count} devices; choose a divisor, or -1 for all")
    return make_mesh(fsdp=count if fsdp == -1 else fsdp)


def read_text(flag: str, path: Path) -> str:
    """The text of a file or pipe that a flag names: UTF-8, with or without a byte order mark."""
    try:
        content = files.read_regular(files.expanded(path), MAX_TEXT, pipes=True)
    except OSError as error:
        raise BadArgument(flag, path, f"cannot be read ({error.strerror}); give a text file") from error
    except LcmError as error:
        raise BadArgument(flag, path, f"cannot be read ({error})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadArgument(flag, path, "cannot be read (UTF-16); save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadArgument(flag, path, "cannot be read (not UTF-8); save it as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BadArgument(flag, path, f"has a zero byte in line {line}; give a text file, in UTF-8")
    return text


def read_lines(flag: str, path: Path) -> list[str]:
    """The prompts of a text file: its lines that are not blank, stripped. A line ends with LF or CR LF alone.

    What a line may hold unnoticed is reported on stderr: control characters, and byte order marks, as in files that
    were put together. Those at its beginning are dropped.
    """
    lines = [line.lstrip("\ufeff" + _BLANK).removesuffix("\r") for line in read_text(flag, path).split("\n")]
    odd = [(number, found[0]) for number, line in enumerate(lines, 1) if (found := _UNSEEN.search(line))]
    if odd:
        more = f", and {len(odd) - 1} more lines have such" if len(odd) > 1 else ""
        number, character = odd[0]
        print(
            f"warning: --{flag}={path}: line {number} has the character U+{ord(character):04X}{more}", file=sys.stderr
        )
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_PROMPT:
            raise BadArgument(
                flag, path, f"line {number} has {len(line)} characters, a prompt has at most {MAX_PROMPT}"
            )
    return [line.strip(_BLANK) for line in lines if line.strip()]
