"""Measure one case of the engine's benchmark, and report each figure as soon as it is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.cases import MAX_VISION_IMAGES, Case
from benchmarks.measure import Timing, alternate, ratio
from benchmarks.sides.contender import Contender
from benchmarks.sides.engine_sides import EncoderSide, EngineSide, ReferenceSide, Work
from blip2_actor import EngineConfig

Keep = Callable[[dict[str, Any]], None]
"""Takes the figures of a case that are known so far."""


def measure_case(
    case: Case, config: EngineConfig, num_images: int, rounds: int, *, with_vision: bool, keep: Keep
) -> None:
    """Measure one case and print its figures.

    Args:
        config: the engine; `config.model` is also the folder that the reference loads.
        num_images: number of images, instead of the case's own number.
        rounds: number of rounds, instead of the case's own number.
        with_vision: whether to measure the vision encoder alone, too.
        keep: called each time that a figure is known, so that an interrupted run leaves its figures.
    """
    found: dict[str, Any] = {
        "to_reach": case.to_reach,
        "limit": case.limit,
        "to_reach_at": case.to_reach_at,
        "images_per_s_to_reach": case.images_per_s_to_reach,
        "images_per_s_limit": case.images_per_s_limit,
        "num_images": num_images,
        "rounds": rounds,
    }

    def add(figures: dict[str, Any]) -> None:
        found.update(figures)
        keep(found)

    _measure_generation(case, config, num_images, rounds, add)
    print(
        f"  ratio {found['ratio'] or 0:.2f} (to reach {case.to_reach}, limit {case.limit}), "
        f"{found['peak_memory_gib']:.1f} GiB, first caption after {found['first_caption_s']:.1f} s",
        flush=True,
    )
    if with_vision:
        max_images = MAX_VISION_IMAGES[torch.device(config.device).type]
        add(_measure_vision(case, config, min(num_images, max_images), rounds))
        print(
            f"  vision {found['vision_over_peak']:.0%} of peak, {found['vision_over_reference'] or 0:.2f} of "
            "the reference's speed",
            flush=True,
        )


def _measure_generation(case: Case, config: EngineConfig, num_images: int, rounds: int, keep: Keep) -> None:
    """Measure captions of both sides: in turn on a CPU, one after the other on a GPU."""
    work = _draw_work(case, num_images)
    num_for_reference = min(num_images, case.reference_images or num_images)
    reference_work = [row for row in work if row[0] < num_for_reference]
    timings: dict[str, Timing] = {}

    def measure(contenders: dict[str, Callable[[], Any]], warm_up: int = 0) -> None:
        found, _ = alternate(contenders, rounds, warm_up)
        for name in found.keys() - {"engine"}:
            found[name] = found[name].scaled(num_images / num_for_reference)
        timings.update(found)
        for name, timing in found.items():
            print(
                f"  {name:20} {num_images / timing.median_s:9.2f} images/s  (spread {timing.spread:.0%})",
                flush=True,
            )
        keep(_figures(timings, num_images))

    engine = Contender(EngineSide, config, work, case.num_beams, threads=config.num_threads)
    tokens = engine.call("run")  # also warms the engine up
    keep({"first_caption_s": engine.call("first_caption_s"), "agreement": None})
    ours = {"engine": lambda: engine.call("run")}
    takes_turns = torch.device(config.device).type == "cpu" and bool(case.reference_batches)
    if not takes_turns:
        measure(ours)
        keep({"peak_memory_gib": engine.close()})
    if not case.reference_batches:
        return
    reference = _start_reference(case, config, reference_work)
    keep({"reference_images": num_for_reference})
    agreement = _agreement(tokens[: len(reference_work)], reference.call("run", case.reference_batches[0]))
    keep({"agreement": agreement, "reference_dtype": case.reference_dtype or case.dtype})
    theirs = {f"reference at {n}": partial(reference.call, "run", n) for n in case.reference_batches}
    if takes_turns:
        measure(ours | theirs)
        keep({"peak_memory_gib": engine.close()})
    else:
        for name, call in theirs.items():
            measure({name: call}, warm_up=1)  # kernels are loaded for each batch size
    keep({"reference_peak_memory_gib": reference.close()})


def _measure_vision(case: Case, config: EngineConfig, num_images: int, rounds: int) -> dict[str, Any]:
    """Measure the vision encoder alone, next to a matrix product and to the reference's encoder."""
    ours = Contender(EncoderSide, config, num_images, threads=config.num_threads)
    dtype, batch, flops, product_flops = ours.call("describe")
    contenders = {
        "vision encoder": lambda: ours.call("encode"),
        "matrix product": lambda: ours.call("multiply"),
    }
    if case.reference_batches:
        reference = _start_reference(case, config, [(image, None, 0) for image in range(num_images)])
        contenders["reference's"] = lambda: reference.call("encode", num_images, batch)
    timings, _ = alternate(contenders, max(rounds, 3), warm_up=2)
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


def _draw_work(case: Case, num_images: int) -> Work:
    draw = random.Random(0)
    return [
        (image, prompt, draw.randint(*case.lengths)) for image in range(num_images) for prompt in case.prompts
    ]


def _start_reference(case: Case, config: EngineConfig, work: Work) -> Contender:
    return Contender(
        ReferenceSide,
        Path(config.model),
        case.reference_dtype or case.dtype,
        config.device,
        work,
        case.num_beams,
        threads=config.num_threads,
    )


def _figures(timings: dict[str, Timing], num_images: int) -> dict[str, Any]:
    """Return the figures that follow from the timings so far, which include the engine's."""
    names = [name for name in timings if name != "engine"]
    best = min(names, key=lambda name: timings[name].median_s, default=None)
    return {
        "images_per_s": num_images / timings["engine"].median_s,
        "reference_images_per_s": {name: num_images / timings[name].median_s for name in names},
        "ratio": ratio(timings, best, "engine") if best else None,
        "ratios": {name: ratio(timings, name, "engine") for name in names},
        "spread": _spread(timings),
    }


def _spread(timings: dict[str, Timing]) -> dict[str, float]:
    return {name: timing.spread for name, timing in timings.items()}


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    same = [list(a) == list(b)[: len(a)] for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)
