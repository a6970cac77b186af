"""The driver's books and reports: wrong here means a lie on the screen or a shard committed too early."""

import io

import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import Summary
from pipeline.ledger.ledger import ShardProgress
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.rowset import RowSet
from pipeline.progress import Console, Rate, Snapshot, duration
from pipeline.run.bottleneck import busy_fractions, describe_bottleneck
from pipeline.run.tracker import Tracker
from pipeline.settings.fingerprint import Fingerprint, FingerprintMismatch
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.placement import ClusterSize, Placement, reserve
from pipeline.stages.coordinator import Load
from pipeline.stages.receipts import Receipt
from pipeline.storage.retrying import retry_on_oserror


def open_shard(name="a", done=(), report=None, num_rows=None) -> ShardProgress:
    shard = Shard(name=name, format="webdataset", root="/in", files=(name,), num_rows=num_rows)
    return ShardProgress(shard, RowSet(done), report)


def receipt(start, stop, shard="a", status="ok") -> Receipt:
    return Receipt(shard, ((start, stop),), ((status, stop - start),))


def end(num_rows, shard="a") -> ShardReport:
    return ShardReport(shard=shard, num_rows=num_rows, complete=True)


def test_a_shard_is_complete_when_its_end_and_all_its_rows_are_known():
    tracker = Tracker([open_shard()])
    tracker.add(receipt(0, 10))
    assert tracker.take_complete() == []
    tracker.ended(end(12))
    assert tracker.take_complete() == []
    tracker.add(receipt(10, 12))
    assert [report.shard for report in tracker.take_complete()] == ["a"]
    assert (tracker.num_open, tracker.take_complete()) == (0, [])


def test_rows_that_arrive_twice_count_once():
    tracker = Tracker([open_shard(done=[(0, 5)])])
    for _ in range(2):
        tracker.add(receipt(5, 9, status="undecodable"))
        tracker.add(receipt(0, 5))
    assert (tracker.num_rows, tracker.num_failed) == (4, 4)


def test_a_straggler_of_a_committed_shard_is_nobodys():
    tracker = Tracker([open_shard(report=end(2))])
    tracker.add(receipt(0, 2))
    tracker.take_complete()
    tracker.add(receipt(0, 2))
    tracker.ended(end(2))
    assert tracker.take_complete() == []
    assert tracker.num_rows == 2


def test_rows_left_are_estimated_from_the_shards_that_are_known():
    tracker = Tracker([open_shard("a", num_rows=100), open_shard("b"), open_shard("c", done=[(0, 30)])])
    assert tracker.estimate_rows_left() == 270
    assert Tracker([open_shard()]).estimate_rows_left() is None


def test_rotten_input_is_noticed_and_not_too_early():
    tracker = Tracker([open_shard()])
    tracker.add(receipt(0, 400, status="undecodable"))
    assert not tracker.has_too_many_failures(0.0)
    tracker.add(receipt(400, 600, status="undecodable"))
    assert tracker.has_too_many_failures(0.0)
    assert not tracker.has_too_many_failures(1.0)


def test_reconciliation_counts_partial_shards_and_missing_ones():
    good = Summary("a", 90, {"ok": 90})
    bad = Summary("b", 10, {"ok": 8, "too_large": 2}, complete=False, reason="ends early")
    done = Reconciliation(2, (good, bad), ())
    assert (done.num_rows, done.num_ok, done.num_failed) == (100, 98, 2)
    assert done.failed_fraction == pytest.approx(3 / 101)
    assert [done.exit_status(limit) for limit in (0.0, 0.03)] == [2, 0]
    assert any("partial: b: ends early" in line for line in done.lines())
    assert Reconciliation(3, (good, bad), ("c",)).exit_status(1.0) == 1
    assert Reconciliation(1, (Summary("a", 5, {"ok": 4}),), ()).exit_status(1.0) == 1


def test_each_difference_of_a_fingerprint_is_named_and_equal_ones_pass():
    before = Fingerprint({"prompt": None, "options": {"num_beams": 1, "seed": 0}, "stop": []})
    before.require_same(Fingerprint(dict(before.parts)), "out")
    now = Fingerprint({"prompt": "x", "options": {"num_beams": 5, "seed": 0}, "stop": ["a"]})
    with pytest.raises(FingerprintMismatch) as refusal:
        now.require_same(before, "out")
    for difference in ("prompt: None -> 'x'", "options.num_beams: 1 -> 5", "stop: [] -> ['a']"):
        assert difference in str(refusal.value)
    assert "seed" not in str(refusal.value)
    assert now.digest != before.digest


def test_settings_survive_the_record():
    settings = CaptionSettings(input=("a", "b"), output="o", prompt="p", limit=3)
    assert from_dict(CaptionSettings, settings.to_dict()) == settings
    with pytest.raises(ValueError, match="unknown colour"):
        from_dict(CaptionSettings, {**settings.to_dict(), "colour": 1})


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (2, 1), (4, 0), (64, 8)])
@pytest.mark.parametrize("max_actors", [1, 2])
def test_one_of_each_stage_fits_at_the_same_time(cpus, gpus, max_actors):
    """Otherwise actors hold all CPUs while the read task that would feed them waits for ever."""
    placement = Placement(max_actors=max_actors)
    needs = reserve(placement, ClusterSize(num_cpus=cpus, num_gpus=gpus, cpus_per_node=cpus))
    assert needs.read_cpus + needs.decode_cpus + max_actors * needs.caption_cpus <= cpus
    assert min(needs.read_cpus, needs.decode_cpus) > 0
    if not gpus:
        assert 1 <= needs.num_threads <= cpus


def test_the_busiest_stage_is_the_bottleneck_and_reading_when_none_is_busy():
    loads = {"decode": {"a": Load(1, 10), "b": Load(3, 10)}, "caption": {"c": Load(9, 10)}}
    assert busy_fractions(loads) == {"decode": 0.2, "caption": 0.9}
    assert describe_bottleneck({"decode": 0.2, "caption": 0.9}).startswith("bottleneck: caption, busy 90%")
    assert "reading" in describe_bottleneck({"decode": 0.2, "caption": 0.3})


def test_the_rate_leaves_start_up_out():
    rate = Rate()
    for now, rows in [(0, 0), (100, 0), (101, 10), (102, 30), (103, 50)]:
        rate.add(rows, now)
    assert rate.mean == 20


def test_a_terminal_has_one_line_and_a_log_has_plain_ones():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = Snapshot(num_rows=1234, num_failed=5, images_per_s=67.8, shards_done=1, num_shards=9, left_s=3725.0)
    screen, log = Terminal(), io.StringIO()
    for stream in (screen, log):
        console = Console(stream)
        console.show(now)
        console.say("done")
    assert log.getvalue() == "1,234 images · 67.8/s · 5 failed · shards 1/9 · left 1 h 2 min\ndone\n"
    assert screen.getvalue().startswith("\r1,234 images")
    assert screen.getvalue().count("\n") == 1
    assert [duration(s) for s in (None, 0, 59.6, 90061)] == ["unknown", "0 s", "1 min", "1 d 1 h"]


def test_patience_outlasts_a_full_disk_but_not_for_ever():
    clock = [0.0]
    failures = [OSError(28, "No space left on device")] * 5

    def write() -> str:
        if failures:
            raise failures.pop()
        return "written"

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    assert retry_on_oserror(write, sleep=sleep, clock=lambda: clock[0]) == "written"
    failures.extend([OSError(28, "No space left on device")] * 10_000)
    with pytest.raises(OSError, match="No space"):
        retry_on_oserror(write, retry_for_s=60, sleep=sleep, clock=lambda: clock[0])
