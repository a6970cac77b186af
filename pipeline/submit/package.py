"""What is sent to a cluster: the packages that run here, and nothing of the folder in which the user works.

So the job runs the version that the user sees, and no output, picture or secret travels with it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blip2_actor.installation import ROOT

PACKAGES = ("blip2_actor", "pipeline")


@dataclass(frozen=True)
class Package:
    """A folder that is sent as the working folder of a job."""

    folder: Path
    num_files: int
    num_bytes: int


@contextmanager
def packed() -> Iterator[Package]:
    """Copy the packages into a folder of their own, which is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="blip2-submit-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        files = [path for path in folder.rglob("*") if path.is_file()]
        yield Package(folder, len(files), sum(path.stat().st_size for path in files))
