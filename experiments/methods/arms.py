"""The models and LoRAs that are compared: how each is trained, and the samplers that it is asked by."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from experiments import stage
from experiments.shapes_lcm_lora.train_style import STYLE

LCM, PHASED, LORA = "configs/shapes_lcm.py", "configs/shapes_pcm.py", "configs/shapes_lcm_lora.py"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model.

    Attributes:
      config: that it is trained by.
      names: sampler -> what its rows are called.
      phases: of a phased map, in stages of equal length; (): the map goes to the origin.
    """

    config: str
    names: Mapping[str, str]
    phases: tuple[int, ...] = ()


ARMS = {
    "lcm": Arm(LCM, {"lcm": "LCM", "tcd": "LCM by tcd"}),
    "phased2": Arm(PHASED, {"tcd": "phased, M = 2"}, (2,)),
    "phased4": Arm(PHASED, {"tcd": "phased, M = 4"}, (4,)),
    "phased8": Arm(PHASED, {"tcd": "phased, M = 8"}, (8,)),
    "staged": Arm(PHASED, {"tcd": "staged, M = 8, 4, 2, 1"}, (8, 4, 2, 1)),
}
LORA_STEPS = 4  # of the sampler
_PHASED_LORA = {  # as configs/shapes_pcm.py differs from configs/shapes_lcm.py
    "distill.map": "phased",
    "distill.phases": LORA_STEPS,
    "distill.solver_steps": 40,
    "sample.steps": LORA_STEPS,
}
LORAS = {"LCM": ({}, "lcm"), "phased": (_PHASED_LORA, "tcd")}  # map -> (changes of the config, sampler)
TEACHERS = {"plain": "plain", "style": STYLE}  # -> the style of the renders that its LoRAs are distilled on


def config_of(arm: Arm, seed: int, steps: int | None = None) -> ConfigDict:
    """The arm's config for a seed; steps: of training, see `read`."""
    config = read(arm.config, steps)
    changes = {"seed": seed, "sample.every": 0}
    if arm.phases:
        each = config.train.steps // len(arm.phases)
        stages = tuple(f"{count}:{number * each}" for number, count in enumerate(arm.phases[1:], 1))
        changes |= {"distill.phases": arm.phases[0], "distill.stages": stages, "sample.steps": arm.phases[-1]}
    return stage.changed(config, changes)


def config_of_lora(map_name: str, teacher: str, source: str, seed: int, steps: int | None = None) -> ConfigDict:
    """The config of a LoRA of a map of `LORAS`, distilled on one of `TEACHERS`, which `source` loads."""
    own = {"seed": seed, "sample.every": 0, "model.teacher": source, "data.style": TEACHERS[teacher]}
    return stage.changed(read(LORA, steps), own | LORAS[map_name][0])


def read(path: str, steps: int | None) -> ConfigDict:
    """A config, for `steps` of training unless that is None, and then with no more images than these see."""
    config = stage.read_config(path)
    if steps is None:
        return config
    images = min(config.data.num_examples, steps * config.data.batch_size)
    return stage.changed(stage.with_steps(config, steps), {"data.num_examples": images})
