"""Images/s of the engine over transformers' `generate`, on the same weights, images and threads.

The work of one image is almost all matrix products: on the mid-size model 46 of 67 GFLOP are the vision
encoder's, where both sides run at the device's peak. What can be gained is the rest: prefill without
padding, decode steps over many slots instead of a batch that waits for its longest text, one pass of the
encoder for several prompts. So the limit stands beside each figure, by arithmetic, and "x of peak" is
taken against a square matrix product (2048^3 on a CPU, 8192^3 on a GPU) timed in turn with the vision
encoder alone.

Each side has a process of its own. On a CPU rounds alternate, so that what disturbs one side disturbs both.
A GPU is nobody else's: there the engine is timed first and ends before the reference is loaded, which so has
all memory, and each figure is in the JSON (`--output`) as soon as it is known. The reference gets its best
batch size, found in the same run, and pixel values that are ready.

"agreement" is the part of the texts whose tokens are all the reference's. In bfloat16 it is low, and says
little: a random model's best tokens are near ties, which the two sides' rounding decides differently, and
all tokens behind the first such one differ. In float32 it should be 1.

    python -m benchmarks.engine midsize-float32            # one case
    python -m benchmarks.engine --list
    python -m benchmarks.engine opt-2.7b --device cuda     # needs torch and transformers only
    python -m benchmarks.engine opt-2.7b --reference-batches 64 128 --skip-vision --output opt.json
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Timing, alternate, ratio, report, write
from benchmarks.sides.contender import Contender
from benchmarks.sides.engine_sides import EncoderSide, EngineSide, ReferenceSide, Work
from blip2_actor import EngineConfig
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.testing import save_random_checkpoint


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    dtype: str = "float32"
    reference_dtype: str | None = None
    num_images: int = 32
    lengths: tuple[int, int] = (4, 30)
    """New tokens per text, forced, drawn uniformly with a seed; 0 lets a text end by itself."""
    prompts: tuple[str | None, ...] = (None,)
    num_beams: int = 1
    reference_batches: Sequence[int] = (8, 16, 32)
    """Batch sizes of the reference; none leaves it out."""
    max_slots: int | None = None
    rounds: int = 3
    limit: float | None = None
    """The ratio that arithmetic allows."""
    to_reach: float | None = None
    """Over the reference at its best batch size."""
    to_reach_at: tuple[int, float] | None = None
    """Over the reference at a batch size of its users' choice."""
    images_per_s_to_reach: float | None = None
    images_per_s_limit: float | None = None
    """On one H200, by arithmetic."""
    engine: dict[str, Any] = field(default_factory=dict)


QUESTIONS = tuple(
    f"Question: what is {thing}? Answer:" for thing in ("this", "on the left", "behind", "its colour")
)
STEADY: dict[str, Any] = {"num_images": 64, "reference_batches": (16, 32, 64)}
"""Enough images that a run is not mostly its beginning and its end."""
CASES = {
    "midsize-float32": Case("midsize", **STEADY, limit=1.56, to_reach=1.25),
    "midsize-bfloat16": Case("midsize", "bfloat16", "bfloat16", **STEADY, limit=2.0, to_reach=1.4),
    "midsize-default": Case("midsize", "auto", "float32", **STEADY, limit=4.15, to_reach=2.8),
    "midsize-long": Case("midsize", lengths=(4, 64), to_reach=1.4),
    "midsize-questions": Case(
        "midsize",
        lengths=(4, 64),
        prompts=QUESTIONS,
        num_images=16,
        reference_batches=(16, 32),
        to_reach=2.5,
    ),
    "midsize-beams": Case(
        "midsize",
        num_beams=5,
        lengths=(20, 20),
        num_images=16,
        reference_batches=(8, 16),
        limit=1.85,
        to_reach=1.3,
    ),
    "demo": Case(
        "demo",
        num_images=1024,
        lengths=(0, 0),
        reference_batches=(64, 128, 256, 512),
        limit=1.8,
        to_reach=1.2,
    ),
    "demo-16": Case("demo", num_images=512, reference_batches=(16,), max_slots=16, to_reach=2.0),
    "opt-2.7b-cpu": Case(
        "blip2-opt-2.7b", "bfloat16", num_images=4, lengths=(20, 20), reference_batches=(), rounds=1
    ),
    "opt-2.7b": Case(
        "blip2-opt-2.7b",
        "bfloat16",
        "bfloat16",
        num_images=1024,
        lengths=(20, 20),
        reference_batches=(32, 64, 128, 256),
        to_reach=1.3,
        to_reach_at=(32, 4.0),
        images_per_s_to_reach=600,
        images_per_s_limit=986,
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
        to_reach_at=(16, 3.0),
    ),
    "flan-t5-xl": Case(
        "blip2-flan-t5-xl",
        "bfloat16",
        "bfloat16",
        num_images=1024,
        lengths=(20, 20),
        reference_batches=(32, 64, 128),
        images_per_s_to_reach=600,
        images_per_s_limit=1161,
    ),
}

ON_GPU = ("opt-2.7b", "opt-2.7b-beams", "flan-t5-xl")
DEFAULT_CASES = {"cpu": [name for name in CASES if name not in ON_GPU], "cuda": list(ON_GPU)}
VISION_IMAGES = {"cpu": 32, "cuda": 256}
"""On a GPU a multiple of the batch: each other size would be compiled too."""

Keep = Callable[[dict[str, Any]], None]
"""Takes what is known of a case so far."""


def run(
    case: Case,
    folder: Path,
    device: str,
    threads: int | None,
    quick: bool,
    rounds: int | None,
    skip_vision: bool,
    keep: Keep,
) -> None:
    """Measure one case; `keep` gets more of it each time."""
    num_images = max(case.num_images // 4, 4) if quick else case.num_images
    rounds = rounds or (1 if quick else case.rounds)
    config = EngineConfig(
        model=str(folder),
        dtype=case.dtype,
        device=device,
        max_slots=case.max_slots,
        num_threads=threads,
        **case.engine,
    )
    found: dict[str, Any] = {
        "to_reach": case.to_reach,
        "limit": case.limit,
        "to_reach_at": case.to_reach_at,
        "images_per_s_to_reach": case.images_per_s_to_reach,
        "images_per_s_limit": case.images_per_s_limit,
        "num_images": num_images,
        "rounds": rounds,
    }

    def add(more: dict[str, Any]) -> None:
        found.update(more)
        keep(found)

    _generation(case, config, num_images, rounds, add)
    print(
        f"  ratio {found['ratio'] or 0:.2f} (to reach {case.to_reach}, limit {case.limit}), "
        f"{found['peak_memory_gib']:.1f} GiB, first caption after {found['first_caption_s']:.1f} s",
        flush=True,
    )
    if not skip_vision:
        add(_vision(config, min(num_images, VISION_IMAGES[_type(device)]), rounds, case, threads))
        print(
            f"  vision {found['vision_over_peak']:.0%} of peak, {found['vision_over_reference'] or 0:.2f} of "
            "the reference's speed",
            flush=True,
        )


def _generation(case: Case, config: EngineConfig, num_images: int, rounds: int, keep: Keep) -> None:
    """Captions from both sides: in turn on a CPU, first the one and then the other on a GPU."""
    choose = random.Random(0)
    work: Work = [
        (image, prompt, choose.randint(*case.lengths))
        for image in range(num_images)
        for prompt in case.prompts
    ]
    timings: dict[str, Timing] = {}

    def measure(contenders: dict[str, Callable[[], Any]], warm_up: int = 0) -> None:
        found = alternate(contenders, rounds, warm_up)
        timings.update(found)
        for name, timing in found.items():
            print(
                f"  {name:20} {num_images / timing.median_s:9.2f} images/s  (spread {timing.spread:.0%})",
                flush=True,
            )
        keep(_figures(timings, num_images))

    engine = Contender(EngineSide, config, work, case.num_beams, threads=config.num_threads)
    tokens = engine.call("run")  # which also warms it up
    keep({"first_caption_s": engine.call("first_caption_s"), "agreement": None})
    ours = {"engine": lambda: engine.call("run")}
    takes_turns = _type(config.device) == "cpu" and bool(case.reference_batches)
    if not takes_turns:
        measure(ours)
        keep({"peak_memory_gib": engine.close()})
    if not case.reference_batches:
        return
    reference = _reference(case, config, work)
    agreement = _agreement(tokens, reference.call("run", case.reference_batches[0]))
    keep({"agreement": agreement, "reference_dtype": case.reference_dtype or case.dtype})
    theirs = {f"reference at {n}": partial(reference.call, "run", n) for n in case.reference_batches}
    if takes_turns:
        measure(ours | theirs)
        keep({"peak_memory_gib": engine.close()})
    else:
        for name, call in theirs.items():
            measure({name: call}, warm_up=1)  # kernels are loaded for each batch size
    keep({"reference_peak_memory_gib": reference.close()})


def _figures(timings: dict[str, Timing], num_images: int) -> dict[str, Any]:
    """What follows from the contenders timed so far, the engine among them."""
    names = [name for name in timings if name != "engine"]
    best = min(names, key=lambda name: timings[name].median_s, default=None)
    return {
        "images_per_s": num_images / timings["engine"].median_s,
        "reference_images_per_s": {name: num_images / timings[name].median_s for name in names},
        "ratio": ratio(timings, best, "engine") if best else None,
        "ratios": {name: ratio(timings, name, "engine") for name in names},
        "spread": _spread(timings),
    }


def _vision(
    config: EngineConfig, num_images: int, rounds: int, case: Case, threads: int | None
) -> dict[str, Any]:
    """The vision encoder alone, against a matrix product and against the reference's."""
    ours = Contender(EncoderSide, config, num_images, threads=threads)
    dtype, batch, flops, product_flops = ours.call("described")
    contenders = {
        "vision encoder": lambda: ours.call("encode"),
        "matrix product": lambda: ours.call("multiply"),
    }
    if case.reference_batches:
        reference = _reference(case, config, [(image, None, 0) for image in range(num_images)])
        contenders["reference's"] = lambda: reference.call("encode", num_images, batch)
    timings = alternate(contenders, max(rounds, 3), warm_up=2)
    ours.close()
    peak_flops = product_flops / timings["matrix product"].median_s
    found = {
        "vision_over_peak": flops * num_images / timings["vision encoder"].median_s / peak_flops,
        "peak_gflops": peak_flops / 1e9,
        "vision_over_reference": None,
        "vision_spread": _spread(timings),
        "dtype": dtype,
    }
    if case.reference_batches:
        reference.close()
        found["vision_over_reference"] = ratio(timings, "reference's", "vision encoder")
    return found


def _reference(case: Case, config: EngineConfig, work: Work) -> Contender:
    dtype = case.reference_dtype or case.dtype
    folder = Path(config.model)
    return Contender(
        ReferenceSide, folder, dtype, config.device, work, case.num_beams, threads=config.num_threads
    )


def _type(device: str) -> str:
    return torch.device(device).type


def _spread(timings: dict[str, Timing]) -> dict[str, float]:
    return {name: timing.spread for name, timing in timings.items()}


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    same = [list(a) == list(b)[: len(a)] for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="which to run; none runs those meant for the device")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides")
    parser.add_argument("--models", type=Path, help="where random checkpoints are kept between runs")
    parser.add_argument("--rounds", type=int, help="of every case, instead of its own number")
    parser.add_argument(
        "--reference-batches", type=int, nargs="*", help="instead of the case's own; none leaves it out"
    )
    parser.add_argument("--skip-vision", action="store_true", help="leave out the vision encoder alone")
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, one round")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"cases must be among {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary)
        results: dict[str, Any] = {}
        for name in arguments.cases or DEFAULT_CASES[_type(arguments.device)]:
            case = CASES[name]
            if arguments.reference_batches is not None:
                case = replace(case, reference_batches=arguments.reference_batches)
            print(name, flush=True)
            stored = torch.float32 if case.model == "midsize" else torch.bfloat16
            folder = (
                DEMO_FOLDER
                if case.model == "demo"
                else save_random_checkpoint(case.model, models, arguments.device, stored)
            )

            def keep(found: dict[str, Any], name: str = name) -> None:
                results[name] = found
                write({"benchmark": "engine", "cases": results}, arguments.output)

            run(
                case,
                folder,
                arguments.device,
                arguments.threads,
                arguments.quick,
                arguments.rounds,
                arguments.skip_vision,
                keep,
            )
            report({"benchmark": "engine", "cases": results}, arguments.output)


if __name__ == "__main__":
    main()
