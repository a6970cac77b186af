"""Tables and tars that name images by address: what is read, and what is refused before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.formats import check_options
from pipeline.inputs.formats.addresses import folder_of, is_web, refusal, resolve, scheme_of
from pipeline.inputs.reader import ADDRESS, ReadOptions
from pipeline.inputs.shards import Shard
from tests.unit.inputs.formats.reading_cases import not_utf8, read_rows, shard_at, tar_shard_of

URL = "https://example.com/a.jpg?w=1"


def table(folder: Path, **columns: Any) -> Shard:
    pq.write_table(pa.table(columns), folder / "0.parquet")
    return shard_at(folder / "0.parquet", "parquet")


def test_a_column_of_urls_gives_rows_with_addresses(tmp_path: Path) -> None:
    shard = table(tmp_path, url=[URL, "b.jpg", None, " "], caption=["x", "y", "z", "w"])
    for image_column in ("url", None):
        options: dict[str, Any] = {"image_column": image_column, "fetch": True}
        check_options([shard], ReadOptions(**options))
        rows, report = read_rows(shard, **options)
        assert [row[ADDRESS] for row in rows] == [URL, f"{tmp_path}/b.jpg", None, None]
        assert [row["status"] for row in rows] == [None, None, "missing_image", "missing_image"]
        assert [row["image"] for row in rows] == [None] * 4
        assert (report.num_rows, report.complete) == (4, True)


@pytest.mark.parametrize("type", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_text_of_every_type_is_read(tmp_path: Path, type: pa.DataType) -> None:
    rows, _ = read_rows(table(tmp_path, url=pa.array([URL], type)), fetch=True)
    assert rows[0][ADDRESS] == URL


@pytest.mark.parametrize("in_struct", [False, True])
def test_an_address_that_is_not_utf8_costs_its_own_row(tmp_path: Path, in_struct: bool) -> None:
    cells = not_utf8(b"https://u:secret@example.com/\xff.jpg", b"b.jpg")
    if in_struct:
        cells = pa.StructArray.from_arrays([pa.nulls(2, pa.binary()), cells], ["bytes", "path"])
    shard = table(tmp_path, image=cells)
    rows, report = read_rows(shard, fetch=True)
    assert [(row["status"], row[ADDRESS]) for row in rows] == [("refused", None), (None, f"{tmp_path}/b.jpg")]
    assert r"must be UTF-8, got https://example.com/\xff.jpg; write" in rows[0]["error"] and report.complete
    if in_struct:
        assert [row["status"] for row in read_rows(shard)[0]] == ["missing_image"] * 2


def test_a_struct_with_bytes_needs_no_address(tmp_path: Path) -> None:
    cells = [{"bytes": b"x", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    cells.append({"bytes": b"", "path": "c.jpg"})
    rows, _ = read_rows(table(tmp_path, image=cells), fetch=True)
    assert [(row["image"], row[ADDRESS]) for row in rows] == [
        (b"x", None),
        (None, f"{tmp_path}/b.jpg"),
        (None, None),
        (None, f"{tmp_path}/c.jpg"),
    ]


def test_a_member_of_a_tar_may_hold_the_address(tmp_path: Path) -> None:
    shard = tar_shard_of(tmp_path, ("1.url", f"{URL}\n".encode()), ("1.txt", b"a"), ("2.url", b"\xffa.jpg"))
    options: dict[str, Any] = {"image_column": "url", "fetch": True}
    check_options([shard], ReadOptions(**options))
    rows, _ = read_rows(shard, **options)
    assert [(row["key"], row[ADDRESS]) for row in rows] == [("1", URL), ("2", f"{tmp_path}/\ufffda.jpg")]
    with pytest.raises(InputError, match="--fetch needs --image-column with tars"):
        check_options([shard], ReadOptions(fetch=True))


def test_what_cannot_hold_addresses_is_refused(tmp_path: Path) -> None:
    shard = table(tmp_path, url=[URL], image=[b"x"], n=[1], a=["x"])
    with pytest.raises(InputError, match="image_column must hold text, or a struct with a path"):
        check_options([shard], ReadOptions(image_column="image", fetch=True))
    with pytest.raises(InputError, match="no column of text, which could hold addresses, only n"):
        check_options([table(tmp_path, n=[1])], ReadOptions(fetch=True))
    with pytest.raises(
        InputError, match=r"none of the columns a has a usual name .*; choose one with --image-c"
    ):
        check_options([table(tmp_path, a=["x"])], ReadOptions(fetch=True))
    folder = Shard(name="f", format="folder", root=str(tmp_path), files=("a.jpg",))
    with pytest.raises(InputError, match="--fetch has no meaning for folders of files"):
        check_options([folder], ReadOptions(fetch=True))


@pytest.mark.parametrize("in_list", [False, True])
def test_text_that_is_no_base64_is_refused_whatever_its_bytes(tmp_path: Path, in_list: bool) -> None:
    cells = not_utf8(None, b"\xff.jpg")
    cells = pa.ListArray.from_arrays([0, 1, 2], cells) if in_list else cells
    with pytest.raises(InputError, match=r"got 'image' with .*xff.jpg'; add --fetch"):
        check_options([table(tmp_path, image=cells)], ReadOptions())


def test_urls_without_fetch_are_refused_with_the_flag_to_add(tmp_path: Path) -> None:
    shard = table(tmp_path, url=["https://user:password@example.com/a.jpg?key=1"])
    with pytest.raises(InputError, match="add --fetch if it holds URLs") as error:
        check_options([shard], ReadOptions(image_column="url"))
    assert "password" not in str(error.value) and "key=1" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "folder", "expected"),
    [
        ("a/../b.jpg", "/data/t", "/data/t/b.jpg"),
        ("../b.jpg", "s3://bucket/t?region=x", "s3://bucket/b.jpg?region=x"),
        ("../../../c/b.jpg", "webhdfs://host:1/t", "webhdfs://host:1/c/b.jpg"),
        ("b.jpg", "s3://bucket", "s3://bucket/b.jpg"),
        ("b.jpg", "https://example.com/t", "https://example.com/t/b.jpg"),
        ("/b.jpg", "s3://bucket/t", "/b.jpg"),
        ("gs://x/b.jpg", "s3://bucket/t", "gs://x/b.jpg"),
        ("HTTP://x/b.jpg", "/data", "HTTP://x/b.jpg"),
    ],
)
def test_relative_paths_are_relative_to_the_folder_of_the_table(
    address: str, folder: str, expected: str
) -> None:
    assert resolve(address, folder) == expected


ALLOWED = [
    URL,
    "data:image/png;base64,AAAA",
    "a b?.jpg",
    "/etc/passwd",
    "file:///a%20b.jpg",
    "S3://bucket.of.images/a.jpg?region=eu-west-1",
    "s3://key:secret@bucket/a.jpg",
    "gs://anonymous@bucket/a.jpg",
    "hf://datasets/namespace/name@main/a.jpg",
    "abfs://container@account.dfs.core.windows.net/a.jpg?sv=2026&sig=x%3D",
    "abfss://container/a.jpg",
    "az://container/a.jpg",
]
REFUSED = [
    "webhdfs://169.254.169.254/a",
    "hdfs://169.254.169.254/a",
    "ftp://10.0.0.1/a",
    "sftp://10.0.0.1/a",
    "smb://10.0.0.1/a",
    "github://a:b@c/d",
    "local:///etc/passwd",
    "memory://a",
    "zip://a.jpg::/b.zip",
    "zip::http://169.254.169.254/b.zip",
    "simplecache::http://169.254.169.254/a",
    "/simplecache::http://169.254.169.254/a",
    "s3://bucket/a?endpoint_override=http://169.254.169.254",
    "s3://bucket/a?region=x&%65ndpoint_override=10.0.0.1",
    "s3://bucket/a?region=10.0.0.1/",
    "s3://10.0.0.1:80/a",
    "gs://bucket/a?endpoint_override=10.0.0.1",
    "hf://datasets/a/b::http://10.0.0.1/a",
    "hf://datasets/a?endpoint=10.0.0.1",
    "abfs://10.0.0.1/container/a",
    "abfs://10%2E0%2E0%2E1/container/a",
    "abfs://localhost:10000/container/a",
    "abfs://10.0.0.1%2F@container/a",
    "abfs://container/a?blob_storage_authority=10.0.0.1",
]


def test_an_address_must_not_lead_to_a_server_of_this_network() -> None:
    """The author of a table may be unknown. Only web servers used to be limited to public addresses."""
    assert [address for address in ALLOWED if refusal(address)] == []
    assert [address for address in REFUSED if not refusal(address, "/data")] == []
    reason = refusal("ftp://user:secret@host/a?key=secret")
    assert reason and reason.endswith("got ftp://host/a") and "secret" not in reason


def test_an_address_may_be_in_the_store_of_its_own_file() -> None:
    folder = "s3://bucket/t?endpoint_override=minio:9000"
    assert refusal("b.jpg", folder) is None and refusal("/b?.jpg", folder) is None
    assert "without ?" in str(refusal("b.jpg?endpoint_override=10.0.0.1", folder))
    assert refusal("b.jpg?w=1", "https://example.com/t") is None
    assert refusal("hdfs://name:8020/b.jpg", "hdfs://name:8020/t") is None
    assert refusal("hdfs://other:8020/b.jpg", "hdfs://name:8020/t")
    assert refusal("hdfs://name:8020/b.jpg?user=x", "hdfs://name:8020/t")


def test_a_refused_address_costs_its_own_row(tmp_path: Path) -> None:
    cells = ["ftp://h/a.jpg", "b.jpg"]
    structs = [{"bytes": None, "path": cell} for cell in cells]
    read = [
        read_rows(table(tmp_path, url=cells), fetch=True)[0],
        read_rows(table(tmp_path, image=structs), fetch=True)[0],
        read_rows(
            tar_shard_of(tmp_path, *((f"{n}.url", cell.encode()) for n, cell in enumerate(cells))),
            image_column="url",
            fetch=True,
        )[0],
    ]
    for rows in read:
        assert [(row["status"], row[ADDRESS]) for row in rows] == [
            ("refused", None),
            (None, f"{tmp_path}/b.jpg"),
        ]
        assert "got ftp://h/a.jpg" in rows[0]["error"] and rows[1]["error"] is None


def test_the_folder_and_the_kind_of_addresses() -> None:
    assert folder_of("/data", "x/0.parquet") == "/data/x"
    assert folder_of("s3://b/c?region=x", "0.parquet") == "s3://b/c?region=x"
    assert folder_of("https://example.com/c?signature=x", "0.parquet") == "https://example.com/c"
    assert [is_web(address) for address in ("HTTPS://a", "s3://a", "http.jpg")] == [True, False, False]
    assert [scheme_of(address) for address in ("Data:,x", "S3://a", "a/b")] == ["data", "s3", ""]
