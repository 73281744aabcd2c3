"""One run on one device, on meshes of fake devices and in several processes: the same numbers, up to rounding.

float32, from latents and text that were encoded once. The gradient of the first step is read from Adam's first moment.
It is the difference of nearly equal numbers, student and target: on one device float32 takes it 5e-5 (median of the
tensors) to 1.2e-4 (worst) away from float64. So single tensors of two orders of rounding lie up to 1.1e-4 apart, and
the bound on the worst is three times float32's own error; the median is bound by what one would ask of all. Adam's
first updates are nearly the sign of the gradient, of rounding where there is nothing else. An epsilon of its own keeps
them out of this comparison; one test says what they make of it. That the programs compute the same is
shown in float64, in test_run_step.py.
"""

import runpy
import shutil

import numpy as np
import pytest
import training_processes as runs

from lcm_jax import precompute

pytestmark = pytest.mark.slow
STEPS = 20
GRADIENT = 1e-5, 3.6e-4  # relative L2, of the median tensor and of the worst
PARAMETER = 1e-4, 1e-4
LOSS = 1e-4, 1e-4  # relative, of the median step and of the worst
ROUNDING = (3e-4, 2e-3), (1e-4, 1e-3)  # of losses and of parameters, where Adam makes updates of rounding
SHAPES = (
    "--config=configs/shapes_lcm.py",
    f"--config.train.steps={STEPS}",
    "--config.data.num_examples=64",
    "--config.data.batch_size=8",
    "--config.data.workers=0",
    "--config.log.every=1",
    "--config.checkpoint.every=1",
    "--config.checkpoint.keep_every=1",
    "--config.sample.every=0",
    "--config.train.adam_eps=1e-3",
)
FSDP = ("--config.mesh.fsdp=4",)
CASES = {  # fake devices of each process, processes, options
    "data 2, fsdp 4": (8, 1, FSDP),
    "2 processes, fsdp 2": (2, 2, ("--config.mesh.fsdp=2",)),
    "data 8": (8, 1, ()),
    "fsdp 8": (8, 1, ("--config.mesh.fsdp=8",)),
    "2 slices, fsdp 2": (8, 1, ("--config.mesh.slices=2", "--config.mesh.fsdp=2")),
    "2 processes": (1, 2, ()),
    "4 processes, fsdp 4": (1, 4, FSDP),
    "block": (1, 1, ("--config.train.remat=block",)),
    "attention": (1, 1, ("--config.train.remat=attention",)),
    "chunked attention": (1, 1, ("--config.model.attention=chunked",)),
    "accumulation": (1, 1, ("--config.train.accumulation_steps=4",)),
    "everything": (2, 2, (*FSDP, "--config.train.remat=block", "--config.train.accumulation_steps=2")),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Options of a run on latents and text embeddings that are encoded already."""
    config = runpy.run_path(str(runs.ROOT / "configs" / "shapes_lcm.py"))["get_config"]()
    config.data.num_examples = 64
    folder = tmp_path_factory.mktemp("cache") / "latents"
    precompute.latents(config, folder, precompute.Options(text="embeddings"))
    return "--config.data.source=latents", f"--config.data.path={folder}"


@pytest.fixture(scope="module")
def base(cache, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("base"), *cache)


def trained(folder, *options, devices=1, processes=1):
    """A workdir of the run, whose step was compiled once, with checkpoints of its first and last step."""
    workdir = folder / "run"
    said = runs.run(workdir, *SHAPES, *options, devices=devices, processes=processes)
    assert said.count("Finished XLA compilation of jit(step) ") == 1, said
    for step in range(2, STEPS):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def compare(workdir, base, step, *parts):
    """Relative L2 distance of each array of a checkpoint."""
    one, other = (runs.saved(folder, step, *parts) for folder in (base, workdir))
    return {name: runs.relative(other[name], one[name]) for name in one}


def check(what, distances, bounds):
    """Raises AssertionError unless the median and the worst of the distances lie within the bounds."""
    worst, median = max(distances, key=distances.get), float(np.median(list(distances.values())))
    print(f"{what}: {median:.1e} (median), {distances[worst]:.1e} ({worst})")
    assert median < bounds[0] and distances[worst] < bounds[1], (what, median, worst, distances[worst])


def check_end(workdir, base, loss=LOSS, parameter=PARAMETER):
    one, other = (np.array(runs.losses(folder)) for folder in (base, workdir))
    assert len(one) == len(other) == STEPS
    check("losses", dict(enumerate(abs(other / one - 1), start=1)), loss)
    check("parameters", compare(workdir, base, STEPS, "params", "ema_params"), parameter)


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_on_one_device(case, base, cache, tmp_path):
    devices, processes, options = CASES[case]
    workdir = trained(tmp_path, *cache, *options, devices=devices, processes=processes)
    gradients = {name: far for name, far in compare(workdir, base, 1, "opt_state").items() if "/mu/" in name}
    assert len(gradients) > 100
    print(f"\n{case}")
    check("gradients", gradients, GRADIENT)
    check_end(workdir, base)


def test_with_the_epsilon_that_the_config_has(cache, tmp_path):
    options = *cache, "--config.train.adam_eps=1e-8"
    base = trained(tmp_path / "base", *options)
    print()
    check_end(trained(tmp_path / "mesh", *options, *FSDP, devices=8), base, *ROUNDING)


def test_goes_on_where_another_mesh_and_other_processes_stopped(base, cache, tmp_path):
    workdir = tmp_path / "run"
    runs.run(workdir, *SHAPES, *cache, "--config.train.steps=7", "--config.mesh.fsdp=4", devices=8)
    runs.run(workdir, *SHAPES, *cache, "--config.train.steps=13", devices=2, processes=2)
    runs.run(workdir, *SHAPES, *cache)
    print()
    check_end(workdir, base)


def test_encoding_in_chunks_and_on_a_mesh(tmp_path):
    """From pictures; the latents' own rounding comes on top."""
    base = trained(tmp_path / "base")
    for name, options, devices in (("chunks", ("--config.data.encode_chunk=2",), 1), ("mesh", FSDP, 8)):
        workdir = trained(tmp_path / name, *options, devices=devices)
        print(f"\nencoding, {name}")
        check_end(workdir, base)
