"""Settings for the published few-step LoRAs and UNets, as their makers have them, as flags of `lcm_jax.sample`.

    python -m lcm_jax.sample --preset=dmd2 --model=SDXL --lora=dmd2_sdxl_4step_lora_fp16.safetensors --prompt="..."

Files of lcm_jax need none: their record names the sampler and its steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from lcm_jax.diffusion import timesteps
from lcm_jax.errors import BadArgument


@dataclasses.dataclass(frozen=True)
class Preset:
    """How a family of files is sampled.

    Attributes:
      about: the files.
      sampler: one of `samplers.SAMPLERS`.
      steps: that they are made for, the first is the default; (): any.
      guidance_scale: the user's; 1 is one pass.
      gamma: of tcd.
      by_hand: number of steps -> timesteps, where they are not the sampler's own.
      grid: solver steps of the maker's timesteps, where they are not 50.
      lora_weight: of the first --lora without a weight; not 1 for files that leave out their alpha.
    """

    about: str
    sampler: str
    steps: tuple[int, ...] = ()
    guidance_scale: float = 1.0
    gamma: float | None = None
    by_hand: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    grid: int = 50
    lora_weight: float = 1.0


PRESETS = {
    "lcm-lora": Preset("LCM-LoRAs for SD 1.5, SDXL, SSD-1B, Vega (latent-consistency, segmind)", "lcm"),
    "tcd": Preset("TCD LoRAs (h1t)", "tcd", gamma=0.3),
    "pcm": Preset("deterministic PCM LoRAs, those named by their steps (wangfuyun)", "tcd", gamma=0.0),
    "tdd": Preset("TDD LoRAs (RedAIGC)", "tcd", guidance_scale=1.7, gamma=0.2, grid=250),
    "hyper-sd": Preset("the unified Hyper-SD LoRAs, of one step (ByteDance)", "tcd", gamma=1.0),
    "hyper-sd-unet": Preset("the one-step Hyper-SD UNet (ByteDance)", "lcm", (1,), by_hand={1: (800,)}),
    "dmd2": Preset(
        "DMD2's 4-step LoRA and UNet, and its one-step UNet (tianweiy)",
        "lcm",
        (4, 1),
        by_hand={4: (999, 749, 499, 249), 1: (399,)},
    ),
    "tdm": Preset("TDM LoRAs (Luo-Yihong), whose files have no alpha", "dpm_solver_pp_2m", (4,), lora_weight=0.125),
    "lightning": Preset("SDXL-Lightning LoRAs and UNets of 2, 4 and 8 steps (ByteDance)", "euler", (4, 2, 8)),
    "turbo": Preset("SD-Turbo, SDXL-Turbo (stabilityai)", "euler_ancestral", (1, 2, 3, 4)),
}


def words(name: str, steps: int | None, of_image: bool = False, sampler: str | None = None) -> list[str]:
    """The flags that a preset stands for, to come before those of the command line.

    steps, of_image, sampler: of the command line: its number of steps, whether it has an image to start from, and its
      sampler, which the preset's gamma may not be for.

    Raises:
      BadArgument: a number of steps that the files are not made for, or an image beside timesteps by hand.
    """
    preset = PRESETS[name]
    if preset.steps and steps not in (None, *preset.steps):
        made_for = ", ".join(map(str, preset.steps))
        raise BadArgument("steps", steps, f"preset {name} is for files made for {made_for} steps; take one of them")
    steps = steps or (preset.steps[0] if preset.steps else 4)
    found = [f"--sampler={preset.sampler}", f"--steps={steps}", f"--guidance_scale={preset.guidance_scale:g}"]
    if preset.gamma is not None and sampler in (None, preset.sampler):
        found.append(f"--gamma={preset.gamma:g}")
    by_hand = preset.by_hand.get(steps, ())
    if preset.grid != 50:
        by_hand = timesteps.lcm(steps, original_steps=preset.grid)
    if len(by_hand) and of_image:
        problem = "has timesteps by hand, and image to image those of its strength"
        raise BadArgument("preset", name, f"{problem}; give {' '.join(found)} in its place")
    if len(by_hand):
        found.append(f"--timesteps={','.join(map(str, by_hand))}")
    return found


def weighted(name: str, loras: Sequence[str]) -> list[str]:
    """`loras`, the first with the preset's weight if it has none of its own."""
    weight = PRESETS[name].lora_weight
    if weight == 1.0 or not loras or _has_weight(loras[0]):
        return list(loras)
    return [f"{loras[0]}:{weight:g}", *loras[1:]]


def _has_weight(lora: str) -> bool:
    """Whether `load.parse_lora` takes what follows the last colon for a weight."""
    try:
        float(lora.rpartition(":")[2])
    except ValueError:
        return False
    return ":" in lora


def markdown() -> str:
    """The table of docs/presets.md."""
    rows = ["| `--preset` | files | sampler | steps | guidance scale |", "|---|---|---|---|---|"]
    for name, one in PRESETS.items():
        gamma = f", gamma {one.gamma:g}" if one.gamma is not None else ""
        at = "; ".join(f"t = {', '.join(map(str, t))}" for t in one.by_hand.values())
        grid = f", grid of {one.grid}" if one.grid != 50 else ""
        weight = f"; LoRA weight {one.lora_weight:g}" if one.lora_weight != 1.0 else ""
        steps = ", ".join(map(str, one.steps)) or "any"
        sampler = f"{one.sampler}{gamma}{grid}{f' ({at})' if at else ''}{weight}"
        rows.append(f"| `{name}` | {one.about} | {sampler} | {steps} | {one.guidance_scale:g} |")
    return "\n".join(rows) + "\n"
