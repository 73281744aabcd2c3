"""ControlNets beside a UNet: what a user asks for, and what the sampler's loop reads of it.

    canny = model.control_net("lllyasviel/control_v11p_sd15_canny")
    images = model("a bird", control=[Control(canny, "edges.png", scale=0.8, end=0.5)])

At step i of n a net is on if start <= i / n and (i + 1) / n <= end, as in diffusers. Its residuals are multiplied by

    gain_j = scale, or 0 if it is off; in guess mode scale 10^(j / N - 1)        j < N: of skip j; j = N: of the middle

and those of several nets are added. A net that is off is evaluated all the same: gains are an array, so one program
serves all scales and windows. In guess mode the second pass, with the null text, has no residuals. Nets that pool their
residuals are always in guess mode, and have its second pass, not its gains.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import files
from lcm_jax.data.images import opencv
from lcm_jax.diffusion.denoiser import interleave
from lcm_jax.errors import BadArgument
from lcm_jax.models.controlnet import ControlNetModel
from lcm_jax.pretrained.controlnets import check_fit
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.sampling.image import ImageLike, read_image, resized

FORM = "NET:IMAGE[:SCALE[:START-END]]"
ASPECT = 0.01  # that an image's may differ from the request's, beside what whole latents force on it
_SMALLEST = 8  # latents on a side of an image
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_WINDOW = re.compile(rf"({_NUMBER})-({_NUMBER})")


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A ControlNet with its weights on the devices, and the name that it was loaded by."""

    source: str
    module: ControlNetModel
    params: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """One image that steers the others through a ControlNet.

    Attributes:
      net: from `Generator.control_net`; its name, as long as there is no model.
      image: what the net was trained on, such as edges or depth; see `image.ImageLike`.
      scale: of the net's residuals.
      start, end: parts of the steps between which the net is on, 0 to 1.
      canny: thresholds (low, high): the net reads the edges of the image instead; needs OpenCV.
    """

    net: Net | str
    image: ImageLike
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    canny: tuple[float, float] | None = None

    def on(self, steps: int) -> np.ndarray:
        """Whether the net is on, bool [steps]."""
        return np.array([not (i / steps < self.start or (i + 1) / steps > self.end) for i in range(steps)])


def read(controls: Sequence[Control], pipeline: Pipeline) -> tuple[Control, ...]:
    """The same with their images as uint8 [h w 3]. Raises BadArgument or LcmError for what cannot be used."""
    found = []
    for control in controls:
        if not isinstance(control.net, Net):
            raise BadArgument("control", control.net, "is no net; give what model.control_net returns")
        check_values(control.scale, control.start, control.end, control.canny)
        check_fit(control.net.module, pipeline, control.net.source)
        image = read_image(control.image, "control", _SMALLEST * pipeline.vae.factor)
        found.append(dataclasses.replace(control, image=image))
    return tuple(found)


def check_values(scale: float, start: float, end: float, canny: tuple[float, float] | None) -> None:
    """Raises BadArgument for numbers of a `Control` that mean nothing."""
    if not math.isfinite(scale):
        raise BadArgument("control", f"{scale:g}", "a scale is finite; 1 is the net as it was trained")
    if not 0 <= start < end <= 1:
        raise BadArgument("control", f"{start:g}-{end:g}", "a window is two parts of the steps, 0 <= START < END <= 1")
    if canny is not None:
        opencv("canny")
        if not 0 <= canny[0] <= canny[1] < math.inf:
            raise BadArgument("canny", f"{canny[0]:g},{canny[1]:g}", "thresholds are 0 <= LOW <= HIGH, such as 100,200")


def fitted(controls: Sequence[Control], height: int, width: int, factor: int) -> tuple[Control, ...]:
    """The same with images of this size. Raises BadArgument for one of another aspect."""
    for control in controls:
        h, w = control.image.shape[:2]
        if abs(math.log(h * width / (w * height))) > ASPECT + factor / min(height, width):
            problem = f"its image has {w} x {h} pixels, another aspect than {width} x {height}"
            problem += "; crop the image, or leave height and width out"
            raise BadArgument("control", control.net.source, problem)
    return tuple(dataclasses.replace(control, image=_condition(control, height, width)) for control in controls)


def _condition(control: Control, height: int, width: int) -> np.ndarray:
    image = resized(control.image, height, width)
    if control.canny is None:
        return image
    return np.repeat(opencv("canny").Canny(image, *control.canny)[:, :, None], 3, axis=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """What the sampler reads: arrays, and beside them, static, the nets' modules.

    Attributes:
      modules: of the nets.
      first_alone: whether each net is for the first of two passes alone, whose rows are interleaved.
      params: their weights.
      images: float32 [1 H W 3] in [0, 1] for each.
      gains: float32 [nets steps skips + 1].
    """

    modules: tuple[ControlNetModel, ...] = dataclasses.field(metadata={"static": True})
    first_alone: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    params: tuple[Any, ...]
    images: tuple[jax.Array, ...]
    gains: jax.Array


def conditions(controls: Sequence[Control], steps: int, guess: bool, guided: bool) -> Conditions | None:
    """Of `fitted` controls, for so many steps of two passes, if guided, or one; None if there are no controls."""
    if not controls:
        return None
    nets = [control.net for control in controls]
    count = len(nets[0].module.skip_widths)
    rising = 10.0 ** (np.arange(count + 1) / count - 1)
    gains = [
        np.outer(control.scale * control.on(steps), rising if guess and not pooled else np.ones(count + 1))
        for control, pooled in zip(controls, [net.module.global_pool_conditions for net in nets], strict=True)
    ]
    return Conditions(
        tuple(net.module for net in nets),
        tuple(guided and (guess or net.module.global_pool_conditions) for net in nets),
        tuple(net.params for net in nets),
        tuple(np.float32(control.image[None]) / np.float32(255) for control in controls),
        np.array(gains, np.float32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Controlled:
    """A UNet with ControlNets, for `diffusion.denoiser`: `apply` evaluates them, too.

    Attributes:
      unet: the UNet.
      conditions: of the nets.
      timesteps: of the sampler, int32 [steps], all different, to find the step.
    """

    unet: Any
    conditions: Conditions
    timesteps: Any

    @property
    def time_cond_proj_dim(self) -> int | None:
        return self.unet.time_cond_proj_dim

    def apply(
        self,
        variables: Mapping[str, Any],
        z_t: jax.Array,
        t: jax.Array,
        context: jax.Array,
        timestep_cond: jax.Array | None = None,
        added: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        inputs, given = (z_t, t, context, added), self.conditions
        gains = given.gains[:, jnp.argmax(jnp.asarray(self.timesteps) == t[0])]
        parts = zip(given.modules, given.first_alone, given.params, given.images, gains, strict=True)
        of_nets = []
        for module, alone, params, image, gain in parts:
            x, times, text, more = jax.tree.map(lambda rows: rows[::2], inputs) if alone else inputs
            found = module.apply({"params": params}, x, times, text, image, more)
            found = [one * gain[n] for n, one in enumerate(found)]
            of_nets.append([interleave(one, jnp.zeros_like(one)) for one in found] if alone else found)
        residuals = [functools.reduce(operator.add, ones) for ones in zip(*of_nets, strict=True)]
        return self.unet.apply(variables, z_t, t, context, timestep_cond, added, residuals)


def parse(text: str) -> tuple[str, str, float, float, float]:
    """`NET:IMAGE[:SCALE[:START-END]]` -> (net, image, scale, start, end); names may have colons, too.

    Raises:
      BadArgument: it has another form, or there is no such image.
    """
    fields, scale, window = text.split(":"), 1.0, (0.0, 1.0)
    if len(fields) > 3 and (match := _WINDOW.fullmatch(fields[-1])) and re.fullmatch(_NUMBER, fields[-2]):
        window = float(match[1]), float(match[2])
        fields.pop()
    if len(fields) > 2 and re.fullmatch(_NUMBER, fields[-1]):
        scale = float(fields.pop())
    for n in range(1, len(fields)):
        net, image = ":".join(fields[:n]), ":".join(fields[n:])
        if net and files.expanded(image).is_file():
            return net, image, scale, *window
    problem = f"has no image {fields[-1]}; " if len(fields) > 1 else ""
    raise BadArgument("control", text, f"{problem}give {FORM}, such as canny:edges.png:0.8:0-0.5")


def parse_canny(text: str) -> tuple[float, float]:
    """`LOW,HIGH` -> numbers. Raises BadArgument."""
    low, comma, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise BadArgument("canny", text, "give two thresholds, such as 100,200") from None
