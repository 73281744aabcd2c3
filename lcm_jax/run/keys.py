"""The table of the config's keys: each with its default, its check and its meaning.

Inside, w is the paper's guidance weight (0 = no guidance); `sample.guidance_scale` is the user's w + 1.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection
from typing import Any

from lcm_jax.data import images, shapes
from lcm_jax.diffusion import solvers
from lcm_jax.distill import OBJECTIVES
from lcm_jax.distill.step import METRICS
from lcm_jax.errors import LcmError
from lcm_jax.models.layers import REMAT_CHOICES
from lcm_jax.runtime import kernels

SOURCES = {
    "shapes": "images rendered by code, with captions",
    "webdataset": "tar shards as img2dataset writes them",
    "huggingface": "a data set in parquet or save_to_disk form, or its hub id",
    "tfds": "a TensorFlow Datasets builder in array_record form",
    "folder": "images with metadata.jsonl or .csv, or a .txt, .caption or .json beside each",
    "latents": "what lcm_jax.precompute wrote",
    "mixture": "several of them, in data.mixture",
}
DTYPES = ("float32", "bfloat16")
W_EMBEDDING_OF_A_LORA = (
    "a LoRA run cannot train a student with a w embedding, because adapters cannot add an input to the base model; set "
    "0 (--config.distill.w_embedding_dim=0), or lora.rank = 0 to train the whole model"
)
MAPS = ("origin", "phased")
MAX_SOLVER_STEPS = 1000  # the solver grid is a subset of the 1000 training timesteps


@dataclasses.dataclass(frozen=True)
class Check:
    """A predicate on a key's value, and what the value "must be": the rest of the error, and the docs."""

    accepts: Callable[[Any], bool]
    must_be: str


def one_of(choices: Collection[str | None]) -> Check:
    return Check(lambda value: value in choices, f"one of {', '.join(str(c) or repr(c) for c in choices)}")


def between(low: float, high: float, note: str = "") -> Check:
    """The upper bounds are beyond any use, so that a slip of the keyboard ends before memory is taken for it."""
    return Check(lambda value: low <= value <= high, f"at least {low}{note}, at most {high}")


MOST_STEPS, MOST_IMAGES, MOST_PIXELS, MOST_DEVICES = 10**9, 10**6, 2**14, 2**20
STEPS, STEPS_OR_NEVER = between(1, MOST_STEPS), between(0, MOST_STEPS)
WIDTH = between(0, 2**14)
WEIGHT = between(0, 10**6)
SCALE = between(1e-9, 10**9)  # whose square float32 still holds
BOUNDARY = between(1e-6, 10**6)  # the range that the record of a model has for it (`pretrained.model.Constants`)
SHARE = Check(lambda value: 0 <= value <= 1, "in [0, 1]")
DECAY = Check(lambda value: 0 <= value < 1, "in [0, 1)")
MESH_AXIS = Check(
    lambda value: 1 <= value <= MOST_DEVICES or value == -1, f"at least 1, at most {MOST_DEVICES}, or -1 for the rest"
)
MODEL = Check(lambda value: value != "", "a folder, a hub id, or None")

# What the type of a key's default says of its values.
TYPES = {
    type(None): Check(lambda value: value is None or isinstance(value, str), "a string or None"),
    bool: Check(lambda value: type(value) is bool, "True or False"),
    int: Check(lambda value: type(value) is int, "an integer"),
    float: Check(lambda value: type(value) in (int, float) and abs(value) < math.inf, "a finite number"),
    str: Check(lambda value: type(value) is str, "a string"),
    tuple: Check(  # JSON makes a list of it
        lambda value: isinstance(value, tuple | list) and all(isinstance(part, str) for part in value),
        'a tuple of strings, as ("a", "b")',
    ),
}
MAY_CHANGE = True  # when a run resumes: such a key changes nothing that is trained, but for rounding
MODELS_FILE, DATA_FILE = "models.json", "data.json"  # of a workdir: digests of what the run began with


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
      name: dotted, as "train.steps".
      default: its type is the type of the key's values, see TYPES.
      check: what a value must be beyond that type; None: nothing more.
      meaning: one line.
      may_change: a resumed run may have another value than the run began with.
      place_of: of a path: the file of the workdir that records whether the same thing is at another place.
    """

    name: str
    default: Any
    check: Check | None
    meaning: str
    may_change: bool = False
    place_of: str = ""

    @property
    def section(self) -> str:
        """ "train" of "train.steps"; "" of a key of the run itself."""
        return self.name.rpartition(".")[0]

    def same(self, old: Any, new: Any) -> bool:
        """Whether two values, as JSON returns them, mean the same: paths that name one place do."""
        return old == new or (bool(self.place_of) and _place(self.name, old) == _place(self.name, new))

    def is_moved(self, old: Any, new: Any) -> bool:
        """Whether two values differ in nothing but where something is, so that it may be the same thing."""
        if self.name == "data.mixture":
            old, new = _place(self.name, old), _place(self.name, new)
            return isinstance(old, list) and [part[:-1] for part in old] == [part[:-1] for part in new]
        return bool(self.place_of) and isinstance(old, str) and isinstance(new, str)

    def validate(self, value: Any) -> None:
        """Raises LcmError unless `value` has the key's type and passes its check."""
        self.check_type(value)
        if self.check is not None and not self.check.accepts(value):
            raise refusal(self.name, value, f"must be {self.check.must_be}")

    def check_type(self, value: Any) -> None:
        """Raises LcmError unless `value` has the key's type."""
        if not (kind := TYPES[type(self.default)]).accepts(value):
            raise refusal(self.name, value, f"must be {kind.must_be}")

    def values(self) -> str:
        """What a value must be, in words."""
        kind = TYPES[type(self.default)].must_be
        if self.check is None:
            return kind
        return self.check.must_be if isinstance(self.default, str | None) else f"{kind}, {self.check.must_be}"


def _place(name: str, value: Any) -> Any:
    """A path without what does not matter: `~`, `./`, `..`, links, a slash at its end; of a mixture in each part,
    whose weights are numbers.

    What is no path (a hub id) or does not exist (a pattern, or what was moved) is treated alike.
    """
    if name == "data.mixture" and isinstance(value, list):
        words = [part.split(maxsplit=2) for part in value if isinstance(part, str)]
        return [(*map(_number, part[:1]), *part[1:2], *(_place("", path) for path in part[2:])) for part in words]
    try:
        return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) else value
    except ValueError:  # a character that no path has
        return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# The defaults are those of the published full fine-tune of a Stable Diffusion teacher.
KEYS = (
    Key(
        "seed",
        0,
        Check(lambda value: 0 <= value < 2**32, "in [0, 2^32)"),
        "root of all random numbers: data order, noise, timesteps, w, initial weights",
    ),
    Key("objective", "lcd", one_of(OBJECTIVES), "lcd: distil a teacher; lcf: fine-tune an LCM, without a teacher"),
    Key("compilation_cache", "", None, "folder for compiled programs; '': $JAX_COMPILATION_CACHE_DIR", MAY_CHANGE),
    Key(
        "mesh.slices",
        1,
        between(1, MOST_DEVICES),
        "slices of a multi-slice TPU pod, each of data * fsdp devices; only gradients cross between them",
        MAY_CHANGE,
    ),
    Key("mesh.data", -1, MESH_AXIS, "copies of the model in a slice", MAY_CHANGE),
    Key("mesh.fsdp", 1, MESH_AXIS, "devices that share one copy of weights, optimiser, EMA and teacher", MAY_CHANGE),
    Key(
        "model.teacher",
        None,
        MODEL,
        "diffusers folder, hub id, FILE.safetensors, or 'shapes' (the embedded one)",
        place_of=MODELS_FILE,
    ),
    Key(
        "model.config",
        None,
        MODEL,
        "for FILE.safetensors: folder or hub id with its tokenizers and configs",
        place_of=MODELS_FILE,
    ),
    Key(
        "model.student",
        None,
        MODEL,
        "what training starts from; None: the teacher; lcf needs it: the LCM",
        place_of=MODELS_FILE,
    ),
    Key("model.vae", None, MODEL, "VAE instead of the teacher's, as SDXL's for half precision", place_of=MODELS_FILE),
    Key(
        "model.variant",
        None,
        Check(lambda value: value != "", "a name such as fp16, or None"),
        "weight files to read, of every part that has this variant; None: those without a variant",
    ),
    Key(
        "model.prediction_type",
        None,
        one_of((None, "epsilon", "v_prediction", "sample")),
        "what the model's files must say that it predicts; None: anything",
    ),
    Key("model.dtype", "auto", one_of(("auto", *DTYPES)), "compute dtype; auto: float32 on CPU, bfloat16 elsewhere"),
    Key(
        "model.teacher_dtype",
        "auto",
        one_of(("auto", *DTYPES)),
        "dtype of the frozen weights (norms: float32); auto: float32 on CPU, model.dtype elsewhere",
    ),
    Key(
        "model.attention",
        "auto",
        one_of(kernels.CHOICES),
        "chunked: little memory; cudnn: GPUs; splash: TPUs; auto: by device and shape",
        MAY_CHANGE,
    ),
    Key("data.source", None, one_of((None, *SOURCES)), "kind of the training data; a run must name one"),
    Key("data.path", None, None, "where the source's files are: folder, pattern, name or hub id", place_of=DATA_FILE),
    Key("data.split", "train", None, "of huggingface, tfds and shapes"),
    Key("data.image_key", None, None, "column of the images; None: as the format calls it"),
    Key(
        "data.caption_key",
        None,
        None,
        "column of the captions, or suffix of files with them; None: as the format calls it",
    ),
    Key(
        "data.width_key",
        "width",
        None,
        "field with a record's original width in pixels, as LAION's original_width, for filters, aspect buckets and "
        "SDXL; a record without it: the image's own",
    ),
    Key("data.height_key", "height", None, "field with a record's original height in pixels, likewise"),
    Key("data.index_dir", None, None, "of webdataset: folder for indices of shards; None: beside them", MAY_CHANGE),
    Key("data.style", "plain", one_of(shapes.STYLES), "of shapes: how the objects are rendered"),
    Key("data.num_examples", 4096, between(1, 10**8), "of shapes: distinct images, an epoch"),
    Key(
        "data.mixture",
        (),
        None,
        'of mixture: parts "WEIGHT SOURCE PATH", as "3 webdataset /a/{00..99}.tar"',
        place_of=DATA_FILE,
    ),
    Key("data.filters", (), None, 'records to use, as "side >= 512", "aspect <= 2", "pwatermark <= 0.5 or missing"'),
    Key("data.max_bad_fraction", 0.01, SHARE, "share of unusable records above which a run stops", MAY_CHANGE),
    Key("data.batch_size", 32, between(1, MOST_IMAGES), "images per step over all devices and hosts"),
    Key(
        "data.resolution",
        512,
        between(1, MOST_PIXELS),
        "side in pixels of the square images, or of a square of the buckets' area",
    ),
    Key("data.aspect_buckets", False, None, "keep aspect ratios: all images of a batch have one size of that area"),
    Key("data.bucket_step", 64, between(1, MOST_PIXELS), "the sides of buckets are multiples of this, in pixels"),
    Key("data.bucket_max_aspect", 2.0, between(1, 100), "a bucket's longest to shortest side"),
    Key("data.crop", "random", one_of(("random", "center")), "of an image whose shorter side was resized"),
    Key("data.flip", 0.0, SHARE, "probability that an image is mirrored"),
    Key("data.resize_filter", "lanczos", None, "lanczos, bicubic, bilinear, box: Pillow's; area: OpenCV's"),
    Key("data.decoder", "pillow", one_of(images.FILTERS), "pillow: the reference; opencv: faster, needs OpenCV"),
    Key(
        "data.caption_dropout",
        0.0,
        SHARE,
        "probability that a caption is replaced by the model's null text: '', of SDXL zeros",
    ),
    Key(
        "data.encode_chunk",
        0,
        between(0, MOST_IMAGES),
        "images that a device encodes at a time; 0: all of its batch",
        MAY_CHANGE,
    ),
    Key("data.encode", "step", one_of(("step", "start")), "step: encode in each step; start: once, held in memory"),
    Key(
        "data.workers", 0, between(0, 1024), "processes that read and decode; 0: threads of the training's", MAY_CHANGE
    ),
    Key("train.steps", 10_000, STEPS, "length of the run; may be raised later on the same workdir", MAY_CHANGE),
    Key("train.learning_rate", 8e-6, between(1e-12, 10), "peak rate, after the warm-up and before the decay"),
    Key("train.lr_warmup_steps", 0, STEPS_OR_NEVER, "linear from 0 over the first steps"),
    Key("train.lr_decay_start", 0, STEPS_OR_NEVER, "first step of the decay, if lr_decay_steps > 0"),
    Key(
        "train.lr_decay_steps",
        0,
        STEPS_OR_NEVER,
        "linear to 0 in this many steps; 0: no decay; independent of train.steps",
    ),
    Key("train.ema_decay", 0.95, DECAY, "target = decay * target + (1 - decay) * student; 0: the student itself"),
    Key("train.weight_decay", 0.0, between(0, 1000), "AdamW's decoupled decay, on every parameter"),
    Key("train.adam_b1", 0.9, DECAY, "AdamW's decay of the first moment"),
    Key("train.adam_b2", 0.999, DECAY, "AdamW's decay of the second moment"),
    Key("train.adam_eps", 1e-8, between(1e-20, 1), "AdamW's epsilon"),
    Key("train.max_grad_norm", 1.0, between(0, 10**12), "global norm to which gradients are clipped; 0: no clipping"),
    Key("train.mu_dtype", "float32", one_of(DTYPES), "dtype of AdamW's first moment; bfloat16: half its memory"),
    Key(
        "train.remat",
        "none",
        one_of(REMAT_CHOICES),
        "activations recomputed for gradients; block: all; attention: all but attention's outputs",
        MAY_CHANGE,
    ),
    Key(
        "train.accumulation_steps",
        1,
        between(1, MOST_IMAGES),
        "parts in which a batch goes through the networks; a step is still one update",
        MAY_CHANGE,
    ),
    Key(
        "distill.solver",
        "ddim",
        one_of(solvers.SOLVERS),
        "of the teacher's jump; dpm_solver, dpm_solver_pp: second order, which evaluates the teacher twice",
    ),
    Key(
        "distill.solver_steps",
        50,
        between(1, MAX_SOLVER_STEPS),
        "points of the solver's grid; the skip k is 1000 // solver_steps",
    ),
    Key("distill.w_min", 2.0, between(0, 1000), "w is uniform in [w_min, w_max]"),
    Key("distill.w_max", 14.0, between(0, 1000), "w is uniform in [w_min, w_max]"),
    Key("distill.loss", "huber", one_of(("huber", "l2")), "distance of prediction and target; huber: pseudo-Huber"),
    Key("distill.huber_c", 0.001, SCALE, "pseudo-Huber's c: sqrt(d^2 + c^2) - c"),
    Key(
        "distill.w_embedding_dim",
        256,
        Check(
            lambda value: value == 0 or (4 <= value <= 2**14 and value % 2 == 0),
            f"0, or even and at least 4, at most {2**14}",
        ),
        "width of the embedding of w, the UNet's time_cond_proj_dim; 0: student without w",
    ),
    Key(
        "distill.map",
        "origin",
        one_of(MAPS),
        "where the student's step ends. origin: at the data (LCM); phased: at the edge of its phase (PCM)",
    ),
    Key(
        "distill.phases",
        4,
        between(1, MAX_SOLVER_STEPS),
        "of map phased: into how many parts the path is cut, for that many steps of the sampler",
    ),
    Key(
        "distill.stages",
        (),
        None,
        'of map phased: fewer phases later, "PHASES:STEP" from a step of training on, as ("2:4000", "1:6000")',
    ),
    Key("distill.timestep_scaling", 10.0, BOUNDARY, "s of the boundary scalings: c_skip and c_out depend on s * t"),
    Key("distill.sigma_data", 0.5, BOUNDARY, "of the boundary scalings"),
    Key("distill.lcd_weight", 0.0, WEIGHT, "of lcf: weight of an added LCD loss; keeps guidance, needs a teacher"),
    Key("lora.rank", 0, WIDTH, "of the adapters, which alone are trained then (LCM-LoRA: 64); 0: all weights"),
    Key("lora.alpha", 64.0, SCALE, "adapters are scaled by alpha / rank"),
    Key("lora.targets", (), None, "ends of the adapted layers' torch names, as \"to_q\"; (): the LCM-LoRA report's 14"),
    Key(
        "checkpoint.every",
        1000,
        STEPS,
        "steps between checkpoints; the last step, and a stop by signal, save one as well",
        MAY_CHANGE,
    ),
    Key("checkpoint.keep", 3, STEPS, "newest checkpoints that stay on disk", MAY_CHANGE),
    Key(
        "checkpoint.keep_every",
        0,
        STEPS_OR_NEVER,
        "checkpoints of steps that this divides also stay; 0: none",
        MAY_CHANGE,
    ),
    Key("checkpoint.best", "", one_of(("", *METRICS)), "metric whose lowest value's checkpoint also stays", MAY_CHANGE),
    Key("log.every", 10, STEPS, "steps between lines in metrics.jsonl and TensorBoard", MAY_CHANGE),
    Key("log.wandb", "", None, "project on Weights & Biases that gets the same numbers; '': none", MAY_CHANGE),
    Key("log.spike", 0.0, WEIGHT, "stop if the loss is this many times its running mean; 0: never", MAY_CHANGE),
    Key("sample.every", 1000, STEPS_OR_NEVER, "steps between sample grids; 0: none", MAY_CHANGE),
    Key("sample.steps", 4, between(1, MAX_SOLVER_STEPS), "sampling steps of the grids"),
    Key("sample.guidance_scale", 8.0, between(1, 1000, " (1 = no guidance, w = 0)"), "w + 1 of the grids"),
    Key("sample.prompts", (), None, "captions of the grids, whose noise stays the same through the run"),
)


def refusal(name: str, value: Any, remedy: str) -> LcmError:
    try:
        shown = repr(value)
    except ValueError:  # Python writes out no integers of thousands of digits
        shown = "a number of thousands of digits"
    return LcmError(f"config.{name} = {shown}: {remedy}")
