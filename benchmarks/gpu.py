"""Where the time of the engine goes on a GPU, and what the GPU can do at the same shapes.

First the limits: a copy, and products of the vision encoder's and of the language model's shapes, in
bfloat16, fp8 (a scale per row) and int8. Then captions of 20 tokens by the engine, under torch's profiler:
the time of each kernel, and the share of the time in which any kernel runs. It needs only torch and
transformers.

    python -m benchmarks.gpu --size blip2-opt-2.7b --images 2048 --output kernels.json
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.command_line import add_models, make_parser
from benchmarks.measure import report
from benchmarks.sides.engine_sides import smooth_noise
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.quantization.row_scaled import FP8
from blip2_actor.testing import save_random_checkpoint

ENCODED, DECODED = 64 * 257, 512
"""Rows of a product: 64 images of 257 tokens, or 512 texts."""
SHAPES = {
    "vision qkv": (ENCODED, 4224, 1408),
    "vision projection": (ENCODED, 1408, 1408),
    "vision fc1": (ENCODED, 6144, 1408),
    "vision fc2": (ENCODED, 1408, 6144),
    "decode qkv": (DECODED, 7680, 2560),
    "decode out_proj": (DECODED, 2560, 2560),
    "decode fc1": (DECODED, 10240, 2560),
    "decode fc2": (DECODED, 2560, 10240),
    "decode head": (DECODED, 50304, 2560),
    "square": (8192, 8192, 8192),
}
"""Rows, output channels and input channels."""
COPY_BYTES = 2 << 30


def main() -> None:
    parser = make_parser(__doc__)
    add_models(parser)
    parser.add_argument("--size", default="blip2-opt-2.7b", help="model of random weights")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--quantize", choices=("int8", "fp8", "int8-weights"), help="quantize the engine")
    parser.add_argument("--skip-limits", action="store_true", help="only profile the engine")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "gpu", "size": arguments.size, "num_beams": arguments.num_beams}
    if not arguments.skip_limits:
        found["limits"] = _limits()
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary)
        folder = save_random_checkpoint(arguments.size, models, "cuda", torch.bfloat16)
        config = EngineConfig(
            model=str(folder),
            device="cuda",
            dtype="bfloat16",
            quantize=arguments.quantize,
            skip_self_test=True,  # random weights of T5 change with every rounding
        )
        found |= _profile(config, arguments.images, arguments.num_beams)
    report(found, arguments.output)


@torch.inference_mode()
def _limits() -> dict[str, Any]:
    """Return TB/s of a copy, counting bytes read and written, and TFLOP/s of each product."""
    found: dict[str, Any] = {"copy_tbps": _copy_tbps()}
    for name, (rows, channels, width) in SHAPES.items():
        flops = 2 * rows * channels * width
        found[name] = {}
        for method, multiply in _products(rows, channels, width).items():
            found[name][method] = flops / _seconds(multiply) / 1e12
        print(f"  {name:20}", {method: round(rate) for method, rate in found[name].items()}, flush=True)
    return found


def _copy_tbps() -> float:
    source = torch.randn(COPY_BYTES // 2, device="cuda").bfloat16()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source)) / 1e12


def _products(rows: int, channels: int, width: int) -> dict[str, Callable[[], Any]]:
    left, right = (torch.randn(n, width, device="cuda") for n in (rows, channels))
    plain = [x.bfloat16() for x in (left, right)]
    small = [x.to(FP8) for x in (left, right)]
    whole = [(x * 40).to(torch.int8) for x in (left, right)]
    scales = torch.ones(rows, 1, device="cuda"), torch.ones(1, channels, device="cuda")
    return {
        "bfloat16": lambda: F.linear(*plain),
        "fp8": lambda: torch._scaled_mm(
            small[0], small[1].T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "int8": lambda: torch._int_mm(whole[0], whole[1].T),
    }


def _seconds(work: Callable[[], Any], times: int = 10) -> float:
    """Return the median of three rounds on the device's clock, after an untimed round."""
    rounds = []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(end) / times / 1e3)
    return sorted(rounds[1:])[1]


def _profile(config: EngineConfig, num_images: int, num_beams: int) -> dict[str, Any]:
    started = time.perf_counter()
    with Engine(config) as engine:
        ready_s = time.perf_counter() - started
        pictures = smooth_noise(num_images, engine.image_size_px)
        options = GenerationOptions(max_new_tokens=20, min_new_tokens=20, num_beams=num_beams)

        def run() -> float:
            start = time.perf_counter()
            engine.generate([Request(image=picture, options=options) for picture in pictures])
            return num_images / (time.perf_counter() - start)

        run()
        rate = run()
        print(f"  {rate:.0f} images/s; ready after {ready_s:.1f} s", flush=True)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    spans = []
    for event in profiled.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
            spans.append((event.time_range.start, event.time_range.end))
    for name, microseconds in times.most_common(25):
        print(f"  {microseconds / 1e3:9.1f} ms in {counts[name]:6}: {name[:90]}", flush=True)
    return {
        "ready_s": ready_s,
        "images_per_s": rate,
        "busy_fraction": _busy(sorted(spans)),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "kernels_ms": {name[:200]: microseconds / 1e3 for name, microseconds in times.most_common(60)},
    }


def _busy(spans: list[tuple[float, float]]) -> float:
    """Return the fraction of the time between the first start and the last end in which any span runs."""
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


if __name__ == "__main__":
    main()
