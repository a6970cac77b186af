"""When the actors that commit shards are started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from pipeline.inputs.reader import ShardReport
from pipeline.run.committers import MAX_STARTS, Committer, Committers
from pipeline.stages.coordinator import Coordinator


def test_committers_take_no_process_before_the_stages_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts two processes at a time on two cores, so the model used to be loaded a second later."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: pytest.fail("an actor is about to be started"))
    job: Any = SimpleNamespace(ledger=None, metadata={}, empty_schema=pa.schema([]))
    committers = Committers(job, coordinator=None)
    committers.close()


def test_a_commit_that_kills_its_process_each_time_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray used to restart it forever, and nobody was told."""
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr("pipeline.run.committers.tell_coordinator", lambda _: None)
    books = Coordinator()
    coordinator = SimpleNamespace(
        begin_commit=SimpleNamespace(remote=books.begin_commit),
        end_commit=SimpleNamespace(remote=books.end_commit),
    )

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    ledger: Any = SimpleNamespace(commit=die)
    committer = Committer(coordinator, ledger, {}, pa.schema([]))
    for shard in ("a", "b"):
        report = ShardReport(shard=shard, num_rows=1, complete=True)
        for _ in range(MAX_STARTS):
            with pytest.raises(KeyboardInterrupt):
                committer.commit(report)
        with pytest.raises(RuntimeError, match="its process has died 10 times") as raised:
            committer.commit(report)
        assert "while committing" in raised.value.__notes__[0]
    ledger.commit = lambda *_: "summary"
    report = ShardReport(shard="c", num_rows=1, complete=True)
    assert [committer.commit(report) for _ in range(2 * MAX_STARTS)] == ["summary"] * 20
