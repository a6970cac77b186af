"""`blip2 serve` as a separate process, started in a folder that the test fills."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]


def poison(folder: Path) -> None:
    """Put modules with the names of our packages into a folder; importing one ends the process."""
    for name in ("pipeline", "blip2_actor", "deploy"):
        (folder / f"{name}.py").write_text("raise SystemExit('the file of the user was imported')")


@contextmanager
def serving(
    folder: Path, *flags: str, start: Sequence[str] = ("-m", "pipeline", "serve")
) -> Iterator[subprocess.Popen[str]]:
    """Run `blip2 serve` in a folder, as the console script does, with its own Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        yield subprocess.Popen(
            [sys.executable, "-P", *start, "--model", "demo", "--device", "cpu", *flags],
            env=kept | {"RAY_TMPDIR": ray_folder, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
