"""Which rows of a finished run to try again: those that are not ok, and what a partial shard lacks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import Summary, read_rows, read_summary
from pipeline.ledger.fragments import rows_in
from pipeline.ledger.ledger import Run, ShardProgress, State
from pipeline.ledger.rowset import RowSet, runs
from pipeline.storage.folder import Folder


def to_retry(folder: Folder, run: Run, state: State) -> list[ShardProgress]:
    """Shards with rows to try again; done are the rows that are ok.

    Raises:
        ValueError: the run is not finished.
    """
    unfinished = [shard.name for shard in run.shards if shard.name not in state.finished]
    if unfinished:
        raise ValueError(
            f"output must be of a finished run, got {folder} with {len(unfinished):,} shards still "
            "to do; run the caption command again first"
        )
    by_name = {shard.name: shard for shard in run.shards}
    with ThreadPoolExecutor(16) as pool:
        summaries = list(pool.map(lambda name: read_summary(folder, name), by_name))
    faulty = [s for s in summaries if s.num_failed or not s.complete]
    waiting = rows_in(folder, {s.shard: state.fragments.get(s.shard, ()) for s in faulty})
    progress = []
    for summary in faulty:
        done = RowSet(runs(_ok_rows(folder, summary.shard)))
        done.update(waiting[summary.shard])
        progress.append(ShardProgress(by_name[summary.shard], done, report_of(summary)))
    return progress


def report_of(summary: Summary) -> ShardReport | None:
    """How reading a finished shard had ended; None for a partial one, which is to be read again."""
    if not summary.complete:
        return None
    return ShardReport(shard=summary.shard, num_rows=summary.num_rows, complete=True)


def _ok_rows(folder: Folder, shard: str) -> Iterator[int]:
    rows = read_rows(folder, shard)
    assert rows is not None
    yield from rows.filter(pc.equal(rows["status"], Status.OK.value))["row"].to_pylist()
