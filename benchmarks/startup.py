"""Where a small `blip2 caption` spends its time: seconds of CPU by process, and when each phase ends.

The command runs on demonstration images in processes of its own. On a machine with other work only the CPU
seconds mean something.

    python -m benchmarks.startup --images 40
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.command_line import make_parser
from benchmarks.measure import report
from pipeline.attempts.store import read_attempts
from pipeline.demo.dataset import INPUTS, write_demo_dataset
from pipeline.storage.folder import Folder

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
FLAGS = ("--model", "demo", "--max-failed-fraction", "1")
"""Some demonstration images are broken on purpose."""
LOOK_EVERY_S = 0.05
"""A process that ends is missed for at most this time."""


@dataclass
class Watched:
    """A process of the command."""

    name: str
    cpu_s: float
    started_s: float
    """Since the command."""


@dataclass
class Family:
    """The command and all its descendants, as they were seen last."""

    root: int
    began: float
    """On the monotonic clock."""
    seen: dict[int, Watched] = field(default_factory=dict)

    def look(self) -> None:
        parents, used = {}, {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    stat = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry)] = int(stat[1])
                used[int(entry)] = (int(stat[11]) + int(stat[12])) / TICKS_PER_S
        for pid in parents:
            ancestor = pid
            while ancestor not in (self.root, 0):
                ancestor = parents.get(ancestor, 0)
            if ancestor == self.root:
                known = self.seen.setdefault(pid, Watched("", 0.0, time.monotonic() - self.began))
                known.cpu_s, known.name = used[pid], _name(pid) or known.name

    def by_name(self) -> dict[str, dict[str, float]]:
        """Return number, CPU seconds and first start of the processes of each name, the largest first."""
        found: dict[str, list[Watched]] = defaultdict(list)
        for process in self.seen.values():
            found[process.name].append(process)
        rows = {
            name: {
                "processes": len(group),
                "cpu_s": round(sum(p.cpu_s for p in group), 2),
                "first_start_s": round(min(p.started_s for p in group), 2),
            }
            for name, group in found.items()
        }
        return dict(sorted(rows.items(), key=lambda row: -row[1]["cpu_s"]))


def _name(pid: int) -> str:
    """Return a short name of a process from its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    title = words[0]
    if title.startswith("ray::"):
        return title.partition("(")[0]
    scripts = ["/".join(Path(word).parts[-2:]) for word in words[1:] if word.endswith(".py")]
    modules = [after for word, after in pairwise(words) if word == "-m"]
    return next(iter([*scripts, *modules]), Path(title).name)


def measure(work: Path, num_images: int, command: list[str]) -> dict[str, Any]:
    """Run the command once.

    Args:
        work: folder for the images and the captions.
        num_images: demonstration images, in one tar and one Parquet file.
        command: what `blip2` is, as words.
    """
    write_demo_dataset(work, num_images=num_images, num_tars=1)
    output = work / "captions"
    began = time.monotonic()
    inputs = [str(work / name) for name in INPUTS]
    process = subprocess.Popen([*command, "caption", *inputs, "-o", str(output), *FLAGS])
    family = Family(process.pid, began)
    while process.poll() is None:
        family.look()
        time.sleep(LOOK_EVERY_S)
    seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"the command has ended with status {process.returncode}")
    (attempt,) = read_attempts(Folder(str(output)))
    by_process = family.by_name()
    return {
        "num_images": num_images,
        "wall_s": seconds,
        "to_stay_below_s": 12.0,
        "phases_s": {**attempt.phases, "whole run": attempt.ended_s},
        "cpu_s": sum(row["cpu_s"] for row in by_process.values()),
        "num_processes": len(family.seen),
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
