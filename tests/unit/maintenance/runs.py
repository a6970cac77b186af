"""A finished run of two tars and a folder, made without Ray, for the tests to damage."""

from __future__ import annotations

from pathlib import Path

from pipeline.inputs.reader import ShardReport
from tests.unit.inputs.formats.reading_cases import tar_bytes
from tests.unit.inputs.run_without_ray import run

TAR, OTHER, FOLDER = "in/0.tar.parquet", "in/1.tar.parquet", "pictures~0-1.parquet"
"""The files of the output."""


def finished_run(root: Path) -> Path:
    """Write the inputs and the run; return its output. The second row of the second tar has failed."""
    (root / "in").mkdir(parents=True)
    for tar, images in {"0": ("a", "b", "c"), "1": ("x", "bad y")}.items():
        members = [(f"{name[-1]}.jpg", f"{name} of {tar}".encode()) for name in images]
        (root / "in" / f"{tar}.tar").write_bytes(tar_bytes(members))
    (root / "pictures").mkdir()
    for name in ("p.jpg", "q.jpg"):
        (root / "pictures" / name).write_text(f"picture {name}")
    done = run(root, input=(str(root / "in"), str(root / "pictures")))
    assert (done.num_rows, done.num_failed, done.missing) == (7, 1, ())
    return root / "out"


def report_of(shard: str, num_rows: int) -> ShardReport:
    return ShardReport(shard=shard, num_rows=num_rows, complete=True)
