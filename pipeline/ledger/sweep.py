"""Sweep an output folder: finish and delete what dead drivers and stragglers have left."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import Summary, read_summary, summary_in
from pipeline.ledger.fragments import (
    list_shard_files,
    read_shard_report,
    read_shard_reports,
    store_shard_report,
)
from pipeline.ledger.layout import FRAGMENTS, OLD_SHARD_REPORTS, output_name, shard_report_name
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.retry import report_of
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState, unfinished
from pipeline.ledger.summaries import keep_summaries
from pipeline.schema import RUN_ID_KEY
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import Folder

MAX_CONCURRENT_COMMITS = 8


def sweep(
    folder: Folder,
    run: Run,
    state: OutputState,
    commit: Callable[[ShardReport], Summary | None],
    is_slice: bool = False,
) -> OutputState:
    """Delete half-written files and those of late workers, and commit the shards that lack no row.

    A finished shard with fragments is committed again: a straggler or a retry wrote them after its file.

    Args:
        state: a listing of the output.
        commit: commits a shard.
        is_slice: whether `run` has only the shards of a slice. Then other drivers may be writing, and no file
            that may be theirs is deleted.

    Returns:
        What a listing would show now.
    """
    names = {shard.name for shard in run.shards}
    if not is_slice:
        state = state.of_shards(names)
        late = [shard for shard in state.finished - names if _is_of_run(folder, shard, run)]
        folder.delete_files([*state.leftovers, *state.unread_lists(run), *map(output_name, late)])
        state = replace(state.without(late), leftovers=(), shard_lists=(run.shard_list,))
    state = _move_old_reports(folder, state, names)
    reports = [p.report for p in unfinished(folder, run, state) if p.report is not None and p.is_complete]
    for shard in sorted(names & state.finished & (state.fragments.keys() | state.shard_reports.keys())):
        report = _report_of_finished(folder, state, shard)
        if report is not None:
            reports.append(report)
    with ThreadPoolExecutor(MAX_CONCURRENT_COMMITS) as pool:
        committed = [summary for summary in pool.map(commit, reports) if summary is not None]
    kept_in: list[str] = []
    with suppress(OSError):  # the footers have the same summaries
        kept_in = keep_summaries(folder, committed)
    return _after_commits(folder, state, committed, kept_in)


def _is_of_run(folder: Folder, shard: str, run: Run) -> bool:
    """Return whether a run has written the file of a shard, under this name.

    A late worker may commit a part of a table after the table was begun again and divided into other parts.
    """
    try:
        metadata = folder.read(output_name(shard), lambda file: pq.read_metadata(file).metadata or {})
    except (OSError, pa.ArrowException):
        return False
    return metadata.get(RUN_ID_KEY) == run.id.encode() and summary_in(metadata).shard == shard


def _move_old_reports(folder: Folder, state: OutputState, shards: Set[str]) -> OutputState:
    """Move reports of these shards that version 0.1.0 stored to where the fragments are."""
    reports = (state.shard_reports[shard] for shard in state.shard_reports.keys() & shards)
    old = [name for name in reports if name.startswith(f"{OLD_SHARD_REPORTS}/")]
    moved = {}
    for report in read_shard_reports(folder, old):
        store_shard_report(folder, report)
        moved[report.shard] = shard_report_name(report.shard, report.generation, report.changed)
    folder.delete_files(old)
    return replace(state, shard_reports={**state.shard_reports, **moved})


def _report_of_finished(folder: Folder, state: OutputState, shard: str) -> ShardReport | None:
    """Return the report to commit a finished shard with, or None to leave its files as they are.

    A complete shard stays complete. A partial shard needs the report of a new reading: without one, its
    fragments may belong to a retry that will be resumed. The report of a change stays until the shard is
    begun again, and its file says so already.
    """
    summary = read_summary(folder, shard)
    if summary.complete:
        return report_of(summary)
    stored = state.shard_reports.get(shard)
    report = None if stored is None else read_shard_report(folder, stored)
    is_said = report is not None and report.changed and report.reason == summary.reason
    return None if is_said and shard not in state.fragments else report


def _after_commits(
    folder: Folder, state: OutputState, committed: Sequence[Summary], kept_in: Sequence[str]
) -> OutputState:
    """Return what a listing would show after some shards were committed.

    Args:
        kept_in: names of the files in which their summaries are kept.
    """
    names = {summary.shard for summary in committed}
    fragments = {shard: found for shard, found in state.fragments.items() if shard not in names}
    reports = {shard: name for shard, name in state.shard_reports.items() if shard not in names}
    for summary in committed:
        if not summary.complete:  # Rows past its end and the report of a change stay.
            left = list_shard_files(folder, summary.shard, summary.generation)
            fragments |= {summary.shard: left.fragments} if left.fragments else {}
            reports |= {summary.shard: left.report} if left.report else {}
    files = at_once(folder.file, [output_name(summary.shard) for summary in committed])
    written = {s.shard: file for s, file in zip(committed, files, strict=True) if file is not None}
    kept = tuple(file for file in at_once(folder.file, kept_in) if file is not None)
    return replace(
        state,
        fragments=fragments,
        shard_reports=reports,
        written={**state.written, **written},
        summaries=(*state.summaries, *kept),
    )


def drop_markers(folder: Folder, state: OutputState, done: Reconciliation) -> None:
    """Delete the empty objects that Arrow leaves in a store for folders, if all shards are finished.

    They stay while a run is at work, or while a row may improve: deleting a folder would also delete a
    fragment that arrives at the same moment.

    Args:
        done: all shards of the run, compared with `state`.
    """
    is_over = not (done.missing or state.fragments or state.shard_reports)
    may_improve = any(summary.may_improve for summary in done.summaries)
    if is_over and not may_improve and not folder.is_local:
        folder.erase(FRAGMENTS)
        folder.erase(OLD_SHARD_REPORTS)
