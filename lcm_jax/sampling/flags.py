"""Command-line flags that the programs share that load a model and generate images with it."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import jax
from jax.sharding import Mesh

from lcm_jax.errors import BadArgument
from lcm_jax.runtime.mesh import make_mesh
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.load import load


class Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line, as the programs report all errors."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_model_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model", required=True, help='model folder in diffusers format, hub id, single .safetensors, or "shapes"'
    )
    p.add_argument("--model_config", help="for a single file: folder or hub id with its tokenizers and configs")
    p.add_argument("--unet", help="UNet folder to use instead (as lcm-sdxl's: config.json at its root)")
    p.add_argument("--vae", help="VAE folder to use instead")
    p.add_argument("--variant", help="weight files to read, such as fp16")
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA to merge: file, folder or hub id; may be given several times",
    )
    p.add_argument("--ignore_unused", action="store_true", help="ignore keys of a LoRA that match no layer")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the networks")
    p.add_argument("--fsdp", type=int, default=1, help="devices that hold one copy of the weights together; -1: all")
    p.add_argument("--tiled", action="store_true", help="decode large images in tiles: less memory, faint seams")


def add_image_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--negative_prompt", help="text that guidance moves away from; only for a UNet without w embedding")
    p.add_argument("--height", type=int, help="pixels; default: the model's")
    p.add_argument("--width", type=int, help="pixels; default: the model's")


def load_model(args: argparse.Namespace) -> Generator:
    """The model of the command line, on all devices."""
    return load(
        args.model,
        loras=args.lora,
        unet=args.unet,
        vae=args.vae,
        variant=args.variant,
        model_config=args.model_config,
        dtype=args.dtype,
        mesh=mesh_of(args.fsdp),
        tiled=args.tiled,
        ignore_unused=args.ignore_unused,
    )


def mesh_of(fsdp: int) -> Mesh:
    """All devices, `fsdp` of them (-1: all) for one copy of the weights."""
    count = jax.device_count()
    if fsdp != -1 and (fsdp < 1 or count % fsdp):
        raise BadArgument("fsdp", fsdp, f"does not divide the {count} devices; choose a divisor, or -1 for all")
    return make_mesh(fsdp=count if fsdp == -1 else fsdp)


def read_text(flag: str, path: Path) -> str:
    """The UTF-8 text of a file that a flag names."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise BadArgument(flag, path, f"cannot be read ({reason}); give a text file") from error


def read_lines(flag: str, path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped."""
    return [line.strip() for line in read_text(flag, path).splitlines() if line.strip()]
