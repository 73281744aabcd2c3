"""How the experiments measure any model: rows of `lcm_jax.evaluate`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lcm_jax import evaluate
from lcm_jax.errors import LcmError
from lcm_jax.metrics import measures, plot, table
from lcm_jax.run import models as run_models
from lcm_jax.sampling.request import make_request

STEPS = (1, 2, 4, 8)
BATCH = 64
SHAPES = f"--source=shapes --metric=shapes --batch_size={BATCH}"
# The one-step error of every model refers to the same ODE solution, whatever its own solver grid is.
EMBEDDED = f"{SHAPES} --endpoint_steps=100 --count=2048 --images_per_caption=8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of an experiment that trains any config and measures it."""
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_lcm.py"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config; several times")
    parser.add_argument("--workdir", type=Path, help="of the training; default: below runs/, by the config's name")
    parser.add_argument("--count", type=int, help="images per row; default: as lcm_jax.evaluate")
    parser.add_argument("--evaluate", help="options of lcm_jax.evaluate; the embedded models need none")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="needs matplotlib")
    parser.add_argument("--publish", action="store_true", help="copy the results to the experiment's folder")


def is_embedded(config: ConfigDict) -> bool:
    """Whether the teacher is the package's own, whose images have a scorer."""
    return config.model.teacher == "shapes"


def options(args: argparse.Namespace) -> list[str]:
    """The flags of `lcm_jax.evaluate` that do not depend on the model."""
    count = [] if args.count is None else [f"--count={args.count}"]
    return [*shlex.split(EMBEDDED if args.evaluate is None else args.evaluate), *count]


def rows_flag(samplers: str, guidance_scales: Sequence[float]) -> str:
    """The flag for samplers (names with commas) in `STEPS` steps at these scales."""
    return f"--row={samplers}:{','.join(map(str, STEPS))}:{','.join(f'{scale:g}' for scale in guidance_scales)}"


def evaluated(flags: Sequence[str]) -> list[table.Row]:
    """Runs `lcm_jax.evaluate`, which keeps its rows in --out, and returns the rows of the flags, in their order.

    Raises:
      SystemExit: the program failed, and has printed why.
    """
    if code := evaluate.main(flags):
        raise SystemExit(code)
    args = evaluate.parser().parse_args(flags)
    found = {
        (row.sampler, row.steps, row.guidance_scale): row
        for row in table.read(args.out)
        if row.model == args.name and row.settings["sampling"]["spacing"] == args.spacing
    }
    return [found[row.sampler, row.steps, row.guidance_scale] for row in evaluate.parse_rows(args.row)]


def check(config: ConfigDict, args: argparse.Namespace) -> None:
    """Raises LcmError, or ends the program, for what would otherwise fail after the training."""
    if not config.distill.w_embedding_dim:
        raise LcmError(f"--config={args.config} trains a student without w embedding; choose one with w embedding")
    if args.plot:
        plot.check()
    if args.evaluate is None and not is_embedded(config):
        raise LcmError(
            f"--config={args.config} needs --evaluate='--source=... --metric=...': how its models are measured"
        )
    asked = evaluate.parser().parse_args([*options(args), "--model=shapes", "--row=lcm:1", "--out=unused"])
    evaluate.check_flags(asked)
    specs, found = measures.parse(asked.metric), evaluate.read_inputs(asked)
    reference = evaluate.read_reference(asked, found, specs)
    request = make_request(run_models.shapes(config).teacher, height=asked.height, width=asked.width)
    size = request.height, request.width
    measures.check_used(reference, [measures.load(spec, found.captions, size, reference) for spec in specs])
