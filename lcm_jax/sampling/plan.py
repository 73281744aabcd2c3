"""A sampler with its settings, bound to the timesteps and the options that a model needs.

plan = make_plan(pipeline, Settings(steps=4))
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lcm_jax.diffusion import samplers
from lcm_jax.diffusion import timesteps as timesteps_lib
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import BadArgument
from lcm_jax.pretrained.model import Pipeline

SAMPLERS = tuple(samplers.SAMPLERS)
ON_GRID = ("lcm", "tcd")  # their timesteps are of the solver grid that the model was distilled on
EULER = ("euler", "euler_ancestral")
MAX_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. Everything else, such as the solver grid of an LCM, comes from the model (`Constants`).

    spacing: of the timesteps of ddim and dpm, one of `timesteps.SPACINGS`; with a strength "trailing".
    gamma: of tcd, in [0, 1]: how much of each step is made of fresh noise.
    timesteps: by hand, falling, instead of the sampler's own; () for those.
    strength: of image to image (`image_to_image`): the sampler starts from a noised image; None: from noise.
    stop: timesteps below it are left to a refiner (`chain`); None: the sampler goes all the way.
    """

    sampler: str = "lcm"
    steps: int = 4
    spacing: str = "trailing"
    gamma: float = 0.0
    timesteps: tuple[int, ...] = ()
    strength: float | None = None
    stop: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A sampler bound to its timesteps and options, an argument of what is jitted.

    Timesteps that begin with noise are static. Those of a strength are `table`, arrays: one program serves all
    strengths of one number of steps.
    """

    sampler: str = dataclasses.field(metadata={"static": True})
    timesteps: tuple[int, ...] | None = dataclasses.field(metadata={"static": True})
    options: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata={"static": True})
    table: samplers.Table | None = None
    scaled_start: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(
        self,
        model: samplers.Model,
        noise: jax.Array,
        schedule: NoiseSchedule,
        hook: samplers.Hook | None = None,
        loop: Callable = samplers.scan,
    ) -> Any:
        """The latent [b h w c] from noise [steps b h w c]: entry 0 is the start, the others are added between steps."""
        sampler, t, start = samplers.SAMPLERS[self.sampler], self.table or self.t, noise[0]
        if self.scaled_start:
            start = schedule.sigma(self.t[0]) * start
        return sampler(model, start, noise[1:], schedule, t, hook, **dict(self.options), loop=loop)

    @property
    def t(self) -> np.ndarray | jax.Array:
        """The timesteps, int32 [steps]."""
        return np.array(self.timesteps, np.int32) if self.table is None else self.table[0]


def noise_entries(settings: Settings) -> int:
    """Entries of noise that the sampler reads: the start, and of some one between its steps."""
    fresh = settings.sampler in ("lcm", "euler_ancestral") or (settings.sampler == "tcd" and settings.gamma > 0)
    return settings.steps if fresh else 1


def make_plan(pipeline: Pipeline, settings: Settings) -> Plan:
    """The sampler that `settings` name, with the timesteps and the options that the model needs.

    Raises:
      LcmError: steps out of range.
    """
    constants, schedule, name = pipeline.constants, pipeline.schedule, settings.sampler
    total, steps, strength = schedule.num_train_timesteps, settings.steps, settings.strength
    if settings.timesteps:
        t = np.array(settings.timesteps, np.int32)
    elif name in ON_GRID:
        t = timesteps_lib.lcm(steps, total, constants.solver_steps, 1.0 if strength is None else strength)
    elif strength is not None:  # see `image_to_image`; DPM-Solver's are the same
        t = timesteps_lib.ddim(steps, round(total * strength), "trailing")
    else:
        # Stable Diffusion's schedulers shift leading timesteps by one; the other spacings ignore the offset.
        of = timesteps_lib.dpm_solver if name.startswith("dpm") else timesteps_lib.ddim
        t = of(steps, total, settings.spacing, 1)
    options: dict[str, Any] = {}
    if name == "lcm":
        options = {"timestep_scaling": constants.timestep_scaling, "sigma_data": constants.sigma_data}
    elif name == "tcd":
        options = {"gamma": settings.gamma}
    if strength is None:
        options |= {"set_alpha_to_one": constants.set_alpha_to_one} if name == "ddim" else {}
        plan = Plan(name, tuple(t.tolist()), tuple(options.items()), scaled_start=name in EULER)
        return plan if settings.stop is None else _stopped(pipeline, plan, settings.stop)
    of_table = {"gamma": settings.gamma} if name == "tcd" else {}
    if name == "ddim":
        of_table = {"stride": round(total * strength) // steps, "set_alpha_to_one": constants.set_alpha_to_one}
    return Plan(name, None, tuple(options.items()), samplers.TABLES[name](schedule, t, **of_table))


def _stopped(pipeline: Pipeline, plan: Plan, stop: int) -> Plan:
    """The steps at timesteps >= stop; an LCM's end at x0, those of others where the last one leads."""
    kept = int((plan.t >= stop).sum())
    if plan.sampler == "lcm":
        return dataclasses.replace(plan, timesteps=plan.timesteps[:kept])
    table = samplers.TABLES[plan.sampler](pipeline.schedule, plan.t, **dict(plan.options))
    return dataclasses.replace(plan, timesteps=None, table=tuple(column[:kept] for column in table))


def check_timesteps(
    pipeline: Pipeline, sampler: str, timesteps: Sequence[int], steps: int | None, of_image: bool
) -> int:
    """The number of steps: that of timesteps by hand, or the given one, or the model's own.

    Raises:
      BadArgument: timesteps that do not fall within the noise table, or that the sampler does not go by.
    """
    if not timesteps:
        return pipeline.default_steps if steps is None else steps
    shown, last = ",".join(map(str, timesteps)), pipeline.schedule.num_train_timesteps - 1
    if not (last >= timesteps[0] and timesteps[-1] >= 0 and all(np.diff(timesteps) < 0)):
        raise BadArgument("timesteps", shown, f"must fall, from {last} at most to 0 at least")
    if sampler == "ddim":
        raise BadArgument("timesteps", shown, "ddim goes by equal strides; take euler, which is DDIM along timesteps")
    if of_image:
        raise BadArgument("timesteps", shown, "image to image has those of its strength; leave them out")
    if steps not in (None, len(timesteps)):
        raise BadArgument("steps", steps, f"there are {len(timesteps)} timesteps; leave it out")
    return len(timesteps)


def check_steps(steps: int, most: int = MAX_STEPS) -> None:
    """Raises BadArgument unless it is in 1 .. most."""
    if not 1 <= steps <= most:
        raise BadArgument("steps", steps, f"out of range; choose 1 to {most}")
