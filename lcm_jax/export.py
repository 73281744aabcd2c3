"""A run -> a model folder that diffusers and lcm_jax load with no further word.

    python -m lcm_jax.export --workdir=runs/shapes_lcm --out=runs/shapes_lcm/export [--verify]

`--format=pipeline` is a whole pipeline (SD: LatentConsistencyModelPipeline), `--format=unet` the UNet alone, as
lcm-sdxl's. Either has a model card and `lcm_config.json`, what inference must match. The student is built from the
workdir's config.json, its weights come from one checkpoint, and every tensor must find its place.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lcm_jax
from lcm_jax import assets, pretrained, sample, verify
from lcm_jax import config as config_lib
from lcm_jax.diffusion.consistency import SIGMA_DATA
from lcm_jax.errors import LcmError
from lcm_jax.model_card import model_card
from lcm_jax.pretrained import Pipeline, load_pipeline, save_pipeline, save_unet, saving
from lcm_jax.runtime import checkpoint
from lcm_jax.runtime.workdir import read_config
from lcm_jax.student import load_student

WEIGHTS = {"ema": "ema_params", "online": "params"}  # what a user calls them -> in the training state
FORMATS = ("pipeline", "unet")
DTYPES = ("float32", "float16", "bfloat16")
PROMPTS = ("a photo of a cat", "a red car on a street", "a mountain lake in the evening", "a portrait of an old man")


def parser() -> argparse.ArgumentParser:
    p = sample.Parser(prog="python -m lcm_jax.export", description=__doc__.splitlines()[0])
    p.add_argument("--workdir", type=Path, required=True, help="of the run: config.json and checkpoints/")
    p.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    p.add_argument("--step", type=int, help="checkpoint to take; default: the newest")
    p.add_argument("--weights", choices=tuple(WEIGHTS), default="ema", help="EMA target (default) or online student")
    p.add_argument("--format", choices=FORMATS, default="pipeline")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights in the files")
    p.add_argument("--table", type=Path, help="Markdown file with measurements, for the model card")
    p.add_argument("--verify", action="store_true", help="draw with diffusers, too, and compare; needs lcm_jax[torch]")
    return p


def run_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`, checked. Raises LcmError if there is none or it is not valid."""
    config = ConfigDict(read_config(workdir))
    try:
        config_lib.validate(config)
    except LcmError as error:
        raise LcmError(f"{workdir / 'config.json'} is not a config of this lcm_jax: {error}") from error
    return config


def choose_step(workdir: Path, step: int | None) -> int:
    """`step`, or the newest. Raises LcmError, which lists the steps there are, where it has no checkpoint."""
    folder = workdir / "checkpoints"
    steps = checkpoint.list_steps(folder)
    if not steps:
        raise LcmError(f"no checkpoint in {folder}; train until the first is saved (config.checkpoint.every)")
    if step is not None and step not in steps:
        raise LcmError(f"--step={step}: no such checkpoint in {folder}; present: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def read_weights(workdir: Path, step: int, weights: str, expected: Any) -> dict[str, Any]:
    """UNet weights of a checkpoint, numpy. Raises LcmError unless names, shapes and dtypes are those of `expected`."""
    params = checkpoint.load_subtree(workdir / "checkpoints", step, WEIGHTS[weights])
    diff = checkpoint.tree_diff(params, expected)
    if diff:
        more = f"; and {len(diff) - checkpoint.MAX_DIFF} more" if len(diff) > checkpoint.MAX_DIFF else ""
        raise LcmError(
            f"checkpoint {step} of {workdir} is not of the student that its config.json describes "
            f"({'; '.join(diff[: checkpoint.MAX_DIFF])}{more}); has the teacher's folder changed since?"
        )
    return params


def make_record(config: ConfigDict, pipeline: Pipeline, step: int, weights: str) -> dict[str, Any]:
    """What `lcm_config.json` says: the constants that inference must match, and where the weights come from."""
    distill = config.distill
    return {
        "w_min": distill.w_min,
        "w_max": distill.w_max,
        "solver_steps": distill.solver_steps,
        "timestep_scaling": distill.timestep_scaling,
        "sigma_data": distill.sigma_data,
        "prediction_type": pipeline.schedule.prediction_type,
        "teacher": config.model.teacher,
        "step": step,
        "weights": weights,
        "lcm_jax": lcm_jax.__version__,
    }


def bytes_needed(params: Mapping[str, Any], parts: Sequence[str], dtype: str) -> int:
    """Bytes of these parts' weights in `dtype`."""
    leaves = jax.tree.leaves({part: params[part] for part in parts})
    return sum(leaf.size for leaf in leaves) * jnp.dtype(dtype).itemsize


def check_verifiable(args: argparse.Namespace) -> None:
    """Raises LcmError where `--verify` could not be done."""
    if args.format != "pipeline":
        raise LcmError(f"--verify draws pictures and --format={args.format} is no pipeline; use --format=pipeline")
    verify.check_installed()


def check_text_to_image(pipeline: Pipeline) -> None:
    if pipeline.text_encoder is None or pipeline.unet.in_channels != pipeline.vae.latent_channels:
        raise LcmError("--verify compares text-to-image models, this is a refiner or inpaints; leave --verify out")


def run(args: argparse.Namespace) -> int:
    """Writes what the command line asks for; returns the exit code: 1 if `--verify` finds other pictures, else 0.

    Raises:
      LcmError, OSError: nothing is left under `args.out`.
    """
    config = run_config(args.workdir)
    step = choose_step(args.workdir, args.step)
    table = None if args.table is None else sample.read_text("table", args.table)
    saving.check_target(args.out)
    if args.verify:
        check_verifiable(args)

    student = load_student(config, load_pipeline(assets.resolve(config.model.teacher)))
    student = with_unet(student, jax.eval_shape(lambda params: params, student.params["unet"]))  # frees the weights
    parts = saving.names_of_parts(student) if args.format == "pipeline" else ("unet",)
    saving.check_target(args.out, bytes_needed(student.params, parts, args.dtype))
    if args.verify:
        check_text_to_image(student)
    student = with_unet(student, read_weights(args.workdir, step, args.weights, student.params["unet"]))

    record = make_record(config, student, step, args.weights)
    if record["sigma_data"] != SIGMA_DATA:
        print(
            f"warning: sigma_data is {record['sigma_data']:g}, diffusers' LCMScheduler always takes {SIGMA_DATA:g}; "
            "its pictures will differ slightly from lcm_jax's",
            file=sys.stderr,
        )
    write(args, student, record, model_card(config.to_dict(), record, student, args.out.name, args.format, table))
    print(f"step {step}, {args.weights} weights, {args.dtype}: {args.out}")
    return report_difference(args.out, config) if args.verify else 0


def with_unet(pipeline: Pipeline, params: Any) -> Pipeline:
    """The pipeline with other weights of its UNet."""
    return dataclasses.replace(pipeline, params={**pipeline.params, "unet": params})


def write(args: argparse.Namespace, student: Pipeline, record: Mapping[str, Any], card: str) -> None:
    """The folder `args.out`, all of it or nothing."""
    extra = {pretrained.RECORD: json.dumps(record, indent=2) + "\n", "README.md": card}
    dtype = jnp.dtype(args.dtype)
    if args.format == "unet":
        save_unet(student.unet, student.params["unet"], args.out, dtype=dtype, extra_files=extra)
        return
    scheduler = saving.lcm_scheduler_config(
        student.configs["scheduler"],
        original_inference_steps=record["solver_steps"],
        timestep_scaling=record["timestep_scaling"],
    )
    save_pipeline(student, args.out, scheduler_config=scheduler, dtype=dtype, extra_files=extra)


def report_difference(folder: Path, config: ConfigDict) -> int:
    """Prints how far diffusers' pictures are from ours; exit code 1 where they are not the same, else 0."""
    scale = verify.guidance_scale(config.distill.w_min, config.distill.w_max)
    given = tuple(config.sample.prompts) or PROMPTS
    prompts = [given[i % len(given)] for i in range(len(PROMPTS))]
    steps = min(verify.STEPS, config.distill.solver_steps)
    difference = verify.compare(folder, prompts, scale, steps)
    print(
        f"verify: diffusers and lcm_jax, {len(prompts)} pictures, {steps} steps, guidance scale {scale:g}, float32: "
        f"largest pixel difference {difference.pixel}/255, largest float difference {difference.value:.2e}"
    )
    if difference.is_small:
        return 0
    print(
        f"error: the pictures differ by {difference.pixel}/255, more than {verify.LARGEST_PIXEL}/255; do not use "
        f"{folder} with diffusers, and report it with the workdir's config.json",
        file=sys.stderr,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (LcmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
