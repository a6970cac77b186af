"""Captions/s and latency of the endpoint, over a `@serve.batch` deployment of transformers' `generate`.

Over HTTP, drawn scenes as PNG. Callers in a closed loop wait for their answer before they ask again; arrivals
at a rate (Poisson, seeded) wait for nobody, and their latency counts from the arrival, so that a side which
falls behind cannot hide it. `@serve.batch` has its best batch size at each load, which is more than one
deployment could have. The applications stand one at a time on one Ray; rounds alternate.

The limit is the engine alone, in one process, on the same images decoded. Callers, HTTP and decoding take
from the machine that computes: on a CPU, Serve's path costs more than the demonstration checkpoint does, so
that one shows the path, and a larger model what batching is worth.

    python -m benchmarks.serve                         # the demonstration checkpoint
    python -m benchmarks.serve --model midsize --dtype bfloat16 --tokens 20 --images 160 --callers 1 16 64
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.load import Load
from benchmarks.measure import alternate, report
from benchmarks.pipeline import EngineSide
from benchmarks.sides.contender import Contender
from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.demo.scenes import SceneSampler, draw
from blip2_actor.testing.random_checkpoints import checkpoint
from pipeline import set_ray_environment

SIDE_PX = 320
OFFERED = (0.25, 0.5)
"""Rates of arrivals, of the engine's own images/s in the first round."""
Runs = dict[str, dict[str, dict[str, Any]]]
"""What was measured at each load, of each side."""


def serve_side(config: EngineConfig, options: GenerationOptions) -> Any:
    set_ray_environment()  # before Ray is imported
    from benchmarks.sides.serve_side import ServeSide

    return ServeSide(config, options)


def one_round(
    side: Contender, images: list[bytes], loads: list[Load], batches: list[int], seconds: float
) -> Runs:
    """Both applications, one after the other, at every load."""
    runs: Runs = {str(load): {} for load in loads}

    def deploy(name: str) -> str:
        url: str = side.call(name)
        Load(callers=max(load.callers for load in loads)).offer(url, images, seconds / 5)
        return url

    def offer(name: str, url: str, load: Load) -> None:
        before = side.call("ask_replica", "stats")
        run = load.offer(url, images, seconds)
        after = side.call("ask_replica", "stats")
        passes = after.num_encode_calls - before.num_encode_calls
        run["images_per_pass"] = (after.num_images_encoded - before.num_images_encoded) / passes
        runs[str(load)][name] = run
        shown = {key: value if key == "errors" else round(value, 1) for key, value in run.items()}
        print(f"  {load!s:17} {name:16}", shown)

    url = deploy("endpoint")
    for load in loads:
        offer("endpoint", url, load)
    side.call("delete")
    url = deploy("serve_batch")
    for load in loads:
        # A batch of more than there are callers is never full, and waits in vain.
        fitting = [size for size in batches if not load.callers or size <= load.callers]
        for size in fitting or [min(batches)]:
            side.call("ask_replica", "set_max_batch_size", size)
            offer(f"serve.batch({size})", url, load)
    side.call("delete")
    return runs


def compared(rounds: list[Runs], load: str) -> dict[str, Any]:
    """Medians of the rounds; the endpoint over `@serve.batch` at its best, by the rounds' own ratios."""
    sides: dict[str, dict[str, Any]] = {}
    for name in rounds[0][load]:
        found = [runs[load][name] for runs in rounds]
        rates = [run["per_s"] for run in found]
        numbers = [key for key in found[0] if key != "errors"]
        sides[name] = {key: statistics.median(run[key] for run in found) for key in numbers}
        sides[name]["errors"] = sum((Counter(run["errors"]) for run in found), Counter[str]())
        sides[name]["spread"] = (max(rates) - min(rates)) / statistics.median(rates)
    theirs = sides.keys() - {"endpoint"}
    over_best = {}
    for key, better in (("per_s", max), ("p50_ms", min), ("p99_ms", min)):
        best = better(theirs, key=lambda name: sides[name][key])
        ratios = [runs[load]["endpoint"][key] / runs[load][best][key] for runs in rounds]
        over_best[key] = statistics.median(ratios)
    return {"sides": sides, "endpoint_over_best": over_best}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo, midsize (random weights) or a folder (default %(default)s)")
    add("--dtype", default="float32", help="of both sides (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of both models")
    add("--tokens", type=int, help="new tokens of every text; else it ends by itself within 30")
    add("--images", type=int, default=1024, help="that differ (default %(default)s)")
    add("--callers", type=int, nargs="+", default=[1, 4, 16, 64], help="at once, a load each")
    add("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="max_batch_size of @serve.batch")
    add("--seconds", type=float, default=10, help="of one load (default %(default)s)")
    add("--rounds", type=int, default=3)
    add("--models", type=Path, help="where random checkpoints are kept between runs")
    add("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = DEMO_FOLDER if arguments.model == "demo" else Path(arguments.model)
        if arguments.model == "midsize":
            folder = checkpoint("midsize", arguments.models or Path(temporary), "cpu", torch.float32)
        run(arguments, folder, Path(temporary) / "scenes")


def run(arguments: argparse.Namespace, folder: Path, scenes: Path) -> None:
    images = _draw_scenes(scenes, arguments.images)
    tokens = arguments.tokens
    options = GenerationOptions(max_new_tokens=tokens or 30, min_new_tokens=tokens or 0)
    config = EngineConfig(
        model=str(folder), dtype=arguments.dtype, device=arguments.device, num_threads=arguments.threads
    )
    alone: list[float] = []
    rounds: list[Runs] = []
    side = Contender(serve_side, config, options)
    loads = [Load(callers=callers) for callers in arguments.callers]
    for turn in range(arguments.rounds):
        engine = Contender(EngineSide, config, str(scenes), options, threads=arguments.threads)
        timing = alternate({"engine": lambda: engine.call("run")}, rounds=3)["engine"]  # noqa: B023
        alone.append(arguments.images / timing.median_s)
        engine.close()
        print(f"  the engine alone  {alone[-1]:.1f} images/s")
        if turn == 0:
            loads += [Load(per_s=part * alone[0]) for part in OFFERED]
        rounds.append(one_round(side, images, loads, arguments.batches, arguments.seconds))
        found = {str(load): compared(rounds, str(load)) for load in loads}
        names = ("model", "device", "threads", "tokens", "images", "seconds")
        settings = {name: getattr(arguments, name) for name in names}
        settings |= {"dtype": config.info().dtype, "rounds": len(rounds)}
        engine_per_s = statistics.median(alone)
        result = {"benchmark": "serve", **settings, "engine_images_per_s": engine_per_s, "loads": found}
        report(result, arguments.output)
    side.call("shutdown")
    side.close()


def _draw_scenes(folder: Path, count: int) -> list[bytes]:
    folder.mkdir()
    scenes = SceneSampler("held_out", 0).sample(count)
    for index in range(count):
        [pixels] = draw(scenes.slice(index, index + 1), SIDE_PX)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


if __name__ == "__main__":
    main()
