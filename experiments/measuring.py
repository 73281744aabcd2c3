"""How experiments measure with `lcm_jax.evaluate`: its options for the embedded models; others must be told theirs."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments.shapes_teacher import teacher_rows
from lcm_jax import evaluate, sample
from lcm_jax.errors import LcmError
from lcm_jax.metrics import measures, plot, table
from lcm_jax.run import models as student

STEPS = (1, 2, 4, 8)
PAPER_SCALE = 9.0  # w = 8, of the paper's tables
# The ODE that one step is compared with is the same for every model, whatever its own solver grid is.
EMBEDDED = "--source=shapes --metric=shapes --endpoint_steps=100 --batch_size=64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of an experiment that trains a config and measures it: which, how, and what becomes of the results."""
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config; several times")
    parser.add_argument("--workdir", type=Path, help="of the training; default: below runs/, by the config's name")
    parser.add_argument("--count", type=int, help="pictures per row; default: as lcm_jax.evaluate")
    parser.add_argument("--evaluate", help="options of lcm_jax.evaluate; the embedded models need none")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="needs matplotlib")
    parser.add_argument("--publish", action="store_true", help="copy the results to the experiment's folder")


def embedded(config: ConfigDict) -> bool:
    """The teacher is the package's own, whose pictures have a scorer."""
    return config.model.teacher == "shapes"


def scales(config: ConfigDict) -> tuple[float, ...]:
    """Guidance scales of a table: the paper's, or where the embedded teacher is best."""
    return (teacher_rows.best_guidance_scale(),) if embedded(config) else (PAPER_SCALE,)


def options(args: argparse.Namespace) -> list[str]:
    """The command line of `lcm_jax.evaluate`, but for model, rows and folder."""
    count = [] if args.count is None else [f"--count={args.count}"]
    return [*shlex.split(EMBEDDED if args.evaluate is None else args.evaluate), *count]


def row(samplers: str, guidance_scales: Sequence[float]) -> str:
    """The flag that asks for samplers (names with commas) in `STEPS` at these scales."""
    return f"--row={samplers}:{','.join(map(str, STEPS))}:{','.join(f'{scale:g}' for scale in guidance_scales)}"


def asked_for(out: Path, args: argparse.Namespace, guidance_scales: Sequence[float]) -> list[table.Row]:
    """The rows of the table in OUT that this command asks for; the folder may hold others, of commands before."""
    spacing = _parsed(args).spacing
    return [
        row
        for row in table.read(out)
        if row.steps in STEPS
        and row.guidance_scale in guidance_scales
        and row.settings["sampling"]["spacing"] == spacing
    ]


def _parsed(args: argparse.Namespace) -> argparse.Namespace:
    return evaluate.parser().parse_args([*options(args), "--model=shapes", "--row=lcm:1", "--out=unused"])


def check(config: ConfigDict, args: argparse.Namespace) -> None:
    """Raises LcmError, or ends the program, for what would fail after long work."""
    if not config.distill.w_embedding_dim:
        raise LcmError(f"--config={args.config} trains a student that is not told w; take one with a w embedding")
    if args.plot:
        plot.check()
    if args.evaluate is None and not embedded(config):
        raise LcmError(
            f"--config={args.config} needs --evaluate='--source=... --metric=...': how its models are measured"
        )
    asked = _parsed(args)
    evaluate.check_flags(asked)
    specs, found = measures.parse(asked.metric), evaluate.read_inputs(asked)
    reference = evaluate.read_reference(asked, found, specs)
    teacher, _ = student.shapes(config)
    size = sample.size_of(asked, teacher)
    measures.check_used(reference, [measures.load(spec, found.captions, size, reference) for spec in specs])
