"""Package lcm_jax. Core: what distilling, sampling and exporting need; neither torch nor TensorFlow."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
readme = here / "README.md"

JAX = ">=0.10.2,<0.13"  # Python 3.11 gets 0.10.2, the last that supports it
CORE = [
    "absl-py",
    "filelock>=4.2",
    "flax>=0.12",
    "grain>=0.2.18",
    "huggingface_hub",
    f"jax{JAX}",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.20",
    "pillow>=10.1",
    "rich>=13",
    "safetensors",
    "tensorboardX",
    "tqdm",
    "transformers>=4.56",  # the CLIP tokenizer only; works without torch
]
DATA = ["array_record>=0.8", "datasets>=5", "opencv-python-headless>=5", "tensorflow-datasets>=4.9.10"]  # no TensorFlow
PLOT = ["matplotlib>=3.9"]
NOTEBOOKS = [*PLOT, "ipykernel", "ipywidgets", "nbconvert>=7"]  # ipywidgets: tqdm warns of its absence
TORCH = ["torch>=2.6", "diffusers>=0.35", "accelerate", "peft"]  # lcm_jax.export --verify
TEST_CORE = [*DATA, *NOTEBOOKS, "webdataset", "pytest>=8", "pytest-xdist", "ruff", "import-linter"]

setup(
    name="lcm_jax",
    version="0.1.0",
    description="Latent Consistency Models from Stable Diffusion checkpoints, in JAX and Flax",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["lcm_jax", "lcm_jax.*"]),
    package_data={"lcm_jax": ["assets/**", "page/*.css", "page/*.html", "page/*.js"]},
    install_requires=CORE,
    extras_require={
        "torch": TORCH,
        "plot": PLOT,  # figures of lcm_jax.evaluate and the experiments
        "notebooks": NOTEBOOKS,  # 05 needs "torch", too
        "test": [*TEST_CORE, *TORCH],  # TORCH: the tests' oracles
        "test-core": TEST_CORE,  # for `make test-core`, where there is no torch for this Python
        "fuzz": ["atheris>=3"],  # for `make fuzz`, beside "test"
        "cuda": [f"jax[cuda13]{JAX}"],
        "cuda-aot": [f"jax-cuda12-plugin{JAX}"],  # lcm_jax.aot for GPUs: the compiler alone, 180 MB; no GPU, no CUDA
        "tpu": [f"jax[tpu]{JAX}"],  # lcm_jax.aot needs this extra, and no TPU
        "wandb": ["wandb"],
        "data": DATA,  # latent caches, data sets of Hugging Face and TFDS, OpenCV; tar shards and folders need nothing
        "app": ["gradio>=6,<7"],  # lcm_jax.app; it wants an older Pillow than constraints.txt has
        "test-app": ["playwright>=1.50", "pytest>=8"],  # for `make test-app`, beside "app"; and Chromium
        "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings-python>=2"],  # for `make docs`, in an environment of its own
        "demo": [],  # nor does `make demo`
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
