"""A merge holds a few pieces at a time, and writes every type and any size that a fragment can have."""

from __future__ import annotations

import random
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.ledger import commit as commit_module
from pipeline.ledger import merge as merge_module
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.merge import Merge, PieceGone
from pipeline.schema import plain_type
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import committed_rows, rows


def piece_of(numbers: list[int], kept: pa.Array | None = None, status: str = "ok") -> pa.Table:
    columns: dict[str, object] = {
        "key": [f"k{n}" for n in numbers],
        "shard": ["s"] * len(numbers),
        "row": pa.array(numbers, pa.int64()),
        "status": [status] * len(numbers),
    }
    return pa.table(columns if kept is None else columns | {"kept": kept})


def given(table: pa.Table) -> pa.Table:
    return table


def merged(tables: list[pa.Table]) -> pa.Table:
    merge = Merge([partial(given, table) for table in tables])
    return pa.concat_tables(merge.row_groups(len(merge.numbers)))


@pytest.mark.parametrize(
    ("type", "values"),
    [
        (pa.string_view(), ["a", "b" * 30]),
        (pa.binary_view(), [b"a", None]),
        (pa.list_view(pa.int32()), [[1], [2]]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b"]),
        (pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]), [{"a": "x"}, None]),
        (pa.map_(pa.string(), pa.int64()), [[("k", 1)], None]),
        (pa.float16(), [1.5, None]),
        (pa.list_(pa.float32(), 2), [[1, 2], None]),
    ],
)
def test_every_type_can_be_written(tmp_path, type, values):
    """Some types do not support `take`, such as the views that Polars writes."""
    rows = merged([piece_of([1 - n], pa.array([value], type)) for n, value in enumerate(values)])
    pq.write_table(rows, tmp_path / "0.parquet")
    table = pq.read_table(tmp_path / "0.parquet")
    assert table["row"].to_pylist() == [0, 1]
    assert table["kept"].to_pylist() == values[::-1]
    assert table["kept"].type == plain_type(type)


def test_pieces_that_do_not_fit_into_memory_are_read_again(monkeypatch):
    monkeypatch.setattr(merge_module, "HELD_BYTES", 0)
    monkeypatch.setattr(merge_module, "JOINED_BYTES", 0)
    monkeypatch.setattr(merge_module, "ROW_GROUP_BYTES", 500)
    numbers = list(range(200))
    random.Random(0).shuffle(numbers)
    reads = 0
    pieces = []
    for start in range(0, 200, 20):

        def read(rows: list[int] = numbers[start : start + 20]) -> pa.Table:
            nonlocal reads
            reads += 1
            return piece_of(rows, pa.array([b"%d" % n for n in rows]))

        pieces.append(read)
    merge = Merge(pieces)
    groups = list(merge.row_groups(200))
    assert len(groups) > 10 and reads > 20
    rows = pa.concat_tables(groups)
    assert rows["row"].to_pylist() == list(range(200))
    assert rows["kept"].to_pylist() == [b"%d" % n for n in range(200)]


def test_pieces_are_held_up_to_the_limit_and_make_room_for_others(monkeypatch):
    monkeypatch.setattr(merge_module, "JOINED_BYTES", 0)
    monkeypatch.setattr(merge_module, "ROW_GROUP_BYTES", 100)
    tables = [piece_of(list(range(start, start + 10))) for start in range(0, 100, 10)]
    monkeypatch.setattr(merge_module, "HELD_BYTES", 3 * tables[-1].nbytes)
    reads = [0] * 10

    def read(number: int) -> pa.Table:
        reads[number] += 1
        return tables[number]

    merge = Merge([partial(read, number) for number in range(10)])
    assert pa.concat_tables(merge.row_groups(100))["row"].to_pylist() == list(range(100))
    assert reads == [1] * 3 + [2] * 7


def test_neighboring_row_groups_share_a_piece_that_is_held(monkeypatch):
    monkeypatch.setattr(merge_module, "ROW_GROUP_BYTES", 100)
    tables = [piece_of(list(range(start, start + 50))) for start in (0, 50)]
    merge = Merge([partial(given, table) for table in tables])
    monkeypatch.setattr(merge, "_pieces", [pytest.fail] * 2)
    assert len(list(merge.row_groups(100))) > 10


def test_the_first_piece_wins_unless_another_is_ok():
    tables = [
        piece_of([0, 1], pa.array(["first", "first"]), "undecodable"),
        piece_of([0, 1], pa.array(["second", "second"]), "undecodable"),
        piece_of([1], pa.array(["third"])),
    ]
    assert merged(tables)["kept"].to_pylist() == ["first", "third"]


def test_a_piece_that_is_gone_ends_the_merge_in_either_pass(monkeypatch):
    """Without the piece, another one's failed row would replace its ok one."""
    monkeypatch.setattr(merge_module, "HELD_BYTES", 0)
    with pytest.raises(PieceGone):
        Merge([lambda: piece_of([0]), lambda: None])
    answers = [piece_of([0]), None]
    merge = Merge([lambda: answers.pop(0)])
    assert merge.numbers.tolist() == [0]
    with pytest.raises(PieceGone):
        list(merge.row_groups(1))
    joined: list[list[pa.Table | None]] = [[piece_of([0]), piece_of([0])], [piece_of([1]), None]]
    merge = Merge([partial(tables.pop, 0) for tables in joined])
    with pytest.raises(PieceGone):
        list(merge.row_groups(2))


def test_the_first_of_several_rows_with_different_keys_is_named():
    other = piece_of([0, 1, 2]).set_column(0, "key", pa.array(["k0", "x1", "x2"]))
    merge = Merge([partial(given, table) for table in (piece_of([2, 1, 0]), other)])
    assert merge.first_conflict() == (1, "k1", "x1")


def test_small_fragments_are_held_as_few_tables(tmp_path, monkeypatch):
    """Each used to be a table in memory: 285,000 fragments of three rows would have needed five gigabytes."""
    held = []

    class Seen(Merge):
        def _hold(self, number, table):
            held.append(number)
            super()._hold(number, table)

    monkeypatch.setattr(commit_module, "Merge", Seen)
    monkeypatch.setattr(merge_module, "JOINED_PIECES", 8)
    folder = Folder(str(tmp_path))
    numbers = list(range(100))
    random.Random(0).shuffle(numbers)
    for number in numbers:
        write_fragment(folder, rows([number]))
    for start in range(100, 400, 30):
        write_fragment(folder, rows(range(start, start + 30)))
    write_fragment(folder, rows(range(0, 100, 7), status="failed"))
    report = ShardReport(shard="a/0.tar", num_rows=400, complete=True)
    summary = commit_shard(folder, report, {})
    assert summary is not None and summary.by_status == {"ok": 400}
    assert committed_rows(folder)["row"].to_pylist() == list(range(400))
    assert len(held) == len({*held}) == -(-111 // 8)


def test_a_shard_that_compresses_well_takes_little_memory(tmp_path):
    """40 fragments of 8 MiB in files of 1 kB used to be read as one table; at 2 GiB, commits would fail."""
    folder = Folder(str(tmp_path))
    for first in range(0, 320, 8):
        write_fragment(folder, piece_of([*range(first, first + 8)], pa.array([bytes(1 << 20)] * 8)))
    pool = pa.system_memory_pool()
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert commit_shard(folder, ShardReport(shard="s", num_rows=320, complete=True), {})
        peak = pool.max_memory()
    finally:
        pa.set_memory_pool(usual)
    assert peak < 280 << 20, peak
    assert pq.read_metadata(tmp_path / "s.parquet").num_rows == 320
