"""Reading folders: one file is one row, and a file that cannot be read costs only its own row."""

from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.inputs.formats import check_options
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Shard
from tests.unit.inputs.formats.reading_cases import read_rows, read_tables


def test_files_in_order_with_their_path_as_key(tmp_path):
    files = {f"{at % 3}/größe {at:03d}.JPG": b"%d" % at for at in range(40)}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (shard,) = list_shards(str(tmp_path))
    rows, report = read_rows(shard)
    assert {row["key"]: row["image"] for row in rows} == files
    assert [row["key"] for row in rows] == sorted(files)
    assert [row["row"] for row in rows] == list(range(40))
    assert (report.num_rows, report.complete) == (40, True)
    assert [row["row"] for row in read_rows(shard, missing=((3, 5), (38, None)))[0]] == [3, 4, 38, 39]


def test_a_file_that_cannot_be_read_costs_only_its_row(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "d.jpg").mkdir()
    (tmp_path / "e.jpg").write_bytes(b"12345")
    names = ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "gone.jpg", "not\udcffutf8.jpg")
    shard = Shard(name="s", format="folder", root=str(tmp_path), files=names)
    rows, report = read_rows(shard, max_image_bytes=4)
    assert [(row["image"], row["status"]) for row in rows] == [
        (b"a", None),
        (None, "missing_image"),
        (None, "unreadable"),
        (None, "unreadable"),
        (None, "too_large"),
        (None, "unreadable"),
        (None, "unreadable"),
    ]
    assert all(row["error"] for row in rows[1:])
    assert (report.num_rows, report.complete) == (7, True)


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    """Arrow takes such a name only as bytes, so the image used to be unreadable."""
    (tmp_path / "caf\udce9.jpg").write_bytes(b"a")
    (shard,) = list_shards(str(tmp_path))
    ((row,), _) = read_rows(shard)
    assert (row["key"], row["image"], row["status"]) == (r"caf\xe9.jpg", b"a", None)


def test_tables_are_small_and_a_limit_caps_rows(tmp_path):
    for at in range(50):
        (tmp_path / f"{at:02d}.png").write_bytes(bytes(100))
    (shard,) = list_shards(str(tmp_path), limit=45)
    tables, report = read_tables(shard, table_rows=20)
    assert [len(table) for table in tables] == [20, 20, 5]
    assert (report.num_rows, report.complete) == (45, True)
    assert [len(table) for table in read_tables(shard, table_bytes=1000)[0]] == [10, 10, 10, 10, 5]


def test_options_for_texts_are_refused_by_the_name_of_their_flag(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    shards = list_shards(str(tmp_path))
    for options, flag in (
        (ReadOptions(text_columns=("tx",)), "--text-column or --score"),
        (ReadOptions(prompt_column="p"), "--prompt-column"),
    ):
        with pytest.raises(InputError, match=f"{flag} has no meaning for folders .* put both into tars"):
            check_options(shards, options)
