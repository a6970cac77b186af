"""Sweep an output folder: finish and delete what dead drivers and stragglers have left."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import commit_shard, read_summary
from pipeline.ledger.layout import FRAGMENTS, SHARD_REPORTS
from pipeline.ledger.retry import report_of
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState
from pipeline.ledger.shard_progress import load_shard_report, unfinished
from pipeline.storage.folder import Folder

MAX_CONCURRENT_COMMITS = 8


def sweep(
    folder: Folder, run: Run, state: OutputState, metadata: Mapping[bytes, bytes], empty_schema: pa.Schema
) -> None:
    """Delete half-written files, and commit the shards that lack no row.

    A finished shard with fragments is committed again: a straggler or a retry wrote them after its file.
    """
    for name in state.leftovers:
        folder.delete(name)
    reports = [p.report for p in unfinished(folder, run, state) if p.report is not None and p.is_complete]
    for shard in sorted(state.finished & (state.fragments.keys() | state.shard_reports)):
        report = _report_of_finished(folder, shard)
        if report is not None:
            reports.append(report)
    commit = partial(commit_shard, folder, metadata=metadata, empty_schema=empty_schema)
    with ThreadPoolExecutor(MAX_CONCURRENT_COMMITS) as pool:
        list(pool.map(commit, reports))


def _report_of_finished(folder: Folder, shard: str) -> ShardReport | None:
    """Return the report to commit a finished shard with, or None to leave its fragments where they are.

    A complete shard stays complete. A partial shard needs the report of a new reading: without one, its
    fragments may belong to a retry that will be resumed.
    """
    summary = read_summary(folder, shard)
    return report_of(summary) or load_shard_report(folder, shard, summary.generation)


def drop_markers(folder: Folder, run: Run, state: OutputState) -> None:
    """Delete the empty objects that Arrow leaves in a store for emptied folders, if all shards are finished.

    Each later listing would return one for every shard. They stay while a run is at work: deleting a folder
    would also delete a fragment that arrives at the same moment.
    """
    is_over = {shard.name for shard in run.shards} <= state.finished and not (
        state.fragments or state.shard_reports
    )
    if is_over and not folder.is_local:
        folder.below(FRAGMENTS).erase()
        folder.below(SHARD_REPORTS).erase()
