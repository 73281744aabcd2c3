"""A run -> a model that loads in diffusers, lcm_jax and other programs without further settings.

    python -m lcm_jax.export --workdir=runs/shapes_lcm --out=runs/shapes_lcm/export [--format=pipeline] [--verify]

    of a full run   pipeline      whole folder (default)        unet        the UNet alone, like lcm-sdxl
    of a LoRA run   lora-kohya    folder with one LoRA file     lora-peft   the same with peft's names
                    merged        whole folder, adapters merged into the base
    of either       single-file   --out=NAME.safetensors, for A1111 and ComfyUI, adapters merged

lora-kohya is for every program; lora-peft is for diffusers alone: ComfyUI takes half of its layers without an error.
docs/clients.md has what each program takes, and its settings.

Each has a model card and `lcm_config.json`, what inference must match (single files and LoRAs also have it in their
header). The student is built from the workdir's config.json, its weights come from one checkpoint; all must fit.
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
from lcm_jax import files
from lcm_jax.diffusion.consistency import SIGMA_DATA
from lcm_jax.distill.student import merged, trainable, with_trainable
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import RECORD, Pipeline, lora_files, save_pipeline, save_single_file, save_unet
from lcm_jax.pretrained.model import PipelineParams, fold_w
from lcm_jax.pretrained.safetensors_io import SUFFIX, check_file
from lcm_jax.pretrained.save import all_or_nothing, check_folder, lcm_scheduler_config, lora_header, scheduler_class
from lcm_jax.run.config import from_saved, phases_after, validate
from lcm_jax.run.keys import MODELS_FILE
from lcm_jax.run.model_card import model_card
from lcm_jax.run.models import load
from lcm_jax.runtime.checkpoints import difference, list_steps, load_subtree
from lcm_jax.runtime.workdir import check_same, read_config
from lcm_jax.sampling import flags, verify

WEIGHTS = {"ema": "ema_params", "online": "params"}  # a user's name -> name in the training state
FOLDERS = ("pipeline", "unet", "merged")  # of whole weights, in diffusers' layout
LORA_FORMATS = {"lora-kohya": "kohya", "lora-peft": "peft"}  # a user's name -> name in lora_files
FORMATS = (*FOLDERS, "single-file", *LORA_FORMATS)
VERIFIABLE = ("pipeline", "merged")
DTYPES = ("float32", "float16", "bfloat16")
PROMPTS = ("a photo of a cat", "a red car on a street", "a mountain lake in the evening", "a portrait of an old man")


def parser() -> argparse.ArgumentParser:
    p = flags.Parser(prog="python -m lcm_jax.export", description=__doc__.splitlines()[0])
    p.add_argument("--workdir", type=files.expanded, required=True, help="of the run: config.json and checkpoints/")
    p.add_argument("--out", type=files.expanded, required=True, help="new folder; single-file: NAME.safetensors")
    p.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    p.add_argument("--weights", choices=tuple(WEIGHTS), default="ema", help="EMA target (default) or online student")
    p.add_argument(
        "--format",
        choices=FORMATS,
        help="pipeline (default), unet; of a LoRA run lora-kohya (default, for every program), lora-peft (diffusers; "
        "ComfyUI takes half of it), merged; of either single-file (ComfyUI, A1111 and others; see docs/clients.md)",
    )
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32, LoRA and single file float16")
    p.add_argument("--guidance_scale", type=float, help="to fold into a single file, which then has no w embedding")
    p.add_argument("--table", type=files.expanded, help="Markdown file with measurements, for the model card")
    p.add_argument("--verify", action="store_true", help="compare images with diffusers'; needs lcm_jax[torch]")
    return p


def run(args: argparse.Namespace) -> int:
    """Writes the export; returns the exit code: 1 if `--verify` finds other images, else 0.

    Raises:
      LcmError, OSError: nothing is left under `args.out`.
    """
    # What to export.
    config = from_saved(read_config(args.workdir), args.workdir / "config.json")
    try:
        validate(config, data=False)  # which need not be readable here
    except LcmError as error:
        raise LcmError(f"{args.workdir / 'config.json'} is not a config of this lcm_jax: {error}") from error
    form = choose_format(config, args.format)
    dtype = jnp.dtype(args.dtype or ("float32" if form in FOLDERS else "float16"))
    checkpoints = args.workdir / "checkpoints"
    step = choose_step(checkpoints, args.step)
    table = None if args.table is None else flags.read_text("table", args.table)
    check_out(args.out, form)
    check_options(args, config, form)

    # The student, and the trained weights instead of those that training started from.
    try:
        models = load(config)
    except LcmError as error:
        saved = args.workdir / "config.json"
        raise LcmError(f"{error} ({saved} names it: if it was moved, change that, its digests are compared)") from error
    known = check_same(args.workdir, MODELS_FILE, models.digests)
    student, params = models.student, dict(models.student_params)
    del models
    if phases := phases_after(config, step):  # the run's record has those of its last stage
        student = dataclasses.replace(student, record={**student.record, "phases": phases})
    expected = jax.eval_shape(lambda trained: trained, trainable(student.unet, params["unet"]))
    params["unet"] = with_trainable(student.unet, params["unet"], expected)  # frees the initial weights
    check_out(args.out, form, bytes_needed(student, params, form, dtype))
    if args.verify and (student.text_encoder is None or student.unet.in_channels != student.vae.latent_channels):
        raise LcmError("--verify compares text-to-image models, this is a refiner or inpaints; leave --verify out")
    trained = load_subtree(checkpoints, step, WEIGHTS[args.weights])
    if different := difference(trained, expected):
        raise LcmError(
            f"checkpoint {step} of {args.workdir} is not of the student that its config.json describes ({different}); "
            "has the model's folder changed since?"
        )
    params["unet"] = with_trainable(student.unet, params["unet"], trained)
    if form in ("merged", "single-file"):
        unet, params["unet"] = merged(student.unet, params["unet"])
        student = dataclasses.replace(student, unet=unet)

    # The files.
    record = {**student.record, "teacher": config.model.teacher, "student": config.model.student}
    record |= {"step": step, "weights": args.weights, "lcm_jax": lcm_jax.__version__}
    if (scale := args.guidance_scale) is not None:
        student, params = fold_w(student, params, scale - 1.0)
        record |= {"w_embedding_dim": 0, "guidance_scale": scale}
    model = config.model.teacher or config.model.student
    if not known:
        warn(f"{args.workdir} has no {MODELS_FILE}: nothing shows whether {model} is still what the run began with")
    if args.weights == "ema" and (initial := config.train.ema_decay**step) > 0.5:
        warn(
            f"at step {step} the EMA has {initial:.0%} of the initial weights (train.ema_decay = "
            f"{config.train.ema_decay!r}); --weights=online takes the student itself"
        )
    if record["sigma_data"] != SIGMA_DATA:
        warn(
            f"sigma_data is {record['sigma_data']:g}, diffusers' LCMScheduler always uses {SIGMA_DATA:g}; its images "
            "will differ slightly from lcm_jax's"
        )
    card = model_card(config.to_dict(), record, student, args.out.name, form, table)
    write(args.out, form, dtype, student, params, record, card)
    print(f"step {step}, {args.weights} weights, {form}, {dtype}: {args.out}")
    return report_difference(args.out, record, tuple(config.sample.prompts)) if args.verify else 0


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def choose_format(config: ConfigDict, given: str | None) -> str:
    """`given`, or the run's first. Raises LcmError, which names the possible ones, if the run does not have it."""
    rank = config.lora.rank
    possible = ("lora-kohya", "lora-peft", "merged", "single-file") if rank else ("pipeline", "unet", "single-file")
    if given is None:
        return possible[0]
    if given in possible:
        return given
    if rank:
        raise LcmError(
            f"--format={given}: this is a LoRA run (config.lora.rank = {rank}), which trained adapters alone; use "
            "--format=merged for a whole pipeline with them merged, or lora-kohya, lora-peft, single-file"
        )
    raise LcmError(
        f"--format={given}: this run trained every weight (config.lora.rank = 0), there are no adapters; use "
        f"--format={' or '.join(possible)}"
    )


def choose_step(checkpoints: Path, step: int | None) -> int:
    """`step`, or the newest. Raises LcmError, which lists the steps, if it has no checkpoint."""
    steps = list_steps(checkpoints)
    if not steps:
        raise LcmError(f"no checkpoint in {checkpoints}; train until the first is saved (config.checkpoint.every)")
    if step is not None and step not in steps:
        raise LcmError(f"--step={step}: no such checkpoint in {checkpoints}; present: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def card_of(out: Path) -> Path:
    """The file of a single file's model card."""
    return out.with_suffix(".md")


def check_out(out: Path, form: str, needed: int = 0) -> None:
    """Raises LcmError if `needed` bytes cannot be written to `out`, or it has the name of another format's."""
    if form != "single-file" and out.suffix == SUFFIX:
        instead = f"a name without {SUFFIX}, or --format=single-file for a whole model in one file"
        raise LcmError(f"--out={out}: --format={form} writes a folder; choose {instead}")
    if form != "single-file":
        check_folder(out, needed)
        return
    check_file(out, needed)
    if card_of(out).exists():
        raise LcmError(f"{card_of(out)}, the file of the model card, already exists; choose another name or remove it")


def check_options(args: argparse.Namespace, config: ConfigDict, form: str) -> None:
    """Raises LcmError for an option that this format does not have."""
    if args.guidance_scale is not None:
        given, distill = f"--guidance_scale={args.guidance_scale:g}", config.distill
        if form != "single-file":
            raise LcmError(f"{given} is folded into a single file only; use --format=single-file, or leave it out")
        if not distill.w_embedding_dim:
            raise LcmError(f"{given}: this student has no w embedding to fold; leave it out")
        low, high = (round(w + 1.0, 9) for w in (distill.w_min, distill.w_max))  # 0.57 + 1.0 is less than 1.57
        if not low <= args.guidance_scale <= high:
            raise LcmError(f"{given} was not trained; choose {low:g} to {high:g}")
    if args.verify and form not in VERIFIABLE:
        remedy = "merged" if config.lora.rank else "pipeline"
        raise LcmError(f"--verify generates images and --format={form} is not a pipeline; use --format={remedy}")
    if args.verify:
        verify.check_installed()


def bytes_needed(student: Pipeline, params: PipelineParams, form: str, dtype: Any) -> int:
    """Bytes of the weights of an export in `dtype`."""
    tree = trainable(student.unet, params["unet"])
    if form in ("pipeline", "merged", "single-file"):
        tree = {part: params[part] for part in student.parts}
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) * jnp.dtype(dtype).itemsize


def write(
    out: Path,
    form: str,
    dtype: Any,
    student: Pipeline,
    params: PipelineParams,
    record: Mapping[str, Any],
    card: str,
) -> None:
    """Writes the files of a format, all of them or none."""
    text = json.dumps(record, indent=2) + "\n"
    extra = {RECORD: text, "README.md": card}
    if form in LORA_FORMATS:
        with all_or_nothing(out, bytes_needed(student, params, form, dtype)) as folder:
            for name, content in extra.items():
                files.write_text(folder / name, content)
            lora_files.write_lora(
                folder / lora_files.FILE_NAME,
                trainable(student.unet, params["unet"]),
                student.unet.module,
                alpha=record["lora"]["alpha"],
                rank=record["lora"]["rank"],
                format=LORA_FORMATS[form],
                dtype=dtype,
                metadata={**lora_header(student), RECORD: text},
            )
    elif form == "single-file":
        with files.new_file(card_of(out)) as partial:  # it gets its name right after the weights got theirs
            files.write_text(partial, card)
            save_single_file(student, params, out, dtype=dtype, metadata={RECORD: text})
    elif form == "unet":
        save_unet(student.unet, params["unet"], out, dtype=dtype, extra_files=extra)
    else:
        scheduler = lcm_scheduler_config(
            student.configs["scheduler"],
            _class_name=scheduler_class(student),
            original_inference_steps=record["solver_steps"],
            timestep_scaling=record["timestep_scaling"],
        )
        save_pipeline(student, params, out, scheduler_config=scheduler, dtype=dtype, extra_files=extra)


def report_difference(folder: Path, record: Mapping[str, Any], given: Sequence[str] = ()) -> int:
    """Prints how far diffusers' images are from ours; exit code 1 if they are not the same, else 0."""
    given = tuple(given) or PROMPTS
    prompts = [given[i % len(given)] for i in range(len(PROMPTS))]
    steps = record.get("phases", min(verify.STEPS, record["solver_steps"]))
    found = verify.compare(folder, prompts, steps)
    print(
        f"verify: diffusers and lcm_jax, {len(prompts)} images, {steps} steps, guidance scale "
        f"{found.guidance_scale:g}, float32: largest pixel difference {found.pixel}/255, largest float difference "
        f"{found.value:.2e}"
    )
    if found.is_small:
        return 0
    print(
        f"error: the images differ by {found.pixel}/255, more than {verify.LARGEST_PIXEL}/255; do not use {folder} "
        "with diffusers, and report it with the workdir's config.json",
        file=sys.stderr,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def left() -> str:
        done = args.out.is_file() or (args.out / RECORD).is_file()
        return f"{args.out} is complete" if done else "nothing was written"

    return exit_code(lambda: run(args), left, "use a machine with more memory")


if __name__ == "__main__":
    sys.exit(main())
