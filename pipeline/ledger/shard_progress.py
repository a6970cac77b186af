"""How far the unfinished shards of a run are, and so which rows a resume reads.

A shard report says how reading a shard ended, and so how many rows it has. The worker that reads a shard
stores its report; the commit of the shard deletes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pipeline.inputs.reader import ShardReport, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.ledger.fragments import rows_in
from pipeline.ledger.layout import SHARD_REPORTS, parse_shard_report_name, shard_report_name
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState
from pipeline.rowset import RowSet
from pipeline.storage.folder import Folder


@dataclass
class ShardProgress:
    """How far one shard is."""

    shard: Shard
    done: RowSet
    """Rows that need no more work."""
    report: ShardReport | None = None
    """How reading the shard ended, once it has."""

    @property
    def is_complete(self) -> bool:
        return self.report is not None and self.done.covers(self.report.num_rows)

    @property
    def work(self) -> ShardWork:
        """The rows still to do, fixed now: a read task that runs again must read the same rows."""
        stop = None if self.report is None else self.report.num_rows
        return ShardWork(shard=self.shard, missing=tuple(self.done.missing(stop)))


def unfinished(folder: Folder, run: Run, state: OutputState) -> list[ShardProgress]:
    """Return the shards of a run that have no file yet, with what is known of each."""
    open_shards = [shard for shard in run.shards if shard.name not in state.finished]
    fragments = {s.name: state.fragments[s.name] for s in open_shards if s.name in state.fragments}
    done = rows_in(folder, fragments)
    return [
        ShardProgress(
            shard=shard,
            done=done.get(shard.name, RowSet()),
            report=load_shard_report(folder, shard.name, shard.generation)
            if shard.name in state.shard_reports
            else None,
        )
        for shard in open_shards
    ]


def store_shard_report(folder: Folder, report: ShardReport) -> None:
    """Store the report of a shard; safe to call twice, as Ray may read a shard again.

    A report that could read less does not replace one that could read more: rows that were there once count,
    unless the input has changed.
    """
    if not (report.complete or report.changed):
        known = load_shard_report(folder, report.shard, report.generation)
        if known is not None and (known.complete or known.num_rows > report.num_rows):
            return
    folder.put(shard_report_name(report.shard, report.generation), json.dumps(asdict(report)).encode())


def load_shard_report(folder: Folder, shard: str, generation: int = 0) -> ShardReport | None:
    """Return the stored report of a shard, or None when there is none."""
    content = folder.get(shard_report_name(shard, generation))
    return ShardReport(**json.loads(content)) if content else None


def shards_with_a_report(folder: Folder, generations: Mapping[str, int]) -> set[str]:
    found = map(parse_shard_report_name, folder.names(SHARD_REPORTS))
    return {shard for shard, generation in found if generation == generations.get(shard, 0)}
