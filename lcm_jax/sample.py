"""Prompts -> PNG files, with a Latent Consistency Model or with its teacher.

    python -m lcm_jax.sample --model=DIR --out=pictures --prompt="a large red star at the left on a white background"

One prompt gives `--num_images` pictures; picture i of a prompt depends on (seed, i) alone, not on how many are drawn.
`--guidance_scale` is the user's: the network is told w = guidance_scale - 1.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import assets
from lcm_jax.diffusion import consistency, samplers
from lcm_jax.diffusion.denoiser import call, guided_output, student_output
from lcm_jax.errors import LcmError
from lcm_jax.models import tiling
from lcm_jax.pretrained import Pipeline, conditioning, load_pipeline, read_record

SAMPLERS = ("lcm", "ddim", "dpm_solver_pp_2m")
MAX_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample; static under jit.

    `spacing` is that of the baselines, and `set_alpha_to_one` says where DDIM ends (see `samplers.ddim`);
    `original_steps`, `timestep_scaling` and `sigma_data` must be those that the LCM was distilled with.
    """

    sampler: str = "lcm"
    steps: int = 4
    spacing: str = "trailing"
    original_steps: int = 50
    timestep_scaling: float = consistency.TIMESTEP_SCALING
    sigma_data: float = consistency.SIGMA_DATA
    set_alpha_to_one: bool = True


def draw_noise(seed: int, images: Sequence[int], steps: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise [steps b h w c]: entry 0 starts the sampler, the others come between an LCM's steps.

    Picture i's noise is keyed by (seed, i), and its first entries are the same for every number of steps.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(images, jnp.uint32))

    def of_step(step):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), tuple(shape)))(keys)

    return np.asarray(jax.vmap(of_step)(jnp.arange(steps)))


def latents(
    pipeline: Pipeline,
    params: Any,
    cond: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    noise: jax.Array,
    guidance_scale: jax.Array,
    settings: Settings,
    guided: bool = True,
) -> jax.Array:
    """Diffusion latents [b h w c], scaled; pure, one scan over the steps.

    Args:
      pipeline: for its UNet and noise table (static).
      params: the UNet's weights.
      cond: of the captions [b ...]. null: of the null text [1 ...].
      noise: [steps b h w c] from `draw_noise`.
      guidance_scale: scalar; w = guidance_scale - 1 is told to a UNet with w embedding, which runs once a step.
      settings: sampler and steps.
      guided: for a UNet without w embedding: two passes per step (classifier-free guidance) instead of one.
    """
    batch = noise.shape[1]
    w = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32) - 1.0, (batch,))
    unet = pipeline.unet

    def model(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, (batch,))
        if pipeline.has_w_embedding:
            return student_output(unet, params, x, t, cond, w)
        return guided_output(unet, params, x, t, cond, null, w) if guided else call(unet, params, x, t, cond)

    if settings.sampler == "lcm":
        return samplers.lcm(
            model,
            noise[0],
            noise[1:],
            pipeline.schedule,
            settings.steps,
            settings.original_steps,
            settings.timestep_scaling,
            settings.sigma_data,
        )
    # Stable Diffusion's schedulers shift leading timesteps by one; the other spacings ignore the offset.
    common = (model, noise[0], pipeline.schedule, settings.steps, settings.spacing, 1)
    if settings.sampler == "ddim":
        return samplers.ddim(*common, set_alpha_to_one=settings.set_alpha_to_one)
    return samplers.dpm_solver_pp_2m(*common)


def to_uint8(images: jax.Array) -> np.ndarray:
    """[0, 1] -> 0..255, rounded as diffusers rounds."""
    return (np.asarray(images) * 255.0).round().astype(np.uint8)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [n H W 3] as one, row by row: [ceil(n / columns) * H, columns * W, 3]; empty places are white."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, images.dtype)
    cells[:n] = images
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)


class Generator:
    """Draws batches of pictures with one pipeline: the weights lie on the device, each setting is compiled once."""

    def __init__(self, pipeline: Pipeline, tiled: bool = False):
        """tiled: decode large pictures in overlapping tiles, for less memory (`models.tiling`)."""
        self.tiled = tiled
        self.pipeline = dataclasses.replace(pipeline, params=jax.device_put(pipeline.params))
        self.params = self.pipeline.params
        self.null = conditioning.null(self.pipeline)
        self._latents = jax.jit(
            lambda params, cond, null, noise, scale, settings, guided: latents(
                pipeline, params, cond, null, noise, scale, settings, guided
            ),
            static_argnames=("settings", "guided"),
        )
        self._decode = jax.jit(lambda params, z: pipeline.vae.apply({"params": params}, z, method="decode"))

    def __call__(
        self,
        cond: Mapping[str, jax.Array],
        noise: np.ndarray,
        guidance_scale: float,
        settings: Settings,
        unet_params: Any = None,
    ) -> np.ndarray:
        """Pictures float32 in [0, 1], [b H W 3]. cond: `encode`d captions; noise: [steps b h w c]; see `latents`."""
        return self.decode(self.latents(cond, noise, guidance_scale, settings, unet_params))

    def decode(self, z: jax.Array) -> np.ndarray:
        """Scaled latents [b h w c] -> pictures float32 in [0, 1], [b H W 3]."""
        vae = self.pipeline.vae
        decode = functools.partial(self._decode, self.params["vae"])
        z = z / vae.scaling_factor
        images = tiling.decode(decode, z, tile=tiling.tile_size(vae), factor=vae.factor) if self.tiled else decode(z)
        return np.clip(np.asarray(images, np.float32) / 2.0 + 0.5, 0.0, 1.0)

    def encode(self, captions: Sequence[str]) -> dict[str, jax.Array]:
        """Conditioning [b ...] of captions."""
        return conditioning.encode(self.pipeline, captions)

    def latents(
        self,
        cond: Mapping[str, jax.Array],
        noise: np.ndarray,
        guidance_scale: float,
        settings: Settings,
        unet_params: Any = None,
    ) -> jax.Array:
        """Scaled latents [b h w c]; `unet_params` stand in for the pipeline's own UNet weights."""
        params = self.params["unet"] if unet_params is None else unet_params
        if self.pipeline.is_xl:
            height, width = (side * self.pipeline.vae.factor for side in noise.shape[2:4])
            cond = {**cond, "time_ids": conditioning.time_ids(height, width, noise.shape[1])}
        guided = guidance_scale != 1.0
        return self._latents(params, cond, self.null, noise, guidance_scale, settings, guided)


def settings_for(pipeline: Pipeline, record: Mapping[str, Any], sampler: str, steps: int, spacing: str) -> Settings:
    """Settings with the constants that the model was distilled with: our record's, else its scheduler config's."""
    scheduler = pipeline.configs["scheduler"]
    return Settings(
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        original_steps=record.get("solver_steps", scheduler.get("original_inference_steps", 50)),
        timestep_scaling=record.get("timestep_scaling", scheduler.get("timestep_scaling", 10.0)),
        sigma_data=record.get("sigma_data", consistency.SIGMA_DATA),
        set_alpha_to_one=scheduler.get("set_alpha_to_one", True),
    )


def default_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width in pixels that the model was made for."""
    size = pipeline.unet.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae.factor, width * pipeline.vae.factor


def check_request(pipeline: Pipeline, settings: Settings, guidance_scale: float, height: int, width: int) -> None:
    """Raises LcmError for what this model cannot do, before anything is compiled."""
    largest = min(MAX_STEPS, settings.original_steps) if settings.sampler == "lcm" else MAX_STEPS
    if not 1 <= settings.steps <= largest:
        raise LcmError(f"--steps={settings.steps} is out of range; choose 1 to {largest}")
    factor = pipeline.vae.factor
    for name, side in (("height", height), ("width", width)):
        if side < factor or side % factor:
            raise LcmError(f"--{name}={side} is not a multiple of the VAE's factor {factor}; use a multiple of it")
    if settings.sampler == "lcm" and not pipeline.has_w_embedding and guidance_scale != 1.0:
        raise LcmError(
            f"--guidance_scale={guidance_scale}: this UNet has no w embedding (time_cond_proj_dim is null); "
            "use --guidance_scale=1, or --sampler=ddim for a model that was not distilled"
        )


def guidance_warning(record: Mapping[str, Any], guidance_scale: float) -> str | None:
    """A warning where the scale lies outside the range that the model was distilled on, with that range."""
    if "w_min" not in record:
        return None
    low, high = record["w_min"] + 1.0, record["w_max"] + 1.0
    if low <= guidance_scale <= high:
        return None
    return f"guidance scale {guidance_scale:g} is outside {low:g} to {high:g}, the range this model was distilled on"


def load(model: str, unet: str | None, vae: str | None, variant: str | None, dtype: Any) -> tuple[Pipeline, dict]:
    """The pipeline with UNet and VAE replaced where given, and the record of the folder that the UNet comes from."""
    pipeline = load_pipeline(assets.resolve(model), variant, dtype, unet=unet, vae=vae)
    if dtype == jnp.float16 and getattr(pipeline.vae, "force_upcast", False):
        pipeline = dataclasses.replace(pipeline, vae=pipeline.vae.clone(dtype=jnp.float32))  # SDXL's overflows
    return pipeline, read_record(pipeline.source if unet is None else unet)


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


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m lcm_jax.sample", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="model folder in diffusers format, hub id, or \"shapes\"")
    p.add_argument("--unet", help="UNet folder to use instead (as lcm-sdxl's: config.json at its root)")
    p.add_argument("--vae", help="VAE folder to use instead")
    p.add_argument("--variant", help="weight files to read, as fp16")
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--prompts", type=Path, help="text file, one prompt per line")
    p.add_argument("--sampler", choices=SAMPLERS, default="lcm")
    p.add_argument("--spacing", choices=samplers.SPACINGS, default="trailing", help="timesteps of ddim and dpm")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--guidance_scale", type=float, default=8.0, help="w + 1; 1 is no guidance")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_images", type=int, default=4, help="pictures per prompt")
    p.add_argument("--batch_size", type=int, default=4, help="pictures drawn at once")
    p.add_argument("--height", type=int, help="pixels; default: the model's")
    p.add_argument("--width", type=int, help="pixels; default: the model's")
    p.add_argument("--tiled", action="store_true", help="decode large pictures in tiles: less memory, faint seams")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the networks")
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
        raise LcmError("no prompt; give --prompt=\"...\" or --prompts=FILE with one per line")
    for flag in ("num_images", "batch_size"):
        if getattr(args, flag) < 1:
            raise LcmError(f"--{flag}={getattr(args, flag)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise LcmError(f"--seed={args.seed} is out of range; choose 0 to {2**32 - 1}")
    if not 1 <= args.steps <= MAX_STEPS:
        raise LcmError(f"--steps={args.steps} is out of range; choose 1 to {MAX_STEPS}")
    if not 1.0 <= args.guidance_scale < float("inf"):
        raise LcmError(f"--guidance_scale={args.guidance_scale:g}: 1 is no guidance; use 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise LcmError(f"--out={args.out} is a file; give a folder")
    return prompts


def run(args: argparse.Namespace) -> list[Path]:
    """Draws what the command line asks for; returns the files."""
    prompts = read_prompts(args)
    pipeline, record = load(args.model, args.unet, args.vae, args.variant, jnp.dtype(args.dtype))
    height, width = default_size(pipeline)
    height = height if args.height is None else args.height
    width = width if args.width is None else args.width
    settings = settings_for(pipeline, record, args.sampler, args.steps, args.spacing)
    check_request(pipeline, settings, args.guidance_scale, height, width)
    warning = guidance_warning(record, args.guidance_scale)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)

    args.out.mkdir(parents=True, exist_ok=True)
    generate = Generator(pipeline, args.tiled)
    factor = pipeline.vae.factor
    shape = (height // factor, width // factor, pipeline.unet.in_channels)
    words = {
        "model": args.model,
        **{key: value for key, value in (("unet", args.unet), ("vae", args.vae)) if value},
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        "size": f"{width}x{height}",
        "dtype": args.dtype,
    }
    written = []
    for jobs in batches(prompts, args.num_images, args.batch_size):
        padded = jobs + [jobs[-1]] * (args.batch_size - len(jobs))  # one batch size, one compilation
        cond = generate.encode([prompt for _, prompt, _ in padded])
        noise = draw_noise(args.seed, [i for _, _, i in padded], settings.steps, shape)
        images = to_uint8(generate(cond, noise, args.guidance_scale, settings))
        for (p, prompt, i), image in zip(jobs, images, strict=False):
            path = args.out / f"{p:04d}_{i:04d}.png"
            write_png(path, image, {"prompt": prompt, "image": i, **words})
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        written = run(args)
    except (LcmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
