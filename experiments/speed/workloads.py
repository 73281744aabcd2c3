"""What is measured: kinds of work on models of published architectures, in the order of what each is worth knowing.

matmul   a square product, the ceiling that utilisation is a share of
unet     one pass of the UNet
sample   prompts -> pictures on the host: tokenizer, text encoders, 4 LCM steps told w, VAE
lcd      one training step of Latent Consistency Distillation, encoded latents and text given
lora     the same for an LCM-LoRA
"""

import dataclasses
from collections.abc import Sequence

KINDS = ("matmul", "unet", "sample", "lcd", "lora")
TRAINING = ("lcd", "lora")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
      kind: one of KINDS.
      model: a key of MODELS.
      size: side of the pictures in pixels; of "matmul" the side of the matrices.
      batch: pictures.
      dtype: that the networks compute in.
      remat: of training, a choice of `lcm_jax.models.layers`: activations are made anew for gradients; in torch by
        gradient checkpointing, if it is not "none".
      alone: the sides do not fit on a card together, so one ends before the other begins.
    """

    kind: str
    model: str
    size: int
    batch: int
    dtype: str
    remat: str = "none"
    alone: bool = False

    @property
    def name(self) -> str:
        """Of the line, as in --only."""
        remat = f"-remat-{self.remat}" if self.remat != "none" else ""
        return f"{self.kind}-{self.model}-{self.size}-b{self.batch}-{self.dtype}{remat}"


@dataclasses.dataclass(frozen=True)
class Model:
    """`source`: as `lcm_jax.assets.resolve` or `architecture` know it; configs: of the training steps."""

    source: str
    lcd: str = ""
    lora: str = ""


MODELS = {
    "none": Model(""),
    "shapes": Model("shapes", "configs/shapes_lcm.py", "configs/shapes_lcm_lora.py"),
    "sd15": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", "configs/sd15_lcm.py", "configs/sd15_lcm_lora.py"),
    "sdxl": Model("stabilityai/stable-diffusion-xl-base-1.0", "configs/sdxl_lcm.py", "configs/sdxl_lcm_lora.py"),
}

HEADLINE = Workload("lcd", "sd15", 768, 16, "bfloat16", "block", alone=True)
HEADLINE_STEPS, HEADLINE_PAPER_HOURS = 4000, 32  # the LCM paper's run at 768 pixels, in A100 hours


def cpu() -> list[Workload]:
    """The embedded model, and a pass of Stable Diffusion 1.5; float32."""
    f32 = "float32"
    return [
        Workload("matmul", "none", 2048, 1, f32),
        Workload("sample", "shapes", 64, 4, f32),
        Workload("lcd", "shapes", 64, 32, f32),
        Workload("unet", "sd15", 512, 1, f32),
        Workload("sample", "shapes", 64, 1, f32),
        Workload("sample", "shapes", 64, 8, f32),
        Workload("lora", "shapes", 64, 32, f32),
        Workload("lcd", "shapes", 64, 8, f32),
    ]


def gpu() -> list[Workload]:
    """All models, bfloat16; what the project's goals name comes first."""
    bf16 = "bfloat16"

    def sample(model: str, size: int, batch: int) -> Workload:
        return Workload("sample", model, size, batch, bf16)

    def training(kind: str, model: str, size: int, batch: int) -> Workload:
        pixels = batch * size**2
        remat = "none" if pixels <= 8 * 512**2 and model != "sdxl" else "block"
        heavy = kind == "lcd" and (model == "sdxl" or pixels > 8 * 512**2)
        return Workload(kind, model, size, batch, bf16, remat if model != "shapes" else "none", alone=heavy)

    first = [
        Workload("matmul", "none", 8192, 1, bf16),
        HEADLINE,
        sample("sd15", 512, 1),
        sample("sd15", 512, 4),
        training("lcd", "sd15", 512, 8),
        sample("sdxl", 1024, 1),
        training("lora", "sd15", 512, 8),
        sample("sd15", 768, 4),
        sample("sdxl", 1024, 4),
        training("lora", "sdxl", 1024, 4),
        training("lcd", "sdxl", 1024, 4),
        sample("shapes", 64, 8),
        training("lcd", "shapes", 64, 32),
    ]
    sizes = (("shapes", 64), ("sd15", 512), ("sd15", 768), ("sdxl", 1024))
    rest = [sample(model, size, batch) for model, size in sizes for batch in (1, 4, 8)]
    rest += [training(kind, model, size, batch) for model, size in sizes for kind in TRAINING for batch in (1, 4, 8)]
    return list(dict.fromkeys(first + rest))


LISTS = {"cpu": cpu, "gpu": gpu}


def chosen(device: str, only: Sequence[str], remat: str | None = None) -> list[Workload]:
    """The device's workloads whose names hold one of `only` (all, if it is empty).

    remat: of every training step, in the place of the list's.
    """
    found = [w for w in LISTS[device]() if not only or any(part in w.name for part in only)]
    if remat is None:
        return found
    return [dataclasses.replace(w, remat=remat) if w.kind in TRAINING else w for w in found]
