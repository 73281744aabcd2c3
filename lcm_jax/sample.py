"""Prompts -> PNG files, with a Latent Consistency Model, with an LCM-LoRA, or with a teacher.

    python -m lcm_jax.sample --model=DIR --out=pictures --prompt="a large red star at the left on a white background"
    python -m lcm_jax.sample --model=BASE --lora=LCM_LORA --lora=STYLE.safetensors:0.8 --out=pictures --prompt="..."

One prompt gives `--num_images` pictures; picture i of a prompt depends on (seed, i) alone, not on how many are drawn.
`--guidance_scale` is the user's: a UNet with w embedding is told w = guidance_scale - 1. Any other is guided by a
second pass with the negative prompt, at scale 1 not at all; for an LCM of that kind 1 is the default, 2 about the most.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcm_jax import assets
from lcm_jax.diffusion import samplers
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.pretrained import Pipeline, is_single_file, load_pipeline, lora_files, read_record
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.names import Place
from lcm_jax.run.config import MAX_TWO_PASS_SCALE
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.sampling import generator as generate_lib
from lcm_jax.sampling.generator import Settings

SAMPLERS = tuple(samplers.SAMPLERS)
MAX_STEPS = 50
CONSTANTS = ("solver_steps", "timestep_scaling", "sigma_data", "prediction_type")  # in which records must agree

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/.+)?")

Lora = tuple[str, float]  # file, folder or hub id; weight


def check_request(
    pipeline: Pipeline, settings: Settings, height: int, width: int, negative_prompt: str | None = None
) -> None:
    """Raises LcmError for what this model cannot do, before anything is compiled."""
    largest = min(MAX_STEPS, settings.original_steps) if settings.sampler == "lcm" else MAX_STEPS
    if not 1 <= settings.steps <= largest:
        raise LcmError(f"--steps={settings.steps} is out of range; choose 1 to {largest}")
    factor = pipeline.vae.factor
    for name, side in (("height", height), ("width", width)):
        if side < factor or side % factor:
            raise LcmError(f"--{name}={side} is not a multiple of the VAE's factor {factor}; use a multiple of it")
    if negative_prompt is not None and pipeline.has_w_embedding:
        raise LcmError(
            f"--negative_prompt={negative_prompt!r}: this UNet has a w embedding: guidance was distilled in, against "
            "the null text, so no pass is left for another; leave it out, or use an LCM-LoRA (--lora) on the base model"
        )


def warnings(
    pipeline: Pipeline,
    record: Mapping[str, Any],
    settings: Settings,
    guidance_scale: float,
    negative_prompt: str | None = None,
    may_be_lcm: bool = False,
) -> list[str]:
    """What will probably disappoint, one line each. may_be_lcm: a LoRA or another UNet, which need not say it."""
    found = [guidance_warning(pipeline, record, settings, guidance_scale)]
    if negative_prompt is not None and guidance_scale == 1.0:
        found.append(
            "--negative_prompt has no effect at guidance scale 1, which is one pass; use --guidance_scale above 1"
        )
    if settings.sampler == "lcm" and not (may_be_lcm or generate_lib.is_lcm(pipeline, record)):
        found.append(
            "nothing says that this is a Latent Consistency Model (no w embedding, lcm_config.json, LCMScheduler or "
            "--lora): if it is none, few steps give blurred pictures; use --sampler=ddim, or --lora with an LCM-LoRA"
        )
    return [warning for warning in found if warning]


def guidance_warning(
    pipeline: Pipeline, record: Mapping[str, Any], settings: Settings, guidance_scale: float
) -> str | None:
    """A warning where the model was not made for the scale: outside the range of w, or a second guidance too many."""
    if not pipeline.has_w_embedding:
        if settings.sampler != "lcm" or guidance_scale <= MAX_TWO_PASS_SCALE:
            return None
        return (
            f"guidance scale {guidance_scale:g} on an LCM without w embedding: guidance is distilled in already, and "
            f"above {MAX_TWO_PASS_SCALE:g} pictures come out oversaturated, with burnt contrast and broken shapes; use "
            f"1 (one pass) to {MAX_TWO_PASS_SCALE:g}"
        )
    if "w_min" not in record:
        return None
    low, high = record["w_min"] + 1.0, record["w_max"] + 1.0
    if low <= guidance_scale <= high:
        return None
    return f"guidance scale {guidance_scale:g} is outside {low:g} to {high:g}, the range this model was distilled on"


def load(
    model: str,
    unet: str | None = None,
    vae: str | None = None,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    config: str | None = None,
    place: Place | None = None,
) -> tuple[Pipeline, dict]:
    """The pipeline with UNet and VAE replaced where given, and the record of where the UNet comes from.

    config: folder or hub id with the tokenizers and configs that a single-file `model` lacks.
    place: takes each parameter as soon as it is read, see `load_pipeline`.
    """
    source, config = assets.resolve(model), config and assets.resolve(config)
    pipeline = load_pipeline(source, variant, dtype, unet=unet, vae=vae, config=config, place=place)
    if dtype == jnp.float16 and getattr(pipeline.vae, "force_upcast", False):
        pipeline = dataclasses.replace(pipeline, vae=pipeline.vae.clone(dtype=jnp.float32))  # SDXL's overflows
    if unet is not None:
        return pipeline, read_record(unet)
    return pipeline, read_record(source if is_single_file(source) else pipeline.source)


def add_loras(
    pipeline: Pipeline, record: Mapping[str, Any], loras: Sequence[Lora], ignore_unused: bool = False
) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline with LoRAs merged, and what the records of model and LoRAs say together.

    A LoRA that says nothing of its distillation leaves the record as it is: 50 solver steps and timestep scaling 10,
    the published LCM-LoRAs', unless the model says otherwise.

    Raises:
      LcmError: a file that cannot be used (`lora_files.read_lora`), or records that contradict each other.
    """
    modules = lora_files.modules_of(pipeline)
    read = [(lora_files.read_lora(source, modules, ignore_unused), weight) for source, weight in loras]
    own = {**record, "prediction_type": pipeline.schedule.prediction_type}
    records = {"the model": own, **{source: read_record(source) for source, _ in loras}}
    for key in CONSTANTS:
        said = {name: one[key] for name, one in records.items() if key in one}
        if len(set(said.values())) > 1:
            values = ", ".join(f"{value} for {name}" for name, value in said.items())
            raise LcmError(f"--lora: {key} is {values}; they cannot go together, take LoRAs made for this model")
    together = {key: value for one in records.values() for key, value in one.items()}
    return lora_files.merge_into(pipeline, read), together


def parse_lora(text: str) -> Lora:
    """`FILE[:weight]`: what follows the last colon is a weight if it is a number, else part of the name; 1.0 if none.

    Raises:
      LcmError: no file by that name and no hub id, or a weight that is not finite.
    """
    source, colon, last = text.rpartition(":")
    try:
        weight = float(last) if colon else 1.0
    except ValueError:
        colon, weight = "", 1.0
    source = source if colon else text
    if not math.isfinite(weight):
        raise LcmError(f"--lora={text}: weight {weight} is not finite; 1 is the LoRA as it was trained")
    if not Path(source).expanduser().exists() and not _HUB_NAME.fullmatch(source):
        raise LcmError(f"--lora={text}: {source} does not exist; give a .safetensors file, a folder, or owner/name")
    return source, weight


def batches(prompts: Sequence[str], num_images: int, batch_size: int) -> Iterator[list[tuple[int, str, int]]]:
    """(prompt's number, prompt, picture's number) in lists of `batch_size`; the last list may be shorter."""
    jobs = [(p, prompt, i) for p, prompt in enumerate(prompts) for i in range(num_images)]
    for start in range(0, len(jobs), batch_size):
        yield jobs[start : start + batch_size]


def write_png(path: Path, image: np.ndarray, words: Mapping[str, Any]) -> None:
    """A PNG of uint8 [H W 3] that carries `words` in its text chunks."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in words.items():
        info.add_itxt(key, str(value))
    Image.fromarray(image).save(path, pnginfo=info)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as the programs say everything else."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_model_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that say which model draws."""
    p.add_argument(
        "--model", required=True, help='model folder in diffusers format, hub id, single .safetensors, or "shapes"'
    )
    p.add_argument("--model_config", help="for a single file: folder or hub id with its tokenizers and configs")
    p.add_argument("--unet", help="UNet folder to use instead (as lcm-sdxl's: config.json at its root)")
    p.add_argument("--vae", help="VAE folder to use instead")
    p.add_argument("--variant", help="weight files to read, as fp16")
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA to merge: file, folder or hub id; may be given several times",
    )
    p.add_argument("--ignore_unused", action="store_true", help="go on if keys of a LoRA match no layer of the model")


def add_drawing_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that say how any model draws."""
    p.add_argument("--negative_prompt", help="what guidance leads away from; only for a UNet without w embedding")
    p.add_argument("--height", type=int, help="pixels; default: the model's")
    p.add_argument("--width", type=int, help="pixels; default: the model's")
    p.add_argument("--tiled", action="store_true", help="decode large pictures in tiles: less memory, faint seams")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the networks")
    p.add_argument("--fsdp", type=int, default=1, help="devices that hold one copy of the weights together; -1: all")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m lcm_jax.sample", description=__doc__.splitlines()[0])
    add_model_arguments(p)
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--prompts", type=Path, help="text file, one prompt per line")
    p.add_argument("--sampler", choices=SAMPLERS, default="lcm")
    p.add_argument("--spacing", choices=samplers.SPACINGS, default="trailing", help="timesteps of ddim and dpm")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument(
        "--guidance_scale",
        type=float,
        help="w + 1; 1 is no guidance. Default: 1 for an LCM without w embedding (LCM-LoRA), else 8, or "
        "the middle of the range the model was distilled on",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_images", type=int, default=4, help="pictures per prompt")
    p.add_argument("--batch_size", type=int, default=4, help="pictures drawn at once")
    add_drawing_arguments(p)
    p.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    return p


def read_text(flag: str, path: Path) -> str:
    """The UTF-8 text of a file that `--flag` names. Raises LcmError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise LcmError(f"--{flag}={path} cannot be read ({reason}); give a text file") from error


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of a command line. Raises LcmError for what is wrong with it whatever the model."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += [line.strip() for line in read_text("prompts", args.prompts).splitlines() if line.strip()]
    if not prompts:
        raise LcmError('no prompt; give --prompt="..." or --prompts=FILE with one per line')
    for flag in ("num_images", "batch_size"):
        if getattr(args, flag) < 1:
            raise LcmError(f"--{flag}={getattr(args, flag)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise LcmError(f"--seed={args.seed} is out of range; choose 0 to {2**32 - 1}")
    if not 1 <= args.steps <= MAX_STEPS:
        raise LcmError(f"--steps={args.steps} is out of range; choose 1 to {MAX_STEPS}")
    if args.guidance_scale is not None and not 1.0 <= args.guidance_scale < float("inf"):
        raise LcmError(f"--guidance_scale={args.guidance_scale:g}: 1 is no guidance; use 1 or more")
    if args.model_config is not None and not is_single_file(args.model):
        raise LcmError(
            f"--model_config={args.model_config} is for a single .safetensors, not for --model={args.model}; remove it"
        )
    if args.out.exists() and not args.out.is_dir():
        raise LcmError(f"--out={args.out} is a file; give a folder")
    return prompts


def words_of(args: argparse.Namespace, guidance_scale: float, height: int, width: int) -> dict[str, Any]:
    """What each picture carries of the command line."""
    return {
        "model": args.model,
        **{key: getattr(args, key) for key in ("unet", "vae") if getattr(args, key)},
        **({"lora": ", ".join(args.lora)} if args.lora else {}),
        **({} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}),
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance_scale": guidance_scale,
        "seed": args.seed,
        "size": f"{width}x{height}",
        "dtype": args.dtype,
    }


def run(args: argparse.Namespace) -> list[Path]:
    """Draws what the command line asks for; returns the files."""
    prompts = read_prompts(args)
    loras = [parse_lora(text) for text in args.lora]
    dtype = jnp.dtype(args.dtype)
    mesh = make_mesh(args.fsdp)
    place = mesh_lib.place(mesh)
    pipeline, record = load(args.model, args.unet, args.vae, args.variant, dtype, args.model_config, place)
    if loras:
        pipeline, record = add_loras(pipeline, record, loras, args.ignore_unused)
    height, width = size_of(args, pipeline)
    settings = generate_lib.settings_for(pipeline, record, args.sampler, args.steps, args.spacing)
    check_request(pipeline, settings, height, width, args.negative_prompt)
    default_scale = generate_lib.default_guidance_scale(pipeline.has_w_embedding, record, args.sampler)
    scale = default_scale if args.guidance_scale is None else args.guidance_scale
    report(pipeline, record, settings, scale, prompts, args)

    args.out.mkdir(parents=True, exist_ok=True)
    generate = generate_lib.Generator(pipeline, args.tiled, args.negative_prompt, mesh)
    factor = pipeline.vae.factor
    shape = (height // factor, width // factor, pipeline.unet.in_channels)
    words = words_of(args, scale, height, width)
    written = []
    size = math.ceil(args.batch_size / mesh.size) * mesh.size  # no device draws for nothing
    for jobs in batches(prompts, args.num_images, size):
        padded = jobs + [jobs[-1]] * (size - len(jobs))  # one batch size, one compilation
        cond = generate.encode([prompt for _, prompt, _ in padded], report=False)
        noise = generate_lib.draw_noise(args.seed, [i for _, _, i in padded], settings.steps, shape)
        images = generate(cond, noise, scale, settings)[: len(jobs)]
        paths = [args.out / f"{p:04d}_{i:04d}.png" for p, _, i in jobs]
        bad = [paths[n] for n in generate_lib.not_finite(images)]
        for path, (_, prompt, i), image in zip(paths, jobs, generate_lib.to_uint8(images), strict=True):
            if path not in bad:
                write_png(path, image, {"prompt": prompt, "image": i, **words})
                written.append(path)
        if bad:
            raise LcmError(
                f"{', '.join(path.name for path in bad)}: not finite, and would be black; try "
                "--dtype=float32, and see whether the weights are finite"
            )
    return written


def size_of(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the pictures: as asked for, or what the model was made for."""
    height, width = generate_lib.default_size(pipeline)
    return (height if args.height is None else args.height, width if args.width is None else args.width)


def make_mesh(fsdp: int) -> Mesh:
    """All devices, `fsdp` of them (-1: all) for one copy of the weights. Raises LcmError where that does not go."""
    count = jax.device_count()
    if fsdp != -1 and (fsdp < 1 or count % fsdp):
        raise LcmError(f"--fsdp={fsdp} does not divide the {count} devices; choose a divisor, or -1 for all")
    return mesh_lib.make_mesh(fsdp=count if fsdp == -1 else fsdp)


def report(
    pipeline: Pipeline,
    record: Mapping[str, Any],
    settings: Settings,
    guidance_scale: float,
    prompts: Sequence[str],
    args: argparse.Namespace,
) -> None:
    """Says on stderr what will probably disappoint, and which prompts are too long."""
    may_be_lcm = bool(args.lora or args.unet)
    for warning in warnings(pipeline, record, settings, guidance_scale, args.negative_prompt, may_be_lcm):
        print(f"warning: {warning}", file=sys.stderr)
    texts = [*prompts, *([args.negative_prompt] if args.negative_prompt else [])]
    for text, (length, kept) in conditioning.truncated(pipeline, texts).items():
        print(
            f"warning: a prompt of {length} tokens is cut to {kept}, {length - kept} are lost: {text[:60]!r}...",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return exit_code(lambda: print(f"{len(run(args))} pictures in {args.out}"))


if __name__ == "__main__":
    sys.exit(main())
