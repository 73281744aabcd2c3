"""The ablations of the LCM paper: what each varies, at which guidance scales it is sampled, and the paper's finding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

TRAIN_TIMESTEPS = 1000
SKIPS = (1, 5, 10, 20, 50)
SOLVERS = {"ddim": "DDIM", "dpm_solver": "DPM-Solver", "dpm_solver_pp": "DPM-Solver++"}
GUIDANCE_WEIGHTS = (2, 4, 6, 8, 10, 12, 14)
EMA_DECAYS = (0.0, 0.9, 0.95, 0.99)
LOSSES = {"huber": "pseudo-Huber", "l2": "l2"}

# Name in the table -> config keys and their values; a function makes the value from the config's own.
Variants = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """One ablation.

    Attributes:
      title: of its table.
      variants: models to train.
      scales: guidance scales, w + 1, at which they are sampled; None: the one that fits the model.
      paper: what the paper reports about it.
    """

    title: str
    variants: Variants
    paper: str
    scales: tuple[float, ...] | None = None


def _solvers_and_skips(solvers: Sequence[str]) -> Variants:
    return {
        f"{SOLVERS[solver]}, k = {k}": {"distill.solver": solver, "distill.solver_steps": TRAIN_TIMESTEPS // k}
        for solver in solvers
        for k in SKIPS
    }


_SKIPS_OF_THE_PAPER = (
    "Paper (figure, according to secondary sources): k = 5, 10 and 20 converge far faster than k = 1 within about "
    "2,000 iterations; at k = 50 DDIM degrades, its solver error is large, while DPM-Solver and DPM-Solver++ stay "
    "usable; k = 20 is the paper's choice."
)
_SLOWLY = {"train.ema_decay": 0.0, "train.learning_rate": lambda rate: rate / 10}
_WEIGHTS = {"distill.w_min": float(GUIDANCE_WEIGHTS[0]), "distill.w_max": float(GUIDANCE_WEIGHTS[-1])}

STUDIES = {
    "solver": Study("Solver of the teacher's jump, and skip", _solvers_and_skips(tuple(SOLVERS)), _SKIPS_OF_THE_PAPER),
    "skip": Study("Skip of the teacher's jump", _solvers_and_skips(("ddim",)), _SKIPS_OF_THE_PAPER),
    "guidance": Study(
        "Guidance weight, varied on one model",
        {f"w in [{GUIDANCE_WEIGHTS[0]}, {GUIDANCE_WEIGHTS[-1]}]": _WEIGHTS},
        "Paper (figure, according to secondary sources): a larger w raises the CLIP score and hurts FID, clearly "
        "beyond w = 12; the curves of 2, 4 and 8 steps nearly coincide, that of 1 step lags behind.",
        tuple(w + 1.0 for w in GUIDANCE_WEIGHTS),
    ),
    "ema": Study(
        "EMA rate of the target",
        {"EMA 0, lr / 10": _SLOWLY} | {f"EMA {decay:g}": {"train.ema_decay": decay} for decay in EMA_DECAYS},
        "The paper trains with 0.999943, diffusers' scripts with 0.95, those of LCM-LoRA without EMA at lr 1e-4; we "
        "know of no table that compares rates.",
    ),
    "loss": Study(
        "Distance",
        {name: {"distill.loss": loss} for loss, name in LOSSES.items()},
        "The paper trains with the squared l2 distance, diffusers' recipes with pseudo-Huber; we know of no table that "
        "compares them.",
    ),
}


def changes(config: ConfigDict, variant: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a variant of `config`."""
    found = {}
    for key, value in variant.items():
        section, _, name = key.partition(".")
        found[key] = value(config[section][name]) if callable(value) else value
    return found


def folder(config: ConfigDict, changes: Mapping[str, Any]) -> str:
    """A name for `config` with `changes`; "base" if they change nothing, so that studies share that model."""
    different = []
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if value != config[section][name]:
            different.append(f"{name}={value}")
    return ",".join(different) or "base"
