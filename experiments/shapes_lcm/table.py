"""The table of the embedded models: caption accuracy, Frechet distance, time and one-step error per sampler and steps.

Every row draws the same held-out captions from the same noise, and compares with the same held-out renders. Baselines
use trailing spacing, so that their first timestep is 999: with leading spacing one or two steps begin at the wrong
noise level and lose by accident. Frechet distances are comparable only among rows of one count.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.diffusion import solvers
from lcm_jax.diffusion.denoiser import guided_output
from lcm_jax.generate import Generator, Settings, draw_noise, to_uint8
from lcm_jax.metrics import frechet, shapes_scorer

BATCH = 64
REFERENCES = 2048  # held-out renders behind every Frechet distance
REFERENCE_START = 100_000  # their first index: apart from the pictures that captions are taken from
SEED = 0
NAMES = {"lcm": "LCM", "ddim": "DDIM", "dpm_solver_pp_2m": "DPM-Solver++(2M)"}


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
        specs = [shapes.spec(i, "heldout") for i in range(count)]
        self.count = count
        self.captions = [shapes.caption(spec) for spec in specs]
        self.labels = shapes.label_arrays(specs)
        self.renders = shapes.render_batch(specs, style)
        references, _ = shapes.examples(REFERENCE_START, REFERENCES, "heldout", style=style)
        self.statistics = frechet.statistics(shapes_scorer.score(references)[1])

    def score(self, images: np.ndarray) -> tuple[float, float]:
        """(caption accuracy, Frechet distance) of uint8 pictures of the captions, in their order."""
        predicted, features = shapes_scorer.score(images)
        accuracy = shapes_scorer.caption_accuracy(predicted, self.labels)
        return accuracy, frechet.frechet_distance(frechet.statistics(features), self.statistics)

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

        reconstruct = jax.jit(reconstruct)
        parts = [reconstruct(generator.params["vae"], part) for part in _batches(self.renders)]
        return to_uint8(np.concatenate(parts)[: self.count])


def _batches(array: np.ndarray) -> list[np.ndarray]:
    """Batches of BATCH; the last is filled up with copies of its last element."""
    pad = -len(array) % BATCH
    return np.split(np.concatenate([array, np.repeat(array[-1:], pad, axis=0)]), (len(array) + pad) // BATCH)


def draw(generator: Generator, judge: Judge, settings: Settings, guidance_scale: float) -> tuple[np.ndarray, float]:
    """Pictures uint8 of the judge's captions, and milliseconds per picture (the first batch, which compiles, apart)."""
    side, channels = generator.pipeline.unet.sample_size, generator.pipeline.unet.in_channels
    images, seconds = [], []
    for numbers in _batches(np.arange(judge.count)):
        cond = generator.encode([judge.captions[i] for i in numbers])
        noise = draw_noise(SEED, numbers, settings.steps, (side, side, channels))
        begun = time.perf_counter()
        images.append(to_uint8(generator(cond, noise, guidance_scale, settings)))
        seconds.append(time.perf_counter() - begun)
    return np.concatenate(images)[: judge.count], 1000.0 * float(np.median(seconds[1:] or seconds)) / BATCH


def sampler_row(
    generator: Generator, judge: Judge, settings: Settings, guidance_scale: float, endpoints: "Endpoints | None" = None
) -> Row:
    """The row of one sampler, number of steps and guidance scale."""
    images, milliseconds = draw(generator, judge, settings, guidance_scale)
    passes = 1 if generator.pipeline.has_w_embedding or guidance_scale == 1.0 else 2
    error = endpoints.error(generator, settings, guidance_scale) if endpoints and settings.steps == 1 else None
    return judge.row(
        NAMES[settings.sampler],
        images,
        steps=settings.steps,
        guidance_scale=guidance_scale,
        evaluations=passes * settings.steps,
        milliseconds=milliseconds,
        endpoint_error=error,
    )


class Endpoints:
    """Where the teacher's guided ODE ends from given noise: DDIM over the whole solver grid, the student's target."""

    def __init__(
        self, teacher: Generator, judge: Judge, scales: Sequence[float], solver_steps: int, count: int = BATCH
    ):
        side, channels = teacher.pipeline.unet.sample_size, teacher.pipeline.unet.in_channels
        self.noise = draw_noise(SEED, range(count), 1, (side, side, channels))
        self.captions = judge.captions[:count]
        unet, schedule = teacher.pipeline.unet, teacher.pipeline.schedule

        @jax.jit
        def solve(params, cond, null, noise, scale):
            def model(x, t):
                return guided_output(unet, params, x, t, cond, null, scale - 1.0)

            return solvers.ode_endpoint(model, noise, schedule, solver_steps)

        cond = teacher.encode(self.captions)
        self.z = {
            scale: np.asarray(solve(teacher.params["unet"], cond, teacher.null, self.noise[0], scale))
            for scale in scales
        }

    def error(self, generator: Generator, settings: Settings, guidance_scale: float) -> float:
        """RMSE of one step of a sampler to the endpoint, in standard deviations of the endpoints."""
        cond = generator.encode(self.captions)
        z = np.asarray(generator.latents(cond, self.noise, guidance_scale, settings))
        end = self.z[guidance_scale]
        return float(np.sqrt(np.mean(np.square(z - end))) / np.std(end))


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
