"""Images per second of a quantized engine, over the same engine in float32 and in bfloat16.

The mid-size model of `benchmarks.engine` with random weights, texts of 4 to 30 forced tokens. Each side has
its own process, and the sides alternate. CPU time is compared, because other work on the machine hardly
changes it; wall-clock time is shown next to it. The reference is transformers' `generate` in float32, 32
images at a time; it runs in the same rounds, unless it is skipped.

Products of bytes depend on the CPU's instructions. Three variables limit all sides to older ones: oneDNN,
torch's own kernels, and MKL, with which transformers multiplies.

    python -m benchmarks.quantized --threads 2 --images 32
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python -m benchmarks.quantized --dtypes float32 --threads 2 --images 32

On a GPU, only the time by the clock counts:

    pytest -m gpu tests/parity/models/test_quantized_gpu.py
    python -m benchmarks.quantized --device cuda --methods int8 fp8 --dtypes bfloat16 --size blip2-opt-2.7b \\
        --images 256 --max-slots 128
"""

from __future__ import annotations

import os
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.command_line import add_models, make_parser
from benchmarks.measure import alternate, report
from benchmarks.serve.processes import cpu_s
from benchmarks.sides.contender import Contender
from benchmarks.sides.engine_sides import EngineSide, ReferenceSide
from blip2_actor import EngineConfig
from blip2_actor.testing import save_random_checkpoint

REFERENCE, OVER = "reference float32", " over "
REFERENCE_BATCH = 32
"""The best of 16, 32 and 64 (`results/engine_cpu.json`)."""


def main() -> None:
    parser = make_parser(__doc__)
    add_models(parser)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes to compare with")
    parser.add_argument("--methods", nargs="+", default=["int8"], help="methods of --quantize")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="midsize", help="model of random weights, such as blip2-opt-2.7b")
    parser.add_argument("--max-slots", type=int, default=32)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-reference", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    draw = random.Random(0)
    work = [(image, None, draw.randint(4, 30)) for image in range(arguments.images)]
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary)
        stored = torch.float32 if arguments.size == "midsize" else torch.bfloat16
        folder = save_random_checkpoint(arguments.size, models, arguments.device, stored)
        sides: dict[str, Contender] = {}
        for dtype in arguments.dtypes:
            for quantize in (None, *arguments.methods):
                config = EngineConfig(
                    model=str(folder),
                    dtype=dtype,
                    device=arguments.device,
                    max_slots=arguments.max_slots,
                    num_threads=arguments.threads,
                    quantize=quantize,
                )
                name = f"{quantize}{OVER}{dtype}" if quantize else dtype
                sides[name] = Contender(EngineSide, config, work, 1, threads=arguments.threads)
        if not arguments.skip_reference:
            sides[REFERENCE] = Contender(
                ReferenceSide, folder, "float32", arguments.device, work, 1, threads=arguments.threads
            )
        found = {"benchmark": "quantized", "threads_per_side": arguments.threads}
        report(found | _measure(sides, arguments.images, arguments.rounds), arguments.output)


def _measure(sides: dict[str, Contender], num_images: int, rounds: int) -> dict[str, Any]:
    """Time all sides alternately, without the first round."""
    processes = [psutil.Process(side.pid) for side in sides.values()]
    contenders = {
        name: partial(side.call, "run", *([REFERENCE_BATCH] if name == REFERENCE else []))
        for name, side in sides.items()
    }
    timings = alternate(contenders, rounds, cpu_s=lambda: sum(map(cpu_s, processes)))
    found: dict[str, Any] = {"num_images": num_images, "rounds": rounds}
    found["quantization"] = {name: side.call("quantization") for name, side in sides.items() if OVER in name}
    for clock, of_sides in zip(("by_the_clock", "by_cpu_time"), timings, strict=True):
        medians = {name: timing.median_s for name, timing in of_sides.items()}
        found[f"images_per_s_{clock}"] = {name: num_images / median for name, median in medians.items()}
        found[f"ratios_{clock}"] = {
            f"{name}, compared with {other}": medians[other] / medians[name]
            for name in medians
            if name != REFERENCE
            for other in medians
            if OVER not in other and other != name
        }
    limits = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    found["limited_to"] = {name: os.environ[name] for name in limits if name in os.environ}
    found["peak_memory_gib"] = {name: side.close() for name, side in sides.items()}
    return found


if __name__ == "__main__":
    main()
