"""One run on one device, on meshes of fake devices and in several processes: the same numbers, up to rounding.

float32, from latents and text that were encoded once. The gradient of the first step is read from Adam's first moment.
It is the difference of nearly equal numbers, student and target: on one device float32 has an error of 5e-5 (median of
the tensors) to 1.2e-4 (worst) against float64, with the teacher of an earlier world; with the present one two orders of
summing differ by 3e-5 (median) to 1.6e-4 (worst). The bounds are that error for the median, three times it for the
worst. At the config's learning rate such differences grow sevenfold a step from the 10th on; at a tenth they do not.
Adam's first updates are nearly the sign of the gradient, which is that of rounding where the gradient is 0. A larger
epsilon keeps such updates out of this comparison; one test measures them. That the programs compute the same is shown
in float64, in test_run_step.py.
"""

import runpy
import shutil

import numpy as np
import pytest
import training_processes as runs

from lcm_jax import precompute

pytestmark = pytest.mark.slow
STEPS = 20
GRADIENT = 5e-5, 3.6e-4  # relative L2, of the median tensor and of the worst
PARAMETER = 1e-6, 3.6e-4  # the worst starts at 0 (cond_proj), so it differs as gradients do
LOSS = 1e-4, 1e-4  # relative, of the median step and of the worst
ROUNDING = (3e-4, 2e-3), (1e-4, 1e-3)  # of losses and of parameters, if Adam amplifies rounding
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
    "--config.train.learning_rate=1e-4",
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


def run(workdir, *options, devices=1, processes=1):
    """The run to its end; the output of its first process."""
    return runs.ended(runs.start(f"--workdir={workdir}", *SHAPES, *options, devices=devices, processes=processes))[0]


def trained(folder, *options, devices=1, processes=1):
    """A workdir of the run, whose step was compiled once, with checkpoints of its first and last step."""
    workdir = folder / "run"
    output = run(workdir, *options, devices=devices, processes=processes)
    assert output.count("Finished XLA compilation of jit(step) ") == 1, output
    for step in range(2, STEPS):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def compare(workdir, base, step, *parts):
    """Relative L2 distance of each array of a checkpoint."""
    one, other = (runs.saved(folder, step, *parts) for folder in (base, workdir))

    def norm(x):
        return float(np.linalg.norm(x.ravel().astype(np.float64)))

    return {name: norm(other[name] - one[name]) / max(norm(one[name]), 1e-30) for name in one}


def check(what, distances, bounds):
    worst, median = max(distances, key=distances.get), float(np.median(list(distances.values())))
    print(f"{what}: {median:.1e} (median), {distances[worst]:.1e} ({worst})")
    assert median < bounds[0] and distances[worst] < bounds[1], (what, median, worst, distances[worst])


def check_end(workdir, base, loss=LOSS, parameter=PARAMETER):
    one, other = (np.array([loss for _, loss, _ in runs.logged(folder)]) for folder in (base, workdir))
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


def test_a_run_resumes_on_another_mesh_and_with_other_processes(base, cache, tmp_path):
    workdir = tmp_path / "run"
    run(workdir, *cache, "--config.train.steps=7", "--config.mesh.fsdp=4", devices=8)
    run(workdir, *cache, "--config.train.steps=13", devices=2, processes=2)
    run(workdir, *cache)
    print()
    check_end(workdir, base)


def test_encoding_in_chunks_and_on_a_mesh(tmp_path):
    """From images; the rounding of the latents comes on top."""
    base = trained(tmp_path / "base")
    for name, options, devices in (("chunks", ("--config.data.encode_chunk=2",), 1), ("mesh", FSDP, 8)):
        workdir = trained(tmp_path / name, *options, devices=devices)
        print(f"\nencoding, {name}")
        check_end(workdir, base)
