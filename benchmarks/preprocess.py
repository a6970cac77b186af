"""Images/s per core of image decoding, over the checkpoint's own image processor, for the same pixels.

Both sides call the same Pillow functions to decode and to resize, which are most of the work: about 1.2 ms
and 2.5 ms of 4 ms at 640 x 480. This project can only gain on what the processor does around them: copies
between layouts before and after the resize, and float64 on the way to float32. The engine normalizes on its
device, where it costs almost nothing. The contender "normalised" adds normalization on the CPU, so that both
sides end with the same float32 values, bit for bit (checked at the start).

"children" is `DecodePool`, with its child and this process on the same core. Draft mode decodes large JPEGs
at a smaller size; its pixels differ by the printed amount.

Everything runs on one core, in alternating rounds. The figures are CPU time, which other work on the machine
disturbs least; wall-clock time is printed next to it.

    python -m benchmarks.preprocess --output benchmarks/results/preprocess_cpu.json
"""

from __future__ import annotations

import io
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from benchmarks.command_line import make_parser
from benchmarks.measure import Timing, alternate, quotients, ratio, report
from blip2_actor import DecodePool, ImageLimits, decode_image, resize_image
from blip2_actor.models.vision import PixelNormalizer

SIZE_PX = 224
PHOTOGRAPHS = {(640, 480): 24, (1280, 960): 10, (2048, 1536): 5}
"""Width and height, and the number of images per round."""
DEMO_SIZE_PX = 64
SMALL = {(64, 64): 500, (128, 128): 250, (320, 240): 100}
DRAFT = ImageLimits(jpeg_draft=True)
TO_REACH = {"with decoding": 1.25, "after decoding": 1.45, "draft": 2.0}


def photograph(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG of gradients, waves and sensor noise, as large as a camera's of that size."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    gradients = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    waves = 40 * np.sin(x / rng.uniform(10, 40) + y / rng.uniform(10, 40))[..., None]
    pixels = gradients + waves + rng.normal(0, 10, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def cpu_time_s() -> float:
    """Return the CPU seconds of this process and its children, with a resolution of nanoseconds."""
    children = psutil.Process().children()
    nanoseconds = sum(int(Path(f"/proc/{child.pid}/schedstat").read_text().split()[0]) for child in children)
    return time.process_time() + nanoseconds / 1e9


def figures(name: str, cpu: dict[str, Timing], wall: dict[str, Timing], num_images: int) -> dict[str, Any]:
    return {
        "images_per_s_per_core": round(num_images / cpu[name].median_s, 1),
        "ms": round(cpu[name].median_s / num_images * 1e3, 3),
        "spread": round(cpu[name].spread, 3),
        "wall_ms": round(wall[name].median_s / num_images * 1e3, 3),
    }


def compare(size: tuple[int, int], num_images: int, rounds: int) -> dict[str, Any]:
    """Measure all contenders on photographs of one size."""
    files = [photograph(*size, seed) for seed in range(num_images)]
    decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    processor = BlipImageProcessorPil(size={"height": SIZE_PX, "width": SIZE_PX})
    normalizer = PixelNormalizer(
        list(processor.image_mean), list(processor.image_std), processor.rescale_factor
    )

    def reference(images: list[Image.Image]) -> np.ndarray:
        return processor(images, return_tensors="np")["pixel_values"]

    def ours(limits: ImageLimits = ImageLimits()) -> np.ndarray:
        return np.stack([decode_image(data, SIZE_PX, limits).array(SIZE_PX) for data in files])

    def normalized(pixels: np.ndarray) -> np.ndarray:
        return normalizer(torch.from_numpy(pixels), torch.float32).numpy()

    if not (normalized(ours()) == reference(decoded)).all():
        raise SystemExit("the pixels must equal the reference's, got other pixels; run tests/parity first")
    with DecodePool(SIZE_PX) as pool, DecodePool(SIZE_PX, DRAFT) as draft_pool:
        contenders: dict[str, Callable[[], Any]] = {
            "reference after decoding": lambda: reference(decoded),
            "ours after decoding": lambda: [resize_image(image, SIZE_PX) for image in decoded],
            "reference with decoding": lambda: reference([Image.open(io.BytesIO(data)) for data in files]),
            "ours with decoding": lambda: [decode_image(data, SIZE_PX) for data in files],
            "ours normalised": lambda: normalized(ours()),
            "ours draft": lambda: [decode_image(data, SIZE_PX, DRAFT) for data in files],
            "children with decoding": lambda: pool.decode(files),
            "children draft": lambda: draft_pool.decode(files),
        }
        wall, cpu = alternate(contenders, rounds, cpu_s=cpu_time_s)
    difference = np.abs(ours().astype(int) - ours(DRAFT))
    pairs = [("reference after decoding", "ours after decoding")]
    pairs += [("reference with decoding", name) for name in list(contenders)[3:]]
    return {
        "file_kib": round(statistics.mean(map(len, files)) / 1024),
        "contenders": {name: figures(name, cpu, wall, num_images) for name in contenders},
        "ratios": {
            name: {
                "median": round(ratio(cpu, slow, name), 2),
                "least": round(min(quotients(cpu, slow, name)), 2),
                "most": round(max(quotients(cpu, slow, name)), 2),
                "wall": round(ratio(wall, slow, name), 2),
            }
            for slow, name in pairs
        },
        "draft_difference_of_255": {
            "mean": round(float(difference.mean()), 2),
            "most": int(difference.max()),
        },
    }


def small_images(size: tuple[int, int], num_images: int, rounds: int) -> dict[str, Any]:
    """Measure the cost of a decoding process where decoding costs little: small images, the demo's size."""
    files = [photograph(*size, seed % 20) for seed in range(num_images)]
    with DecodePool(DEMO_SIZE_PX) as pool:
        contenders: dict[str, Callable[[], Any]] = {
            "ours": lambda: [decode_image(data, DEMO_SIZE_PX) for data in files],
            "children": lambda: pool.decode(files),
        }
        wall, cpu = alternate(contenders, rounds, cpu_s=cpu_time_s)
    return {name: figures(name, cpu, wall, num_images) for name in contenders}


def mean_ratio(results: dict[str, Any], name: str) -> float:
    """Return the geometric mean of a ratio over the sizes."""
    found = [result["ratios"][name]["median"] for result in results.values()]
    return round(math.exp(statistics.mean(map(math.log, found))), 2)


def show(name: str, result: dict[str, Any]) -> None:
    difference = result["draft_difference_of_255"]
    print(
        f"\n{name}, {result['file_kib']} KiB, to {SIZE_PX} px: "
        "CPU time, images/s per core, ratio to the reference"
    )
    for contender, found in result["contenders"].items():
        times = result["ratios"].get(contender)
        print(
            f"  {contender:26}{found['ms']:8.2f} ms{found['images_per_s_per_core']:9.1f}/s"
            + (
                f"{times['median']:7.2f} ({times['least']} to {times['most']}; wall {times['wall']})"
                if times
                else ""
            )
        )
    print(f"  draft differs by {difference['mean']} of 255, at most by {difference['most']}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for the decoding processes too
    torch.set_num_threads(1)

    load = os.getloadavg()[0]
    results = {}
    for (width, height), num_images in PHOTOGRAPHS.items():
        name = f"{width}x{height}"
        results[name] = compare((width, height), num_images, arguments.rounds)
        show(name, results[name])
    small = {f"{w}x{h}": small_images((w, h), n, arguments.rounds) for (w, h), n in SMALL.items()}
    report(
        {
            "benchmark": "preprocess",
            "size_px": SIZE_PX,
            "cores": 1,
            "rounds": arguments.rounds,
            "load_average_before": load,
            "pillow": PIL.__version__,
            "to_reach": TO_REACH,
            "mean_ratios": {name: mean_ratio(results, name) for name in results["640x480"]["ratios"]},
            "photographs": results,
            f"small_images_to_{DEMO_SIZE_PX}_px": small,
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
