"""Kill a run in the middle and start it again: finished rows are kept, and no row is lost or repeated.

    python -m examples.resume_after_a_kill

Draws pictures, starts `blip2 caption` on them, kills it with SIGKILL once some rows are written, and runs the
same command again. With your own data, resuming is the second step alone: run the same command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds

from examples.drawn_pictures import draw_pictures
from pipeline.cli.main import main as blip2


def kill_and_resume(folder: Path, num_pictures: int) -> list[str]:
    """Caption the drawn pictures of a folder in two starts, and return the keys of all rows.

    Raises:
        RuntimeError: the second start does not finish.
    """
    draw_pictures(folder / "pictures", num_pictures)
    output = folder / "captions"
    arguments = ["caption", "--model", "demo", "--input", str(folder / "pictures"), "--output", str(output)]

    first = subprocess.Popen([sys.executable, "-m", "pipeline", *arguments])
    while first.poll() is None and not any((output / "_blip2" / "fragments").rglob("*.arrow")):
        time.sleep(0.05)
    first.kill()
    first.wait()
    print(f"killed; {num_rows(output)} rows are in finished files, the rest in fragments under _blip2")

    status = blip2(arguments)
    if status:
        raise RuntimeError(f"the second start must finish, got exit status {status}")
    return ds.dataset(output, format="parquet").to_table(columns=["key"])["key"].to_pylist()


def num_rows(output: Path) -> int:
    return sum(ds.dataset(file, format="parquet").count_rows() for file in output.rglob("*.parquet"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show that a killed run resumes.")
    parser.add_argument("--folder", default="resumed", help="new folder for pictures and captions")
    parser.add_argument("--num-pictures", type=int, default=2000, help="pictures to draw (default: 2000)")
    arguments = parser.parse_args(argv)
    if (Path(arguments.folder) / "captions").exists():
        parser.error(f"--folder must hold no captions yet, got {arguments.folder}; name another folder")
    keys = kill_and_resume(Path(arguments.folder), arguments.num_pictures)
    print(f"{len(keys)} rows, {len(set(keys))} different keys")
    return 0


if __name__ == "__main__":
    sys.exit(main())
