"""One fragment holds rows of several calls, because every request to a store costs; no row may be lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipeline.ledger.fragments import list_shard_files, rows_in
from pipeline.ledger.ledger import Ledger
from pipeline.rowset import RowSet
from pipeline.stages import fragment_writer
from pipeline.stages.fragment_writer import FragmentWriter
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import rows

LONG_S = 60.0


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "out"))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder that seems to be in a store, with long rests between calls."""
    monkeypatch.setattr(fragment_writer, "QUIET_S", LONG_S)
    monkeypatch.setattr(fragment_writer, "QUIET_PART", 1e9)
    return Folder(
        "store", filesystem=pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), root="out"
    )


def write_together(writer: FragmentWriter, *tables) -> list[BaseException | None]:
    """Write each table in its own call; all calls have begun before the first one writes."""
    begun = threading.Barrier(len(tables))

    def run(table):
        with writer.call():
            begun.wait(LONG_S)
            try:
                writer.write(table)
            except OSError as error:
                return error

    with ThreadPoolExecutor(len(tables)) as pool:
        return list(pool.map(run, tables))


def when_rows_are_held(writer: FragmentWriter, monkeypatch) -> threading.Event:
    """Return an event that is set as soon as the writer holds rows of a call."""
    has_rows = threading.Event()
    add = writer._add

    def add_and_tell(part):
        batch = add(part)
        has_rows.set()
        return batch

    monkeypatch.setattr(writer, "_add", add_and_tell)
    return has_rows


def test_rows_of_calls_that_wait_for_each_other_are_one_fragment(folder):
    writer = FragmentWriter(Ledger(folder), hold_s=LONG_S)
    assert write_together(writer, *(rows(range(n, n + 10)) for n in (0, 10, 20))) == [None] * 3
    (fragment,) = list_shard_files(folder, "a/0.tar", 0).fragments
    assert (fragment.first, fragment.last, fragment.count) == (0, 29, 30)


def test_a_call_alone_and_a_large_batch_do_not_wait(folder):
    writer = FragmentWriter(Ledger(folder), fragment_rows=10, hold_s=LONG_S)
    with writer.call():
        writer.write(rows(range(3)))
        with writer.call():  # a call that has nothing to write yet
            writer.write(rows(range(10, 20)))
    assert [
        f.count for f in sorted(list_shard_files(folder, "a/0.tar", 0).fragments, key=lambda f: f.first)
    ] == [3, 10]


def test_large_rows_do_not_wait_and_are_several_fragments(folder, monkeypatch):
    """With images of 5 MB in kept columns, a fragment used to have 2.5 GB, which no commit could read."""
    large = rows(range(16), word="x" * 1000)
    monkeypatch.setattr(fragment_writer, "FRAGMENT_BYTES", large.nbytes // 7)
    writer = FragmentWriter(Ledger(folder), hold_s=LONG_S)
    with writer.call(), writer.call():
        writer.write(large)
    fragments = list_shard_files(folder, "a/0.tar", 0).fragments
    assert sorted((f.first, f.last) for f in fragments) == [(n, n + 3) for n in range(0, 16, 4)]


def test_rows_that_a_failed_call_does_not_write_are_held_no_longer(folder, monkeypatch):
    """They used to count forever, and the "store" lines reported rows that nobody held."""
    writer = FragmentWriter(Ledger(folder), hold_s=LONG_S)

    def fail(*_: object) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch, writer.call():
        patch.setattr(Ledger, "write_fragment", fail)
        with pytest.raises(OSError, match="full"):
            writer.write(pa.concat_tables([rows(range(2), shard="a"), rows(range(1), shard="b")]))
        assert writer.num_held == 0
    with writer.call():
        writer.write(rows(range(5, 6), shard="b"))
    (fragment,) = list_shard_files(folder, "b", 0).fragments
    assert (fragment.first, fragment.count, writer.num_held) == (5, 1, 0)


def test_a_call_that_fails_takes_only_its_own_rows_out_of_a_fragment_that_it_shares(folder, monkeypatch):
    writer = FragmentWriter(Ledger(folder), hold_s=LONG_S)
    write_fragment = Ledger.write_fragment

    def write(ledger: Ledger, table: pa.Table) -> None:
        if table["shard"][0].as_py() == "a":
            raise OSError("full")
        write_fragment(ledger, table)

    monkeypatch.setattr(Ledger, "write_fragment", write)
    has_rows = when_rows_are_held(writer, monkeypatch)

    def share():
        with writer.call():
            writer.write(rows(range(5, 7), shard="b"))

    shares = threading.Thread(target=share, daemon=True)
    with writer.call():  # a call that has nothing to write yet
        shares.start()
        assert has_rows.wait(LONG_S)
        with writer.call(), pytest.raises(OSError, match="full"):
            writer.write(pa.concat_tables([rows(range(4), shard="a"), rows(range(1), shard="b")]))
        assert writer.num_held == 2
    shares.join(LONG_S / 4)
    (fragment,) = list_shard_files(folder, "b", 0).fragments
    assert (fragment.first, fragment.last, fragment.count, writer.num_held) == (5, 6, 2, 0)


def test_counts_are_right_when_a_call_hears_that_its_rows_are_written(folder):
    writer = FragmentWriter(Ledger(folder), hold_s=LONG_S)
    seen = []

    class Watched(Future):
        def set_result(self, result):
            seen.append((writer.num_held, writer.busy_s > 0))
            super().set_result(result)

    with writer.call():
        batch = writer._add(rows(range(3)))
        batch.written = Watched()
        writer._write(batch)
    assert seen == [(0, True)]


def test_rows_wait_for_a_slow_call_only_for_a_while(folder):
    writer = FragmentWriter(Ledger(folder), hold_s=0.01)
    with writer.call(), writer.call():
        writer.write(rows(range(3)))
    assert len(list_shard_files(folder, "a/0.tar", 0).fragments) == 1


def test_rows_that_two_calls_have_made_are_not_counted_twice_in_one_name(folder):
    """A name with one row too many hides a missing one, and the shard would never finish."""
    write_together(FragmentWriter(Ledger(folder), hold_s=LONG_S), rows([0, 1]), rows([1, 3]))
    found = rows_in(folder, {"a/0.tar": list_shard_files(folder, "a/0.tar", 0).fragments})
    assert found == {"a/0.tar": RowSet([(0, 2), (3, 4)])}


def test_an_error_reaches_every_call_whose_rows_are_not_written(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "put", full)
    errors = write_together(FragmentWriter(Ledger(folder), hold_s=LONG_S), rows([0]), rows([1]))
    assert [type(error) for error in errors] == [OSError, OSError]


def test_in_a_store_rows_of_a_call_that_begins_while_all_others_wait_join_theirs(store, monkeypatch):
    """Each call of a fast engine that waits for images used to be its own fragment."""
    writer = FragmentWriter(Ledger(store), fragment_rows=6, hold_s=LONG_S)
    has_rows = when_rows_are_held(writer, monkeypatch)

    def first():
        with writer.call():
            writer.write(rows(range(3)))

    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(first)
        assert has_rows.wait(LONG_S)
        with writer.call():
            writer.write(rows(range(3, 6)))
        waits.result(LONG_S)
    (fragment,) = list_shard_files(store, "a/0.tar", 0).fragments
    assert fragment.count == 6


def test_on_a_disk_rows_do_not_wait_for_a_call_that_may_begin(tmp_path, store):
    """Waiting cost a third of the speed of a job whose engine waits for images."""
    writer = FragmentWriter(Ledger(Folder(str(tmp_path / "disk"))), hold_s=LONG_S)
    began = time.monotonic()
    with writer.call():
        writer.write(rows(range(3)))
    assert time.monotonic() - began < LONG_S / 2


def test_rows_that_are_written_outside_of_a_call_do_not_wait(store):
    """A call that is replayed carefully writes each row alone."""
    began = time.monotonic()
    FragmentWriter(Ledger(store), hold_s=LONG_S).write(rows([0]))
    assert time.monotonic() - began < LONG_S / 2


def test_a_call_with_rows_of_several_shards_waits_for_none_of_them(folder):
    """It used to wait for the first shard, while the largest one was the next to be written."""
    writer = FragmentWriter(Ledger(folder), hold_s=LONG_S)
    began = time.monotonic()
    with writer.call():
        writer.write(pa.concat_tables([rows(range(2), "a/0.tar"), rows(range(5), "a/1.tar")]))
    assert time.monotonic() - began < LONG_S / 2
