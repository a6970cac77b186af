"""The rows that `blip2 verify --url` compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.fetching import images_of_rows
from pipeline.fetching.images_of_rows import read_images
from pipeline.ledger.commit import Summary
from pipeline.ledger.ledger import Ledger
from pipeline.maintenance.sample import sample_rows
from pipeline.storage.folder import Folder
from tests.integration.inputs import png, write_tars
from tests.unit.export.finished_run import write_run


def test_each_row_is_named_whose_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their shard used to be named."""

    def two_images(*what: Any) -> Any:
        images = read_images(*what)
        yield next(images)
        yield next(images)
        raise OSError("the disk is gone")

    monkeypatch.setattr(images_of_rows, "read_images", two_images)
    write_tars(tmp_path / "in", 1, 4)
    written = write_run(tmp_path / "in", tmp_path / "out")
    folder = Folder(str(tmp_path / "out"))
    run = Ledger(folder).require_run()
    (shard,) = run.shards
    rows = list(sample_rows(folder, run, {shard.name: Summary(shard.name, 4, {"ok": 4})}, 4))
    assert [row.name for row in rows] == [f"{shard.name} row {n} ({written[n]['key']})" for n in range(4)]
    assert [row.image for row in rows] == [png(0), png(1), None, None]
    problem = "its image cannot be read: the disk is gone"
    assert [row.problem for row in rows] == [None, None, problem, problem]


def test_rows_that_are_not_in_the_order_of_their_numbers_have_their_images(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", 1, 4)
    write_run(tmp_path / "in", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("*.parquet")
    pq.write_table(pq.read_table(path).take([2, 0, 3, 1]), path)
    folder = Folder(str(tmp_path / "out"))
    run = Ledger(folder).require_run()
    (shard,) = run.shards
    rows = list(sample_rows(folder, run, {shard.name: Summary(shard.name, 4, {"ok": 4})}, 4))
    assert [(row.columns["row"], row.image, row.problem) for row in rows] == [
        (n, png(n), None) for n in range(4)
    ]
