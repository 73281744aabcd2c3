"""At which timesteps a sampler calls the network: tables made on the host, falling, one entry a step."""

import math

import numpy as np

from lcm_jax.errors import LcmError

SPACINGS = ("leading", "trailing", "linspace")


def lcm(num_steps: int, num_train_timesteps: int = 1000, original_steps: int = 50, strength: float = 1.0) -> np.ndarray:
    """Evenly spaced indices into the solver grid of training: int32 [num_steps], falling.

    Args:
      num_steps: 1 .. original_steps.
      num_train_timesteps: T.
      original_steps: N of the solver grid that the model was distilled on, 1 .. T.
      strength: part of the grid that image to image runs over, see `kept`.

    Raises:
      LcmError: a number of steps out of its range.
    """
    if not 1 <= original_steps <= num_train_timesteps:
        raise LcmError(f"original_steps={original_steps} is out of range; choose 1 to {num_train_timesteps}")
    last = kept(original_steps, strength)
    _check_steps(num_steps, last, "the solver steps the model was distilled with")
    grid = np.arange(last, 0, -1) * (num_train_timesteps // original_steps) - 1
    return grid[np.floor(np.linspace(0, last, num_steps, endpoint=False)).astype(int)].astype(np.int32)


def kept(steps: int, strength: float) -> int:
    """Entries of a grid of `steps` that image to image runs over: floor(steps * strength).

    What is missing to a whole number by the rounding of binary fractions is added: 0.58 of 50 is 29, which diffusers
    makes 28.
    """
    return math.floor(steps * strength + 1e-6)


def ddim(
    num_steps: int, num_train_timesteps: int = 1000, spacing: str = "trailing", steps_offset: int = 0
) -> np.ndarray:
    """Timesteps of `samplers.ddim`, int32 [num_steps], falling.

    Args:
      num_steps: 1 .. T.
      num_train_timesteps: T.
      spacing: "trailing" starts at T - 1; "leading" at (n - 1) (T // n) + steps_offset; "linspace" spans 0 .. T - 1.
      steps_offset: added to leading timesteps (1 for Stable Diffusion); the others ignore it.

    Raises:
      LcmError: steps out of range, unknown spacing, an offset that leads past T - 1.
    """
    last = num_train_timesteps
    _check_steps(num_steps, last, "the training timesteps")
    if spacing == "leading":
        t = np.arange(num_steps - 1, -1, -1) * (last // num_steps) + steps_offset
    elif spacing == "trailing":
        t = _trailing(num_steps, last)
    elif spacing == "linspace":
        t = np.linspace(0, last - 1, num_steps).round()[::-1]
    else:
        raise LcmError(_unknown_spacing(spacing))
    return _checked(t, last, steps_offset)


def dpm_solver(
    num_steps: int, num_train_timesteps: int = 1000, spacing: str = "trailing", steps_offset: int = 0
) -> np.ndarray:
    """Timesteps of `samplers.dpm_solver_2m` and `dpm_solver_pp_2m`, int32 [num_steps], falling; see `ddim`.

    "leading" and "linspace" lay num_steps + 1 points and leave the last, t = 0, out, because the step to abar_0, or to
    sigma = 0, takes its place. They allow 1 .. T - 1 steps.
    """
    last = num_train_timesteps
    _check_steps(num_steps, last if spacing == "trailing" else last - 1, "the training timesteps")
    if spacing == "leading":
        t = np.arange(num_steps, 0, -1) * (last // (num_steps + 1)) + steps_offset
    elif spacing == "trailing":
        t = _trailing(num_steps, last)
    elif spacing == "linspace":
        t = np.linspace(0, last - 1, num_steps + 1).round()[:0:-1]
    else:
        raise LcmError(_unknown_spacing(spacing))
    return _checked(t, last, steps_offset)


def _trailing(num_steps: int, last: int) -> np.ndarray:
    # diffusers steps down by a rounded last / n and so may get one value too many, which is cut off here.
    return np.arange(last, 0, -last / num_steps)[:num_steps].round() - 1


def _check_steps(num_steps: int, largest: int, which: str) -> None:
    if not 1 <= num_steps <= largest:
        raise LcmError(f"{num_steps} sampling steps are out of range; choose 1 to {largest} ({which})")


def _checked(t: np.ndarray, last: int, steps_offset: int) -> np.ndarray:
    t = t.astype(np.int32)
    if t[0] >= last or t[-1] < 0:
        reached = f"timesteps {t[0]} to {t[-1]}, outside {last - 1} to 0"
        raise LcmError(f"steps_offset={steps_offset} gives {reached}; use an offset that stays inside")
    return t


def _unknown_spacing(spacing: str) -> str:
    return f"unknown timestep spacing {spacing!r}; choose one of {', '.join(SPACINGS)}"
