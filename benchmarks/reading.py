"""Time and memory of the commands that read an output, by its number of rows.

Writes finished runs without Ray and without a model: tars of small images, and rows with drawn captions. A
second run over the same images has other captions in a tenth of its rows. Then each command runs in its own
process. On a machine with other work, only the CPU seconds and the memory are meaningful.

    python -m benchmarks.reading --rows 0 1 28 1000000
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.command_line import check_cases, make_parser
from benchmarks.measure import report, write
from blip2_actor.demo.scenes import SceneSampler, draw
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.schema import output_schema
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder

ROWS_PER_SHARD = 10_000
NUM_IMAGES = 64
"""Number of different images, which the rows repeat."""
SCHEMA = output_schema()
COMMANDS = {
    "report": ("report", "A", "--html", "report.html"),
    "show": ("show", "A", "--limit", "0"),
    "show_sorted": ("show", "A", "--sort", "logprob"),
    "compare": ("compare", "A", "B", "--html", "compare.html"),
    "csv": ("export", "A", "--to", "csv", "--into", "csv"),
    "jsonl": ("export", "A", "--to", "jsonl", "--into", "jsonl"),
    "txt": ("export", "A", "--to", "txt", "--into", "txt"),
    "webdataset": ("export", "A", "--to", "webdataset", "--into", "webdataset"),
    "imagefolder": ("export", "A", "--to", "imagefolder", "--into", "imagefolder"),
}
"""The measured commands, by name; A and B are outputs."""
RUN_AND_SAY_PEAK = """
import re, sys
from pathlib import Path
from pipeline.cli.main import main
status = main(sys.argv[2:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
Path(sys.argv[1]).write_text(peak[1])
sys.exit(status)
"""
"""Runs a command and stores its peak in KiB; `os.wait4` would include the memory of the parent."""


def write_runs(folder: Path, num_rows: int) -> Path:
    """Write the tars and both runs, unless they exist; return their folder."""
    place = folder / f"rows-{num_rows}"
    if (place / "done").exists():
        return place
    scenes = SceneSampler("train", 1).sample(4096)
    pictures = [_png(pixels) for pixels in np.asarray(draw(scenes.slice(0, NUM_IMAGES), 64))]
    captions = [str(caption) for caption in scenes.captions]
    for first in range(0, max(num_rows, 1), ROWS_PER_SHARD):
        keys = [f"image-{row:08d}" for row in range(first, min(first + ROWS_PER_SHARD, num_rows))]
        _write_tar(place / "in" / f"{first // ROWS_PER_SHARD:05d}.tar", keys, pictures)
    for name in ("A", "B"):
        _write_run(place / "in", place / name, num_rows, pictures, captions)
    (place / "done").touch()
    return place


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write_tar(path: Path, keys: list[str], pictures: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row, key in enumerate(keys):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(pictures[row % NUM_IMAGES])
            tar.addfile(member, io.BytesIO(pictures[row % NUM_IMAGES]))


def _write_run(source: Path, output: Path, num_rows: int, pictures: list[bytes], captions: list[str]) -> None:
    settings = CaptionSettings(input=(str(source),), output=str(output))
    folder = Folder(settings.output)
    shards = tuple(list_shards(settings.input))
    Ledger(folder).begin(
        Run(Fingerprint({}), settings.to_dict(), shards, working_folder="/", hides_options=False)
    )
    digests = [hashlib.sha256(picture).digest() for picture in pictures]
    random = np.random.default_rng(0)
    for number, shard in enumerate(shards):
        rows = range(min(ROWS_PER_SHARD, num_rows - number * ROWS_PER_SHARD))
        texts = random.integers(0, len(captions), len(rows))
        if output.name == "B":
            texts[::10] += 1
        cells = {
            "key": [f"image-{number * ROWS_PER_SHARD + row:08d}" for row in rows],
            "shard": [shard.name] * len(rows),
            "row": list(rows),
            "caption": [captions[text % len(captions)] for text in texts],
            "logprob": random.normal(-3, 1, len(rows)).astype(np.float32),
            "num_tokens": [12] * len(rows),
            "finish_reason": ["stop"] * len(rows),
            "flags": [[]] * len(rows),
            "status": ["ok"] * len(rows),
            "width": [64] * len(rows),
            "height": [64] * len(rows),
            "sha256": [digests[row % NUM_IMAGES] for row in rows],
        }
        columns = [
            pa.array(cells[field.name], field.type)
            if field.name in cells
            else pa.nulls(len(rows), field.type)
            for field in SCHEMA
        ]
        if rows:
            write_fragment(folder, pa.Table.from_arrays(columns, schema=SCHEMA))
        commit_shard(folder, ShardReport(shard=shard.name, num_rows=len(rows), complete=True), {}, SCHEMA)


def measure(name: str, runs: Path) -> dict[str, float]:
    """Run a command in its own process, in a new folder."""
    with tempfile.TemporaryDirectory(prefix="made-", dir=runs) as made:
        words = [str(runs / word) if word in ("A", "B") else word for word in COMMANDS[name]]
        peak = Path(made, "peak")
        command = [sys.executable, "-c", RUN_AND_SAY_PEAK, str(peak), *words]
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=made, stdout=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - began
        if process.returncode:
            raise RuntimeError(f"blip2 {' '.join(words)} ended with {process.returncode}")
        peak_kib = int(peak.read_text())
        peak.unlink()
        sizes = [path.stat().st_size for path in Path(made).rglob("*") if path.is_file()]
    return {
        "wall_s": round(wall_s, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_mib": round(peak_kib / 1024, 1),
        "written_mib": round(sum(sizes) / (1 << 20), 2),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1, 28, 1_000_000])
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS], help=", ".join(COMMANDS))
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs (default: a temporary folder)")
    parser.add_argument("--only-write", action="store_true", help="write the runs and measure nothing")
    given = parser.parse_args()
    check_cases(parser, given.commands, COMMANDS)
    with tempfile.TemporaryDirectory(prefix="blip2-reading-") as temporary:
        places = {num_rows: write_runs(given.runs or Path(temporary), num_rows) for num_rows in given.rows}
        if given.only_write:
            return
        found: dict[str, dict[str, Mapping[str, Any]]] = {}
        for num_rows, place in places.items():
            for name in given.commands:
                found.setdefault(str(num_rows), {})[name] = measure(name, place)
                print(f"{num_rows:>9,} rows  {name:12} {found[str(num_rows)][name]}", flush=True)
                write({"benchmark": "reading", "by_rows": found}, given.output)
        report({"benchmark": "reading", "by_rows": found}, given.output)


if __name__ == "__main__":
    main()
