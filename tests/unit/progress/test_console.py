"""A command's output: a terminal must not scroll, a log must stay short, and programs must parse it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TextIO

import pytest

from pipeline.finding import Finding
from pipeline.progress import Console, ProgressSnapshot, choose_style, console, write, write_json

NOW = ProgressSnapshot(
    num_rows=12345678,
    num_failed=1234,
    images_per_s=1234.5,
    shards_done=1234,
    num_shards=12345,
    left_s=123456.0,
    busy={"decode": 0.351, "caption": 0.951, "write": 0.05},
    total_rows=34567890.0,
    rows_by_stage={"read": 12400000, "decode": 12390000},
)
TROUBLE = "s3://bucket/a/very/long/name has been failing for 2 min; waiting"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    choose_style("text")


@pytest.mark.parametrize("style", ["text", "quiet", "json"])
def test_control_characters_of_names_and_captions_are_escaped(style, capsys):
    """The name of a new file used to clear the terminal in which `blip2 status` reported it."""
    choose_style(style)
    for said in (Console().result, Console().warn, Console().fail, Console().say, Console().error):
        said('1 new file: \x1b[2J\x9b2J\u202ea.jpg\n\t"b"')
    said = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said)
    assert "\\u001b[2J\\u009b2J\\u202ea.jpg" in said
    assert '\n\t"b"\n' in said or style == "json"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_valid_in_every_encoding(encoding, monkeypatch):
    """A stream without é used to get \\xe9, which is not valid JSON."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", stream)
    text = "café … 🐈 \udcff \x9b2J"
    assert write_json(json.dumps([text], ensure_ascii=False, indent=1))
    said = stream.buffer.getvalue().decode(encoding)
    assert json.loads(said) == [text] and "\x9b" not in said
    assert ("é" in said) == (encoding == "utf-8")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a console sees, in a list of one element."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, list[str]]]:
    """A terminal of some width, and a list that holds the text written to it after the block."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown: list[str] = []
    with open(slave, "w") as stream:
        yield stream, shown
        stream.write("\0")
        stream.flush()
        written = b""
        while b"\0" not in written:
            written += os.read(master, 100_000)
    os.close(master)
    shown.append(written.decode().rstrip("\0"))


def lines_of(written: str) -> list[str]:
    """Return the drawn lines without the codes for color and the cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written))


@pytest.mark.parametrize("trouble", [None, TROUBLE])
@pytest.mark.parametrize("columns", [10, 40, 80, 120])
def test_no_line_of_the_area_wraps(columns, trouble, monkeypatch):
    """A line of 130 characters used to scroll a terminal of 80 columns twice a second."""
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(columns) as (stream, shown):
        said = Console(stream)
        with said.area():
            said.phase("fetching Salesforce/blip2-opt-2.7b: 15.5 GB to /home/somebody/.cache/huggingface")
            said.show(replace(NOW, trouble=trouble))
            assert said._area is not None
            said._area._live.refresh()
    # The line with the duration of the phase is not part of the area, and stays unchanged.
    lines = [line for line in lines_of(shown[0]) if not line.startswith("fetching")]
    assert any(line.startswith("⠋ ") for line in lines)
    assert max(map(len, lines)) < columns
    if columns >= 40:
        bars = {
            line.split()[0]: line for line in lines if re.match(r"(read|decode|caption|shards) .*/", line)
        }
        assert list(bars) == ["read", "decode", "caption", "shards"]
        assert "12,345,678/34,567,890" in bars["caption"] and "1,234/12,345" in bars["shards"]
        assert ("95% busy" in bars["caption"]) == (columns >= 80)
        assert any("12,345,678 images" in line and "ETA 1 d 10 h" in line for line in lines) or trouble
    if trouble:
        assert any(line.startswith(trouble[: columns - 3]) for line in lines)


@pytest.mark.parametrize("has_area", [False, True])
@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_has_no_line_that_breaks_inside_a_word(columns, has_area, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    note = "decode sandbox: uid 65534, no new privileges, no files, no network, no other processes"
    command = "blip2 show --output /data/photographs/captions --status not_ok --sort logprob"
    with terminal(columns) as (stream, shown):
        said = Console(stream)
        with said.area() if has_area else nullcontext():
            said.say(note)
            said.fail(f"exit status 2: {note}")
            said.say(f"next: {command}")
    lines = [line for line in lines_of(shown[0]) if line]
    assert max(len(line) for line in lines if command not in line) < columns
    assert any(line.endswith(command) for line in lines)
    assert re.sub(r"\s+", " ", " ".join(lines)).strip() == f"{note} exit status 2: {note} next: {command}"
    assert "\x1b[31m" in shown[0]


def test_the_area_is_gone_at_its_end_and_what_was_said_stays(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(80) as (stream, shown):
        said = Console(stream)
        with said.area():
            said.phase("starting Ray")
            said.phase("starting the workers")
            said.fail("it is broken")
            said.show(NOW)
        said.say("done")
    assert "starting Ray: 0 s" in lines_of(shown[0])
    assert re.search(r"\x1b\[[\d;]*31mit is broken", shown[0])  # red
    after = shown[0].rpartition("\x1b[?25h")[2]  # the cursor is shown again, and the lines are erased
    assert after.count("\x1b[2K") >= 5 and lines_of(after)[-2:] == ["done", ""]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_color_where_it_is_not_wanted(name, value, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    with terminal(80) as (stream, shown):
        said = Console(stream)
        with said.area():
            said.show(replace(NOW, trouble=TROUBLE))
            said.fail("broken")
        said.warn("odd")
    assert "broken" in shown[0] and not re.findall(r"\x1b\[[\d;]*[34]\d[\d;]*m", shown[0])


def test_a_log_has_a_line_for_each_phase_and_then_one_a_minute(clock):
    log = io.StringIO()
    said = Console(log)
    with said.area():
        said.phase("starting Ray")
        clock[0] += 2.4
        said.phase("loading the weights")
        for _ in range(150):
            clock[0] += 1
            said.show(replace(NOW, num_rows=0))
        for _ in range(150):
            clock[0] += 1
            said.show(replace(NOW, num_rows=1234))
    assert [line.partition(" · busy")[0] for line in log.getvalue().splitlines()] == [
        "starting Ray: 2 s",
        "loading the weights for 58 s",
        "loading the weights for 1 min 58 s",
        "loading the weights: 2 min 31 s",
        *["1,234 images · 1,234.5/s · 1,234 failed · shards 1,234/12,345 · ETA 1 d 10 h"] * 3,
    ]


def test_quiet_leaves_warnings_failures_and_results():
    choose_style("quiet")
    log = io.StringIO()
    said = Console(log)
    with said.area():
        said.say("a note")
        said.phase("starting Ray")
        said.show(NOW)
        said.finding(Finding("python", "ok", "3.12"))
        said.finding(Finding("memory", "fail", "1 GiB"))
        said.warn("odd")
        said.result("3 rows")
    assert log.getvalue().splitlines() == ["fail  memory: 1 GiB", "odd", "3 rows"]


def test_a_warning_is_said_once_and_counted():
    log = io.StringIO()
    said = Console(log)
    for number in (1, 2, 4, 17):
        said.count_warnings({"lib: image N is grey": number, "rare": 1})
    assert len(log.getvalue().splitlines()) == 2
    said.say_repeated()
    assert log.getvalue().splitlines()[2:] == ["warning of a worker: lib: image N is grey (17 times)"]


def test_json_lines_hold_what_people_would_read_and_more(clock):
    choose_style("json")
    log = io.StringIO()
    said = Console(log)
    with said.area():
        said.phase("starting Ray")
        clock[0] += 2.5
        said.phase(None)
        clock[0] += 10
        said.show(NOW)
        said.say("a note")
        said.fail("broken")
        said.event("end", exit_status=1)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["phase", "progress", "note", "failure", "end"]
    assert all(line.pop("time") for line in lines)
    assert lines[0] == {"event": "phase", "name": "starting Ray", "seconds": 2.5}
    assert lines[1]["num_rows"] == 12345678 and lines[1]["busy"]["caption"] == 0.951
    assert lines[-1] == {"event": "end", "exit_status": 1}


def test_a_terminal_without_the_characters_of_a_line_gets_others():
    """With PYTHONIOENCODING=ascii, the first line of progress used to end the job with UnicodeEncodeError."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", newline="")
    write(stream, "1 · 2 … é\n")
    assert raw.getvalue() == b"1 | 2 ... \\xe9\n"


def test_a_reader_that_has_gone_does_not_end_the_job():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        said = Console(stream)
        said.say("nobody reads this")
        said.say("nor this, and closing the stream writes nothing that is left")


def test_a_process_without_a_terminal_says_nothing():
    write(None, "a line")
