"""A second pass behind the first: at a larger size, or by SDXL's refiner. It starts from the latents of the first.

    images = model("a bird", then=Hires(2, strength=0.5))

    refiner = model.refiner("stabilityai/stable-diffusion-xl-refiner-1.0")
    images = model("a bird", then=Refine(refiner, start=0.8))

`Hires` is image to image (`image_to_image`) from the enlarged latents, with new noise:

    latent    z itself, resized (bilinear), as "Latent" of A1111: blurred, which a strength of 0.5 or more makes up for
    pixel     the decoded image, resized (Lanczos) and encoded again

`Refine` hands over at a timestep t'. With T training timesteps and c = round(T (1 - start)), the base runs those of its
timesteps that are c or more, and the refiner starts at t' < c, with trailing timesteps over 0 .. t':

    lcm       x = alpha_t' x0 + sigma_t' noise, t' the next of the base's timesteps; if it has none, the last point of
              its solver grid below c
    others    x as the base's last step leaves it, with that step's fresh noise if it has some, t' where that leads

diffusers' `denoising_end` and `denoising_start` cut the tables of both models at c. There an LCM whose timesteps all
are above c hands over an image without noise, and the levels of noise of the two may differ.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.sampling import control as control_lib
from lcm_jax.sampling.control import Control
from lcm_jax.sampling.image import resized
from lcm_jax.sampling.image_to_image import check_steps_left, check_strength
from lcm_jax.sampling.inpaint import Canvas
from lcm_jax.sampling.plan import ON_GRID, Settings, check_steps, make_plan, noise_entries
from lcm_jax.sampling.png import to_uint8
from lcm_jax.sampling.request import Request, check_guidance_scale

WAYS = ("latent", "pixel")
MOST = 4.0  # times the size
FLAGS = {"hires": ("scale", "strength", "steps", "by"), "refiner": ("model", "start", "steps", "guidance_scale")}


@dataclasses.dataclass(frozen=True)
class Hires:
    """A second pass at `scale` times the size, in whole latents.

    Attributes:
      scale: 1 to 4.
      strength: how far from the first pass, more than 0 to 1.
      steps: of the second pass; None: as many as of the first.
      by: how latents are enlarged, "latent" or "pixel".
    """

    scale: float = 2.0
    strength: float = 0.5
    steps: int | None = None
    by: str = "latent"


@dataclasses.dataclass(frozen=True, eq=False)
class Refine:
    """A second pass by a refiner, which finishes what the base has begun.

    Attributes:
      model: from `Generator.refiner`; its name, as long as there is no model.
      start: part of the noise that the base removes, between 0 and 1.
      steps: of the refiner.
      guidance_scale: of the refiner, which takes two passes a step above 1.
    """

    model: Any
    start: float = 0.8
    steps: int = 10
    guidance_scale: float = 5.0


@dataclasses.dataclass(frozen=True, eq=False)
class Second:
    """The second pass of a request, checked: its own request, and what it asks for."""

    request: Request
    then: Hires | Refine


def followed(
    pipeline: Pipeline, request: Request, then: Hires | Refine | None, control: Sequence[Control] = ()
) -> Request:
    """The request with a second pass.

    Args:
      pipeline: of the first pass.
      request: of the first pass, from `make_request`.
      then: None: there is no second pass.
      control: the ControlNets of the request; at a larger size their images are read again.

    Raises:
      BadArgument: a value is wrong, or the model cannot do it.
    """
    if then is None:
        return request
    check_values(then, request.source is not None)
    if isinstance(then, Hires):
        return dataclasses.replace(request, second=Second(_larger(pipeline, request, then, control), then))
    return _refined(pipeline, request, then)


def check_refiner(pipeline: Pipeline, refiner: Pipeline, name: Any) -> None:
    """Raises LcmError unless `refiner`, which was loaded by `name`, can start from the latents of `pipeline`."""
    if refiner.purpose != "refining":
        raise LcmError(f"{name} is no SDXL refiner; give one, such as stabilityai/stable-diffusion-xl-refiner-1.0")
    if not pipeline.is_xl:
        raise LcmError(f"{name} refines the latents of SDXL, this model has others; use a model of SDXL")
    unet, encoder = refiner.unet, refiner.text_encoder_2
    pooled = encoder.projection_dim if encoder.with_projection else encoder.hidden_size
    sizes = (unet.projection_class_embeddings_input_dim - pooled) // unet.addition_time_embed_dim
    if sizes != 5:
        raise LcmError(f"{name} is conditioned on {sizes} sizes, SDXL's refiner on 4 and an aesthetic score; give that")


def of_flags(values: Mapping[str, Any]) -> Hires | Refine | None:
    """The second pass that the flags of a command line ask for, its model by name.

    values: by the flags' names, None for those that are not given; other names are not used.

    Raises:
      BadArgument: a value is wrong, a flag is missing, or two passes are asked for.
    """
    found = []
    for kind, make in (("hires", Hires), ("refiner", Refine)):
        main, *others = FLAGS[kind]
        given = {field: values[f"{kind}_{field}"] for field in others if values[f"{kind}_{field}"] is not None}
        if values[kind] is not None:
            found.append(make(**{main: values[kind]}, **given))
        elif given:
            field, value = next(iter(given.items()))
            raise BadArgument(f"{kind}_{field}", value, f"is for a second pass; give --{kind}, too, or leave it out")
    if len(found) > 1:
        raise BadArgument("refiner", values["refiner"], "and --hires are second passes both; give one")
    if found:
        check_values(found[0], values["image"] is not None)
    return found[0] if found else None


def recorded(then: Hires | Refine | None) -> dict[str, Any]:
    """The flags that ask for a second pass."""
    if then is None:
        return {}
    kind = "hires" if isinstance(then, Hires) else "refiner"
    main, *others = FLAGS[kind]
    values = {kind: getattr(then, main)} | {f"{kind}_{field}": getattr(then, field) for field in others}
    return {name: value for name, value in values.items() if value is not None}


def check_values(then: Hires | Refine, of_image: bool) -> None:
    """Raises BadArgument, which names the flag, for what is wrong with any model; of_image: of image to image."""
    if of_image:
        name, value = ("hires", then.scale) if isinstance(then, Hires) else ("refiner_start", then.start)
        raise BadArgument(name, f"{value:g}", "a second pass follows images from text alone; leave it or the image out")
    if isinstance(then, Hires):
        if not 1.0 <= then.scale <= MOST:
            raise BadArgument("hires", f"{then.scale:g}", f"times the size; choose 1 to {MOST:g}")
        _named("hires_strength", check_strength, then.strength)
        if then.by not in WAYS:
            raise BadArgument("hires_by", then.by, f"choose one of {', '.join(WAYS)}")
    elif not 0.0 < then.start < 1.0:
        raise BadArgument("refiner_start", f"{then.start:g}", "the base's part of the noise; choose between 0 and 1")
    else:
        _named("refiner_guidance_scale", check_guidance_scale, then.guidance_scale)
    if then.steps is not None:
        _named("hires_steps" if isinstance(then, Hires) else "refiner_steps", check_steps, then.steps)


def _named(name: str, check: Any, *args: Any) -> None:
    """A check whose BadArgument names the argument `name`."""
    try:
        check(*args)
    except BadArgument as error:
        raise BadArgument(name, error.value, error.problem) from None


def _larger(pipeline: Pipeline, request: Request, then: Hires, control: Sequence[Control]) -> Request:
    steps, settings, factor = then.steps or request.settings.steps, request.settings, pipeline.vae.factor
    _named("hires_strength", check_steps_left, pipeline, settings.sampler, steps, then.strength)
    size = [int(side * then.scale / factor + 1e-6) * factor for side in (request.height, request.width)]
    return dataclasses.replace(
        request,
        settings=dataclasses.replace(settings, steps=steps, spacing="trailing", timesteps=(), strength=then.strength),
        height=size[0],
        width=size[1],
        control=control_lib.fitted(control_lib.read(control, pipeline), *size, factor),
    )


def _refined(pipeline: Pipeline, request: Request, then: Refine) -> Request:
    if getattr(getattr(then.model, "pipeline", None), "purpose", None) != "refining":
        raise BadArgument("refiner", then.model, "is no refiner; give what model.refiner returns")
    check_refiner(pipeline, then.model.pipeline, "this refiner")  # it may have been loaded by another model
    settings, total = request.settings, pipeline.schedule.num_train_timesteps
    first = dataclasses.replace(settings, stop=round(total * (1.0 - then.start)))
    last = _hand_over(pipeline, settings, first.stop, then.start)
    if then.steps > last + 1:
        problem = f"the refiner has {last + 1} timesteps; use as many steps at most, or an earlier refiner_start"
        raise BadArgument("refiner_steps", then.steps, problem)
    sampler = "ddim" if settings.sampler in ON_GRID else settings.sampler
    second = dataclasses.replace(
        request,
        settings=Settings(sampler, then.steps, strength=(last + 1) / total),
        guidance_scale=float(then.guidance_scale),
        nag_scale=1.0,  # its own second pass has the negative prompt
        control=(),
    )
    return dataclasses.replace(request, settings=first, second=Second(second, then))


def _hand_over(pipeline: Pipeline, whole: Settings, stop: int, start: float) -> int:
    """t', the timestep that the refiner starts at."""
    t, total = make_plan(pipeline, whole).t, pipeline.schedule.num_train_timesteps
    kept, spacing = int((t >= stop).sum()), total // pipeline.constants.solver_steps
    if 0 < kept < len(t):
        # DDIM goes by its stride, which need not lead to the next timestep.
        return int(t[kept - 1]) - total // len(t) if whole.sampler == "ddim" else int(t[kept])
    if kept and whole.sampler == "lcm" and stop >= spacing:
        return stop // spacing * spacing - 1
    problem = f"leaves {kept} of {len(t)} steps to the base, at timesteps {t[0]} to {t[-1]}"
    raise BadArgument("refiner_start", f"{start:g}", f"{problem}; use another, or more steps")


def timesteps(pipeline: Pipeline, request: Request) -> list[int | str]:
    """Those of both passes, "then" between them."""
    second = request.second
    other = second.then.model.pipeline if isinstance(second.then, Refine) else pipeline
    first, last = make_plan(pipeline, request.settings).t, make_plan(other, second.request.settings).t
    return [*first.tolist(), "then", *last.tolist()]


def second_pass(
    model: Any, request: Request, z: jax.Array, prompts: Sequence[str], numbers: Sequence[int], seed: int
) -> jax.Array:
    """Scaled latents [b h w c] of the second pass from those of the first, for the arguments of `generate`."""
    asked, then, of_noise = request.second.request, request.second.then, (request.noise, request.num_images)
    if isinstance(then, Refine):
        start = [np.asarray(z)]
        if (is_lcm := request.settings.sampler == "lcm") or noise_entries(request.settings) > 1:
            plan = make_plan(model.pipeline, request.settings)
            used = len(plan.t)  # entries of noise, by the base
            entries = used + noise_entries(asked.settings)
            fresh, *between = model.noise(seed, numbers, entries, asked.height, asked.width, *of_noise)[used:]
            # What the base's last step is to add, the sampler leaves out, as after the last of all.
            z = _noised(then.model.pipeline, asked.settings, z, fresh) if is_lcm else z + plan.table[-1][-1] * fresh
            start = [np.asarray(z), *between]
        return then.model.sampled(asked, prompts, np.stack(start))
    z, steps = enlarged(model, z, asked.height, asked.width, then.by), noise_entries(asked.settings)
    first, *between = model.noise(seed, numbers, steps, asked.height, asked.width, *of_noise, again=True)
    return model.sampled(asked, prompts, np.stack([_noised(model.pipeline, asked.settings, z, first), *between]))


def _noised(pipeline: Pipeline, settings: Settings, z: jax.Array, noise: jax.Array) -> np.ndarray:
    """Scaled latents z with noise of the sampler's first timestep, [b h w c]: what it starts from."""
    t = make_plan(pipeline, settings).t[0]
    return pipeline.schedule.alphas[t] * np.asarray(z) + pipeline.schedule.sigmas[t] * np.asarray(noise)


def enlarged(model: Any, z: jax.Array, height: int, width: int, by: str) -> np.ndarray:
    """Scaled latents [b h w c] -> those of images of this size in pixels."""
    if by == "pixel":
        images = model.decode(z)
        z = model.encoder.latents([Canvas(resized(one, height, width)) for one in to_uint8(np.nan_to_num(images))])
        return np.where(np.isfinite(images).all((1, 2, 3), keepdims=True), z, np.nan)  # for `generate` to report
    factor, (b, _, _, c) = model.pipeline.vae.factor, z.shape
    # Whole on every process, so that each can resize it by itself.
    return np.asarray(
        jax.image.resize(np.asarray(z), (b, height // factor, width // factor, c), "bilinear", antialias=False)
    )
