"""What a PNG file records of the command line, and the flags that repeat its image: ours, or A1111's "parameters"."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax.errors import BadArgument
from lcm_jax.sampling import chain, png
from lcm_jax.sampling.plan import EULER, ON_GRID, Settings
from lcm_jax.sampling.request import Request

# What is recorded under the names of its flags: what the model is, how it is sampled, and how that is computed.
MODEL = ("model", "unet", "vae", "variant", "model_config", "lora", "embedding", "ignore_unused")
PROMPTS = ("prompt", "negative_prompt", "nag_scale", "prompt_syntax", "emphasis", "clip_skip")
CONTROL = ("control", "control_guess", "canny")
MASK = ("mask", "mask_blur", "mask_grow", "crop_padding", "paste", "start")
IMAGE = ("image", "strength", "fit", "background", "posterior", *MASK)
_PASSES = {kind: (kind, *(f"{kind}_{other}" for other in others)) for kind, (_, *others) in chain.FLAGS.items()}
SECOND = tuple(name for names in _PASSES.values() for name in names)
SAMPLER = ("sampler", "spacing", "gamma", "timesteps", "steps")
SAMPLED = (*PROMPTS, *CONTROL, *IMAGE[1:], *SECOND, *SAMPLER, "guidance_scale", "seed", "noise")
COMPUTED = ("dtype", "tiled", "sliced", "weights")
SWITCHES = ("ignore_unused", "tiled", "sliced", "control_guess")  # flags without a value
# Recorded only if given.
OPTIONAL = ("unet", "vae", "variant", "model_config", "ignore_unused", *CONTROL[1:], "background", *COMPUTED[1:])
LISTS = ("lora", "embedding", "control")  # flags that may be given several times

# A flag that is given -> the recorded ones that it replaces besides its own: they would be added to it, or refused.
_REPLACES = {
    "model": MODEL,
    "prompt": ("prompt",),
    "prompts": ("prompt",),
    "lora": ("lora",),
    "control": CONTROL,
    "image": ("image", "width", "height", "spacing", "timesteps", *MASK, *SECOND),
    "hires": _PASSES["refiner"],
    "refiner": _PASSES["hires"],
    "steps": ("timesteps",),
    "timesteps": ("steps", "spacing"),
}

_SAMPLERS = {"LCM": "lcm", "DDIM": "ddim", "DPM++ 2M": "dpm_solver_pp_2m"}
_NOISE = {"CPU": "torch", "NV": "nv", "GPU": "nv"}
_OTHERS = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed", "Clip skip": "clip_skip"}
_NO_EFFECT = {"Version", "Batch size", "Batch pos"}  # each image records its own seed
_FIELD = re.compile(r'([^:,"]+):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_MAX_FIELDS = 10_000  # characters
_SIZE = re.compile(r"(\d+)x(\d+)")
_ITEM = re.compile(r'(?:^|, )("(?:[^"\\]|\\.)*"(?=, |\Z)|.*?(?=, |\Z))', re.DOTALL)


def about_images(args: argparse.Namespace, request: Request, dtype: str) -> dict[str, Any]:
    """What each image records of the command line, and the dtype that its networks computed in."""
    reading, source, settings = request.reading, request.source, request.settings
    about = {
        "model": args.model,
        **{key: getattr(args, key) or None for key in OPTIONAL},
        **{key: join(getattr(args, key)) or None for key in LISTS},
        "negative_prompt": args.negative_prompt,
        "nag_scale": None if args.nag_scale == 1.0 else args.nag_scale,
        **({} if reading.syntax == "plain" else {"prompt_syntax": reading.syntax, "emphasis": reading.emphasis}),
        "clip_skip": args.clip_skip,
        **({"strength": settings.strength, "fit": source.fit, "posterior": source.posterior} if source else {}),
        **chain.recorded(chain.of_flags(vars(args))),
        **about_sampler(settings),
        "guidance_scale": request.guidance_scale,
        "seed": args.seed,
        "noise": None if args.noise == "jax" else args.noise,
        "num_images": args.num_images if args.noise == "torch-batch" else None,
        "size": f"{request.width}x{request.height}",
        "dtype": dtype,
    }
    return {name: value for name, value in about.items() if value is not None}


def about_sampler(settings: Settings) -> dict[str, Any]:
    """What each image records of its sampler: flags that repeat it."""
    by_hand = ",".join(map(str, settings.timesteps))
    spaced = settings.sampler not in (*ON_GRID, *EULER) and settings.strength is None
    return {
        "sampler": settings.sampler,
        **({"spacing": settings.spacing} if spaced else {}),
        **({"gamma": settings.gamma} if settings.sampler == "tcd" else {}),
        "steps": settings.steps,
        **({"timesteps": by_hand} if by_hand else {}),
    }


def about_source(args: argparse.Namespace, image: Path | None, mask: Path | None) -> dict[str, Any]:
    """What an image records of the image and the mask that it starts from."""
    if mask is None:
        return {"source": image} if image else {}
    values = {key: getattr(args, key) for key in MASK[1:]} | {"paste": "off" if args.paste is False else None}
    return {"source": image, "mask": mask} | {key: value for key, value in values.items() if value is not None}


def recorded(path: Path) -> tuple[dict[str, str | list[str]], list[str]]:
    """({flag: value} that repeats the image, what else its file records and is not repeated).

    Of "torch-batch", where an image depends on those beside it, the flags repeat them all.

    Raises:
      BadArgument: no PNG file, or one that does not record how it was made.
    """
    if not path.is_file():
        raise BadArgument("like", path, "is no file; give a PNG file")
    about, flags, lost = png.read_about(path), {}, []
    if "parameters" in about:
        flags, lost = _of_a1111(about["parameters"])
    elif {"prompt", "image", "seed", "steps", "size"} <= about.keys():
        flags, lost = _of_ours(about)
    if not flags:
        problem = "does not record how it was made; give a PNG file of lcm_jax.sample, or of A1111 with its parameters"
        raise BadArgument("like", path, problem)
    return flags, lost


def replaced(found: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Those of the `found` flags that have no place beside the flags `given`, none of which is set by default."""
    names = {name for flag, others in _REPLACES.items() if given[flag] for name in others}
    if given["sampler"] not in (None, "tcd"):
        names.add("gamma")
    if given["sampler"] in (*ON_GRID, *EULER):
        names.add("spacing")
    if given["prompt_syntax"] == "plain":
        names.add("emphasis")
    if given["control"] and "control" in found:  # it may have given the size
        names |= {"width", "height"}
    return names & found.keys()


def join(values: Sequence[str]) -> str:
    """What an image records of a flag that is given several times: joined by ", ", those with a comma in quotes.

    As in A1111's "parameters", quoted is what is a JSON string.
    """
    quoted = [json.dumps(one, ensure_ascii=False) if "," in one or one.startswith('"') else one for one in values]
    return ", ".join(quoted)


def split(text: str) -> list[str]:
    """The values that `join` made a text of."""
    return [_unquoted(one) for one in _ITEM.findall(text)]


def _unquoted(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:  # no JSON string, but a name that begins with a quote
        return text


def words(flags: dict[str, str | list[str]]) -> list[str]:
    """`recorded` flags as words of a command line."""
    pairs = [(name, one) for name, value in flags.items() for one in (value if isinstance(value, list) else [value])]
    return [f"--{name}" if name in SWITCHES and value == "True" else f"--{name}={value}" for name, value in pairs]


def _of_ours(about: dict[str, str]) -> tuple[dict[str, str | list[str]], list[str]]:
    flags = {name: about[name] for name in (*MODEL, *SAMPLED, *COMPUTED) if name in about}
    flags |= {name: split(about[name]) for name in LISTS if name in about}
    flags |= {"image": about["source"]} if "source" in about else {}
    whole = {"num_images": about["num_images"]} if "num_images" in about else None
    lost = [
        f"{name} {text}"
        for name, text in about.items()
        if name not in {*flags, "image", "source", "size", "num_images"}
    ]
    return flags | _size(about["size"]) | (whole or {"first_image": about["image"], "num_images": "1"}), lost


def _of_a1111(text: str) -> tuple[dict[str, str], list[str]]:
    """Of the prompt, "Negative prompt: ..." and a last line "Steps: 4, Sampler: LCM, ..."; {} if that is missing."""
    texts, _, line = text.strip().rpartition("\n")
    if not line.startswith("Steps: ") or len(line) > _MAX_FIELDS:
        return {}, []
    prompt, negative, negative_prompt = f"\n{texts}".partition("\nNegative prompt: ")
    flags = {"prompt": prompt.strip(), **({"negative_prompt": negative_prompt.strip()} if negative else {})}
    flags |= {"prompt_syntax": "a1111", "num_images": "1", "noise": _NOISE["GPU"]}
    lost = []
    for name, value in _FIELD.findall(line):
        name = name.strip()
        if name in _OTHERS:
            flags[_OTHERS[name]] = value
        elif name == "Size":
            flags |= _size(value)
        elif name == "Sampler" and value in _SAMPLERS:
            flags["sampler"] = _SAMPLERS[value]
        elif name == "RNG" and value in _NOISE:
            flags["noise"] = _NOISE[value]
        elif name not in _NO_EFFECT:
            lost.append(f"{name} {value}")
    return flags, lost


def _size(text: str) -> dict[str, str]:
    width, height = found.groups() if (found := _SIZE.fullmatch(text)) else (text, text)
    return {"width": width, "height": height}
