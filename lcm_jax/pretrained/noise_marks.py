"""What a .safetensors file records of the noise that its model, or the base of its LoRA, was trained on.

    keys      v_pred: v prediction  ztsnr: zero terminal SNR     (ComfyUI, A1111, Forge; presence counts, not content)
              edm_mean, edm_vpred.sigma_max, ...: no discrete table
              alphas_cumprod, betas, denoiser.sigmas: the table itself
    header    modelspec.prediction_type (sd-scripts), modelspec.predict_key (ComfyUI), prediction_type: v, epsilon
              ss_v_parameterization, ss_v_prediction, ss_zero_terminal_snr: True, False
              modelspec.architecture, ss_base_model_version: names that end in v
              lcm_config.json: our own record
    beside    NAME.yaml, A1111's and Forge's config of a checkpoint: parameterization: v, or VScaling

A key and a config are deliberate marks, which other programs go by. In a header, "epsilon" and "False" are only the
defaults of the programs that write it: the others override them.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lcm_jax import foreign
from lcm_jax.diffusion import schedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.pretrained.model import RECORD
from lcm_jax.pretrained.safetensors_io import Weights

KEYS = ("v_pred", "ztsnr")

_V = "v_prediction"
_WORDS = {"epsilon": "epsilon", "eps": "epsilon", "sample": "sample"}
_WORDS |= dict.fromkeys(("v", "v_pred", "v-pred", "vpred", "v_prediction", "v-prediction"), _V)
_FLAGS = {"true": _V, "1": _V, "false": "epsilon", "0": "epsilon"}
# Field of the header -> (its words and what they mean, whether another word is an unknown prediction type).
_FIELDS = {
    "modelspec.prediction_type": (_WORDS, True),
    "modelspec.predict_key": (_WORDS, True),
    "prediction_type": (_WORDS, True),
    "modelspec.noise_process": ({"ddpm": None, "auto": None}, True),
    "ss_v_parameterization": (_FLAGS, False),
    "ss_v_prediction": (_FLAGS, False),
    "v_pred": (_FLAGS, False),
    "modelspec.architecture": ({"stable-diffusion-v2-768-v": _V, "stable-diffusion-v2-768-v/lora": _V}, False),
    "ss_base_model_version": ({"sd_v1_v": _V, "sd_v2_v": _V}, False),
    RECORD: (_WORDS, False),
}
_V_IN_YAML = re.compile(r"^[ \t]*(parameterization:\s*[\"']?v|target:\s*[\"']?[\w.]+\.VScaling)[\"']?\s*(#.*)?$", re.M)
_LONGEST_YAML = 2**16  # bytes; they have some 70 lines
_ZERO_SNR = ("ss_zero_terminal_snr", "ztsnr")
_TABLES = {  # key -> abar_t from it
    "alphas_cumprod": lambda x: x,
    "denoiser.sigmas": lambda x: 1 / (1 + np.sort(x) ** 2),
    "betas": lambda x: np.cumprod(1 - x),
}
_ROUNDING = 0.04  # of sqrt(abar) in files of half precision or less; zero terminal SNR moves its end by 0.068


@dataclasses.dataclass(frozen=True)
class Marks:
    """The marks of one file.

    Attributes:
      source: the file.
      prediction_type: None if no mark gives it.
      zero_snr: whether it is marked for zero terminal SNR.
      text: the marks themselves, for messages.
    """

    source: Path
    prediction_type: str | None
    zero_snr: bool
    text: str

    def agree_with(self, noise: schedule.NoiseSchedule) -> bool:
        """Whether no mark contradicts `noise`."""
        zero = not self.zero_snr or noise.alphas_cumprod[-1] == 0
        return zero and self.prediction_type in (None, noise.prediction_type)


def read(source: Path, keys: Collection[str], metadata: Mapping[str, str]) -> Marks:
    """The marks among a file's tensor names, in its header and beside it.

    Raises:
      UnsupportedConfig: noise without a discrete table, or an unknown prediction type.
      LcmError: fields of the header contradict each other.
    """
    edm = sorted(key for key in keys if key.startswith("edm_"))
    if edm:
        raise UnsupportedConfig(f"noise schedule of {source}: key", edm[0], "the discrete ones of SD and SDXL")
    found: dict[str, str] = {}  # mark -> prediction type
    zero = ["key ztsnr"] if "ztsnr" in keys else []
    zero += [f"{field} {metadata[field]!r}" for field in _ZERO_SNR if metadata.get(field, "").lower() in ("true", "1")]
    for field, (words, strict) in _FIELDS.items():
        text = metadata.get(field, "") if field != RECORD else _recorded(metadata)
        word = text.strip().lower()
        if word in ("", "none"):
            continue
        if word == "v-zsnr":
            word, zero = "v", [*zero, f"{field} {text!r}"]
        if strict and word not in words:
            known = [word for word, kind in words.items() if kind] or list(words)
            raise UnsupportedConfig(f"{field} in the header of {source}", text, known)
        if words.get(word):
            found[f"{field} {text!r}"] = words[word]
    if deliberate := ["key v_pred"] * ("v_pred" in keys) + _beside(source):
        wrong = [mark for mark, kind in found.items() if kind != _V]
        if wrong:
            both = deliberate[0], ", ".join(wrong)
            logging.warning("%s has a %s, but its header %s; v_prediction is used", source, *both)
        found = dict.fromkeys(deliberate, _V) | {mark: kind for mark, kind in found.items() if kind == _V}
    if len(set(found.values())) > 1:
        raise LcmError(
            f"the header of {source} contradicts itself: {', '.join(f'{mark} ({found[mark]})' for mark in found)}; "
            "correct it, or add a key v_pred (an empty tensor) if the model predicts v"
        )
    return Marks(source, next(iter(found.values()), None), bool(zero), ", ".join([*found, *zero]))


def _beside(source: Path) -> list[str]:
    """The mark of v in the config beside a file."""
    config = source.with_suffix(".yaml")
    if not config.is_file():
        return []
    with config.open("rb") as stream:
        text = stream.read(_LONGEST_YAML).decode(errors="replace")
    return [f"{config.name} ({found[1]})"] if (found := _V_IN_YAML.search(text)) else []


def _recorded(metadata: Mapping[str, str]) -> str:
    """The prediction type in our own record; `single_file.read_record` reports a broken one."""
    try:
        return str(foreign.json_object(metadata[RECORD], RECORD)["prediction_type"])
    except (KeyError, LcmError):
        return ""


def table(weights: Weights) -> tuple[str, np.ndarray] | None:
    """(key, abar_t float64 [T]) of the noise table that a file holds; None: it has none, or only zeros."""
    for key in (key for key in _TABLES if key in weights.shapes):
        abar = _TABLES[key](np.asarray(weights.read(key), np.float64).reshape(-1))
        if abar.size > 1 and abar[0] > 0.5 > abar[-1] >= 0:
            return key, abar
    return None


def fits(abar: np.ndarray, fields: Mapping[str, Any]) -> list[bool]:
    """With which `rescale_betas_zero_snr` the `schedule.noise_fields` make a stored table, perhaps rounded."""
    found = []
    for rescale in (False, True):
        wanted = schedule.from_config({**fields, "prediction_type": _V, "rescale_betas_zero_snr": rescale}).alphas
        if abar.shape == wanted.shape and np.all(abs(np.sqrt(np.clip(abar, 0, 1)) - wanted) < _ROUNDING):
            found.append(rescale)
    return found
