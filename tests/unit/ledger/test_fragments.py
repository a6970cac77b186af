"""Fragments and commits count each row once: a wrong union loses rows, a wrong merge doubles them."""

import logging
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import SUMMARY_KEY, Summary, commit_shard, read_summary
from pipeline.ledger.fragments import (
    list_shard_files,
    names_of_shard,
    parse_fragment,
    read_shard_report,
    rows_in,
    store_shard_report,
    write_fragment,
)
from pipeline.ledger.layout import output_name, shard_report_name
from pipeline.ledger.scan import scan_output
from pipeline.rowset import RowSet
from pipeline.schema import ROW_CONTRACT, output_schema
from pipeline.storage.folder import Folder


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path))


def rows(numbers, shard="a/0.tar", status="ok", word="caption") -> pa.Table:
    numbers = list(numbers)
    values = [
        {
            "key": f"k{n}",
            "shard": shard,
            "row": n,
            "caption": f"{word} {n}" if status == "ok" else None,
            "flags": [],
            "status": status,
            "error": None if status == "ok" else "why",
        }
        for n in numbers
    ]
    return pa.Table.from_pylist(values, schema=ROW_CONTRACT)


def report(num_rows, shard="a/0.tar", **changes) -> ShardReport:
    return ShardReport(**{"shard": shard, "num_rows": num_rows, "complete": True, **changes})


def committed_rows(folder: Folder, shard: str = "a/0.tar") -> pa.Table:
    """Return the rows in the file of a shard."""
    return folder.read(output_name(shard), pq.read_table)


def stored_report(folder: Folder) -> ShardReport | None:
    """Return the latest report of the shard."""
    name = list_shard_files(folder, "a/0.tar", 0).report
    return None if name is None else read_shard_report(folder, name)


def commit(folder: Folder, shard_report: ShardReport) -> Summary:
    """Commit a shard that has all its rows."""
    summary = commit_shard(folder, shard_report, {})
    assert summary is not None
    return summary


def test_the_name_says_which_rows_are_in_it(folder):
    fragment = write_fragment(folder, rows([3, 4, 5]))
    assert parse_fragment(fragment.name) == fragment
    assert not fragment.has_gaps
    assert rows_in(folder, {"a/0.tar": [fragment]}) == {"a/0.tar": RowSet([(3, 6)])}


def test_a_fragment_with_gaps_is_opened(folder):
    fragment = write_fragment(folder, rows([9, 1, 5]))
    assert fragment.has_gaps
    assert rows_in(folder, {"a/0.tar": [fragment]}) == {"a/0.tar": RowSet([(1, 2), (5, 6), (9, 10)])}


def test_writing_the_same_rows_twice_is_one_fragment(folder):
    assert write_fragment(folder, rows([1, 2])) == write_fragment(folder, rows([2, 1]))
    assert len(list_shard_files(folder, "a/0.tar", 0).fragments) == 1


def test_a_shard_below_the_name_of_another_is_not_mixed_up(folder):
    write_fragment(folder, rows([0], shard="a"))
    write_fragment(folder, rows([0], shard="a/b"))
    assert [f.shard for f in list_shard_files(folder, "a", 0).fragments] == ["a"]


def test_a_commit_takes_each_row_once_in_order_whatever_the_overlap(folder):
    numbers = list(range(50))
    for seed in range(6):
        write_fragment(folder, rows(random.Random(seed).sample(numbers, 25), word="any"))
    write_fragment(folder, rows(numbers, word="any"))
    summary = commit_shard(folder, report(50), {b"k": b"v"})
    table = committed_rows(folder)
    assert table["row"].to_pylist() == numbers
    assert table["key"].to_pylist() == [f"k{n}" for n in numbers]
    assert table.schema.metadata[b"k"] == b"v"
    assert summary == read_summary(folder, "a/0.tar")
    assert dict(summary.by_status) == {"ok": 50}


def test_a_commit_with_a_missing_row_changes_nothing(folder):
    write_fragment(folder, rows([0, 1, 3]))
    assert commit_shard(folder, report(4), {}) is None
    assert scan_output(folder).finished == frozenset()
    assert len(list_shard_files(folder, "a/0.tar", 0).fragments) == 1


def test_a_commit_cleans_up_after_itself(folder):
    write_fragment(folder, rows(range(3)))
    store_shard_report(folder, report(3))
    commit_shard(folder, report(3), {})
    state = scan_output(folder)
    assert (state.finished, dict(state.fragments), state.shard_reports) == ({"a/0.tar"}, {}, {})


def test_a_row_that_is_ok_replaces_one_that_is_not_and_never_the_other_way(folder):
    write_fragment(folder, rows([0, 1]))
    write_fragment(folder, rows([2, 3], status="undecodable"))
    commit_shard(folder, report(4), {})
    write_fragment(folder, rows([2], word="second"))
    write_fragment(folder, rows([0, 3], status="too_large"))
    summary = commit(folder, report(4))
    table = committed_rows(folder).to_pydict()
    assert table["status"] == ["ok", "ok", "ok", "too_large"]
    assert table["caption"] == ["caption 0", "caption 1", "second 2", None]
    assert summary.num_failed == 1


def test_a_shard_that_can_be_read_less_far_the_second_time_keeps_its_rows(folder):
    write_fragment(folder, rows(range(5)))
    commit_shard(folder, report(5, complete=False, reason="ends early"), {})
    summary = commit(folder, report(0, complete=False, reason="vanished"))
    assert summary.num_rows == 5
    assert len(committed_rows(folder)) == 5


def test_rows_past_the_end_of_a_worse_reading_wait_for_a_better_one(folder):
    write_fragment(folder, rows(range(3)))
    late = write_fragment(folder, rows(range(6, 9)))
    commit_shard(folder, report(3, complete=False, reason="403"), {})
    assert list_shard_files(folder, "a/0.tar", 0).fragments == (late,)
    write_fragment(folder, rows(range(3, 6)))
    assert commit(folder, report(9)).num_rows == 9


def test_a_worse_reading_does_not_replace_how_a_better_one_ended(folder):
    store_shard_report(folder, report(4, complete=False, reason="ends early"))
    store_shard_report(folder, report(2, complete=False, reason="vanished"))
    assert stored_report(folder) == report(4, complete=False, reason="ends early")
    store_shard_report(folder, report(9))
    store_shard_report(folder, report(0, complete=False, reason="403"))
    assert stored_report(folder) == report(9)


def test_the_latest_report_counts_also_when_one_before_it_named_a_change(folder):
    """When the input was restored and read again, the shard used to stay partial forever."""
    write_fragment(folder, rows([0, 1]))
    store_shard_report(folder, report(0, complete=False, changed=True, reason="has changed"))
    store_shard_report(folder, report(2))
    named = folder.path(shard_report_name("a/0.tar", 0, changed=True))
    os.utime(named, (1, 1))
    assert stored_report(folder) == report(2)
    assert scan_output(folder).shard_reports == {"a/0.tar": shard_report_name("a/0.tar", 0)}
    assert commit(folder, report(2)).complete
    assert scan_output(folder).shard_reports == {}


def test_rows_of_two_inputs_are_noticed_though_the_report_of_the_change_is_damaged(folder):
    write_fragment(folder, rows([0, 1]))
    other = rows([1])
    write_fragment(folder, other.set_column(0, other.schema.field("key"), pa.array(["other"])))
    store_shard_report(folder, report(0, complete=False, changed=True, reason="has changed"))
    folder.put(shard_report_name("a/0.tar", 0, changed=True), b"{")
    assert "was read as" in (commit(folder, report(2)).reason or "")


def test_a_shard_without_rows_has_a_file_with_the_columns(folder):
    summary = commit_shard(folder, report(0), {}, output_schema([pa.field("url", pa.null())]))
    assert summary is not None
    table = committed_rows(folder)
    assert table.column_names == [*ROW_CONTRACT.names, "url"]
    assert summary.num_rows == len(table) == 0


def test_half_written_files_are_leftovers_and_not_results(folder):
    folder.put("_blip2/run.json", b"{}")
    aside = folder.path("_blip2/tmp/half")
    os.makedirs(os.path.dirname(aside), exist_ok=True)
    with open(aside, "wb") as file:
        file.write(b"PAR1")
    state = scan_output(folder)
    assert state.leftovers == ("_blip2/tmp/half",)
    assert state.finished == frozenset()


def test_a_failed_put_leaves_the_old_file_and_no_leftovers(folder, monkeypatch):
    folder.put("x.parquet", b"old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.put("x.parquet", b"new")
    assert folder.get("x.parquet") == b"old"
    assert scan_output(folder).leftovers == ()


def test_row_groups_stay_readable_in_pieces(folder, monkeypatch):
    monkeypatch.setattr("pipeline.ledger.merge.ROW_GROUP_BYTES", 1000)
    write_fragment(folder, rows(range(200)))
    commit_shard(folder, report(200), {})
    file = pq.ParquetFile(folder.path(output_name("a/0.tar")))
    assert file.num_row_groups > 10
    assert SUMMARY_KEY in file.metadata.metadata


def test_no_name_in_the_state_ends_in_parquet(folder, tmp_path):
    """`output/**/*.parquet` must find only results, even if a shard is itself a Parquet file."""
    write_fragment(folder, rows([0, 1], shard="a/0.parquet"))
    assert not list(tmp_path.rglob("*.parquet"))


def with_kept(numbers, kept: pa.Array) -> pa.Table:
    return rows(numbers).append_column("kept", kept)


def test_rows_that_no_merge_can_write_make_the_shard_partial(folder, caplog):
    """The committer used to raise, which ended the job and every resume; then a start printed a traceback."""
    write_fragment(folder, with_kept([0], pa.array([{"a": 1}])))
    write_fragment(folder, with_kept([1], pa.array(["text"])))
    for _ in range(2):  # a retry has the same result
        summary = commit(folder, report(2))
        assert (summary.num_rows, summary.complete) == (0, False)
        assert "the rows cannot be written as one table" in str(summary.reason)
        assert read_summary(folder, "a/0.tar") == summary
    assert len(list_shard_files(folder, "a/0.tar", 0).fragments) == 2, "the captions are not lost"
    assert not any(record.exc_info for record in caplog.records if record.levelno > logging.DEBUG)


def test_rows_that_cannot_be_merged_into_a_file_leave_it_as_it_is(folder):
    write_fragment(folder, with_kept([0, 1], pa.array([{"a": 1}] * 2)))
    before = commit(folder, report(2))
    write_fragment(folder, with_kept([1], pa.array(["text"])))
    assert commit(folder, report(2)) == before
    for number, kept in enumerate((pa.array([{"a": 1}]), pa.array(["text"]))):
        write_fragment(folder, with_kept([number], kept), generation=1)
    again = commit(folder, report(2, generation=1))  # the file belongs to the old input
    assert (again.generation, again.num_rows, again.complete) == (1, 0, False)


@pytest.mark.parametrize(("length", "is_refused"), [(236, False), (250, True)])
def test_a_shard_whose_file_would_have_too_long_a_name_is_refused(folder, length, is_refused):
    """After all its images were captioned, writing it used to be tried for a quarter of an hour."""
    name = "a" * length + ".tar"
    names = names_of_shard(Shard(name=name, format="webdataset", root="in", files=(name,)))
    if is_refused:
        with pytest.raises(ValueError, match=r"output must have room .* got a name of 262 bytes"):
            folder.require_names(names)
    else:
        folder.require_names(names)
        for name in names:
            folder.put(name, b"")


@pytest.mark.parametrize("content", [b"", b"{}", "cut", "flipped"])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [0, 2]])
def test_a_damaged_fragment_is_named(folder, content, numbers):
    """Its rows used to count as done, and the only message was "File is too small: 0"."""
    fragment = write_fragment(folder, rows(numbers))
    whole = folder.get(fragment.name)
    assert whole is not None
    if content == "cut":
        content = whole[: len(whole) // 2]
    elif content == "flipped":
        content = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    folder.put(fragment.name, content)
    if fragment.has_gaps:
        with pytest.raises(pa.ArrowInvalid, match=rf"{fragment.name} in .* is damaged.*; delete this file"):
            rows_in(folder, {"a/0.tar": [fragment]})
        return
    summary = commit(folder, report(3))
    assert not summary.complete and summary.reason is not None and fragment.name in summary.reason
    folder.delete(fragment.name)
    write_fragment(folder, rows(numbers))
    assert commit(folder, report(3)).complete


def test_a_damaged_report_is_none_and_its_shard_is_read_again(folder):
    """The run used to end with "Expecting value: line 1 column 1"."""
    store_shard_report(folder, report(3, complete=False))
    for damaged in (b"", b'{"shard"', b"\xff\xfe", b"[]", b'{"a": 1}'):
        folder.put(shard_report_name("a/0.tar", 0), damaged)
        assert stored_report(folder) is None
    store_shard_report(folder, report(2, complete=False))
    assert stored_report(folder) == report(2, complete=False)
