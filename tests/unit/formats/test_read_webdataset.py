"""Reading tars: what a row is, and that no cut, whatever it hits, loses a row unseen."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.formats import check_options
from pipeline.formats import webdataset as tars
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import InputError
from tests.unit.formats.reading_cases import read_rows, read_tables, shard_at, tar_bytes


def write(tmp_path, content: bytes, **more):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    return shard_at(path, "webdataset", **more)


def of_members(tmp_path, *members: tuple[str, bytes]):
    return write(tmp_path, tar_bytes(members))


def summary(rows):
    return [(row["row"], row["key"], row["image"], row["status"]) for row in rows]


def test_reads_what_the_webdataset_library_writes(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=100, verbose=0) as writer:
        for at in range(5):
            writer.write(
                {"__key__": f"a.b/{at:04d}", "jpg": b"image %d" % at, "txt": f"text {at}", "json": {"n": at}}
            )
    rows, report = read_rows(shard_at(tmp_path / "000000.tar", "webdataset"), keep=("txt", "meta=json"))
    assert (report.num_rows, report.complete, report.reason) == (5, True, None)
    assert rows[3] == {
        "key": "a.b/0003",
        "shard": "000000.tar",
        "row": 3,
        "image": b"image 3",
        "status": None,
        "error": None,
        "txt": "text 3",
        "meta": '{"n": 3}',
    }


def test_every_extension_in_any_case_is_an_image(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.GIF", "g.tiff", "h.TIF", "i.left.Jpg"]
    rows, _ = read_rows(of_members(tmp_path, *((name, b"x") for name in names)))
    assert [row["key"] for row in rows] == list("abcdefghi")
    assert all(row["image"] == b"x" for row in rows)


def test_a_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
    names = [
        "v1.0/x/001.jpg",
        "./002.jpg",
        "v1.0/x/001.seg.png",
        ".hidden.jpg",
        "v1/._003.jpg",
        "README",
        "__notes__/a.txt",
    ]
    rows, report = read_rows(of_members(tmp_path, *((name, name.encode()) for name in names)))
    assert summary(rows) == [
        (0, "v1.0/x/001", b"v1.0/x/001.jpg", None),
        (1, "./002", b"./002.jpg", None),
        (2, "v1.0/x/001", b"v1.0/x/001.seg.png", None),
    ]
    assert report.complete


def test_the_first_image_of_a_sample_is_taken_unless_one_is_named(tmp_path):
    shard = of_members(
        tmp_path, ("1.txt", b"t"), ("1.right.png", b"right"), ("1.left.png", b"left"), ("2.left.png", b"")
    )
    rows, _ = read_rows(shard)
    assert summary(rows) == [(0, "1", b"right", None), (1, "2", None, "missing_image")]
    rows, _ = read_rows(shard, image_column="left.PNG")
    assert rows[0]["image"] == b"left"
    assert rows[1]["error"] == "2.left.png is empty"


def test_a_sample_without_an_image_is_a_row_that_says_so(tmp_path):
    rows, report = read_rows(
        of_members(tmp_path, ("1.jpg", b"x"), ("2.txt", b"t"), ("2.json", b"{}"), ("3.jpg", b"y"))
    )
    assert summary(rows) == [(0, "1", b"x", None), (1, "2", None, "missing_image"), (2, "3", b"y", None)]
    assert rows[1]["error"] == "the sample has no image among its members: txt, json"
    assert report.complete


def test_repeated_keys_are_rows_of_their_own(tmp_path):
    rows, report = read_rows(
        of_members(tmp_path, ("1.jpg", b"a"), ("1.jpg", b"b"), ("2.jpg", b"c"), ("1.jpg", b"d"))
    )
    assert summary(rows) == [
        (0, "1", b"a", None),
        (1, "1", b"b", None),
        (2, "2", b"c", None),
        (3, "1", b"d", None),
    ]
    assert report.complete


def test_members_apart_from_their_sample_are_no_rows_and_missed_only_when_kept(tmp_path):
    # Sorted by extension instead of by name: every text would become a row without an image.
    shard = of_members(tmp_path, ("1.jpg", b"a"), ("2.jpg", b"b"), ("1.txt", b"one"), ("2.txt", b"two"))
    rows, report = read_rows(shard)
    assert summary(rows) == [(0, "1", b"a", None), (1, "2", b"b", None)]
    assert report.complete
    rows, report = read_rows(shard, keep=("txt",))
    assert [row["txt"] for row in rows] == [None, None]
    assert not report.complete and "1.txt stands apart" in report.reason


def test_a_prompt_is_a_member_without_its_line_end(tmp_path):
    rows, _ = read_rows(
        of_members(tmp_path, ("1.jpg", b"a"), ("1.txt", "où?\n".encode()), ("2.jpg", b"b")),
        prompt_column="txt",
    )
    assert [row["prompt"] for row in rows] == ["où?", None]


def test_links_and_files_too_large_cost_only_their_row(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, size in (("2.jpg", 2000), ("3.jpg", 1000)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
    rows, report = read_rows(write(tmp_path, file.getvalue()), max_image_bytes=1000)
    assert summary(rows) == [
        (0, "1", None, "unreadable"),
        (1, "2", None, "too_large"),
        (2, "3", b"x" * 1000, None),
    ]
    assert all(row["error"] for row in rows[:2])
    assert report.complete


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_dialect_are_read_as_tarfile_reads_them(tmp_path, format):
    # The short cut for ordinary headers must not change a name, a size or a type.
    names = ["a.jpg", "d" * 90 + "/" + "n" * 60 + ".jpg", "größe.jpg", "x" * 99 + "/y.jpg"]
    names += [] if format == tarfile.USTAR_FORMAT else ["long/" * 60 + "k.jpg"]
    content = tar_bytes([(name, name.encode() * 3) for name in names], format=format)
    rows, report = read_rows(write(tmp_path, content))
    assert [row["key"] + ".jpg" for row in rows] == names
    assert [row["image"] for row in rows] == [name.encode() * 3 for name in names]
    assert report.complete


def test_a_key_that_is_no_utf8_stays_distinct(tmp_path):
    content = tar_bytes(
        [("\udcff1.jpg", b"a"), ("\udcfe1.jpg", b"b")], format=tarfile.GNU_FORMAT, errors="surrogateescape"
    )
    rows, _ = read_rows(write(tmp_path, content))
    assert [row["key"] for row in rows] == ["\\xff1", "\\xfe1"]


SAMPLES = [
    member
    for at, size in enumerate((100, 1024, 0, 3000, 512, 700))
    for member in ((f"{at}.txt", b"t%d" % at), (f"{at}.jpg", bytes([at]) * size), (f"{at}.json", b"{}" * 300))
]


def compressed(kind: str) -> bytes:
    if kind == "zst":
        return pa.compress(tar_bytes(SAMPLES), codec="zstd", asbytes=True)
    return tar_bytes(SAMPLES, mode=f"w:{kind}")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_tars_are_told_by_their_content(tmp_path, kind):
    expected, _ = read_rows(of_members(tmp_path, *SAMPLES), keep=("txt",))
    rows, report = read_rows(write(tmp_path, compressed(kind)), keep=("txt",))
    assert rows == expected and len(rows) == 6
    assert report.complete


def test_a_tar_of_several_gzip_members_is_read_to_its_end(tmp_path):
    plain = tar_bytes(SAMPLES)
    rows, report = read_rows(write(tmp_path, gzip.compress(plain[:3000]) + gzip.compress(plain[3000:])))
    assert len(rows) == 6 and report.complete


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return tmp_path_factory.mktemp("cuts")


@pytest.mark.parametrize("keep", [(), ("txt", "json")])
def test_every_cut_gives_the_first_rows_and_is_reported_when_it_costs_any(cuts, keep):
    whole_tar = tar_bytes(SAMPLES)
    whole, _ = read_rows(of_members(cuts, *SAMPLES), keep=keep)
    end_mark = len(whole_tar.rstrip(b"\0")) // 512 * 512 + 512
    # Around every block boundary, where tarfile is silent, and in the middle of blocks.
    points = sorted({p + d for p in range(0, end_mark + 2048, 512) for d in (-1, 0, 1, 200) if p + d >= 0})
    num_rows_before = 0
    for point in points:
        shard = write(cuts, whole_tar[:point])
        rows, report = read_rows(shard, keep=keep)
        assert rows == whole[: len(rows)], point
        assert report.num_rows == len(rows)
        assert report.complete == (point >= end_mark + 512), point
        assert report.complete or report.reason
        assert len(rows) >= num_rows_before, "a longer cut must not read fewer rows"
        num_rows_before = len(rows)
        # A run that goes on counts the same rows without reading them.
        resumed, again = read_rows(shard, missing=((len(rows), None),), keep=keep)
        assert (resumed, again.num_rows, again.complete) == ([], len(rows), report.complete), point
    assert num_rows_before == len(whole)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["gz", "bz2", "xz", "zst"]))
def test_every_cut_of_a_compressed_tar_too(cuts, data, kind):
    content = compressed(kind)
    whole, _ = read_rows(of_members(cuts, *SAMPLES))
    shard = write(cuts, content[: data.draw(st.integers(0, len(content) - 1))])
    rows, report = read_rows(shard)
    assert rows == whole[: len(rows)]
    assert not report.complete and report.reason
    assert read_rows(shard, missing=())[1] == report


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_ends_the_tar_and_is_reported(cuts, data):
    content = bytearray(tar_bytes(SAMPLES))
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    header = data.draw(st.sampled_from(headers))
    at = header + data.draw(st.sampled_from([0, 124, 130, 148, 150, 156, 257, 300]))
    content[at] ^= 0x15
    whole, _ = read_rows(of_members(cuts, *SAMPLES))
    rows, report = read_rows(write(cuts, bytes(content)))
    assert rows == whole[: len(rows)]
    assert not report.complete and "byte" in report.reason


def test_what_follows_the_end_mark_is_reported(tmp_path):
    first, second = tar_bytes([("1.jpg", b"a")]), tar_bytes([("2.jpg", b"b")])
    rows, report = read_rows(write(tmp_path, first + second))
    assert len(rows) == 1 and not report.complete and "end-of-archive" in report.reason


def test_zeros_where_a_copy_never_arrived_are_not_an_end(tmp_path):
    content = tar_bytes([("1.jpg", b"a"), ("2.jpg", b"b")])
    rows, report = read_rows(write(tmp_path, content[:1024] + bytes(4 << 20)))
    assert len(rows) == 1 and not report.complete and "zeros" in report.reason


@pytest.mark.parametrize(
    "content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + b"bad" * 100, lzma.compress(b"x" * 600)]
)
def test_what_is_no_tar_is_a_partial_shard_without_rows(tmp_path, content):
    rows, report = read_rows(write(tmp_path, content))
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    assert report.reason.startswith(str(tmp_path))


def test_a_tar_that_is_gone_is_partial(tmp_path):
    rows, report = read_rows(shard_at(tmp_path / "gone.tar", "webdataset"))
    assert (rows, report.num_rows, report.complete) == ([], 0, False)


def test_an_empty_tar_is_complete(tmp_path):
    assert read_rows(of_members(tmp_path))[1].complete


def test_only_missing_rows_are_read_and_all_are_counted(tmp_path):
    shard = of_members(tmp_path, *((f"{at}.jpg", b"%d" % at) for at in range(20)))
    whole, _ = read_rows(shard)
    for missing in ((), ((3, 5),), ((0, 1), (7, 9), (18, None)), ((25, None),)):
        rows, report = read_rows(shard, missing=missing)
        wanted = [at for at in range(20) if any(low <= at < (high or 99) for low, high in missing)]
        assert rows == [whole[at] for at in wanted]
        assert report.num_rows == 20 and report.complete


def test_a_limit_ends_reading_and_is_not_partial(tmp_path):
    content = tar_bytes((f"{at}.jpg", b"x") for at in range(20))
    rows, report = read_rows(write(tmp_path, content[:10_000], max_rows=4))
    assert (len(rows), report.num_rows, report.complete) == (4, 4, True)


def test_tables_are_small_and_the_same_every_time(tmp_path):
    shard = of_members(tmp_path, *((f"{at}.jpg", bytes(1000)) for at in range(50)))
    tables, _ = read_tables(shard, table_rows=20, table_bytes=1 << 20)
    assert [len(table) for table in tables] == [20, 20, 10]
    tables, _ = read_tables(shard, table_rows=20, table_bytes=4000)
    assert {len(table) for table in tables} == {4, 2}
    assert tables == read_tables(shard, table_rows=20, table_bytes=4000)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"text_columns": ("tx",)},
            "text to score must .* got 'tx'; the first 16 of .*0.tar have jpg, txt, url",
        ),
        ({"prompt_column": "promt"}, "prompt_column must be a member of the samples, got 'promt'"),
        ({"keep": ("txt", "link=ulr")}, "keep must be a member of the samples, got 'ulr'"),
        ({"image_column": "left.jpg"}, "image_column must be a member of the samples, got 'left.jpg'"),
    ],
)
def test_a_member_that_no_sample_has_is_refused(tmp_path, options, said):
    """Every row would be without its score, its prompt or what is kept, and the run a success."""
    members = [(f"{at:02}.{kind}", b"x") for at in range(20) for kind in ("jpg", "TXT")]
    members.insert(20, ("09.url", b"x"))
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    shard = shard_at(tmp_path / "0.tar", "webdataset")
    with pytest.raises(InputError, match=said):
        check_options([shard], ReadOptions(**options))
    good = ReadOptions(
        text_columns=("Txt", "url"), prompt_column="txt", keep=("link=URL",), image_column="jpg"
    )
    check_options([shard], good)
    (tmp_path / "0.tar").write_bytes(b"no tar")
    check_options([shard], ReadOptions(**options))


def test_a_member_may_be_in_a_later_tar_and_no_more_tars_are_opened_than_need_be(tmp_path, monkeypatch):
    """A request to a bucket for each of a thousand tars would be half a run."""
    for at in range(6):
        members = [("a.jpg", b"x"), ("a.json" if at == 2 else "a.txt", b"x")]
        (tmp_path / f"{at}.tar").write_bytes(tar_bytes(members))
    shards = [shard_at(tmp_path / f"{at}.tar", "webdataset") for at in range(6)]
    opened, real = [], tars.first_members
    monkeypatch.setattr(tars, "first_members", lambda s, n: opened.append(s.name) or real(s, n))
    for keep, num_opened in (((), 0), (("txt",), 1), (("txt", "json"), 3)):
        opened.clear()
        check_options(shards, ReadOptions(keep=keep))
        assert len(opened) == num_opened
    pq.write_table(pa.table({"image": [b"x"], "url": ["y"]}), tmp_path / "beside.parquet")
    shards.insert(0, shard_at(tmp_path / "beside.parquet", "parquet"))
    with pytest.raises(InputError, match=r"got 'url'; the first 4 of the first tars, from .*0.tar on, have"):
        check_options(shards, ReadOptions(keep=("url",)))
