"""Prompts -> PNG files, with a Latent Consistency Model, with an LCM-LoRA, or with a teacher.

    python -m lcm_jax.sample --model=DIR --out=images --prompt="a large red star at the left on a white background"
    python -m lcm_jax.sample --model=BASE --lora=LCM_LORA --lora=STYLE.safetensors:0.8 --out=images --prompt="..."
    python -m lcm_jax.sample --model=DIR --out=images --image=photo.jpg --strength=0.5 --prompt="a watercolour"
    python -m lcm_jax.sample --like=images/0000_0002.png --out=again --steps=8

One prompt gives `--num_images` images; image i of a prompt depends on (seed, i) alone, not on how many are generated.
`--noise` takes the random numbers of other programs; `--like` repeats the image of a PNG file, but for flags given.
A UNet with w embedding is conditioned on w = guidance_scale - 1. Any other is guided by a second pass with the negative
prompt, or not at all at scale 1, the default of an LCM without w embedding; its images suffer above 2. With
`--nag_scale` the negative prompt takes effect in the same pass, for either.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcm_jax import files
from lcm_jax.diffusion.timesteps import SPACINGS
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError, printable
from lcm_jax.pretrained.safetensors_io import SUFFIX
from lcm_jax.sampling import chain, control, flags, like, nag, png, presets
from lcm_jax.sampling.chunks import truncated, unused
from lcm_jax.sampling.control import Control
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.image import parse_colour, read_image
from lcm_jax.sampling.image_to_image import check_strength, listed
from lcm_jax.sampling.inpaint import make_mask, mask_for
from lcm_jax.sampling.load import lora_name, parse_lora
from lcm_jax.sampling.noise import SOURCES
from lcm_jax.sampling.plan import SAMPLERS, check_steps, make_plan
from lcm_jax.sampling.png import not_finite, to_uint8, write_png
from lcm_jax.sampling.preview import load_preview
from lcm_jax.sampling.prompts import check_loras, check_readable, check_syntax, is_marked, loras
from lcm_jax.sampling.request import (
    Request,
    check_guidance_scale,
    check_numbers,
    check_texts,
    joined,
    make_request,
    warnings,
)

OF_MASK = like.MASK[1:]
OF_IMAGE = ("strength", "fit", "background", "max_side", "posterior", *OF_MASK)
OF_SAMPLER = ("sampler", "steps", "spacing", "gamma", "timesteps")
OF_TEXT = ("guidance_scale", "negative_prompt", "nag_scale", "emphasis", "clip_skip")
SMALLEST = 2**12  # bytes that a PNG file takes on a disk at least
MOST_LISTED = 20  # names in an error
_NAME = re.compile(r"(\d+)_(\d+)\.png")


def parser() -> flags.Parser:
    p = flags.Parser(prog="python -m lcm_jax.sample", description=__doc__.splitlines()[0])
    flags.add_model_flags(p, required=False)
    flags.add_image_flags(p)
    flags.add_source_flags(p)
    flags.add_second_flags(p)
    flags.add_mask_flags(p)
    flags.add_prompt_flags(p)
    p.add_argument(
        "--lora_dir", type=files.expanded, help="folder of the LoRAs that a1111 prompts name <lora:NAME:0.8>"
    )
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--prompts", type=files.expanded, help="text file, one prompt per line")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: that of the model's map: lcm, of a phased one tcd")
    p.add_argument("--spacing", choices=SPACINGS, default="trailing", help="timesteps of ddim and dpm")
    p.add_argument("--steps", type=int, help="default: 4, of a phased map its phases")
    p.add_argument("--timesteps", type=flags.parse_timesteps, default=(), help="in place of --steps: 999,749,499,249")
    p.add_argument("--gamma", type=float, help="of tcd, 0 to 1: share of fresh noise in a step; default 0, none")
    p.add_argument(
        "--preset",
        choices=tuple(presets.PRESETS),
        help="flags for a published few-step LoRA or UNet; others win over it",
    )
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
    p.add_argument("--control_guess", action="store_true", help="the nets lead, even without a prompt (guess mode)")
    p.add_argument("--canny", metavar="LOW,HIGH", help="edges of --control's images are the nets' input; needs OpenCV")
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
        "--model replaces its model with parts and LoRAs, --control all its ControlNets, an empty --negative_prompt "
        "drops its own",
    )
    p.add_argument("--batch_size", type=int, default=4, help="images generated at once")
    p.add_argument(
        "--preview",
        metavar="TAESD",
        help="folder, file or hub id of a TAESD: OUT/preview.png shows what each step expects, until all is done",
    )
    p.add_argument(
        "--out",
        type=files.expanded,
        required=True,
        help="folder for the PNG files; may already have those of this command",
    )
    p.add_argument("--overwrite", action="store_true", help="replace files in --out that are of another command")
    return p


def repeated(p: flags.Parser, argv: Sequence[str], path: Path) -> argparse.Namespace:
    """The flags of `argv`, with those that the PNG file `path` records as defaults; prints what is not repeated."""
    given = p.parse_args(argv)
    found, lost = like.recorded(path)
    if lost:
        listed = printable(", ".join(one[:60] for one in lost[:MOST_LISTED]))
        more = f" and {len(lost) - MOST_LISTED} more" if len(lost) > MOST_LISTED else ""
        print(f"warning: --like={path}: not repeated: {listed}{more}", file=sys.stderr)
    replaced = like.replaced(found, vars(given))
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
    if args.steps is not None:
        check_steps(args.steps)
    check_guidance_scale(args.guidance_scale)
    nag.check_scale(args.nag_scale)
    check_strength(args.strength)
    syntax = args.prompt_syntax or "plain"
    check_syntax(syntax, args.emphasis)
    check_readable(syntax, prompt=prompts, negative_prompt=args.negative_prompt)
    if not 0 <= args.first_image < 2**31:
        raise BadArgument("first_image", args.first_image, f"out of range; choose 0 to {2**31 - 1}")
    if args.first_image and args.noise == "torch-batch":
        problem = "noise torch-batch draws all images of a prompt together; leave it out, or beside --like give 0"
        raise BadArgument("first_image", args.first_image, problem)
    if args.out.exists() and not args.out.is_dir():
        raise BadArgument("out", args.out, "is a file; give a folder")
    return prompts


def with_loras_of(args: argparse.Namespace, prompts: Sequence[str]) -> list[str]:
    """`--lora` and, from `--lora_dir`, the LoRAs that a1111 prompts ask for.

    Raises:
      BadArgument: a LoRA that is neither given nor in the folder, or prompts that ask for different ones.
    """
    if args.prompt_syntax != "a1111":
        if args.lora_dir is not None:
            problem = "is for <lora:NAME:WEIGHT> in a1111 prompts; add --prompt_syntax=a1111, or give --lora"
            raise BadArgument("lora_dir", args.lora_dir, problem)
        return args.lora
    if args.lora_dir is not None and not args.lora_dir.is_dir():
        raise BadArgument("lora_dir", args.lora_dir, "is no folder; give the one with the .safetensors of LoRAs")
    wanted = [loras(f"{prompt} {args.negative_prompt or ''}") for prompt in prompts]
    for prompt, others in zip(prompts, wanted, strict=True):
        if others != wanted[0]:
            problem = "asks for other LoRAs than the first prompt; they are merged for all, so run it once for each"
            raise BadArgument("prompt", prompt, problem)
    given = {lora_name(source): weight for source, weight in map(parse_lora, args.lora)}
    folder = collections.defaultdict(list)
    for path in sorted(args.lora_dir.rglob("*" + SUFFIX)) if args.lora_dir else ():
        folder[lora_name(path)].append(path)
    added = {}
    for name, weight in wanted[0].items():
        if name in given:
            continue
        if len(folder[name]) != 1:
            listed = ", ".join(sorted({*given, *filter(folder.get, folder)})[:MOST_LISTED]) or "none"
            problem = f"is there {len(folder[name])} times" if folder[name] else "is not there"
            raise BadArgument(
                "prompt", prompts[0], f"<lora:{name}:{weight:g}> {problem}; --lora and --lora_dir have {listed}"
            )
        added[name] = weight
    check_loras("prompt", [*prompts, args.negative_prompt or ""], given | added)
    return [*args.lora, *(f"{folder[name][0]}:{weight}" for name, weight in added.items())]


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


def read_sources(args: argparse.Namespace) -> list[tuple[Path | None, Path | None]]:
    """(image, mask) that a command line starts from, [(None, None)] for noise; raises as `read_prompts`."""
    if args.image is None:
        for flag in (*OF_IMAGE, "mask"):
            if (value := getattr(args, flag)) is not None:
                raise BadArgument(flag, value, "is for image to image; give --image=FILE or a folder")
        return [(None, None)]
    args.paste = args.paste and args.paste == "on"
    parse_colour("background", args.background or "white")
    found = [(image, mask_for(args.mask, image)) for image in listed(args.image)]
    for image, mask in found:
        size = read_image(image, "image", smallest=1).shape[:2]
        make_mask(mask, [size], **{key: getattr(args, key) for key in OF_MASK})
    return found


def check_painted(
    model: Generator, requests: Sequence[Request], sources: Sequence[tuple[Path | None, Path | None]]
) -> None:
    """Raises BadArgument for a mask of which nothing is left at its image's size, before the first image is made."""
    for request, (_, mask) in zip(requests, sources, strict=True):
        if mask is not None:
            try:
                request.source.canvases(request.height, request.width, model.pipeline.vae.factor, 1)
            except BadArgument as error:
                raise (BadArgument("mask", mask, error.problem) if error.name == "mask" else error) from None


def check_out(
    out: Path, abouts: Sequence[Mapping[str, Any]], numbers: range, read: Iterable[Path], overwrite: bool
) -> None:
    """Raises BadArgument if images of these names, one record for each prompt, would replace what they must not.

    These are files that are `read` for them, and without `overwrite` those that record something else.
    """
    kept = {path.resolve() for path in read}
    for path in sorted(out.glob("*.png")):
        prompt, number = map(int, found.groups()) if (found := _NAME.fullmatch(path.name)) else (len(abouts), 0)
        if prompt >= len(abouts) or number not in numbers:
            continue
        if path.resolve() in kept:
            raise BadArgument("out", out, f"has {path.name}, which images are made from; choose another folder")
        wanted = {"image": number, **abouts[prompt]}
        if not overwrite and png.read_about(path) != {key: png.text_of(value) for key, value in wanted.items()}:
            problem = f"has {path.name} of another prompt, model or settings; choose another folder, or --overwrite"
            raise BadArgument("out", out, problem)


def check_preview(path: Path) -> None:
    """Raises BadArgument if a preview would replace a file that is none."""
    if path.exists() and png.read_about(path).keys() != {"step"}:
        raise BadArgument("out", path.parent, f"has a {path.name} of others; choose another folder, or --overwrite")


def run(args: argparse.Namespace, written: list[Path]) -> None:
    """Generates what the command line asks for; adds the files to `written` as they are made."""
    prompts, controls, sources = read_prompts(args), read_control(args), read_sources(args)
    then, preview = chain.of_flags(vars(args)), args.out / "preview.png"
    if args.preview is not None and not args.overwrite:
        check_preview(preview)
    args.lora = with_loras_of(args, prompts)
    model = flags.load_model(args, args.embedding)
    nets = {name: model.control_net(name, args.variant) for name in dict.fromkeys(one.net for one in controls)}
    controls = [dataclasses.replace(one, net=nets[one.net]) for one in controls]
    keys = (*OF_SAMPLER, *OF_TEXT, *OF_IMAGE, "height", "width", "noise", "control_guess")
    given = {key: getattr(args, key) for key in keys} | {"prompt_syntax": args.prompt_syntax or "plain"}
    requests = [
        make_request(model.pipeline, control=controls, image=image, mask=mask, **given) for image, mask in sources
    ]
    check_painted(model, requests, sources)
    if args.refiner is not None:
        then = dataclasses.replace(then, model=model.refiner(args.refiner, args.variant))
    requests = [chain.followed(model.pipeline, request, then, controls) for request in requests]
    if args.preview is not None:
        model.preview = load_preview(args.preview, model.pipeline, functools.partial(show, preview))
    files.tidy(args.out.absolute())
    numbers = range(args.first_image, args.first_image + args.num_images)
    pairs = [(n, prompt) for n in range(len(sources)) for prompt in prompts]  # each image with each prompt
    abouts = [
        {"prompt": prompt, **like.about_source(args, *sources[n]), **like.about_images(args, requests[n], model.dtype)}
        for n, prompt in pairs
    ]
    read = {path for pair in sources for path in pair if path is not None}
    read |= {files.expanded(control.parse(text)[1]) for text in args.control}
    check_out(args.out, abouts, numbers, read, args.overwrite)
    try:
        files.check_space(args.out, len(pairs) * args.num_images * SMALLEST)
    except LcmError as error:
        raise BadArgument("num_images", args.num_images, str(error)) from None
    of_size = collections.defaultdict(list)
    for pair, (n, _) in enumerate(pairs):
        of_size[requests[n].of_size].append(pair)
    asked = [(joined([requests[pairs[pair][0]] for pair in group]), group) for group in of_size.values()]
    batches = [
        (
            model.batches(
                request,
                [pairs[pair][1] for pair in group],
                args.num_images,
                args.seed,
                args.batch_size,
                args.first_image,
            ),
            group,
        )
        for request, group in asked
    ]
    warn(model, requests[0], prompts, args.prompt_syntax is not None)
    if args.image is not None:
        print("timesteps", *make_plan(model.pipeline, requests[0].settings).t)
    if then is not None:
        print("timesteps", *chain.timesteps(model.pipeline, requests[0]))
    for images, group in batches:
        write_images(args.out, images, group, numbers, abouts, written)
    if args.preview is not None:
        jax.effects_barrier()  # the last step may still be shown
        preview.unlink(missing_ok=True)


def write_images(
    out: Path,
    batches: Iterable[np.ndarray],
    pairs: Sequence[int],
    numbers: range,
    abouts: Sequence[Mapping[str, Any]],
    written: list[Path],
) -> None:
    """Writes the images of `pairs`, `numbers` of each, as they are made; adds the files to `written`."""
    first = 0
    for images in batches:
        jobs = [divmod(job, len(numbers)) for job in range(first, first + len(images))]
        jobs = [(pairs[pair], numbers[n]) for pair, n in jobs]
        paths = [out / f"{pair:04d}_{number:04d}.png" for pair, number in jobs]
        bad = not_finite(images)
        for n, image in enumerate(to_uint8(images)):
            if n not in bad:
                write_png(paths[n], image, {"image": jobs[n][1], **abouts[jobs[n][0]]})
                written.append(paths[n])
        if bad:
            raise LcmError(
                f"{', '.join(paths[n].name for n in bad)}: not finite, and would be black; try --dtype=float32, and "
                "check whether the weights are finite"
            )
        first += len(images)


def show(path: Path, images: np.ndarray, step: int) -> None:
    """Writes the images of a step as one; a disk that is full is for the images themselves to report."""
    with contextlib.suppress(files.CannotWrite):
        write_png(path, png.grid(images, min(len(images), 4)), {"step": step})


def warn(model: Generator, request: Request, prompts: Sequence[str], syntax_given: bool) -> None:
    """Prints on stderr `request.warnings`, embeddings without use, and prompts that lose something."""
    found, syntax = warnings(model.pipeline, request), request.reading.syntax
    texts = [*prompts, *([request.negative_prompt] if request.negative_prompt else [])]
    if not syntax_given and (marked := next(filter(is_marked, texts), None)):
        found.append(
            f"without --prompt_syntax=a1111 (or comfy) brackets and tags are plain text: {marked[:60]!r}; "
            "--prompt_syntax=plain keeps it so, without this warning"
        )
    for name in unused(model.embeddings, texts, syntax):
        written = f"embedding:{name}" if syntax == "comfy" else name
        found.append(f"no prompt has the embedding {name}; write {written} where it belongs")
    cut = truncated(model.pipeline, model.embeddings, texts) if syntax == "plain" else {}
    for prompt, (length, kept) in cut.items():
        found.append(f"a prompt of {length} tokens is cut to {kept}, {length - kept} are lost: {prompt[:60]!r}...")
    for warning in found:
        print(f"warning: {printable(warning)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    p, argv, written = parser(), sys.argv[1:] if argv is None else argv, []
    args = p.parse_args(argv)

    def program() -> None:
        steps = args.steps or len(args.timesteps) or None
        preset = args.preset
        of_image = args.image is not None or (args.like is not None and "image" in like.recorded(args.like)[0])
        of_preset = [] if preset is None else presets.words(preset, steps, of_image, args.sampler)
        given = [*of_preset, *argv]
        asked = p.parse_args(given) if args.like is None else repeated(p, given, args.like)
        asked.lora = asked.lora if preset is None else presets.weighted(preset, asked.lora)
        run(asked, written)
        print(f"{len(written)} images in {args.out}")

    def left() -> str:
        return f"{len(written)} images are in {args.out}" if written else "nothing was written"

    return exit_code(program, left, flags.SMALLER)


if __name__ == "__main__":
    sys.exit(main())
