"""A published model in lcm_jax: fetched, checked against what it should be, sampled and timed.

Found of it are "facts", "wrong" (what is not as expected), "sampling" of each number of steps, "peak_bytes". The images
are those of torch's random numbers: OUT/images/NAME-STEPS.png as the programs make them, and for `theirs` in float32.
"""

import gc
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import constants, scan_cache_dir

import lcm_jax
from experiments.acceptance import cases
from experiments.acceptance.cases import PROMPT, SEED, Case
from experiments.acceptance.check import arguments
from experiments.speed.jax_side import peak_bytes, sampling_flops
from lcm_jax import sample
from lcm_jax.cost import chips
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import hub, is_single_file, load_pipeline, lora_files, names
from lcm_jax.pretrained.model import Pipeline
from lcm_jax.sampling import presets
from lcm_jax.sampling.flags import SMALLER
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.load import parse_lora
from lcm_jax.sampling.request import Request, make_request

REPEATS = 3  # of a call, after the one that compiles
GB = 1e9  # as downloads are counted


def main() -> None:
    case, out = arguments()
    found: dict[str, Any] = {}

    def keep(**more: Any) -> None:
        found.update(more)
        cases.keep(out, case.name, found)

    check_space(case)
    if case.refuses:
        keep(refused=refusal(case))
        return
    begun = time.perf_counter()
    pipeline, shapes, facts = look(case)
    keep(facts=facts, look_s=round(time.perf_counter() - begun, 1), files=local_files(case))
    keep(wrong=differences(case, facts), sampling=[])
    if not case.steps:
        return

    model = loaded(case, "auto")
    keep(dtype=model.dtype)
    images = {}
    for steps in case.steps:
        one, images[steps] = timed(case, model, steps)
        found["sampling"].append(one | utilisation(pipeline, shapes, request_of(case, pipeline, steps), one["seconds"]))
        keep(peak_bytes=peak_bytes())
        path = out / "images" / f"{case.name}-{steps}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[steps].save(path)
    if model.dtype != "float32" and not case.without_diffusers:  # what other programs' numbers can be held to
        del model
        try:
            images = in_float32(case)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            keep(diffusers={"skipped": "in float32 it does not fit this device"})
            return
    arrays = {str(steps): np.asarray(image) for steps, image in images.items()}
    np.savez(cases.path_of(out, case.name).with_suffix(".npz"), **arrays)


def check_space(case: Case) -> None:
    """Raises LcmError if the hub's cache has no room for what is not in it yet."""
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    cached = {repo.repo_id: repo.size_on_disk for repo in scan_cache_dir(cache).repos}
    # Of a model_config only small files are read, whatever else of its repository is there.
    weights = [*filter(None, (case.model, case.unet, case.vae)), *(parse_lora(one)[0] for one in case.lora)]
    there = sum(size for name, size in cached.items() if any(f"{one}/".startswith(f"{name}/") for one in weights))
    needed, free = case.gigabytes * GB - there, shutil.disk_usage(cache).free
    if needed > free:
        raise LcmError(
            f"{needed / GB:.1f} GB are to be downloaded, and {free / GB:.1f} GB are free at {cache}; make room, or set "
            "HF_HOME to a folder on another disk"
        )


def options(case: Case) -> dict[str, Any]:
    """How `load_pipeline` and `lcm_jax.load` both name the parts of a row."""
    return {"variant": case.variant, "unet": case.unet, "vae": case.vae}


def refusal(case: Case) -> str:
    """The error with which a row is refused. Raises LcmError: it is another one, or there is none."""
    try:
        loaded(case, "auto")
    except LcmError as error:
        if case.refuses in str(error):
            return str(error)
        raise LcmError(f"it was to be refused because of {case.refuses!r}, but: {error}") from None
    raise LcmError(f"it was to be refused because of {case.refuses!r}, but it can be loaded")


def look(case: Case) -> tuple[Pipeline, Any, dict[str, Any]]:
    """(pipeline, shapes of its parameters, facts) after all weights have been read once: a key that is missing, left
    over or of another shape, and a number that is not finite, raise LcmError."""
    bad = []

    def shape(value: np.ndarray) -> jax.ShapeDtypeStruct:
        bad.extend([value.shape] if not np.isfinite(np.asarray(value, np.float32)).all() else [])
        return jax.ShapeDtypeStruct(value.shape, value.dtype)

    read = {**options(case), "config": case.model_config, "param_dtype": None, "put": shape}
    pipeline, shapes = load_pipeline(case.model, **read)
    if bad:
        raise LcmError(f"{len(bad)} weights have values that are not finite; the files are broken, fetch them again")
    facts: dict[str, Any] = {"unet.time_cond_proj_dim": pipeline.unet.time_cond_proj_dim}
    for part, module in pipeline.parts.items():
        facts |= {f"{part}.parameters": names.num_params(module), f"{part}.keys": len(names.torch_table(module))}
    facts |= {"vae.scaling_factor": pipeline.vae.scaling_factor}
    facts |= {"prediction_type": pipeline.schedule.prediction_type, "sampler": pipeline.default_sampler}
    facts |= {"final_alpha": float(pipeline.schedule.alphas_cumprod[-1]), "default_size": list(pipeline.default_size)}
    facts |= {key: getattr(pipeline.constants, key) for key in ("solver_steps", "timestep_scaling", "set_alpha_to_one")}
    for source in case.lora[:1]:  # the one that the row is about
        lora = lora_files.read_lora(parse_lora(source)[0], lora_files.modules_of(pipeline))
        layers = [one for of_part in lora.parts.values() for one in of_part.values()]
        facts |= {
            "lora.layers": len(layers),
            "lora.parameters": sum(one.lora_A.size + one.lora_B.size for one in layers),
            "lora.ranks": sorted({one.rank for one in layers}),
            "lora.alphas": sorted({one.alpha for one in layers if one.alpha is not None}),
        }
    return pipeline, shapes, facts


def differences(case: Case, facts: dict[str, Any]) -> list[str]:
    """What a row expects, and has otherwise."""
    return [
        f"{name} is {facts.get(name)}, not {value}" for name, value in case.expects.items() if facts.get(name) != value
    ]


def local_files(case: Case) -> dict[str, Any]:
    """Where the parts are in the hub's cache."""

    def place(source: str, file: str) -> str:
        return str(hub.local_file(source) if is_single_file(source) else hub.local_folder(source, [file]))

    found = {"model": place(case.model, "model_index.json")}
    for part, file in (("unet", "config.json"), ("vae", "config.json"), ("model_config", "model_index.json")):
        if source := getattr(case, part):
            found[part] = place(source, file)
    loras = [parse_lora(source) for source in weighted(case)]
    return found | {"lora": [[str(lora_files.locate(source)), weight] for source, weight in loras]}


def weighted(case: Case) -> list[str]:
    return presets.weighted(case.preset, case.lora) if case.preset else list(case.lora)


def loaded(case: Case, dtype: str) -> Generator:
    return lcm_jax.load(case.model, loras=weighted(case), model_config=case.model_config, dtype=dtype, **options(case))


def request_of(case: Case, pipeline: Pipeline, steps: int) -> Request:
    """What a row asks for in so many steps."""
    return make_request(pipeline, **asked(case, steps))


def asked(case: Case, steps: int) -> dict[str, Any]:
    """Arguments of a model's call."""
    found: dict[str, Any] = {"steps": steps, "noise": "torch"}
    if case.preset:
        args = sample.parser().parse_args([*presets.words(case.preset, steps), "--model=.", "--out=."])
        found |= {key: getattr(args, key) for key in ("sampler", "gamma", "timesteps", "guidance_scale")}
    found |= {key: value for key in ("sampler", "guidance_scale") if (value := getattr(case, key)) is not None}
    return found | ({"height": case.size, "width": case.size} if case.size else {})


def generated(case: Case, model: Generator, steps: int) -> Any:
    """The image, a Pillow one."""
    return model(PROMPT, seed=SEED, **asked(case, steps))[0]


def timed(case: Case, model: Generator, steps: int) -> tuple[dict[str, Any], Any]:
    """(what was asked and how long it took, the image)."""
    seconds = []
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        image = generated(case, model, steps)
        seconds.append(time.perf_counter() - begun)
    request = request_of(case, model.pipeline, steps)
    settings = request.settings
    return {
        "steps": steps,
        "sampler": settings.sampler,
        "gamma": settings.gamma,
        "timesteps": list(settings.timesteps),
        "guidance_scale": request.guidance_scale,
        "size": [request.height, request.width],
        "first_s": seconds[0],
        "seconds": statistics.median(seconds[1:]),
    }, image


def in_float32(case: Case) -> dict[int, Any]:
    """Number of steps -> image."""
    gc.collect()  # the model in 16 bits
    model = loaded(case, "float32")
    with jax.default_matmul_precision("highest"):
        return {steps: generated(case, model, steps) for steps in case.steps}


def utilisation(pipeline: Pipeline, shapes: Any, request: Request, seconds: float) -> dict[str, float]:
    """FLOPs of the image, and their share of what the device could do in that time, if that is known."""
    size = (request.height, request.width)
    flops = sampling_flops(pipeline, shapes, request.settings, request.guidance_scale, size, 1)
    chip = chips.lookup(jax.devices()[0].device_kind)
    return {"flops": flops} | ({"utilisation": flops / seconds / chip.peak_flops} if chip else {})


if __name__ == "__main__":
    sys.exit(exit_code(main, smaller=SMALLER))
