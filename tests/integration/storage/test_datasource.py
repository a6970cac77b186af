"""Shards that Ray Data reads: every row once, and a report for every shard."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.inputs.datasource import ShardDatasource
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions, ShardWork
from tests.integration.inputs import as_table, png, write_tar
from tests.integration.storage.stored_reports import StoreReport

pytestmark = pytest.mark.usefixtures("local_ray")


def read(work, on_end, options=ReadOptions()) -> list[dict]:
    source = ShardDatasource(work, options, on_end)
    ds = ray.data.read_datasource(source, override_num_blocks=source.num_tasks, concurrency=2)
    return sorted(ds.take_all(), key=lambda row: (row["shard"], row["row"]))


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    images = {f"{at:03d}": png(at) for at in range(40)}
    write_tar(folder / "a/0.tar", images)
    write_tar(folder / "a/1.tar", images)
    content = (folder / "a/1.tar").read_bytes()
    (folder / "a/1.tar").write_bytes(content[: len(content) // 2])
    pq.write_table(as_table(images), folder / "0.parquet", row_group_size=10)
    for key, image in images.items():
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / f"{key}.png").write_bytes(image)
    names = [str(folder / name) for name in ("a", "0.parquet", "files")]
    monkeypatch.setattr("pipeline.inputs.listing.FILES_PER_SHARD", 30)
    monkeypatch.setattr("pipeline.inputs.listing.RANGE_BYTES", 1000)
    return list_shards(names), images


@pytest.fixture
def stored(tmp_path):
    (tmp_path / "reports").mkdir()
    return tmp_path / "reports"


def test_shards_of_every_format_in_one_dataset(inputs, stored):
    shards, images = inputs
    rows = read([ShardWork(shard=shard) for shard in shards], StoreReport(stored))
    reports = StoreReport(stored).reports()
    assert set(reports) == {shard.name for shard in shards} and len(shards) == 8
    by_shard = {name: [row for row in rows if row["shard"] == name] for name in reports}
    for name, report in reports.items():
        assert [row["row"] for row in by_shard[name]] == list(range(report.num_rows))
        assert report.complete == (name != "a/1.tar")
    assert [row["image"] for row in by_shard["a/0.tar"]] == list(images.values())
    cut = by_shard["a/1.tar"]
    assert 0 < len(cut) < 40 and [row["image"] for row in cut] == list(images.values())[: len(cut)]
    in_ranges = [row["image"] for name in sorted(by_shard) if "parquet" in name for row in by_shard[name]]
    assert in_ranges == list(images.values())
    in_slices = [row["image"] for name in sorted(by_shard) if "files" in name for row in by_shard[name]]
    assert in_slices == list(images.values())


def test_many_shards_are_read_by_few_tasks_with_the_same_rows(inputs, stored, monkeypatch):
    """Each of 10^5 read tasks cost 2 ms and 7 kB in the driver before the first row."""
    work = [ShardWork(shard=shard) for shard in inputs[0]]
    alone = read(work, StoreReport(stored))
    for path in stored.iterdir():
        path.unlink()
    monkeypatch.setattr("pipeline.inputs.datasource.MAX_READ_TASKS", 3)
    assert 1 < ShardDatasource(work, ReadOptions(), print).num_tasks <= 3 < len(work)
    assert read(work, StoreReport(stored)) == alone
    assert set(StoreReport(stored).reports()) == {one.shard.name for one in work}


def test_finished_rows_are_not_read_and_a_shard_without_work_still_reports(inputs, stored):
    shards, _ = inputs
    (tar,) = [shard for shard in shards if shard.name == "a/0.tar"]
    (part, *_) = [shard for shard in shards if shard.format == "parquet"]
    work = [ShardWork(shard=tar, missing=((3, 5), (38, None))), ShardWork(shard=part, missing=())]
    rows = read(work, StoreReport(stored))
    assert [(row["shard"], row["row"]) for row in rows] == [("a/0.tar", row) for row in (3, 4, 38, 39)]
    assert {name: report.num_rows for name, report in StoreReport(stored).reports().items()} == {
        "a/0.tar": 40,
        part.name: 10,
    }


def test_a_read_task_that_is_killed_at_its_end_runs_again_and_gives_the_same_rows(inputs, stored):
    shards, _ = inputs
    work = [ShardWork(shard=shard) for shard in shards]
    rows = read(work, StoreReport(stored, dies_once=True))
    assert (stored / "died").exists()
    assert set(StoreReport(stored).reports()) == {shard.name for shard in shards}
    places = [(row["shard"], row["row"]) for row in rows]
    assert len(places) == len(set(places))
    (stored / "died").unlink()
    assert rows == read(work, StoreReport(stored))


def test_one_block_per_shard_only_with_override_num_blocks(inputs, stored):
    shards, _ = inputs
    (tar,) = [shard for shard in shards if shard.name == "a/0.tar"]
    source = ShardDatasource([ShardWork(shard=tar)], ReadOptions(), StoreReport(stored))
    assert ray.data.read_datasource(source, override_num_blocks=1).materialize().num_blocks() == 1
    num_blocks = ray.data.read_datasource(source).materialize().num_blocks()
    assert num_blocks > 1, "the advice in ShardDatasource's docstring is out of date"
