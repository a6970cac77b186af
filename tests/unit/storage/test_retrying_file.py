"""A store that fails for a moment in the middle of a file costs no row, and no shard becomes partial."""

from __future__ import annotations

import io
from collections.abc import Container

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from blip2_actor import Status
from pipeline.inputs.formats.folder import Content, read_file
from pipeline.inputs.shards import Shard
from pipeline.storage import retrying, retrying_file
from tests.unit.inputs.formats.reading_cases import read_rows, tar_bytes


class FlakyStore(MemoryFileSystem):
    """A store whose reads with the numbers in `failing`, counted from the start, raise."""

    protocol = "flaky"
    cachable = False
    failing: Container[int] = frozenset()
    num_reads = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def open(self, path, mode="rb", **more):
        file = super().open(path, mode, **more)
        if "r" not in mode:
            return file
        content = file.read()

        class Flaky(io.BytesIO):
            def read(self, size=-1):
                FlakyStore.num_reads += 1
                if FlakyStore.num_reads in FlakyStore.failing:
                    raise OSError("503 slow down")
                return super().read(size)

        return Flaky(content)


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(FlakyStore, "num_reads", 0)
    store = FlakyStore()
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [b"%d" % at * 1000 for at in range(30)]}), table, row_group_size=10)
    store.pipe("/s/0.tar", tar_bytes((f"{at}.jpg", b"%d" % at * 100_000) for at in range(90)))
    store.pipe("/s/0.parquet", table.getvalue())
    store.pipe("/s/0.jpg", b"image")
    return store


@pytest.mark.parametrize("format", ["webdataset", "parquet", "folder"])
def test_a_moment_of_failure_costs_nothing(store, monkeypatch, format):
    file = {"webdataset": "0.tar", "parquet": "0.parquet", "folder": "0.jpg"}[format]
    shard = Shard(name="s", format=format, root="flaky://s", files=(file,))
    whole, report = read_rows(shard)
    num_reads = FlakyStore.num_reads
    assert report.complete and num_reads > 0
    # Each read fails once; then one read fails three times in succession; then every second one fails.
    for failing in [{at} for at in range(1, num_reads + 1)] + [{1, 2, 3}, set(range(1, 2 * num_reads, 2))]:
        monkeypatch.setattr(FlakyStore, "num_reads", 0)
        monkeypatch.setattr(FlakyStore, "failing", frozenset(failing))
        rows, again = read_rows(shard)
        assert (rows, again) == (whole, report), failing


def test_a_store_that_goes_on_failing_leaves_a_partial_shard(store, monkeypatch):
    monkeypatch.setattr(FlakyStore, "failing", range(1, 1 << 30))
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retrying_file, "READ_FOR_S", 0.02)
    rows, report = read_rows(Shard(name="s", format="webdataset", root="flaky://s", files=("0.tar",)))
    assert (rows, report.complete) == ([], False) and "503 slow down" in str(report.reason)


def test_a_missing_file_is_not_retried(store, monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 3600.0)
    _, report = read_rows(Shard(name="s", format="webdataset", root="flaky://s", files=("gone.tar",)))
    assert not report.complete and str(report.reason).endswith("is not there")


def test_closing_it_closes_the_file_of_the_store(store):
    file = retrying_file.RetryingFile(pafs.PyFileSystem(pafs.FSSpecHandler(store)), "/s/0.jpg")
    opened = file._file
    file.close()
    file.close()
    assert opened is not None and opened.closed


def test_a_file_that_a_flag_names_is_read_whole(store, monkeypatch):
    monkeypatch.setattr(FlakyStore, "failing", {1, 2})
    assert retrying_file.read_file("keys", "flaky://s/0.jpg") == b"image"
    for uri, reason in (
        ("flaky://s/1.jpg", "/s/1.jpg is not there"),
        ("/no/file", "No such file or directory"),
    ):
        with pytest.raises(ValueError, match=f"^keys must be a file that can be read, got {uri}: {reason}$"):
            retrying_file.read_file("keys", uri)


def test_a_whole_file_is_one_request(store):
    """It was one for every 8 KiB: an image of 1 MiB took 128 of them, one after the other."""
    store.pipe("/s/large.jpg", bytes(1 << 20))
    with retrying_file.open_below("flaky://s", "large.jpg") as file:
        assert (len(file.read()), file.read(), FlakyStore.num_reads) == (1 << 20, b"", 1)
        file.seek(1000)
        assert len(file.read()) == (1 << 20) - 1000


def test_an_image_in_gs_is_read_as_a_stream(tmp_path, monkeypatch):
    """Its other files let no thread work during a request: images were read one after the other."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.0)
    (tmp_path / "image").write_bytes(b"image")
    disk = pafs.LocalFileSystem()
    answers = [OSError("503"), pa.BufferReader(b"ima"), pa.BufferReader(b"image")]

    class Google:
        type_name = "gcs"
        get_file_info = disk.get_file_info

        def open_input_stream(self, path: str, compression: None) -> pa.NativeFile:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

    def read(name: str, max_bytes: int) -> Content:
        return read_file(Google(), str(tmp_path / name), max_bytes)

    assert read("image", 4)[1:] == (Status.TOO_LARGE, "the file has 5 bytes, more than 4")
    content, status, error = read("absent", 9)
    assert (content, status) == (None, Status.UNREADABLE) and "absent is not there" in str(error)
    assert read("image", 5) == (b"image", None, None) and not answers
