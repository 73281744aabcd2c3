"""Where other programs put what `lcm_jax.export` writes, and the settings that they need for it: one table.

The model cards' recipes come from it, and docs/clients.md, which `python -m lcm_jax.run.clients` writes. Timesteps that
it promises are computed in tests/test_clients.py; the rest was measured with the versions that `Program.tried` names,
or read in their source.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence

from lcm_jax.pretrained.lora_files import FILE_NAME
from lcm_jax.pretrained.single_file import SD2_GUESS, SD2_LARGEST_OF_EPSILON

LCM, PHASED = "lcm", "phased"  # the map from every t to t = 0; to the edge of its phase
MAPS = {  # what has it, and in how many steps
    LCM: ("an LCM or an LCM-LoRA", "4 to 8 steps"),
    PHASED: ("a model or a LoRA of a phased map", "as many steps as it has phases"),
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FOLDER, FILE, KOHYA, PEFT = "folder", "single-file", "lora-kohya", "lora-peft"
KINDS = {
    FOLDER: "`pipeline`, `merged`",
    FILE: "`single-file`",
    KOHYA: "`lora-kohya`",
    PEFT: "`lora-peft`",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, as its users know it.

    Attributes:
      name: of the program. tried: its version, and what was done with it.
      takes: kind of export -> where it goes; it cannot use the others.
      settings: (map, prediction type) -> what to set, or why it cannot sample such a model.
      other_grid: like settings, for a model whose solver grid has not 50 timesteps, where they differ.
      wrong: kind of export -> what goes wrong with one that it cannot use.
    """

    name: str
    tried: str
    takes: Mapping[str, str]
    settings: Mapping[tuple[str, str], str]
    other_grid: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Export:
    """What of an export matters to other programs.

    Attributes:
      kind: one of KINDS. family: of its single file ("sd1", "sd2", "sdxl", "sdxl-refiner"); "" for other kinds.
      prediction_type, zero_snr: of its noise table.
      pruned: whether its UNet has other layers than the family's published one.
      has_w: whether it has a w embedding.
      constants: solver_steps, timestep_scaling, sigma_data.
      map: one of MAPS.
    """

    kind: str
    prediction_type: str
    family: str = ""
    zero_snr: bool = False
    pruned: bool = False
    has_w: bool = False
    constants: tuple[float, float, float] = (50, 10.0, 0.5)
    map: str = LCM


@dataclasses.dataclass(frozen=True)
class Note:
    """A line for those exports that it concerns."""

    about: str
    concerns: Callable[[Export], bool]
    text: str


def _same(text: str, kinds: Sequence[str] = ("epsilon", "v_prediction"), of: str = LCM) -> dict[tuple[str, str], str]:
    """Settings of a map that do not depend on the prediction type."""
    return {(of, kind): text for kind in kinds}


_NO_SAMPLE = {(of, "sample"): "cannot: has no such prediction type" for of in (LCM, PHASED)}
_WEB_UI = {
    FILE: "`models/Stable-diffusion`",
    KOHYA: "`models/Lora`, and `<lora:{stem}:1>` in the prompt",
}
_WEB_UI_SETTINGS = "sampling method `LCM`, schedule type `Simple`, CFG scale 1"
_SAMPLER = "KSampler: sampler `lcm`, scheduler `simple`, CFG 1"
_EULER = "KSampler: sampler `euler`, scheduler `simple`, CFG 1"
_EULER_SETTINGS = _same("sampling method `Euler`, schedule type `Simple`, CFG scale 1", of=PHASED)
_UNKNOWN_KEYS = "not loaded: it recognises none of the keys"
PROGRAMS = (
    Program(
        "ComfyUI",
        "0.3.64, its engine on CPUs: loads, generates, merges LoRAs, saves; LoRA keys also with 0.8.0",
        {FILE: "`models/checkpoints`", KOHYA: "`models/loras`, strength 1"},
        {
            (LCM, "epsilon"): f"node `ModelSamplingDiscrete` with `lcm`; {_SAMPLER}",
            (LCM, "v_prediction"): f"no node `ModelSamplingDiscrete` with `lcm` (it assumes epsilon); {_SAMPLER}",
            (LCM, "sample"): f"node `ModelSamplingDiscrete` with `x0`; {_SAMPLER}",
            (PHASED, "epsilon"): f"node `ModelSamplingDiscrete` with `lcm`; {_EULER}",
            (PHASED, "v_prediction"): f"no node `ModelSamplingDiscrete` with `lcm`; {_EULER}",
            (PHASED, "sample"): f"node `ModelSamplingDiscrete` with `x0`; {_EULER}",
        },
        {
            (LCM, "epsilon"): f"no node `ModelSamplingDiscrete` with `lcm`; {_SAMPLER}",
            (PHASED, "epsilon"): f"no node `ModelSamplingDiscrete` with `lcm`; {_EULER}",
        },
        {PEFT: "half a LoRA: it skips every attention projection (a line each in its log) and ignores alpha"},
    ),
    Program(
        "A1111",
        "1.10.1: its table of LoRA names and its model classes; samplers and schedules by reading its source",
        _WEB_UI,
        {
            (LCM, "epsilon"): _WEB_UI_SETTINGS + ". `Automatic` needs one step more: its last, at t = 19, does little",
            (LCM, "v_prediction"): "cannot: its sampler `LCM` assumes epsilon",
            **_EULER_SETTINGS,
            **_NO_SAMPLE,
        },
        wrong={PEFT: _UNKNOWN_KEYS},
    ),
    Program(
        "Forge",
        "dfdcbab (2025): by reading its source",
        _WEB_UI,
        _same(_WEB_UI_SETTINGS) | _EULER_SETTINGS | _NO_SAMPLE,
        wrong={PEFT: "the same as in ComfyUI, whose reader it uses"},
    ),
    Program(
        "stable-diffusion.cpp",
        "master-612-d7ecbe1 (PyPI `cyllama` 0.2.18): loads, applies LoRAs, generates: `make test-clients`",
        {FILE: "`--model`", KOHYA: "`--lora-model-dir` is its folder, and `<lora:{stem}:1>` in the prompt"},
        _same("`--sampling-method lcm --scheduler lcm --cfg-scale 1`")
        | _same("`--sampling-method euler --scheduler lcm --cfg-scale 1`", of=PHASED)
        | _NO_SAMPLE,
        _same("`--sampling-method lcm --scheduler simple --cfg-scale 1`")
        | _same("`--sampling-method euler --scheduler simple --cfg-scale 1`", of=PHASED),
        {PEFT: "all layers, but it ignores alpha: right only if alpha is the rank"},
    ),
    Program(
        "InvokeAI",
        "6.14.2: identifies single files and LoRAs, finds every layer of a LoRA; no image was generated",
        {FOLDER: "model manager", FILE: "model manager", KOHYA: "model manager"},
        _same("scheduler `LCM`, CFG scale 1") | _same("scheduler `TCD`, CFG scale 1", of=PHASED) | _NO_SAMPLE,
        wrong={PEFT: _UNKNOWN_KEYS},
    ),
    Program(
        "diffusers",
        "0.42.1: the reference of the tests, and of `lcm_jax.export --verify`",
        dict.fromkeys(KINDS, "the model card's code"),
        _same("`LCMScheduler`, as in the model card's code", PREDICTION_TYPES)
        | _same("`TCDScheduler`, as in the model card's code", PREDICTION_TYPES, PHASED),
    ),
)


def _single(export: Export, *families: str) -> bool:
    return export.kind == FILE and export.family in families


# (program and settings) -> 4 steps: t of the noise levels, t that the UNet receives (tests/test_clients.py).
TIMESTEPS = {
    "lcm_jax, diffusers, stable-diffusion.cpp": ((999, 759, 499, 259),) * 2,
    "ComfyUI, node with `lcm`, `simple`; A1111 and Forge, `Simple`": ((999, 759, 499, 259),) * 2,
    "ComfyUI without the node, `simple`": ((999, 749, 499, 249),) * 2,
    "ComfyUI without the node, `sgm_uniform`": ((999, 749.3, 499.5, 249.8), (999, 749, 500, 250)),
    "ComfyUI, node with `lcm`, `sgm_uniform`": ((999, 754.1, 509, 263.9), (999, 759, 519, 259)),
    "ComfyUI, node with `lcm`, `normal`; A1111, `Automatic`": ((999, 672.4, 345.6, 19), (999, 679, 339, 19)),
    "ComfyUI without the node, `normal`": ((999, 666, 333, 0),) * 2,
}

NOTES = (
    Note(
        "phased map",
        lambda one: one.map == PHASED,
        "Sample in as many steps as the map has phases, without added noise; anything else blurs the image. `euler` is "
        "right because it is DDIM along the timesteps; it ends at sigma = 0 instead of the last edge, which changes "
        "little. These settings were computed from the programs' timesteps; only diffusers' were tried.",
    ),
    Note(
        "phased map, on a grid of 50 timesteps, A1111 and Forge",
        lambda one: one.map == PHASED and one.constants[0] == 50,
        "`Euler` takes 749, 499, 249 where this model has 759, 499, 259. A map that was trained on a grid of 40 "
        "timesteps (`distill.solver_steps=40`) has exactly those.",
    ),
    Note(
        "SD 2.x, single file",
        lambda one: _single(one, "sd2"),
        "The file does not say whether the model predicts epsilon or v. ComfyUI and Forge guess v if the standard "
        f"deviation of `{SD2_GUESS}` exceeds {SD2_LARGEST_OF_EPSILON} (the export warns of a wrong guess; ComfyUI's "
        "node `ModelSamplingDiscrete` overrules it: `lcm` or `eps` for epsilon, `v_prediction` for v). A1111 and "
        "stable-diffusion.cpp try the UNet once (overruled by `NAME.yaml` beside the file, and by `--prediction`). "
        "InvokeAI and diffusers assume v (InvokeAI: set it in the model manager, or load the folder; diffusers: the "
        "model card's code sets the type, and names configs in place of those that are gone from the hub).",
    ),
    Note(
        "SD 2.x, single file",
        lambda one: _single(one, "sd2"),
        "ComfyUI logs `clip missing`: layer 24 of the text encoder, which SD 2.x does not use. It matters only with a "
        "node `CLIP Set Last Layer` at -1.",
    ),
    Note(
        "SD 1.x that does not predict epsilon, single file",
        lambda one: _single(one, "sd1") and one.prediction_type != "epsilon",
        "Every program takes SD 1.x for epsilon. Overrule it: ComfyUI by the node `ModelSamplingDiscrete` with "
        "`v_prediction` (or `x0`), stable-diffusion.cpp by `--prediction v`, Forge by `NAME.yaml` beside the file, "
        "InvokeAI in the model manager.",
    ),
    Note(
        "SDXL that does not predict epsilon, single file",
        lambda one: _single(one, "sdxl", "sdxl-refiner") and one.prediction_type != "epsilon",
        "InvokeAI and diffusers take every SDXL file for epsilon (InvokeAI: set it in the model manager, or load the "
        "folder; diffusers: the model card's code sets the type); the others find the key `v_pred`.",
    ),
    Note(
        "zero terminal SNR, SD 1.x and 2.x, single file",
        lambda one: _single(one, "sd1", "sd2") and one.zero_snr,
        "ComfyUI: node `ModelSamplingDiscrete` with `v_prediction` and `zsnr`; the key `ztsnr` is read in SDXL alone.",
    ),
    Note(
        "pruned SD 1.x (small-sd, tiny-sd), single file",
        lambda one: _single(one, "sd1") and one.pruned,
        "stable-diffusion.cpp and InvokeAI do not take it (an unknown UNet, or blocks numbered differently); ComfyUI "
        "does.",
    ),
    Note(
        "pruned (small-sd, tiny-sd, SSD-1B, Vega), single file",
        lambda one: one.kind == FILE and one.pruned,
        "diffusers mistakes it for the unpruned model: pass `from_single_file` a `config=`, the folder or hub id of "
        "the model that it was distilled from.",
    ),
    Note(
        "distilled on another grid than 50 timesteps",
        lambda one: one.constants[0] != 50,
        "A1111, Forge, ComfyUI's node with `lcm` and stable-diffusion.cpp's scheduler `lcm` have a grid of 50 "
        "timesteps, unlike this model. ComfyUI without that node and stable-diffusion.cpp with `--scheduler simple` "
        "take the timesteps of training if the number of steps divides the grid's, and that divides 1000.",
    ),
    Note(
        "other boundary scalings than timestep_scaling 10, sigma_data 0.5",
        lambda one: one.constants[1:] != (10.0, 0.5),
        "Other programs use timestep_scaling 10 and sigma_data 0.5, or no boundary scalings, which is nearly the same. "
        "This model was trained with others; sample it with lcm_jax.",
    ),
)
W_EMBEDDING = (
    "Other programs do not know the w embedding: export a single file for them with `--guidance_scale`, which folds "
    "one scale in"
)
INSTEAD = {  # for the programs that cannot use this kind
    FOLDER: "The other programs take a single file: export with `--format=single-file`.",
    PEFT: "This file is for diffusers; for other programs export with `--format=lora-kohya`. What they make of this "
    "one:",
}

READING = (
    (
        'Captions with "!", SD 2.x and SDXL',
        'the pad token is "!", so transformers, diffusers and lcm_jax (in training, too) read "at night!" with a pad '
        "at its end, where ComfyUI, A1111 and the original OpenCLIP read the letter: images of such captions differ.",
    ),
)
MEASURED = (
    "stable-diffusion.cpp and lcm_jax (`make test-clients`): images of SD 1.5's single file differ by at most "
    "0.67/255, 0.23/255 on average (rounding to bytes alone gives 0.5 and 0.25), and by as much with a LoRA, of which "
    "it applies all 834 tensors; that changes the image by 20/255 on average. `lora-peft` gives the same image.",
    "LyCORIS 4.1.3 (`make test-clients`): its LoCon files for UNet and text encoder, also rank-stabilized or with a "
    "scalar, give the change that LyCORIS computes to 2e-7 of its largest; norms and whole matrices are read "
    "as they are; DoRA, LoHa, LoKr and OFT are refused by name.",
    "ComfyUI and lcm_jax (by hand, from the same noise): images of SD 1.5, SD 2.1, Vega and tiny-sd differ by 2e-6 to "
    "3e-6 of 1; a LoRA of SD 1.5 is merged bit for bit; what it saves is read back unchanged.",
    "kohya sd-scripts 48d368f (by hand): every key of its LoRAs of SD 1.5, SD 2.1 and SDXL is read, B A bit for bit.",
)


def recipe(export: Export, stem: str) -> str:
    """Markdown for a model card: settings for every program but diffusers, whose code the card has.

    stem: name of the export without suffix.
    """
    if export.has_w:
        return f"{W_EMBEDDING}."

    def settings(program: Program) -> dict[tuple[str, str], str]:
        return {**program.settings, **(program.other_grid if export.constants[0] != 50 else {})}

    model = export.map, export.prediction_type
    rows = [
        f"| {one.name} | {one.takes[export.kind].format(stem=stem)} | {settings(one)[model]} |"
        for one in PROGRAMS[:-1]
        if export.kind in one.takes
    ]
    copy = f" (copy `{FILE_NAME}` as `{stem}.safetensors`)" if export.kind == KOHYA else ""
    table = [
        f"Settings, in {MAPS[export.map][1]}{copy}:",
        "",
        "| program | file | settings |",
        "|---|---|---|",
        *rows,
        "",
    ]
    notes = [f"- {note.text}" for note in NOTES if note.concerns(export)]
    notes += [f"- {INSTEAD[export.kind]}"] if export.kind in INSTEAD else []
    notes += [f"- {one.name}: {one.wrong[export.kind]}." for one in PROGRAMS if export.kind in one.wrong]
    return "\n".join([*(table if rows else []), *notes])


def markdown() -> str:
    """docs/clients.md."""

    def table(*rows: Sequence[str]) -> list[str]:
        return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]

    def cell(program: Program, kind: str) -> str:
        wrong = program.wrong.get(kind)
        return program.takes[kind].format(stem="NAME") if kind in program.takes else f"no; {wrong}" if wrong else "no"

    def short(cells: Sequence[str]) -> list[str]:
        first, *others = cells
        return [first, *("the same" if cell == first else cell for cell in others)]

    def item(text: str) -> str:
        return textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)

    def listed(values: Sequence[float]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    lines = [
        "# Other programs",
        "",
        "Where an export goes in other programs, and what to set there. The model card of an export has the lines for",
        "that model; [export.md](export.md#in-other-programs) has ComfyUI workflows with these settings.",
        "",
        "## Which export goes where",
        "",
        *table(["program", *KINDS.values()], *([one.name, *(cell(one, kind) for kind in KINDS)] for one in PROGRAMS)),
        "",
        f"{W_EMBEDDING}. The format `unet` is for diffusers alone.",
    ]
    for which, (what, steps) in MAPS.items():
        rows = [[one.name, *short([one.settings[which, kind] for kind in PREDICTION_TYPES])] for one in PROGRAMS]
        lines += ["", f"## Settings for {what}, in {steps}", "", *table(["program", *PREDICTION_TYPES], *rows)]
    timesteps = [[name, *map(listed, pair)] for name, pair in TIMESTEPS.items()]
    lines += [
        "",
        "At CFG 1 a step is one pass; up to 2 a second pass takes a negative prompt; above 2 images are oversaturated.",
        "",
        "## The timesteps behind the settings",
        "",
        "In 4 steps; the first two rows are the timesteps of training, for every number of steps:",
        "",
        *table(["settings", "noise level at t", "t that the UNet receives"], *timesteps),
        "",
        "## Notes on models",
        "",
        *(item(f"**{about}**: {text}") for about, text in [*((one.about, one.text) for one in NOTES), *READING]),
        "",
        "## What was run",
        "",
        *table(["program", "version, and what was run"], *([one.name, one.tried] for one in PROGRAMS)),
        "",
        "On CPUs in float32, with random weights of full width, 4 steps, 64 pixels:",
        "",
        *(item(text) for text in MEASURED),
        "",
        "`python -m lcm_jax.run.clients > docs/clients.md` writes this page from `lcm_jax/run/clients.py`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
