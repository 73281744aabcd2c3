"""The tables: means over seeds, and whether what was asked of phased maps holds in every seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import embedded, measuring, results
from experiments.methods import cost, latents
from experiments.methods.arms import ARMS
from lcm_jax.metrics.shapes import REFERENCES

Rows = Sequence[Mapping[str, Any]]

KEYS = ("model", "phases", "guidance_scale", "steps")  # of rows that differ in their seeds alone
LESS_ERROR, NEAR_SPREAD = 0.9, 0.05  # what is asked, see `asked`
COLUMNS = {
    "accuracy": ("caption accuracy", "{:.1%}"),
    "frechet": ("Frechet distance", "{:.1f}"),
    "coverage": ("coverage distance", "{:.3f}"),
    "error": ("error", "{:.3f}"),
    "spread": ("spread", "{:.3f}"),
}
RIVALS = {"accuracy": COLUMNS["accuracy"], "to_style": ("FD to style", "{:.1f}"), "to_plain": ("FD to plain", "{:.1f}")}
RIVALS |= {"coverage": COLUMNS["coverage"]}
NOTE = """\
{seeds} seed(s) of training; mean ± standard deviation over seeds. {count:,} held-out captions in every row, the same
noise; coverage: {repeated} images, {each} of each caption. Frechet distance to {references:,} held-out renders. Error:
RMSE to the end of the teacher's guided path from the same noise ({endpoints} steps of DDIM), in standard deviations of
these ends; spread: standard deviation of the latents over theirs; both of {few} captions. M: phases, for as many steps.
Rows in as many steps as phases are bold. Training steps: {trained}.
"""
ALIKE = "Images of the same noise in 2, 4 and 8 steps: RMSE between them, of 255, mean over pairs.\n"
ASKED = f"""\
Asked of phased maps in M steps: an error of at most {LESS_ERROR:g} of LCM's in as many steps by its better sampler, a
spread within {NEAR_SPREAD:.0%} of the teacher's at scale {embedded.HIGH_SCALE:g}, a coverage distance not above LCM's.
"""
TRAINING = f"""\
Training: network units are passes of the teacher's UNet for one image, by FLOPs; a backward pass counts as 2. Seconds:
median of {cost.STEPS} steps; the models took turns.
"""
SAMPLING = f"""\
Sampling, decoding included: milliseconds per image, median of {cost.BATCHES} batches of {measuring.BATCH}; the models
took turns.
"""
RIVAL = """\
Few-step LoRAs in 4 steps, each on the teacher that it was distilled on and on the other one: the style teacher is a
fine-tune of the plain one. FD: Frechet distance to held-out renders in the style, and to plain ones; {count} images.
"""


def means(rows: Rows, keys: Sequence[str]) -> list[dict[str, Any]]:
    """One row for the rows that agree in `keys`: means of their numbers, and under "deviations" standard deviations,
    {} of a single row. A value that is None in one of them is None."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for key, group in groups.items():
        numbers = {name for name, value in group[0].items() if isinstance(value, (int, float))} - {*keys, "seed"}
        numbers = {name: [row[name] for row in group] for name in group[0] if name in numbers}
        one = dict.fromkeys(group[0]) | dict(zip(keys, key, strict=True))
        one |= {name: statistics.fmean(values) for name, values in numbers.items()}
        several = numbers if len(group) > 1 else {}
        found.append(one | {"deviations": {name: statistics.stdev(values) for name, values in several.items()}})
    return found


def cell(row: Mapping[str, Any], key: str, form: str) -> str:
    if row[key] is None:
        return ""
    deviation = row["deviations"].get(key)
    return form.format(row[key]) + ("" if deviation is None else f" ± {form.replace('+', '').format(deviation)}")


def asked(rows: Rows) -> list[dict[str, Any]]:
    """For each phased map, guidance scale and seed in as many steps as phases: ratio of its error to LCM's by the
    better sampler, its spread, and its coverage distance less LCM's by its own sampler."""
    of = {(row["model"], row["seed"], row["guidance_scale"], row["steps"]): row for row in rows}
    found = []
    for arm in (ARMS["phased2"], ARMS["phased4"], ARMS["phased8"]):
        for row in rows:
            if row["model"] != arm.names["tcd"] or row["steps"] != arm.phases[-1]:
                continue
            keys = row["seed"], row["guidance_scale"], row["steps"]
            lcm = {sampler: of.get((name, *keys)) for sampler, name in ARMS["lcm"].names.items()}
            if None not in lcm.values():
                found.append(
                    {"model": row["model"], "guidance_scale": row["guidance_scale"], "seed": row["seed"]}
                    | {"error_ratio": row["error"] / min(one["error"] for one in lcm.values())}
                    | {"spread": row["spread"], "coverage_gain": row["coverage"] - lcm["lcm"]["coverage"]}
                )
    return found


def verdicts(found: Rows) -> str:
    """A line for each model and scale: in how many seeds each of what is asked holds."""
    lines = []
    for one in means(found, ("model", "guidance_scale")):
        key = one["model"], one["guidance_scale"]
        seeds = [row for row in found if (row["model"], row["guidance_scale"]) == key]
        high = one["guidance_scale"] == embedded.HIGH_SCALE
        near = sum(abs(row["spread"] - 1.0) <= NEAR_SPREAD for row in seeds)
        lines.append(
            [
                one["model"],
                f"{one['guidance_scale']:g}",
                f"{cell(one, 'error_ratio', '{:.2f}')} ({sum(r['error_ratio'] <= LESS_ERROR for r in seeds)})",
                f"{cell(one, 'spread', '{:.3f}')}{f' ({near})' * high}",
                f"{cell(one, 'coverage_gain', '{:+.3f}')} ({sum(row['coverage_gain'] <= 0 for row in seeds)})",
            ]
        )
    return results.table(["model", "scale", "error over LCM's", "spread", "coverage distance less LCM's"], lines)


def markdown(found: Mapping[str, Rows], about: Mapping[str, Any]) -> str:
    """All tables; found: "rows", "alike", "training", "sampling", "rival" of all seeds."""
    parts = []
    if found["rows"]:
        rows = means(found["rows"], KEYS)
        rows.sort(key=lambda row: row["guidance_scale"])
        lines = []
        for row in rows:
            cells = [row["model"], f"{row['guidance_scale']:g}", f"{row['steps']}", f"{row['evaluations']:.0f}"]
            cells += [cell(row, key, form) for key, (_, form) in COLUMNS.items()]
            lines.append([f"**{text}**" if text and row["steps"] == row["phases"] else text for text in cells])
        heads = ["model", "guidance scale", "steps", "network evaluations", *(title for title, _ in COLUMNS.values())]
        note = NOTE.format(
            seeds=about["seeds"],
            count=about["count"],
            repeated=about["coverage_count"],
            each=embedded.EACH,
            references=REFERENCES,
            endpoints=latents.ENDPOINT_STEPS,
            few=latents.few(about["count"]),
            trained=", ".join(f"{name} {steps}" for name, steps in about["training_steps"].items()),
        )
        parts += [results.table(heads, lines), note]
    if about["asked"]:
        parts += [ASKED + "In brackets the number of seeds in which it holds.\n", verdicts(about["asked"])]
    if found["alike"]:
        rows = means(found["alike"], ("model", "guidance_scale"))
        lines = [[row["model"], f"{row['guidance_scale']:g}", cell(row, "rmse", "{:.1f}")] for row in rows]
        parts += [ALIKE, results.table(["model", "guidance scale", "RMSE"], lines)]
    if found["training"]:
        lines = [[row["model"], f"{row['units']:.2f}", f"{row['seconds']:.3f}"] for row in found["training"]]
        parts += [TRAINING, results.table(["model", "network units per image", "seconds per step"], lines)]
    if found["sampling"]:
        by_model: dict[str, list[str]] = {}
        for row in found["sampling"]:
            by_model.setdefault(row["model"], []).append(f"{row['milliseconds']:.1f}")
        heads = ["model", *(f"{n} step{'s' * (n > 1)}" for n in measuring.STEPS)]
        parts += [SAMPLING, results.table(heads, [[model, *cells] for model, cells in by_model.items()])]
    if found["rival"]:
        rows = means(found["rival"], ("lora", "teacher"))
        lines = [
            [row["lora"] or "none, 50 guided steps", row["teacher"], f"{row['evaluations']:.0f}"]
            + [cell(row, key, form) for key, (_, form) in RIVALS.items()]
            for row in rows
        ]
        heads = ["LoRA: map, distilled on", "teacher", "network evaluations", *(title for title, _ in RIVALS.values())]
        parts += [RIVAL.format(count=about["coverage_count"]), results.table(heads, lines)]
    return "\n".join(parts)
