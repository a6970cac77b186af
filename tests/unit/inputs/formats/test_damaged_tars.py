"""Tars that are cut, damaged or compressed: no cut, wherever it is, loses a row silently."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from functools import partial
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.inputs.formats import tar
from tests.unit.inputs.formats.reading_cases import (
    encoded,
    read_rows,
    shard_at,
    tar_bytes,
    tar_shard_of,
    write_tar_shard,
)

SAMPLES = [
    member
    for at, size in enumerate((100, 1024, 0, 3000, 512, 700))
    for member in ((f"{at}.txt", b"t%d" % at), (f"{at}.jpg", bytes([at]) * size), (f"{at}.json", b"{}" * 300))
]


def compress(kind: str) -> bytes:
    if kind == "zst":
        return pa.compress(tar_bytes(SAMPLES), codec="zstd", asbytes=True)
    return tar_bytes(SAMPLES, mode=f"w:{kind}")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compression_is_recognized_by_the_content(tmp_path, kind):
    expected, _ = read_rows(tar_shard_of(tmp_path, *SAMPLES), keep=("txt",))
    rows, report = read_rows(write_tar_shard(tmp_path, compress(kind)), keep=("txt",))
    assert rows == expected and len(rows) == 6
    assert report.complete


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_images_without_an_ending_are_found_in_a_compressed_tar(tmp_path, kind):
    """Their first bytes are checked before reading: for zstd, the first image was lost, and then the rest."""
    images = [(f"im{size}", encoded("PNG") + bytes(size)) for size in (0, 600, 100_000, 5)]
    plain = tar_bytes([images[0], ("notes", b"no image"), *images[1:], ("last.jpg", b"last")])
    content = pa.compress(plain, codec="zstd", asbytes=True)
    if kind != "zst":
        content = {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(plain)
    rows, report = read_rows(write_tar_shard(tmp_path, content))
    assert [(row["key"], row["image"]) for row in rows] == [*images, ("last", b"last")] and report.complete


@pytest.mark.parametrize("opened", [gzip.GzipFile, bz2.BZ2File])
def test_a_compressed_tar_is_never_read_from_its_beginning_again(tmp_path, monkeypatch, opened):
    """Images without an ending used to be opened twice; seeking back decompresses everything before them."""
    images = [(str(number), encoded("PNG") + bytes(number)) for number in range(0, 40_000, 100)]
    shard = write_tar_shard(
        tmp_path, {gzip.GzipFile: gzip, bz2.BZ2File: bz2}[opened].compress(tar_bytes(images))
    )
    seek = opened.seek

    def forward(file: gzip.GzipFile | bz2.BZ2File, offset: int, whence: int = 0) -> int:
        assert whence or offset >= file.tell()  # `tell` also seeks
        return seek(file, offset, whence)

    monkeypatch.setattr(opened, "seek", forward)
    rows, report = read_rows(shard)
    assert len(rows) == len(images) and report.complete


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_cut_of_a_compressed_tar_costs_few_rows_before_it(tmp_path, kind):
    """With zstd, the 4 MiB before the cut used to be lost: all rows of most tars."""
    random = np.random.default_rng(0)
    plain = tar_bytes((f"{row:02}.jpg", random.bytes(50_000)) for row in range(40))
    content = gzip.compress(plain) if kind == "gz" else pa.compress(plain, codec="zstd", asbytes=True)
    rows, report = read_rows(write_tar_shard(tmp_path, content[: len(content) // 2]))
    assert len(rows) >= 16 and not report.complete


def test_a_tar_of_several_gzip_members_is_read_to_its_end(tmp_path):
    plain = tar_bytes(SAMPLES)
    rows, report = read_rows(
        write_tar_shard(tmp_path, gzip.compress(plain[:3000]) + gzip.compress(plain[3000:]))
    )
    assert len(rows) == 6 and report.complete


SKIPPABLE = b"\x50\x2a\x4d\x18\x03\0\0\0abc"


@pytest.mark.parametrize(("kind", "between"), [("xz", bytes(8)), ("zst", bytes(7)), ("zst", SKIPPABLE)])
def test_padding_and_skippable_frames_are_no_damage(tmp_path, kind, between):
    """Rows before the padding of a zstd tar used to be lost, and a padded xz tar was taken for a cut one."""
    plain = tar_bytes((f"{row:02}.jpg", bytes([row]) * 5000) for row in range(30))
    parts = [
        lzma.compress(part) if kind == "xz" else pa.compress(part, "zstd", asbytes=True)
        for part in (plain[:70_000], plain[70_000:])
    ]
    for content in (b"".join(parts) + between * 300, between.join(parts)):
        rows, report = read_rows(write_tar_shard(tmp_path, content))
        assert (len(rows), report.complete) == (30, True), report.reason
    if between == SKIPPABLE:
        rows, report = read_rows(write_tar_shard(tmp_path, between + b"".join(parts)))
        assert (len(rows), report.complete) == (30, True), report.reason


@pytest.mark.parametrize(
    ("compress", "what"),
    [(partial(pa.compress, codec="zstd", asbytes=True), "a zstd frame"), (lzma.compress, "an xz stream")],
)
@pytest.mark.parametrize("zeros", [0, 7])
def test_what_follows_a_compressed_tar_costs_no_rows(tmp_path, compress, what, zeros):
    plain = tar_bytes((f"{row:02}.jpg", bytes([row]) * 5000) for row in range(30))
    rows, report = read_rows(write_tar_shard(tmp_path, compress(plain) + bytes(zeros) + b"other data"))
    assert (len(rows), report.complete) == (30, False)
    assert f"after the end of {what}" in str(report.reason)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return tmp_path_factory.mktemp("cuts")


@pytest.mark.parametrize("keep", [(), ("txt", "json")])
def test_every_cut_gives_the_first_rows_and_is_reported_when_it_costs_any(cuts, keep):
    whole_tar = tar_bytes(SAMPLES)
    whole, _ = read_rows(tar_shard_of(cuts, *SAMPLES), keep=keep)
    end_mark = len(whole_tar.rstrip(b"\0")) // 512 * 512 + 512
    # Cut around every block boundary, where tarfile reports nothing, and in the middle of blocks.
    points = sorted({p + d for p in range(0, end_mark + 2048, 512) for d in (-1, 0, 1, 200) if p + d >= 0})
    num_rows_before = 0
    for point in points:
        shard = write_tar_shard(cuts, whole_tar[:point])
        rows, report = read_rows(shard, keep=keep)
        assert rows == whole[: len(rows)], point
        assert report.num_rows == len(rows)
        assert report.complete == (point >= end_mark + 512), point
        assert report.complete or report.reason
        assert len(rows) >= num_rows_before, "a longer tar must not give fewer rows"
        num_rows_before = len(rows)
        # A resumed run counts the same rows without reading them.
        resumed, again = read_rows(shard, missing=((len(rows), None),), keep=keep)
        assert (resumed, again.num_rows, again.complete) == ([], len(rows), report.complete), point
    assert num_rows_before == len(whole)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["gz", "bz2", "xz", "zst"]))
def test_every_cut_of_a_compressed_tar_gives_the_first_rows_and_is_reported(cuts, data, kind):
    content = compress(kind)
    whole, _ = read_rows(tar_shard_of(cuts, *SAMPLES))
    shard = write_tar_shard(cuts, content[: data.draw(st.integers(0, len(content) - 1))])
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
    whole, _ = read_rows(tar_shard_of(cuts, *SAMPLES))
    rows, report = read_rows(write_tar_shard(cuts, bytes(content)))
    assert rows == whole[: len(rows)]
    assert not report.complete and report.reason is not None and "byte" in report.reason


def with_size(content: bytes, header: int, size: bytes) -> bytes:
    """Replace the size in a header, and correct its checksum."""
    block = bytearray(content[header : header + 512])
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return content[:header] + block + content[header + 512 :]


@pytest.mark.parametrize("compressed", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "size", [b"\x80\x01", b"\x80\0\0\0" + b"\xff" * 8, b"7" * 11, b"-1000", b"-10000", b"\xff" * 11], ids=str
)
def test_a_damaged_size_costs_the_sample_and_what_follows(tmp_path, size, compressed):
    """A size beyond any file used to end the job; a negative one led back to its own header forever."""
    content = tar_bytes([("0.jpg", b"a"), ("1.jpg", b"b"), ("2.jpg", b"c")])
    rows, report = read_rows(write_tar_shard(tmp_path, compressed(with_size(content, 1024, size))))
    assert [row["key"] for row in rows] == ["0"]
    assert (report.num_rows, report.complete) == (1, False) and report.reason


def _header(kind: bytes, size: int, content: bytes, count: int = 1) -> bytes:
    """Return headers that extend the next one, such as a long name, with the size that they state."""
    info = tarfile.TarInfo("more")
    info.type, info.size = kind, size
    return (info.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")) * count


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("num_samples", [0, 2])
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (_header(b"L", 1 << 40, b"long.jpg"), "has 1099511627776 bytes"),
        (_header(b"K", 1 << 62, b"long.jpg"), "has 4611686018427387904 bytes"),
        (_header(b"x", 1 << 80, b"12 path=long"), "has 1208925819614629174706176 bytes"),
        (_header(b"g", 1 << 40, b"12 path=long"), "has 1099511627776 bytes"),
        (_header(b"x", 21, b"21 GNU.sparse.size=z\n"), "'z'"),
        (_header(b"x", 22, b"22 GNU.sparse.map=a,b\n"), "'a'"),
        (_header(b"L", 5, b"a.jpg", count=2000), "too many headers for one member"),
    ],
)
def test_a_bad_header_for_the_next_one_costs_no_row_before_it(
    tmp_path, header, reason, num_samples, compressed
):
    """One that begins the tar, or states such a size, used to end the task that read it."""
    before = tar_bytes([(f"{at}.jpg", b"image") for at in range(num_samples)])[: num_samples * 1024]
    content = before + header + tar_bytes([("last.jpg", b"last")])
    rows, report = read_rows(write_tar_shard(tmp_path, gzip.compress(content) if compressed else content))
    assert [row["key"] for row in rows] == ["0", "1"][:num_samples]
    assert report.num_rows == num_samples and not report.complete and reason in str(report.reason)


def test_data_after_the_end_mark_is_reported(tmp_path):
    first, second = tar_bytes([("1.jpg", b"a")]), tar_bytes([("2.jpg", b"b")])
    rows, report = read_rows(write_tar_shard(tmp_path, first + second))
    assert len(rows) == 1 and not report.complete
    assert report.reason is not None and "end-of-archive" in report.reason


def test_zeros_of_an_unfinished_copy_are_not_an_end(tmp_path):
    content = tar_bytes([("1.jpg", b"a"), ("2.jpg", b"b")])
    rows, report = read_rows(write_tar_shard(tmp_path, content[:1024] + bytes(4 << 20)))
    assert len(rows) == 1 and not report.complete
    assert report.reason is not None and "zeros" in report.reason


@pytest.mark.parametrize(
    "content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + b"bad" * 100, lzma.compress(b"x" * 600)]
)
def test_a_file_that_is_no_tar_is_a_partial_shard_without_rows(tmp_path, content):
    rows, report = read_rows(write_tar_shard(tmp_path, content))
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    assert report.reason is not None and report.reason.startswith(str(tmp_path))


def test_a_tar_that_no_longer_exists_is_partial(tmp_path, monkeypatch):
    shard = shard_at(tmp_path / "gone.tar", "webdataset")
    rows, report = read_rows(shard)
    assert (rows, report.num_rows, report.complete) == ([], 0, False)
    monkeypatch.setattr(tar, "open_below", Mock(side_effect=TimeoutError))  # which says nothing of the tar
    assert read_rows(shard)[1].reason == f"{shard.uri}: TimeoutError"


def test_an_empty_tar_is_complete(tmp_path):
    assert read_rows(tar_shard_of(tmp_path))[1].complete


def test_a_tar_in_large_records_is_whole(tmp_path):
    """`tar -b 8192` fills its last record of 4 MiB with zeros: every such tar used to be partial."""
    content = tar_bytes([("0.jpg", b"x")])
    rows, report = read_rows(write_tar_shard(tmp_path, content.ljust(4 << 20, b"\0")))
    assert len(rows) == 1 and report.complete
    rows, report = read_rows(write_tar_shard(tmp_path, content.ljust((4 << 20) + 10_240, b"\0")))
    assert "was probably not copied to its end" in (report.reason or "")
