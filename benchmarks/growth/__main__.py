"""How the batch job's cost grows with its shards and with the size of one, with an engine that costs nothing.

shards       1,000 to 100,000 shards of 10 rows: seconds from the command to the first rows of a new run, and
             of a resume with 100 shards to do; the driver's memory; seconds of `blip2 status`. The finished
             shards of the resume are stand-ins: links to one file
books        the same without Ray: the driver's own part
folder       a folder of 10^6 and of 10^7 images without Ray, with names that are made up: the driver's memory
             at the start and on a resume, and from both sizes the bytes an image and the memory for 10^8
requests     shards of 1,000 and of 10,000 rows with the output in S3 (moto, 20 ms a request): fragments and
             requests a shard, with an engine that costs nothing and with one of 400 images/s
large-tar    one tar of 1 and of 10 GB, read over HTTP from a server that makes its bytes: rows/s, seconds to
             the first rows, and the memory of the driver and of each kind of worker

python -m benchmarks.growth                       # all
python -m benchmarks.growth shards --shards 1000 10000
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.command_line import check_cases, make_parser
from benchmarks.growth.counting_store import CountingStore
from benchmarks.growth.driver_books import DriverBooks
from benchmarks.growth.folder_books import NAMINGS, FolderBooks
from benchmarks.growth.generated_tar import GeneratedTar, TarServer
from benchmarks.inputs import link_often, write_shards
from benchmarks.measure import report
from benchmarks.sides.contender import Contender
from benchmarks.sides.job_side import call_job
from blip2_actor.testing import FakeEngineConfig
from pipeline import CaptionSettings
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.layout import FRAGMENTS, output_name
from pipeline.ledger.ledger import Ledger
from pipeline.schema import ROW_CONTRACT
from pipeline.storage.folder import Folder

SHARD_ROWS, NUM_LEFT = 10, 100
CASES = ("shards", "books", "folder", "requests", "large-tar")
REQUEST_S = 0.02
NUM_COUNTED_ROWS = 20_000


def measure_shards(work: Path, sizes: list[int]) -> dict[str, Any]:
    """Time the driver's work for all shards: the start of a run, a resume, and `blip2 status`."""
    runs = {}
    for num_shards in sizes:
        shards = write_shards(work, num_shards, SHARD_ROWS)
        settings = CaptionSettings(input=(str(shards),), output=str(work / f"growth-{num_shards}"))
        new = call_job("start", settings, FakeEngineConfig())
        finish_by_stand_ins(settings)
        resumed = call_job("start", settings, FakeEngineConfig())
        status = call_job("status", settings.output)
        runs[num_shards] = {"new": new, "resumed": resumed, "status": status, "load": os.getloadavg()[1]}
        print(
            f"  {num_shards:,} shards: first rows after {new['first_rows_s']:.1f} s, on a resume after "
            f"{resumed['first_rows_s']:.1f} s, status {status['wall_s']:.1f} s, "
            f"driver {max(new['driver_peak_mib'], resumed['driver_peak_mib']):.0f} MiB"
        )
    return {
        "runs": runs,
        "first_rows_to_stay_below_s": 60,
        "status_to_stay_below_s": 5,
        "driver_to_stay_below_mib": 1024,
        "shard_rows": SHARD_ROWS,
        "num_left": NUM_LEFT,
        "stand_ins": "finished shards of the resume are links to the file of one shard",
    }


def measure_books(work: Path, sizes: list[int]) -> dict[str, Any]:
    """Time the driver's own part of `measure_shards`."""
    runs = {}
    for num_shards in sizes:
        shards = write_shards(work, num_shards, SHARD_ROWS)
        settings = CaptionSettings(input=(str(shards),), output=str(work / f"books-{num_shards}"))
        side = Contender(DriverBooks)
        side.call("begin", settings)
        finish_by_stand_ins(settings)
        side.call("resume", settings)
        side.call("status", settings.output)
        parts = side.call("parts")
        runs[num_shards] = {"parts": parts, "driver_peak_mib": side.call("peak_mib")}
        side.close()
        print(f"  {num_shards:,} shards: " + ", ".join(f"{n} {p['cpu_s']:.1f} s" for n, p in parts.items()))
    return {
        "runs": runs,
        "shard_rows": SHARD_ROWS,
        "num_left": NUM_LEFT,
        "stand_ins": "no Ray runs; finished shards of the resume are links to the file of one shard",
    }


def measure_folder(work: Path, sizes: list[int]) -> dict[str, Any]:
    """Measure a driver's memory for a folder of images, and extrapolate it to 10^8."""
    runs: dict[str, Any] = {}
    for naming in NAMINGS:
        sides: dict[str, dict[int, float]] = {"begin": {}, "resume": {}}
        for num_images in sizes:
            folder = work / f"folder-{naming}-{num_images}"
            folder.mkdir()
            settings = CaptionSettings(input=(str(folder),), output=f"{folder}-out")
            for part, grown_mib in sides.items():
                side = Contender(FolderBooks, str(folder), num_images, naming)
                before_mib = side.call("peak_mib")
                side.call(part, settings)
                grown_mib[num_images] = side.call("peak_mib") - before_mib
                side.close()
        runs[naming] = {part: _by_image(grown_mib) for part, grown_mib in sides.items()}
        for part, found in runs[naming].items():
            print(f"  {naming}, {part}: {found}")
    return {"runs": runs, "stand_ins": "no Ray runs, and the listing of the folder makes up the names"}


def _by_image(grown_mib: dict[int, float]) -> dict[str, Any]:
    """Add the bytes per image and the growth for 10^8 images to the memory growth by number of images."""
    least, most = min(grown_mib), max(grown_mib)
    each_mib = (grown_mib[most] - grown_mib[least]) / max(1, most - least)
    return {
        "grown_mib": grown_mib,
        "bytes_an_image": each_mib * 2**20,
        "mib_for_1e8": grown_mib[most] + each_mib * (10**8 - most),
    }


def finish_by_stand_ins(settings: CaptionSettings) -> None:
    """Give all shards of a run except the last ones the output of one shard with the same number of rows."""
    ledger = Ledger(Folder(settings.output))
    run = ledger.require_run()
    ledger.folder.erase(FRAGMENTS)
    first, *others = run.shards[:-NUM_LEFT]
    paths = [Path(ledger.folder.path(output_name(shard.name))) for shard in (first, *others)]
    for path in paths:  # A commit would compare the rows of `first` with those that the run has made.
        path.unlink(missing_ok=True)
    rows = ROW_CONTRACT.empty_table().from_pylist(
        [
            {"key": str(row), "shard": first.name, "row": row, "caption": "a", "status": "ok", "flags": []}
            for row in range(SHARD_ROWS)
        ],
        schema=ROW_CONTRACT,
    )
    ledger.write_fragment(rows)
    report = ShardReport(shard=first.name, num_rows=SHARD_ROWS, complete=True)
    summary = ledger.commit(report, {})
    assert summary is not None
    link_often(paths[0], paths[1:])
    ledger.keep_summaries(replace(summary, shard=shard.name) for shard in (first, *others))


def measure_requests(work: Path) -> dict[str, Any]:
    """Count the fragments and requests of jobs whose output is in a store."""
    store = Contender(CountingStore, REQUEST_S)
    runs = {}
    for num_rows, seconds_per_image in product((1000, 10_000), (0.0, 1 / 400)):
        num_shards = NUM_COUNTED_ROWS // num_rows
        shards = write_shards(work, num_shards, num_rows)
        name = f"{num_rows}-rows-{seconds_per_image:g}-s"
        settings = CaptionSettings(input=(str(shards),), output=store.call("uri", name))
        store.call("take_counts")
        run = call_job("run", settings, FakeEngineConfig(seconds_per_image=seconds_per_image))
        counts = store.call("take_counts")
        fragments = counts["PUT fragment"] / num_shards
        requests = sum(n for kind, n in counts.items() if not kind.endswith("run")) / num_shards
        runs[name] = {
            "shard_rows": num_rows,
            "seconds_per_image": seconds_per_image,
            "fragments": fragments,
            "fragments_to_stay_below": num_rows / 300 + 1,
            "requests": requests,
            "requests_to_stay_below": 2 * fragments + 8,
            "counts": counts,
            "job": run,
        }
        print(f"  {name}: {fragments:.2f} fragments and {requests:.1f} requests a shard")
    store.close()
    return {"runs": runs, "store": f"moto on loopback, {REQUEST_S * 1000:.0f} ms a request"}


def measure_large_tar(work: Path, sizes_gb: list[float]) -> dict[str, Any]:
    """Caption one large tar, and record the peak memory of each process."""
    runs = {}
    for size_gb in sizes_gb:
        server = TarServer(GeneratedTar(int(size_gb * 1e9)))
        settings = CaptionSettings(input=(server.url,), output=str(work / f"tar-{size_gb:g}"))
        runs[size_gb] = run = call_job("run_watched", settings, FakeEngineConfig(image_size_px=224))
        server.server_close()
        print(
            f"  {size_gb:g} GB, {run['num_rows']:,} rows: {run['rows_per_s']:,.0f} rows/s, first after "
            f"{run['first_rows_s']:.1f} s, peak MiB {run['peak_mib']}"
        )
    return {
        "runs": runs,
        "input": "one tar of JPEGs of 512 x 512 pixels, over HTTP from a server that makes it",
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--shards",
        type=int,
        nargs="+",
        default=[1000, 10_000, 100_000],
        help="job sizes of the cases shards and books",
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[10**6, 10**7],
        help="sizes of the case folder, powers of ten",
    )
    parser.add_argument(
        "--gb", type=float, nargs="+", default=[1.0, 10.0], help="sizes of the case large-tar, in 10^9 bytes"
    )
    arguments = parser.parse_args()
    check_cases(parser, arguments.cases, CASES)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in arguments.cases:
            print(name)
            if name == "large-tar":
                results[name] = measure_large_tar(work, arguments.gb)
            elif name == "folder":
                results[name] = measure_folder(work, arguments.images)
            elif name == "requests":
                results[name] = measure_requests(work)
            else:
                measure = measure_shards if name == "shards" else measure_books
                results[name] = measure(work, arguments.shards)
            report({"benchmark": "growth", "cases": results}, arguments.output)


if __name__ == "__main__":
    main()
