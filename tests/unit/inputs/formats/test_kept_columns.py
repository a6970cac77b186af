"""Kept columns have one type in all files of an output, whatever a single shard knows of them."""

from __future__ import annotations

from decimal import Decimal

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.formats import check_options
from pipeline.inputs.formats.tables.kept import common_type
from pipeline.inputs.reader import ReadOptions
from pipeline.ledger.run_record import read_run
from pipeline.schema import plain_type
from pipeline.storage.folder import Folder
from tests.unit.inputs.formats.reading_cases import encoded, not_utf8, shard_at, tar_bytes
from tests.unit.inputs.run_without_ray import run


def write_tables(root, *tables: dict) -> None:
    (root / "in").mkdir()
    for n, table in enumerate(tables):
        pq.write_table(pa.table({"image": pa.array([], pa.binary())} | table), root / "in" / f"{n}.parquet")


def output_schemas(root) -> list[pa.Schema]:
    return [pq.read_schema(path).remove_metadata() for path in sorted((root / "out").glob("*.parquet"))]


def of(label: list | pa.Array) -> dict:
    return {"image": [b"x"] * len(label), "label": label}


def test_an_empty_and_a_broken_first_table_have_the_columns_of_the_others(tmp_path):
    """Their kept columns used to have the type null, so pyarrow, datasets and DuckDB could not join them."""
    write_tables(tmp_path, {"label": pa.nulls(0)}, {}, of([{"a": 1}, None]))
    (tmp_path / "in" / "1.parquet").write_bytes(b"broken")
    assert run(tmp_path, reading=ReadOptions(keep=("label",))).num_rows == 2
    schemas = output_schemas(tmp_path)
    assert len(schemas) == 3 and schemas[0] == schemas[1] == schemas[2]
    assert schemas[0].field("label").type == pa.struct([("a", pa.int64())])

    out = f"{tmp_path}/out/*.parquet"
    label = [{"a": 1}, None]
    assert pq.read_table(tmp_path / "out")["label"].to_pylist() == label
    assert len(pd.read_parquet(tmp_path / "out")) == 2
    with duckdb.connect() as database:
        found = database.execute(f"select label from '{out}' order by row").fetchall()
    assert found == [({"a": 1},), (None,)]
    loaded = datasets.load_dataset("parquet", data_files=out, split="train", cache_dir=str(tmp_path / "c"))
    assert loaded["row"][:] == [0, 1]


def test_a_table_that_lacks_a_kept_column_has_nulls_and_a_note(tmp_path):
    """All its rows used to be lost, and the shard became partial."""
    write_tables(tmp_path, of(["one"]), {"image": [b"x", b"y"]})
    done = run(tmp_path, reading=ReadOptions(keep=("mine=label",)))
    assert (done.num_ok, done.partial) == (3, [])
    assert pq.read_table(tmp_path / "out" / "1.parquet.parquet")["mine"].to_pylist() == [None, None]
    (note,) = [line for line in done.lines() if line.startswith("note: ")]
    assert note == "note: 1.parquet: 'label' is no column of the file, so it is null in the output"


def test_numbers_of_several_sizes_have_the_largest(tmp_path):
    columns = [pa.array([7], type) for type in (pa.int8(), pa.int64(), pa.int32())]
    write_tables(tmp_path, *map(of, columns))
    run(tmp_path, reading=ReadOptions(keep=("label",)))
    assert {schema.field("label").type for schema in output_schemas(tmp_path)} == {pa.int64()}
    stored = read_run(Folder(str(tmp_path / "out")))
    assert stored is not None and stored.kept == pa.schema([("label", pa.int64())])


def test_types_that_nothing_joins_are_refused_by_both_files(tmp_path):
    write_tables(tmp_path, of([1]), of(["one"]))
    message = r"keep .* got 'label' of type int64 in .*/0.parquet and string in .*/1.parquet; write it"
    with pytest.raises(InputError, match=message):
        run(tmp_path, reading=ReadOptions(keep=("label",)))


@pytest.mark.parametrize("is_dictionary", [False, True])
@pytest.mark.parametrize("first", [pa.int64(), pa.int8()])
def test_signed_integers_and_uint64_are_refused(tmp_path, first, is_dictionary):
    """They used to become int64, and the upper half of uint64 became negative."""
    second = pa.array([2**63 + 5], pa.uint64())
    second = second.dictionary_encode() if is_dictionary else second
    write_tables(tmp_path, of(pa.array([1], first)), of(second))
    message = (
        r"got 'label' of type int\d+ in .*/0.parquet and .*uint64.* in .*/1.parquet; write it with one type"
    )
    with pytest.raises(InputError, match=message):
        run(tmp_path, reading=ReadOptions(keep=("label",)))


def test_a_pair_that_arrow_joins_and_cannot_cast_is_refused(tmp_path):
    decimals = pa.array([Decimal("1.50")], pa.decimal128(10, 2))
    write_tables(tmp_path, of(decimals), of([1]))
    with pytest.raises(InputError, match=r"got 'label' of type decimal128.* and int64 in "):
        run(tmp_path, reading=ReadOptions(keep=("label",)))


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value]], ids=["plain", "list"])
def test_a_value_that_the_common_type_does_not_hold_is_null_and_noted(tmp_path, wrap):
    """2 ** 53 + 1 used to become 2 ** 53 silently."""
    integers, floats = [7, 2**53 + 1, None, -(2**53)], [1.5, None]
    columns = [[value and wrap(value) for value in values] for values in (integers, floats)]
    write_tables(tmp_path, *map(of, columns))
    done = run(tmp_path, reading=ReadOptions(keep=("label",)))
    expected = [wrap(7.0), None, None, wrap(-(2.0**53)), wrap(1.5), None]
    assert pq.read_table(tmp_path / "out")["label"].to_pylist() == expected
    (note,) = [line for line in done.lines() if line.startswith("note: ")]
    assert "values of the column 'label' are null, because it has the type" in note and "0.parquet" in note


def test_a_table_that_was_not_looked_at_and_does_not_fit_has_nulls_and_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.inputs.formats.MAX_CHECKED_TABLES", 1)
    write_tables(tmp_path, of([1]), of(["one"]))
    done = run(tmp_path, reading=ReadOptions(keep=("label",)))
    assert done.num_ok == 2
    assert pq.read_table(tmp_path / "out")["label"].to_pylist() == [1, None]
    assert "has the type string, and the output int64" in done.lines()[-1]


def test_tables_are_looked_at_until_the_type_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.inputs.formats.MAX_CHECKED_TABLES", 1)
    write_tables(tmp_path, of(pa.nulls(1)), {"image": [b"x"]}, of(["one"]))
    shards = [shard_at(path, "parquet") for path in sorted((tmp_path / "in").iterdir())]
    assert check_options(shards, ReadOptions(keep=("label",))) == pa.schema([("label", pa.string())])


def test_tars_and_tables_have_one_type(tmp_path):
    write_tables(tmp_path, {"image": [b"x"], "txt": pa.array(["of a table"], pa.string_view())})
    (tmp_path / "in" / "1.tar").write_bytes(tar_bytes([("a.png", encoded("PNG")), ("a.txt", b"of a tar")]))
    run(
        tmp_path,
        input=(f"{tmp_path}/in/*.parquet", f"{tmp_path}/in/*.tar"),
        reading=ReadOptions(keep=("txt",)),
    )
    assert pq.read_table(tmp_path / "out")["txt"].to_pylist() == ["of a table", "of a tar"]


def test_a_tensor_is_kept_as_its_list(tmp_path):
    """Arrow cannot make one of Python values: the shard used to be captioned, but could not be committed."""
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8, dtype=np.int8).reshape(2, 2, 2))
    write_tables(tmp_path, {"image": [b"x", b"x"], "label": tensors}, {"image": [b"x"]})
    assert run(tmp_path, reading=ReadOptions(keep=("label",))).num_ok == 3
    assert pq.read_table(tmp_path / "out")["label"].to_pylist() == [[0, 1, 2, 3], [4, 5, 6, 7], None]


@pytest.mark.parametrize(
    ("type", "plain"),
    [
        (pa.string_view(), pa.string()),
        (pa.list_(pa.binary_view()), pa.list_(pa.binary())),
        (pa.large_list_view(pa.int8()), pa.large_list(pa.int8())),
        (pa.map_(pa.string(), pa.list_view(pa.int8())), pa.map_(pa.string(), pa.list_(pa.int8()))),
        (pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]), pa.struct([("a", pa.string())])),
        (pa.list_(pa.string_view(), 2), pa.list_(pa.string())),
        (pa.uuid(), pa.uuid()),
        (pa.fixed_shape_tensor(pa.int8(), [2, 2]), pa.list_(pa.int8())),
        (pa.list_(pa.fixed_shape_tensor(pa.int8(), [2])), pa.list_(pa.list_(pa.int8()))),
    ],
)
def test_types_become_plain_on_every_level(type, plain):
    assert plain_type(type) == common_type(pa.null(), type) == plain
    assert pa.nulls(2, type).cast(plain).type == plain


def test_kept_texts_that_are_not_utf8_leave_the_output_readable(tmp_path):
    """`show`, `export` and `report` used to be unable to read an output with such a text."""
    note = not_utf8(b"a", b"\xffb", None)
    lists = pa.ListArray.from_arrays([0, 1, 3, 3], not_utf8(b"c", b"d", b"\xff"))
    write_tables(tmp_path, {"image": [b"x"] * 3, "note": note, "lists": lists})
    done = run(tmp_path, reading=ReadOptions(keep=("note", "lists")))
    rows = pq.read_table(tmp_path / "out")
    assert rows["note"].to_pylist() == ["a", r"\xffb", None]
    assert rows["lists"].to_pylist() == [["c"], None, []]
    (line,) = [each for each in done.lines() if each.startswith("note: ")]
    assert "'note' are written with escapes" in line and "'lists' are null" in line
