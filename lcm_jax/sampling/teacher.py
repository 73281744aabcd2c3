"""Training data from prompts alone: images that the teacher makes of them, as rows of a latent cache.

    row i of the cache = latent of prompt i // variants, from the noise of (seed, i), by a guided solver of the teacher

The teacher's solver runs along the paths that a student learns to shortcut, so by default its guidance scale is that of
the distillation, and the images are where those paths end. They stay latents: nothing is decoded or encoded again. A
latent is stored as a posterior (mean, logvar) of next to no width, so that training treats it as any other row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lcm_jax import assets
from lcm_jax.data.encoding import Rows
from lcm_jax.diffusion import schedule
from lcm_jax.errors import BadArgument
from lcm_jax.pretrained import load_pipeline, text
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline, weights_hash
from lcm_jax.pretrained.names import Params, PutFn
from lcm_jax.sampling import flags
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.plan import noise_entries
from lcm_jax.sampling.request import Request, is_guided, make_request

SAMPLERS = ("dpm_solver_pp_2m", "ddim", "euler")  # deterministic, and right for zero terminal SNR
NUMBER = "number"  # of a row: which noise its image is made from
LOGVAR = -30.0  # the least that a VAE gives; a standard deviation of 3e-7


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the teacher makes, and how; flags of `lcm_jax.precompute --what=teacher`.

    Attributes:
      prompts: text file, one prompt per line.
      sampler: one of `SAMPLERS`.
      steps: of the sampler.
      guidance_scale: w + 1; None: the middle of the range of the distillation.
      negative_prompt: text that guidance moves away from; None: the model's null text.
      batch_size: images at once; None: as many as `encoding.batch_size` says.
    """

    prompts: Path
    sampler: str = SAMPLERS[0]
    steps: int = 25
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise BadArgument("sampler", self.sampler, f"choose one of {', '.join(SAMPLERS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise BadArgument("batch_size", self.batch_size, "must be at least 1")

    def request(self, pipeline: Pipeline, side: int, w: tuple[float, float]) -> Request:
        """The request for images of side x side pixels.

        w: the range of the distillation.

        Raises:
          BadArgument: a value is wrong, or has no effect.
        """
        scale = 1.0 + sum(w) / 2 if self.guidance_scale is None else self.guidance_scale
        request = make_request(
            pipeline,
            sampler=self.sampler,
            steps=self.steps,
            guidance_scale=scale,
            height=side,
            width=side,
            negative_prompt=self.negative_prompt,
        )
        if self.negative_prompt is not None and not is_guided(pipeline, scale):
            problem = "has no effect at guidance scale 1, which is one pass; leave it out, or raise --guidance_scale"
            raise BadArgument("negative_prompt", self.negative_prompt, problem)
        return request


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Rows {token ids int32 [l] by text encoder, what else `tokenize` gives, NUMBER} of prompts, as `rows.Examples`.

    Attributes:
      file: the name of their file.
      prompts: one or more.
      variants: rows of each prompt, one after another.
      tokenize: captions -> arrays [b ...] by name.
    """

    file: str
    prompts: tuple[str, ...]
    variants: int
    tokenize: Callable[[Sequence[str]], Mapping[str, np.ndarray]]

    @property
    def groups(self) -> tuple[int, ...]:
        return (len(self.prompts) * self.variants,)

    def row(self, group: int, rank: int, draws: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        del group, draws
        arrays = self.tokenize([self.prompts[rank // self.variants]])
        return {name: value[0] for name, value in arrays.items()} | {NUMBER: np.int64(rank)}

    def where(self, group: int, rank: int) -> tuple[str, str]:
        """(file, number of the row)."""
        del group
        return self.file, str(rank)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file. Raises BadArgument: it cannot be read, or holds none."""
    prompts = flags.read_lines("prompts", path)
    if not prompts:
        raise BadArgument("prompts", path, "holds no prompt; write one per line")
    return tuple(prompts)


def load_unet(config: ConfigDict, teacher: Pipeline, put: PutFn) -> Params:
    """The weights of a resolved config's teacher as sampling holds them: in 16 bits half the memory, the same numbers.

    teacher: its pipeline; put: see `load_pipeline`.
    """
    source, vae, configs = (
        name and assets.resolve(name) for name in (config.model.teacher, config.model.vae, config.model.config)
    )
    options = {"vae": vae, "config": configs, "put": put, "weights": ["unet"]}
    return load_pipeline(source, config.model.variant, teacher.unet.dtype, None, **options)[1]["unet"]


def record(request: Request, teacher: Pipeline, unet: Params) -> dict[str, Any]:
    """What the images depend on besides prompts, seed and encoders, as JSON."""
    return {
        "sampler": request.settings.sampler,
        "steps": request.settings.steps,
        "guidance_scale": request.guidance_scale,
        "negative_prompt": request.negative_prompt,
        "unet": weights_hash(unet),
        "noise": schedule.noise_fields(teacher.configs["scheduler"]),
    }


def maker(
    generator: Generator, encode: Callable[[Rows], Mapping[str, Any]], request: Request, seed: int, ids: bool
) -> Callable[[Rows], Rows]:
    """A function: rows of `Prompts`, stacked -> rows of a latent cache, float32.

    Args:
      encode: `encoding.make_encode` of the model.
      ids: whether token ids stay what they are, or become the outputs of the text encoders.
    """
    size, entries = (request.height, request.width), noise_entries(request.settings)

    def make(rows: Rows) -> Rows:
        tokens = {name: value for name, value in rows.items() if name in TEXT_ENCODERS}
        cond = encode(tokens)
        noise = generator.noise(seed, rows[NUMBER].tolist(), entries, *size)
        z = generator.latents(cond, noise, request.guidance_scale, request.settings, request.negative_prompt)
        mean = np.asarray(z, np.float32) / np.float32(generator.pipeline.vae.scaling_factor)
        found = {"mean": mean, "logvar": np.full_like(mean, LOGVAR), **(tokens if ids else cond)}
        return found | ({"time_ids": text.time_ids(*size, len(mean))} if generator.pipeline.is_xl else {})

    return make
