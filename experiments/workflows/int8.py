"""What int8 weights change: the error of the embedded teacher's weights, and of its images.

    python -m experiments.workflows.int8 [--count=32] [--steps=10]

The same captions of the held-out split, noise and sampler (ddim, guidance scale 4) with float32 weights and with int8;
writes int8.json. Minutes on a CPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from flax import traverse_util

import lcm_jax
from experiments import results
from lcm_jax import files
from lcm_jax.data import shapes
from lcm_jax.ending import exit_code
from lcm_jax.metrics.networks.shapes import caption_accuracy, score
from lcm_jax.metrics.shapes import heldout
from lcm_jax.models import int8

HERE = Path(__file__).parent
_COUNT = flags.DEFINE_integer("count", 32, "images", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "of the sampler", lower_bound=1)
_SCALE = 4.0


def error_of(params: Any) -> dict[str, float]:
    """Root mean square of what 8 bits change, over that of the weights; and the bytes of both."""
    flat = traverse_util.flatten_dict(params)
    kernels = [np.asarray(leaf, np.float32) for path, leaf in flat.items() if int8.is_quantised(path)]
    stored = [int8.quantise(kernel) for kernel in kernels]
    pairs = list(zip(kernels, stored, strict=True))
    changed = sum(
        float(np.square(one["int8"] * one["scale"] - kernel, dtype=np.float64).sum()) for kernel, one in pairs
    )
    total = sum(float(np.square(kernel, dtype=np.float64).sum()) for kernel in kernels)
    size = sum(np.asarray(leaf).nbytes for leaf in flat.values())
    saved = sum(kernel.nbytes - one["int8"].nbytes - one["scale"].nbytes for kernel, one in pairs)
    return {"relative_rms": (changed / total) ** 0.5, "bytes": size, "int8_bytes": size - saved}


def main() -> None:
    captions = [shapes.caption(spec) for spec in heldout(_COUNT.value)]
    labels, images, found = shapes.label_arrays(captions), {}, {"count": _COUNT.value, "steps": _STEPS.value}
    for weights in (None, "int8"):
        model = lcm_jax.load("shapes", dtype="float32", weights=weights)
        made = model(captions, sampler="ddim", steps=_STEPS.value, guidance_scale=_SCALE)
        images[weights] = np.stack([np.asarray(image) for image in made])
        found[f"caption_accuracy_{weights or 'float32'}"] = caption_accuracy(score(images[weights])[0], labels)
        if weights is None:
            found["weights"] = {part: error_of(model.params[part]) for part in ("unet", "text_encoder")}
    difference = np.abs(images[None].astype(float) - images["int8"])
    found["levels"] = {  # of 255
        "mean": difference.mean(),
        "rms": np.sqrt(np.square(difference).mean()),
        "largest_mean_of_an_image": difference.mean((1, 2, 3)).max(),
    }
    files.write_atomic(HERE / "int8.json", results.to_json(found, 2))
    print(results.to_json(found, 2))


if __name__ == "__main__":
    app.run(lambda argv: exit_code(main))
