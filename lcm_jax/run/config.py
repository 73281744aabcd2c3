"""The configuration of a run: every key, its meaning and its default, and the check of its values.

A config file (`configs/*.py`) starts from `default_config()` and changes what it needs; the command line changes the
rest (`--config.train.steps=2000`). Keys are fixed: a key that is not below is an error wherever it is typed. Only the
programs read the config; library functions take plain arguments.

Inside, w is the paper's guidance weight (0 = no guidance); `sample.guidance_scale` is the user's w + 1.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from lcm_jax.data import images, shapes
from lcm_jax.diffusion import solvers
from lcm_jax.errors import LcmError
from lcm_jax.models import layers as remat
from lcm_jax.runtime import kernels as attention
from lcm_jax.runtime import workdir as workdir_lib

OBJECTIVES = ("lcd", "lcf")
SOURCES = {
    "shapes": "pictures rendered by code, with captions",
    "webdataset": "tar shards as img2dataset writes them",
    "huggingface": "a data set in parquet or save_to_disk form, or its hub id",
    "tfds": "a TensorFlow Datasets builder in array_record form",
    "folder": "images with metadata.jsonl, or a .txt beside each",
    "latents": "what lcm_jax.precompute wrote",
    "mixture": "several of them, in data.mixture",
}
LOSSES = ("huber", "l2")
DTYPES = ("float32", "bfloat16")
PREDICTION_TYPES = (None, "epsilon", "v_prediction", "sample")
W_EMBEDDING_OF_A_LORA = (
    "w-embedding student asked of a LoRA run: adapters cannot add inputs to a model that has no w embedding; set 0 "
    "(--config.distill.w_embedding_dim=0), or lora.rank = 0 to train the whole model"
)
MAX_SOLVER_STEPS = 1000  # the solver grid is a subset of the 1000 training timesteps
MAX_TWO_PASS_SCALE = 2.0  # guidance of a student without w embedding: above it pictures burn out


def default_config() -> ConfigDict:
    """All keys with their defaults: the published full fine-tune of a Stable Diffusion teacher, on embedded data."""
    config = ConfigDict()
    config.seed = 0  # root of every random draw: data order, noise, timesteps, w, initial weights
    config.objective = "lcd"  # "lcd": latent consistency distillation; "lcf": fine-tuning of an LCM, no teacher needed

    config.compilation_cache = ""  # folder that keeps compiled programs for later runs; "": JAX_COMPILATION_CACHE_DIR

    config.mesh = mesh = ConfigDict()  # slices * data * fsdp devices; one of data and fsdp may be -1: the rest
    mesh.slices = 1  # of a multi-slice TPU pod, joined by the data-centre network; only gradients cross it
    mesh.data = -1  # copies of the model in a slice
    mesh.fsdp = 1  # devices that hold one copy together: weights, optimiser, EMA and teacher are split over them

    config.model = model = ConfigDict()
    model.teacher = config_dict.placeholder(str)  # diffusers folder, hub id, FILE.safetensors, or "shapes" (our own)
    model.config = config_dict.placeholder(str)  # for FILE.safetensors: folder or hub id with tokenizers and configs
    model.student = config_dict.placeholder(str)  # what training starts from; None: the teacher. LCF: the LCM, needed
    model.vae = config_dict.placeholder(str)  # VAE in place of the teacher's (SDXL's for half precision): folder or id
    model.prediction_type = config_dict.placeholder(str)  # what the model must be found to predict; None: whatever
    model.dtype = "auto"  # compute dtype of the networks; "auto": bfloat16 on accelerators, float32 on CPU
    model.teacher_dtype = "float32"  # that the frozen weights are held in; "bfloat16": half the memory
    model.attention = "auto"  # "xla", "chunked" (little memory), "cudnn", "splash" (TPU); "auto": by device and shape

    config.data = data = ConfigDict()
    data.source = config_dict.placeholder(str)  # a key of SOURCES below
    data.path = config_dict.placeholder(str)  # where the source's files are: folder, pattern, name or hub id
    data.split = "train"  # of "huggingface", "tfds" and "shapes"
    data.image_key = config_dict.placeholder(str)  # column of the pictures; None: what the format calls it
    data.caption_key = config_dict.placeholder(str)  # column of the captions; None: what the format calls it
    data.width_key = "width"  # fields with a record's original size in pixels, as LAION's "original_width",
    data.height_key = "height"  # for filters, aspect buckets and SDXL; where they are missing: the picture's own
    data.index_dir = config_dict.placeholder(str)  # of "webdataset": where indices of shards go; None: beside them
    data.style = "plain"  # of "shapes": how the objects are drawn, a key of data.shapes.STYLES
    data.num_examples = 4096  # of "shapes": distinct pictures, an epoch
    data.mixture = ()  # of "mixture": parts "WEIGHT SOURCE PATH", as ("3 webdataset /a/{00..99}.tar", "1 folder /b")
    data.filters = ()  # records to use, as ("side >= 512", "aspect <= 2", "pwatermark <= 0.5 or missing")
    data.max_bad_fraction = 0.01  # share of unusable records above which a run stops
    data.batch_size = 32  # images per step over all devices and hosts
    data.resolution = 512  # side of the square training images in pixels, or of a square of the buckets' area
    data.aspect_buckets = False  # keep aspect ratios: a batch's pictures have one size of about resolution^2 pixels
    data.bucket_step = 64  # sides of buckets are multiples of this, in pixels
    data.bucket_max_aspect = 2.0  # longest to shortest side of a bucket
    data.crop = "random"  # "random" or "center", after the shorter side was resized
    data.flip = 0.0  # probability of a mirrored picture
    data.resize_filter = "lanczos"  # "lanczos", "bicubic", "bilinear", "box" (Pillow's); "area" (OpenCV's)
    data.decoder = "pillow"  # "pillow" (the reference) or "opencv" (faster, needs OpenCV)
    data.caption_dropout = 0.0  # probability that a caption is replaced by ""
    data.encode_chunk = 0  # pictures that a device encodes at a time, to save memory; 0: all of its batch
    data.encode = "step"  # pictures and captions are encoded each "step", or once at "start" and held in memory
    data.workers = 0  # processes that read and decode at every step; 0: threads of the training process

    config.train = train = ConfigDict()
    train.steps = 10_000  # length of the run; may be raised later on the same workdir
    train.learning_rate = 8e-6  # peak rate, after the warm-up and before the decay
    train.lr_warmup_steps = 0  # linear from 0 over the first steps
    train.lr_decay_start = 0  # first step of the decay (only with lr_decay_steps > 0)
    train.lr_decay_steps = 0  # linear to 0 over this many steps; 0: no decay; does not follow train.steps
    train.ema_decay = 0.95  # of the target: target = decay * target + (1 - decay) * student; 0: the student itself
    train.weight_decay = 0.0  # AdamW's decoupled decay, on every parameter
    train.adam_b1 = 0.9
    train.adam_b2 = 0.999
    train.adam_eps = 1e-8
    train.max_grad_norm = 1.0  # global norm to which gradients are clipped; 0: no clipping
    train.mu_dtype = "float32"  # of Adam's first moment; "bfloat16": half its memory
    train.remat = "none"  # activations made anew for gradients: "block" all, "attention" all but attention's outputs
    train.accumulation_steps = 1  # parts in which a batch goes through the networks; a step is one update all the same

    config.distill = distill = ConfigDict()
    distill.solver = "ddim"  # of the teacher's jump; "dpm_solver", "dpm_solver_pp": second order, asks it once more
    distill.solver_steps = 50  # points of the solver's grid; the skip k is 1000 // solver_steps
    distill.w_min = 2.0  # w is uniform in [w_min, w_max]
    distill.w_max = 14.0
    distill.loss = "huber"  # "huber" (pseudo-Huber) or "l2"
    distill.huber_c = 0.001  # pseudo-Huber's c: sqrt(d^2 + c^2) - c
    distill.w_embedding_dim = 256  # width of the embedding of w, the UNet's time_cond_proj_dim; 0: student without w
    distill.timestep_scaling = 10.0  # s in the boundary scalings, c_skip and c_out are functions of s * t
    distill.sigma_data = 0.5  # of the boundary scalings
    distill.lcd_weight = 0.0  # "lcf" only: weight of the LCD loss beside LCF's, which keeps guidance; needs a teacher

    config.lora = lora = ConfigDict()
    lora.rank = 0  # of the adapters, which alone are trained then (LCM-LoRA: 64); 0: train every weight
    lora.alpha = 64.0  # adapters are scaled by alpha / rank
    lora.targets = ()  # ends of the adapted layers' torch names, as ("to_q",); (): the LCM-LoRA report's 14

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 1000  # steps between checkpoints; the last step and a stop by signal save as well
    checkpoint.keep = 3  # newest checkpoints that stay on disk
    checkpoint.keep_every = 0  # checkpoints of steps that this divides stay, too; 0: none
    checkpoint.best = ""  # metric whose lowest value's checkpoint stays, too, as "loss"

    config.log = log = ConfigDict()
    log.every = 10  # steps between lines in metrics.jsonl and TensorBoard
    log.wandb = ""  # project on Weights & Biases that gets the same numbers; "": none
    log.spike = 0.0  # stop where the loss is so many times its running mean; 0: never

    config.sample = sample = ConfigDict()
    sample.every = 1000  # steps between sample grids; 0: none
    sample.steps = 4  # sampling steps of the grids
    sample.guidance_scale = 8.0  # w + 1 of the grids
    sample.prompts = ()  # captions of the grids, from noise that stays the same through the run
    return config.lock()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _as_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain dict as it comes back from JSON (tuples are lists)."""
    tree = config.to_dict() if isinstance(config, ConfigDict) else config
    return json.loads(json.dumps(tree))


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, keys sorted, the same text for the same values."""
    return json.dumps(_as_json(config), indent=2, sort_keys=True) + "\n"


def asks_teacher(config: ConfigDict) -> bool:
    """The loss has a guided teacher in it: always in LCD, in LCF only where it is mixed with LCD."""
    return config.objective == "lcd" or config.distill.lcd_weight > 0


def resolve(config: ConfigDict) -> ConfigDict:
    """Copy of `config` with what depends on other values filled in: `model.student`, `model.dtype`, `lora.targets`."""
    config = ConfigDict(config.to_dict())
    if config.model.student is None:
        config.model.student = config.model.teacher
    if config.model.dtype == "auto":
        import jax  # late: reading a config must not start a device

        config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if config.lora.rank and not config.lora.targets:
        from lcm_jax.models import lora

        config.lora.targets = lora.DEFAULT_TARGETS
    return config.lock()


def _check(key: str, value: Any, ok: bool, remedy: str) -> None:
    if not ok:
        raise LcmError(f"config.{key} = {value!r}: {remedy}")


def _check_keys_and_types(flat: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    unknown, missing = sorted(set(flat) - set(defaults)), sorted(set(defaults) - set(flat))
    if unknown:
        raise LcmError(
            f"config.{unknown[0]} = {flat[unknown[0]]!r}: unknown key; the keys are in lcm_jax/run/config.py"
        )
    if missing:
        raise LcmError(
            f"config.{missing[0]} is missing; begin the config file with lcm_jax.run.config.default_config()"
        )
    for key, value in flat.items():
        default = defaults[key]
        if default is None:  # placeholder(str)
            _check(key, value, value is None or isinstance(value, str), "must be a string or None")
        elif isinstance(default, tuple):
            _check(
                key,
                value,
                isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value),
                'must be a tuple of strings, as ("a red circle",)',
            )
        elif isinstance(default, float):
            _check(
                key,
                value,
                isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                "must be a finite number",
            )
        else:
            _check(key, value, type(value) is type(default), f"must be {type(default).__name__}")


def validate(config: ConfigDict, models: bool = True) -> None:
    """Checks keys, types and values. Raises LcmError that names the key, its value and what to do.

    models: that the objective has the models it needs is checked too.
    """
    flat, defaults = _flat(config.to_dict()), _flat(default_config().to_dict())
    _check_keys_and_types(flat, defaults)

    def check(key: str, ok: bool, remedy: str) -> None:
        _check(key, flat[key], ok, remedy)

    check(
        "data.source",
        flat["data.source"] is not None,
        f"no training data; set --config.data.source, to one of {', '.join(SOURCES)}, and --config.data.path",
    )
    for key, choices in {
        "objective": OBJECTIVES,
        "data.source": SOURCES,
        "distill.loss": LOSSES,
        "model.dtype": ("auto", *DTYPES),
        "model.teacher_dtype": DTYPES,
        "train.mu_dtype": DTYPES,
        "model.attention": attention.CHOICES,
        "train.remat": remat.CHOICES,
        "distill.solver": solvers.SOLVERS,
        "model.prediction_type": PREDICTION_TYPES,
    }.items():
        check(key, flat[key] in choices, f"must be one of {', '.join(map(str, choices))}")
    for key in (
        "data.batch_size",
        "data.resolution",
        "data.num_examples",
        "train.steps",
        "train.accumulation_steps",
        "checkpoint.every",
        "checkpoint.keep",
        "log.every",
        "mesh.slices",
    ):
        check(key, flat[key] >= 1, "must be at least 1")
    for key in (
        "train.lr_warmup_steps",
        "train.lr_decay_start",
        "train.lr_decay_steps",
        "train.weight_decay",
        "train.max_grad_norm",
        "distill.w_min",
        "distill.lcd_weight",
        "sample.every",
        "lora.rank",
        "data.encode_chunk",
        "checkpoint.keep_every",
        "log.spike",
    ):
        check(key, flat[key] >= 0, "must not be negative")
    for key in (
        "train.learning_rate",
        "train.adam_eps",
        "distill.huber_c",
        "distill.timestep_scaling",
        "distill.sigma_data",
        "lora.alpha",
    ):
        check(key, flat[key] > 0, "must be greater than 0")
    for key in ("train.ema_decay", "train.adam_b1", "train.adam_b2"):
        check(key, 0 <= flat[key] < 1, "must be in [0, 1)")

    for key in ("mesh.data", "mesh.fsdp"):
        check(key, flat[key] >= 1 or flat[key] == -1, "must be at least 1, or -1 for the rest of the devices")
    check("mesh.data", (flat["mesh.data"], flat["mesh.fsdp"]) != (-1, -1), "mesh.fsdp is -1 as well; give one of them")
    check("seed", 0 <= flat["seed"] < 2**32, "must be in [0, 2^32)")
    if models:
        _check_models(config, check)
    _check_data(config.data, check)
    check(
        "train.lr_decay_start",
        flat["train.lr_decay_steps"] == 0 or flat["train.lr_decay_start"] >= flat["train.lr_warmup_steps"],
        f"the decay would begin inside the warm-up of {flat['train.lr_warmup_steps']} steps (train.lr_warmup_steps)",
    )
    check(
        "train.accumulation_steps",
        flat["data.batch_size"] % flat["train.accumulation_steps"] == 0,
        f"must divide data.batch_size = {flat['data.batch_size']}",
    )
    check(
        "distill.solver_steps",
        1 <= flat["distill.solver_steps"] <= MAX_SOLVER_STEPS,
        f"must be in 1..{MAX_SOLVER_STEPS}",
    )
    check(
        "distill.w_max",
        flat["distill.w_max"] >= flat["distill.w_min"],
        f"must not be below distill.w_min = {flat['distill.w_min']!r}",
    )
    dim = flat["distill.w_embedding_dim"]
    check("distill.w_embedding_dim", dim == 0 or (dim >= 4 and dim % 2 == 0), "must be 0, or even and at least 4")
    check(
        "sample.steps",
        1 <= flat["sample.steps"] <= flat["distill.solver_steps"],
        f"must be in 1..distill.solver_steps = {flat['distill.solver_steps']}",
    )
    check("sample.guidance_scale", flat["sample.guidance_scale"] >= 1, "must be at least 1 (1 = no guidance, w = 0)")
    check(
        "sample.guidance_scale",
        dim > 0 or flat["sample.guidance_scale"] <= MAX_TWO_PASS_SCALE,
        "a student without w embedding (distill.w_embedding_dim = 0) is guided already; set 1 (one pass a step), or "
        f"up to {MAX_TWO_PASS_SCALE:g} (two passes)",
    )


def _check_data(data: ConfigDict, check: Callable[[str, bool, str], None]) -> None:
    """Which keys the source needs, and the choices of how pictures are made."""
    for key, choices in {"crop": ("random", "center"), "encode": ("step", "start"), "decoder": images.FILTERS}.items():
        check(f"data.{key}", data[key] in choices, f"must be one of {', '.join(choices)}")
    images.check_choice(data.decoder, data.resize_filter)
    for key in ("flip", "caption_dropout", "max_bad_fraction"):
        check(f"data.{key}", 0 <= data[key] <= 1, "must be in [0, 1]")
    check("data.workers", data.workers >= 0, "must not be negative")
    check("data.bucket_step", data.bucket_step >= 1, "must be at least 1")
    check("data.bucket_max_aspect", data.bucket_max_aspect >= 1, "must be at least 1")
    check("data.style", data.style in shapes.STYLES, f"must be one of {', '.join(shapes.STYLES)}")
    if data.source in ("shapes", "mixture"):
        check("data.path", data.path is None, f"data.source {data.source!r} has no files of its own; leave it None")
    else:
        check("data.path", bool(data.path), f"data.source {data.source!r} ({SOURCES[data.source]}) needs it")
    check(
        "data.mixture",
        bool(data.mixture) == (data.source == "mixture"),
        'goes with data.source "mixture", and only with it',
    )


def _check_models(config: ConfigDict, check: Callable[[str, bool, str], None]) -> None:
    """Which models the objective needs, and what of them can be trained."""
    model, distill = config.model, config.distill
    check(
        "distill.lcd_weight",
        config.objective == "lcf" or not distill.lcd_weight,
        'only objective "lcf" mixes two losses; set 0, or config.objective = "lcf"',
    )
    check(
        "distill.solver",
        distill.solver == "ddim" or asks_teacher(config),
        'no teacher jumps in plain LCF; leave it "ddim", or set distill.lcd_weight',
    )
    if asks_teacher(config):
        check(
            "model.teacher",
            bool(model.teacher),
            'no teacher; set --config.model.teacher to a model folder in diffusers format, a hub id, or "shapes"'
            + (" (distill.lcd_weight > 0 asks it)" if config.objective == "lcf" else ""),
        )
    for key in ("teacher", "student", "vae", "config"):
        check(f"model.{key}", model[key] != "", "must be a folder, a hub id, or None")
    check(
        "model.config",
        model.config is None or str(model.teacher).endswith(".safetensors"),
        f"goes with a single .safetensors file; model.teacher = {model.teacher!r} has its own, leave it None",
    )
    if config.objective == "lcf":
        check(
            "model.student",
            model.student is not None,
            "LCF fine-tunes a Latent Consistency Model; set it to that model's folder or hub id",
        )
    elif config.lora.rank and distill.w_embedding_dim and model.student in (None, model.teacher):
        check("distill.w_embedding_dim", False, W_EMBEDDING_OF_A_LORA)


# Change nothing that is trained, but for rounding.
MAY_DIFFER = (
    "compilation_cache",
    "train.steps",
    "train.remat",
    "train.accumulation_steps",
    "model.attention",
    "data.workers",
    "data.index_dir",
    "data.max_bad_fraction",
    "data.encode_chunk",
)
MAY_DIFFER_UNDER = ("mesh.", "checkpoint.", "log.")


def _may_differ(key: str) -> bool:
    return key in MAY_DIFFER or key.endswith(".every") or key.startswith(MAY_DIFFER_UNDER)


def differences(saved: Mapping[str, Any], config: ConfigDict | Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys in which a run that goes on must not differ from its beginning, but does.

    Args:
        saved: nested dict read from the workdir's config.json.
        config: the resolved config of the command at hand.

    Returns:
        {dotted key: (saved value, present value)}; a key that one side lacks has "<absent>" there. MAY_DIFFER, keys
        MAY_DIFFER_UNDER and the `*.every` keys are left out.
    """
    before, now = _flat(_as_json(saved)), _flat(_as_json(config))
    pairs = {key: (before.get(key, "<absent>"), now.get(key, "<absent>")) for key in sorted(before.keys() | now.keys())}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b and not _may_differ(key)}


def prepare_workdir(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """`workdir.prepare_workdir` for a resolved config: a run that resumes must agree with it, see `differences`."""
    workdir_lib.prepare_workdir(workdir, to_json(config), lambda saved: differences(saved, config))


def _one_line(error: BaseException) -> str:
    """Message of `error` without line breaks; ml_collections puts a repr inside a repr."""
    text = str(error.args[0]) if error.args else type(error).__name__
    text = text.replace("\\'", "'").replace('\\"', '"').replace("\\n", " ")
    return " ".join(text.strip("\"'").split())


def parse_flags(argv: list[str]) -> list[str]:
    """`flags_parser` for `absl.app.run`: any error on the command line is one line on stderr and exit code 2.

    Covers an unknown flag, an unknown config key, a value of the wrong type, a config file that is missing or broken,
    and stray words (usually a blank after `=`).
    """
    from absl import flags

    try:
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            value = flags.FLAGS[name].value
            if type(value).__name__ == "_ErrorConfig":  # config_flags postpones a missing file to the first access
                _ = value.seed
        if rest[1:]:
            raise LcmError(f"unexpected argument {rest[1]!r}; write options as --name=value without blanks")
        return rest
    except (flags.Error, LcmError, OSError, ImportError, SyntaxError) as error:
        message = _one_line(error) if not isinstance(error, OSError) else " ".join(str(error).split())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        given = [word for word in argv[1:] if word.startswith(("--config.", "-config."))]
        message = (
            f"config: {_one_line(error)} (given: {' '.join(given) or 'no overrides'}); "
            "the keys are in lcm_jax/run/config.py"
        )
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
