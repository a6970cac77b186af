"""Images/s of the engine over transformers' `generate`, on the same weights, images and threads.

The work of one image is almost all matrix products: on the mid-size model 46 of 67 GFLOP are the vision
encoder's, where both sides run at the device's peak. What can be gained is the rest: prefill without
padding, decode steps over many slots instead of a batch that waits for its longest text, one pass of the
encoder for several prompts. So the limit stands beside each figure, by arithmetic, and "x of peak" is
taken against a 2048^3 product timed in turn with the rest.

The reference gets its best batch size, found in the same run, and pixel values that are ready.

    python -m benchmarks.engine midsize-float32            # one case
    python -m benchmarks.engine --list
    python -m benchmarks.engine opt-2.7b --device cuda     # needs torch and transformers only
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from benchmarks.measure import alternate, product, ratio, report
from benchmarks.models import checkpoint
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoint import DEMO_FOLDER


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    dtype: str = "float32"
    reference_dtype: str | None = None
    num_images: int = 32
    lengths: tuple[int, int] = (4, 30)
    """New tokens per text, forced, drawn uniformly with a seed."""
    prompts: tuple[str | None, ...] = (None,)
    num_beams: int = 1
    reference_batches: Sequence[int] = (8, 16, 32)
    max_slots: int | None = None
    rounds: int = 3
    limit: float | None = None
    """The ratio that arithmetic allows."""
    to_reach: float | None = None
    engine: dict[str, Any] = field(default_factory=dict)


QUESTIONS = tuple(
    f"Question: what is {thing}? Answer:" for thing in ("this", "on the left", "behind", "its colour")
)
CASES = {
    "midsize-float32": Case("midsize", limit=1.56, to_reach=1.25),
    "midsize-bfloat16": Case("midsize", "bfloat16", "bfloat16", limit=2.0, to_reach=1.4),
    "midsize-default": Case("midsize", "auto", "float32", limit=4.15, to_reach=2.8),
    "midsize-long": Case("midsize", lengths=(4, 64), to_reach=1.4),
    "midsize-questions": Case("midsize", lengths=(4, 64), prompts=QUESTIONS, num_images=16, to_reach=2.5),
    "midsize-beams": Case("midsize", num_beams=5, lengths=(20, 20), num_images=16, limit=1.85, to_reach=1.3),
    "demo": Case(
        "demo",
        num_images=1024,
        lengths=(0, 0),
        reference_batches=(64, 128, 256, 512),
        limit=1.8,
        to_reach=1.2,
    ),
    "demo-16": Case("demo", num_images=512, reference_batches=(16,), max_slots=16, to_reach=2.0),
    "opt-2.7b": Case(
        "blip2-opt-2.7b",
        "bfloat16",
        "bfloat16",
        num_images=1024,
        lengths=(20, 20),
        reference_batches=(32, 64, 128, 256),
        to_reach=1.3,
    ),
    "opt-2.7b-beams": Case(
        "blip2-opt-2.7b",
        "bfloat16",
        "bfloat16",
        num_images=256,
        lengths=(20, 20),
        num_beams=5,
        reference_batches=(16, 32, 64),
        to_reach=1.5,
    ),
    "flan-t5-xl": Case(
        "blip2-flan-t5-xl",
        "bfloat16",
        "bfloat16",
        num_images=1024,
        lengths=(20, 20),
        reference_batches=(32, 64, 128),
    ),
}

DEFAULT_CASES = {
    "cpu": [name for name, case in CASES.items() if not case.model.startswith("blip2")],
    "cuda": [name for name, case in CASES.items() if case.model.startswith("blip2")],
}


class Reference:
    """transformers, used as its documentation says, a batch at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.device, self.dtype = device, dtype

    def input_ids(self, prompt: str | None) -> list[int]:
        config = self.model.config
        text = config.text_config
        start = text.bos_token_id if text.model_type == "opt" else text.eos_token_id
        ids = self.tokenizer(prompt).input_ids if prompt else [start]
        return [config.image_token_index] * config.num_query_tokens + ids

    def run(
        self, work: list[tuple[int, str | None, int]], pixel_values: torch.Tensor, batch: int, num_beams: int
    ) -> list[list[int]]:
        """New tokens of each (image, prompt, length); a batch runs to its longest text."""
        found: list[list[int]] = []
        for start in range(0, len(work), batch):
            rows = work[start : start + batch]
            ids = [self.input_ids(prompt) for _, prompt, _ in rows]
            widest = max(map(len, ids))
            input_ids = torch.tensor([[1] * (widest - len(i)) + i for i in ids], device=self.device)
            longest = max(length for *_, length in rows)
            forced = (
                {"max_new_tokens": longest, "min_new_tokens": longest} if longest else {"max_new_tokens": 30}
            )
            output = self.model.generate(
                pixel_values[[image for image, *_ in rows]],
                input_ids=input_ids,
                attention_mask=(input_ids != 1).long(),
                do_sample=False,
                num_beams=num_beams,
                **forced,
            )
            is_opt = self.model.config.text_config.model_type == "opt"
            skip = input_ids.shape[1] if is_opt else 1
            new = output[:, skip:].tolist()
            found += [row[:length] if length else row for row, (*_, length) in zip(new, rows, strict=True)]
        return found


def run(case: Case, folder: Path, device: torch.device, quick: bool) -> dict[str, Any]:
    """Measure one case."""
    num_images = max(case.num_images // 4, 4) if quick else case.num_images
    choose = random.Random(0)
    work = [
        (image, prompt, choose.randint(*case.lengths))
        for image in range(num_images)
        for prompt in case.prompts
    ]
    started = time.perf_counter()
    config = EngineConfig(
        model=str(folder), dtype=case.dtype, device=str(device), max_slots=case.max_slots, **case.engine
    )
    engine = Engine(config)
    pixels = _pictures(num_images, engine.image_size_px)
    engine.generate([Request(image=pixels[0])], GenerationOptions(max_new_tokens=1))
    first_caption_s = time.perf_counter() - started
    reference_dtype = getattr(torch, case.reference_dtype or case.dtype)
    reference = Reference(folder, reference_dtype, device)
    normalized = engine.model.normalizer(torch.from_numpy(pixels).to(device), reference_dtype)

    def ours() -> list[tuple[int, ...]]:
        images = [engine.image(picture) for picture in pixels]
        asked = [
            Request(image=images[image], prompt=prompt, options=_options(length, case.num_beams))
            for image, prompt, length in work
        ]
        return [result.token_ids for result in engine.generate(asked)]

    agreement = _agreement(ours(), reference.run(work, normalized, case.reference_batches[0], case.num_beams))
    contenders: dict[str, Callable[[], Any]] = {"engine": ours}
    for batch in case.reference_batches:
        contenders[f"reference at {batch}"] = lambda batch=batch: reference.run(
            work, normalized, batch, case.num_beams
        )
    compute_dtype = engine.model.query_tokens.dtype
    contenders["2048^3 product"] = product(compute_dtype, device)
    contenders["vision encoder"] = _vision(engine, pixels[: min(num_images, 32)])
    rounds = 1 if quick else case.rounds
    timings = alternate(contenders, rounds)
    engine.close()
    names = [name for name in timings if name.startswith("reference")]
    best = min(names, key=lambda name: timings[name].median_s)
    peak_flops = 2 * 2048**3 / timings["2048^3 product"].median_s
    vision_flops = _vision_flops(engine) * min(num_images, 32) / timings["vision encoder"].median_s
    for name, timing in timings.items():
        if "product" not in name and "vision" not in name:
            speed = num_images / timing.median_s
            print(f"  {name:20} {speed:9.2f} images/s  (spread {timing.spread:.0%})")
    result = {
        "images_per_s": num_images / timings["engine"].median_s,
        "reference_images_per_s": {name: num_images / timings[name].median_s for name in names},
        "ratio": ratio(timings, best, "engine"),
        "to_reach": case.to_reach,
        "limit": case.limit,
        "agreement": agreement,
        "vision_over_peak": vision_flops / peak_flops,
        "peak_gflops": peak_flops / 1e9,
        "spread": {name: timing.spread for name, timing in timings.items()},
        "first_caption_s": first_caption_s,
        "peak_memory_gib": _peak_memory_gib(device),
        "dtype": str(compute_dtype),
        "reference_dtype": str(reference_dtype),
        "num_images": num_images,
        "rounds": rounds,
    }
    print(
        f"  ratio {result['ratio']:.2f} (to reach {case.to_reach}, limit {case.limit}), "
        f"same tokens {agreement:.1%}, vision {result['vision_over_peak']:.0%} of peak"
    )
    return result


def _options(length: int, num_beams: int) -> GenerationOptions:
    if length == 0:
        return GenerationOptions(max_new_tokens=30, num_beams=num_beams)
    return GenerationOptions(max_new_tokens=length, min_new_tokens=length, num_beams=num_beams)


def _pictures(count: int, size_px: int) -> np.ndarray:
    """uint8[count, S, S, 3], smooth noise."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    step = -(-size_px // 8)
    return np.ascontiguousarray(coarse.repeat(step, 1).repeat(step, 2)[:, :size_px, :size_px])


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    same = [list(a) == list(b)[: len(a)] for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def _vision(engine: Engine, pixels: np.ndarray) -> Callable[[], None]:
    dtype, device = engine.model.query_tokens.dtype, engine.model.query_tokens.device
    pixel_values = engine.model.normalizer(torch.from_numpy(pixels).to(device), dtype)

    @torch.inference_mode()
    def encode() -> None:
        for batch in pixel_values.split(engine.encode_batch):
            engine.model.image_features(batch)

    return encode


def _vision_flops(engine: Engine) -> float:
    """Of one image; 2 per multiply-add, the products alone."""
    config = engine.model.config.vision_config
    width, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
    layer = 8 * tokens * width**2 + 4 * tokens * width * config.intermediate_size + 4 * tokens**2 * width
    return config.num_hidden_layers * layer + 2 * (tokens - 1) * 3 * config.patch_size**2 * width


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="which to run; none runs those meant for the device")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides")
    parser.add_argument("--models", type=Path, help="where random checkpoints are kept between runs")
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, one round")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"cases must be among {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary)
        results = {}
        for name in arguments.cases or DEFAULT_CASES[device.type]:
            case = CASES[name]
            print(name)
            stored = torch.float32 if case.model == "midsize" else torch.bfloat16
            folder = (
                DEMO_FOLDER
                if case.model == "demo"
                else checkpoint(case.model, models, arguments.device, stored)
            )
            results[name] = run(case, folder, device, arguments.quick)
    report({"benchmark": "engine", "cases": results}, arguments.output)


if __name__ == "__main__":
    main()
