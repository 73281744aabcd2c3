"""The noise schedule: tables of alpha_t and sigma_t, and the conversions that use them.

    abar_t = prod_{s <= t} (1 - beta_s)       alpha_t = sqrt(abar_t)       sigma_t = sqrt(1 - abar_t)
    z_t    = alpha_t z + sigma_t eps          v       = alpha_t eps - sigma_t z

What the network's output o at (z_t, t) means, by `prediction_type`:

                       x0                                eps
    epsilon        (z_t - sigma_t o) / alpha_t           o
    sample         o                                     (z_t - alpha_t o) / sigma_t
    v_prediction   alpha_t z_t - sigma_t o               alpha_t o + sigma_t z_t

Tables are built once on the host, by the same operations in the same order as in diffusers' schedulers, so that both
agree bit for bit (rescaled ones within 1e-6): at t = 999, where sigma / alpha is 14.6, any error in it reaches x0 in
full.

Sources: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled_linear), Nichol & Dhariwal 2021 (squaredcos_cap_v2),
Salimans & Ho 2022 (v), Lin et al. 2023, algorithm 1 (zero terminal SNR).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.typed import Range, checked

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# The schedulers of diffusers 0.42 whose noise is a table of variance-preserving steps -> the betas that each assumes if
# its config has none. The others (EDM, flow matching, ...) add noise in another way: with a table in its place the
# model would get noise that it never saw.
_PLAIN = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASSES = {
    f"{name}Scheduler": betas
    for betas, names in (
        (
            _PLAIN,
            (
                "DDIM",
                "DDIMInverse",
                "DDIMParallel",
                "DDPM",
                "DDPMParallel",
                "DEISMultistep",
                "DPMSolverMultistep",
                "DPMSolverMultistepInverse",
                "DPMSolverSinglestep",
                "EulerAncestralDiscrete",
                "EulerDiscrete",
                "LMSDiscrete",
                "PNDM",
                "RePaint",
                "SASolver",
                "UniPCMultistep",
            ),
        ),
        (_LATENT, ("LCM", "TCD")),
        (
            _LATENT | {"beta_schedule": "linear"},
            ("DPMSolverSDE", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"),
        ),
        (_PLAIN | {"beta_schedule": "squaredcos_cap_v2"}, ("UnCLIP",)),
    )
    for name in names
}
_Beta = Annotated[float, Range(1e-9, 1)]
_FIELDS = {
    "num_train_timesteps": Annotated[int, Range(1, 10_000)],
    "beta_start": _Beta,
    "beta_end": _Beta,
    "beta_schedule": str,
    "trained_betas": Annotated[tuple[_Beta, ...], Range(1, 10_000)] | None,
    "rescale_betas_zero_snr": bool,
    "prediction_type": str,
}
# Options of these classes that change the noise or the meaning of the output -> the only value that does not, and what
# the others mean.
_OPTIONS = {
    "predict_epsilon": (True, "name the prediction_type instead"),
    "snr_shift_scale": (1, "its table is shifted, as CogVideoX's"),
    "thresholding": (False, "for models of pixels"),
    "timestep_type": ("discrete", "noise levels between those of the table"),
    "use_flow_sigmas": (False, "flow matching"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving noise table and the meaning of the network's output.

    Equal and hashed by content, so that it can be a static argument of `jax.jit`.

    Attributes:
      alphas_cumprod: float32 [T], abar_t, strictly falling, within [0, 1).
      prediction_type: "epsilon", "sample" or "v_prediction".

    Raises:
      UnsupportedConfig: unknown prediction type.
      LcmError: not a noise table, or epsilon prediction with alpha_t = 0 (x0 would divide by zero).
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise UnsupportedConfig("prediction_type", self.prediction_type, PREDICTION_TYPES)
        table = np.array(self.alphas_cumprod, np.float32)
        if table.ndim != 1 or table.size == 0:
            raise LcmError(f"alphas_cumprod has shape {table.shape}; it must be one value per training timestep [T]")
        if not (np.all(np.diff(table) < 0) and table[0] < 1 and table[-1] >= 0):
            raise LcmError(
                f"alphas_cumprod from {table[0]} to {table[-1]} is not a noise table; it must fall within [0, 1)"
            )
        if self.prediction_type == "epsilon" and table[-1] == 0:
            raise LcmError(
                f"prediction_type='epsilon' divides by zero at t={table.size - 1}, where zero terminal SNR makes "
                "alpha_t = 0; use a v_prediction or sample model, or turn rescale_betas_zero_snr off"
            )
        table.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", table)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps; t runs over 0 .. T-1."""
        return self.alphas_cumprod.size

    def __str__(self):
        first, last = self.alphas_cumprod[[0, -1]]
        return f"{self.prediction_type}, abar {first:.4g} to {last:.3g} in {self.num_train_timesteps} steps"

    @functools.cached_property
    def _content(self) -> tuple[bytes, str]:
        return self.alphas_cumprod.tobytes(), self.prediction_type

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, NoiseSchedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    @functools.cached_property
    def alphas(self) -> np.ndarray:
        """alpha_t = sqrt(abar_t), float32 [T] on the host."""
        return np.sqrt(self.alphas_cumprod)

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """sigma_t = sqrt(1 - abar_t), float32 [T] on the host."""
        return np.sqrt(np.float32(1) - self.alphas_cumprod)

    def alpha(self, t) -> jax.Array:
        """Signal scale alpha_t, float32 with the shape of t. t: integers in [0, T)."""
        return jnp.asarray(self.alphas)[t]

    def sigma(self, t) -> jax.Array:
        """Noise scale sigma_t, float32 with the shape of t. t: integers in [0, T)."""
        return jnp.asarray(self.sigmas)[t]


def make_betas(beta_schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """beta_t, float32 [T], of a named schedule; squaredcos_cap_v2 ignores start and end.

    Raises:
      UnsupportedConfig: unknown name.
      LcmError: num_train_timesteps below 1.
    """
    if num_train_timesteps < 1:
        raise LcmError(f"num_train_timesteps={num_train_timesteps} is out of range; it must be at least 1")
    if beta_schedule == "linear":
        return _linspace(beta_start, beta_end, num_train_timesteps)
    if beta_schedule == "scaled_linear":
        return _linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        grid = [i / num_train_timesteps for i in range(num_train_timesteps + 1)]
        abar = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in grid]
        ratios = zip(abar[1:], abar[:-1], strict=True)
        return np.array([min(1 - end / start, 0.999) for end, start in ratios], np.float32)
    raise UnsupportedConfig("beta_schedule", beta_schedule, BETA_SCHEDULES)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(abar) so that its last value is 0 and its first is kept; betas: float32 [T] -> [T].

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    abar = root**2
    return np.float32(1) - np.concatenate([abar[:1], abar[1:] / abar[:-1]])


def from_betas(
    betas: Sequence[float] | np.ndarray, prediction_type: str = "epsilon", rescale_betas_zero_snr: bool = False
) -> NoiseSchedule:
    """The schedule with these beta_t [T], each in (0, 1].

    Raises:
      LcmError: betas out of range, and the errors of `NoiseSchedule`.
    """
    betas = np.array(betas, np.float32)
    if betas.ndim != 1 or betas.size == 0 or not np.all((betas > 0) & (betas <= 1)):
        raise LcmError(f"betas of shape {betas.shape} must be one value in (0, 1] for each training timestep")
    if rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    return NoiseSchedule(_cumprod(np.float32(1) - betas), prediction_type)


def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that a diffusers `scheduler_config.json` describes.

    Args:
      config: see `noise_fields`.

    Raises:
      UnsupportedConfig: unknown beta_schedule or prediction_type, and the errors of `noise_fields`.
      LcmError: betas that do not make a noise table; epsilon prediction with zero terminal SNR.
    """
    fields = noise_fields(config)
    betas, rescale = fields.pop("trained_betas"), fields.pop("rescale_betas_zero_snr")
    kind = fields.pop("prediction_type")
    if kind not in PREDICTION_TYPES:  # checked before the betas, as flow matching has none
        raise UnsupportedConfig("prediction_type", kind, PREDICTION_TYPES)
    return from_betas(make_betas(**fields) if betas is None else betas, kind, rescale)


def noise_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a diffusers `scheduler_config.json` that describes noise and output, with every default filled in.

    Args:
      config: keys that are missing or null have the defaults of the scheduler class in `_class_name`; a config without
        a class must have betas. Keys for sampling (spacing, offsets, clipping, ...) are not read.

    Returns:
      num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type.

    Raises:
      UnsupportedConfig: a class or an option whose noise is not a table of variance-preserving steps; thresholding;
        or a value of a wrong type.
      LcmError: neither a class nor betas.
    """
    given = {key: value for key, value in config.items() if value is not None}
    for key, (usual, why) in _OPTIONS.items():
        if given.get(key, usual) != usual or isinstance(given.get(key, usual), bool) != isinstance(usual, bool):
            raise UnsupportedConfig(key, given[key], f"{usual!r} ({why})")
    name = given.get("_class_name")
    betas = _PLAIN if name is None else _CLASSES.get(str(name).removeprefix("Flax"))
    if betas is None:
        raise UnsupportedConfig(
            "_class_name",
            name,
            f"schedulers with a table of variance-preserving steps, {', '.join(_CLASSES)}; if the model was trained "
            "with one of these, name its class in scheduler_config.json",
        )
    needs_betas = "trained_betas" not in given and given.get("beta_schedule") != "squaredcos_cap_v2"
    missing = [key for key in _PLAIN if key not in given]
    if name is None and needs_betas and missing:
        raise LcmError(
            f"the scheduler config has no class (_class_name) and no {', '.join(missing)}, so the noise is unknown; "
            "add the class to scheduler_config.json"
        )
    fields = {"num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": False} | betas
    fields["prediction_type"] = "epsilon"
    fields |= {key: given[key] for key in fields if key in given}
    return {key: checked(key, value, _FIELDS[key]) for key, value in fields.items()}


def add_noise(schedule: NoiseSchedule, z, eps, t) -> jax.Array:
    """z_t = alpha_t z + sigma_t eps, float32. z, eps: [b ...]; t: integers [b] or scalar."""
    alpha, sigma = _alpha_sigma(schedule, t, z)
    return alpha * _float32(z) + sigma * _float32(eps)  # Ho et al. 2020, equation 4


def velocity(schedule: NoiseSchedule, z, eps, t) -> jax.Array:
    """v = alpha_t eps - sigma_t z, float32. z, eps: [b ...]; t: integers [b] or scalar."""
    alpha, sigma = _alpha_sigma(schedule, t, z)
    return alpha * _float32(eps) - sigma * _float32(z)  # Salimans & Ho 2022


def to_x0(schedule: NoiseSchedule, output, z_t, t) -> jax.Array:
    """The clean latent x0 that an output implies, float32. output, z_t: [b ...]; t: integers [b] or scalar."""
    return x0_from_output(schedule.prediction_type, output, z_t, *_alpha_sigma(schedule, t, z_t))


def to_eps(schedule: NoiseSchedule, output, z_t, t) -> jax.Array:
    """The noise eps that an output implies, float32. output, z_t: [b ...]; t: integers [b] or scalar."""
    return eps_from_output(schedule.prediction_type, output, z_t, *_alpha_sigma(schedule, t, z_t))


def x0_from_output(prediction_type: str, output, z_t, alpha, sigma) -> jax.Array:
    """`to_x0` with given alpha_t and sigma_t, which broadcast against z_t."""
    output, z_t = _float32(output), _float32(z_t)
    if prediction_type == "epsilon":
        return (z_t - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha * z_t - sigma * output
    raise UnsupportedConfig("prediction_type", prediction_type, PREDICTION_TYPES)


def eps_from_output(prediction_type: str, output, z_t, alpha, sigma) -> jax.Array:
    """`to_eps` with given alpha_t and sigma_t, which broadcast against z_t."""
    output, z_t = _float32(output), _float32(z_t)
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (z_t - alpha * output) / sigma
    if prediction_type == "v_prediction":
        return alpha * output + sigma * z_t
    raise UnsupportedConfig("prediction_type", prediction_type, PREDICTION_TYPES)


def broadcast_like(scale, like) -> jax.Array:
    """One float32 scale per sample, [b] or scalar, with trailing axes of length 1 to broadcast against [b ...]."""
    scale = jnp.asarray(scale, jnp.float32)
    return scale.reshape(scale.shape + (1,) * (jnp.ndim(like) - scale.ndim))


def _alpha_sigma(schedule: NoiseSchedule, t, like) -> tuple[jax.Array, jax.Array]:
    return broadcast_like(schedule.alpha(t), like), broadcast_like(schedule.sigma(t), like)


def _float32(x) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _linspace(start: float, end: float, num: int) -> np.ndarray:
    """`torch.linspace` in float32: filled from both ends, each value rounded once (a fused multiply-add)."""
    if num == 1:
        return np.array([start], np.float32)
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(num - 1))
    i = np.arange(num)
    return np.where(i < num // 2, start + step * i, end - step * i[::-1]).astype(np.float32)


def _cumprod(x: np.ndarray) -> np.ndarray:
    """Cumulative product of float32 values, accumulated in float64 as in torch on CPUs."""
    return np.cumprod(x, dtype=np.float64).astype(np.float32)
