"""Images per second on one core: decode alone, and decode + resize + crop to 512, by decoder and filter.

    python -m experiments.data_speed.images --count=64 [--out=FILE.json]

The images are synthetic, the same on every run: octaves of noise (amplitude falls with frequency, as it does in
photographs) with grain, as JPEG of quality 90. A rate is images per second of processor time over all threads of this
process, so that it is one core's, whatever else the machine does; the median of the repeats counts. The methods are
interleaved on the same bytes, after a warm-up.
"""

import argparse
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import Image, features

from experiments import results
from lcm_jax import files
from lcm_jax.data import images
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

SIZES = ((1000, 1333), (1024, 1280))  # (height, width): any ratio, and one that 512 divides exactly
TARGET = 512
QUALITY = 90
OCTAVES = ((8, 50), (32, 25), (128, 12), (512, 5))  # (cells along the height, standard deviation in levels of 255)
GRAIN = 2.0  # standard deviation of each pixel's own noise
FITS = (("pillow", "lanczos"), ("pillow", "bicubic"), ("pillow", "bilinear"), ("pillow", "box"), ("opencv", "area"))

Method = Callable[[bytes], np.ndarray]


def photo_like(number: int, height: int, width: int) -> bytes:
    """JPEG number `number`; depends on the arguments alone."""
    rng = np.random.default_rng([number, height, width])
    image = np.full((height, width, 3), 128.0, np.float32)
    for cells, deviation in OCTAVES:
        coarse = rng.normal(0, deviation, (cells, cells * width // height, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, GRAIN, image.shape)
    stream = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def methods() -> dict[str, Method]:
    """Name -> what is measured: bytes to uint8 [h w 3]; "decode + fit" resizes and crops to TARGET."""

    def fitted(decoder: str, resize_filter: str) -> Method:
        def method(data: bytes) -> np.ndarray:
            image = images.decode(data, decoder)
            return images.fit(image, TARGET, TARGET, resize_filter=resize_filter, decoder=decoder)[0]

        return method

    table = {f"decode, {name}": lambda data, name=name: images.decode(data, name) for name in images.FILTERS}
    return table | {f"decode + fit, {decoder} {name}": fitted(decoder, name) for decoder, name in FITS}


def measure(data: Sequence[bytes], repeats: int) -> list[dict]:
    """One row per method: images per second, and the mean difference from Pillow's lanczos in levels of 255."""
    table = methods()
    reference = table["decode + fit, pillow lanczos"]
    for method in table.values():
        method(data[0])
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(repeats):
        for name, method in table.items():
            begun = time.process_time()
            for one in data:
                method(one)
            seconds[name].append(time.process_time() - begun)
    rows = []
    for name, method in table.items():
        rows.append({"method": name, "per_core_second": len(data) / statistics.median(seconds[name])})
        if "fit" in name:
            gaps = [np.abs(method(one).astype(float) - reference(one)).mean() for one in data[:8]]
            rows[-1]["difference"] = float(np.mean(gaps))
    return rows


def markdown(by_size: dict[str, list[dict]]) -> str:
    rows = []
    for same in zip(*by_size.values(), strict=True):
        rates = [f"{row['per_core_second']:,.0f}" for row in same]
        gaps = " / ".join(f"{row['difference']:.2f}" for row in same if "difference" in row)
        rows.append([same[0]["method"], *rates, gaps])
    return results.table(["images/s on one core", *by_size, "difference from Pillow lanczos"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="images of each size")
    parser.add_argument("--repeats", type=int, default=3, help="passes over them; the median counts")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = parser.parse_args()
    if args.count < 1 or args.repeats < 1:
        raise LcmError(f"--count={args.count} and --repeats={args.repeats} must be at least 1")
    cv2.setNumThreads(1)
    found, kibibytes = {}, {}
    for height, width in SIZES:
        data = [photo_like(number, height, width) for number in range(args.count)]
        kibibytes[f"{height} x {width}"] = round(sum(map(len, data)) / len(data) / 1024)
        found[f"{height} x {width}"] = measure(data, args.repeats)
    versions = {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }
    about = {"count": args.count, "repeats": args.repeats, "kibibytes": kibibytes, "versions": versions}
    print(f"{markdown(found)}\n{about}")
    if args.out:
        files.write_atomic(args.out, results.to_json(about | {"sizes": found}, 3))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
