"""Writes the trained parts to the asset lcm_jax/assets/shapes_teacher, a diffusers folder in float16.

python -m experiments.shapes_teacher.build --workdir=/tmp/shapes_teacher
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from experiments.shapes_teacher import tokenizer, train_unet
from experiments.shapes_teacher.train_unet import SCHEDULER, TEXT, UNET
from lcm_jax.diffusion import schedule
from lcm_jax.models import clip, unet
from lcm_jax.pretrained import Pipeline, save_pipeline
from lcm_jax.pretrained.tokenizer import load_tokenizer

ASSET = Path(__file__).parents[2] / "lcm_jax" / "assets" / "shapes_teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()
    vae, vae_params = train_unet.trained_vae(args.workdir)
    params = train_unet.newest(args.workdir / list(train_unet.LEGS)[-1])
    source = args.workdir / "source"
    tokenizer.write(source / "tokenizer")
    pipeline = Pipeline(
        unet=unet.from_config(UNET),
        vae=vae,
        text_encoder=clip.from_config(TEXT),
        text_encoder_2=None,
        tokenizer=load_tokenizer(source / "tokenizer", clip.from_config(TEXT)),
        tokenizer_2=None,
        schedule=schedule.from_config(SCHEDULER),
        configs={"scheduler": SCHEDULER, "model_index": {}, "text_encoder": TEXT},
    )
    shutil.rmtree(args.out, ignore_errors=True)
    weights = {"unet": params["unet"], "vae": vae_params, "text_encoder": params["text_encoder"]}
    save_pipeline(pipeline, weights, args.out, dtype=np.float16)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file())} bytes")


if __name__ == "__main__":
    main()
