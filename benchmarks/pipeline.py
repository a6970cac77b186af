"""The batch job: how much of the engine's speed it keeps, what users do instead, and how it grows with
its rows; `benchmarks.growth` has the shards.

    engine       mid-size random model, 20 tokens, 32 slots: rows/s of the job over the images/s of the
                 engine alone on the same decoded images, in the steady state, without start-up and tail
    map-batches  the same model: the job over `map_batches` around transformers' `generate`, as the
                 documentation of Ray describes it, with the defaults of both sides (theirs: float32, one
                 thread per actor) and with equal dtype and threads
    scale        an engine that costs nothing, 10,000 to 1,000,000 rows: rows/s and the driver's memory
    resume       1,000 shards of which 990 are finished: seconds from the command to the first new rows

Every run has processes and a Ray of its own; the runs of the two sides alternate.

    python -m benchmarks.pipeline                     # all
    python -m benchmarks.pipeline scale --rows 10000 100000
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import add_models, check_cases, make_parser
from benchmarks.inputs import write_photographs, write_shards
from benchmarks.measure import report
from benchmarks.sides.contender import Contender
from benchmarks.sides.engine_alone import EngineAlone
from benchmarks.sides.job_side import call_job
from benchmarks.sides.map_batches import MapBatchesSide
from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.testing import FakeEngineConfig, save_random_checkpoint
from pipeline import CaptionSettings

NUM_TOKENS = 20
OPTIONS = GenerationOptions(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
NUM_THREADS = os.cpu_count()
STEADY_SLOTS = 32
"""Slots of the case `engine`. Texts of equal length end together, so a short run with many slots has no
steady state."""
THEIRS = {"defaults": (64, None, None), "equal": (160, "bfloat16", NUM_THREADS)}
"""Images, dtype and threads of `map_batches`, whose rate is steady from the second batch on."""
SCALE_SHARD_ROWS, RESUME_SHARD_ROWS = 1000, 20
RESUME_SHARDS, RESUME_UNFINISHED = 1000, 10
CASES = ("engine", "map-batches", "scale", "resume")


def compare_with_engine(folder: Path, work: Path, num_images: int, rounds: int) -> dict[str, Any]:
    """Compare the job with the engine alone."""
    images = write_photographs(work / "photographs", num_images)
    config = EngineConfig(model=str(folder), max_slots=STEADY_SLOTS, num_threads=NUM_THREADS)
    rates: dict[str, list[float]] = {"engine": [], "job": []}
    jobs = []
    for turn in range(rounds):
        side = Contender(EngineAlone, config, str(images), OPTIONS)
        rates["engine"].append(side.call("run"))
        side.close()
        jobs.append(_caption(images, work / f"engine-{turn}", config))
        rates["job"].append(jobs[-1]["rows_per_s"])
        _show(rates)
    return {
        "rows_per_s": rates,
        "jobs": jobs,
        "num_images": num_images,
        "max_slots": STEADY_SLOTS,
        "job_over_engine": _ratio(rates, "engine"),
        "to_reach": 0.9,
    }


def compare_with_map_batches(folder: Path, work: Path, num_images: int, rounds: int) -> dict[str, Any]:
    """Compare the job with `map_batches` around `generate`."""
    images = write_photographs(work / "photographs", num_images)
    rates: dict[str, list[float]] = {name: [] for name in ("job", *THEIRS)}
    jobs = []
    for turn in range(rounds):
        jobs.append(_caption(images, work / f"captions-{turn}", EngineConfig(model=str(folder))))
        rates["job"].append(jobs[-1]["rows_per_s"])
        for name, (count, dtype, threads) in THEIRS.items():
            few = write_photographs(work / f"photographs-{count}", count)
            theirs = Contender(MapBatchesSide)
            output = str(work / f"{name}-{turn}")
            run = theirs.call("run", str(few), output, str(folder), dtype, threads, NUM_TOKENS)
            rates[name].append(run["rows_per_s"])
            theirs.close()
        _show(rates)
    return {
        "rows_per_s": rates,
        "jobs": jobs,
        "num_images": num_images,
        "job_over_defaults": _ratio(rates, "defaults"),
        "job_over_defaults_to_reach": 2.5,
        "job_over_equal": _ratio(rates, "equal"),
        "job_over_equal_to_reach": 1.15,
    }


def measure_scale(work: Path, sizes: list[int]) -> dict[str, Any]:
    """Run jobs of different sizes with an engine that costs nothing."""
    runs = {}
    for num_rows in sizes:
        shards = write_shards(work, -(-num_rows // SCALE_SHARD_ROWS), SCALE_SHARD_ROWS)
        settings = CaptionSettings(input=(str(shards),), output=str(work / f"scale-{num_rows}"))
        runs[num_rows] = run = call_job("run", settings, FakeEngineConfig())
        print(
            f"  {num_rows:,} rows: {run['rows_per_s']:,.0f} rows/s, first after {run['first_rows_s']:.1f} s, "
            f"driver +{run['driver_growth_mib']:.0f} MiB"
        )
    speeds = [run["rows_per_s"] for run in runs.values()]
    return {
        "runs": runs,
        "rows_per_s_spread": (max(speeds) - min(speeds)) / max(speeds),
        "spread_to_stay_below": 0.15,
        "driver_growth_mib": max(run["driver_growth_mib"] for run in runs.values()),
        "growth_to_stay_below_mib": 100,
    }


def measure_resume(work: Path, num_shards: int, num_left: int, rounds: int) -> dict[str, Any]:
    """Time the start of a job that has only `num_left` of `num_shards` shards to finish."""
    shards = write_shards(work, num_shards, RESUME_SHARD_ROWS)
    output = work / "resume"
    settings = CaptionSettings(input=(str(shards),), output=str(output))
    call_job("run", settings, FakeEngineConfig())
    seconds = []
    for _ in range(rounds):
        for path in sorted(output.rglob("*.parquet"))[:: num_shards // num_left][:num_left]:
            path.unlink()
        seconds.append(call_job("run", settings, FakeEngineConfig())["first_rows_s"])
        print(f"  first new rows after {seconds[-1]:.1f} s")
    return {
        "first_new_rows_s": statistics.median(seconds),
        "to_stay_below_s": 15,
        "all_s": seconds,
        "num_shards": num_shards,
        "num_left": num_left,
    }


def _caption(images: Path, output: Path, config: EngineConfig) -> dict[str, Any]:
    settings = CaptionSettings(input=(str(images),), output=str(output), engine=config, generation=OPTIONS)
    run: dict[str, Any] = call_job("run", settings)
    return run


def _show(rates: dict[str, list[float]]) -> None:
    print("  " + ", ".join(f"{name} {found[-1]:.2f}/s" for name, found in rates.items()))


def _ratio(rates: dict[str, list[float]], other: str) -> float:
    return statistics.median(j / o for j, o in zip(rates["job"], rates[other], strict=True))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--images", type=int, default=320, help="images of the cases with a model")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
        help="job sizes of the case scale",
    )
    parser.add_argument("--rounds", type=int, default=2)
    add_models(parser)
    arguments = parser.parse_args()
    check_cases(parser, arguments.cases, CASES)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in arguments.cases:
            print(name)
            if name in ("engine", "map-batches"):
                folder = save_random_checkpoint("midsize", arguments.models or work, "cpu", torch.float32)
                compare = compare_with_engine if name == "engine" else compare_with_map_batches
                results[name] = compare(folder, work, arguments.images, arguments.rounds)
            elif name == "scale":
                results[name] = measure_scale(work, arguments.rows)
            else:
                results[name] = measure_resume(work, RESUME_SHARDS, RESUME_UNFINISHED, arguments.rounds)
            report({"benchmark": "pipeline", "cases": results}, arguments.output)


if __name__ == "__main__":
    main()
