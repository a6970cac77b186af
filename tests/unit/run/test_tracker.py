"""What the driver knows of the open shards: with a mistake, a shard is committed too early or never."""

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.scan import ShardProgress
from pipeline.rowset import RowSet
from pipeline.run.tracker import Tracker
from pipeline.stages.receipts import Receipt


def open_shard(name="a", done=(), report=None, num_rows=None) -> ShardProgress:
    shard = Shard(name=name, format="webdataset", root="/in", files=(name,), num_rows=num_rows)
    return ShardProgress(shard, RowSet(done), report)


def receipt(start, stop, shard="a", status="ok") -> Receipt:
    return Receipt(shard, ((start, stop),), ((status, stop - start),))


def report_of(num_rows, shard="a") -> ShardReport:
    return ShardReport(shard=shard, num_rows=num_rows, complete=True)


def test_a_shard_is_complete_when_its_report_and_all_its_rows_are_known():
    tracker = Tracker([open_shard()])
    assert tracker.without_report() == ["a"]
    tracker.add(receipt(0, 10))
    assert tracker.take_complete() == []
    tracker.add_report(report_of(12))
    assert tracker.without_report() == []
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


def test_no_rows_fail_when_receipts_overlap():
    """After the deaths of the coordinator and a worker, the count used to be "-5 failed"."""
    tracker = Tracker([open_shard()])
    tracker.add(receipt(0, 10))
    tracker.add(receipt(5, 15))
    assert (tracker.num_rows, tracker.num_failed) == (15, 0)


def test_a_second_reading_that_ends_early_does_not_replace_the_first():
    """Ray reads a shard again for lost blocks. If the store failed then, a whole shard used to be partial."""
    tracker = Tracker([open_shard()])
    tracker.add_report(report_of(12))
    tracker.add_report(ShardReport(shard="a", num_rows=4, complete=False, reason="503"))
    tracker.add(receipt(0, 4))
    assert tracker.take_complete() == []
    tracker.add(receipt(4, 12))
    assert tracker.take_complete() == [report_of(12)]


def test_a_straggler_of_a_committed_shard_is_ignored():
    tracker = Tracker([open_shard(report=report_of(2))])
    tracker.add(receipt(0, 2))
    tracker.take_complete()
    tracker.add(receipt(0, 2))
    tracker.add_report(report_of(2))
    assert tracker.without_report() == []
    assert tracker.take_complete() == []
    assert tracker.num_rows == 2


def test_rows_left_are_estimated_from_the_shards_of_known_length():
    tracker = Tracker([open_shard("a", num_rows=100), open_shard("b"), open_shard("c", done=[(0, 30)])])
    assert tracker.estimate_rows_left() == 270
    assert Tracker([open_shard()]).estimate_rows_left() is None


def test_a_shard_that_is_done_counts_for_the_mean_and_no_longer_as_work():
    tracker = Tracker([open_shard("a", num_rows=100), open_shard("b", done=[(0, 30)])])
    tracker.add(receipt(0, 60))
    tracker.add_report(report_of(60))  # the listing said 100
    tracker.take_complete()
    assert (tracker.mean_rows, tracker.estimate_rows_left()) == (60, 30)


def test_an_input_that_fails_is_noticed_after_enough_rows():
    tracker = Tracker([open_shard()])
    tracker.add(receipt(0, 400, status="undecodable"))
    assert not tracker.has_too_many_failures(0.0)
    tracker.add(receipt(400, 600, status="undecodable"))
    assert tracker.has_too_many_failures(0.0)
    assert not tracker.has_too_many_failures(1.0)


def test_a_resume_estimates_with_the_lengths_that_the_attempt_before_knew():
    """After each death of its driver, a run used to have no ETA until one shard was completely read."""
    tracker = Tracker([open_shard("a"), open_shard("b", done=[(0, 30)])], usual_rows=100)
    assert (tracker.mean_rows, tracker.estimate_rows_left()) == (100, 170)
    tracker.add_report(report_of(60))
    assert (tracker.mean_rows, tracker.estimate_rows_left()) == (60, 90)
