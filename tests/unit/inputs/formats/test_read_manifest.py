"""Manifests: every record is one row, whatever it holds, and the manifest identifies the input."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.inputs.changes import find_changes, redo
from pipeline.inputs.find_files import same_place
from pipeline.inputs.formats import check_options
from pipeline.inputs.formats.manifests import manifest, records
from pipeline.inputs.listing import list_files, list_shards
from pipeline.inputs.reader import ADDRESS, PROMPT, ReadOptions
from pipeline.inputs.shards import Shard
from tests.unit.inputs.formats.reading_cases import read_rows

URL = "https://example.com/c.jpg?w=1"


def rows_of(path: Path, content: str | bytes, **options: Any) -> list[dict[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    shards = list_shards(f"@{path}")
    check_options(shards, ReadOptions(**options))
    rows = []
    for shard in shards:
        found, report = read_rows(shard, **options)
        assert (report.num_rows, report.complete, report.reason) == (shard.num_rows, True, None)
        rows += found
    return rows


def test_each_line_of_a_text_is_an_image(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "list.txt", f"a.jpg\r\n\n  \nb c.jpg\n{URL}\ns3://x/d.jpg")
    assert [row["key"] for row in rows] == ["a.jpg", "b c.jpg", URL, "s3://x/d.jpg"]
    assert [row[ADDRESS] for row in rows] == [f"{tmp_path}/a.jpg", f"{tmp_path}/b c.jpg", URL, "s3://x/d.jpg"]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]


def test_a_refused_address_costs_its_own_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "list.txt", "simplecache::http://10.0.0.1/a\nb.jpg\n")
    assert [(row["status"], row[ADDRESS]) for row in rows] == [("refused", None), (None, f"{tmp_path}/b.jpg")]
    assert "got simplecache::http://10.0.0.1/a" in rows[0]["error"]


def test_csv_has_prompts_keys_and_kept_columns(tmp_path: Path) -> None:
    content = '\ufeffid,path,ask,note\n1,a.jpg,"what, ""exactly""?","two\nlines"\n2,b.jpg,,\n3,,x,y\n'
    rows = rows_of(tmp_path / "list.csv", content, key_column="id", prompt_column="ask", keep=("note",))
    assert [row["key"] for row in rows] == ["1", "2", "3"]
    assert [row[PROMPT] for row in rows] == ['what, "exactly"?', None, "x"]
    assert [row["note"] for row in rows] == ["two\nlines", "", "y"]
    assert [row["status"] for row in rows] == [None, None, "missing_image"]
    tabs = rows_of(tmp_path / "list.tsv", "file_name\tkey\na,b.jpg\tk\n")
    assert [(row["key"], row[ADDRESS]) for row in tabs] == [("k", f"{tmp_path}/a,b.jpg")]


def test_json_lines(tmp_path: Path) -> None:
    lines = [{"image_url": URL, "n": 1}, {"image_url": "b.jpg", "n": {"x": None}}, {"image_url": None}]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    rows = rows_of(tmp_path / "list.jsonl", content, keep=("n",))
    assert [row[ADDRESS] for row in rows] == [URL, f"{tmp_path}/b.jpg", None]
    assert [row["n"] for row in rows] == ["1", '{"x": null}', None]
    assert [row["status"] for row in rows] == [None, None, "missing_image"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("list.csv", b"path,n\na.jpg,1\nb.jpg\nc.jpg,3\n", "it has 1 fields, and the header 2"),
        ("list.jsonl", b'{"path": "a.jpg"}\n{"path": \n{"path": "c.jpg"}\n', "Expecting value"),
        (
            "list.jsonl",
            b'{"path": "a.jpg"}\n["b.jpg"]\n{"path": "c.jpg"}\n',
            "must be a JSON object, got list",
        ),
        (
            "list.jsonl",
            b'{"path": "a.jpg"}\n{"path": "b\\ud83d.jpg"}\n{"path": "c.jpg"}\n',
            r"can't encode character '\ud83d'",
        ),
        (
            "list.jsonl",
            b'{"path": "a.jpg"}\n{"path": %b1%b}\n{"path": "c.jpg"}\n' % (b"[" * 99_999, b"]" * 99_999),
            "nested too deeply",
        ),
        (
            "list.jsonl",
            b'{"path": "a.jpg"}\n{"path": "b.jpg", "n": %b}\n{"path": "c.jpg"}\n' % (b"1" * 5000),
            "it has a number of 5,000 digits; write it as a text",
        ),
        ("list.txt", b"a.jpg\nb\xff.jpg\nc.jpg\n", "is not UTF-8, byte 0xff at 1"),
        ("list.csv", b"path,n\na.jpg,1\nb.jpg,2\rx.jpg,3\nc.jpg,3\n", "has carriage returns outside quotes"),
    ],
)
def test_a_record_that_cannot_be_read_costs_its_own_row(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    rows = rows_of(tmp_path / name, content)
    assert [row["status"] for row in rows] == [None, "unreadable", None]
    assert reason in rows[1]["error"] and rows[1]["key"]
    assert [row[ADDRESS] for row in rows[::2]] == [f"{tmp_path}/a.jpg", f"{tmp_path}/c.jpg"]


@pytest.mark.parametrize(("name", "delimiter"), [("list.tsv", "\t"), ("list.csv", ",")])
def test_a_field_may_be_as_long_as_an_image(tmp_path: Path, name: str, delimiter: str) -> None:
    """Python's `csv` refuses fields above 128 KiB, so the rows of larger data URIs used to be lost."""
    uri = "data:image/png;base64," + "A" * 200_000
    rows = rows_of(tmp_path / name, f'path{delimiter}n\n"{uri}"{delimiter}1\nb.jpg{delimiter}2\n')
    assert [row[ADDRESS] for row in rows] == [uri, f"{tmp_path}/b.jpg"]
    # The whole data URI used to be the key.
    assert [row["key"] for row in rows] == ["data:189f33950096385434bf8710800a119e", "b.jpg"]


@pytest.mark.parametrize("option", ["key_column", "prompt_column", "keep"])
def test_half_of_a_character_costs_its_row_only_if_it_is_used(tmp_path: Path, option: str) -> None:
    """Arrow takes no such text, so the table could not be made and the job ended."""
    notes = ["whole 😀", "cut \ud83d", "plain"]
    content = "".join(json.dumps({"path": f"{at}.jpg", "n": note}) + "\n" for at, note in enumerate(notes))
    rows = rows_of(tmp_path / "list.jsonl", content, **{option: ("n",) if option == "keep" else "n"})
    assert [row["status"] for row in rows] == [None, "unreadable", None]
    assert {row["status"] for row in rows_of(tmp_path / "list.jsonl", content)} == {None}


@pytest.mark.parametrize(("name", "delimiter"), [("list.tsv", "\t"), ("list.csv", ",")])
def test_a_quote_within_a_field_is_a_character(tmp_path: Path, name: str, delimiter: str) -> None:
    """Each odd quote used to join the lines up to the next one silently to one row."""
    notes = ['a 5" pipe', "plain", 'x"" "', '"6"" of\n7"" x"y"', ""]
    lines = ["path,note", *(f"{number}.jpg,{note}" for number, note in enumerate(notes))]
    rows = rows_of(tmp_path / name, "\n".join(lines).replace(",", delimiter), keep=("note",))
    assert [row["key"] for row in rows] == [f"{number}.jpg" for number in range(5)]
    assert [row["note"] for row in rows] == [*notes[:3], '6" of\n7" xy"', ""]


def test_a_quote_that_does_not_end_is_no_value(tmp_path: Path) -> None:
    """The lines after it used to be read as the end of a prompt or a kept column."""
    rows = rows_of(tmp_path / "list.csv", 'path,note\na.jpg,1\nb.jpg,"2\nc.jpg,3\n', keep=("note",))
    assert [row["status"] for row in rows] == [None, "unreadable"]
    assert "a quote does not end" in rows[1]["error"]


@given(st.text('",\t\n\ra', max_size=40), st.sampled_from(["csv", "tsv"]))
def test_records_are_those_of_the_csv_module(text: str, kind: records.Kind) -> None:
    text = re.sub("\r(?!\n)", "", text)  # lines of a manifest end in a line feed

    def rows(part: str) -> list[list[str]]:
        found = csv.reader(io.StringIO(part, newline=""), "excel" if kind == "csv" else "excel-tab")
        return [fields for fields in found if "".join(fields).strip()]

    found = [rows(record.decode()) for _, record in records.records(io.BytesIO(text.encode()), kind)]
    assert [fields for of_record in found for fields in of_record] == rows(text)
    assert all(len(of_record) <= 1 for of_record in found)


def test_a_manifest_is_divided_and_each_part_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part begins at its own bytes, so that the manifest is not read from its start for each part."""
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 4)
    path = tmp_path / "list.csv"
    path.write_text("path,note\n" + "".join(f'{n}.jpg,"a\n\nb"\n\n' for n in range(10)))
    shards = list_shards(f"@{path}")
    assert [shard.name for shard in shards] == ["list.csv~0-3", "list.csv~4-7", "list.csv~8-9"]
    assert [Shard(**json.loads(shard.to_json())) for shard in shards] == shards
    keys = [row["key"] for shard in shards for row in read_rows(shard, table_rows=3)[0]]
    assert keys == [f"{n}.jpg" for n in range(10)]
    rows, report = read_rows(shards[1], missing=((1, 2), (3, None)))
    assert [(row["row"], row["key"]) for row in rows] == [(1, "5.jpg"), (3, "7.jpg")]
    assert (report.num_rows, report.complete) == (4, True)
    limited = list_shards(f"@{path}", limit=6)
    assert [len(read_rows(shard)[0]) for shard in limited] == [4, 2]


def test_a_changed_manifest_is_named_and_made_again_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 2)
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\nb.jpg\nc.jpg\n")
    shards = list_shards(f"@{path}")
    path.write_text("a.jpg\nb.jpg\nc.jpg\nd.jpg\ne.jpg\n")
    changes = find_changes(shards, list_files([f"@{path}"], "auto", shards), lambda shard: None)
    with pytest.raises(
        InputError, match=r"2 shards of the input have changed .* list.txt~0-1 \(30 bytes, 18"
    ):
        changes.require_unchanged()
    again, dropped = redo(changes, ReadOptions())
    assert [shard.name for shard in again] == ["list.txt~0-1", "list.txt~2-3", "list.txt~4-4"]
    assert {shard.generation for shard in again} == {1}
    assert dropped == ("list.txt~0-1", "list.txt~2-2")


def test_lines_may_name_tars_and_tables(tmp_path: Path) -> None:
    for name in ("x/0.tar", "x/1.tar", "y/2.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    path = tmp_path / "shards.txt"
    path.write_text(f"x/0.tar\n{tmp_path}/x/1.tar\ny/2.parquet\n")
    shards = list_shards(f"@{path}")
    assert [(shard.name, shard.format) for shard in shards] == [
        ("x/0.tar", "webdataset"),
        ("x/1.tar", "webdataset"),
        ("y/2.parquet", "parquet"),
    ]
    assert all(shard.stamps[0] for shard in shards)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "0.tar\n", "names a file that is not there: .*/0.tar"),
        (
            "a.txt",
            "there.tar\nb.jpg\n",
            "must all name images, or all tars and tables, got b.jpg after there.tar",
        ),
        ("a.txt", "https://x/0.tar?sign=secret\n", r"passwords or options, .* got https://x/0.tar\?…"),
        ("a.parquet", "", "a manifest must be lines of text"),
        ("a.csv", "", "the manifest is empty"),
        ("a.jsonl", "[1]\n", "the first line of the manifest cannot be read: it must be a JSON object"),
        ("a.jsonl", '{"path": "a.jpg", "\\ud83d": 1}', r"first line .* can't encode character '\\ud83d'"),
        (
            "a.csv",
            "x,y\n1,2\n",
            "none of the columns x, y has a usual name .*; choose one with --image-column",
        ),
        ("a.csv", f"data:;base64,{'a' * 10_000}\n", r"none of the columns data:;base64, a{486}\.\.\. has"),
        ("a.csv", "url;caption\nx;y\n", "first line .* has semicolons; a CSV must have commas"),
    ],
)
def test_what_is_no_manifest_is_refused_before_work(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / "there.tar").touch()
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        check_options(list_shards(f"@{tmp_path / name}"), ReadOptions())
    assert "secret" not in str(error.value)


def test_options_that_a_manifest_cannot_satisfy_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a.jpg\n")
    shards = list_shards(f"@{tmp_path}/a.txt")
    with pytest.raises(InputError, match=r"prompt_column must be one of the columns path, got 'ask'"):
        check_options(shards, ReadOptions(prompt_column="ask"))
    with pytest.raises(InputError, match=r"keep must be one of the columns path, got 'x'"):
        check_options(shards, ReadOptions(keep=("x",)))
    with pytest.raises(InputError, match="must name one file, a manifest"):
        list_shards(f"@{tmp_path}")


def test_a_quote_that_does_not_end_stops_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    (tmp_path / "a.csv").write_text('path\na.jpg\n"b.jpg\n' + "c.jpg\n" * 100)
    (shard,) = list_shards(f"@{tmp_path}/a.csv")
    rows, report = read_rows(shard)
    assert [row["key"] for row in rows] == ["a.jpg"]
    assert not report.complete and "a quote does not end" in str(report.reason)


def test_a_quote_that_does_not_end_costs_time_only_once() -> None:
    content = b'url\n"broken\n' + b"https://example.com/a.jpg\n" * 80_000
    start = time.process_time()
    assert [record for _, record in records.records(io.BytesIO(content), "csv")] == [b"url\n", content[4:]]
    assert time.process_time() - start < 2  # 20 s if each line copied those before it


def test_the_same_manifest_has_one_spelling() -> None:
    assert same_place("@list.txt", "/data") == same_place("@/data/./list.txt", "/") == "@/data/list.txt"
    assert same_place("@s3://user:secret@b/list.txt?x=1", "/") == "@s3://b/list.txt"
