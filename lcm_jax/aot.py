"""Does this run fit, and how fast could it be? Programs compiled for TPUs and GPUs that are not here.

    python -m lcm_jax.aot --config=configs/sdxl_lcm.py --topology=v5e:4x4 [--slices=2] [--fit] [--out=FILE.json]
        --config.data.batch_size=96 --config.mesh.fsdp=16 --config.train.remat=block
    python -m lcm_jax.aot --config=configs/sdxl_lcm_lora.py --topology=rtx4090:1
    python -m lcm_jax.aot --config=configs/sdxl_lcm_lora.py --topology=rtx4090:1 --sampling [--batch_size=4] [--steps=4]
        [--weights=int8] [--offload=text|all] [--sliced]

A topology counts chips. TPU: v5e:4x4, v5p:2x2x4 and v6e:4x4 are 16 each, and need libtpu (`pip install
'lcm_jax[tpu]'`). GPU: rtx4090:1, h100:8 (one node), h100:2x8 (two), and need jax's CUDA plugin (`pip install
'lcm_jax[cuda-aot]'`). Neither needs the hardware, weights or data; models are known by their configs, and those of the
published ones come with the package.

The program is the training step of `lcm_jax.train`, its batch (`data.batch_size`) that of all chips; only the compile
options that make compiling quick differ, and are printed. VAE and text encoders, which a run keeps beside the step, are
counted. The temporary memory of encoding is not: `data.encode_chunk` bounds it, and a latent cache avoids it. With
`--sampling` it is the programs of `lcm_jax.sample` with the config's student: text encoders, sampler, decoder; then
`--topology=cpu` is this machine, whose report has memory alone.

`--fit` looks for the largest batch that fits instead. Exit code 1: it does not fit; the last line says what to change.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from lcm_jax import files
from lcm_jax.cost import chips, roofline
from lcm_jax.cost.chips import GIB
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument
from lcm_jax.models import int8
from lcm_jax.pretrained import names
from lcm_jax.run import models as run_models
from lcm_jax.run.config import flag_help, parse_flags, resolve, to_json, validate
from lcm_jax.run.report import DoesNotFit, report
from lcm_jax.runtime import kernels, topology, waiting
from lcm_jax.runtime.mesh import make_mesh
from lcm_jax.sampling import report as sampling
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.load import WEIGHTS
from lcm_jax.sampling.offload import MODES
from lcm_jax.sampling.plan import check_steps
from lcm_jax.sampling.request import Request, make_request

# Minutes instead of hours for a step of thousands of operations; XLA then also searches less for a tight schedule. Its
# compiler for GPUs has nothing of the kind.
QUICK: dict[str, dict[str, Any]] = {
    "tpu": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    "gpu": {},
}
CPU = "cpu"  # the topology of this machine, whose memory is not known to the report
SWITCHES = ("weights", "offload", "sliced")  # flags of `lcm_jax.sample` for less memory
VERIFY = 5  # compilations at most with which --fit verifies its estimate, and
GROWTH = 4  # how many times the largest batch tried the next one may be


def fit(attempt: Callable[[int], tuple[float, float, Any]], say: Callable[[str], None]) -> tuple[int, Any]:
    """The largest number of images per device that was verified to fit, and the result of its attempt.

    Memory is assumed to be linear in the number: two attempts give the line, up to VERIFY more verify its prediction,
    which goes no further than GROWTH times: in larger batches the peak may be in another place, and grow faster.

    Args:
      attempt: images per device -> (bytes needed, bytes available, result); raises DoesNotFit.
      say: prints a line.

    Raises:
      DoesNotFit: not even one image fits.
    """

    def needed(images: int) -> tuple[float, float]:
        try:
            need, available, result = attempt(images)
        except DoesNotFit as error:
            say(f"{images} a device: {error.needed / GIB:.2f} GiB, does not fit")
            if images == 1:
                raise
            return error.needed, error.available
        say(f"{images} a device: {need / GIB:.2f} GiB, fits")
        fitting.append((images, result))
        return need, available

    fitting: list[tuple[int, Any]] = []
    points = {images: needed(images) for images in (1, 2)}
    for _ in range(VERIFY):
        (low, (low_need, available)), (high, (high_need, _)) = sorted(points.items())[-2:]
        slope = max((high_need - low_need) / (high - low), 1.0)
        guess = int(low + (available - low_need) / slope)
        too_many = [images for images, (need, limit) in points.items() if need > limit]
        guess = min([guess, GROWTH * high, *(images - 1 for images in too_many)])
        if guess <= max(images for images, _ in fitting):
            break
        points[guess] = needed(guess)
    return max(fitting, key=lambda one: one[0])


def prepared(config: ConfigDict, platform: str = "tpu") -> ConfigDict:
    """The resolved config of a run on these devices. It need not name its data, which do not matter here."""
    validate(config, data=False)
    return resolve(config, platform)


def analyse(config: ConfigDict, devices: list[jax.Device], chip: chips.Chip, fitting: bool) -> dict[str, Any]:
    """The report of the config's step on these devices, see `report`, and the config.

    fitting: with the largest batch that fits, instead of the config's.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.slices, devices)

    def attempt(config: ConfigDict) -> tuple[float, float, dict[str, Any]]:
        with topology.tracing_for(chip):
            found = report(config, mesh, QUICK[devices[0].platform], chip) | {"config": json.loads(to_json(config))}
        return found["memory"]["needed"], found["memory"]["available"], found

    def with_images(per_device: int) -> ConfigDict:
        """The config with this many images on each device, in each part of an accumulated batch."""
        changed = ConfigDict(config.to_dict())
        changed.data.batch_size = per_device * mesh.size * config.train.accumulation_steps
        return changed

    if fitting:
        return fit(lambda images: attempt(with_images(images)), waiting.say)[1]
    return attempt(config)[-1]


def generator_of(
    config: ConfigDict, mesh: Mesh, weights: str | None = None, offload: str | None = None, sliced: bool = False
) -> tuple[Generator, Request]:
    """What generates with the config's student, adapters merged, and a request at its resolution, without weights.

    weights, offload, sliced: as in `lcm_jax.load`.
    """
    models = run_models.shapes(config)
    unet, vae = kernels.plain_module(models.student.unet), models.student.vae.clone(dtype=jnp.dtype(config.model.dtype))
    pipeline = dataclasses.replace(models.student, unet=unet, vae=vae)
    params = {part: names.param_shapes(module, None) for part, module in pipeline.parts.items()}  # as `load` holds them
    if weights == "int8":
        params = {part: tree if part == "vae" else int8.shapes(tree) for part, tree in params.items()}
    side = config.data.resolution
    scale = None if pipeline.has_w_embedding else 1.0
    generator = Generator(pipeline, params, mesh, offload=offload, sliced=sliced)
    return generator, make_request(pipeline, guidance_scale=scale, height=side, width=side)


def analyse_sampling(
    config: ConfigDict,
    devices: list[jax.Device],
    chip: chips.Chip | None,
    batch: int,
    steps: int,
    fitting: bool,
    **switches: Any,
) -> dict[str, Any]:
    """The report of generating with the config's student, see `sampling.report`, in batches of `batch` images.

    fitting: of the largest batch that fits, instead. switches: of `generator_of`.
    """
    generator, request = generator_of(config, make_mesh(devices=devices), **switches)
    check_steps(steps)
    request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, steps=steps))

    def attempt(images: int) -> tuple[float, float, dict[str, Any]]:
        with topology.tracing_for(chip):
            options = QUICK.get(devices[0].platform, {})
            found = sampling.report(generator, request, images * len(devices), options, chip)
        return found["memory"]["needed"], found["memory"]["available"], found

    return fit(attempt, waiting.say)[1] if fitting else attempt(-(-batch // len(devices)))[-1]


def run() -> int:
    """What the command line asks for."""
    values = flags.FLAGS
    config = ConfigDict(values.config.to_dict())
    on_cpu = values.topology == CPU
    if on_cpu and (not values.sampling or values.fit):
        raise BadArgument("topology", CPU, "is for --sampling, without --fit; for training choose chips")
    chip = None if on_cpu else chips.of_topology(values.topology)[0]
    if values.slices is not None:
        if isinstance(chip, chips.Gpu):
            raise BadArgument("slices", values.slices, "is of TPUs; several nodes of GPUs are --topology=h100:2x8")
        if values.sampling:
            raise BadArgument("slices", values.slices, "is for training; lcm_jax.sample runs on one slice, remove it")
        config.mesh.slices = values.slices
    for name in ("batch_size", "steps", *SWITCHES):
        if values[name].present and not values.sampling:
            way = "set --config.data.batch_size" if name == "batch_size" else "remove it"
            raise BadArgument(name, values[name].value, f"is for --sampling; for training {way}")
    if values.fit and values["batch_size"].present:
        raise BadArgument("batch_size", values.batch_size, "--fit looks for the largest; remove one of them")
    config = prepared(config, CPU if on_cpu else "tpu")  # a GPU's dtypes are a TPU's
    slices = 1 if values.sampling else config.mesh.slices
    devices = jax.devices()[:1] if on_cpu else topology.devices(values.topology, slices)
    text, error = sampling.text if values.sampling else roofline.text, None
    try:
        if values.sampling:
            switches = {name: values[name].value for name in SWITCHES}
            found = analyse_sampling(config, devices, chip, values.batch_size, values.steps, values.fit, **switches)
        else:
            found = analyse(config, devices, chip, values.fit)
    except DoesNotFit as caught:
        error, found = caught, caught.report
    if found:
        found = {"topology": values.topology, "slices": slices} | found
        print(text(found), end="")
    if values.out and found:
        with files.new_file(files.expanded(values.out)) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n")
    if error:
        print(f"error: {error}", file=sys.stderr)
    return int(error is not None)


def main(argv: list[str]) -> int:
    del argv
    jax.config.update("jax_platforms", "cpu")  # compilers for other chips must not look for them
    return exit_code(run, smaller="use a smaller --config.data.batch_size, or a machine with more memory to compile on")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, flag_help("configs/sdxl_lcm.py"))
    flags.DEFINE_string("topology", None, "chips: v5e:4x4 (16 TPUs), rtx4090:1, h100:8, h100:2x8 (two nodes)")
    flags.DEFINE_integer("slices", None, "number of such TPU slices in one pod; default: mesh.slices")
    flags.DEFINE_bool("fit", False, "look for the largest batch that fits")
    flags.DEFINE_bool("sampling", False, "generating images with the config's student, instead of training it")
    flags.DEFINE_integer("batch_size", 4, "with --sampling: images at once", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "with --sampling: of the sampler", lower_bound=1)
    flags.DEFINE_enum("weights", None, WEIGHTS, "with --sampling: as in lcm_jax.sample")
    flags.DEFINE_enum("offload", None, MODES, "with --sampling: as in lcm_jax.sample")
    flags.DEFINE_bool("sliced", False, "with --sampling: as in lcm_jax.sample")
    flags.DEFINE_string("out", None, "JSON file for the report")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
