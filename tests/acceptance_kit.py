"""Stand-ins for the repositories of experiments/acceptance/published.json: names, files and key sets, tiny weights.

Written by the savers of diffusers, transformers and peft, single files by ours. `StandIns(root, deep).build()` makes
root/OWNER/NAME of all and returns the table of their rows: the published one with the stand-ins' own numbers, by torch.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import tiny
import tiny_configs
import tiny_family
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from experiments.acceptance import cases
from lcm_jax.models import lora
from lcm_jax.pretrained import load_pipeline, save_single_file

RANK, ALPHA = 4, 2
STYLE = "TheLastBen/Papercut_SDXL/papercut.safetensors"
VAE_FIX = "madebyollin/sdxl-vae-fp16-fix"
SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
WIDE = 48  # of SDXL's second text encoder, which diffusers tells from the first by its width
LAYERS = {"clip": 12, "openclip": 23, "openclip_projection": 32}

# Family -> its name in `tiny_family`, text encoders, VAE, pipeline.
_XL = ({"": ("clip", "sd1"), "_2": ("openclip_projection", "sdxl_2")}, "published_xl", "StableDiffusionXLPipeline")
FAMILIES = {
    "sd15": ("sd15", {"": ("clip", "sd1")}, "published", "StableDiffusionPipeline"),
    "sd21": ("sd21-base", {"": ("openclip", "sd2")}, "published", "StableDiffusionPipeline"),
    "sdxl": ("sdxl", *_XL),
    "ssd-1b": ("ssd-1b", *_XL),
    "vega": ("vega", *_XL),
}
# Widths that differ where the published ones do, so that the same blocks have shortcuts.
_SD_WIDTHS, _XL_WIDTHS = {"block_out_channels": [16, 32, 48, 48]}, {"block_out_channels": [16, 32, 48]}
DEEP = {
    "sd15": tiny_configs.UNETS["sd15"] | _SD_WIDTHS,
    "sd21": tiny_configs.UNETS["sd-turbo"] | _SD_WIDTHS | {"layers_per_block": 2},
    "sdxl": tiny_configs.UNETS["sdxl"] | _XL_WIDTHS | {"transformer_layers_per_block": [1, 2, 10]},
    "ssd-1b": tiny_configs.UNETS["ssd-1b"]
    | _XL_WIDTHS
    | {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "vega": tiny_configs.UNETS["vega"] | _XL_WIDTHS | {"layers_per_block": 2},
}
_NOISE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
_PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
_EULER = {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "leading"}
_TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "trailing"}
_LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "set_alpha_to_one": True, "steps_offset": 0}
_ODD = {**_LCM, "prediction_type": "v_prediction", "thresholding": True, "rescale_betas_zero_snr": True}
# Repository -> family, pipeline if not the family's, dimension of w, scheduler, variant of the weight files.
MODELS = {
    SD15: ("sd15", None, None, _PNDM, None),
    "Lykon/dreamshaper-8": ("sd15", None, None, _PNDM, None),
    "SimianLuo/LCM_Dreamshaper_v7": ("sd15", "LatentConsistencyModelPipeline", 256, _LCM, None),
    "discus0434/lcm_anything_v5": ("sd15", None, None, _ODD, None),
    "stabilityai/sd-turbo": ("sd21", None, None, _EULER | {"timestep_spacing": "trailing"}, "fp16"),
    SDXL: ("sdxl", None, None, _EULER, "fp16"),
    "Lykon/dreamshaper-xl-1-0": ("sdxl", None, None, _EULER, "fp16"),
    "stabilityai/sdxl-turbo": ("sdxl", None, None, _TURBO, "fp16"),
    "segmind/SSD-1B": ("ssd-1b", None, None, _EULER, "fp16"),
    "segmind/Segmind-Vega": ("vega", None, None, _EULER, "fp16"),
}
# Repository of a UNet alone -> architecture.
UNETS = {"latent-consistency/lcm-sdxl": "sdxl", "latent-consistency/lcm-ssd-1b": "ssd-1b"}
TRAINING = (
    "--config.data.resolution=64",
    "--config.data.batch_size=2",
    f"--config.lora.rank={RANK}",
    "--config.sample.every=0",
    "--config.log.every=1",
)


@dataclasses.dataclass(frozen=True)
class StandIns:
    """Repositories below `root`.

    deep: with the published key sets; not: with the first and the last level of each UNet, which compiles soon.
    """

    root: Path
    deep: bool

    def build(self, names: tuple[str, ...] = ()) -> dict[str, Any]:
        """The table of stand-ins, which are then there; names: of the rows; (): all."""
        published = json.loads(cases.PUBLISHED.read_text())
        rows = [row for row in published["rows"] if not names or row["name"] in names]
        for row in rows:
            for repository in [row["model"], row.get("model_config")]:
                if repository in MODELS:
                    self.model(repository)
            if row.get("unet"):
                self.unet_alone(row["unet"])
            if row["model"].endswith(".safetensors"):
                self.single_file(row["model"], v_pred="Vpred" in row["model"])
            for source in row.get("lora", ()):
                self.lora_file(source, row)
            if "sdxl" in row.get("config", "") and not (self.root / VAE_FIX).exists():
                made = diffusers.AutoencoderKL(**tiny_family.VAE_XL, force_upcast=False)
                tiny.randomise(made, 12).save_pretrained(self.root / VAE_FIX)
        with self.parts():
            families = {name: self.facts(name) for name in {row["family"] for row in rows if "family" in row}}
        return {"families": families, "rows": [self.of(row) for row in rows]}

    def of(self, row: dict[str, Any]) -> dict[str, Any]:
        """A published row, asked of its stand-in."""
        steps = row.get("steps", [1, 2, 4, 8] if row["name"] == "lcm-dreamshaper-v7" else [2])[:4]
        changed = {"gigabytes": 0.01, "size": 0, "limit_s": 900.0, "steps": [] if self.deep else steps}
        if row.get("sampler") == "ddim" and not self.deep:
            changed["steps"] = [3]
        if "config" in row:
            changed["flags"] = [*row.get("flags", ()), *TRAINING]
        expects = dict(row.get("expects", {}))
        if "unet.time_cond_proj_dim" in expects:
            expects |= self.unet_facts(row["family"], 256)
        if "lora.layers" in expects:
            layers = peft.get_peft_model_state_dict(self.adapted(row["family"], 0))
            expects |= {"lora.parameters": sum(value.numel() for value in layers.values())}
            expects |= {"lora.layers": len(layers) // 2, "lora.ranks": [RANK], "lora.alphas": [ALPHA]}
        return row | changed | {"expects": expects}

    def unet(self, name: str, w_dim: int | None = None, seed: int = 1) -> UNet2DConditionModel:
        """For text of `tiny`'s encoders; 64 pixels."""
        if self.deep:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny_family.FAMILY, name, (DEEP[name], *tiny_family.FAMILY[FAMILIES[name][0]][1:]))
                config = tiny_family.unet_config(name, False, w_dim)
        else:
            config = tiny_family.unet_config(FAMILIES[name][0], True, w_dim)
        if "_2" in FAMILIES[name][1]:
            config["cross_attention_dim"] = 32 + WIDE
        return tiny.randomise(UNet2DConditionModel(**config), seed)

    @contextlib.contextmanager
    def parts(self) -> Iterator[None]:
        """In this block `tiny` makes VAEs, and text encoders, as these stand-ins have them."""
        more = {"layers_per_block": 2} if self.deep else {}
        tiny.torch_text_encoder.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            for name, (kind, fields) in tiny.TEXT_ENCODERS.items():
                changed = {"num_hidden_layers": LAYERS[name]} if self.deep else {}
                changed |= {"hidden_size": WIDE} if name == "openclip_projection" else {}
                patch.setitem(tiny.TEXT_ENCODERS, name, (kind, fields | changed))
            for name, fields in (("published", tiny.VAE_8), ("published_xl", tiny_family.VAE_XL)):
                patch.setitem(tiny.VAES, name, fields | more)
            yield
        tiny.torch_text_encoder.cache_clear()
        tiny.torch_vae.cache_clear()

    def unet_facts(self, name: str, w_dim: int | None = None) -> dict[str, int]:
        made = self.unet(name, w_dim)
        return {"unet.parameters": counted(made), "unet.keys": len(made.state_dict())}

    def facts(self, name: str) -> dict[str, Any]:
        """What the rows of a family expect, by torch."""
        _, encoders, vae, _ = FAMILIES[name]
        found = self.unet_facts(name) | {"vae.parameters": counted(tiny.torch_vae(vae))}
        for slot, (encoder, _) in encoders.items():
            found[f"text_encoder{slot}.parameters"] = counted(tiny.torch_text_encoder(encoder))
        scale = 0.13025 if vae == "published_xl" else 0.18215
        return found | {"vae.scaling_factor": scale, "prediction_type": "epsilon"}

    def model(self, repository: str) -> Path:
        """A whole pipeline, with the scheduler and the index that are published."""
        target = self.root / repository
        if target.exists():
            return target
        name, kind, w_dim, noise, variant = MODELS[repository]
        _, encoders, vae, usual = FAMILIES[name]
        with self.parts(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "torch_unet", lambda _: self.unet(name, w_dim, len(repository)))
            patch.setitem(tiny.FOLDERS, repository, (name, vae, encoders, "epsilon", kind or usual))
            tiny.build(repository, target, variant)
        scheduler = {"_diffusers_version": "0.19.0", "prediction_type": "epsilon", "clip_sample": False}
        tiny.write_json(target / "scheduler" / "scheduler_config.json", scheduler | _NOISE | noise)
        index = json.loads((target / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", noise["_class_name"]]
        if "_2" in encoders:
            for key in ("safety_checker", "feature_extractor", "requires_safety_checker"):
                del index[key]
        else:
            index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
            index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        tiny.write_json(target / "model_index.json", index)
        return target

    def unet_alone(self, repository: str) -> None:
        """At the root of its repository, as variant and without one."""
        made = self.unet(UNETS[repository], 256, seed=7)
        made.save_pretrained(self.root / repository)
        made.half().save_pretrained(self.root / repository, variant="fp16")

    def single_file(self, source: str, v_pred: bool) -> None:
        """A file with the original key names; v_pred: marked as v-prediction with zero terminal SNR."""
        base, target = self.model(SDXL), self.root / source
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        save_single_file(*load_pipeline(base, "fp16"), target, dtype=np.float16)
        if v_pred:
            marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
            safetensors.numpy.save_file(safetensors.numpy.load_file(target) | marks, target)

    def lora_file(self, source: str, row: dict[str, Any]) -> None:
        """A LoRA of the row's model, as its trainer saved it."""
        name = source.partition(":")[0]
        if row.get("refuses"):  # a pickle alone
            (self.root / name).mkdir(parents=True)
            (self.root / name / "tdm_dreamshaper.pt").write_bytes(b"PK")
            return
        place = self.root / (name if name.endswith(".safetensors") else f"{name}/pytorch_lora_weights.safetensors")
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        made = self.adapted(row["family"], len(source))
        layers, options = peft.get_peft_model_state_dict(made), {}
        if name.partition("/")[0] not in ("h1t", "ByteDance", "TheLastBen"):
            safetensors.torch.save_file(kohya(layers), place, metadata={"format": "pt"})
            return
        if name == STYLE:  # of the text encoder, too
            adapter = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            folder = self.root / row["model"] / "text_encoder"
            encoder = peft.get_peft_model(CLIPTextModel.from_pretrained(folder, variant="fp16").float(), adapter)
            found = peft.get_peft_model_state_dict(encoder).items()
            options["text_encoder_lora_layers"] = {key.removeprefix("base_model.model."): x for key, x in found}
            options["text_encoder_lora_adapter_metadata"] = adapter.to_dict()
        kind = getattr(diffusers, FAMILIES[row["family"]][-1])
        metadata = made.peft_config["default"].to_dict()
        kind.save_lora_weights(
            place.parent, layers, weight_name=place.name, unet_lora_adapter_metadata=metadata, **options
        )

    def adapted(self, name: str, seed: int) -> UNet2DConditionModel:
        """A UNet with adapters on all the layers that LCM-LoRAs adapt."""
        made = self.unet(name)
        torch.manual_seed(seed)
        targets = list(lora.DEFAULT_TARGETS)
        made.add_adapter(
            peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="gaussian")
        )
        with torch.no_grad():
            for key, p in made.named_parameters():
                if "lora_B" in key:
                    p.normal_(0, 0.05)
        return made


def counted(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kohya(layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keys and dtypes of LCM-LoRA's script: an alpha beside every pair, float16."""
    found = {}
    for key, value in layers.items():
        stem, _, kind = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up").rpartition(".lora_")
        stem = f"lora_unet_{stem.replace('.', '_')}"
        found[f"{stem}.lora_{kind}"] = value.half().contiguous()
        found[f"{stem}.alpha"] = torch.tensor(ALPHA, dtype=torch.float16)
    return found


def as_cache(root: Path, home: Path, revision: Callable[[str], str]) -> None:
    """The repositories below `root` as HF_HOME has what was fetched; revision: repository -> of its commit."""
    for folder in (one for owner in root.iterdir() for one in owner.iterdir()):
        repository = f"{folder.parent.name}/{folder.name}"
        place = home / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / revision(repository), ignore=shutil.ignore_patterns("*.pt"))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(revision(repository))
