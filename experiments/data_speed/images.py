"""Images per second on one core: decode alone, and decode + resize + crop to 512, by decoder and filter.

    python -m experiments.data_speed.images --count=64 [--out=FILE.json]

The pictures are synthetic, the same on every run: octaves of noise (amplitude falls with frequency, as it does in
photographs) with grain, as JPEG of quality 90. A rate is pictures per second of processor time, of all threads of this
process, so that it is one core's whatever else the machine does; the median of the repeats counts. Every method sees
the same bytes in turn, after a warm-up.
"""

import argparse
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import Image, features

from lcm_jax.data import images
from lcm_jax.files import write_text

SIZES = ((1000, 1333), (1024, 1280))  # (height, width): any ratio, and one that 512 divides exactly
TARGET = 512
QUALITY = 90
OCTAVES = ((8, 50), (32, 25), (128, 12), (512, 5))  # (cells along the height, standard deviation in levels of 255)
GRAIN = 2.0  # standard deviation of each pixel's own noise

Method = Callable[[bytes], np.ndarray]


def photo_like(number: int, height: int, width: int) -> bytes:
    """JPEG number `number`: a function of its arguments."""
    rng = np.random.default_rng([number, height, width])
    picture = np.full((height, width, 3), 128.0, np.float32)
    for cells, deviation in OCTAVES:
        coarse = rng.normal(0, deviation, (cells, cells * width // height, 3)).astype(np.float32)
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture += rng.normal(0, GRAIN, picture.shape)
    stream = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def fitted(decoder: str, resize_filter: str) -> Method:
    def method(data: bytes) -> np.ndarray:
        image = images.decode(data, decoder)
        return images.fit(image, TARGET, TARGET, resize_filter=resize_filter, decoder=decoder)[0]

    return method


def bare_opencv(data: bytes) -> np.ndarray:
    """What OpenCV takes without the header, the orientation and the test for truncation."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def methods() -> dict[str, Method]:
    """Name -> what is measured: bytes to uint8 [h w 3]."""
    table = {
        f"decode, {decoder}": lambda data, decoder=decoder: images.decode(data, decoder) for decoder in images.FILTERS
    }
    table["decode, cv2.imdecode alone"] = bare_opencv
    table["header_size"] = lambda data: np.array(images.header_size(data))
    for decoder, name in (
        ("pillow", "lanczos"),
        ("pillow", "bicubic"),
        ("pillow", "bilinear"),
        ("pillow", "box"),
        ("opencv", "area"),
    ):
        table[f"decode + fit, {decoder} {name}"] = fitted(decoder, name)
    return table


def seconds(method: Method, files: Sequence[bytes]) -> tuple[float, float]:
    """(processor, wall) seconds for all files."""
    processor, wall = time.process_time(), time.perf_counter()
    for data in files:
        method(data)
    return time.process_time() - processor, time.perf_counter() - wall


def measure(files: Sequence[bytes], repeats: int) -> list[dict]:
    """One row per method: pictures per second, and the mean difference from Pillow's lanczos in levels of 255."""
    table, reference = methods(), fitted("pillow", "lanczos")
    for method in table.values():
        method(files[0])
    times = {name: [] for name in table}
    for _ in range(repeats):  # in turn, so that a slow spell of the machine meets all
        for name, method in table.items():
            times[name].append(seconds(method, files))
    rows = []
    for name, method in table.items():
        processor, wall = (statistics.median(column) for column in zip(*times[name], strict=True))
        fits = name.startswith("decode + fit")
        gap = [np.abs(method(d).astype(float) - reference(d)).mean() for d in files[:8]] if fits else None
        rows.append(
            {
                "method": name,
                "per_core_second": len(files) / processor,
                "per_wall_second": len(files) / wall,
                "difference": float(np.mean(gap)) if fits else None,
            }
        )
    return rows


def markdown(results: dict[str, list[dict]]) -> str:
    sizes = list(results)
    lines = [
        f"| images/s on one core | {' | '.join(sizes)} | difference from Pillow lanczos |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for same in zip(*results.values(), strict=True):
        rates = " | ".join(f"{row['per_core_second']:,.0f}" for row in same)
        gaps = " / ".join(f"{row['difference']:.2f}" for row in same if row["difference"] is not None)
        lines.append(f"| {same[0]['method']} | {rates} | {gaps} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="pictures of each size")
    parser.add_argument("--repeats", type=int, default=3, help="passes over them; the median counts")
    parser.add_argument("--out", type=Path, help="a new JSON file for all numbers")
    args = parser.parse_args()
    if args.count < 1 or args.repeats < 1:
        parser.error("--count and --repeats must be at least 1")
    return args


def main() -> None:
    args = parse()
    cv2.setNumThreads(1)
    results, kibibytes = {}, {}
    for height, width in SIZES:
        files = [photo_like(number, height, width) for number in range(args.count)]
        kibibytes[f"{height} x {width}"] = sum(map(len, files)) / len(files) / 1024
        results[f"{height} x {width}"] = measure(files, args.repeats)
    versions = {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }
    print(
        f"{markdown(results)}\n\n{args.count} pictures of each size, {args.repeats} repeats; KiB per picture: "
        f"{', '.join(f'{size}: {mean:.0f}' for size, mean in kibibytes.items())}; {versions}"
    )
    if args.out:
        write_text(
            args.out,
            json.dumps(
                {
                    "count": args.count,
                    "repeats": args.repeats,
                    "kibibytes": kibibytes,
                    "versions": versions,
                    "sizes": results,
                },
                indent=1,
            )
            + "\n",
        )


if __name__ == "__main__":
    main()
