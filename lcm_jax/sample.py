"""Prompts -> PNG files, with a Latent Consistency Model, with an LCM-LoRA, or with a teacher.

    python -m lcm_jax.sample --model=DIR --out=images --prompt="a large red star at the left on a white background"
    python -m lcm_jax.sample --model=BASE --lora=LCM_LORA --lora=STYLE.safetensors:0.8 --out=images --prompt="..."

One prompt gives `--num_images` images; image i of a prompt depends on (seed, i) alone, not on how many are generated.
A UNet with w embedding is conditioned on w = guidance_scale - 1. Any other is guided by a second pass with the negative
prompt, or not at all at scale 1, the default of an LCM without w embedding; its images suffer above 2.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax import files
from lcm_jax.diffusion.timesteps import SPACINGS
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.text import truncated
from lcm_jax.sampling import control, flags, png
from lcm_jax.sampling.control import Control
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.image import read_image
from lcm_jax.sampling.png import not_finite, to_uint8, write_png
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

SMALLEST = 2**12  # bytes that a PNG file takes on a disk at least
_NAME = re.compile(r"(\d+)_(\d+)\.png")


def parser() -> flags.Parser:
    p = flags.Parser(prog="python -m lcm_jax.sample", description=__doc__.splitlines()[0])
    flags.add_model_flags(p)
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
    p.add_argument(
        "--control",
        action="append",
        default=[],
        metavar=control.FORM,
        help="ControlNet (folder, hub id or .safetensors) and its image; START-END: parts of the steps, such as 0-0.5; "
        "may be given several times. Default size of images: that of the first one",
    )
    p.add_argument("--control_guess", action="store_true", help="nets lead, also without a prompt (guess mode)")
    p.add_argument("--canny", metavar="LOW,HIGH", help="edges of --control's images are the nets' input; needs OpenCV")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_images", type=int, default=4, help="images per prompt")
    p.add_argument("--batch_size", type=int, default=4, help="images generated at once")
    p.add_argument(
        "--out", type=files.expanded, required=True, help="folder for the PNG files; may have those of this command"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files in --out that are of another command")
    return p


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of a command line. Raises LcmError for what is wrong with any model, before one is loaded."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += flags.read_lines("prompts", args.prompts)
    if not prompts:
        raise LcmError('no prompt; give --prompt="..." or --prompts=FILE with one per line')
    check_texts(prompt=args.prompt, negative_prompt=args.negative_prompt)
    check_numbers(args.seed, num_images=args.num_images, batch_size=args.batch_size)
    check_steps(args.steps)
    check_guidance_scale(args.guidance_scale)
    if args.out.exists() and not args.out.is_dir():
        raise BadArgument("out", args.out, "is a file; give a folder")
    return prompts


def read_control(args: argparse.Namespace) -> list[Control]:
    """The ControlNets of a command line, by name, with their images; raises as `read_prompts`."""
    for flag in ("canny", "control_guess"):
        if getattr(args, flag) and not args.control:
            raise BadArgument(flag, getattr(args, flag), f"is for ControlNets; give --control={control.FORM}")
    thresholds = args.canny and control.parse_canny(args.canny)
    found = []
    for text in args.control:
        net, image, *numbers = control.parse(text)
        control.check_values(*numbers, thresholds)
        found.append(Control(net, read_image(image, "control", smallest=1), *numbers, thresholds))
    return found


def about_images(args: argparse.Namespace, request: Request, dtype: str) -> dict[str, Any]:
    """What each image records of the command line, and the dtype that its networks computed in."""
    return {
        "model": args.model,
        **{key: getattr(args, key) for key in ("unet", "vae") if getattr(args, key)},
        **({"lora": ", ".join(args.lora)} if args.lora else {}),
        **({} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}),
        **({"control": ", ".join(args.control)} if args.control else {}),
        **({"control_guess": True} if args.control_guess else {}),
        **({"canny": args.canny} if args.canny else {}),
        "sampler": args.sampler,
        **({} if args.sampler == "lcm" else {"spacing": args.spacing}),
        "steps": args.steps,
        "guidance_scale": request.guidance_scale,
        "seed": args.seed,
        "size": f"{request.width}x{request.height}",
        "dtype": dtype,
    }


def check_out(out: Path, prompts: Sequence[str], num_images: int, about: Mapping[str, Any]) -> None:
    """Raises BadArgument if `out` has images under the names of these prompts' that are not of this request."""
    for path in sorted(out.glob("*.png")):
        prompt, number = map(int, found.groups()) if (found := _NAME.fullmatch(path.name)) else (len(prompts), 0)
        if prompt < len(prompts) and number < num_images:
            wanted = {"prompt": prompts[prompt], "image": number, **about}
            if png.read_about(path) != {key: png.text_of(value) for key, value in wanted.items()}:
                problem = f"has {path.name} of another prompt, model or settings; choose another folder, or --overwrite"
                raise BadArgument("out", out, problem)


def run(args: argparse.Namespace, written: list[Path]) -> None:
    """Generates what the command line asks for; adds the files to `written` as they are made."""
    prompts, controls = read_prompts(args), read_control(args)
    model = flags.load_model(args)
    nets = {name: model.control_net(name, args.variant) for name in dict.fromkeys(one.net for one in controls)}
    controls = [dataclasses.replace(one, net=nets[one.net]) for one in controls]
    keys = ("sampler", "steps", "spacing", "guidance_scale", "height", "width", "negative_prompt", "control_guess")
    request = make_request(model.pipeline, control=controls, **{key: getattr(args, key) for key in keys})
    files.tidy(args.out.absolute())
    about, total = about_images(args, request, model.dtype), len(prompts) * args.num_images
    if not args.overwrite:
        check_out(args.out, prompts, args.num_images, about)
    try:
        files.check_space(args.out, total * SMALLEST)
    except LcmError as error:
        raise BadArgument("num_images", args.num_images, str(error)) from None
    batches = model.batches(request, prompts, args.num_images, args.seed, args.batch_size)
    warn(model, request, prompts)

    first = 0
    for images in batches:
        jobs = [divmod(first + n, args.num_images) for n in range(len(images))]
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


def warn(model: Generator, request: Request, prompts: Sequence[str]) -> None:
    """Prints `request.warnings`, and prompts that are too long, on stderr."""
    found = warnings(model.pipeline, request)
    texts = [*prompts, *([request.negative_prompt] if request.negative_prompt else [])]
    for prompt, (length, kept) in truncated(model.pipeline, texts).items():
        found.append(f"a prompt of {length} tokens is cut to {kept}, {length - kept} are lost: {prompt[:60]!r}...")
    for warning in found:
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    args, written = parser().parse_args(argv), []

    def program() -> None:
        run(args, written)
        print(f"{len(written)} images in {args.out}")

    def left() -> str:
        return f"{len(written)} images are in {args.out}" if written else "nothing was written"

    return exit_code(program, left, flags.SMALLER)


if __name__ == "__main__":
    sys.exit(main())
