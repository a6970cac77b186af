"""The line of progress, the rate, and the format of durations."""

from __future__ import annotations

from dataclasses import replace

from pipeline.progress import ProgressSnapshot, Rate, duration


def test_the_rate_leaves_start_up_out():
    rate = Rate()
    for now, rows in [(0, 0), (100, 0), (101, 10), (102, 30), (103, 50)]:
        rate.add(rows, now)
    assert rate.mean == 20


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

    def line(max_chars: int) -> str:
        return " · ".join(now.parts(max_chars).values())

    assert line(120) == now.line()
    assert line(70) == "12 images · 4.5/s · 3 failed · shards 1/2 · ETA 1 min"
    assert line(45) == "12 images · 4.5/s · 3 failed · ETA 1 min"
    assert line(25) == "12 images · ETA 1 min"
    assert line(5) == "12 i…"


def test_a_duration_has_at_most_two_units():
    assert [duration(s) for s in (None, 0, 59.6, 90061)] == ["unknown", "0 s", "1 min", "1 d 1 h"]


def test_less_than_a_second_is_said_in_tenths():
    """`200 rows in 1 s of work (399.2 rows/s)` used to contradict itself, and so did `23 rows in 0 s`."""
    assert [duration(s) for s in (0.04, 0.19, 0.501, 0.96, 1.4)] == ["0 s", "0.2 s", "0.5 s", "1 s", "1 s"]


def test_trouble_comes_first_because_a_terminal_cuts_lines():
    now = ProgressSnapshot(
        num_rows=0, num_failed=0, images_per_s=0, shards_done=0, num_shards=9, left_s=None, trouble="full"
    )
    assert now.line() == "starting · shards 0/9 · full"
    assert replace(now, num_rows=1).line().startswith("full · 1 image")
