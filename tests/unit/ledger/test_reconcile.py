"""The reconciliation decides the exit status: a row or shard it does not count is lost without a word."""

import pytest

from pipeline.ledger.commit import Summary
from pipeline.ledger.reconcile import Reconciliation


def test_it_counts_partial_shards_and_missing_ones():
    good = Summary("a", 90, {"ok": 90})
    bad = Summary("b", 10, {"ok": 8, "too_large": 2}, complete=False, reason="ends early")
    done = Reconciliation(2, (good, bad), ())
    assert (done.num_rows, done.num_ok, done.num_failed) == (100, 98, 2)
    assert done.failed_fraction == pytest.approx(3 / 101)
    assert [done.exit_status(limit) for limit in (0.0, 0.03)] == [2, 0]
    assert any("partial: b: ends early" in line for line in done.lines())
    assert any(line.startswith("blip2 retry reads partial shards again") for line in done.lines())
    assert not any("retry" in line for line in Reconciliation(1, (good,), ()).lines())
    assert Reconciliation(3, (good, bad), ("c",)).exit_status(1.0) == 1
    assert Reconciliation(1, (Summary("a", 5, {"ok": 4}),), ()).exit_status(1.0) == 1
