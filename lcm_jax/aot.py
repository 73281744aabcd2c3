"""Does this run fit, and how fast could it be? The training step compiled for TPUs that are not here.

    python -m lcm_jax.aot --config=configs/sdxl_lcm.py --topology=v5e:4x4 [--slices=2] [--fit] [--out=FILE.json]
        [--config.data.batch_size=64] [--config.mesh.fsdp=16] ...

A topology counts chips: v5e:4x4, v5p:2x2x4 and v6e:4x4 are 16 each. Needs libtpu (`pip install 'lcm_jax[tpu]'`), but
no TPU, no weights and no data; models are known by their configs, those of the published ones come with the package.
The batch (`data.batch_size`) is that of all chips; `--fit` looks for the largest that fits instead. What is compiled is
`training_step.make`'s, as in `lcm_jax.train`; only the compile options that make it quick differ, and are printed.
The VAE and the text encoders, which a run keeps beside the step, count as well. What encoding takes for a moment does
not: `data.encode_chunk` bounds it, a latent cache spares it.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from lcm_jax import files
from lcm_jax.cost import chips, roofline
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.run import config as config_lib
from lcm_jax.run.report import DoesNotFit, report
from lcm_jax.runtime import mesh as mesh_lib

# Minutes instead of hours for a step of thousands of operations; XLA then also searches less for a tight schedule.
QUICK = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
VERIFY = 3  # compilations at most that --fit spends on proving its guess

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

    asked: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":  # otherwise a device is one of its two cores
        asked["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **asked).devices
    except Exception as error:  # jaxlib's, RuntimeError or its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        locked = "lockfile" in str(error)
        remedy = "another process is using libtpu, wait for it to end" if locked else "see libtpu's message"
        raise LcmError(f"libtpu gives no topology {topology} x {slices} ({reason}); {remedy}") from error
    if len(found) != slices * count:
        raise LcmError(f"libtpu gives {len(found)} devices for {slices} x {topology}, which has {count} chips")
    return list(found)


def with_batch(config: ConfigDict, images_per_device: int, devices: int) -> ConfigDict:
    """The config with so many images on each device, in each of the parts that a batch is taken in."""
    config = ConfigDict(config.to_dict())
    config.data.batch_size = images_per_device * devices * config.train.accumulation_steps
    return config


def fit(attempt: Callable[[int], tuple[float, float, Any]], say: Callable[[str], None]) -> tuple[int, Any]:
    """The largest number of images per device that is proved to fit, and what its attempt made.

    Memory is taken to be linear in the number: two attempts give the line, up to VERIFY more prove what it says.

    Args:
      attempt: images per device -> (bytes needed, bytes there are, result); raises DoesNotFit.

    Raises:
      DoesNotFit: not even one image fits.
    """

    def needed(images: int) -> tuple[float, float]:
        try:
            need, there_are, made = attempt(images)
        except DoesNotFit as error:
            say(f"{images} a device: {error.needed / roofline.GIB:.2f} GiB, does not fit")
            if images == 1:
                raise
            return error.needed, error.available
        say(f"{images} a device: {need / roofline.GIB:.2f} GiB, fits")
        best.append((images, made))
        return need, there_are

    best: list[tuple[int, Any]] = []
    points = {images: needed(images) for images in (1, 2)}
    for _ in range(VERIFY):
        (low, (low_need, there_are)), (high, (high_need, _)) = sorted(points.items())[-2:]
        slope = max((high_need - low_need) / (high - low), 1.0)
        guess = int(low + (there_are - low_need) / slope)
        smallest_bad = min([n for n, (need, limit) in points.items() if need > limit], default=None)
        guess = guess if smallest_bad is None else min(guess, smallest_bad - 1)
        if guess <= max(n for n, _ in best):
            break
        points[guess] = needed(guess)
    return max(best, key=lambda one: one[0])


def prepared(config: ConfigDict) -> ConfigDict:
    """The resolved config of a run on TPUs; where its pictures come from does not matter here, and need not be said."""
    config = ConfigDict(config.to_dict())
    config.data.source, config.data.path, config.data.mixture = "shapes", None, ()
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16"
    config_lib.validate(config)
    return config_lib.resolve(config)


def analyse(config: ConfigDict, devices: list[jax.Device], chip: chips.Chip, fitting: bool) -> dict[str, Any]:
    """The report of the config's step on these devices, see `report`, and the config."""
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.slices, devices)

    def attempt(config: ConfigDict) -> tuple[float, float, dict[str, Any]]:
        found = report(config, mesh, QUICK, chip) | {"config": json.loads(config_lib.to_json(config))}
        return found["memory"]["needed"], chip.hbm_bytes, found

    if fitting:
        return fit(lambda images: attempt(with_batch(config, images, mesh.size)), _say)[1]
    return attempt(config)[-1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    del argv
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles, and must not look for chips
    asked = flags.FLAGS

    def program() -> None:
        config = ConfigDict(asked.config.to_dict())
        if asked.slices is not None:
            config.mesh.slices = asked.slices
        config = prepared(config)
        chip, _ = chips.of_topology(asked.topology)
        found = analyse(config, devices_of(asked.topology, config.mesh.slices), chip, asked.fit)
        found = {"topology": asked.topology, "slices": config.mesh.slices} | found
        print(roofline.text(found), end="")
        if asked.out:
            with files.new_file(Path(asked.out)) as partial:
                partial.write_text(json.dumps(found, indent=2) + "\n")

    return exit_code(program)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, config_lib.flag_help("configs/sdxl_lcm.py"))
    flags.DEFINE_string("topology", None, "chips, as v5e:4x4 (16 of them)")
    flags.DEFINE_integer("slices", None, "so many of them in one pod; default: mesh.slices")
    flags.DEFINE_bool("fit", False, "look for the largest batch that fits")
    flags.DEFINE_string("out", None, "JSON file for the report")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=config_lib.parse_flags)
