"""`blip2 caption` in a folder whose files have the names of our packages and of our dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.inputs import png, write_tar

# A cluster starts and ends; this takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(480)

ROOT = Path(__file__).parents[3]


def test_the_workers_of_a_local_cluster_import_our_packages(tmp_path: Path) -> None:
    """Ray puts the working folder first in every worker's import path: the job used to hang or fail."""
    for name in ("pipeline", "blip2_actor", "deploy", "PIL", "pyarrow"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the file of the user was imported')\n")
    write_tar(tmp_path / "in" / "a.tar", {"x": png(0), "y": png(1)})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = ["caption", "--model", "demo", "--device", "cpu", "--input", "in", "--output", "out"]
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline", *command],  # as the console script does
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    [output] = (tmp_path / "out").glob("*.parquet")
    assert pq.read_table(output)["status"].to_pylist() == ["ok", "ok"]
