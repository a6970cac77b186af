"""Cells with lists of images and with base64: each image is a row, and a bad one costs only its row."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.formats import check_options, count_rows
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ADDRESS, ReadOptions
from pipeline.inputs.shards import Shard
from tests.unit.inputs.formats.reading_cases import encoded, read_rows, shard_at

LISTS = [[b"a", b"b"], [], None, [b"c", None, b""], [b"d"]]
"""Eight rows: an empty list is one."""


def table(
    folder: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None, **options: Any
) -> Shard:
    made = pa.table(columns)
    if metadata is not None:
        made = made.replace_schema_metadata(metadata)
    pq.write_table(made, folder / "0.parquet", **options)
    return shard_at(folder / "0.parquet", "parquet")


@pytest.mark.parametrize(
    "type",
    [
        pa.list_(pa.binary()),
        pa.large_list(pa.large_binary()),
        pa.list_(pa.binary_view()),
        pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ],
    ids=str,
)
def test_each_element_of_a_list_is_a_row(tmp_path: Path, type: pa.DataType) -> None:
    cells: Any = LISTS
    if pa.types.is_struct(type.value_type):
        cells = [cell and [{"bytes": image, "path": None} for image in cell] for cell in LISTS]
    shard = table(tmp_path, {"images": pa.array(cells, type), "n": range(5)}, row_group_size=2)
    check_options([shard], ReadOptions())
    rows, report = read_rows(shard, keep=("n",))
    assert (report.num_rows, report.complete, count_rows(shard, 100, ReadOptions())) == (8, True, 8)
    assert [row["image"] for row in rows] == [b"a", b"b", None, None, b"c", None, None, b"d"]
    assert [row["key"] for row in rows] == ["0", "0", "1", "2", "3", "3", "3", "4"]
    assert [row["n"] for row in rows] == [0, 0, 1, 2, 3, 3, 3, 4]
    assert [row["row"] for row in rows] == list(range(8))
    members = ["images[0]", "images[1]", None, None, "images[0]", "images[1]", "images[2]", "images[0]"]
    assert [row["member"] for row in rows] == members
    failed = [None, None, "missing_image", "missing_image", None, "missing_image", "missing_image", None]
    assert [row["status"] for row in rows] == failed
    assert read_rows(shard, missing=((1, 3), (6, None)), keep=("n",))[0] == rows[1:3] + rows[6:]
    assert read_rows(shard, table_rows=1, keep=("n",))[0] == rows


@pytest.mark.parametrize("type", [pa.string_view(), pa.list_(pa.struct([("a", pa.binary_view())]))], ids=str)
def test_columns_of_views_stand_next_to_lists(tmp_path: Path, type: pa.DataType) -> None:
    """Arrow 26 takes no rows of views, so all rows of such a table used to be unreadable."""
    value = "a" if pa.types.is_string_view(type) else [{"a": b"x"}]
    columns = {"images": pa.array([[b"a", b"b"]], pa.list_(pa.binary())), "n": pa.array([value], type)}
    rows, _ = read_rows(table(tmp_path, columns), keep=("n",))
    assert [(row["image"], row["n"]) for row in rows] == [(b"a", value), (b"b", value)]


def test_lists_are_divided_by_row_groups_and_limited_by_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inputs.listing.RANGE_BYTES", 1)
    shard = table(
        tmp_path, {"images": pa.array(LISTS, pa.list_(pa.binary())), "key": list("vwxyz")}, row_group_size=2
    )
    parts = list_shards(str(tmp_path / shard.name))
    assert [(part.name, part.num_rows) for part in parts] == [
        ("0.parquet~0-2", 3),
        ("0.parquet~3-6", 4),
        ("0.parquet~7-7", 1),
    ]
    rows = [row for part in parts for row in read_rows(part)[0]]
    assert [row["key"] for row in rows] == ["v", "v", "w", "x", "y", "y", "y", "z"]
    limited = list_shards(str(tmp_path / shard.name), limit=5)
    assert sum(len(read_rows(part)[0]) for part in limited) == 5


@pytest.mark.parametrize(
    "count",
    [pa.array(range(5)), pa.array([{"a": [1], "b": {"c": 2}}] * 5), pa.array([[]] * 5, pa.list_(pa.int8()))],
)
def test_lists_are_counted_next_to_a_column_whose_name_begins_like_theirs(
    tmp_path: Path, count: pa.Array
) -> None:
    """The elements of `images.n` used to be counted for `images`, and the other images were lost."""
    cells = pa.array(LISTS, pa.list_(pa.binary()))
    shard = table(tmp_path, {"images.n": count, "images": cells}, row_group_size=2)
    rows, report = read_rows(shard, image_column="images")
    assert (report.num_rows, report.complete) == (8, True)
    assert [row["image"] for row in rows] == [b"a", b"b", None, None, b"c", None, None, b"d"]


def test_a_list_is_taken_if_it_is_declared_or_the_only_choice(tmp_path: Path) -> None:
    lists = pa.array([[b"x"]], pa.list_(pa.binary()))
    both = table(tmp_path, {"image": [b"y"], "images": lists})
    assert [row["image"] for row in read_rows(both)[0]] == [b"y"]
    assert [row["image"] for row in read_rows(both, image_column="images")[0]] == [b"x"]
    features = {"info": {"features": {"images": [{"_type": "Image"}], "image": {"_type": "Value"}}}}
    declared = table(
        tmp_path, {"image": [b"y"], "images": lists}, {b"huggingface": json.dumps(features).encode()}
    )
    assert [row["image"] for row in read_rows(declared)[0]] == [b"x"]


def test_a_list_of_urls_is_fetched(tmp_path: Path) -> None:
    rows, _ = read_rows(
        table(tmp_path, {"urls": [["http://a/0", "1.jpg"], [None]]}), image_column="urls", fetch=True
    )
    assert [row[ADDRESS] for row in rows] == ["http://a/0", f"{tmp_path}/1.jpg", None]
    assert [row["status"] for row in rows] == [None, None, "missing_image"]


def test_a_run_of_the_first_version_of_the_contract_has_no_lists(tmp_path: Path) -> None:
    """Its rows have no `member`, which would distinguish the images of a list."""
    shard = table(tmp_path, {"images": pa.array(LISTS, pa.list_(pa.binary()))})
    with pytest.raises(InputError, match="no column of image bytes"):
        check_options([shard], ReadOptions(schema_version=1))


PICTURES = [encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
WRITTEN = [base64.b64encode(picture).decode() for picture in PICTURES]
VARIANTS = [
    f"data:image/png;base64,{WRITTEN[0]}",
    "\n".join(WRITTEN[0][start : start + 64] for start in range(0, len(WRITTEN[0]), 64)),
    base64.urlsafe_b64encode(PICTURES[0]).decode().rstrip("="),
]
"""The same image as a data URI, with line breaks, and with the letters of URLs."""


@pytest.mark.parametrize("encode", [str, str.encode], ids=["text", "bytes"])
def test_base64_is_found(tmp_path: Path, encode: Any) -> None:
    cells = [encode(text) for text in [*WRITTEN, *VARIANTS]]
    shard = table(tmp_path, {"image": cells})
    check_options([shard], ReadOptions())
    rows, _ = read_rows(shard)
    assert [row["image"] for row in rows] == [*PICTURES, *[PICTURES[0]] * 3]


def test_cells_of_bytes_may_be_mixed_and_cells_that_are_no_base64_fail_alone(tmp_path: Path) -> None:
    rows, _ = read_rows(table(tmp_path, {"image": [PICTURES[0], WRITTEN[1].encode(), b"AAAA", None]}))
    assert [row["image"] for row in rows] == [PICTURES[0], PICTURES[1], b"AAAA", None]
    rows, _ = read_rows(table(tmp_path, {"image": [WRITTEN[0], "a.jpg", "", None]}))
    assert [row["status"] for row in rows] == [None, "undecodable", "missing_image", "missing_image"]
    assert "neither base64 nor a data URI" in rows[1]["error"]


def test_base64_of_another_format_is_decoded_if_the_user_says_so(tmp_path: Path) -> None:
    shard = table(tmp_path, {"image": [base64.b64encode(b"a rare format")]})
    assert read_rows(shard)[0][0]["image"] == base64.b64encode(b"a rare format")
    assert read_rows(shard, image_encoding="base64")[0][0]["image"] == b"a rare format"
    text = table(tmp_path, {"image": [base64.b64encode(b"a rare format").decode()]})
    with pytest.raises(InputError, match="--image-encoding base64 if it is base64"):
        check_options([text], ReadOptions())
    check_options([text], ReadOptions(image_encoding="base64"))
    with pytest.raises(InputError, match="--image-encoding base64 needs Parquet tables"):
        folder = Shard(name="f", format="folder", root=str(tmp_path), files=("a.jpg",))
        check_options([folder], ReadOptions(image_encoding="base64"))


def test_the_limit_of_an_image_holds_for_what_is_decoded(tmp_path: Path) -> None:
    shard = table(tmp_path, {"image": [base64.b64encode(PICTURES[0]).decode(), "A" * 10_000]})
    rows, _ = read_rows(shard, max_image_bytes=len(PICTURES[0]))
    assert [row["status"] for row in rows] == [None, "too_large"]
    rows, _ = read_rows(shard, max_image_bytes=len(PICTURES[0]) - 1)
    assert [row["status"] for row in rows] == ["too_large", "too_large"]


def test_two_columns_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    """The job used to end with a KeyError."""
    made = pa.Table.from_arrays(
        [pa.array([b"x"]), pa.array([b"y"]), pa.array(["z"])], ["image", "image", "n"]
    )
    pq.write_table(made, tmp_path / "0.parquet")
    shard = shard_at(tmp_path / "0.parquet", "parquet")
    variants: list[dict[str, Any]] = [{}, {"image_column": "image"}]
    for options in variants:
        with pytest.raises(
            InputError, match="image_column must be one column, got 'image', the name of several"
        ):
            check_options([shard], ReadOptions(**options))
        rows, report = read_rows(shard, **options)
        assert (rows, report.complete) == ([], False) and "the name of several" in str(report.reason)


@pytest.mark.parametrize(
    "metadata", [b"{", b"\xff", b"[]", b'{"info": 1}', b'{"info": {"features": []}}', b'{"info": null}']
)
def test_damaged_metadata_of_the_datasets_library_is_left_out(tmp_path: Path, metadata: bytes) -> None:
    """The job used to end with a JSONDecodeError."""
    shard = table(tmp_path, {"image": [b"x"]}, {b"huggingface": metadata})
    check_options([shard], ReadOptions())
    rows, report = read_rows(shard)
    assert (rows[0]["image"], report.complete) == (b"x", True)
