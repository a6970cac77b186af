"""Progress lines: in a terminal they must not scroll, and in a log they must not overwrite each other."""

import fcntl
import io
import os
import pty
import struct
import termios
from dataclasses import replace

import pytest

from pipeline.progress import Console, ProgressSnapshot, Rate, duration, write


def test_the_rate_leaves_start_up_out():
    rate = Rate()
    for now, rows in [(0, 0), (100, 0), (101, 10), (102, 30), (103, 50)]:
        rate.add(rows, now)
    assert rate.mean == 20


def test_a_terminal_has_one_line_and_a_log_has_plain_ones():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = ProgressSnapshot(
        num_rows=1234, num_failed=5, images_per_s=67.8, shards_done=1, num_shards=9, left_s=3725.0
    )
    screen, log = Terminal(), io.StringIO()
    for stream in (screen, log):
        console = Console(stream)
        console.show(now)
        console.say("done")
    assert log.getvalue() == "1,234 images · 67.8/s · 5 failed · shards 1/9 · ETA 1 h 2 min\ndone\n"
    assert screen.getvalue().startswith("\r1,234 images")
    assert screen.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    "trouble", [None, "s3://bucket/a/very/long/name has been failing for 2 min; waiting"]
)
@pytest.mark.parametrize("columns", [10, 40, 80, 120])
def test_the_live_line_never_wraps(columns, trouble):
    """A line of 130 characters scrolled a terminal of 80 columns twice a second."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    now = ProgressSnapshot(
        num_rows=12345678,
        num_failed=1234,
        images_per_s=1234.5,
        shards_done=1234,
        num_shards=12345,
        left_s=123456.0,
        busy={"decode": 0.351, "caption": 0.951, "write": 0.05},
        trouble=trouble,
    )
    with open(slave, "w") as stream:
        console = Console(stream)
        console.show(replace(now, num_rows=0))
        console.show(now)
        console.say("done")
        shown = b""
        while b"done" not in shown:
            shown += os.read(master, 10_000)
    os.close(master)
    lines = shown.decode().replace("\r\n", "\r").split("\r")
    assert max(map(len, lines)) < columns
    assert "done" in lines
    if columns >= 40:
        assert any("12,345,678 images" in line and "ETA 1 d 10 h" in line for line in lines) or trouble
    if trouble:
        assert any(line.startswith(trouble[: columns - 2]) for line in lines)


def test_a_narrow_line_leaves_out_what_matters_least():
    now = ProgressSnapshot(
        num_rows=12,
        num_failed=3,
        images_per_s=4.5,
        shards_done=1,
        num_shards=2,
        left_s=60.0,
        busy={"decode": 0.5},
    )
    assert now.line(120) == now.line()
    assert now.line(70) == "12 images · 4.5/s · 3 failed · shards 1/2 · ETA 1 min"
    assert now.line(45) == "12 images · 4.5/s · 3 failed · ETA 1 min"
    assert now.line(25) == "12 images · ETA 1 min"
    assert now.line(5) == "12 i…"


def test_a_duration_has_at_most_two_units():
    assert [duration(s) for s in (None, 0, 59.6, 90061)] == ["unknown", "0 s", "1 min", "1 d 1 h"]


def test_trouble_comes_first_because_a_terminal_cuts_lines():
    now = ProgressSnapshot(
        num_rows=0, num_failed=0, images_per_s=0, shards_done=0, num_shards=9, left_s=None, trouble="full"
    )
    assert now.line() == "starting · shards 0/9 · full"
    assert replace(now, num_rows=1).line().startswith("full · 1 image")


def test_a_terminal_without_the_characters_of_a_line_gets_others():
    """With PYTHONIOENCODING=ascii the first line of progress ended the job with UnicodeEncodeError."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", newline="")
    write(stream, "1 · 2 … é\n")
    assert raw.getvalue() == b"1 | 2 ... \\xe9\n"


def test_a_reader_that_has_gone_does_not_end_the_job():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        console = Console(stream)
        console.say("nobody reads this")
        console.say("nor this, and closing the stream writes nothing that is left")


def test_a_process_without_a_terminal_says_nothing():
    write(None, "a line")
