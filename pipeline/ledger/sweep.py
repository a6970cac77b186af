"""Sweep an output folder: finish and delete what dead drivers and stragglers have left."""

from __future__ import annotations

from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import commit_shard, read_summary
from pipeline.ledger.fragments import delete_files, load_shard_report, read_shard_reports, store_shard_report
from pipeline.ledger.layout import FRAGMENTS, OLD_SHARD_REPORTS
from pipeline.ledger.retry import report_of
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState, unfinished
from pipeline.ledger.summaries import keep_summaries
from pipeline.storage.folder import Folder

MAX_CONCURRENT_COMMITS = 8


def sweep(
    folder: Folder,
    run: Run,
    state: OutputState,
    metadata: Mapping[bytes, bytes],
    empty_schema: pa.Schema,
    is_slice: bool = False,
) -> None:
    """Delete half-written files, and commit the shards that lack no row.

    A finished shard with fragments is committed again: a straggler or a retry wrote them after its file.

    Args:
        is_slice: whether `run` has only the shards of a slice. Then other drivers may be writing: no file is
            deleted that may be theirs.
    """
    names = {shard.name for shard in run.shards}
    if not is_slice:
        delete_files(folder, state.leftovers)
    _move_old_reports(folder, state, names)
    reports = [p.report for p in unfinished(folder, run, state) if p.report is not None and p.is_complete]
    for shard in sorted(names & state.finished & (state.fragments.keys() | state.shard_reports.keys())):
        report = _report_of_finished(folder, shard)
        if report is not None:
            reports.append(report)
    commit = partial(commit_shard, folder, metadata=metadata, empty_schema=empty_schema)
    with ThreadPoolExecutor(MAX_CONCURRENT_COMMITS) as pool:
        keep_summaries(folder, filter(None, pool.map(commit, reports)))


def _move_old_reports(folder: Folder, state: OutputState, shards: Set[str]) -> None:
    """Put reports of these shards that version 0.1.0 has stored next to the fragments."""
    reports = (state.shard_reports[shard] for shard in state.shard_reports.keys() & shards)
    old = [name for name in reports if name.startswith(f"{OLD_SHARD_REPORTS}/")]
    for report in read_shard_reports(folder, old):
        store_shard_report(folder, report)
    delete_files(folder, old)


def _report_of_finished(folder: Folder, shard: str) -> ShardReport | None:
    """Return the report to commit a finished shard with, or None to leave its fragments where they are.

    A complete shard stays complete. A partial shard needs the report of a new reading: without one, its
    fragments may belong to a retry that will be resumed.
    """
    summary = read_summary(folder, shard)
    return report_of(summary) or load_shard_report(folder, shard, summary.generation)


def drop_markers(folder: Folder, run: Run, state: OutputState) -> None:
    """Delete the empty objects that Arrow leaves in a store for folders, if all shards are finished.

    They stay while a run is at work: deleting a folder would also delete a fragment that arrives at the same
    moment.
    """
    is_over = {shard.name for shard in run.shards} <= state.finished and not (
        state.fragments or state.shard_reports
    )
    if is_over and not folder.is_local:
        folder.erase(FRAGMENTS)
        folder.erase(OLD_SHARD_REPORTS)
