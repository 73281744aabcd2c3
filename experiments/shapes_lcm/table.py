"""The table of the embedded models: caption accuracy, Frechet distance, time and one-step error per sampler and steps.

Every row draws the same held-out captions from the same noise, and compares with the same held-out renders. Baselines
use trailing spacing, so that their first timestep is 999: with leading spacing one or two steps begin at the wrong
noise level and lose by accident. Frechet distances are comparable only among rows of one count.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import rows as drawing
from lcm_jax.metrics import shapes as captions
from lcm_jax.metrics import shapes as endpoints_lib
from lcm_jax.metrics.networks import shapes as shapes_scorer
from lcm_jax.runtime import kernels as compiler
from lcm_jax.sampling.generator import Generator, Settings, to_uint8

BATCH = 64
REFERENCES = captions.REFERENCES
SEED = 0
NAMES = {"lcm": "LCM", "ddim": "DDIM", "dpm_solver_2m": "DPM-Solver(2M)", "dpm_solver_pp_2m": "DPM-Solver++(2M)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    accuracy in 0..1; frechet over `count` pictures; milliseconds per picture, decoding included and compiling not;
    endpoint_error in standard deviations of the latents, only for one step.
    """

    method: str
    steps: int | None
    guidance_scale: float | None
    evaluations: int | None
    accuracy: float
    frechet: float
    count: int
    milliseconds: float | None = None
    endpoint_error: float | None = None
    recorded: bool = False


class Judge:
    """Held-out captions, their labels, and the features of renders, in one style, that samples are compared with."""

    def __init__(self, count: int, style: str = "plain"):
        specs = captions.heldout(count)
        self.count = count
        self.captions = [shapes.caption(spec) for spec in specs]
        self.labels = shapes.label_arrays(specs)
        self.renders = shapes.render_batch(specs, style)
        self.statistics = captions.reference(style)

    def score(self, images: np.ndarray) -> tuple[float, float]:
        """(caption accuracy, Frechet distance) of uint8 pictures of the captions, in their order."""
        return captions.judge(*shapes_scorer.score(images), self.labels, self.statistics)

    def row(self, method: str, images: np.ndarray, **fields) -> Row:
        accuracy, distance = self.score(images)
        fields = {"steps": None, "guidance_scale": None, "evaluations": None, **fields}
        return Row(method, accuracy=accuracy, frechet=distance, count=self.count, **fields)

    def real_rows(self, generator: Generator) -> list[Row]:
        """What the scorer says of the renders themselves and of their reconstructions by the VAE."""
        again = self.reconstructions(generator)
        return [self.row("renders", self.renders), self.row("VAE reconstructions", again)]

    def reconstructions(self, generator: Generator) -> np.ndarray:
        """The renders through the generator's VAE and back, uint8."""
        vae = generator.pipeline.vae

        def reconstruct(params, images):
            x = images.astype(jnp.float32) / 127.5 - 1.0
            y = vae.apply({"params": params}, vae.apply({"params": params}, x, method="encode")[0], method="decode")
            return jnp.clip(y / 2.0 + 0.5, 0.0, 1.0)

        reconstruct = jax.jit(reconstruct, compiler_options=compiler.inference())
        numbers = drawing.batches(self.count, BATCH)
        parts = [reconstruct(generator.params["vae"], self.renders[part]) for part in numbers]
        return to_uint8(np.concatenate(parts)[: self.count])


def check_count(count: int) -> None:
    """Raises LcmError where so few pictures have no Frechet distance."""
    least = shapes_scorer.ShapesScorer.feature_dim + 1
    if count < least:
        raise LcmError(f"--count={count}: a Frechet distance needs more pictures; give at least {least}")


def latent_shape(generator: Generator) -> tuple[int, int, int]:
    side = generator.pipeline.unet.sample_size
    return side, side, generator.pipeline.unet.in_channels


def draw(generator: Generator, judge: Judge, settings: Settings, guidance_scale: float) -> tuple[np.ndarray, float]:
    """Pictures uint8 of the judge's captions, and milliseconds per picture (the first batch, which compiles, apart)."""
    images, seconds = [], []
    given = {"seed": SEED, "shape": latent_shape(generator), "batch_size": BATCH}
    for _, part, took in drawing.draw(generator, judge.captions, settings, guidance_scale, **given):
        images.append(part)
        seconds.append(took)
    return np.concatenate(images), 1000.0 * float(np.median(seconds[1:] or seconds)) / BATCH


def endpoints(teacher: Generator, judge: Judge, scales: Sequence[float], solver_steps: int) -> endpoints_lib.Endpoints:
    """Where the teacher's guided ODE ends from the first captions' noise, solved at these scales."""
    ends = endpoints_lib.Endpoints(teacher, judge.captions, solver_steps, SEED, latent_shape(teacher))
    for scale in scales:
        ends.at(scale)
    return ends


def sampler_row(
    generator: Generator,
    judge: Judge,
    settings: Settings,
    guidance_scale: float,
    ends: endpoints_lib.Endpoints | None = None,
) -> Row:
    """The row of one sampler, number of steps and guidance scale."""
    images, milliseconds = draw(generator, judge, settings, guidance_scale)
    error = ends.error(generator, settings, guidance_scale) if ends and settings.steps == 1 else None
    return judge.row(
        NAMES[settings.sampler],
        images,
        steps=settings.steps,
        guidance_scale=guidance_scale,
        evaluations=drawing.evaluations(generator, settings, guidance_scale),
        milliseconds=milliseconds,
        endpoint_error=error,
    )


def asset_hash(folder: str | Path) -> str:
    """sha256 over the weight files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def markdown(rows: Sequence[Row], note: str) -> str:
    """The table as Markdown."""

    def cell(value, form):
        return "" if value is None else format(value, form)

    lines = [
        "| sampler | steps | guidance scale | network evaluations | caption accuracy | Frechet distance "
        "| ms per image | one-step error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = r.method + (" (recorded)" if r.recorded else "")
        lines.append(
            f"| {name} | {cell(r.steps, 'd')} | {cell(r.guidance_scale, 'g')} | {cell(r.evaluations, 'd')} "
            f"| {100 * r.accuracy:.1f} % | {r.frechet:.2f} | {cell(r.milliseconds, '.1f')} "
            f"| {cell(r.endpoint_error, '.3f')} |"
        )
    return "\n".join(lines) + f"\n\n{note}\n"


def to_json(rows: Sequence[Row], **about) -> str:
    return json.dumps({**about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
