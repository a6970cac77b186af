"""Reading Parquet tables: which column is the image, ranges of row groups, and what damage may cost."""

from __future__ import annotations

from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.inputs.formats import check_options
from pipeline.inputs.formats.tables import parquet
from pipeline.inputs.formats.tables.columns import Columns
from pipeline.inputs.formats.tables.parquet_rows import ParquetRows
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions
from tests.unit.inputs.formats.reading_cases import not_utf8, read_rows, read_tables, shard_at


def write(tmp_path, table: pa.Table | dict, **more):
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table(table), path, **more)
    return shard_at(path, "parquet", size_bytes=path.stat().st_size)


def numbered(num_rows: int, size: int = 1) -> dict:
    return {
        "id": list(range(100, 100 + num_rows)),
        "image": [b"%04d" % at * size for at in range(num_rows)],
        "text": [f"text {at}" for at in range(num_rows)],
    }


def test_reads_what_the_datasets_library_writes(tmp_path):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"photo": [picture, None, picture], "label": [0, 1, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "0.parquet")
    shard = shard_at(tmp_path / "0.parquet", "parquet")
    rows, report = read_rows(shard, keep=("label",))
    assert (report.num_rows, report.complete) == (3, True)
    assert rows[0]["image"].startswith(b"\x89PNG")
    assert [(row["key"], row["row"], row["status"], row["label"]) for row in rows] == [
        ("0", 0, None, 0),
        ("1", 1, "missing_image", 1),
        ("2", 2, None, 1),
    ]
    assert rows[1]["error"] == "the cell is null"


def test_a_struct_with_only_a_path_is_a_missing_image_and_the_error_says_what_to_do(tmp_path):
    type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [
        {"bytes": b"x", "path": "0.jpg"},
        {"bytes": None, "path": "1.jpg"},
        None,
        {"bytes": b"", "path": None},
    ]
    rows, _ = read_rows(write(tmp_path, {"image": pa.array(cells, type)}))
    assert [(row["image"], row["status"]) for row in rows] == [(b"x", None)] + [(None, "missing_image")] * 3
    assert rows[1]["error"] == (
        "the cell has no bytes, only the path '1.jpg'; embed the images, or use --fetch"
    )
    assert [row["error"] for row in rows[2:]] == ["the cell is null", "the cell is empty"]


def test_a_cell_that_is_too_large_costs_only_its_row(tmp_path):
    rows, _ = read_rows(write(tmp_path, {"image": [b"x" * 10, b"x" * 11]}), max_image_bytes=10)
    assert [(row["image"], row["status"]) for row in rows] == [(b"x" * 10, None), (None, "too_large")]


@pytest.mark.parametrize(
    "type", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_every_arrow_type_of_bytes_is_an_image(tmp_path, type):
    column = pa.array([b"a", None, b"b"])
    column = column.dictionary_encode() if pa.types.is_dictionary(type) else column.cast(type)
    rows, _ = read_rows(write(tmp_path, {"id": [1, 2, 3], "photo": column}))
    assert [row["image"] for row in rows] == [b"a", None, b"b"]


def test_key_prompt_and_kept_columns(tmp_path):
    table = numbered(4) | {"key": ["k0", None, "k2", "k3"], "nested": [[1], [2, 3], [], None]}
    shard = write(tmp_path, table)
    tables, _ = read_tables(shard, prompt_column="text", keep=("nested", "key_was=key"))
    assert tables[0]["key"].to_pylist() == ["k0", "1", "k2", "k3"]
    assert tables[0]["prompt"].to_pylist() == table["text"]
    assert tables[0]["nested"].to_pylist() == table["nested"]
    assert tables[0].column_names[6:] == ["member", "prompt", "nested", "key_was"]
    rows, _ = read_rows(shard, key_column="id")
    assert [row["key"] for row in rows] == ["100", "101", "102", "103"]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_text_that_is_not_utf8_costs_its_own_row(tmp_path, type):
    """As a prompt or a text to score, it used to end the job; as a key, it made the output unreadable."""
    texts = not_utf8(b"a", None, b"\xffb", "ü".encode(), b"c\xfe")
    texts = texts.dictionary_encode() if pa.types.is_dictionary(type) else texts.cast(type)
    shard = write(tmp_path, {"image": [b"0", b"1", b"2", b"3", None], "n": texts})
    tables, report = read_tables(shard, key_column="n", table_rows=4)
    assert report.complete and all(table.validate(full=True) is None for table in tables)
    assert [key for table in tables for key in table["key"].to_pylist()] == [
        "a",
        "1",
        r"\xffb",
        "ü",
        r"c\xfe",
    ]
    for options in ({"prompt_column": "n"}, {"text_columns": ("n",)}):
        tables, report = read_tables(shard, **options)
        assert report.complete and all(table.validate(full=True) is None for table in tables)
        rows = pa.concat_tables(tables).to_pylist()
        assert [row["status"] for row in rows] == [None, None, "refused", None, "missing_image"]
        assert [row["image"] for row in rows] == [b"0", b"1", None, b"3", None]
        assert rows[2]["error"] == (
            r"the text in 'n' must be UTF-8, got \xffb; write the table again with texts in UTF-8"
        )
        assert rows[4]["error"] == "the cell is null"


def test_the_name_of_a_column_that_is_not_utf8_is_damage(tmp_path):
    shard = write(tmp_path, {"image": [b"x"], "zzzz": [1]}, store_schema=False)
    path = tmp_path / "0.parquet"
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zz\xff\xfe"))
    with pytest.raises(InputError, match=r"cannot be opened as a Parquet table .*can't decode byte 0xff"):
        check_options([shard], ReadOptions())
    assert not read_rows(shard)[1].complete


def test_a_table_that_cannot_be_opened_is_refused_by_its_name(tmp_path):
    """The message used to say that magic bytes were missing, but not in which file."""
    path = tmp_path / "0.parquet"
    path.write_bytes(b"no table")
    with pytest.raises(InputError, match=rf"^{path} cannot be opened as a Parquet table .*; repair the file"):
        check_options([shard_at(path, "parquet")], ReadOptions())


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": [b"x"], "b": [b"y"]}, {}, "could hold the image: a, b; choose one with --image-column"),
        ({"url": ["u"], "sha256": ["s"]}, {}, r"image bytes, only url \(string\), sha256 \(string\)"),
        ({"image": [1.5]}, {}, r"no column of image bytes, only image \(double\); if"),
        (
            {"image": [b"x"]},
            {"image_column": "img"},
            "image_column must be one of the columns image, got",
        ),
        ({"image": [1]}, {"image_column": "image"}, "image_column must hold bytes"),
        ({"image": [b"x"], "n": [1.5]}, {"key_column": "n"}, "key_column must hold text or integers"),
        ({"image": [b"x"], "n": [1]}, {"prompt_column": "n"}, "prompt_column must hold text"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_reading(tmp_path, columns, options, message):
    shard = write(tmp_path, columns)
    with pytest.raises(InputError, match=message.replace("'", ".")):
        check_options([shard], ReadOptions(**options))
    rows, report = read_rows(shard, **options)
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    assert report.reason is not None and report.reason.startswith(shard.uri)


def test_a_kept_column_that_no_table_has_is_refused(tmp_path):
    shard = write(tmp_path, {"image": [b"x"]})
    with pytest.raises(InputError, match=r"keep must be one of the columns image, got 'label'"):
        check_options([shard], ReadOptions(keep=("label",)))


def test_a_usual_name_decides_between_columns_of_bytes(tmp_path):
    rows, _ = read_rows(write(tmp_path, {"digest": [b"d"], "JPG": [b"x"]}))
    assert rows[0]["image"] == b"x"


def test_ranges_of_row_groups_cover_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.inputs.listing.RANGE_BYTES", 12_000)
    table = numbered(95, size=100)
    write(tmp_path, table, row_group_size=10)
    shards = list_shards(str(tmp_path))
    assert [shard.name for shard in shards] == [
        "0.parquet~00-19",
        "0.parquet~20-39",
        "0.parquet~40-59",
        "0.parquet~60-79",
        "0.parquet~80-94",
    ]
    assert [shard.num_rows for shard in shards] == [20, 20, 20, 20, 15]
    rows = [row for shard in shards for row in read_rows(shard)[0]]
    assert [row["image"] for row in rows] == table["image"]
    assert [row["key"] for row in rows] == [str(at) for at in range(95)], "keys number the rows of the file"
    assert [row["row"] for row in rows] == [at % 20 for at in range(95)], "rows number those of the shard"


def test_only_missing_rows_are_read_and_all_are_counted(tmp_path):
    shard = write(tmp_path, numbered(50), row_group_size=7)
    whole, _ = read_rows(shard)
    assert len(whole) == 50
    for missing in ((), ((0, 1),), ((6, 8), (20, 30), (49, None)), ((60, None),)):
        rows, report = read_rows(shard, missing=missing, table_rows=4)
        wanted = [at for at in range(50) if any(low <= at < (high or 99) for low, high in missing)]
        assert rows == [whole[at] for at in wanted]
        assert (report.num_rows, report.complete) == (50, True)


def test_row_groups_without_missing_rows_are_not_read(tmp_path):
    shard = write(tmp_path, numbered(30), row_group_size=10, compression="snappy")
    damage(tmp_path / "0.parquet", group=0)
    rows, report = read_rows(shard, missing=((10, 30),))
    assert len(rows) == 20 and report.complete


def test_a_limit_caps_rows_and_is_not_partial(tmp_path):
    shard = write(tmp_path, numbered(30), row_group_size=10)
    (capped,) = list_shards(str(tmp_path), limit=13)
    rows, report = read_rows(capped)
    assert rows == read_rows(shard)[0][:13]
    assert (capped.num_rows, report.num_rows, report.complete) == (13, 13, True)


def damage(path, group: int) -> None:
    """Overwrite the image pages of a row group."""
    metadata = pq.read_metadata(path)
    names = [metadata.schema.column(at).path for at in range(metadata.num_columns)]
    chunk = metadata.row_group(group).column(names.index("image"))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    shard = write(tmp_path, numbered(30), row_group_size=10)
    whole, _ = read_rows(shard, keep=("text",))
    damage(tmp_path / "0.parquet", group=1)
    tables, report = read_tables(shard, keep=("text",))
    rows = pa.concat_tables(tables).to_pylist()  # fails if the schemas differ
    assert rows[:10] == whole[:10] and rows[20:] == whole[20:]
    assert [row["row"] for row in rows] == list(range(30))
    assert {(row["image"], row["status"]) for row in rows[10:20]} == {(None, "unreadable")}
    assert all("row group 1" in row["error"] for row in rows[10:20])
    assert report.num_rows == 30 and not report.complete
    assert report.reason is not None and "row group 1" in report.reason


def test_a_range_that_a_table_does_not_have_any_more_is_a_partial_shard(tmp_path):
    """Runs of 0.1.0 and web servers have no stamps, so only reading notices it, which used to end the job."""
    shard = write(tmp_path, numbered(30), row_group_size=10)
    rows, report = read_rows(replace(shard, row_groups=(2, 4)))
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    assert "it has 3 row groups, fewer than" in str(report.reason)


@pytest.mark.parametrize("keep_bytes", [0, 3, 200, -5])
def test_a_table_that_is_cut_short_is_a_partial_shard(tmp_path, monkeypatch, keep_bytes):
    monkeypatch.setattr("pipeline.inputs.listing.RANGE_BYTES", 1)
    shard = write(tmp_path, numbered(30))
    path = tmp_path / "0.parquet"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    rows, report = read_rows(shard)
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    assert [s.name for s in list_shards(str(tmp_path))] == ["0.parquet"]


def test_tables_are_small_and_the_same_every_time(tmp_path):
    shard = write(tmp_path, numbered(100, size=250), compression="none")
    tables, _ = read_tables(shard, table_rows=30)
    assert [len(table) for table in tables] == [30, 30, 30, 10]
    tables, _ = read_tables(shard, table_bytes=10_000)
    assert max(len(table) for table in tables) <= 10
    assert tables == read_tables(shard, table_bytes=10_000)[0]
    assert {table.schema.field("image").type for table in tables} == {pa.binary()}


@pytest.mark.parametrize("column", ["image", "a.b.image", "image.", "struct"])
def test_batches_are_small_whatever_the_name_of_the_column(tmp_path, column):
    """A name with a dot was not found in the footer, so a batch had 512 rows of any size."""
    images = pa.array([b"x" * 1000] * 100)
    cells = pa.StructArray.from_arrays([images], ["bytes"]) if column == "struct" else images
    table = {column: cells, "image_of_another": images}
    shard = write(tmp_path, table, compression="none", use_dictionary=False)
    options = ReadOptions(image_column=column, table_bytes=10_000)
    rows = ParquetRows("s", 0, Columns.find(parquet.schema_of(shard), options), options)
    assert rows.batch_rows(pq.read_metadata(tmp_path / "0.parquet"), 0) == 9
    assert len(read_rows(shard, image_column=column)[0]) == 100


def test_rows_that_are_larger_than_the_average_fill_tables_of_their_own(tmp_path):
    images = [b"x"] * 500 + [b"y" * 10_000] * 5
    shard = write(tmp_path, {"image": images}, compression="none", use_dictionary=False)
    tables, _ = read_tables(shard, table_bytes=20_000)
    assert [row for table in tables for row in table["image"].to_pylist()] == images
    assert max(table["image"].nbytes for table in tables) < 22_500


def test_an_empty_table_is_complete(tmp_path):
    rows, report = read_rows(write(tmp_path, {"image": pa.array([], pa.binary())}))
    assert (rows, report.num_rows, report.complete) == ([], 0, True)
    assert parquet.count_rows(shard_at(tmp_path / "0.parquet", "parquet"), ReadOptions()) == 0


@pytest.mark.parametrize("images", [[b"a", None, b"b"], [[b"a"], [None, b"b"], []]], ids=["bytes", "lists"])
def test_a_damaged_description_of_a_column_does_not_end_the_process(tmp_path, images):
    """Without its mark for nulls, a column has fewer levels than its statistics say, which Arrow refuses."""
    shard = write(tmp_path, {"image": images})
    content = (tmp_path / "0.parquet").read_bytes()
    damaged = content.replace(b"\x02\x18\x05image", b"\0\x18\x05image")
    assert damaged != content
    (tmp_path / "0.parquet").write_bytes(damaged)
    rows, report = read_rows(shard)
    assert not report.complete and "size mismatch" in str(report.reason)
    assert [row["status"] for row in rows] == ["unreadable"] * report.num_rows
    assert parquet.count_rows(shard, ReadOptions()) == report.num_rows


@pytest.mark.parametrize("sizes", [[5], [63], [-3], [9, -3]])
def test_row_groups_that_do_not_make_up_the_file_are_no_rows(tmp_path, sizes):
    group_rows = 6 // len(sizes)
    shard = write(tmp_path, {"image": [b"x" * 50] * 6}, compression="none", row_group_size=group_rows)
    content = bytearray((tmp_path / "0.parquet").read_bytes())
    footer = content.index(b"schema")
    numbers = [
        at for at in range(footer, len(content)) if content[at : at + 2] == bytes([0x16, 2 * group_rows])
    ]
    # Each row group has the number twice: for the values of its column, and for its rows.
    for at, size in zip(numbers[::-2], sizes, strict=False):
        content[at + 1] = 2 * size if size >= 0 else -2 * size - 1
    (tmp_path / "0.parquet").write_bytes(content)
    metadata = pq.read_metadata(tmp_path / "0.parquet")
    assert sorted(metadata.row_group(n).num_rows for n in range(len(sizes))) == sorted(sizes)
    rows, report = read_rows(shard)
    assert not rows and report.num_rows == 0 and "the footer is damaged" in str(report.reason)
