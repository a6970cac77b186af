"""Where a small `blip2 caption` spends its time: seconds of CPU by process, and when each phase ends.

The command runs on demonstration images in its own processes. On a machine with other work only the CPU
seconds are meaningful.

    python -m benchmarks.startup --images 40
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.command_line import make_parser
from benchmarks.measure import report
from benchmarks.serve.processes import cpu_s, of_family
from pipeline.attempts.store import read_attempts
from pipeline.demo.dataset import INPUTS, write_demo_dataset
from pipeline.storage.folder import Folder

FLAGS = ("--model", "demo", "--max-failed-fraction", "1")
"""Some demonstration images are broken on purpose."""
LOOK_EVERY_S = 0.05
"""The interval of sampling: a process that ends is missed for at most this time."""


@dataclass(frozen=True)
class Used:
    """The resources that a process of the command has used."""

    cpu_s: float
    started_s: float
    """Seconds since the epoch."""


def look(root: psutil.Process) -> dict[int, tuple[str, Used]]:
    """Return the resources that the command and all its descendants have used, by process id."""
    return of_family(root, lambda process: Used(cpu_s(process), process.create_time()))


def by_name(seen: Collection[tuple[str, Used]]) -> dict[str, dict[str, float]]:
    """Return the number, CPU seconds and first start of the processes of each name, the largest first."""
    began_s = min(used.started_s for _, used in seen)
    found: dict[str, list[Used]] = defaultdict(list)
    for name, used in seen:
        found[name].append(used)
    rows = {
        name: {
            "processes": len(group),
            "cpu_s": round(sum(used.cpu_s for used in group), 2),
            "first_start_s": round(min(used.started_s for used in group) - began_s, 2),
        }
        for name, group in found.items()
    }
    return dict(sorted(rows.items(), key=lambda row: -row[1]["cpu_s"]))


def measure(work: Path, num_images: int, command: list[str]) -> dict[str, Any]:
    """Run the command once.

    Args:
        work: folder for the images and the captions.
        num_images: demonstration images, in one tar and one Parquet file.
        command: the words that stand for `blip2`.
    """
    write_demo_dataset(work, num_images=num_images, num_tars=1)
    output = work / "captions"
    began = time.monotonic()
    inputs = [str(work / name) for name in INPUTS]
    process = subprocess.Popen([*command, "caption", *inputs, "-o", str(output), *FLAGS])
    root = psutil.Process(process.pid)
    seen: dict[int, tuple[str, Used]] = {}
    while process.poll() is None:
        seen |= look(root)
        time.sleep(LOOK_EVERY_S)
    seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"the command has ended with status {process.returncode}")
    (attempt,) = read_attempts(Folder(str(output)))
    by_process = by_name(seen.values())
    return {
        "num_images": num_images,
        "wall_s": seconds,
        "to_stay_below_s": 12.0,
        "phases_s": {**attempt.phases, "whole run": attempt.ended_s},
        "cpu_s": sum(row["cpu_s"] for row in by_process.values()),
        "num_processes": len(seen),
        "by_process": by_process,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=40, help="demonstration images to caption")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = measure(Path(work), arguments.images, [sys.executable, "-m", "pipeline"])
    for name, row in result["by_process"].items():
        print(f"{row['cpu_s']:6.2f} s  {row['processes']:2} x  from {row['first_start_s']:5.2f} s  {name}")
    report({"benchmark": "startup", **result}, arguments.output)


if __name__ == "__main__":
    main()
