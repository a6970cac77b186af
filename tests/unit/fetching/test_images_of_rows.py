"""Rows of an output and their images."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.images_of_rows import images_of_output
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions
from tests.integration.inputs import png, write_tars


@pytest.mark.parametrize(
    ("numbers", "lost"),
    [
        ([0, 1, 1, 2, 3], []),
        ([0, 2, 1, 3, 4], [(1, "its row comes after row 2 in the output")]),
        ([1, 1, 3, 7, 7], [(7, "the input ends before it")] * 2),
    ],
)
def test_a_row_that_comes_twice_or_too_late_costs_no_other(tmp_path: Path, numbers: list[int], lost) -> None:
    """All rows after it had no image."""
    write_tars(tmp_path, 1, 5)
    (shard,) = list_shards([str(tmp_path)])
    rows = [{"row": n, "sha256": sha256(png(n)).digest()} for n in numbers]
    found = list(images_of_output(shard, numbers, rows, ReadOptions(), FetchSettings()))
    assert [(row["row"], image.row) for row, image in found] == [(n, n) for n in numbers]
    errors = [(image.row, image.error) for _, image in found if image.image is None]
    assert errors == [(n, f"the image can no longer be read: {why}") for n, why in lost]
    assert all(image.image in (None, png(row["row"])) for row, image in found)
