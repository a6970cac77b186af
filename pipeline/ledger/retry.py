"""Which rows of a finished run `retry` runs again: rows that are not ok, and what a partial shard lacks."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import Summary, read_rows
from pipeline.ledger.fragments import rows_in
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState, ShardProgress, unfinished
from pipeline.ledger.summaries import load_summaries
from pipeline.progress import count
from pipeline.rowset import RowSet
from pipeline.storage.folder import Folder


def to_retry(folder: Folder, run: Run, state: OutputState) -> list[ShardProgress]:
    """Return the shards with rows to run again; their rows that are ok count as done.

    Shards that were begun again have no file, and all their rows are run.
    """
    by_name = {shard.name: shard for shard in run.shards if shard.name in state.finished}
    summaries = load_summaries(folder, state, list(by_name))
    faulty = [s for s in summaries if s.num_failed or not s.complete]
    in_fragments = rows_in(folder, {s.shard: state.fragments.get(s.shard, ()) for s in faulty})
    progress = unfinished(folder, run, state)
    for summary in faulty:
        done = RowSet.of_rows(_ok_rows(folder, summary.shard))
        done.update(in_fragments[summary.shard])
        progress.append(ShardProgress(by_name[summary.shard], done, report_of(summary)))
    return progress


def require_finished(folder: Folder, run: Run, state: OutputState) -> None:
    """Raise ValueError if a shard has no file, unless an earlier retry has begun it again."""
    left = [s.name for s in run.shards if s.name not in state.finished and not s.generation]
    if left:
        raise ValueError(
            f"output must hold a finished run, got {folder} with {count(len(left), 'unfinished shard')}; "
            "run the caption command again first"
        )


def report_of(summary: Summary) -> ShardReport | None:
    """Return how reading a finished shard ended, or None for a partial shard, which must be read again."""
    if not summary.complete:
        return None
    return ShardReport(
        shard=summary.shard,
        num_rows=summary.num_rows,
        complete=True,
        generation=summary.generation,
        content=summary.content,
        note=summary.note,
    )


def _ok_rows(folder: Folder, shard: str) -> Iterator[int]:
    rows = read_rows(folder, shard, ["row", "status"])
    assert rows is not None
    yield from rows.filter(pc.equal(rows["status"], Status.OK.value))["row"].to_pylist()
