"""Makes the whole embedded teacher, resumable: scorer, VAE, UNet with text encoder, asset, the teacher's rows.

python -m experiments.shapes_teacher --workdir=/tmp/shapes_teacher
"""

import argparse
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    workdir = f"--workdir={parser.parse_args().workdir}"
    for module, *options in (
        ("train_scorer",),
        ("train_vae", workdir),
        ("train_unet", workdir),
        ("build", workdir),
        ("teacher_rows", "--scan", "--thorough"),
        ("teacher_rows",),
    ):
        print(f"== {module} {' '.join(options)}", flush=True)
        subprocess.run([sys.executable, "-m", f"experiments.shapes_teacher.{module}", *options], check=True)


if __name__ == "__main__":
    main()
