"""Does this run fit, and how fast could it be? The training step compiled for TPUs that are not here.

    python -m lcm_jax.aot --config=configs/sdxl_lcm.py --topology=v5e:4x4 [--slices=2] [--fit] [--out=FILE.json]
        [--config.data.batch_size=64] [--config.mesh.fsdp=16] ...

A topology counts chips: v5e:4x4, v5p:2x2x4 and v6e:4x4 are 16 each. Needs libtpu (`pip install 'lcm_jax[tpu]'`), but
no TPU, no weights and no data; models are known by their configs, and those of the published ones come with the
package. The batch (`data.batch_size`) is that of all chips; `--fit` looks for the largest that fits instead.

The program is that of `lcm_jax.train`; only the compile options that make compiling quick differ, and are printed. VAE
and text encoders, which a run keeps beside the step, are counted. The temporary memory of encoding is not:
`data.encode_chunk` bounds it, and a latent cache avoids it.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from lcm_jax import files
from lcm_jax.cost import chips, roofline
from lcm_jax.cost.chips import GIB
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.run.config import flag_help, parse_flags, resolve, to_json, validate
from lcm_jax.run.report import DoesNotFit, report
from lcm_jax.runtime import waiting
from lcm_jax.runtime.mesh import make_mesh

# Minutes instead of hours for a step of thousands of operations; XLA then also searches less for a tight schedule.
QUICK = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
VERIFY = 3  # compilations at most with which --fit verifies its estimate

# What libtpu would otherwise ask the metadata server of a TPU machine.
_NO_MACHINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices, one per chip, of `slices` slices of a TPU topology, for compiling only.

    Raises:
      LcmError: topology unknown, libtpu missing or in use by another process.
    """
    chip, count = chips.of_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise LcmError("compiling for TPUs needs libtpu, which is not installed: pip install 'lcm_jax[tpu]'")
    for name, value in _NO_MACHINE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":  # otherwise a device is one of its two cores
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # jaxlib's, RuntimeError or its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        locked = "lockfile" in str(error)
        remedy = "another process is using libtpu, wait for it to end" if locked else "see libtpu's message"
        raise LcmError(f"libtpu gives no topology {topology} x {slices} ({reason}); {remedy}") from error
    if len(found) != slices * count:
        raise LcmError(f"libtpu gives {len(found)} devices for {slices} x {topology}, which has {count} chips")
    return list(found)


def fit(attempt: Callable[[int], tuple[float, float, Any]], say: Callable[[str], None]) -> tuple[int, Any]:
    """The largest number of images per device that was verified to fit, and the result of its attempt.

    Memory is assumed to be linear in the number: two attempts give the line, up to VERIFY more verify its prediction.

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
        guess = min([guess, *(images - 1 for images in too_many)])
        if guess <= max(images for images, _ in fitting):
            break
        points[guess] = needed(guess)
    return max(fitting, key=lambda one: one[0])


def prepared(config: ConfigDict) -> ConfigDict:
    """The resolved config of a run on TPUs. It need not name its data, which do not matter here."""
    config = ConfigDict(config.to_dict())
    config.data.source, config.data.path, config.data.mixture = "shapes", None, ()
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16"
    validate(config)
    return resolve(config)


def analyse(config: ConfigDict, devices: list[jax.Device], chip: chips.Chip, fitting: bool) -> dict[str, Any]:
    """The report of the config's step on these devices, see `report`, and the config.

    fitting: with the largest batch that fits, instead of the config's.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.slices, devices)

    def attempt(config: ConfigDict) -> tuple[float, float, dict[str, Any]]:
        found = report(config, mesh, QUICK, chip) | {"config": json.loads(to_json(config))}
        return found["memory"]["needed"], chip.hbm_bytes, found

    def with_images(per_device: int) -> ConfigDict:
        """The config with this many images on each device, in each part of an accumulated batch."""
        changed = ConfigDict(config.to_dict())
        changed.data.batch_size = per_device * mesh.size * config.train.accumulation_steps
        return changed

    if fitting:
        return fit(lambda images: attempt(with_images(images)), waiting.say)[1]
    return attempt(config)[-1]


def run() -> None:
    """What the command line asks for."""
    values = flags.FLAGS
    config = ConfigDict(values.config.to_dict())
    if values.slices is not None:
        config.mesh.slices = values.slices
    config = prepared(config)
    chip, _ = chips.of_topology(values.topology)
    found = analyse(config, devices_of(values.topology, config.mesh.slices), chip, values.fit)
    found = {"topology": values.topology, "slices": config.mesh.slices} | found
    print(roofline.text(found), end="")
    if values.out:
        with files.new_file(files.expanded(values.out)) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n")


def main(argv: list[str]) -> int:
    del argv
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles, and must not look for chips
    return exit_code(run, smaller="use a smaller --config.data.batch_size, or a machine with more memory to compile on")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, flag_help("configs/sdxl_lcm.py"))
    flags.DEFINE_string("topology", None, "chips, such as v5e:4x4 (16 of them)")
    flags.DEFINE_integer("slices", None, "number of such slices in one pod; default: mesh.slices")
    flags.DEFINE_bool("fit", False, "look for the largest batch that fits")
    flags.DEFINE_string("out", None, "JSON file for the report")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
