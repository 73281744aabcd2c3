"""Prompts -> PNG files, with a Latent Consistency Model, with an LCM-LoRA, or with a teacher.

    python -m lcm_jax.sample --model=DIR --out=images --prompt="a large red star at the left on a white background"
    python -m lcm_jax.sample --model=BASE --lora=LCM_LORA --lora=STYLE.safetensors:0.8 --out=images --prompt="..."
    python -m lcm_jax.sample --like=images/0000_0002.png --out=again --steps=8

One prompt gives `--num_images` images; image i of a prompt depends on (seed, i) alone, not on how many are generated.
`--noise` takes the random numbers of other programs; `--like` repeats the image of a PNG file, but for flags given.
A UNet with w embedding is conditioned on w = guidance_scale - 1. Any other is guided by a second pass with the negative
prompt, or not at all at scale 1, the default of an LCM without w embedding; its images suffer above 2.
"""

import argparse
import contextlib
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcm_jax import files
from lcm_jax.diffusion.timesteps import SPACINGS
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.text import truncated
from lcm_jax.sampling import flags, like, png
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.noise import SOURCES
from lcm_jax.sampling.png import not_finite, to_uint8, write_png
from lcm_jax.sampling.preview import load_preview
from lcm_jax.sampling.request import (
    SAMPLERS,
    Request,
    check_guidance_scale,
    check_numbers,
    check_steps,
    check_texts,
    make_request,
    warnings,
)

OPTIONAL = ("unet", "vae", "variant", "model_config", "ignore_unused", "tiled")  # flags recorded only if given
SMALLEST = 2**12  # bytes that a PNG file takes on a disk at least
_NAME = re.compile(r"(\d+)_(\d+)\.png")


def parser() -> flags.Parser:
    p = flags.Parser(prog="python -m lcm_jax.sample", description=__doc__.splitlines()[0])
    flags.add_model_flags(p, required=False)
    flags.add_image_flags(p)
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--prompts", type=files.expanded, help="text file, one prompt per line")
    p.add_argument("--sampler", choices=SAMPLERS, default="lcm")
    p.add_argument("--spacing", choices=SPACINGS, default="trailing", help="timesteps of ddim and dpm")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument(
        "--guidance_scale",
        type=float,
        help="w + 1; 1 is no guidance. Default: 1 for an LCM without w embedding (LCM-LoRA), else 8, or "
        "the middle of the range the model was distilled on",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_images", type=int, default=4, help="images per prompt")
    p.add_argument("--first_image", type=int, default=0, help="number of the first image of each prompt")
    p.add_argument(
        "--noise",
        choices=SOURCES,
        default="jax",
        help="random numbers. torch: a CPU generator of seed + i for image i, as diffusers with a list of generators "
        "and A1111 on the CPU; torch-batch: one generator for all images of a prompt; nv: a GPU's, A1111's default",
    )
    p.add_argument(
        "--like",
        type=files.expanded,
        metavar="PNG",
        help="repeat the image of a file of this program's or of A1111's: its flags are the defaults of all others; "
        "--model replaces its model with parts and LoRAs, an empty --negative_prompt drops its own",
    )
    p.add_argument("--batch_size", type=int, default=4, help="images generated at once")
    p.add_argument(
        "--preview",
        metavar="TAESD",
        help="folder, file or hub id of a TAESD: OUT/preview.png shows what each step expects, until all is done",
    )
    p.add_argument(
        "--out", type=files.expanded, required=True, help="folder for the PNG files; may have those of this command"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files in --out that are of another command")
    return p


def repeated(p: flags.Parser, argv: Sequence[str], path: Path) -> argparse.Namespace:
    """The flags of `argv`, with those that the PNG file `path` records as defaults; prints what is not repeated."""
    given = p.parse_args(argv)
    found, lost = like.recorded(path)
    if lost:
        print(f"warning: --like={path}: not repeated: {', '.join(one[:60] for one in lost)}", file=sys.stderr)
    replaced = {
        *(like.MODEL if given.model else ()),
        *(("prompt",) if given.prompt or given.prompts else ()),
        *(("lora",) if given.lora else ()),
    }
    words = like.words({name: value for name, value in found.items() if name not in replaced})
    p.exit_on_error = False
    try:
        args = p.parse_args([*words, *argv])
    except argparse.ArgumentError as error:
        raise BadArgument("like", path, f"records what cannot be used ({error})") from None
    if given.negative_prompt == "":
        args.negative_prompt = None
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of a command line. Raises LcmError for what is wrong with any model, before one is loaded."""
    if args.model is None:
        raise LcmError("no model; give --model=FOLDER, hub id or single file")
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += flags.read_lines("prompts", args.prompts)
    if not prompts:
        raise LcmError('no prompt; give --prompt="..." or --prompts=FILE with one per line')
    check_texts(prompt=args.prompt, negative_prompt=args.negative_prompt)
    check_numbers(args.seed, num_images=args.num_images, batch_size=args.batch_size)
    check_steps(args.steps)
    check_guidance_scale(args.guidance_scale)
    if not 0 <= args.first_image < 2**31:
        raise BadArgument("first_image", args.first_image, f"out of range; choose 0 to {2**31 - 1}")
    if args.first_image and args.noise == "torch-batch":
        problem = "noise torch-batch draws all images of a prompt together; leave it out"
        raise BadArgument("first_image", args.first_image, problem)
    if args.out.exists() and not args.out.is_dir():
        raise BadArgument("out", args.out, "is a file; give a folder")
    return prompts


def about_images(args: argparse.Namespace, request: Request, dtype: str) -> dict[str, Any]:
    """What each image records of the command line, and the dtype that its networks computed in."""
    return {
        "model": args.model,
        **{key: getattr(args, key) for key in OPTIONAL if getattr(args, key)},
        **({"lora": ", ".join(args.lora)} if args.lora else {}),
        **({} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}),
        "sampler": args.sampler,
        **({} if args.sampler == "lcm" else {"spacing": args.spacing}),
        "steps": args.steps,
        "guidance_scale": request.guidance_scale,
        "seed": args.seed,
        **({} if args.noise == "jax" else {"noise": args.noise}),
        **({"num_images": args.num_images} if args.noise == "torch-batch" else {}),
        "size": f"{request.width}x{request.height}",
        "dtype": dtype,
    }


def check_out(out: Path, prompts: Sequence[str], numbers: range, about: Mapping[str, Any]) -> None:
    """Raises BadArgument if `out` has images under the names of these prompts' that are not of this request."""
    for path in sorted(out.glob("*.png")):
        prompt, number = map(int, found.groups()) if (found := _NAME.fullmatch(path.name)) else (len(prompts), 0)
        if prompt < len(prompts) and number in numbers:
            wanted = {"prompt": prompts[prompt], "image": number, **about}
            if png.read_about(path) != {key: png.text_of(value) for key, value in wanted.items()}:
                problem = f"has {path.name} of another prompt, model or settings; choose another folder, or --overwrite"
                raise BadArgument("out", out, problem)


def run(args: argparse.Namespace, written: list[Path]) -> None:
    """Generates what the command line asks for; adds the files to `written` as they are made."""
    prompts = read_prompts(args)
    model = flags.load_model(args)
    keys = ("sampler", "steps", "spacing", "guidance_scale", "height", "width", "negative_prompt", "noise")
    request = make_request(model.pipeline, **{key: getattr(args, key) for key in keys})
    preview = args.out / "preview.png"
    if args.preview is not None:
        model.preview = load_preview(args.preview, model.pipeline, functools.partial(show, preview))
    files.tidy(args.out.absolute())
    numbers = range(args.first_image, args.first_image + args.num_images)
    about, total = about_images(args, request, model.dtype), len(prompts) * args.num_images
    if not args.overwrite:
        check_out(args.out, prompts, numbers, about)
    try:
        files.check_space(args.out, total * SMALLEST)
    except LcmError as error:
        raise BadArgument("num_images", args.num_images, str(error)) from None
    batches = model.batches(request, prompts, args.num_images, args.seed, args.batch_size, args.first_image)
    warn(model, request, prompts)

    first = 0
    for images in batches:
        jobs = [(job // len(numbers), numbers[job % len(numbers)]) for job in range(first, first + len(images))]
        paths = [args.out / f"{prompt:04d}_{number:04d}.png" for prompt, number in jobs]
        bad = not_finite(images)
        for n, image in enumerate(to_uint8(images)):
            if n not in bad:
                write_png(paths[n], image, {"prompt": prompts[jobs[n][0]], "image": jobs[n][1], **about})
                written.append(paths[n])
        if bad:
            raise LcmError(
                f"{', '.join(paths[n].name for n in bad)}: not finite, and would be black; try --dtype=float32, and "
                "check whether the weights are finite"
            )
        first += len(images)
    if args.preview is not None:
        jax.effects_barrier()  # the last step may still be shown
        preview.unlink(missing_ok=True)


def show(path: Path, images: np.ndarray, step: int) -> None:
    """Writes the images of a step as one; a disk that is full is for the images themselves to report."""
    with contextlib.suppress(files.CannotWrite):
        write_png(path, png.grid(images, min(len(images), 4)), {"step": step})


def warn(model: Generator, request: Request, prompts: Sequence[str]) -> None:
    """Prints `request.warnings`, and prompts that are too long, on stderr."""
    found = warnings(model.pipeline, request)
    texts = [*prompts, *([request.negative_prompt] if request.negative_prompt else [])]
    for prompt, (length, kept) in truncated(model.pipeline, texts).items():
        found.append(f"a prompt of {length} tokens is cut to {kept}, {length - kept} are lost: {prompt[:60]!r}...")
    for warning in found:
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    p, argv, written = parser(), sys.argv[1:] if argv is None else argv, []
    args = p.parse_args(argv)

    def program() -> None:
        run(args if args.like is None else repeated(p, argv, args.like), written)
        print(f"{len(written)} images in {args.out}")

    def left() -> str:
        return f"{len(written)} images are in {args.out}" if written else "nothing was written"

    return exit_code(program, left, flags.SMALLER)


if __name__ == "__main__":
    sys.exit(main())
