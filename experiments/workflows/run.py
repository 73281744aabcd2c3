"""Image to image, inpainting and ControlNet on the embedded models: the LCM in 1, 2 and 4 steps, its teacher in 50.

    python -m experiments.workflows.run [--workdir=runs/shapes_lcm] [--count=512] [--publish]

    WORKDIR/                    a run of configs/shapes_lcm.py, and its export/; trained now if it is missing
    WORKDIR/workflows/          table.md, table.json, and a grid of images for each workflow

What is asked for: `cases`. What the images show is read by the scorer of `lcm_jax.metrics`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lcm_jax
from experiments import embedded, measuring, results, stage
from experiments.terminal import teller
from experiments.workflows import cases
from experiments.workflows.cases import Case
from lcm_jax import files
from lcm_jax.data import shapes
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.metrics import intervals
from lcm_jax.metrics.intervals import Estimate
from lcm_jax.metrics.networks import shapes as scorer

CONFIG = "configs/shapes_lcm.py"
STRENGTHS = (0.3, 0.5, 0.8)
EACH = 8  # images of each case, from 8 noises that all cases share
ASKED = (("LCM", "lcm", 1), ("LCM", "lcm", 2), ("LCM", "lcm", 4), ("teacher", "ddim", 50))  # model, sampler, steps
SHOWN = ("LCM", 4), ("teacher", 50)  # of each strength in the grid
MODEL = {"model": ("model", "{}"), "steps": ("steps", "{}")}
# Workflow -> {title in its table: (key of a row, format)}.
COLUMNS = {
    "image to image": {
        "strength": ("strength", "{:g}"),
        **MODEL,
        "caption accuracy": ("accuracy", "{:.1%}"),
        "new colour": ("changed", "{:.1%}"),
        "all else kept": ("kept", "{:.1%}"),
        "distance to the input": ("distance", "{:.1f}"),
    },
    "inpainting": {
        **MODEL,
        "caption accuracy": ("accuracy", "{:.1%}"),
        "new shape and colour": ("changed", "{:.1%}"),
        "all else kept": ("kept", "{:.1%}"),
        "outside the mask exact": ("exact", "{:.1%}"),
    },
    "ControlNet": {
        "caption": ("caption", "{}"),
        **MODEL,
        "outline followed": ("outline", "{:.1%}"),
        "caption's object": ("object", "{:.1%}"),
        "colour and background": ("rest", "{:.1%}"),
    },
}
NOTE = (
    "{count} images in every row, {each} of each of {cases} held-out cases; guidance scale {scale:g}. A step of the "
    "LCM takes one evaluation of the UNet, of the teacher (DDIM) two. Captions name all five attributes; accuracies "
    "are shares of images in which the scorer reads all that is meant. Image to image asks for another colour than the "
    "input's; distance is the root mean square over pixels, of 255. Inpainting asks for another shape and colour in a "
    "square around the object; exact: all pixels outside are the input's. ControlNet: the outline shows shape, size "
    "and position, and is followed if all three are read; captions that contradict it name others."
)

Row = dict[str, Any]
Read = dict[str, np.ndarray]  # what the scorer reads: class indices [n] of each attribute
Ask = Callable[..., np.ndarray]  # (captions, options of a model's call) -> EACH images of each, uint8 [n 64 64 3]
Found = tuple[list[Row], dict[str, np.ndarray], list[str]]  # rows; lines of the grid, and their captions


def share(read: Read, asked: Sequence[Case], names: Sequence[str], of_outline: bool = False) -> Estimate:
    """Of EACH images of each case, those that show what the caption (or the outline) says of these attributes."""
    right = np.array(True)
    for name in names:
        words = [getattr(case.spec, name) if of_outline else case.words[name] for case in asked]
        right = right & (read[name] == np.repeat([shapes.ATTRIBUTES[name].index(word) for word in words], EACH))
    return of_cases(right)


def of_cases(values: np.ndarray) -> Estimate:
    """Mean of a value of EACH images of each case, and its interval over cases."""
    return intervals.of_means(values[:, None], np.arange(len(values)) // EACH)[0]


def common(images: np.ndarray, asked: Sequence[Case], changed: Sequence[str]) -> dict[str, Estimate]:
    """What image to image and inpainting measure alike; changed: attributes that the caption changes."""
    read, kept = scorer.score(images)[0], [name for name in shapes.ATTRIBUTES if name not in changed]
    parts = {"accuracy": tuple(shapes.ATTRIBUTES), "changed": changed, "kept": kept}
    return {key: share(read, asked, names) for key, names in parts.items()}


def image_to_image(ask: dict[tuple[str, int], Ask], count: int) -> Found:
    asked = [cases.recoloured(number) for number in range(count)]
    captions, given = [case.caption for case in asked], [case.given for case in asked]
    rows, lines = [], {"input": first(np.repeat(given, EACH, axis=0))}
    for strength in STRENGTHS:
        for (model, steps), images_of in ask.items():
            images = images_of(captions, image=given, strength=strength)
            off = images.astype(np.float32) - np.repeat(given, EACH, axis=0)
            row = {"strength": strength, "model": model, "steps": steps}
            distance = {"distance": of_cases(np.sqrt(np.square(off).mean((1, 2, 3))))}
            rows.append(row | results.of_estimates(common(images, asked, ("colour",)) | distance))
            if (model, steps) in SHOWN:
                lines[f"{model}, {steps} steps, strength {strength:g}"] = first(images)
    return rows, lines, captions


def inpainting(ask: dict[tuple[str, int], Ask], count: int) -> Found:
    asked = [cases.repainted(number) for number in range(count)]
    captions, given = [case.caption for case in asked], [case.given for case in asked]
    masks = [cases.mask_of(case.spec) for case in asked]
    inside = np.repeat(masks, EACH, axis=0)[..., None]
    originals = np.repeat(given, EACH, axis=0)
    rows, lines = [], {"input": first(originals), "masked": first(np.where(inside, np.uint8(128), originals))}
    for (model, steps), images_of in ask.items():
        images = images_of(captions, image=given, mask=masks, strength=1.0)
        exact = {"exact": of_cases((inside | (images == originals)).all((1, 2, 3)))}
        found = results.of_estimates(common(images, asked, ("shape", "colour")) | exact)
        rows.append({"model": model, "steps": steps, **found})
        lines[f"{model}, {steps} step{'s' * (steps > 1)}"] = first(images)
    return rows, lines, captions


def control_net(ask: dict[tuple[str, int], Ask], count: int) -> Found:
    rows, lines, shown = [], {}, []
    for contradicts in (False, True):
        asked = [cases.outlined(number, contradicts) for number in range(count)]
        captions, outlines = [case.caption for case in asked], [shapes.outline(case.spec) for case in asked]
        lines["outline"], shown = first(np.repeat(outlines, EACH, axis=0)), captions  # the grid's contradict
        for (model, steps), images_of in ask.items():
            parts = [images_of([caption], outline=one) for caption, one in zip(captions, outlines, strict=True)]
            images = np.concatenate(parts)
            read, _ = scorer.score(images)
            row = {"caption": "contradicts" if contradicts else "agrees", "model": model, "steps": steps}
            shares = {"outline": share(read, asked, cases.OUTLINED, of_outline=True)}
            shares["object"] = share(read, asked, cases.OUTLINED)
            shares["rest"] = share(read, asked, ("colour", "background"))
            rows.append(row | results.of_estimates(shares))
            lines[f"{model}, {steps} step{'s' * (steps > 1)}"] = first(images)
    return rows, lines, shown


def first(images: np.ndarray) -> np.ndarray:
    """The first image of each case in a grid."""
    return images[: EACH * embedded.GRID_IMAGES : EACH]


WORKFLOWS = {"image to image": image_to_image, "inpainting": inpainting, "ControlNet": control_net}


def asking(folder: str | Path, scale: float) -> dict[tuple[str, int], Ask]:
    """{(model, steps): its function} of the LCM in `folder` and of the embedded teacher."""
    models = {"LCM": lcm_jax.load(folder), "teacher": lcm_jax.load("shapes")}
    nets = {name: model.control_net("shapes_controlnet") for name, model in models.items()}

    def ask_of(name: str, sampler: str, steps: int) -> Ask:
        def ask(captions: Sequence[str], outline: np.ndarray | None = None, **options: Any) -> np.ndarray:
            options["control"] = () if outline is None else (lcm_jax.Control(nets[name], outline),)
            options |= {"sampler": sampler, "steps": steps, "guidance_scale": scale}
            return np.stack(models[name](captions, num_images=EACH, batch_size=measuring.BATCH, **options))

        return ask

    return {(name, steps): ask_of(name, sampler, steps) for name, sampler, steps in ASKED}


def grid_of(workflow: str) -> str:
    """Name of its grid's file."""
    return f"{workflow.lower().replace(' ', '_')}.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    embedded.add_arguments(parser, "runs/shapes_lcm")
    args = parser.parse_args()
    if args.count < EACH or args.count % EACH:
        raise LcmError(f"--count={args.count}: {EACH} images are made of each case; give a multiple of {EACH}")
    say, scale = teller(), embedded.best_guidance_scale()
    if not stage.made(stage.read_config(CONFIG), args.workdir, say):
        return 1
    ask, count, out = asking(args.workdir / "export", scale), args.count // EACH, args.workdir / "workflows"
    out.mkdir(exist_ok=True)
    rows, texts = [], []
    for name, workflow in WORKFLOWS.items():
        say(f"{name}, {args.count} images per row")
        found, lines, captions = workflow(ask, count)
        embedded.write_grid(out / grid_of(name), lines, captions[: embedded.GRID_IMAGES])
        rows += [{"workflow": name} | row for row in found]
        texts.append(f"### {name}\n\n{results.table_of(COLUMNS[name], found)}")
    note = results.noted(NOTE.format(count=args.count, each=EACH, cases=count, scale=scale), rows)
    text = "\n".join([*texts, f"{note}\n"])
    files.write_atomic(out / "table.md", text)
    files.write_atomic(out / "table.json", results.to_json({"note": note, "config": CONFIG, "rows": rows}, 2))
    if args.publish:
        names = ("table.md", "table.json", *map(grid_of, WORKFLOWS))
        results.publish(Path(__file__).parent, {name: out / name for name in names})
    print("\n" + text)
    say(f"done: {out}/table.md, table.json and grids")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
