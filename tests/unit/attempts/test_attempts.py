"""Records of attempts: bounded, whole after any death, and the only source of rates."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import shutil
import signal
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.attempts.attempt import Attempt, Attempts, Point, WorkerLoad, fold
from pipeline.attempts.environment import command_line
from pipeline.attempts.log import MAX_FIRST, MAX_LAST, AttemptLog
from pipeline.attempts.recorder import recorded
from pipeline.attempts.store import make_room, read_attempts, write_attempt
from pipeline.attempts.timeline import Timeline
from pipeline.errors import StoppedBySignal
from pipeline.ledger.layout import ATTEMPTS, LOGS
from pipeline.placement.cluster import Cluster, nodes_alive
from pipeline.progress import Console, choose_style
from pipeline.report.pace import UNKNOWN, attempt_lines, total_line, verdict
from pipeline.run.bottleneck import TOO_SHORT
from pipeline.stages.coordinator import Coordinator
from pipeline.stages.worker_messages import MAX_TEXTS, WarningCounter
from pipeline.storage.folder import Folder


def attempt(number: int, **changes: Any) -> Attempt:
    """An attempt with ten rows in five seconds of work, after two of start-up."""
    point = Point(7.0, 10, {"caption": 4.0}, {"caption": 5.0})
    known: dict[str, Any] = {"ready_s": 2.0, "points": (point,), "warnings": {"w": 1}} | changes
    return Attempt(id=f"{number:04}", run="digest", begun=f"2026-01-01T00:{number:02}:00+00:00", **known)


def test_a_timeline_keeps_its_ends_and_its_shape_in_a_bounded_number_of_points():
    timeline = Timeline(max_points=10)
    for second in range(1, 1_001):
        timeline.add(Point(float(second), second * 2))
        assert len(timeline.points) <= 10 and timeline.points[-1].seconds == second
    points = timeline.points
    assert points[0].seconds == 1
    assert all(point.rows == 2 * point.seconds for point in points)
    gaps = [b.seconds - a.seconds for a, b in pairwise(points)]
    assert max(gaps[:-1]) <= 2 * min(gaps[:-1])


def test_news_within_one_step_replace_the_last_point():
    timeline = Timeline()
    for seconds in (0.0, 0.1, 0.5, 0.9, 1.2):
        timeline.add(Point(seconds, 1))
    assert [point.seconds for point in timeline.points] == [0.0, 0.9, 1.2]


def test_a_rate_is_of_working_time_alone():
    attempts = Attempts((attempt(1), attempt(2), attempt(3, ready_s=None, points=())))
    assert (attempts.rows, attempts.active_s, attempts.rows_per_s) == (20, 10.0, 2.0)
    assert attempts.busy_fractions == {"caption": 0.8}
    lines = attempt_lines(attempts)
    assert lines[0] == "speed: 2.0 rows/s, 20 rows in 10 s of work, start-up and pauses left out"
    assert lines[1] == TOO_SHORT
    assert lines[2].startswith(
        "3 attempts, 2026-01-01 00:01:00 UTC to 2026-01-01 00:03:00 UTC; the last: no "
    )


def test_the_bottleneck_of_a_long_run_is_named_from_its_records():
    hardware = {"cpus": 64.0, "accelerators": 8.0}
    points = (Point(0.0, 0), Point(200.0, 400, {"caption": 320.0}, {"caption": 400.0}))
    lines = attempt_lines(Attempts((attempt(1, points=points, ready_s=0.0, hardware=hardware),)))
    assert lines[1].startswith("bottleneck: caption, busy 80% of the time; more captioning actors")
    assert "up to 8" in lines[1]


def test_workers_that_are_gone_keep_no_advice_back(tmp_path):
    """Lost workers used to be counted with their replacements, so no more workers were advised."""
    with recorded(Folder(str(tmp_path)), is_begun=True, run="digest") as record:
        for at_work in ({"a", "b"}, {"b", "c"}, {"c"}, ()):
            loads = {"caption": dict.fromkeys("abc", WorkerLoad(290, 300))}
            record.note(3, loads, at_work, {}, {})
        record.begin_driver()
        record.note(3, {"caption": {"d": WorkerLoad(290, 300)}}, {"d"}, {}, {})
        record.end(0, "done")
    (attempt,) = read_attempts(Folder(str(tmp_path)))
    assert attempt.workers == {"caption": 2}


def worked(**changes: Any) -> Attempt:
    """An attempt of 300 s, of which the model loads for 200 s."""
    point = Point(300.0, 400, {"decode": 540.0}, {"decode": 600.0})
    known: dict[str, Any] = {"points": (point,), "ready_s": 200.0, "hardware": {"cpus": 4.0}} | changes
    return attempt(1, **known)


def test_workers_count_once_however_long_they_waited_for_the_model():
    """Two decoders used to count as six, so no more were advised."""
    assert "--max-decode-actors, up to 4" in verdict(Attempts((worked(workers={"decode": 2}),)))
    assert "more CPUs" in verdict(Attempts((worked(workers={"decode": 4}),)))
    assert "--max-decode-actors, up to 4" in verdict(Attempts((worked(),))), "a record of an older version"


@pytest.mark.parametrize(
    "changes", [{"points": (), "ready_s": None}, {"workers": {"decode": 1}, "hardware": {"cpus": 4.0}}]
)
def test_a_start_with_little_to_do_changes_no_verdict(changes):
    """Such a start has fewer workers or none, and the report used to contradict the last line of the run."""
    long, short = worked(workers={"decode": 4}), attempt(2, **changes)
    before = verdict(Attempts((long,)))
    assert "more CPUs" in before
    for attempts in ((long, short), (short, long), (fold(long, short),), (fold(short, long),)):
        assert verdict(Attempts(attempts)) == before
    assert verdict(Attempts((short,))) == verdict(Attempts()) == TOO_SHORT


def test_machines_that_have_joined_are_recorded_at_the_end_of_the_work(tmp_path, monkeypatch):
    """The last line of a run used to count them, but the report did not."""
    nodes = [{"Resources": {"CPU": 64.0, "GPU": 1.0}, "Alive": True, "NodeID": each} for each in "abcd"]
    monkeypatch.setattr("ray.nodes", lambda: nodes[:1])
    with recorded(Folder(str(tmp_path)), is_begun=True, run="digest") as record:
        record.connected(Cluster(nodes_alive()))
        monkeypatch.setattr("ray.nodes", lambda: nodes)
        record.look_again()
    assert record.all.all[-1].hardware["accelerators"] == 4.0


def test_nothing_is_invented_for_a_run_without_records():
    assert attempt_lines(Attempts()) == [UNKNOWN]
    assert "unknown" in attempt_lines(Attempts((attempt(1, points=(), ready_s=None),)))[0]


def test_a_copied_output_has_the_same_figures(tmp_path):
    write_attempt(Folder(str(tmp_path / "a")), attempt(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.json"):
        os.utime(path, (1e9, 1e9))
    first, second = (attempt_lines(read_attempts(Folder(str(tmp_path / n)))) for n in "ab")
    assert first == second


def test_many_attempts_become_one_record_with_the_same_sums(tmp_path):
    folder = Folder(str(tmp_path))
    for number in range(12):
        make_room(folder, max_records=5)
        write_attempt(folder, attempt(number))
    found = read_attempts(folder)
    assert len(list((tmp_path / ATTEMPTS).iterdir())) == 5
    assert (len(found), found.rows, found.active_s) == (12, 120, 60.0)
    assert found.warnings == {"w": 12} and found.busy_fractions == {"caption": 0.8}
    assert [a.num_attempts for a in found] == [8, 1, 1, 1, 1]


def test_a_death_while_records_are_folded_counts_no_attempt_twice(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    for number in range(4):
        write_attempt(folder, attempt(number))
    monkeypatch.setattr(Folder, "delete", lambda *_: pytest.fail("dead"))
    with pytest.raises(pytest.fail.Exception, match="dead"):
        make_room(folder, max_records=4)
    assert len(list((tmp_path / ATTEMPTS).iterdir())) == 4
    assert read_attempts(folder).rows == 40


def test_records_of_newer_versions_and_damaged_ones_are_read_as_far_as_they_go(tmp_path):
    folder = Folder(str(tmp_path))
    folder.put(f"{ATTEMPTS}/1.json", json.dumps(attempt(1).to_dict() | {"new": 1}).encode())
    folder.put(f"{ATTEMPTS}/2.json", b"{")
    folder.put(f"{ATTEMPTS}/3.json", b"[]")
    assert [a.id for a in read_attempts(folder)] == ["0001"]


def test_a_recorder_writes_from_the_start_and_says_how_the_attempt_ended(tmp_path):
    folder = Folder(str(tmp_path))
    with (
        pytest.raises(StoppedBySignal),
        recorded(folder, is_begun=True, run="digest", model="m", dtype="float32") as record,
    ):
        (first,) = read_attempts(folder)
        assert first.reason is None and first.versions["python"] and first.model == "m"
        record.end_phase("open the output")
        record.note(0, {}, (), {}, {})
        record.note(3, {"caption": {"a": WorkerLoad(1.0, 0.0)}}, {"a"}, {"w": 1}, {"int8: all": 1})
        record.begin_driver()
        record.note(4, {"caption": {"b": WorkerLoad(2.0, 0.0)}}, {"b"}, {"w": 2}, {"int8: all": 2})
        raise StoppedBySignal(signal.SIGTERM)
    (last,) = read_attempts(folder)
    assert (last.rows, last.points[-1].busy_s, last.warnings) == (7, {"caption": 3.0}, {"w": 3})
    assert last.quantization == {"int8: all": 2}
    assert list(last.phases) == ["open the output", "load the model", "first row"]
    assert last.exit_status == 143 and "SIGTERM" in last.ending


def test_the_log_of_an_attempt_is_kept_with_its_end_and_is_bounded(tmp_path):
    """The log of a driver used to be lost with its pod."""
    folder = Folder(str(tmp_path))
    with pytest.raises(StoppedBySignal), recorded(folder, is_begun=True, run="d", run_id="abc") as record:
        console = Console(io.StringIO())
        console.keep(record.log.add)
        console.say("reading s3://k:pw@b/x")
        console.warn("a store fails")
        raise StoppedBySignal(signal.SIGTERM)
    [name] = folder.names(LOGS)
    lines = [json.loads(line) for line in (folder.get(name) or b"").splitlines()]
    assert [line["event"] for line in lines] == ["note", "warning", "error"]
    assert {line["run"] for line in lines} == {"abc"} and lines[0]["text"] == "reading s3://b/x"
    assert "SIGTERM" in lines[-1]["text"]
    log = AttemptLog("abc")
    for number in range(MAX_FIRST + MAX_LAST + 10):
        log.add("note", str(number))
    kept = [json.loads(line) for line in log.content().splitlines()]
    assert len(kept) == MAX_FIRST + 1 + MAX_LAST and kept[MAX_FIRST]["num_lines"] == 10
    assert kept[-1]["text"] == str(MAX_FIRST + MAX_LAST + 9)


def test_a_log_takes_names_that_are_not_utf8():
    """A note about a new file with such a name used to end each later start of its run."""
    log = AttemptLog("abc")
    log.add("note", "1 new file: \udcff.png")
    assert json.loads(log.content())["text"] == "1 new file: \udcff.png"


def test_quiet_leaves_notes_out_of_the_terminal_but_not_out_of_the_log():
    stream, kept = io.StringIO(), []
    choose_style("quiet")
    try:
        console = Console(stream)
        console.keep(lambda event, text: kept.append((event, text)))
        console.say("a note")
        console.warn("a warning")
    finally:
        choose_style("text")
    assert (kept, stream.getvalue()) == ([("note", "a note"), ("warning", "a warning")], "a warning\n")


def test_an_attempt_knows_those_before_it_and_totals_count_all(tmp_path):
    """After the death of a driver, progress and the end of a run used to cover only the last attempt."""
    folder = Folder(str(tmp_path))
    write_attempt(folder, attempt(1, shard_rows=50.0))
    with recorded(folder, is_begun=True, run="digest") as record:
        earlier = record.earlier
        assert ([a.id for a in earlier], earlier.shard_rows) == (["0001"], 50.0)
        record.note(3, {"caption": {"a": WorkerLoad(1.0, 0.0)}}, (), {}, {}, shard_rows=60.0)
    assert (record.all.rows, record.all.shard_rows) == (earlier.rows + 3, 60.0)
    assert record.all.rows == read_attempts(folder).rows
    said = total_line(record.all)
    assert said.startswith("2 attempts, 20") and said.count(" UTC") == 2
    assert f": {record.all.rows} rows in " in said
    assert said.endswith(f" of work ({record.all.rows_per_s:.1f} rows/s)")


def test_the_total_of_a_stopped_attempt_counts_its_last_rows(tmp_path, monkeypatch):
    """After Ctrl-C, the last line used to report 1,006 rows where `blip2 status` reported 1,953."""
    now = iter([0.0, *[100.0] * 20])
    monkeypatch.setattr("pipeline.attempts.recorder.time", SimpleNamespace(monotonic=lambda: next(now)))
    with recorded(Folder(str(tmp_path)), is_begun=True, run="digest") as record:
        record.note(1, {"caption": {"a": WorkerLoad(1.0, 1.0)}}, (), {}, {})
        record.note(30, {"caption": {"a": WorkerLoad(2.0, 2.0)}}, (), {}, {})
        assert ": 30 rows in " in total_line(record.all)


def test_a_store_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(Folder, "put", fail)
    with recorded(Folder(str(tmp_path)), is_begun=True, run="digest") as record:
        record.end(0, "done")


def test_the_command_line_has_no_secrets(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/x/pipeline/__main__.py", "caption", "--input", "s3://k:pw@b/x?token=t"]
    )
    assert command_line() == "blip2 caption --input s3://b/x"


def test_warnings_are_told_once_and_counted():
    coordinator = Coordinator()
    counters = [
        WarningCounter(SimpleNamespace(warned=SimpleNamespace(remote=coordinator.warned)), worker)
        for worker in "ab"
    ]
    logger = logging.Logger("lib")
    for counter in counters:
        logger.addHandler(counter)
    for number in range(5):
        logger.warning("image %d is grey after %.1f s: [Errno 5] HTTP 503\nmore", number, number / 7)
    assert coordinator.news().warnings == {"lib: image N is grey after N s: [Errno 5] HTTP 503": 8}
    for number in range(2 * MAX_TEXTS):
        logger.warning("x" * number)
    assert len(coordinator.news().warnings) == MAX_TEXTS


def test_a_warning_never_raises_and_keeps_no_secret(capsys):
    """Warnings are stored in the output and shown on the page of a report."""
    coordinator = Coordinator()
    logger = logging.Logger("lib")
    logger.addHandler(WarningCounter(SimpleNamespace(warned=SimpleNamespace(remote=coordinator.warned)), "a"))
    logger.warning("cannot read s3://key:pa55word@bucket/x?secret_key=123")
    logger.warning("%d images", "some")
    assert coordinator.news().warnings == {"lib: cannot read sN://bucket/x": 1}
    assert "Logging error" in capsys.readouterr().err


def test_a_record_survives_the_way_through_json():
    before = attempt(1, phases={"start Ray": 1.0}, reason="done")
    assert Attempt.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    assert dataclasses.replace(before, reason=None).ending.startswith("no record of its end")


def test_a_new_run_that_is_refused_leaves_no_record(tmp_path):
    with pytest.raises(ValueError), recorded(Folder(str(tmp_path)), is_begun=False, run="digest"):
        raise ValueError("no node has an accelerator")
    assert list(tmp_path.iterdir()) == []
    with recorded(Folder(str(tmp_path)), is_begun=False, run="before") as record:
        record.run_has_begun("after", "bfloat16")
    (attempt,) = read_attempts(Folder(str(tmp_path)))
    assert (attempt.run, attempt.dtype) == ("after", "bfloat16")
