"""The commands can read the runs of `benchmarks.reading`, and its figures are those of one process."""

from __future__ import annotations

import pytest

from benchmarks.reading import measure, write_runs
from pipeline.report.rows import FinishedRows


@pytest.mark.slow
def test_runs_are_written_once_and_measured(tmp_path):
    runs = write_runs(tmp_path, 12)
    before, after = (FinishedRows.find(str(runs / name)) for name in ("A", "B"))
    captions = [
        [row["caption"] for table in side.tables() for row in table.to_pylist()] for side in (before, after)
    ]
    assert [one != other for one, other in zip(*captions, strict=True)] == [True, *[False] * 9, True, False]
    assert write_runs(tmp_path, 12) == runs
    figures = measure("compare", runs)
    assert figures["written_mib"] > 0 and figures["peak_mib"] > 20 and figures["cpu_s"] > 0.1
    with pytest.raises(RuntimeError, match="ended with 3"):
        measure("txt", tmp_path)
