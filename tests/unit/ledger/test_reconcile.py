"""The reconciliation decides the exit status: a row or shard that it does not count is lost silently."""

import pytest

from pipeline.ledger.commit import Summary
from pipeline.ledger.reconcile import Reconciliation


def test_it_counts_partial_shards_and_missing_ones():
    good = Summary("a", 90, {"ok": 90})
    bad = Summary("b", 10, {"ok": 8, "too_large": 2}, complete=False, reason="ends early")
    done = Reconciliation(2, (good, bad), ())
    assert (done.num_rows, done.num_ok, done.num_failed) == (100, 98, 2)
    assert done.lines()[0] == "100 rows = 98 ok + 2 failed (2 too_large)"
    assert done.failed_fraction == pytest.approx(3 / 101)
    assert [done.exit_status(limit) for limit in (0.0, 0.03)] == [2, 0]
    assert any("partial: b: ends early" in line for line in done.lines())
    assert any(line.startswith("blip2 retry reads partial shards again") for line in done.lines())
    assert not any("retry" in line for line in Reconciliation(1, (good,), ()).lines())
    assert Reconciliation(3, (good, bad), ("c",)).exit_status(1.0) == 1
    assert Reconciliation(1, (Summary("a", 5, {"ok": 4}),), ()).exit_status(1.0) == 1


def test_all_rows_of_a_shard_may_have_failed():
    assert Summary("a", 3, {"undecodable": 3}).num_failed == 3


def test_a_run_without_rows_has_no_failures():
    done = Reconciliation(0, (), ())
    assert (done.failed_fraction, done.exit_status(0.0)) == (0.0, 0)
    assert done.lines()[0] == "0 rows = 0 ok + 0 failed"


@pytest.mark.parametrize(("num_missing", "last"), [(5, "missing: 4"), (7, "... and 2 more")])
def test_five_shards_are_named_and_the_others_counted(num_missing, last):
    done = Reconciliation(num_missing, (), tuple(map(str, range(num_missing))))
    assert [line for line in done.lines() if "missing: " in line] == [f"missing: {n}" for n in range(5)]
    assert done.lines()[-1] == last
