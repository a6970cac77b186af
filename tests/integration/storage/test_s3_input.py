"""Inputs in an S3 bucket on loopback are listed and read as on a disk."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from pipeline.errors import InputError
from pipeline.inputs.changes import find_changes
from pipeline.inputs.formats import check_options, read_shard
from pipeline.inputs.listing import list_files, list_shards
from pipeline.inputs.reader import ReadOptions, ShardWork
from pipeline.inputs.stamps import read_unchanged, stamp_of
from pipeline.storage.filesystems import open_filesystem
from tests.unit.inputs.formats.reading_cases import read_rows, tar_bytes


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = open_filesystem(f"s3://key:secret@bucket{options}")
    filesystem.create_dir("bucket")
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [b"%d" % at for at in range(30)]}), table, row_group_size=10)
    objects = {
        f"tars/{part}/{at}.tar": tar_bytes([(f"{part}{at}.jpg", b"x")]) for part in "ab" for at in (0, 1)
    }
    objects |= {"tables/0.parquet": table.getvalue(), "images/a b/é #1.jpg": b"one", "images/2.jpg": b"two"}
    for name, content in objects.items():
        with filesystem.open_output_stream(f"bucket/{name}") as file:
            file.write(content)
    yield options
    server.stop()


def uri(path: str, query: str) -> str:
    return f"s3://key:secret@{path}{query}"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("bucket/tars", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("bucket/tars/", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("bucket/tars/a/{0..1}.tar", ["0.tar", "1.tar"]),
        ("bucket/*/*/0.tar", ["tars/a/0.tar", "tars/b/0.tar"]),
        ("bucket/tars/b/1.tar", ["1.tar"]),
    ],
)
def test_a_bucket_is_listed_like_a_disk(query, path, names):
    shards = list_shards(uri(path, query))
    assert [shard.name for shard in shards] == names
    assert all(shard.size_bytes for shard in shards)
    assert [read_rows(shard)[0][0]["image"] for shard in shards] == [b"x"] * len(names)
    assert "secret" not in shards[0].uri + shards[0].name


def test_tables_and_folders_in_a_bucket(query, monkeypatch):
    monkeypatch.setattr("pipeline.inputs.listing.RANGE_BYTES", 100)
    shards = list_shards(uri("bucket/tables", query))
    assert len(shards) == 3 and len(check_options(shards, ReadOptions())) == 0
    assert [row["image"] for shard in shards for row in read_rows(shard)[0]] == [
        b"%d" % at for at in range(30)
    ]
    (shard,) = list_shards(uri("bucket/images", query))
    assert [(row["key"], row["image"]) for row in read_rows(shard)[0]] == [
        ("2.jpg", b"two"),
        ("a b/é #1.jpg", b"one"),
    ]


def test_a_missing_input_is_refused_and_a_shard_that_vanishes_is_partial(query):
    with pytest.raises(InputError, match="no such file or folder: "):
        list_shards(uri("bucket/gone", query))
    (shard,) = list_shards(uri("bucket/tars/a/0.tar", query))
    filesystem, path = open_filesystem(uri("bucket/tars/a/0.tar", query))
    content = filesystem.open_input_stream(path).read()
    filesystem.delete_file(path)
    try:
        rows, report = read_rows(shard)
    finally:
        with filesystem.open_output_stream(path) as file:
            file.write(content)
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    assert report.reason is not None and "secret" not in report.reason
    assert len(list(read_shard(ShardWork(shard=shard), ReadOptions()))) == 1


def test_an_object_that_was_put_again_is_another_input(query):
    """A store's listing and its answer about one object must agree while the object is unchanged."""
    filesystem, path = open_filesystem(uri("bucket/changing", query))

    def put(name: str, content: bytes) -> None:
        with filesystem.open_output_stream(f"{path}/{name}") as file:
            file.write(content)

    put("0.tar", tar_bytes([("a.jpg", b"old")]))
    put("1.tar", tar_bytes([("b.jpg", b"old")]))
    name = uri("bucket/changing", query)
    shards = list_shards(name)
    assert [shard.stamps for shard in shards] == [
        (stamp_of(info),) for info in filesystem.get_file_info([f"{path}/0.tar", f"{path}/1.tar"])
    ]
    assert list(read_unchanged(ShardWork(shard=shards[0]), ReadOptions()))
    unchanged = find_changes(shards, list_files([name], "auto"), lambda shard: None)
    assert (unchanged.shards, unchanged.lines()) == (tuple(shards), [])
    put("0.tar", tar_bytes([(f"{at}.jpg", b"new") for at in range(20)]))
    put("2.tar", tar_bytes([("c.jpg", b"new")]))
    filesystem.delete_file(f"{path}/1.tar")
    found = find_changes(shards, list_files([name], "auto"), lambda shard: None)
    assert (list(found.changed), found.names_of_gone, found.num_new) == (["0.tar"], ("1.tar",), 1)
    reader = read_unchanged(ShardWork(shard=shards[0]), ReadOptions())
    with pytest.raises(StopIteration) as end:
        next(reader)
    assert end.value.value.changed and "secret" not in end.value.value.reason
