"""How far the unfinished shards of a run are, and so which rows a resume reads."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.inputs.reader import ShardReport, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.ledger.fragments import rows_in
from pipeline.ledger.rowset import RowSet
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState
from pipeline.ledger.shard_reports import load_shard_report
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
            report=load_shard_report(folder, shard.name) if shard.name in state.shard_reports else None,
        )
        for shard in open_shards
    ]
