"""A run -> a model that diffusers, lcm_jax and others load with no further word.

    python -m lcm_jax.export --workdir=runs/shapes_lcm --out=runs/shapes_lcm/export [--format=pipeline] [--verify]

    of a full run   pipeline      whole folder (default)        unet        the UNet alone, as lcm-sdxl's
    of a LoRA run   lora-kohya    folder with one LoRA file     lora-peft   the same with peft's names
                    merged        whole folder, adapters merged into the base
    of either       single-file   --out=NAME.safetensors, as A1111 and ComfyUI have it, adapters merged

Each has a model card and `lcm_config.json`, what inference must match (a single file and a LoRA in their header). The
student is built from the workdir's config.json, its weights come from one checkpoint, every tensor must find its place.
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
from lcm_jax import files, pretrained
from lcm_jax.diffusion.consistency import SIGMA_DATA
from lcm_jax.distill.student import merged, trainable, with_trainable
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.pretrained import Pipeline, lora_files, save_pipeline, save_single_file, save_unet
from lcm_jax.pretrained import diffusers_folder as saving
from lcm_jax.pretrained.model import PipelineParams, fold_w
from lcm_jax.pretrained.safetensors_io import check_file
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as student_lib
from lcm_jax.run.model_card import model_card
from lcm_jax.runtime import checkpoints as checkpoint
from lcm_jax.runtime import checkpoints as trees
from lcm_jax.runtime.workdir import read_config
from lcm_jax.sampling import flags, verify

WEIGHTS = {"ema": "ema_params", "online": "params"}  # what a user calls them -> in the training state
FOLDERS = ("pipeline", "unet", "merged")  # of whole weights, in diffusers' layout
LORA_FORMATS = {"lora-kohya": "kohya", "lora-peft": "peft"}  # what a user calls them -> in lora_files
FORMATS = (*FOLDERS, "single-file", *LORA_FORMATS)
VERIFIABLE = ("pipeline", "merged")
DTYPES = ("float32", "float16", "bfloat16")
PROMPTS = ("a photo of a cat", "a red car on a street", "a mountain lake in the evening", "a portrait of an old man")


def parser() -> argparse.ArgumentParser:
    p = flags.Parser(prog="python -m lcm_jax.export", description=__doc__.splitlines()[0])
    p.add_argument("--workdir", type=Path, required=True, help="of the run: config.json and checkpoints/")
    p.add_argument("--out", type=Path, required=True, help="folder to write; single-file: NAME.safetensors; new")
    p.add_argument("--step", type=int, help="checkpoint to take; default: the newest")
    p.add_argument("--weights", choices=tuple(WEIGHTS), default="ema", help="EMA target (default) or online student")
    p.add_argument("--format", choices=FORMATS, help="default: pipeline, of a LoRA run lora-kohya")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32, LoRA and single file float16")
    p.add_argument("--guidance_scale", type=float, help="of a single file: scale to fold in, in place of a w embedding")
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
    """What a checkpoint trained, numpy. Raises LcmError unless names, shapes and dtypes are those of `expected`."""
    params = checkpoint.load_subtree(workdir / "checkpoints", step, WEIGHTS[weights])
    different = trees.difference(params, expected)
    if different:
        raise LcmError(
            f"checkpoint {step} of {workdir} is not of the student that its config.json describes ({different}); "
            "has the model's folder changed since?"
        )
    return params


def make_record(config: ConfigDict, student: Pipeline, step: int, weights: str) -> dict[str, Any]:
    """Content of `lcm_config.json`: what inference must match, and where the weights come from."""
    return {
        **student.record,
        "teacher": config.model.teacher,
        "student": config.model.student,
        "step": step,
        "weights": weights,
        "lcm_jax": lcm_jax.__version__,
    }


def choose_format(config: ConfigDict, given: str | None) -> str:
    """`given`, or what is usual for the run. Raises LcmError, which says what to take, where the run has no such."""
    rank = config.lora.rank
    usual = ("lora-kohya", "lora-peft", "merged", "single-file") if rank else ("pipeline", "unet", "single-file")
    if given is None:
        return usual[0]
    if given in usual:
        return given
    if rank:
        raise LcmError(
            f"--format={given}: this is a LoRA run (config.lora.rank = {rank}), which trained adapters alone; use "
            "--format=merged for a whole pipeline with them merged, or lora-kohya, lora-peft, single-file"
        )
    raise LcmError(
        f"--format={given}: this run trained every weight (config.lora.rank = 0), there are no adapters; use "
        f"--format={' or '.join(usual)}"
    )


def card_of(out: Path) -> Path:
    """Where a single file's model card goes."""
    return out.with_suffix(".md")


def check_out(out: Path, form: str, needed: int = 0) -> None:
    """Raises LcmError where `needed` bytes cannot be written to `out`."""
    if form != "single-file":
        saving.check_folder(out, needed)
        return
    check_file(out, needed)
    if card_of(out).exists():
        raise LcmError(f"{card_of(out)}, the model card's place, already exists; choose another name or remove it")


def bytes_needed(student: Pipeline, params: PipelineParams, form: str, dtype: Any) -> int:
    """Bytes of the weights that `form` consists of, in `dtype`."""
    if form in ("pipeline", "merged", "single-file"):
        tree = {part: params[part] for part in student.parts}
    else:
        tree = trainable(student.unet, params["unet"])
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) * jnp.dtype(dtype).itemsize


def check_options(args: argparse.Namespace, config: ConfigDict, form: str) -> None:
    """Raises LcmError where an option cannot be followed in this format."""
    if args.guidance_scale is not None and form != "single-file":
        raise LcmError(
            f"--guidance_scale={args.guidance_scale:g} is folded into a single file only; use --format=single-file, or "
            "leave it out"
        )
    if not args.verify:
        return
    if form not in VERIFIABLE:
        remedy = "merged" if config.lora.rank else "pipeline"
        raise LcmError(f"--verify draws pictures and --format={form} is no pipeline; use --format={remedy}")
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
    form = choose_format(config, args.format)
    dtype = jnp.dtype(args.dtype or ("float32" if form in FOLDERS else "float16"))
    step = choose_step(args.workdir, args.step)
    table = None if args.table is None else flags.read_text("table", args.table)
    check_out(args.out, form)
    check_options(args, config, form)

    student, params = student_lib.load_student(config, *student_lib.load_teacher(config))
    expected = jax.eval_shape(lambda trained: trained, trainable(student.unet, params["unet"]))
    params["unet"] = with_trainable(student.unet, params["unet"], expected)  # frees what training began with
    check_out(args.out, form, bytes_needed(student, params, form, dtype))
    if args.verify:
        check_text_to_image(student)
    trained = read_weights(args.workdir, step, args.weights, expected)
    params["unet"] = with_trainable(student.unet, params["unet"], trained)
    if form in ("merged", "single-file"):
        unet, params["unet"] = merged(student.unet, params["unet"])
        student = dataclasses.replace(student, unet=unet)

    record = make_record(config, student, step, args.weights)
    if args.guidance_scale is not None:
        student, params, record = fold_guidance(student, params, record, args.guidance_scale)
    if record["sigma_data"] != SIGMA_DATA:
        print(
            f"warning: sigma_data is {record['sigma_data']:g}, diffusers' LCMScheduler always takes {SIGMA_DATA:g}; "
            "its pictures will differ slightly from lcm_jax's",
            file=sys.stderr,
        )
    card = model_card(config.to_dict(), record, student, args.out.name, form, table)
    write(args.out, form, dtype, student, params, record, card)
    print(f"step {step}, {args.weights} weights, {form}, {dtype}: {args.out}")
    return report_difference(args.out, record, tuple(config.sample.prompts)) if args.verify else 0


def fold_guidance(
    student: Pipeline, params: PipelineParams, record: Mapping[str, Any], scale: float
) -> tuple[Pipeline, PipelineParams, dict[str, Any]]:
    """The student at one guidance scale, without w embedding, its weights and its record."""
    if not student.has_w_embedding:
        raise LcmError(f"--guidance_scale={scale:g}: this student has no w embedding to fold; leave it out")
    low, high = record["w_min"] + 1.0, record["w_max"] + 1.0
    if not low <= scale <= high:
        raise LcmError(f"--guidance_scale={scale:g} was not trained; choose {low:g} to {high:g}")
    return *fold_w(student, params, scale - 1.0), {**record, "w_embedding_dim": 0, "guidance_scale": scale}


def write(
    out: Path,
    form: str,
    dtype: Any,
    student: Pipeline,
    params: PipelineParams,
    record: Mapping[str, Any],
    card: str,
) -> None:
    """What `form` asks for under `out`, all of it or nothing."""
    text = json.dumps(record, indent=2) + "\n"
    extra = {pretrained.RECORD: text, "README.md": card}
    if form in LORA_FORMATS:
        write_lora(out, LORA_FORMATS[form], dtype, student, params, record, extra)
    elif form == "single-file":
        save_single_file(student, params, out, dtype=dtype, metadata={pretrained.RECORD: text})
        card_of(out).write_text(card, encoding="utf-8")
    elif form == "unet":
        save_unet(student.unet, params["unet"], out, dtype=dtype, extra_files=extra)
    else:
        scheduler = saving.lcm_scheduler_config(
            student.configs["scheduler"],
            original_inference_steps=record["solver_steps"],
            timestep_scaling=record["timestep_scaling"],
        )
        save_pipeline(student, params, out, scheduler_config=scheduler, dtype=dtype, extra_files=extra)


def write_lora(
    out: Path,
    form: str,
    dtype: Any,
    student: Pipeline,
    params: PipelineParams,
    record: Mapping[str, Any],
    extra: Mapping[str, str],
) -> None:
    """A folder of one LoRA file, which carries the record too, and the texts `extra`."""
    with saving.all_or_nothing(out, bytes_needed(student, params, form, dtype)) as folder:
        for name, text in extra.items():
            files.write_text(folder / name, text)
        lora_files.write_lora(
            folder / lora_files.FILE_NAME,
            trainable(student.unet, params["unet"]),
            student.unet.module,
            alpha=record["lora"]["alpha"],
            rank=record["lora"]["rank"],
            format=form,
            dtype=dtype,
            metadata={pretrained.RECORD: extra[pretrained.RECORD]},
        )


def report_difference(folder: Path, record: Mapping[str, Any], given: Sequence[str] = ()) -> int:
    """Prints how far diffusers' pictures are from ours; exit code 1 where they are not the same, else 0."""
    given = tuple(given) or PROMPTS
    prompts = [given[i % len(given)] for i in range(len(PROMPTS))]
    steps = min(verify.STEPS, record["solver_steps"])
    difference = verify.compare(folder, prompts, steps)
    print(
        f"verify: diffusers and lcm_jax, {len(prompts)} images, {steps} steps, guidance scale "
        f"{difference.guidance_scale:g}, float32: largest pixel difference {difference.pixel}/255, largest float "
        f"difference {difference.value:.2e}"
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
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
