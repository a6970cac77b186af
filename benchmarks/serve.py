"""Captions/s and latency of the endpoint, over a `@serve.batch` deployment of transformers' `generate`.

The load is drawn scenes as PNG over HTTP. Callers in a closed loop wait for their answer before they ask
again. Arrivals at a rate (Poisson, with a seed) wait for nobody, and their latency counts from the arrival,
so that a slow side cannot hide its delay. `@serve.batch` gets its best batch size at each load, although one
deployment has only one. One application is deployed at a time, on one Ray; the rounds alternate.

The limit is the engine alone, in one process, on the same images, already decoded. Callers, HTTP and image
decoding use the same machine as the model. On a CPU, Serve's own path costs more than the demonstration
checkpoint, so this checkpoint shows the cost of the path, and a larger model shows the gain of batching.

On a machine with other work, requests/s and latencies are noise. The CPU time of each part per request is
less so: `proxy_cpu_ms`, `gateway_cpu_ms`, `decoders_cpu_ms` and `model_cpu_ms`.

    python -m benchmarks.serve                         # the demonstration checkpoint, within five minutes
    python -m benchmarks.serve --rounds 3 --seconds 10 # with a spread
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

from benchmarks.command_line import add_models, make_parser
from benchmarks.inputs import write_scenes
from benchmarks.load import Load
from benchmarks.measure import alternate, report
from benchmarks.sides.contender import Contender
from benchmarks.sides.engine_alone import EngineAlone
from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.testing import save_random_checkpoint
from pipeline import set_ray_environment

MAX_NEW_TOKENS = GenerationOptions().resolve().max_new_tokens
OFFERED = (0.25, 0.5)
"""Rates of arrivals, as fractions of the images/s of the engine alone in the first round."""
AT_ONCE = (1, 16, 64)
"""Default numbers of callers, and default batch sizes."""
Runs = dict[str, dict[str, dict[str, Any]]]
"""Figures by load and side."""


def make_serve_side(config: EngineConfig, options: GenerationOptions) -> Any:
    """Create a `ServeSide` in a contender's process."""
    set_ray_environment()  # before Ray is imported
    from benchmarks.sides.serve_side import ServeSide

    return ServeSide(config, options)


def run_round(
    side: Contender, images: list[bytes], loads: list[Load], batches: list[int], seconds: float
) -> Runs:
    """Measure both applications, one after the other, at every load."""
    runs: Runs = {str(load): {} for load in loads}

    def deploy(name: str) -> str:
        url: str = side.call(name)
        Load(callers=max(load.callers for load in loads)).offer(url, images, seconds / 5)
        return url

    def offer(name: str, url: str, load: Load) -> None:
        before, cpu_before = side.call("ask_replica", "stats"), side.call("cpu_s")
        run = load.offer(url, images, seconds)
        after, cpu_after = side.call("ask_replica", "stats"), side.call("cpu_s")
        for part, used_s in cpu_after.items():
            run[f"{part}_cpu_ms"] = 1000 * (used_s - cpu_before[part]) / run["num_answers"]
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
        # A batch larger than the number of callers is never full, and waits for nothing.
        useful = [size for size in batches if not load.callers or size <= load.callers]
        for size in useful or [min(batches)]:
            side.call("ask_replica", "set_max_batch_size", size)
            offer(f"serve.batch({size})", url, load)
    side.call("delete")
    return runs


def compare(rounds: list[Runs], load: str) -> dict[str, Any]:
    """Return the medians of the rounds, and the endpoint over the best `@serve.batch`.

    The second is the median of the ratio of each round.
    """
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
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="demo, midsize (random weights) or a folder (default: %(default)s)")
    add("--dtype", default="float32", help="dtype of both sides (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side's model")
    add(
        "--tokens",
        type=int,
        help=f"new tokens of every text (default: each text ends by itself within {MAX_NEW_TOKENS})",
    )
    add("--images", type=int, default=256, help="number of different images (default: %(default)s)")
    add("--callers", type=int, nargs="+", default=AT_ONCE, help="callers at once, one load for each number")
    add("--batches", type=int, nargs="+", default=AT_ONCE, help="values of max_batch_size of @serve.batch")
    add("--seconds", type=float, default=5, help="duration of one load (default: %(default)s)")
    add("--rounds", type=int, default=1, help="rounds, each with new processes (default: %(default)s)")
    add_models(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = DEMO_FOLDER if arguments.model == "demo" else Path(arguments.model)
        if arguments.model == "midsize":
            folder = save_random_checkpoint(
                "midsize", arguments.models or Path(temporary), "cpu", torch.float32
            )
        run(arguments, folder, Path(temporary) / "scenes")


def run(arguments: argparse.Namespace, folder: Path, scenes: Path) -> None:
    """Measure all rounds; the result is reported again after each.

    Args:
        folder: the checkpoint of both sides.
        scenes: a new folder for the images.
    """
    images = write_scenes(scenes, arguments.images)
    tokens = arguments.tokens
    options = GenerationOptions(max_new_tokens=tokens or MAX_NEW_TOKENS, min_new_tokens=tokens or 0)
    config = EngineConfig(
        model=str(folder), dtype=arguments.dtype, device=arguments.device, num_threads=arguments.threads
    )
    engine_rates: list[float] = []
    rounds: list[Runs] = []
    side = Contender(make_serve_side, config, options)
    loads = [Load(callers=callers) for callers in arguments.callers]
    for turn in range(arguments.rounds):
        engine = Contender(EngineAlone, config, str(scenes), options, threads=arguments.threads)
        timing = alternate({"engine": lambda: engine.call("run")}, rounds=3)["engine"]  # noqa: B023
        engine_rates.append(arguments.images / timing.median_s)
        engine.close()
        print(f"  the engine alone  {engine_rates[-1]:.1f} images/s")
        if turn == 0:
            loads += [Load(per_s=part * engine_rates[0]) for part in OFFERED]
        rounds.append(run_round(side, images, loads, arguments.batches, arguments.seconds))
        found = {str(load): compare(rounds, str(load)) for load in loads}
        names = ("model", "device", "threads", "tokens", "images", "seconds")
        settings = {name: getattr(arguments, name) for name in names}
        settings |= {"dtype": config.info().dtype, "rounds": len(rounds)}
        engine_per_s = statistics.median(engine_rates)
        result = {"benchmark": "serve", **settings, "engine_images_per_s": engine_per_s, "loads": found}
        report(result, arguments.output)
    side.call("shutdown")
    side.close()


if __name__ == "__main__":
    main()
