"""`blip2 show` on outputs that are written without Ray and whose rows are known."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.cells import cell_len

from pipeline.cli.main import main
from pipeline.report.rows import FinishedRows
from pipeline.schema import ROW_CONTRACT, output_schema
from pipeline.settings.report_settings import ShowSettings
from pipeline.show.choice import chosen
from pipeline.show.table import pages, tabbed_lines
from pipeline.storage.folder import Folder
from tests.unit.report import finished_output

SCHEMA = output_schema([pa.field("color", pa.string()), pa.field("vector", pa.list_(pa.float32()))])
ESCAPE = "a \x1b[2Jcat\n\x9bon 猫 a mat"
"""A caption that would clear the terminal."""
LONG = " word" * 40


def write_output(root: Path, num_shards: int = 2, rows_per_shard: int = 10) -> Folder:
    """Write a run whose last shard has no file. Every fifth row has failed; logprobs fall from -1 on."""
    shards = {f"{n}.tar": [row_of(n, at) for at in range(rows_per_shard)] for n in range(num_shards)}
    return finished_output.write_output(root, shards, SCHEMA, [f"{num_shards}.tar"])


def row_of(shard: int, at: int) -> dict[str, Any]:
    row: dict[str, Any] = {"key": f"photo-{shard}-{at}", "flags": []}
    if at % 5 == 4:
        return row | {"status": "undecodable", "error": f"cut at byte {at}"}
    row |= {"status": "ok", "caption": f"{ESCAPE} {at}{LONG * (at == 1)}", "logprob": -1.0 - shard - at / 10}
    return row | {"color": "red", "vector": [1.0, 2.0], "sha256": b"\x00\xff"}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    return write_output(tmp_path_factory.mktemp("output")).uri


def shown(output: str, capsys, *flags: str) -> list[dict[str, Any]]:
    assert main(["show", "--output", output, "--json", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def keys(rows: list[dict[str, Any]]) -> list[str]:
    return [row["key"].removeprefix("photo-") for row in rows]


def test_json_lines_are_whole_rows_in_order(output, capsys):
    rows = shown(output, capsys, "--limit", "0")
    assert keys(rows) == [f"{shard}-{at}" for shard in range(2) for at in range(10)]
    assert list(rows[0]) == SCHEMA.names
    assert (rows[0]["caption"], rows[0]["sha256"], rows[0]["vector"]) == (f"{ESCAPE} 0", "00ff", [1.0, 2.0])
    assert rows[4]["status"] == "undecodable" and rows[4]["caption"] is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--limit 3", ["0-0", "0-1", "0-2"]),
        ("--limit 12 --grep at\\sbyte", ["0-4", "0-9", "1-4", "1-9"]),
        ("--status undecodable --limit 1", ["0-4"]),
        ("--status not_ok", ["0-4", "0-9", "1-4", "1-9"]),
        ("--status ok refused --grep mat.[67]", ["0-6", "0-7", "1-6", "1-7"]),
        ("--grep tar", []),  # only the name of the shard
        ("--sort logprob --limit 2", ["1-8", "1-7"]),
        ("--sort logprob --descending --limit 2", ["0-0", "0-1"]),
        ("--sort status --limit 3", ["0-0", "0-1", "0-2"]),  # equal rows keep their order
        ("--sort logprob --status not_ok --limit 9", ["0-4", "0-9", "1-4", "1-9"]),
    ],
)
def test_rows_are_chosen(output, capsys, flags, expected):
    assert keys(shown(output, capsys, *flags.split())) == expected


def test_kept_columns_of_every_type_are_searched_sorted_and_written(tmp_path, capsys):
    """Large strings, which other libraries write, used to match nothing; float16 and UUIDs raised."""
    kept = {
        "large": pa.array(["stone", "needle", None], pa.large_string()),
        "half": pa.array([2.0, 1.0, None], pa.float16()),
        "uuid": pa.array([b"1" * 16, b"0" * 16, None], pa.uuid()),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a":1}', '["hay"]', None])),
    }
    folder = finished_output.write_output(tmp_path / "out", {}, ROW_CONTRACT, ["0.tar"])
    common = {"shard": "0.tar", "flags": [], "status": "ok"}
    rows = [{"key": key, "row": at, **common} for at, key in enumerate("abc")]
    table = pa.Table.from_pylist(rows, schema=ROW_CONTRACT)
    for name, column in kept.items():
        table = table.append_column(name, column)
    finished_output.write_shard(folder, "0.tar", table)
    for pattern, expected in {"needle": ["b"], "hay": ["b"], "3131-": ["a"]}.items():
        assert keys(shown(folder.uri, capsys, "--grep", pattern)) == expected
    for name, order in {"half": "bac", "uuid": "bac", "json": "bac", "large": "bac"}.items():
        assert keys(shown(folder.uri, capsys, "--sort", name)) == list(order), name
    row, *_ = shown(folder.uri, capsys)
    assert (row["half"], row["uuid"]) == (2.0, "31313131-3131-3131-3131-313131313131")
    for to in ("csv", "jsonl"):
        assert main(["export", folder.uri, "--to", to, "--into", str(tmp_path / to)]) == 0
    assert '"31313131-3131-3131-3131-313131313131","{""a"":1}"' in (tmp_path / "csv/0.tar.csv").read_text()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_of_the_table_is_wider_than_the_terminal(output, width):
    """This includes wide characters; and no control code reaches the terminal."""
    found = FinishedRows.find(output)
    settings = ShowSettings(output=output)
    rows = [row for table in chosen(found.tables(), settings) for row in table.to_pylist()]
    text = "".join(pages(rows, width))
    assert max(cell_len(line) for line in text.splitlines()) in range(width - 5, width + 1)
    assert not {"\x1b", "\x9b"} & set(text)
    flat = "".join(text.split())
    assert "color:red" in flat and "vector:2values" in flat and "undecodable" in flat
    assert ("logprob" in text) == (width >= 60)


def test_all_pages_have_the_same_columns(output):
    rows = [{"key": "k" * (1 + at % 9), "status": "ok", "caption": f"c{at}"} for at in range(450)]
    first, *others = pages(rows, 80)
    assert first.splitlines()[0].split() == ["key", "status", "result"]
    assert {line.index(" c") for page in (first, *others) for line in page.splitlines()[1:]} == {18}
    assert sum(page.count("ok") for page in (first, *others)) == 450


def test_a_pipe_gets_whole_lines_with_tabs(output, capsys):
    assert main(["show", "--output", output, "--limit", "5"]) == 0
    said = capsys.readouterr()
    header, first, *_, failed = [line.split("\t") for line in said.out.splitlines()]
    assert header == ["key", "status", "logprob", "caption", "error", "color", "vector"]
    assert first == ["photo-0-0", "ok", "-1", r"a \u001b[2Jcat \u009bon 猫 a mat 0", "", "red", "2 values"]
    assert failed == ["photo-0-4", "undecodable", "", "", "cut at byte 4", "", ""]
    assert said.err == "1 of 3 shards has no file yet; rows of finished shards are shown\n"


def test_names_of_columns_hold_no_control_codes_and_no_line_ends():
    row = {"key": "k", "status": "ok", "caption": "c", "error": None, "a\n\x1b[2Jb\t": "v"}
    header, values = tabbed_lines([row])
    assert header.split("\t") == ["key", "status", "caption", "error", r"a \u001b[2Jb "]
    assert len(values.split("\t")) == 5
    assert r"a \u001b[2Jb : v" in "".join(pages([row], 80))


def test_a_terminal_gets_a_table(output, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["show", "--output", output, "--limit", "5"]) == 0
    assert terminal.getvalue().splitlines()[0].split() == ["key", "status", "logprob", "result"]
    terminal.truncate(0)
    assert main(["show", "--output", output, "--grep", "nowhere"]) == 0
    assert terminal.getvalue().strip("\0") == "no row matches\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sort logprbo", "--sort must be one of the columns key"),
        ("--sort vector", "--sort must name a column of single values"),
        ("--sort row --limit 0", "--limit must be at least 1 with"),
        ("--descending", "--descending must be given with"),
        ("--grep (", "--grep must be a regular expression, got '('"),
        ("--status okay", "--status must be one of ok, missing_image"),
        ("--limit -1", "--limit must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_shown_is_refused(output, capsys, flags, said):
    assert main(["show", "--output", output, *flags.split()]) == 3
    assert said in capsys.readouterr().err


def test_an_output_without_finished_shards_is_refused(tmp_path, capsys):
    assert main(["show", "--output", str(tmp_path / "none")]) == 3
    write_output(tmp_path / "new", num_shards=0)
    assert main(["show", "--output", str(tmp_path / "new")]) == 3
    said = capsys.readouterr().err
    assert "holds no run" in said and "has no finished shard yet" in said


def test_a_closed_pipe_ends_the_reading_and_ray_is_not_imported(tmp_path):
    """After `| head` ended, the command used to continue reading millions of rows."""
    write_output(tmp_path, num_shards=1, rows_per_shard=100)
    code = (
        "import sys\n"
        "from pipeline.show import show\n"
        "from pipeline.cli.main import main\n"
        "taken = []\n"
        "line = show.json_line\n"
        "show.json_line = lambda row: taken.append(row) or line(row)\n"
        f"status = main(['show', '--output', {str(tmp_path)!r}, '--limit', '0', '--json'])\n"
        "assert 'ray' not in sys.modules\n"
        "print(status, len(taken), file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0, said
    assert said == "0 1\n"
