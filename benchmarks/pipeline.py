"""The batch job: what it leaves of the engine's speed, what users do instead, and how it grows.

    engine       mid-size random model, 20 tokens, 32 slots: end-to-end rows/s over the engine's own images/s
                 on the same decoded images, in the steady state, start-up and tail apart
    map-batches  the same model: the job over `map_batches` around transformers' `generate` as Ray's
                 documentation has it, at both sides' defaults (theirs: float32, one thread per actor) and
                 at equal dtype and threads
    scale        an engine that costs nothing, 10 k to 1 M rows: rows/s and the driver's memory
    resume       1,000 shards of which 990 are finished: seconds from the command to the first new rows

Every run has processes and a Ray of its own; runs alternate.

    python -m benchmarks.pipeline                     # all
    python -m benchmarks.pipeline scale --rows 10000 100000
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import report
from benchmarks.sides.contender import Contender
from benchmarks.sides.job_side import JobSide, steady_rate
from benchmarks.sides.map_batches import MapBatchesSide
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request, decode_image
from blip2_actor.testing.fake_engine import FakeEngineConfig
from blip2_actor.testing.random_checkpoints import checkpoint
from pipeline import CaptionSettings

TOKENS = 20
OPTIONS = GenerationOptions(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
THREADS = os.cpu_count()
SHARD_ROWS = 1000


class EngineSide:
    """The engine alone, on images that are decoded already."""

    def __init__(self, config: EngineConfig, images: str, options: GenerationOptions) -> None:
        self._engine, self._options = Engine(config), options
        size_px = self._engine.image_size_px
        paths = sorted(Path(images).iterdir())
        self._pixels = [decode_image(path.read_bytes(), size_px).array(size_px) for path in paths]
        self._engine.generate([Request(image=self._pixels[0])], options)

    def run(self) -> float:
        """Images/s in the steady state."""
        ends: list[float] = []
        futures = [self._engine.submit(Request(image=pixels), self._options) for pixels in self._pixels]
        for future in futures:
            future.add_done_callback(lambda _: ends.append(time.monotonic()))
        if not all(future.result().ok for future in futures):
            raise RuntimeError("the engine refused an image of its own benchmark")
        return steady_rate([(end, count) for count, end in enumerate(ends, 1)])


def engine(folder: Path, work: Path, num_images: int, rounds: int) -> dict[str, Any]:
    """Few slots, because equal texts end together: with many, a short run has no steady state."""
    images = _photographs(work / "photographs", num_images)
    config = EngineConfig(model=str(folder), max_slots=STEADY_SLOTS, num_threads=THREADS)
    rates: dict[str, list[float]] = {"engine": [], "job": []}
    jobs = []
    for turn in range(rounds):
        side = Contender(EngineSide, config, str(images), OPTIONS)
        rates["engine"].append(side.call("run"))
        side.close()
        jobs.append(_captions(images, work / f"engine-{turn}", config))
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


def map_batches(folder: Path, work: Path, num_images: int, rounds: int) -> dict[str, Any]:
    images = _photographs(work / "photographs", num_images)
    rates: dict[str, list[float]] = {name: [] for name in ("job", *THEIRS)}
    jobs = []
    for turn in range(rounds):
        jobs.append(_captions(images, work / f"captions-{turn}", EngineConfig(model=str(folder))))
        rates["job"].append(jobs[-1]["rows_per_s"])
        for name, (count, dtype, threads) in THEIRS.items():
            few = _photographs(work / f"photographs-{count}", count)
            theirs = Contender(MapBatchesSide)
            output = str(work / f"{name}-{turn}")
            run = theirs.call("run", str(few), output, str(folder), dtype, threads, TOKENS)
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


STEADY_SLOTS = 32
THEIRS = {"defaults": (64, None, None), "equal": (160, "bfloat16", THREADS)}
"""Images, dtype and threads of `map_batches`: its rate is steady from the second batch on."""


def _captions(images: Path, output: Path, config: EngineConfig) -> dict[str, Any]:
    return _job(CaptionSettings(input=(str(images),), output=str(output), engine=config, generation=OPTIONS))


def _show(rates: dict[str, list[float]]) -> None:
    print("  " + ", ".join(f"{name} {found[-1]:.2f}/s" for name, found in rates.items()))


def _ratio(rates: dict[str, list[float]], other: str) -> float:
    return statistics.median(j / o for j, o in zip(rates["job"], rates[other], strict=True))


def scale(work: Path, sizes: list[int]) -> dict[str, Any]:
    runs = {}
    for num_rows in sizes:
        shards = _shards(work, -(-num_rows // SHARD_ROWS), SHARD_ROWS)
        settings = CaptionSettings(input=(str(shards),), output=str(work / f"scale-{num_rows}"))
        runs[num_rows] = run = _job(settings, FakeEngineConfig())
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


def resume(work: Path, num_shards: int, num_left: int, rounds: int) -> dict[str, Any]:
    shards = _shards(work, num_shards, 20)
    output = work / "resume"
    settings = CaptionSettings(input=(str(shards),), output=str(output))
    _job(settings, FakeEngineConfig())
    seconds = []
    for _ in range(rounds):
        for path in sorted(output.rglob("*.parquet"))[:: num_shards // num_left][:num_left]:
            path.unlink()
        seconds.append(_job(settings, FakeEngineConfig())["first_rows_s"])
        print(f"  first new rows after {seconds[-1]:.1f} s")
    return {
        "first_new_rows_s": statistics.median(seconds),
        "to_stay_below_s": 15,
        "all_s": seconds,
        "num_shards": num_shards,
        "num_left": num_left,
    }


def _job(settings: CaptionSettings, engine: FakeEngineConfig | None = None) -> dict[str, Any]:
    """One run in a fresh process, counted from now."""
    side = Contender(JobSide, time.time())
    run: dict[str, Any] = side.call("run", settings, engine)
    side.close()
    return run


def _photographs(folder: Path, count: int) -> Path:
    """JPEGs of 640 x 480 pixels."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def _shards(work: Path, count: int, rows: int) -> Path:
    """A folder of tars that are hard links of one; its images are small."""
    first = work / f"shard-of-{rows}.tar"
    if not first.exists():
        draw = np.random.default_rng(0)
        with tarfile.open(first, "w") as tar:
            for index in range(rows):
                content = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, "PNG")
                member = tarfile.TarInfo(f"{index:06d}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    folder = work / f"shards-{count}-of-{rows}"
    folder.mkdir()
    for index in range(count):
        os.link(first, folder / f"{index:05d}.tar")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["engine", "map-batches", "scale", "resume"]
    parser.add_argument("cases", nargs="*", default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--images", type=int, default=320, help="of the runs with the model")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of scale")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", type=Path, help="where random checkpoints are kept between runs")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(names)
    if unknown:
        parser.error(f"cases must be among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in arguments.cases:
            print(name)
            if name in ("engine", "map-batches"):
                folder = checkpoint("midsize", arguments.models or work, "cpu", torch.float32)
                measure = engine if name == "engine" else map_batches
                results[name] = measure(folder, work, arguments.images, arguments.rounds)
            elif name == "scale":
                results[name] = scale(work, arguments.rows)
            else:
                results[name] = resume(work, 1000, 10, arguments.rounds)
            report({"benchmark": "pipeline", "cases": results}, arguments.output)


if __name__ == "__main__":
    main()
